"""A wider model that computes the same function: neurons, heads and residual channels copied (Net2Net)."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax import tree
from llm_jax.errors import ConfigError, choose
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Change, Growth, Transform, removed, take

HOW = ("random", "cycle", "zero")


class Copies(NamedTuple):
    """How the entries along an axis are made of the old ones."""

    source: Int[Array, " N"]
    """of each the old one that it copies"""
    copies: Int[Array, " N"]
    """the copies that there are of that one"""
    new: Bool[Array, " N"]
    """whether it is not the first of them"""
    silent: bool
    """whether what multiplies a new one is 0, and not shared among the copies"""


def grow_width(
    *, dim: int = 0, mlp_dim: int = 0, heads: int = 0, kv_heads: int = 0, how: str = "random", noise: float = 0.0
) -> Transform:
    """Entries are copied, and what multiplies a copy is divided by the number of copies: W'_ij = W_g(i)j / |{k: g(k) = g(i)}|.

    So the function is kept (Net2Net; Chen et al. 2015, section 2.3) for each axis: neurons of the MLP; query heads, with their
    key-value heads as whole groups unless `kv_heads` says otherwise; channels of the residual stream, each equally often, since only so
    mean and mean square stay what the norms divide by. Heads keep their size. Copies that are equal stay equal in training where
    nothing tells them apart: `noise` does.

    A tied unembedding reads r copies of each channel; the scale (and bias) of the last norm before it makes up for that: by 1/r, by
    1/sqrt(r) where logits or embeddings are scaled by the square root of the width. Without a head the states come r times repeated.

    With `zero`, new neurons and heads are copies whose outgoing weights begin at zero, and no others change: the function is kept whatever the
    noise, and `shrink` to the old number of neurons and heads, by magnitude, gives the weights back bit for bit.

    Moments: those of weights that were copied are divided by the number of copies, and squared moments by its square; those of weights
    that were divided stay (see `Growth`). With `zero` what enters a new neuron or head has no gradient yet: its moments are 0.

    Args:
        dim, mlp_dim, heads, kv_heads: new sizes; 0 for the old ones.
        how: which neurons and heads are copied: random, cycle for each in turn, or zero, in turn too. Channels are always copied in turn, and shared.
        noise: deviation of what is added to the copies, but those of pruned weights, as a share of the deviation of the weight; 0 keeps
            the function.

    Raises:
        ConfigError: a size below the old one, `dim` not a multiple of the old one or of a model whose positions are sines of its
            width, or heads that do not make whole groups.
    """
    choose("how", how, HOW)
    asked = {"dim": dim, "mlp_dim": mlp_dim, "heads": heads, "kv_heads": kv_heads}
    for name, value in (*asked.items(), ("noise", noise)):
        if value < 0:
            raise ConfigError(f"grow_width({name}={value}): it must not be negative")

    def config(sizes: ModelConfig) -> ModelConfig:
        return _sizes(sizes, **asked)

    def grown(power: int) -> Change:
        def change(sizes: ModelConfig, params: Params, key: Array) -> Params:
            return _grow(sizes, config(sizes), params, key, how, 0.0 if power else noise, power)

        return change

    told = [f"{name}={value}" for name, value in asked.items() if value]
    told += [f"how={how!r}", *([f"noise={noise}"] if noise else [])]
    return Transform(config=config, params=Growth(grown(0), grown(1), grown(2)), label=f"grow_width({', '.join(told)})")


def _sizes(old: ModelConfig, dim: int, mlp_dim: int, heads: int, kv_heads: int) -> ModelConfig:
    """The sizes after the growth; what followed from others is stated where it no longer does."""
    group = old.heads // old.kv_size
    dim, mlp_dim, heads = dim or old.dim, mlp_dim or old.mlp_size, heads or old.heads
    if not kv_heads and heads % group:
        raise ConfigError(f"grow_width: {heads} heads are no whole groups of the model's {group}: or state kv_heads")
    kv = kv_heads or (heads // group if heads != old.heads else old.kv_size)
    for name, new, now in (
        ("dim", dim, old.dim),
        ("mlp_dim", mlp_dim, old.mlp_size),
        ("heads", heads, old.heads),
        ("kv_heads", kv, old.kv_size),
    ):
        if new < now:
            raise ConfigError(f"grow_width: {name}={new} is less than the model's {now}: shrink takes away")
    if heads % kv or heads // kv < group:
        raise ConfigError(
            f"grow_width: {heads} heads over {kv} key-value heads: each must serve a whole number of them, {group} or more as before"
        )
    if dim % old.dim:
        raise ConfigError(
            f"grow_width: dim {dim} is not a multiple of the model's {old.dim}: norms keep what they divide by only where each "
            "channel is copied equally often"
        )
    if dim != old.dim and old.positions.startswith("sinusoidal"):
        raise ConfigError(
            f"grow_width: dim cannot grow where positions are {old.positions}: they are sines of the width itself, not copies of "
            "channels (as in Marian and 'Attention is all you need')"
        )
    changes = {}
    if mlp_dim != old.mlp_size or dim != old.dim:
        changes["mlp_dim"] = mlp_dim
    if heads != old.heads or dim != old.dim:
        changes |= {"heads": heads, "head_dim": old.head_size}
    if kv != (old.kv_heads or heads):
        changes["kv_heads"] = kv
    return old.replace(dim=dim, **changes)


def _copies(old: int, new: int, how: str, key: Array) -> Copies:
    """The old entries themselves, then copies of some drawn at random, or of each in turn."""
    index = jnp.arange(new) % old
    if how == "random":
        drawn = jax.random.randint(key, (new - old,), 0, old)
        index = jnp.concatenate([index[:old], drawn.astype(index.dtype)])
    return Copies(index, jnp.bincount(index, length=old)[index], jnp.arange(new) >= old, how == "zero")


def _plan(old: ModelConfig, new: ModelConfig, how: str, key: Array) -> dict[str, Copies]:
    """How each logical axis grows; it is the same in all layers, since T5's table of relative positions is one for all of them."""
    keys = jax.random.split(key, 3)
    found: dict[str, Copies] = {}
    if new.mlp_size != old.mlp_size:
        found["mlp"] = _copies(old.mlp_size, new.mlp_size, how, keys[0])
    if new.heads != old.heads:
        group, wider = old.heads // old.kv_size, new.heads // new.kv_size
        kv, inside = _copies(old.kv_size, new.kv_size, how, keys[1]), _copies(group, wider, how, keys[2])
        found["heads"] = Copies(
            (kv.source[:, None] * group + inside.source).reshape(-1),
            (kv.copies[:, None] * inside.copies).reshape(-1),
            (kv.new[:, None] | inside.new).reshape(-1),
            kv.silent,
        )
        if new.kv_size != old.kv_size:
            found["kv"] = kv
    if new.dim != old.dim:
        found["embed"] = found["hidden"] = _copies(old.dim, new.dim, "cycle", key)
    return found


