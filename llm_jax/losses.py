"""Losses over the vocabulary, taken in chunks of tokens from the last hidden state, so that the logits of a batch are never held at once.

Sums over tokens and their derivatives; what is a target and how it is weighted is the task's business.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llm_jax.models import split
from llm_jax.models.heads import Outputs
from llm_jax.platform import target

CHUNK = 2**24
"""Logits that a GPU holds at once, 64 MB in float32; a CPU a quarter of it, for the sake of its caches.

A TPU eight times as many: with one chunk XLA puts the buffers of the loss where those of the layers will be. Llama 2 7B on 256 chips takes 2.76 GB
at its peak with one, 3.28 with four.
"""
HELD = {"cpu": 1 / 4, "tpu": 8}
"""Chunks held at once by platform; 1 on others"""


TABLE = ("vocab", "embed")
"""Logical axes of the kernel"""


class Loss(NamedTuple):
    """A sum over tokens and what is needed to normalise, report and extend it.

    The objective is `total / weight`. Totals and weights of slices, rows or devices add up, so that accumulation, sharding and
    packing leave the objective as it is.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    """further sums over the same tokens; reported divided by `weight`"""
    outputs: Any = None
    """the model's `Outputs`, for transforms that add terms"""
    weights: Any = None
    """of each target, as `weight` sums them up, for such terms to be means over the same"""
    rows: Any = None
    """the batch that was read, where it is not the one that was given, for such terms to read the same"""
    parts: Any = None
    """(the task's own loss, the sum of the terms added to it), which `total` is the sum of; None while it is all the task's"""

    def plus(self, term: Any, metrics: Mapping[str, Array], task: float = 1.0) -> "Loss":
        """With a further term, and the task's own loss times `task`; terms that others added stay as they are.

        A metric whose name is taken goes by `NAME_2`, and so on.
        """
        own, beside = (self.total, 0.0) if self.parts is None else self.parts
        own, beside, named = task * own, beside + term, dict(self.metrics)
        for name, value in metrics.items():
            place = next(n for i in itertools.count(1) if (n := name if i == 1 else f"{name}_{i}") not in named)
            named[place] = value
        return self._replace(total=own + beside, parts=(own, beside), metrics=named)

    def sums(self) -> "Loss":
        """What adds up, without what is there for transforms that add terms."""
        return self._replace(outputs=None, weights=None, rows=None, parts=None)


LossFn = Callable[..., Loss]
"""(params, batch, key, reference) -> Loss. `key` is None in evaluation: no dropout, no label smoothing."""

GradFn = Callable[..., tuple[Loss, Any]]
"""(params, batch, key, reference) -> (Loss, gradient of `total` by the params)."""


def cross_entropy(
    outputs: Outputs,
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Loss:
    """sum_i w_i (-(1 - a) log p_i[t_i] - a mean_v log p_i[v] + z (log Z_i)^2) with p = softmax(hidden kernel^T + bias).

    a is `label_smoothing` (Szegedy et al. 2015, section 7), z is `z_loss` (PaLM, section 5). The gradient by the logits is formed chunk
    by chunk while the sum is, so that no logits are kept or computed again. Metrics: `nll`, the sum without smoothing and z-loss,
    and `correct`, the weight of the tokens whose target is the most probable one.
    """
    assert outputs.kernel is not None, "the model has no head over the vocabulary"
    bias = outputs.bias
    total, nll, correct = _fused(
        outputs.hidden,
        outputs.kernel,
        jnp.zeros(outputs.kernel.shape[0]) if bias is None else bias,
        targets,
        weights.astype(jnp.float32),
        label_smoothing,
        z_loss,
        bias is not None,
    )
    return Loss(total, jnp.sum(weights, dtype=jnp.float32), {"nll": nll, "correct": correct}, outputs, weights)


def class_cross_entropy(
    outputs: Outputs,
    targets: Int[Array, "B M"],
    weights: Float[Array, "B M"],
    *,
    label_smoothing: float = 0.0,
) -> Loss:
    """sum_i w_i (-(1 - a) log p_i[t_i] - a mean_c log p_i[c]) with p = softmax(logits), for M examples a row.

    Metrics: `nll`, the sum without smoothing, and `correct`, the weight of the examples whose class is the most probable one.
    """
    assert outputs.logits is not None, "the model has no head"
    log_p = jax.nn.log_softmax(outputs.logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_p, axis=-1)
    hit = (jnp.argmax(log_p, axis=-1) == targets) * weights
    return Loss(
        jnp.sum(weights * loss),
        jnp.sum(weights, dtype=jnp.float32),
        {"nll": jnp.sum(weights * nll), "correct": jnp.sum(hit)},
        outputs,
        weights,
    )


def log_probabilities(outputs: Outputs, targets: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """log softmax(hidden kernel^T + bias)[target] of each token, in chunks."""
    hidden, kernel = outputs.hidden, outputs.kernel
    assert kernel is not None, "the model has no head over the vocabulary"

    def chunk(_, part):
        hidden, target = part
        logits = _logits(_flat(hidden), kernel, outputs.bias)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), _flat(target)[:, None], axis=-1)
        return None, found.reshape(target.shape)

    count = _chunks(hidden.shape[0], hidden.shape[1], kernel.shape[0])
    _, found = jax.lax.scan(chunk, None, (_cut(hidden, count), _cut(targets, count)))
    return _join(found, targets.shape[1])


