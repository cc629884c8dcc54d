"""Operations counted by hand, and the peak that utilisation is measured against."""

from types import SimpleNamespace

import pytest

from llm_jax import flops
from llm_jax.models import presets
from llm_jax.models.config import ModelConfig

D, H, E, F, V, L, B, S, U = 8, 2, 4, 12, 50, 3, 2, 16, 24
SIZES = dict(vocab_size=V, max_length=32, layers=L, dim=D, heads=H, mlp_dim=F)


def test_decoder():
    """Four square products and two of the MLP a layer, scores and values over half of all pairs, and the unembedding."""
    layer = 4 * D * D + 2 * D * F
    causal = 2 * S * D  # 2 products of 2 S E operations, H heads, half of the keys
    config = ModelConfig(**SIZES, bias="all", norm="layer", positions="learned")
    assert flops.forward_flops(config, {"tokens": (B, S)}) == B * S * (L * (2 * layer + causal) + 2 * D * V)
    assert flops.train_flops(config, {"tokens": (B, S)}) == 3 * flops.forward_flops(config, {"tokens": (B, S)})


def test_grouped_heads_and_a_gated_mlp():
    layer = 2 * D * D + 2 * D * E + 3 * D * F
    config = ModelConfig(**SIZES, kv_heads=1, mlp="gated_silu", norm="rms", qk_norm=True, tie_embeddings=False)
    assert flops.forward_flops(config, {"tokens": (B, S)}) == B * S * (L * (2 * layer + 2 * S * D) + 2 * D * V)


def test_encoder_decoder():
    attention, mlp = 4 * D * D, 2 * D * F
    encoder = B * U * L * (2 * (attention + mlp) + 4 * U * D)
    memory = B * U * L * 2 * 2 * D * D  # keys and values of the source for each layer of the decoder
    decoder = B * S * L * (2 * (2 * attention - 2 * D * D + mlp) + 2 * S * D + 4 * U * D)
    config = presets.vaswani(**SIZES)
    found = flops.forward_flops(config, {"tokens": (B, S), "encoder_tokens": (B, U)})
    assert found == encoder + memory + decoder + B * S * 2 * D * V


def test_masked_positions_alone_reach_the_vocabulary():
    config = presets.bert(**SIZES, head="mlm", pooler="none")
    every, few = (flops.forward_flops(config, {"tokens": (B, S), "predict": (B, m)}) for m in (S, 3))
    assert every - few == 2 * B * (S - 3) * (V * D + D * D)
    layer = 4 * D * D + 2 * D * F
    assert few == B * S * L * (2 * layer + 4 * S * D) + 2 * B * 3 * (V * D + D * D)


@pytest.mark.parametrize(
    ("kind", "count", "peak"),
    [
        ("TPU v5 lite", 4, 4 * 197e12),
        ("TPU v5", 1, 459e12),
        ("TPU v5p", 2, 2 * 459e12),
        ("NVIDIA H100 80GB HBM3", 8, 8 * 989e12),
    ],
)
def test_peak_of_the_data_sheet(kind: str, count: int, peak: float):
    devices = [SimpleNamespace(device_kind=kind, platform="tpu")] * count
    assert flops.peak_flops(devices) == (peak, "data sheet, bfloat16")


def test_unknown_hardware_has_no_peak():
    assert flops.peak_flops([SimpleNamespace(device_kind="TPU v99", platform="tpu")]) == (
        0.0,
        "unknown device 'TPU v99'",
    )


def test_a_processor_is_measured():
    device = SimpleNamespace(device_kind="cpu", platform="cpu")
    peak, source = flops.peak_flops([device])
    assert 1e8 < peak < 1e14 and source == "measured float32 matrix product"
    assert flops.peak_flops([device] * 8) == (peak, source)  # devices made of the same cores