def summed(name: str, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that the product with this weight sums over.

    >>> summed("decoder/layers/attention/out", ("layers", "heads", "head_size", "embed"))
    ('heads', 'head_size')
    """
    inner = tuple(axis for axis in axes if axis != "layers")
    if name == "head/kernel":
        return ("embed",)
    if "layers" in axes and inner[-1] in ("embed", "rank"):
        return inner[:-1]
    return inner[:1] if inner[0] == "embed" else ()


def _factors(old: ModelConfig, new: ModelConfig) -> dict[str, Float[np.ndarray, "..."]]:
    """What some weights are multiplied by when channels are r times copied, so that scaled embeddings and tied logits stay."""
    r = new.dim / old.dim
    if r == 1:
        return {}
    table = r**-0.5 if old.embedding_scale else 1.0
    found = {"embed/tokens": np.array(table)}
    if not old.tie_embeddings or old.head not in ("lm", "mlm"):
        return found
    last = np.array(1 / (r * table * (r**-0.5 if old.logits_scale else 1)))
    side = "encoder" if old.architecture == "encoder" else "decoder"
    norm = "head/norm" if old.head == "mlm" else f"{side}/norm"
    if old.head == "lm" and old.norm_place == "post":
        depth = old.encoder_depth if side == "encoder" else old.decoder_depth
        norm, last = f"{side}/layers/mlp_norm", np.append(np.ones(depth - 1), last)[:, None]
    return {**found, f"{norm}/scale": last, f"{norm}/bias": last}


def _grow(old: ModelConfig, new: ModelConfig, params: Params, key: Array, how: str, noise: float, power: int) -> Params:
    """Weights (power 0), gradients (1) or squares of gradients (2) of the wider model from those of the old one."""
    if new == old:
        return params
    plan, factors, names = _plan(old, new, how, key), _factors(old, new), transformer.axes(old)

    def along(values: Array, axis: int, x: Array) -> Array:
        return values.reshape(-1, *(1,) * (x.ndim - axis - 1))

    def leaf(name: str, x: Array, axes: tuple[str, ...]) -> Array:
        over, dtype = summed(name, axes), x.dtype
        fresh: Array = jnp.zeros((), bool)
        for i, axis in enumerate(axes):
            if axis not in plan:
                continue
            each = plan[axis]
            x = take(x, each.source, axis=i)
            if (axis in over) == (power == 0) and each.silent:
                x = jnp.where(along(each.new, i, x) & ~removed(x), jnp.array(0.0 if power else -0.0, x.dtype), x)
            elif (axis in over) == (power == 0):
                x = x / along(each.copies.astype(jnp.float32) ** max(1, power), i, x)
            if axis not in over:
                fresh = fresh | along(each.new, i, x)
        if name in factors:
            x = x * jnp.asarray(factors[name] ** (-power if power else 1), jnp.float32)
        if noise and fresh.ndim and len(axes) - ("layers" in axes) > 1:
            drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape)
            x = jnp.where(fresh & ~removed(x), x + noise * jnp.std(x) * drawn, x)
        return x.astype(dtype)

    return tree.map_with_name(leaf, params, names)
