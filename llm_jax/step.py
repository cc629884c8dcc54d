"""One update as a pure function of the state and a batch. What is minimised, differentiated and updated comes in as functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from llm_jax import tree
from llm_jax.losses import GradFn, Loss, LossFn
from llm_jax.platform import on_device
from llm_jax.tasks.base import Batch
from llm_jax.transforms.base import Guarded, effective_params, moved

State = Any


class TrainState(NamedTuple):
    """All that an update reads and writes."""

    step: Int[Array, ""]
    params: Any
    """the weights that are trained; the model is applied with `effective_params` of them, and evaluated with `optim.eval_params`"""
    opt_state: Any
    key: Array
    """the run's key; that of a step is folded from it"""
    skipped: Int[Array, ""]
    """updates skipped because the loss or the gradient was not finite"""
    skipped_in_a_row: Int[Array, ""]
    reference: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    """other weights that the loss reads: teachers, anchors; not trained, not saved"""


def differentiate(loss: LossFn) -> GradFn:
    """The gradient of `loss.total` by the params; `reference["frozen"]` holds params that are read and not differentiated."""

    def grad(params: Any, batch: Batch, key: Array | None, reference: dict[str, Any]) -> tuple[Loss, Any]:
        def total(trained: Any) -> tuple[Array, Loss]:
            whole = tree.merge(trained, reference["frozen"]) if "frozen" in reference else trained
            found = loss(whole, batch, key, reference)
            return found.total, found.sums()

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return found, gradient

    return grad


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: Array, reference: dict[str, Any] | None = None
) -> TrainState:
    """The state before the first update."""
    step, skipped, in_a_row = (
        jnp.zeros((), jnp.int32) for _ in range(3)
    )  # each a buffer of its own, so that all can be donated
    return TrainState(step, params, optimizer.init(params), key, skipped, in_a_row, reference or {})


def make_step(loss: LossFn, grad: GradFn, optimizer: optax.GradientTransformationExtraArgs):
    """(state, batch) -> (state, metrics): the mean gradient over the global batch, and the update that the optimizer makes of it.

    Loss and gradient are those at the weights that the model is applied with (`effective_params`). An update whose loss or gradient is not finite
    leaves params and moments as they are and is counted. The optimizer is told (`finite`), and need not look but for what it says that it looks
    after itself: `Guarded` state, weights that are `Placed`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        found, gradient = grad(effective_params(state.opt_state, state.params), batch, key, state.reference)
        before = on_device(state.opt_state, after=gradient)
        weight = jnp.maximum(found.weight, 1e-9)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        value, norm = found.total / weight, optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def value_fn(params: Any) -> Array:
            whole = effective_params(before, tree.merge(params, state.params))
            again = loss(whole, batch, key, state.reference)
            return again.total / weight

        updates, opt_state = optimizer.update(
            gradient, before, state.params, value=value, grad=gradient, value_fn=value_fn, finite=finite
        )
        params = jax.tree.map(lambda p, u: moved(p, u, finite), state.params, updates, is_leaf=lambda x: x is None)
        opt_state = jax.tree.map(
            lambda new, old: new if isinstance(new, Guarded) else jnp.where(finite, new, old),
            opt_state,
            before,
            is_leaf=lambda x: isinstance(x, Guarded),
        )
        skip = 1 - finite.astype(jnp.int32)
        new = TrainState(
            state.step + 1,
            params,
            opt_state,
            state.key,
            state.skipped + skip,
            (state.skipped_in_a_row + 1) * skip,
            state.reference,
        )
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "weight": found.weight,
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            **{name: x / weight for name, x in found.metrics.items()},
        }
        return new, metrics

    return step
