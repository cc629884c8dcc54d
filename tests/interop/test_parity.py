"""Every family and head against transformers, through files: logits, gradients, and the way back.

In bfloat16 a computation of two layers is held to within a twentieth of the largest logit: each of its products rounds to 1/256.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from llm_jax.interop import families, huggingface, names
from llm_jax.models import transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

V, D, H, F, L, B, S = 99, 36, 3, 50, 2, 3, 13
LENGTHS = np.array([S, 9, 5])
REAL = (np.arange(S) < LENGTHS[:, None]).astype(np.int32)
SHIFT = np.array([[0], [3], [7]])
BEGIN, PAD, END = 0, 1, 2
IDS = dict(pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN)

BERT = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=H,
    intermediate_size=F,
    max_position_embeddings=32,
)
LLAMA = dict(BERT, num_key_value_heads=1, head_dim=12, rope_theta=1234.0)
DISTILBERT = dict(vocab_size=V, dim=D, n_layers=L, n_heads=H, hidden_dim=F, max_position_embeddings=32)
GPT2 = dict(vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_inner=F, n_positions=32)
T5 = dict(
    vocab_size=V,
    d_model=D,
    d_kv=10,
    d_ff=F,
    num_layers=L,
    num_decoder_layers=1,
    num_heads=H,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=BEGIN,
)
T5_1_1 = dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
MARIAN = dict(
    vocab_size=V,
    d_model=D,
    encoder_layers=L,
    decoder_layers=1,
    encoder_ffn_dim=F,
    decoder_ffn_dim=F,
    encoder_attention_heads=H,
    decoder_attention_heads=H,
    max_position_embeddings=32,
    decoder_start_token_id=BEGIN,
    activation_function="swish",
    scale_embedding=True,
    forced_eos_token_id=END,
)


DEPTH = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers", "marian": "encoder_layers"}
"""Of the base alone and of the lesser heads one layer will do: their names differ by a prefix."""


class Case(NamedTuple):
    """A class of transformers and the sizes to build it with."""

    family: str
    title: str
    sizes: dict[str, Any]
    kind: str

    @property
    def name(self) -> str:
        return f"{self.title}{self.kind}" + ("-1.1" if "feed_forward_proj" in self.sizes else "")


def cases() -> list[Any]:
    encoders = [
        ("bert", "Bert", BERT),
        ("roberta", "Roberta", dict(BERT, type_vocab_size=1)),
        ("distilbert", "DistilBert", DISTILBERT),
    ]
    llamas = [
        ("llama", "Llama", LLAMA),
        ("mistral", "Mistral", LLAMA),
        ("qwen2", "Qwen2", dict(LLAMA, num_key_value_heads=3, tie_word_embeddings=True)),
        ("qwen3", "Qwen3", dict(LLAMA, head_dim=10)),
    ]
    both = ("Model", "ForSequenceClassification", "ForQuestionAnswering")
    table = [
        *((row, ("ForMaskedLM", *both)) for row in encoders),
        (encoders[0], ("ForPreTraining",)),
        (("gpt2", "GPT2", GPT2), ("LMHeadModel", *both)),
        *((row, ("ForCausalLM", *both)) for row in llamas),
        (("t5", "T5", T5), ("ForConditionalGeneration", *both)),
        (("t5", "T5", T5_1_1), ("ForConditionalGeneration", *both)),
        (("marian", "Marian", MARIAN), ("MTModel", "Model")),
    ]
    every = [Case(*row, kind) for row, kinds in table for kind in kinds]
    every = [
        case._replace(sizes={**case.sizes, DEPTH.get(case.family, "num_hidden_layers"): 1})
        if case.kind in both
        else case
        for case in every
    ]
    return [pytest.param(case, id=case.name) for case in every]


def build(case: Case) -> Any:
    """A torch model with random weights: fresh biases are zero and fresh norms one, which would hide much."""
    config = getattr(transformers, f"{case.title}Config")(**case.sizes, **IDS)
    model = getattr(transformers, f"{case.title}{case.kind}")(config).eval()
    if case.name == "T5ForConditionalGeneration-1.1":  # transformers 5 ties it, the published weights are not
        model.lm_head.weight = torch.nn.Parameter(torch.empty(V, D))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            drawn = torch.randn(x.shape, generator=generator)
            if "embed_positions" in name or not (x.requires_grad or name == "final_logits_bias"):
                continue
            is_norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            x.copy_(1 + 0.2 * drawn if is_norm else drawn * (0.08 if name.endswith(".q.weight") else 0.25))
    return model


def inputs(case: Case, model: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(batch for us, arguments for transformers): rows of several lengths whose positions begin at several places."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, V, (B, S)).astype(np.int32)
    tokens[np.arange(B), LENGTHS - 1] = END
    tokens = np.where(REAL, tokens, PAD).astype(np.int32)
    if case.family in ("t5", "marian"):
        encoder = {"encoder_tokens": tokens, "encoder_segment_ids": REAL}
        begun = np.concatenate([np.full((B, 1), BEGIN), tokens[:, :-1]], axis=1).astype(np.int32)
        theirs = dict(input_ids=tokens, attention_mask=REAL, decoder_input_ids=begun, decoder_attention_mask=REAL)
        return {**encoder, "tokens": begun, "segment_ids": REAL}, theirs
    batch, theirs = {"tokens": tokens, "segment_ids": REAL}, dict(input_ids=tokens, attention_mask=REAL)
    accepted = inspect.signature(model.forward).parameters
    if case.family != "roberta" and "position_ids" in accepted:
        batch["positions"] = (np.arange(S) + SHIFT).astype(np.int32)
        theirs["position_ids"] = batch["positions"]
    if case.family == "bert":
        batch["types"] = theirs["token_type_ids"] = rng.integers(0, 2, (B, S)).astype(np.int32)
    return batch, theirs


def their_outputs(out: Any) -> list[Any]:
    """What a class gives, in the order of `our_outputs`."""
    if "start_logits" in out:
        return [torch.stack([out.start_logits, out.end_logits], dim=-1)]
    if "prediction_logits" in out:
        return [out.prediction_logits]
    if "logits" in out:
        return [out.logits]
    pooled = out.get("pooler_output")
    return [out.last_hidden_state, *([] if pooled is None else [pooled])]


def our_outputs(config: Any, params: Any, batch: Any) -> list[jax.Array]:
    out = transformer.apply(config, params, batch)
    return [x for x in (out.hidden, out.logits) if x is not None] if config.head == "none" else [out.logits]


def where_real(x: Any) -> np.ndarray:
    """1 where an output means something: at real tokens, and at every row of class scores."""
    real = REAL if x.ndim == 3 else np.ones(B, np.int32)
    return real.reshape(*real.shape, 1).astype(np.float32) * np.ones(x.shape, np.float32)


def weights_of(outputs: list[Any]) -> list[np.ndarray]:
    """The random vectors along which the outputs are differentiated."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal(x.shape).astype(np.float32) * where_real(x) for x in outputs]


