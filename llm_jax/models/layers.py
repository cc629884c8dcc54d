"""The pieces of every family, once: norm, positions, attention, MLP, embedding. Each weight names its logical axes.

Letters: B batch, S query length, T key length, D model, H query heads, K key-value heads, G = H/K, E head size, F mlp, V vocabulary, R rank.
How layers are stacked and what a family is made of stands in `transformer.py`.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.models import split
from llm_jax.models.attention import Mask, attend
from llm_jax.models.config import ModelConfig
from llm_jax.models.remat import named
from llm_jax.platform import target
from llm_jax.sharding import constrain

Memory = tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]
"""Keys and values of one layer."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

DROPOUT = "dropout"
"""The name of the key, for flax, that dropout before the factors of LoRA draws with"""
INIT_SCALE = 0.02
"""Standard deviation of embeddings, as in BERT and GPT-2."""


class Named(nn.Partitioned):
    """A weight with the logical names of its axes. Where it lies is decided in `sharding.py`, not by flax."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The weight."""
        return self.value


def parameter(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    fan_in: int | None = None,
    value: float | None = None,
) -> Array:
    """A float32 weight with logical axes: constant `value`, or normal with variance 1/fan_in, or `INIT_SCALE` when neither is given."""
    if module.has_variable("params", name):
        found: Array = module.get_variable(
            "params", name
        )  # `param` would trace the initializer too, only to compare shapes
        if found.shape != shape:
            raise ValueError(f"weight {name!r} of {type(module).__name__} is {found.shape}, by the config {shape}")
        return found
    if value is not None:
        init: Any = nn.initializers.constant(value)
    else:
        init = nn.initializers.normal(INIT_SCALE if fan_in is None else fan_in**-0.5)
    return cast(Array, module.param(name, lambda *args: Named(init(*args), names=axes), shape, jnp.float32))