def _chunks(rows: int, length: int, vocab: int) -> int:
    """Pieces into which the tokens of each row are cut; rows stay whole on their devices."""
    mesh = jax.sharding.get_abstract_mesh()
    over = math.prod(mesh.shape[name] for name in ("data", "fsdp") if not mesh.empty and name not in mesh.manual_axes)
    held = CHUNK * HELD.get(target(), 1)
    return min(length, math.ceil(rows * length * vocab / over / held))


def _unroll(count: int) -> int:
    """On CPU a few chunks are written out: a loop there runs its products on one core."""
    return count if target() == "cpu" and count <= 16 else 1


def _cut(x: Array, count: int) -> Array:
    """(B, S, ...) -> (count, B, S', ...), the last piece filled with zeros."""
    pad = -x.shape[1] % count
    x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(hidden: Float[Array, "N D"], kernel: Float[Array, "V D"], bias: Array | None) -> Float[Array, "N V"]:
    logits = jnp.einsum("nd,vd->nv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias


def _flat(x: Array) -> Array:
    """(B, S, ...) -> (B * S, ...): products of matrices, which every compiler does well."""
    return x.reshape(-1, *x.shape[2:])


def _sums(logits: Array, targets: Array, weights: Array, smoothing: float, z_loss: float) -> tuple[Any, Array]:
    """(total, nll, correct) of a chunk, and log Z of each of its tokens."""
    top = jnp.max(logits, axis=-1)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - target
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (log_z - jnp.mean(logits, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return (jnp.sum(weights * loss), jnp.sum(weights * nll), jnp.sum(weights * (target >= top))), log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _fused(hidden, kernel, bias, targets, weights, smoothing, z_loss, biased):
    """The sums of `cross_entropy`; only the first is differentiable."""

    def chunk(sums, part):
        hidden, targets, weights = (_flat(x) for x in part)
        found, _ = _sums(_logits(hidden, kernel, bias if biased else None), targets, weights, smoothing, z_loss)
        return jax.tree.map(jnp.add, sums, found), None

    count = _chunks(hidden.shape[0], hidden.shape[1], kernel.shape[0])
    zero = (jnp.zeros(()),) * 3
    return jax.lax.scan(
        chunk, zero, (_cut(hidden, count), _cut(targets, count), _cut(weights, count)), unroll=_unroll(count)
    )[0]


def _fused_forward(hidden, kernel, bias, targets, weights, smoothing, z_loss, biased):
    """The sums, and the gradient of the first for a cotangent of 1.

    A kernel that is split over the mesh is gathered once for all chunks, and its gradient put together once.
    """
    form = functools.partial(_gradients, smoothing=smoothing, z_loss=z_loss, biased=biased)
    axis = split.split(hidden, kernel, TABLE)
    if axis is None:
        sums, d_hidden, d_kernel, d_bias = form(hidden, kernel, bias, targets, weights)
    else:

        def each(*given):
            sums, d_hidden, d_kernel, d_bias = form(*given)
            d_kernel = split.reduce_scatter(d_kernel.astype(hidden.dtype), axis)
            sums, d_bias = jax.lax.psum((sums, d_bias), split.ROWS)
            return sums, d_hidden, d_kernel, d_bias

        rows, whole = split.row_spec(hidden), PartitionSpec()
        given, made = (rows, whole, whole, rows, rows), (whole, rows, PartitionSpec(*(None,) * axis, split.AXIS), whole)
        gathered = split.whole(kernel.astype(hidden.dtype), TABLE)
        sums, d_hidden, d_kernel, d_bias = split.on_rows(each, given, made)(hidden, gathered, bias, targets, weights)
    return sums, (d_hidden, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype))


def _gradients(hidden, kernel, bias, targets, weights, smoothing, z_loss, biased):
    """The sums, and the gradient of the first by hidden, kernel and bias, chunk by chunk."""
    vocab = kernel.shape[0]

    def chunk(carry, part):
        sums, d_kernel, d_bias = carry
        hidden, targets, weights = (_flat(x) for x in part)
        logits = _logits(hidden, kernel, bias if biased else None)
        found, log_z = _sums(logits, targets, weights, smoothing, z_loss)
        d_logits = jnp.exp(logits - log_z[..., None])
        if z_loss:
            d_logits = d_logits * (1 + 2 * z_loss * log_z[..., None])
        hit = targets[:, None] == jnp.arange(vocab)
        d_logits = (d_logits - (1 - smoothing) * hit - smoothing / vocab) * weights[..., None]
        if biased:
            d_bias = d_bias + jnp.sum(d_logits, axis=0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, kernel.astype(hidden.dtype))
        d_kernel = d_kernel + jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, found), d_kernel, d_bias), d_hidden.reshape(part[0].shape)

    count = _chunks(hidden.shape[0], hidden.shape[1], vocab)
    start = ((jnp.zeros(()),) * 3, jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    parts = (_cut(hidden, count), _cut(targets, count), _cut(weights, count))
    (sums, d_kernel, d_bias), d_hidden = jax.lax.scan(chunk, start, parts, unroll=_unroll(count))
    return sums, _join(d_hidden, hidden.shape[1]), d_kernel, d_bias


def _fused_backward(smoothing, z_loss, biased, kept, cotangents):
    d_hidden, d_kernel, d_bias = kept
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), d_kernel * scale, d_bias * scale, None, None


_fused.defvjp(_fused_forward, _fused_backward)
