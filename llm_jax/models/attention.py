"""Scaled dot-product attention, in the form that suits the platform, behind one function; and who may look at whom.

The splash kernel on TPU, cuDNN on GPU through `jax.nn.dot_product_attention`, einsums elsewhere; a ring (`ring.py`) where rows are split over
devices. All forms compute the same formula.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.models import ring, splash
from llm_jax.platform import target


class Mask(NamedTuple):
    """Who may look at whom: keys of the query's own segment and, if causal, of no later position.

    Segments keep packed examples apart; padding is segment 0. Positions restart with each segment.
    """

    query_segments: Int[Array, "B S"]
    key_segments: Int[Array, "B T"]
    query_positions: Int[Array, "B S"]
    key_positions: Int[Array, "B T"]
    causal: bool
    offset: Int[Array, ""] | int = 0
    """slot of the first new key in a cache"""
    aligned: bool = True
    """query i and key i are the same token, and positions grow within a segment"""

    def allowed(self) -> Bool[Array, "B S T"]:
        """True where query s may look at key t."""
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            same &= self.query_positions[:, :, None] >= self.key_positions[:, None, :]
        return same


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    mask: Mask,
    *,
    bias: Float[Array, "B H S T"] | None = None,
    scale: float,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    want_weights: bool = False,
) -> tuple[Float[Array, "B S H E"], Float[Array, "B H S T"] | None]:
    """softmax(scale * q k^T + bias) v with keys that the mask hides left out; each key-value head serves H/K query heads.

    Returns the values and, on request, the weights. Softmax in float32.
    """
    dropping = dropout_rate > 0 and key is not None
    plain = bias is None and not dropping and not want_weights
    mesh = jax.sharding.get_abstract_mesh()
    if plain and mask.aligned and not mesh.empty and mesh.shape[ring.AXIS] > 1:
        return ring.attend(q, k, v, mask.query_segments, mask.causal, scale, mesh), None
    platform = target()
    if platform == "tpu" and plain and mask.aligned and splash.fits(q):
        return splash.attend(q, k, v, mask.query_segments, mask.causal, scale, mesh), None
    if platform == "gpu" and not (dropping or want_weights):
        y = jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask.allowed()[:, None], scale=scale, implementation=_gpu_form(q)
        )
        return y, None
    if platform == "cpu" and plain and mask.aligned:
        return _blocked(q, k, v, mask.query_segments, mask.causal, scale), None
    return _einsum(q, k, v, mask.allowed(), bias, scale, dropout_rate if dropping else 0.0, key, want_weights)


def _gpu_form(q: Array) -> Literal["cudnn", "xla"]:
    """cuDNN works in half precision on heads whose size is a multiple of 8."""
    return "cudnn" if q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 else "xla"


BLOCK = 128
"""Queries taken at once on CPU: with causal attention a block needs no key beyond its end, which saves almost half the work."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked(q, k, v, segments, causal, scale):
    """The formula in blocks of queries; the gradient is formed from the kept weights, without the layout copies that XLA's own makes."""
    return _blocked_forward(q, k, v, segments, causal, scale)[0]


def _blocks(length: int, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block."""
    return [
        (slice(i, min(i + BLOCK, length)), slice(0, min(i + BLOCK, length) if causal else length))
        for i in range(0, length, BLOCK)
    ]


def _heads_first(x: Float[Array, "B S N E"], groups: int) -> Float[Array, "B K G S E"]:
    b, s, n, e = x.shape
    return jnp.moveaxis(x, 1, 2).reshape(b, n // groups, groups, s, e)


def _heads_last(x: Float[Array, "B K G S E"]) -> Float[Array, "B S N E"]:
    b, k, g, s, e = x.shape
    return jnp.moveaxis(x.reshape(b, k * g, s, e), 1, 2)


def _blocked_forward(q, k, v, segments, causal, scale):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (
        _heads_first(q * jnp.asarray(scale, q.dtype), groups),
        _heads_first(k, 1)[:, :, 0],
        _heads_first(v, 1)[:, :, 0],
    )
    index = jnp.arange(q.shape[3])
    outs, kept = [], []
    for s, t in _blocks(q.shape[3], causal):
        allowed = segments[:, s, None] == segments[:, None, t]
        if causal:
            allowed &= index[s, None] >= index[None, t]
        scores = jnp.einsum("bkgse,bkte->bkgst", q[:, :, :, s], k[:, :, t], preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1).astype(
            v.dtype
        )
        outs.append(jnp.einsum("bkgst,bkte->bkgse", weights, v[:, :, t]))
        kept.append(weights)
    out = jnp.concatenate(outs, axis=3)
    return _heads_last(out), (q, k, v, segments, out, kept)


def _blocked_backward(causal, scale, saved, d_out):
    q, k, v, _, out, kept = saved
    groups = q.shape[2]
    d_out = _heads_first(d_out, groups)
    shared = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    parts, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (s, t), weights in zip(_blocks(q.shape[3], causal), kept):
        d_here = d_out[:, :, :, s]
        d_v = d_v.at[:, :, t].add(jnp.einsum("bkgst,bkgse->bkte", weights, d_here))
        d_weights = jnp.einsum("bkgse,bkte->bkgst", d_here, v[:, :, t], preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - shared[:, :, :, s])).astype(q.dtype)
        parts.append(jnp.einsum("bkgst,bkte->bkgse", d_scores, k[:, :, t]))
        d_k = d_k.at[:, :, t].add(jnp.einsum("bkgst,bkgse->bkte", d_scores, q[:, :, :, s]))
    d_q = _heads_last(jnp.concatenate(parts, axis=3) * jnp.asarray(scale, q.dtype))
    return d_q, jnp.moveaxis(d_k, 1, 2).astype(k.dtype), jnp.moveaxis(d_v, 1, 2).astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _einsum(q, k, v, allowed, bias, scale, rate, key, want_weights):
    """The formula, written out."""
    b, s, h, e = q.shape
    heads = k.shape[2]
    q = q.reshape(b, s, heads, h // heads, e)
    scores = jnp.einsum("bskge,btke->bkgst", q * jnp.asarray(scale, q.dtype), k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.reshape(b, heads, h // heads, *bias.shape[2:])
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    used = weights
    if rate:
        used = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0)
    y = jnp.einsum("bkgst,btke->bskge", used.astype(v.dtype), v).reshape(b, s, h, e)
    return y, weights.reshape(b, h, *weights.shape[3:]) if want_weights else None