@functools.partial(jax.jit, static_argnums=0)
def our_gradients(config: Any, params: Any, batch: Any, along: Any) -> tuple[list[jax.Array], Any]:
    def loss(params: Any) -> Any:
        outputs = our_outputs(config, params, batch)
        return sum(jnp.sum(x * w) for x, w in zip(outputs, along)), outputs

    grads, outputs = jax.grad(loss, has_aux=True)(params)
    return outputs, grads


def run_theirs(model: Any, theirs: dict[str, np.ndarray]) -> list[Any]:
    return their_outputs(model(**{name: torch.from_numpy(x).long() for name, x in theirs.items()}))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def named(loaded: Any, params: Any) -> dict[str, np.ndarray]:
    """Params, or their gradients, by the names that transformers gives them."""
    origin = loaded.card["huggingface"]
    family = families.FAMILIES[origin["config"]["model_type"]]
    places = names.places(loaded.config, family.entries(loaded.config, origin["prefix"]))
    return {name: fetch() for name, _, fetch in names.arrays(params, places)}


def check_gradients(model: Any, loaded: Any, grads: Any) -> None:
    """Of every parameter, relative to its largest."""
    theirs = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
    ours = {name: x for name, x in named(loaded, grads).items() if name != "final_logits_bias"}
    assert set(theirs) - set(ours) <= set(loaded.card["huggingface"]["left_out"])
    noise = 1e-6 * max(np.abs(x).max() for x in theirs.values())  # the keys' bias has none, but for rounding
    for name, x in ours.items():
        expected = theirs.get(name, np.zeros_like(x))
        assert np.abs(x - expected).max() <= 1e-3 * np.abs(expected).max() + noise, name


