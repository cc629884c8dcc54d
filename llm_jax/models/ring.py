"""Attention over rows that are split over devices: keys and values travel around the ring of the mesh axis `context`.

No device ever holds the keys of a whole row: it meets each part once in the forward pass and once in the backward pass, and keeps the running
maximum and sum of a softmax that is never formed whole (Liu et al. 2023, Ring attention, algorithm 1). What is masked is the business of the caller.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llm_jax.models.remat import ATTENTION, named
from llm_jax.sharding import fitted_spec

AXIS = "context"
BLOCK = 512
"""Queries whose scores a device holds at once"""
LOW = float(jnp.finfo(jnp.float32).min)
"""Score of a key that is hidden"""


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    causal: bool,
    scale: float,
    mesh: Any,
) -> Float[Array, "B S H E"]:
    """softmax(scale * q k^T) v over keys of the query's segment and, if causal, of no later place in the row.

    Rows are split over data and fsdp, places over context, heads over tensor. Segments are runs of equal numbers along a row.
    """
    whole, k, v = split_alike(q, k, v, "length", mesh)
    rows = PartitionSpec(*whole[:2])
    count = mesh.shape[AXIS]
    each = functools.partial(_ring, causal, scale, count)
    place = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segments.shape)
    split = jax.shard_map(each, mesh=mesh, in_specs=(whole, whole, whole, rows, rows), out_specs=whole, check_vma=False)
    return split(q, k, v, segments, place)


def split_alike(q: Array, k: Array, v: Array, length: str | None, mesh: Any) -> tuple[PartitionSpec, Array, Array]:
    """How queries, keys and values are split over the mesh, and keys and values that can be split so.

    Too few key-value heads to be split as the query heads are become as many as these, each query head's own.
    """
    whole = fitted_spec(mesh, ("batch", length, "heads", None), q.shape)
    if fitted_spec(mesh, ("batch", length, "kv", None), k.shape) != whole:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    return whole, k, v


def _next(x: Any, count: int) -> Any:
    """What the device before this one in the ring holds."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % count) for i in range(count)]), x)


def _grouped(x: Float[Array, "B S N E"], heads: int) -> Float[Array, "B K G S E"]:
    b, s, n, e = x.shape
    return jnp.moveaxis(x, 1, 2).reshape(b, heads, n // heads, s, e)


def _ungrouped(x: Float[Array, "B K G S E"]) -> Float[Array, "B S N E"]:
    b, k, g, s, e = x.shape
    return jnp.moveaxis(x.reshape(b, k * g, s, e), 1, 2)


def _cut(x: Any, axis: int) -> Any:
    """Each array in blocks of `BLOCK` places along an axis, which come first; one block where it is no multiple of that."""

    def one(x: Array) -> Array:
        size = BLOCK if x.shape[axis] % BLOCK == 0 else x.shape[axis]
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(one, x)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _scores(q: Array, k: Array, here: Any, there: Any, causal: bool) -> Float[Array, "B K G S T"]:
    """q k^T with what is hidden at `LOW`; `here` and `there` are segments and places of the queries and of the keys."""
    scores = jnp.einsum("bkgse,bkte->bkgst", q, k, preferred_element_type=jnp.float32)
    allowed = here[0][:, :, None] == there[0][:, None, :]
    if causal:
        allowed &= here[1][:, :, None] >= there[1][:, None, :]
    return jnp.where(allowed[:, None, None], scores, LOW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(causal: bool, scale: float, count: int, q: Array, k: Array, v: Array, segments: Array, place: Array) -> Array:
    return _forward(causal, scale, count, q, k, v, segments, place)[0]


def _forward(causal, scale, count, q, k, v, segments, place):
    # Else a loop over layers computes what depends on segments and places alone, the masks of all scores, once for all, and keeps it.
    q, segments, place = jax.lax.optimization_barrier((q, segments, place))
    queries = _cut(_grouped(q * jnp.asarray(scale, q.dtype), k.shape[2]), 3)
    here = _cut((segments, place), 1)
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))

    def meet(carry: Any, _: None) -> tuple[Any, None]:
        state, (k, v, there) = carry

        def block(part: Any) -> Any:
            q, here, (top, total, out) = part
            scores = _scores(q, k, here, there, causal)
            new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * shrunk + jnp.sum(weights, axis=-1, keepdims=True)
            out = out * shrunk + jnp.einsum("bkgst,bkte->bkgse", weights.astype(v.dtype), v).astype(jnp.float32)
            return new, total, out

        return (jax.lax.map(block, (queries, here, state)), _next((k, v, there), count)), None

    column = (*queries.shape[:-1], 1)
    state = jnp.full(column, LOW, jnp.float32), jnp.zeros(column, jnp.float32), jnp.zeros(queries.shape, jnp.float32)
    ((top, total, out), _), _ = jax.lax.scan(meet, (state, (k, v, (segments, place))), None, length=count)
    out = out / total  # a query sees itself, so that the sum is above 0
    out, log_total = named((out, top + jnp.log(total)), ATTENTION)
    return _ungrouped(_join(out, 3).astype(q.dtype)), (queries, k, v, segments, place, out, log_total)


def _backward(causal, scale, count, kept, d_found):
    queries, k, v, segments, place, out, log_total = kept
    here = _cut((segments, place), 1)
    d_out = _cut(_grouped(d_found, k.shape[1]).astype(jnp.float32), 3)
    shared = jnp.sum(d_out * out, axis=-1, keepdims=True)

    def meet(carry: Any, _: None) -> tuple[Any, None]:
        d_queries, (k, v, there, d_k, d_v) = carry

        def block(sums: Any, part: Any) -> tuple[Any, Array]:
            (d_k, d_v), (q, here, d_out, shared, log_total, d_q) = sums, part
            weights = jnp.exp(_scores(q, k, here, there, causal) - log_total)
            d_v = d_v + jnp.einsum("bkgst,bkgse->bkte", weights, d_out)
            d_weights = jnp.einsum("bkgse,bkte->bkgst", d_out, v.astype(jnp.float32))
            d_scores = (weights * (d_weights - shared)).astype(q.dtype)
            d_k = d_k + jnp.einsum("bkgst,bkgse->bkte", d_scores, q).astype(jnp.float32)
            return (d_k, d_v), d_q + jnp.einsum("bkgst,bkte->bkgse", d_scores, k).astype(jnp.float32)

        parts = (queries, here, d_out, shared, log_total, d_queries)
        (d_k, d_v), d_queries = jax.lax.scan(block, (d_k, d_v), parts)
        return (d_queries, _next((k, v, there, d_k, d_v), count)), None

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    begin = jnp.zeros(queries.shape, jnp.float32), (k, v, (segments, place), *zeros)
    (d_queries, (_, _, _, d_k, d_v)), _ = jax.lax.scan(meet, begin, None, length=count)
    d_q = _ungrouped(_join(d_queries, 3) * scale).astype(queries.dtype)
    d_k, d_v = (jnp.moveaxis(x, 1, 2).astype(y.dtype) for x, y in ((d_k, k), (d_v, v)))
    return d_q, d_k, d_v, None, None


_ring.defvjp(_forward, _backward)
