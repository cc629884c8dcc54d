"""How far a student's distribution over the vocabulary is from a teacher's, in chunks of tokens, so that no logits are held at once.

Sums over tokens and their derivatives by the student. Which models are compared, and on what, is the business of `transforms/distil.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.errors import choose
from llm_jax.losses import _chunks, _cut, _flat, _join, _logits, _unroll
from llm_jax.models.heads import Outputs

Divergence = Callable[[Array, Array], Array]
"""(student's logits (..., V), teacher's logits (..., V)) -> (...)"""


def forward_kl(student: Float[Array, "... V"], teacher: Float[Array, "... V"]) -> Float[Array, "..."]:
    """sum_v p_v log(p_v / q_v), p the teacher's softmax and q the student's (Hinton et al. 2015, section 2): q covers all of p."""
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(student: Float[Array, "... V"], teacher: Float[Array, "... V"]) -> Float[Array, "..."]:
    """sum_v q_v log(q_v / p_v) (MiniLLM; Gu et al. 2023, section 2.1): q keeps to what p finds probable."""
    return forward_kl(teacher, student)


def jensen_shannon(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], beta: float = 0.5
) -> Float[Array, "..."]:
    """b KL(p, m) + (1 - b) KL(q, m) with m = b p + (1 - b) q (GKD; Agarwal et al. 2023, section 2), for b in (0, 1)."""
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    each = beta * jnp.exp(log_p) * (log_p - log_m) + (1 - beta) * jnp.exp(log_q) * (log_q - log_m)
    return jnp.sum(each, axis=-1)


NAMES = ("forward_kl", "reverse_kl", "jensen_shannon")


def named(name: str, beta: float = 0.5) -> Divergence:
    """The divergence of a name; `beta` is that of jensen_shannon. Raises ConfigError where there is none.

    >>> float(named("forward_kl")(jnp.zeros(4), jnp.zeros(4)))
    0.0
    """
    choose("divergence", name, NAMES)
    if name == "jensen_shannon":
        return functools.partial(jensen_shannon, beta=beta)
    return forward_kl if name == "forward_kl" else reverse_kl


def over_vocabulary(
    divergence: Divergence, student: Outputs, teacher: Outputs, weights: Float[Array, "B S"], temperature: float = 1.0
) -> Float[Array, ""]:
    """T^2 sum_i w_i divergence(logits_i / T, teacher's logits_i / T), from the last hidden states of both.

    T^2 keeps the size of the gradient (Hinton et al. 2015, section 2). The gradient by the student is formed chunk by chunk while the
    sum is; the teacher has none.
    """
    assert student.kernel is not None and teacher.kernel is not None, "both models need a head over the vocabulary"

    def each(logits: Array, hidden: Array, table: Any) -> Array:
        return divergence(logits / temperature, _logits(hidden, *table) / temperature)

    head = (student.hidden, student.kernel, student.bias)
    return temperature**2 * _summed(each, head, teacher.hidden, (teacher.kernel, teacher.bias), weights)


def over_classes(
    divergence: Divergence,
    student: Float[Array, "*M C"],
    teacher: Float[Array, "*M C"],
    weights: Float[Array, "*M"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T^2 sum_i w_i divergence(logits_i / T, teacher's logits_i / T) over the logits of a few classes."""
    each = divergence(student.astype(jnp.float32) / temperature, teacher.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(weights * each)


def over_top_k(
    divergence: Divergence,
    student: Outputs,
    ids: Int[Array, "B S k"],
    log_p: Float[Array, "B S k+1"],
    weights: Float[Array, "B S"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """As `over_vocabulary`, of k + 1 outcomes: the tokens that `top_k` found most probable at this temperature, and all the others as one.

    Joining outcomes never makes a divergence larger: this is a lower bound, tight where the teacher's mass is among the k.
    """
    assert student.kernel is not None, "the student needs a head over the vocabulary"

    def each(logits: Array, given: tuple[Array, Array], table: Any) -> Array:
        ids, log_p = given
        return divergence(buckets(logits / temperature, ids), log_p.astype(jnp.float32))

    head = (student.hidden, student.kernel, student.bias)
    return temperature**2 * _summed(each, head, (ids, log_p), None, weights)


def top_k(outputs: Outputs, k: int, temperature: float = 1.0) -> tuple[Int[Array, "B S k"], Float[Array, "B S k+1"]]:
    """The k most probable tokens under softmax(logits / T), and the log-probabilities of each and of all others together, in chunks.

    That of the others is a sum of theirs, not what rounding leaves of 1. Where k is V there are no others.
    """
    hidden, kernel = outputs.hidden, outputs.kernel
    assert kernel is not None, "the model has no head over the vocabulary"

    def chunk(_: None, hidden: Array) -> tuple[None, tuple[Array, Array]]:
        log_p = jax.nn.log_softmax(_logits(_flat(hidden), kernel, outputs.bias) / temperature)
        ids = jax.lax.top_k(log_p, k)[1]
        return None, (ids.reshape(*hidden.shape[:2], k), buckets(log_p, ids).reshape(*hidden.shape[:2], -1))

    rows, length = hidden.shape[:2]
    _, found = jax.lax.scan(chunk, None, _cut(hidden, _chunks(rows, length, kernel.shape[0])))
    return _join(found[0], length), _join(found[1], length)


def buckets(logits: Float[Array, "N V"], ids: Int[Array, "N k"]) -> Float[Array, "N k+1"]:
    """The logits at `ids`, and the logarithm of the sum of exp over the others; of all V entries just those, in their order."""
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    rest = logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf)
    return jnp.concatenate([chosen, jax.nn.logsumexp(rest, axis=-1, keepdims=True)], axis=-1)


def _pass(each, head, given, table, weights, differentiated):
    """sum_i w_i each(logits_i, given_i, table), and its gradient by (hidden, kernel, bias) where it is asked for."""
    hidden, kernel, bias = head

    def chunk(carry, part):
        total, d_kernel, d_bias = carry
        hidden, given, weights = jax.tree.map(_flat, part)
        logits = _logits(hidden, kernel, bias)

        def summed(logits):
            return jnp.sum(weights * each(logits, given, table))

        if not differentiated:
            return (total + summed(logits), None, None), None
        found, d_logits = jax.value_and_grad(summed)(logits)
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(d_logits, axis=0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, kernel.astype(hidden.dtype))
        d_kernel = d_kernel + jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return (total + found, d_kernel, d_bias), d_hidden.reshape(part[0].shape)

    # two arrays of logits are held for each token, the student's and the teacher's
    count = _chunks(hidden.shape[0], hidden.shape[1], 2 * kernel.shape[0])
    start: Any = (jnp.zeros(()), None, None)
    if differentiated:
        zeros = jnp.zeros(kernel.shape, jnp.float32)
        start = (jnp.zeros(()), zeros, None if bias is None else jnp.zeros(bias.shape, jnp.float32))
    parts = jax.tree.map(lambda x: _cut(x, count), (hidden, given, weights.astype(jnp.float32)))
    (total, d_kernel, d_bias), d_hidden = jax.lax.scan(chunk, start, parts, unroll=_unroll(count))
    if not differentiated:
        return total, None
    d_bias = None if d_bias is None else d_bias.astype(bias.dtype)
    return total, (_join(d_hidden, hidden.shape[1]), d_kernel.astype(kernel.dtype), d_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(each, head, given, table, weights):
    """The sum of `_pass`, differentiable by the student's head alone."""
    return _pass(each, head, given, table, weights, False)[0]


def _summed_forward(each, head, given, table, weights):
    return _pass(each, head, given, table, weights, True)


def _summed_backward(each, gradient, scale):
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradient), None, None, None


_summed.defvjp(_summed_forward, _summed_backward)