def check_export(model: Any, theirs: Any, loaded: Any, source: Path, out: Path) -> None:
    """The same tensors byte for byte, and the same outputs from `from_pretrained`."""
    huggingface.save(loaded, out)
    before, after = tensors(source), tensors(out)
    assert set(before) - set(after) == set(loaded.card["huggingface"]["left_out"]) and set(after) <= set(before)
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)
    cls = transformers.BertForMaskedLM if type(model) is transformers.BertForPreTraining else type(model)
    again, report = cls.from_pretrained(out, output_loading_info=True)
    assert all("embed_positions" in name for name in report["missing_keys"])
    assert not [name for name in report["unexpected_keys"] if "pooler" not in name]
    with torch.no_grad():
        for x, y in zip(run_theirs(again.eval(), theirs), run_theirs(model, theirs)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("case", cases())
def test_logits_gradients_and_the_way_back(
    case: Case, tmp_path: Path, mesh: Any, equal_trees: Callable[[Any, Any], None]
):
    model = build(case)
    model.save_pretrained(tmp_path / "there")
    loaded = huggingface.load(tmp_path / "there", mesh())
    batch, theirs = inputs(case, model)
    expected = run_theirs(model, theirs)
    along = weights_of(expected)
    sum((x * torch.from_numpy(w)).sum() for x, w in zip(expected, along)).backward()

    outputs, grads = our_gradients(loaded.config, loaded.params, batch, along)
    assert len(outputs) == len(expected)
    for output, x in zip(outputs, expected):
        wanted, where = x.detach().numpy(), where_real(x)
        assert np.abs(wanted * where).max() > 0.3
        np.testing.assert_allclose(output * where, wanted * where, atol=1e-4)
    check_gradients(model, loaded, grads)
    check_export(model, theirs, loaded, tmp_path / "there", tmp_path / "back")

    stepped = loaded.__class__(
        loaded.config, jax.tree.map(lambda x, g: x - 0.1 * g, loaded.params, grads), None, loaded.card
    )
    huggingface.save(stepped, tmp_path / "stepped")
    found = huggingface.match(tmp_path / "stepped")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stepped.params)
    again = names.assemble(found.config, found.wanted, found.tensors.__getitem__, abstract)
    assert found.config == stepped.config
    equal_trees(again, stepped.params)


HALF = [
    case
    for case in cases()
    if case.id
    in (
        "BertForMaskedLM",
        "RobertaForMaskedLM",
        "GPT2LMHeadModel",
        "Qwen3ForCausalLM",
        "T5ForConditionalGeneration-1.1",
        "MarianMTModel",
    )
]


@pytest.mark.parametrize("case", HALF)
def test_bfloat16(case: Case, tmp_path: Path, mesh: Any):
    """Weights stored in bfloat16 come back so, byte for byte; computed in bfloat16 the logits stay near those of float32."""
    model = build(case).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "there")
    loaded = huggingface.load(tmp_path / "there", mesh())
    assert loaded.card["huggingface"]["dtype"] == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype("float32")}
    batch, theirs = inputs(case, model)
    with torch.no_grad():
        (expected,) = run_theirs(model.float(), theirs)
    found = jax.jit(functools.partial(our_outputs, loaded.config.replace(dtype="bfloat16")))(loaded.params, batch)[0]
    wanted, where = expected.numpy(), where_real(expected)
    assert np.abs((found - wanted) * where).max() < 0.05 * np.abs(wanted * where).max()
    huggingface.save(loaded, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").stat().st_size < 1.1 * (
        tmp_path / "there" / "model.safetensors"
    ).stat().st_size
    again = type(model).from_pretrained(tmp_path / "back", dtype="auto")
    assert again.dtype == torch.bfloat16
    kept = dict(again.named_parameters())
    assert all(torch.equal(kept[name].float(), x) for name, x in model.named_parameters())


FRESH = [
    ("bert", dict(head="classification", pooler="tanh", labels=3)),
    ("roberta", dict(head="mlm")),
    ("distilbert", dict(head="mlm", mlp="relu")),
    ("gpt2", dict(mlp="silu", attention_scale=False)),
    ("llama", dict(kv_heads=1, rotary_base=5e5)),
    ("llama", dict(bias="qkv", tie_embeddings=True)),
    ("llama", dict(qk_norm=True, head_dim=10)),
    ("llama", dict(heads=5, kv_heads=1, head_dim=8)),
    ("t5", dict(head_dim=10)),
    ("t5", dict(head_dim=10, mlp="gated_gelu_tanh", tie_embeddings=False, decoder_layers=1)),
    ("t5", dict(head_dim=10, mlp="gated_silu", logits_scale=False)),
    ("marian", dict(decoder_layers=1)),
]


@pytest.mark.parametrize("family, changes", FRESH)
def test_a_model_of_ours_is_read_by_transformers(family: str, changes: Any, made: Any, tmp_path: Path):
    """One that never was theirs: all they need to know of it stands in the config.json."""
    model = made(family, **{"layers": 1, **changes})
    params = jax.tree.map(lambda x: 0.2 * x, model.params)
    huggingface.save(model.__class__(model.config, params), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    cls = getattr(transformers, config.architectures[0])
    again, report = cls.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert all("embed_positions" in name for name in report["missing_keys"]) and not report["unexpected_keys"]
    case = Case(family, "", {}, "")
    batch, theirs = inputs(case, again)
    with torch.no_grad():
        (expected,) = run_theirs(again.eval(), theirs)
    found = jax.jit(functools.partial(our_outputs, model.config))(params, batch)[0]
    where = where_real(expected)
    assert np.abs(expected.numpy() * where).max() > 0.1
    np.testing.assert_allclose(found * where, expected.numpy() * where, atol=1e-4)
