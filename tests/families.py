"""Tiny models of every family, with random weights: no bias is zero and no scale one, so that none can be forgotten; and their input."""

import functools
import zlib
from typing import Any, NamedTuple

import numpy as np

from llm_jax import tree
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig

SIZE = dict(vocab_size=97, max_length=32, layers=2, dim=16, heads=4, mlp_dim=24, dropout=0.1)
FAMILIES: dict[str, ModelConfig] = {
    "bert": presets.bert(**SIZE),
    "roberta": presets.roberta(**SIZE, head="mlm"),
    "distilbert": presets.distilbert(**SIZE, head="classification", labels=3),
    "gpt2": presets.gpt2(**SIZE),
    "llama": presets.llama(**SIZE, kv_heads=2, qk_norm=True),
    "t5": presets.t5(
        **{**SIZE, "head_dim": 6, "relative_buckets": 8, "relative_distance": 12, "layers": 1, "decoder_layers": 2}
    ),
    "marian": presets.marian(**SIZE),
    "vaswani": presets.vaswani(**SIZE),
    "vit": presets.vit(**{**SIZE, "vocab_size": 1}, patch_size=4, image_size=12, labels=5),
}


Batch = dict[str, np.ndarray]


class Tiny(NamedTuple):
    """A model small enough for a test."""

    name: str
    config: ModelConfig
    params: Any


def random_params(config: ModelConfig) -> Any:
    """Weights of a model: scales near 1, the others normal, with deviation 1 in the embedding and 0.2 elsewhere."""

    def one(name: str, x: Any) -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape)
        if name.endswith("scale"):
            return (1 + 0.2 * drawn).astype(np.float32)
        return (drawn * (1.0 if name.startswith("embed/") else 0.2)).astype(np.float32)

    return tree.map_with_name(one, transformer.shapes(config))


@functools.cache
def tiny_model(name: str, **changes: Any) -> Tiny:
    """The small model of a family, its config changed."""
    config = FAMILIES[name].replace(**changes)
    return Tiny(name, config, random_params(config))


def _stream(rng: np.random.Generator, config: ModelConfig, rows: int, length: int, prefix: str) -> Batch:
    index = np.broadcast_to(np.arange(length), (rows, length))
    cuts, ends = np.arange(rows)[:, None] + length // 3, length - np.arange(rows)[:, None]
    segments = np.where(index < cuts, 1, np.where(index < ends, 2, 0))
    return {
        f"{prefix}tokens": rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32),
        f"{prefix}segment_ids": segments.astype(np.int32),
        f"{prefix}positions": (index - np.where(segments == 2, cuts, 0)).astype(np.int32),
    }


def batch_of(config: ModelConfig, rows: int = 3, length: int = 11) -> Batch:
    """The input that a model reads, in rows of two examples and padding."""
    rng = np.random.default_rng(0)
    if config.patch_size:
        return {"images": rng.standard_normal((rows, config.image_size, config.image_size, 3)).astype(np.float32)}
    batch = _stream(rng, config, rows, length, "")
    if config.token_types:
        batch["types"] = rng.integers(0, config.token_types, (rows, length)).astype(np.int32)
    if config.architecture == "encoder-decoder":
        batch |= _stream(rng, config, rows, length + 2, "encoder_")
    return batch