def sinusoidal(positions: Int[Array, "B S"], dim: int, split: bool = False) -> Float[Array, "B S D"]:
    """sin(p / 10000^(2i/D)) at index 2i and cos of the same at 2i + 1 ('Attention is all you need', section 3.5).

    `split` puts them at i and D/2 + i, as Marian does.

    >>> sinusoidal(jnp.zeros((1, 1), int), 4).tolist()
    [[[0.0, 1.0, 0.0, 1.0]]]
    """
    rates = jnp.asarray(10000.0 ** (-np.arange(0, dim, 2) / dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * rates
    pair = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(pair, -1) if split else jnp.stack(pair, -1).reshape(*positions.shape, dim)


def rotary(x: Float[Array, "B S H E"], positions: Int[Array, "B S"], base: float) -> Float[Array, "B S H E"]:
    """Rotate the pairs (x_i, x_{i+E/2}) by the angle p * base^(-2i/E) (RoFormer, eq. 34, in the half-split order of Llama)."""
    half = x.shape[-1] // 2
    rates = jnp.asarray(float(base) ** (-np.arange(half) / half), jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def relative_bucket(distance: Int[Array, "..."], buckets: int, furthest: int, bidirectional: bool) -> Int[Array, "..."]:
    """The bucket of key position minus query position: exact for near, logarithmic up to `furthest` (T5, section 2.1)."""
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket += buckets * (distance > 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(furthest / exact)
    far = jnp.minimum(exact + (far * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return bucket + jnp.where(distance < exact, distance, far)


def contract(x: Array, w: Array, over: int = 1, axes: tuple[str, ...] | None = None) -> Array:
    """sum over the last `over` axes of x and the first of w: einsum("...i,i...->...", x, w).

    With the logical axes of w, a weight that is split over the mesh is gathered once, and its gradient split as it is (`split`).
    """
    place = None if axes is None else split.split(x, w, axes)
    product = functools.partial(_contract, over)
    return product(x, w.astype(x.dtype)) if place is None else split.multiply(product, x, w, axes, place)


def _contract(over: int, x: Array, w: Array) -> Array:
    """On CPU both are flattened to matrices first: XLA's gradient of w for an activation of rank 3 copies it to another layout one
    element at a time, which took 15% of a training step (`benchmarks/train_step.py`).
    """
    if target() != "cpu":
        return jnp.tensordot(x, w, over)
    kept, made = x.shape[: x.ndim - over], w.shape[over:]
    width = math.prod(w.shape[:over])
    return (x.reshape(-1, width) @ w.reshape(width, -1)).reshape(*kept, *made)


def read(module: nn.Module, name: str, x: Array) -> None:
    """Note what the named weight is multiplied with; kept where the caller asked for it (`transformer.apply(..., inputs=True)`), else nothing."""
    module.sow("inputs", name, x, init_fn=lambda: None, reduce_fn=lambda before, now: now)


class Weight(NamedTuple):
    """The weight of a product, with the logical names of its axes and, where it is adapted, factors A (..., R) and B (R, ...) beside it."""

    value: Array
    axes: tuple[str, ...]
    factors: tuple[Array, Array] | None


def weight(
    module: Any, name: str, path: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, over: int = 1
) -> Weight:
    """A weight that takes in its first `over` axes; factors beside it begin with A normal, variance 1/fan_in, and B zero (LoRA, section 4.1)."""
    value, rank = parameter(module, name, shape, axes, fan_in=fan_in), module.config.lora_rank
    if not module.config.adapted(path):
        return Weight(value, axes, None)
    fan = math.prod(shape[:over])
    a = parameter(module, f"{name}_lora_a", (*shape[:over], rank), (*axes[:over], "rank"), fan_in=fan)
    b = parameter(module, f"{name}_lora_b", (rank, *shape[over:]), ("rank", *axes[over:]), value=0.0)
    return Weight(value, axes, (a, b))


def multiply(module: Any, name: str, x: Array, w: Weight, over: int = 1) -> Array:
    """x W, or x W + s (dropout(x) A) B with s = `config.lora_scale` where there are factors beside W (LoRA, eq. 3).

    Dropout draws where the module is applied with a key of that name: flax makes of it another key for each product.
    """
    read(module, name, x)
    y = named(contract(x, w.value, over, w.axes), name)
    if w.factors is None:
        return y
    a, b = w.factors
    if module.config.lora_dropout and module.has_rng(DROPOUT):
        x = dropout(x, module.config.lora_dropout, module.make_rng(DROPOUT))
    return y + module.config.lora_scale * contract(contract(x, a, over), b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(stacked: Any, depth: int) -> tuple[Any, ...]:
    """The tree of each layer from leaves with a leading axis of layers; the gradient is put together once, not added up layer by layer."""
    return tuple(jax.tree.map(operator.itemgetter(i), stacked) for i in range(depth))


unstack.defvjp(
    lambda stacked, depth: (
        unstack.fun(stacked, depth),
        None,
    ),  # of the function itself, so that forward mode goes through
    lambda depth, _, each: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),),
)


class Norm(nn.Module):
    """scale * (x - mean) / sqrt(var + epsilon) + bias (layer), or scale * x / sqrt(mean(x^2) + epsilon) (rms), in float32."""

    config: ModelConfig
    kind: str = ""
    axes: tuple[str, ...] = ("hidden",)

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        kind = self.kind or self.config.norm
        scale = parameter(self, "scale", (x.shape[-1],), self.axes, value=1.0)
        y = x.astype(jnp.float32)
        if kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_epsilon) * scale
        if kind == "layer" and self.config.bias == "all":
            y = y + parameter(self, "bias", (x.shape[-1],), self.axes, value=0.0)
        return y.astype(x.dtype)


class RelativeBias(nn.Module):
    """A learned bias of each head for each bucket of distance, shared by the layers of a stack (T5, section 2.1)."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Int[Array, "B S"], keys: Int[Array, "B T"]) -> Float[Array, "B H S T"]:
        c = self.config
        table = parameter(self, "table", (c.relative_buckets, c.heads), ("buckets", "heads"), fan_in=c.dim)
        bucket = relative_bucket(
            keys[:, None, :] - queries[:, :, None], c.relative_buckets, c.relative_distance, self.bidirectional
        )
        return jnp.moveaxis(table[bucket], -1, 1)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """x / (1 - rate) with probability 1 - rate, else 0; `x` itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E) + bias) v over the heads, projected back ('Attention is all you need', eq. 1 and section 3.2.2).

    `memory` is the cache of one layer, (keys, values) of shape (B, T, K, E). Keys and values of `source` are written into it at slot
    `mask.offset`; where `source` is None it is read as it stands (cross-attention to an encoder that has run already).
    """

    config: ModelConfig
    cross: bool = False

    def setup(self):
        c = self.config

        place = "cross" if self.cross else "attention"
        weights: dict[str, Weight] = {}

        def into(name: str, heads: int, axis: str, fan: int = c.dim) -> None:
            shape, axes = (c.dim, heads, c.head_size), ("embed", axis, "head_size")
            weights[name] = weight(self, name, f"{place}/{name}", shape, axes, fan)
            if c.bias != "none":
                setattr(
                    self,
                    f"{name}_bias",
                    parameter(self, f"{name}_bias", (heads, c.head_size), (axis, "head_size"), value=0.0),
                )

        # Where the scores are not divided by sqrt(E), the first queries are, as in T5.
        into("query", c.heads, "heads", c.dim if c.attention_scale else c.dim * c.head_size)
        into("key", c.kv_size, "kv")
        into("value", c.kv_size, "kv")
        shape, axes = (c.heads, c.head_size, c.dim), ("heads", "head_size", "embed")
        weights["out"] = weight(
            self, "out", f"{place}/out", shape, axes, residual_fan(c, c.heads * c.head_size), over=2
        )
        self.weights = weights
        if c.bias == "all":
            self.out_bias = parameter(self, "out_bias", (c.dim,), ("hidden",), value=0.0)
        if c.qk_norm:
            self.query_norm = Norm(c, "rms", ("head_size",))
            self.key_norm = Norm(c, "rms", ("head_size",))

    def project(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S N E"]:
        """x W + b, with heads as an axis of their own."""
        y = multiply(self, name, x, self.weights[name])
        return y if self.config.bias == "none" else y + getattr(self, f"{name}_bias").astype(x.dtype)

    def keys_and_values(self, source: Float[Array, "B T D"], positions: Int[Array, "B T"] | None = None) -> Memory:
        """What queries look up in `source`; positions are read where they are rotary."""
        k = self.project("key", source)
        if self.config.qk_norm:
            k = self.key_norm(k)
        if self.config.positions == "rotary" and not self.cross:
            assert positions is not None
            k = rotary(k, positions, self.config.rotary_base)
        return k, self.project("value", source)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        source: Float[Array, "B T D"] | None,
        mask: Mask,
        bias: Float[Array, "B H S T"] | None = None,
        memory: Memory | None = None,
        key: Array | None = None,
        want_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Memory, Float[Array, "B H S T"] | None]:
        c = self.config
        q = self.project("query", x)
        if c.qk_norm:
            q = self.query_norm(q)
        if c.positions == "rotary" and not self.cross:
            q = rotary(q, mask.query_positions, c.rotary_base)
        if source is None:
            assert memory is not None
            k, v = memory
        else:
            k, v = self.keys_and_values(source, mask.query_positions)
            if memory is not None:
                k, v = (
                    jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), mask.offset, axis=1)
                    for old, new in zip(memory, (k, v))
                )
        y, weights = attend(
            q,
            k,
            v,
            mask,
            bias=bias,
            scale=c.head_size**-0.5 if c.attention_scale else 1.0,
            dropout_rate=c.dropout,
            key=key,
            want_weights=want_weights,
        )
        y = multiply(self, "out", y, self.weights["out"], over=2)
        return y + self.out_bias.astype(y.dtype) if c.bias == "all" else y, (k, v), weights


class MLP(nn.Module):
    """act(x W + b) U + c, or (act(x W) * (x G)) U when gated (Shazeer 2020, eq. 5 and 6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        biased = c.bias == "all"

        def product(name: str, y: Array, shape: tuple[int, int], axes: tuple[str, str], fan: int) -> Array:
            y = multiply(self, name, y, weight(self, name, f"mlp/{name}", shape, axes, fan))
            axis = "hidden" if axes[1] == "embed" else axes[1]
            return y + parameter(self, f"{name}_bias", shape[1:], (axis,), value=0.0).astype(y.dtype) if biased else y

        wide = (c.dim, c.mlp_size)
        hidden = ACTIVATIONS[c.mlp.removeprefix("gated_")](product("up", x, wide, ("embed", "mlp"), c.dim))
        if c.mlp.startswith("gated_"):
            hidden = hidden * product("gate", x, wide, ("embed", "mlp"), c.dim)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return product("down", hidden, wide[::-1], ("mlp", "embed"), residual_fan(c, c.mlp_size))


def residual_fan(config: ModelConfig, fan_in: int) -> int:
    """fan_in of a product that is added to the residual stream: in a pre-norm stack 2L of them add up (GPT-2, section 2.3)."""
    return fan_in * 2 * config.layers if config.norm_place == "pre" else fan_in


class Embedding(nn.Module):
    """Token, position and type vectors summed, scaled and normalised as the family says; or patches of an image after a class token."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if c.patch_size:
            self.patches = parameter(
                self,
                "patches",
                (c.patch_size, c.patch_size, 3, c.dim),
                ("pixels", "pixels", "pixels", "embed"),
                fan_in=3 * c.patch_size**2,
            )
            self.patches_bias = parameter(self, "patches_bias", (c.dim,), ("hidden",), value=0.0)
            self.first = parameter(self, "first", (c.dim,), ("hidden",))
        else:
            scale = c.dim if c.embedding_scale else 1 if c.logits_scale else None
            self.tokens = parameter(self, "tokens", (c.vocab_size, c.dim), ("vocab", "embed"), fan_in=scale)
        if c.positions == "learned":
            rows = c.patches + 1 if c.patch_size else c.max_length + c.position_offset
            self.positions = parameter(self, "positions", (rows, c.dim), ("positions", "embed"))
        if c.token_types:
            self.types = parameter(self, "types", (c.token_types, c.dim), ("types", "embed"))
        if c.embedding_norm:
            self.norm = Norm(c)

    def kernel(self) -> Float[Array, "V D"]:
        """The table, for a tied unembedding."""
        return self.tokens

    def images(self, images: Float[Array, "B I I 3"]) -> Float[Array, "B S D"]:
        """One vector a patch, after the class token."""
        c = self.config
        n, p = c.image_size // c.patch_size, c.patch_size
        cut = images.reshape(-1, n, p, n, p, 3).astype(compute_dtype(c))
        x = jnp.einsum("bipjqc,pqcd->bijd", cut, self.patches.astype(cut.dtype)) + self.patches_bias.astype(cut.dtype)
        first = jnp.broadcast_to(self.first.astype(x.dtype), (x.shape[0], 1, c.dim))
        return jnp.concatenate([first, x.reshape(x.shape[0], n * n, c.dim)], axis=1)

    def __call__(
        self, tokens: Array, positions: Int[Array, "B S"], types: Int[Array, "B S"] | None, key: Array | None
    ) -> Float[Array, "B S D"]:
        c = self.config
        dtype = compute_dtype(c)
        x = self.images(tokens) if c.patch_size else self.tokens[tokens].astype(dtype)
        if c.embedding_scale:
            x = x * c.dim**0.5
        if c.positions == "learned":
            x = x + self.positions[positions + c.position_offset].astype(dtype)
        elif c.positions.startswith("sinusoidal"):
            x = x + sinusoidal(positions, c.dim, c.positions == "sinusoidal_split").astype(dtype)
        if c.token_types:
            x = x + self.types[jnp.zeros_like(positions) if types is None else types].astype(dtype)
        if c.embedding_norm:
            x = self.norm(x)
        return constrain(dropout(x, c.dropout, key), "batch", "length", None)


def compute_dtype(config: ModelConfig) -> Any:
    """float32 on CPU, bfloat16 elsewhere, unless the config states one."""
    if config.dtype == "auto":
        return jnp.float32 if target() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.dtype)
