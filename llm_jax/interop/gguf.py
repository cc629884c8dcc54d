"""Models of the Llama family from GGUF files: sizes from the metadata, weights dequantised shard by shard, the tokenizer, a card.

The format of the file is in `gguf_file.py`, its tokenizer in `gguf_tokenizer.py`.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import gguf
import jax
import numpy as np

from llm_jax import sharding
from llm_jax.card import Card
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, UserError, choose
from llm_jax.interop import gguf_file, gguf_tokenizer, names
from llm_jax.interop.gguf_file import File
from llm_jax.interop.names import FLIP, HEADS_BIAS, HEADS_IN, HEADS_OUT, Entry, Layout
from llm_jax.model import Model, abstract_params
from llm_jax.models import presets
from llm_jax.models.config import ModelConfig
from llm_jax.storage import Path

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_LARGEST = 2**31 - 1

_WITHOUT: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "{}.expert_count": (0,),
    "{}.rope.scaling.type": ("none",),
    "{}.rope.scaling.factor": (0.0, 1.0),
    "{}.rope.scale_linear": (0.0, 1.0),
    "{}.attention.causal": (True,),
    "{}.attention.scale": (0.0,),
    "{}.attn_logit_softcapping": (0.0,),
    "{}.final_logit_softcapping": (0.0,),
    "{}.embedding_scale": (0.0, 1.0),
    "{}.residual_scale": (0.0, 1.0),
    "{}.logit_scale": (0.0, 1.0),
}
"""keys of what is not supported, {} for the architecture -> the values that do without it"""

PAIRS = Layout("d h (r j)", "(h j r) d")
"""queries and keys with the two values that are rotated together side by side, as architecture llama stores them"""
PAIRS_BIAS = Layout("h (r j)", "(h j r)")


def entries(architecture: str) -> tuple[Entry, ...]:
    """Where each parameter lies in a file; those that a model has not are left out by `names.places`."""
    rotated, rotated_bias = (PAIRS, PAIRS_BIAS) if architecture == "llama" else (HEADS_OUT, HEADS_BIAS)
    table: list[tuple[str, str, Layout]] = [
        ("attention/query", "attn_q.weight", rotated),
        ("attention/query_bias", "attn_q.bias", rotated_bias),
        ("attention/key", "attn_k.weight", rotated),
        ("attention/key_bias", "attn_k.bias", rotated_bias),
        ("attention/value", "attn_v.weight", HEADS_OUT),
        ("attention/value_bias", "attn_v.bias", HEADS_BIAS),
        ("attention/query_norm/scale", "attn_q_norm.weight", names.SAME),
        ("attention/key_norm/scale", "attn_k_norm.weight", names.SAME),
        ("attention/out", "attn_output.weight", HEADS_IN),
        ("attention_norm/scale", "attn_norm.weight", names.SAME),
        ("mlp/up", "ffn_gate.weight", FLIP),  # the one that goes through the activation
        ("mlp/gate", "ffn_up.weight", FLIP),
        ("mlp/down", "ffn_down.weight", FLIP),
        ("mlp_norm/scale", "ffn_norm.weight", names.SAME),
    ]
    return (
        Entry("embed/tokens", "token_embd.weight"),
        *(Entry(f"decoder/layers/{ours}", f"blk.{{}}.{theirs}", layout) for ours, theirs, layout in table),
        Entry("decoder/norm/scale", "output_norm.weight"),
        Entry("head/kernel", "output.weight"),
    )


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model of a GGUF file in float32, laid out over `mesh` (all devices by default); one tensor is dequantised at a time.

    Raises:
        CheckpointError: missing, damaged, of another family, or in need of what is not supported.
    """
    file = gguf_file.open_file(path)
    config, tokenizer = sizes(file), gguf_tokenizer.read(file)
    file.check_kinds()
    wanted = names.places(config, entries(file.get("general.architecture", str, "")))
    names.check({name: tensor.shape for name, tensor in file.tensors.items()}, wanted, (), file.path)
    params = names.assemble(config, wanted, file.read, abstract_params(config, mesh or sharding.make_mesh()))
    return Model(config, params, tokenizer, card(file))


