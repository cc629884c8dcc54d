"""What a weight is worth: scores by which pruning chooses, the statistics of data that they read, and the choice of the least.

Matrices are (L, I, O): layers, inputs (the axes that a product sums over, flattened), outputs. What is done with a choice stands in `prune.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.losses import LossFn
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.platform import target
from llm_jax.transforms.base import marked, removed

EXACT = jax.lax.Precision.HIGHEST


Matrices = dict[str, Float[Array, "L I O"]]


class Pattern(NamedTuple):
    """What is removed together or compared: blocks of rows x columns of a matrix (I, O), or all but `keep` of every `of` rows of a column."""

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    @property
    def alone(self) -> bool:
        """Whether each weight goes by itself."""
        return not self.of and self.rows * self.columns == 1


def parse_pattern(text: str) -> Pattern:
    """The pattern that `prune` calls so.

    >>> parse_pattern("2:4"), parse_pattern("block:4x1")
    (Pattern(rows=1, columns=1, keep=2, of=4), Pattern(rows=4, columns=1, keep=0, of=0))
    """
    if text == "unstructured":
        return Pattern()
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(found[1]) < int(found[2]):
        return Pattern(keep=int(found[1]), of=int(found[2]))
    if (found := re.fullmatch(r"block:(\d+)x(\d+)", text)) and int(found[1]) and int(found[2]):
        return Pattern(rows=int(found[1]), columns=int(found[2]))
    raise ConfigError(
        f"prune: pattern is {text!r}: it must be 'unstructured', 'N:M' such as '2:4' (2 of every 4 are kept) or 'block:RxC'"
    )


class Rule(NamedTuple):
    """Which weights go."""

    sparsity: float
    score: str
    scope: str
    pattern: Pattern
    targets: tuple[str, ...]


def matrix(name: str, x: Array) -> Float[Array, "L I O"]:
    """A stacked weight as matrices: the axes that its product sums over, flattened, then those that it makes."""
    inputs = x.shape[1:-1] if name.endswith(("/out", "/down")) else x.shape[1:2]
    return x.reshape(x.shape[0], math.prod(inputs), -1)


def magnitude(w: Float[Array, "L I O"]) -> Float[Array, "L I O"]:
    """|w| (Han et al. 2015, section 3)."""
    return jnp.abs(w.astype(jnp.float32))


def random(w: Float[Array, "L I O"], key: Array) -> Float[Array, "L I O"]:
    """Uniform in [0, 1): the score that every other one must beat."""
    return jax.random.uniform(key, w.shape)


def taylor(w: Float[Array, "L I O"], g: Float[Array, "L I O"]) -> Float[Array, "L I O"]:
    """|g w|, the first-order change of the loss when w becomes 0; g is the gradient over the calibration rows (Molchanov et al. 2016, eq. 7)."""
    return jnp.abs(g * w)


def wanda(w: Float[Array, "L I O"], squares: Float[Array, "L I"]) -> Float[Array, "L I O"]:
    """|w_ij| ||x_i||_2 with ||x_i||_2^2 = `squares` summed over tokens, to be compared within each output j (Sun et al. 2023, eq. 1)."""
    return jnp.abs(w) * jnp.sqrt(squares)[..., None]


def movement(before: Array, w: Array, g: Array) -> Array:
    """S - g w, summed over the updates: high where training moves a weight away from 0 (Sanh et al. 2020, eq. 4, without its learning rate)."""
    return before - g * w


def fisher(w: Float[Array, "L I O"], squares: Float[Array, "L I O"]) -> Float[Array, "L I O"]:
    """E[g^2] w^2 / 2, the second-order change of the loss when w becomes 0; the curvature is the empirical Fisher information (Theis et al. 2018,
    eq. 8; Optimal Brain Damage, LeCun et al. 1989, eq. 5, takes the Hessian's diagonal).
    """
    return squares * jnp.square(w) / 2


class Gradual(NamedTuple):
    """A score on a schedule."""

    worth: Callable[[Array, Array], Array]
    """of the weights, and of its sums or the mean squares"""
    add: Callable[[Array, Array, Array], Array] | None = None
    """the sums after an update, of those before, the weights and the gradient; None where a score sums nothing up"""
    squares: bool = False
    """whether it reads E[g^2] as the optimizer keeps it: a mean of its own would be 9% of a step of MiniLM"""


GRADUAL = {
    "magnitude": Gradual(lambda w, _: magnitude(w)),
    "fisher": Gradual(fisher, squares=True),
    "movement": Gradual(lambda _, sums: sums, movement),
}


def sparsegpt(
    w: Float[Array, "I O"],
    hessian: Float[Array, "I I"],
    sparsity: float,
    groups: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
) -> Float[Array, "I O"]:
    """The matrix without its least weights, the others changed so that X W stays as near as can be (SparseGPT; Frantar & Alistarh 2023, alg. 1).

    With H = X^T X + damping mean(diag X^T X) I and U^T U = H^-1, U upper triangular, row after row: removing w_ij costs (w_ij / U_ii)^2, and the
    rows below take over with w_k -= w_i / U_ii U_ik. In every `block` of rows the share `sparsity` goes, so that round(sparsity I O) go in all;
    with groups (N, M) all but N of every M rows of an output. Rows beyond the block are updated by one product when it is done. What is removed
    already goes first and stays at zero; where a block has more of it than its share, the blocks below it lose the fewer.
    """
    inputs, outputs = w.shape
    group = groups[1] if groups else min(block, inputs)
    size = max(group, min(block, inputs) // group * group)
    count = -(-inputs // size)
    total = count * size
    u = _inverse_factor(hessian, damping, total)
    wanted = jnp.asarray([round(sparsity * outputs * min(i * size, inputs)) for i in range(1, count + 1)], jnp.int32)
    gone = jnp.pad(removed(w), ((0, total - inputs), (0, 0)))

    def one_block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, kept = carry
        start = b * size
        factor = jax.lax.dynamic_slice(u, (start, start), (size, size))
        diagonal = jnp.diagonal(factor)[:, None]
        quota = jnp.maximum(wanted[b] - jnp.sum(~kept, dtype=jnp.int32), 0)

        def choose(rows: Array, j: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(rows / diagonal, j, group)
            real = start + j + jnp.arange(group) < inputs
            before = jax.lax.dynamic_slice_in_dim(gone, start + j, group)
            cost = jnp.where(before, -1.0, jnp.where(real[:, None], jnp.square(part), jnp.inf))
            least = smallest([cost], groups[1] - groups[0], (0,)) if groups else smallest([cost], quota, (0, 1))
            return ~least[0] & ~before

        def one_row(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows, kept, errors = carry
            kept = jax.lax.cond(
                j % group == 0,
                lambda: jax.lax.dynamic_update_slice_in_dim(kept, choose(rows, j), j, 0),
                lambda: kept,
            )
            error = jnp.where(kept[j], 0, rows[j] / factor[j, j])
            return rows - factor[j][:, None] * error, kept, errors.at[j].set(error)

        rows = jax.lax.dynamic_slice_in_dim(w, start, size)
        begun = (rows, jnp.ones(rows.shape, bool), jnp.zeros_like(rows))
        rows, kept_rows, errors = jax.lax.fori_loop(0, size, one_row, begun)
        w = jax.lax.dynamic_update_slice_in_dim(w, rows, start, 0)
        below = jnp.where(jnp.arange(total) >= start + size, jax.lax.dynamic_slice_in_dim(u, start, size), 0)
        w = w - jnp.matmul(below.T, errors, precision=EXACT)
        return w, jax.lax.dynamic_update_slice_in_dim(kept, kept_rows, start, 0)

    wide = jnp.pad(w.astype(jnp.float32), ((0, total - inputs), (0, 0)))
    wide, kept = jax.lax.fori_loop(0, count, one_block, (wide, jnp.ones(wide.shape, bool)))
    return jnp.where(kept, marked(wide, jnp.zeros((), bool)), 0)[:inputs].astype(w.dtype)


def _inverse_factor(hessian: Float[Array, "I I"], damping: float, total: int) -> Float[Array, "T T"]:
    """U, upper triangular with U^T U = H^-1, of H damped and filled up with an identity; its scale makes no difference and is taken out.

    H = R R^T with R upper triangular is a Cholesky factorisation with rows and columns in reverse order, and U = R^-1: no inverse of H is formed.
    """
    inputs = hessian.shape[0]
    scale = jnp.maximum(jnp.mean(jnp.diagonal(hessian)), 1e-30)
    identity = jnp.eye(total, dtype=jnp.float32)
    h = identity.at[:inputs, :inputs].set(hessian / scale + damping * jnp.eye(inputs))
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, identity, lower=False)


Axes = tuple[int, ...] | None
"""Over which values are compared; None for all of them, of arrays that may have different numbers of axes"""


def smallest(arrays: Sequence[Array], count: Any, axes: Axes) -> list[Bool[Array, "..."]]:
    """True at exactly `count` values over `axes`, of all arrays together: the smallest, and of equal ones the first.

    What a stable sort would choose, found by bisection over the bits of the values and, where equal ones must be told apart, over those of their
    places: passes that only count, in which sharded arrays stay where they are. Up to 2^32 values are told apart.
    """

    def greatest(below: Callable[[Array], Array], bits: int) -> Array:
        """The greatest number of so many bits with below(number) <= what is wanted."""

        def bit(i: Array, found: Array) -> Array:
            trial = found | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
            return jnp.where(below(trial), trial, found)

        return jax.lax.fori_loop(0, bits, bit, jnp.zeros(shape, jnp.uint32))

    def counted(each: Sequence[Array]) -> Array:
        return sum(_counted(x, axes) for x in each)  # type: ignore[return-value]

    def equal(rest: Array) -> Array:
        """The place before which so many of those that are equal to the limit are."""
        bits = sum(_size(x, axes) for x in arrays).bit_length()
        places = _places(arrays, axes)
        return greatest(lambda t: counted([(x == limit) & (at < t) for x, at in zip(values, places)]) <= rest, bits)

    wanted = jnp.asarray(count, jnp.uint32)
    shape = () if axes is None else tuple(1 if i in axes else n for i, n in enumerate(arrays[0].shape))
    values = [_ordered(x) for x in arrays]
    limit = greatest(lambda t: counted([x < t for x in values]) <= wanted, 32)
    rest = wanted - counted([x < limit for x in values])
    last = jax.lax.cond(jnp.any(rest > 0), equal, jnp.zeros_like, rest)  # weights are rarely equal
    return [(x < limit) | ((x == limit) & (at < last)) for x, at in zip(values, _places(arrays, axes))]


def _counted(x: Bool[Array, "..."], axes: Axes) -> Array:
    """How many are True over `axes`, which stay with length 1; over all of them, a number.

    XLA on CPU writes out what it adds up: that is begun in two bytes a value, along the longest axis but the last, in a third of the time.
    """
    along = range(x.ndim) if axes is None else axes
    first = max(along, key=lambda axis: (axis != x.ndim - 1, x.shape[axis]))
    if target() == "cpu" and x.shape[first] < 2**16:
        x = jnp.sum(x, axis=first, keepdims=True, dtype=jnp.uint16)
    return jnp.sum(x, axis=axes, keepdims=axes is not None, dtype=jnp.uint32)


def _places(arrays: Sequence[Array], axes: Axes) -> list[Array]:
    """The number of each entry over `axes`, counted on from array to array."""
    found, offset = [], 0
    for x in arrays:
        place = jnp.zeros((), jnp.uint32)
        for axis in range(x.ndim) if axes is None else axes:
            place = place * x.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        found.append(place + jnp.uint32(offset))
        offset += _size(x, axes)
    return found


def _size(x: Array, axes: Axes) -> int:
    """How many entries of x are compared."""
    return x.size if axes is None else math.prod(x.shape[axis] for axis in axes)


def _ordered(x: Array) -> Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def select(rule: Rule, worth: Matrices, weights: Matrices, share: Any = 1.0) -> dict[str, Bool[Array, "L I O"]]:
    """True for the weights that stay when `share` of round(sparsity * size) of each group go, those that are removed already first.

    A group is a layer's matrix, all matrices together (scope "global"), each output (wanda) or every M inputs of an output (N:M, of which
    M - N go). A block is worth the sum of its weights; blocks are counted in place of weights.
    """

    def gone(arrays: list[Array]) -> list[Array]:
        axes = _compared(rule, arrays[0])
        size = sum(_size(x, axes) for x in arrays)
        count = rule.pattern.of - rule.pattern.keep if rule.pattern.of else round(rule.sparsity * size)
        now = jnp.asarray(jnp.round(count * share), jnp.uint32)
        return smallest(arrays, jnp.where(share >= 1, jnp.uint32(count), now), axes)

    pooled = {name: _pool(rule.pattern, worth[name], weights[name]) for name in worth}
    if rule.scope == "global":
        chosen = dict(zip(pooled, gone(list(pooled.values()))))
    else:
        chosen = {name: gone([x])[0] for name, x in pooled.items()}
    return {name: ~_spread(rule.pattern, x, weights[name].shape) for name, x in chosen.items()}


def _compared(rule: Rule, x: Array) -> Axes:
    """The axes of what `_pool` makes over which worths are compared."""
    if rule.scope == "global":
        return None
    return (2,) if rule.pattern.of else (1,) if rule.score == "wanda" else tuple(range(1, x.ndim))


def _pool(pattern: Pattern, worth: Array, weights: Array) -> Array:
    """The worth of what goes as one, (L, I/M, M, O) or (L, I/R, O/C); that of what is removed is below any other."""
    worth = worth.astype(jnp.float32)
    if pattern.alone:
        return jnp.where(removed(weights), -jnp.inf, worth)
    layers, inputs, outputs = weights.shape
    if pattern.of:
        return jnp.where(removed(weights), -jnp.inf, worth).reshape(layers, inputs // pattern.of, pattern.of, outputs)
    rows, columns = pattern.rows, pattern.columns
    cut = (layers, inputs // rows, rows, outputs // columns, columns)
    gone = jnp.all(removed(weights).reshape(cut), axis=(2, 4))
    return jnp.where(gone, -jnp.inf, jnp.sum(worth.reshape(cut), axis=(2, 4)))


def _spread(pattern: Pattern, x: Array, shape: tuple[int, ...]) -> Array:
    """The choice for each weight, from that for what goes as one."""
    if not (pattern.of or pattern.alone):
        layers, rows, columns = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (layers, rows, pattern.rows, columns, pattern.columns))
    return x.reshape(shape)


def gradients(loss: LossFn, params: Params, batches: dict[str, Array], chosen: Any, power: int = 1) -> Any:
    """The gradient of sum_batches total / sum_batches weight by the chosen weights, without dropout; None in place of the others.

    With power 2, the mean over the batches of the square of each one's gradient.
    """
    live, fixed = tree.split(params, chosen)

    def total(live: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
        found = loss(tree.merge(live, fixed), batch, None, {})
        return found.total, found.weight

    def one(carry: Any, batch: dict[str, Array]) -> tuple[Any, None]:
        gradient, weight = jax.grad(total, has_aux=True)(live, batch)
        if power == 2:
            gradient, weight = jax.tree.map(lambda g: jnp.square(g / jnp.maximum(weight, 1e-9)), gradient), 1.0
        return jax.tree.map(jnp.add, carry, (gradient, weight)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), live)
    gradient, weight = jax.lax.scan(one, (zeros, jnp.zeros(())), batches)[0]
    return jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-9), gradient)


def second_moments(
    config: ModelConfig, params: Params, batches: dict[str, Array], names: Sequence[str], diagonal: bool = False
) -> dict[str, Array]:
    """`moments` of what each named weight is multiplied with, summed over batches of which leaves are (N, B, ...)."""

    def one(batch: dict[str, Array]) -> dict[str, Array]:
        read = transformer.apply(config, params, batch, logits=False, inputs=True).inputs
        every = zip(tree.names(read), jax.tree.leaves(read))
        return {name: moments(config, batch, name, x, diagonal) for name, x in every if name in names}

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches))
    )
    return jax.lax.scan(lambda carry, batch: (jax.tree.map(jnp.add, carry, one(batch)), None), zeros, batches)[0]


def moments(
    config: ModelConfig, batch: dict[str, Array], name: str, x: Float[Array, "L B S ..."], diagonal: bool = False
) -> Float[Array, "L I I"] | Float[Array, "L I"]:
    """sum_tokens x x^T of each layer, or its diagonal; the padding of the stream that the named weight reads is left out."""
    x = x.astype(jnp.float32)
    segments = _segments(config, batch, name)
    if segments is not None:
        x = jnp.where(segments.reshape(1, *segments.shape, *(1,) * (x.ndim - 3)) != 0, x, 0)
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)
    if diagonal:
        return jnp.sum(jnp.square(x), axis=1)
    return jnp.einsum("lti,ltj->lij", x, x, precision=EXACT)


def _segments(config: ModelConfig, batch: dict[str, Array], name: str) -> Array | None:
    """The segments of the stream that a weight reads, 0 in padding; None where there is no padding."""
    encoded = name.startswith("encoder/") or name.endswith(("cross/key", "cross/value"))
    prefix = "encoder_" if encoded and config.architecture == "encoder-decoder" else ""
    return batch.get(f"{prefix}segment_ids")
