"""An exponential moving average of the weights, kept by the optimizer and read by evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.transforms.base import IDENTITY, Transform, removed


class MovingAverageState(NamedTuple):
    """The inner optimizer's state and the average, a tree like the trained params."""

    inner: Any
    average: Any


def moving_average(decay: float) -> Transform:
    """average <- decay * average + (1 - decay) * params after each update, from the initial params (Polyak and Juditsky 1992).

    The average of a weight that is removed is 0, so that pruning is seen in it too.
    """
    if not decay:
        return IDENTITY

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        inner = optax.with_extra_args_support(inner)

        def init(params):
            return MovingAverageState(inner.init(params), jax.tree.map(lambda x: x + 0, params))

        def step(updates, state, params, **extra):
            updates, below = inner.update(updates, state.inner, params, **extra)

            def one(u: Any, a: Any, p: Any) -> Any:
                if u is None:  # a transform inside froze it
                    return a
                return jnp.where(removed(p + u), 0, decay * a + (1 - decay) * (p + u))

            average = jax.tree.map(one, updates, state.average, params, is_leaf=lambda u: u is None)
            return updates, MovingAverageState(below, average)

        return optax.GradientTransformationExtraArgs(init, step)

    return Transform(update=update, label=f"moving_average({decay})")