def read_sizes(path: str | Path) -> ModelConfig:
    """The sizes of the model that `load` would give, without its weights. Raises as `load`."""
    return sizes(gguf_file.open_file(path))


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of the model that `load` would give, without its weights. Raises as `load`."""
    return gguf_tokenizer.read(gguf_file.open_file(path))


def card(file: File) -> Card:
    """What the file says of itself, as far as it is small."""
    kinds = collections.Counter(tensor.kind.name for tensor in file.tensors.values())
    about: dict[str, Any] = {
        "architecture": file.metadata["general.architecture"],
        "name": file.get("general.name", str, "")[:200],
        "types": dict(sorted(kinds.items())),
    }
    number = file.get("general.file_type", int, None)
    if number is not None:
        known = number in gguf.LlamaFileType.__members__.values()
        about["file_type"] = gguf.LlamaFileType(number).name if known else number
    return {"name": file.path.stem, "parents": [], "transforms": [], "gguf": about}


def sizes(file: File) -> ModelConfig:
    """The config that the metadata states, held against the shapes of the tensors.

    Raises:
        CheckpointError: another architecture, something that is not supported, or a contradiction.
    """
    architecture = file.get("general.architecture", str, "")[:60]
    try:
        choose("general.architecture", architecture, ARCHITECTURES, CheckpointError)
    except CheckpointError as e:
        raise CheckpointError(f"{file.path}: {e}") from e
    _refuse(file, architecture)

    def size(name: str, default: int | None = None) -> int:
        return _size(file, f"{architecture}.{name}", default)

    dim, heads = size("embedding_length"), size("attention.head_count")
    head_size = size("attention.key_length", max(dim // heads, 1))
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 1
    try:
        config = presets.llama(
            vocab_size=size("vocab_size", rows),
            max_length=size("context_length"),
            layers=size("block_count"),
            dim=dim,
            heads=heads,
            kv_heads=size("attention.head_count_kv", heads),
            head_dim=0 if head_size * heads == dim else head_size,
            mlp_dim=size("feed_forward_length"),
            norm_epsilon=_number(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
            rotary_base=_number(file, f"{architecture}.rope.freq_base", 10000.0),
            bias="qkv" if "blk.0.attn_q.bias" in file.tensors else "none",
            qk_norm=architecture == "qwen3",
            tie_embeddings="output.weight" not in file.tensors,
        )
    except UserError as e:
        raise CheckpointError(str(e) if isinstance(e, CheckpointError) else f"{file.path}: {e}") from e
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, head_size) != head_size:
            raise file.wrong(f"{architecture}.{name}", f"only the size of a head, {head_size}, is supported")
    _agree(file, config)
    return config


def _refuse(file: File, architecture: str) -> None:
    """Raise where the model needs what is not supported."""
    scaling = f"{architecture}.rope.scaling."
    for pattern, harmless in _WITHOUT.items():
        key = pattern.format(architecture)
        if key == f"{scaling}factor" and _same(file.metadata.get(f"{scaling}type"), "none"):
            continue  # then it counts for nothing
        if key in file.metadata and not any(_same(file.metadata[key], value) for value in harmless):
            raise file.wrong(key, f"only {' or '.join(map(repr, harmless))} is supported")
    window = f"{architecture}.attention.sliding_window"
    if not _same(file.metadata.get(window, 0), 0) and _size(file, window) < _size(
        file, f"{architecture}.context_length"
    ):
        raise file.wrong(window, "attention to a window is not supported")
    if "rope_freqs.weight" in file.tensors:
        raise CheckpointError(f"{file.path}: tensor rope_freqs.weight: scaled rotary positions are not supported")


def _same(value: Any, other: Any) -> bool:
    """Whether a value of the metadata is this one, arrays left aside."""
    return isinstance(value, (bool, int, float, str)) and value == other


def _size(file: File, key: str, default: int | None = None) -> int:
    """A whole number of at least 1; one that is given for each layer must be the same for all."""
    value = file.metadata.get(key, default)
    if value is None:
        raise CheckpointError(f"{file.path}: it has no {key}: damaged, or of another kind")
    if isinstance(value, np.ndarray):
        if len(value) == 0 or np.any(value != value[0]):
            raise file.wrong(key, "layers that differ are not supported")
        value = value[0].item()
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        raise file.wrong(key, f"it must be a whole number from 1 to {_LARGEST}")
    return value


def _number(file: File, key: str, default: float | None = None) -> float:
    """A positive number, in the fewest digits that its float32 stands for."""
    value = file.get(key, float, default)
    if value is None:
        raise CheckpointError(f"{file.path}: it has no {key}: damaged, or of another kind")
    with np.errstate(over="ignore", under="ignore"):
        short = float(str(np.float32(value)))
    if not (math.isfinite(short) and short > 0):
        raise file.wrong(key, "it must be a positive number")
    return short


def _agree(file: File, config: ModelConfig) -> None:
    """Raise unless the first tensors have the sizes of the config, before anything of its sizes is made."""
    c = config
    if c.layers > len(file.tensors):
        raise CheckpointError(f"{file.path}: {c.layers} layers in {len(file.tensors)} tensors")
    expected: dict[str, Sequence[int]] = {
        "token_embd.weight": (c.vocab_size, c.dim),
        "blk.0.attn_q.weight": (c.heads * c.head_size, c.dim),
        "blk.0.attn_k.weight": (c.kv_size * c.head_size, c.dim),
        "blk.0.ffn_gate.weight": (c.mlp_size, c.dim),
        f"blk.{c.layers - 1}.attn_norm.weight": (c.dim,),
    }
    for name, shape in expected.items():
        found = file.tensors.get(name)
        if found is None or tuple(found.shape) != tuple(shape):
            said = "not there" if found is None else str(list(found.shape))
            raise CheckpointError(f"{file.path}: tensor {name} is {said}, by the metadata it is {list(shape)}")
    tokens = file.metadata.get(f"{gguf_tokenizer.KEY}tokens")
    if isinstance(tokens, list) and len(tokens) > c.vocab_size:
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens, but embeddings of {c.vocab_size}")
