"""A model's config refuses what does not go together, with the message that a user sees."""

import pytest

from llm_jax.errors import ConfigError
from llm_jax.models.config import ModelConfig

BAD = [
    (dict(architecture="decoders"), "unknown architecture 'decoders'; did you mean 'decoder'?"),
    (dict(mlp="gated_sil"), "unknown mlp 'gated_sil'; did you mean 'gated_silu'?"),
    (dict(norm="batch"), "unknown norm 'batch'; known: layer, rms"),
    (dict(norm_place="middle"), "unknown norm_place 'middle'; known: post, pre"),
    (dict(positions="rotery"), "unknown positions 'rotery'; did you mean 'rotary'?"),
    (dict(bias="some"), "unknown bias 'some'; known: all, none, qkv"),
    (dict(head="classifier"), "unknown head 'classifier'; did you mean 'classification'?"),
    (dict(pooler="mean"), "unknown pooler 'mean'; known: none, relu, tanh"),
    (dict(dtype="float16"), "unknown dtype 'float16'; did you mean 'bfloat16'?"),
    (
        dict(remat="all"),
        "unknown remat 'all'; known: attention, dots, dots_attention, full, mlp, none, offload, offload_dots, offload_qkv, out, qkv",
    ),
    (dict(layers=0), "model.layers is 0: it must be at least 1"),
    (dict(vocab_size=-5), "model.vocab_size is -5: it must be at least 1"),
    (dict(mlp_dim=-1), "model.mlp_dim is -1: it must not be negative"),
    (dict(dim=100, heads=6), "model.dim 100 is not a multiple of model.heads 6; or set model.head_dim"),
    (dict(heads=6, kv_heads=4), "model.heads 6 is not a multiple of model.kv_heads 4"),
    (dict(dim=18, heads=6), "rotary positions need an even head size, not 3"),
    (dict(dim=15, heads=3, positions="sinusoidal"), "sinusoidal positions need an even model.dim, not 15"),
    (dict(dropout=1.0), "model.dropout is 1.0: it must lie in [0, 1)"),
    (dict(lora_dropout=-0.1), "model.lora_dropout is -0.1: it must lie in [0, 1)"),
    (dict(patch_size=16, image_size=100), "model.image_size 100 is not a multiple of model.patch_size 16"),
    (dict(head="mlm"), "the mlm head is for an encoder, not for a decoder"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_bad_values(changes, message):
    with pytest.raises(ConfigError) as told:
        ModelConfig(**changes)
    assert str(told.value) == message


def test_sizes_that_follow_from_others():
    config = ModelConfig(dim=64, heads=4, kv_heads=2, layers=3)
    assert (
        config.head_size,
        config.kv_size,
        config.mlp_size,
        config.decoder_depth,
        config.encoder_depth,
        config.patches,
    ) == (16, 2, 256, 3, 0, 0)
    both = config.replace(architecture="encoder-decoder", decoder_layers=5, head_dim=10)
    assert (both.encoder_depth, both.decoder_depth, both.head_size) == (3, 5, 10)
    assert both.replace(decoder_layers=0).decoder_depth == 3
    encoder = config.replace(architecture="encoder", patch_size=4, image_size=12)
    assert (encoder.encoder_depth, encoder.decoder_depth, encoder.patches) == (3, 0, 9)
