"""Longer rows than a model was made for: more rows of its table of positions, or a slower rotation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax import tree
from llm_jax.errors import ConfigError, choose
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Growth, Transform

LEARNED = ("tile", "interpolate")
HOW = ("", "rotary", *LEARNED)
TABLE = "embed/positions"


def interpolated(table: Float[Array, "N D"], new: int) -> Float[Array, "M D"]:
    """Row p is the table at p (N - 1) / (M - 1), between its rows along straight lines: the first stays the first, the last the last."""
    old = table.shape[0]
    at = np.arange(new) * ((old - 1) / max(1, new - 1))
    below = np.minimum(np.floor(at).astype(np.int32), max(0, old - 2))
    share = jnp.asarray(at - below, table.dtype)[:, None]
    return table[below] * (1 - share) + table[np.minimum(below + 1, old - 1)] * share


def lengthen(max_length: int, how: str = "", base: float | None = None) -> Transform:
    """Rows of up to `max_length` tokens: `config.max_length` grows, and with it what the positions are made of.

    rotary: base' = base * f^(E / (E - 2)) with f the ratio of the lengths, so that the slowest pair turns f times as slowly and the fastest
    as before (NTK-aware scaling; Peng et al. 2023, YaRN, eq. 16). It changes what the model says of short rows a little too.
    Learned, tile: rows beyond the table repeat it from its first on (Longformer; Beltagy et al. 2020, section 5), so that rows as
    long as before get the logits that they got, bit for bit, and neighbours are as far apart as they were nearly everywhere.
    Learned, interpolate: the table is stretched along straight lines (as for images; Dosovitskiy et al. 2020, section 3.2): every row
    moves, also those of short rows, so it needs more training. Rows before the first token's (RoBERTa) stay in both.
    Sinusoidal and relative positions and none have no end: for them the number alone changes.

    Args:
        max_length: tokens of the longest row.
        how: rotary, tile or interpolate; empty for what goes with the model's positions, tile where they are learned.
        base: of rotary positions, in place of the formula's.

    Raises:
        ConfigError: shorter than before, or a way that does not go with the model's positions.
    """
    choose("how", how, HOW)
    if max_length < 1:
        raise ConfigError(f"lengthen(max_length={max_length}): it must be at least 1")
    if base is not None and not base > 0:
        raise ConfigError(f"lengthen(base={base}): it must be above 0")

    def config(sizes: ModelConfig) -> ModelConfig:
        if sizes.patch_size:
            raise ConfigError("lengthen: the rows of an image model are its patches: their number is set by image_size")
        if max_length < sizes.max_length:
            raise ConfigError(f"lengthen: {max_length} tokens are fewer than model.max_length {sizes.max_length}")
        if how == "interpolate" and sizes.positions == "rotary":
            raise ConfigError(
                "lengthen(how='interpolate'): a ModelConfig cannot say that rotary positions are divided (Chen et al. 2023); "
                "how='rotary' scales their base instead"
            )
        if (how == "rotary" or base is not None) and sizes.positions != "rotary":
            raise ConfigError(f"lengthen: the model's positions are {sizes.positions}, not rotary: it has no base")
        if how in LEARNED and sizes.positions != "learned":
            raise ConfigError(f"lengthen(how={how!r}): the model's positions are {sizes.positions}, not learned")
        made = sizes.replace(max_length=max_length)
        return made.replace(rotary_base=_base(sizes)) if sizes.positions == "rotary" else made

    def _base(sizes: ModelConfig) -> float:
        factor, size = max_length / sizes.max_length, sizes.head_size
        if base is not None or factor == 1:
            return float(base) if base is not None else sizes.rotary_base
        if size == 2:
            raise ConfigError("lengthen: heads of size 2 turn at one rate, which no base changes")
        return float(sizes.rotary_base * factor ** (size / (size - 2)))

    def change(sizes: ModelConfig, params: Params, key: Array) -> Params:
        def leaf(name: str, x: Array) -> Array:
            if name != TABLE or config(sizes) == sizes:
                return x
            first, table = x[: sizes.position_offset], x[sizes.position_offset :]
            tiled = how != "interpolate"
            made = table[np.arange(max_length) % sizes.max_length] if tiled else interpolated(table, max_length)
            return jnp.concatenate([first, made])

        return tree.map_with_name(leaf, params)

    told = [str(max_length), *([f"how={how!r}"] if how else []), *([f"base={base}"] if base is not None else [])]
    return Transform(config=config, params=Growth(change, change, change), label=f"lengthen({', '.join(told)})")
