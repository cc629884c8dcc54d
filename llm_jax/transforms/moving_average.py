"""An exponential moving average of the weights, kept by the optimizer and read by evaluation."""

from typing import Any, NamedTuple

import jax
import optax

from llm_jax.transforms.base import IDENTITY, Transform


class MovingAverageState(NamedTuple):
    """The inner optimizer's state and the average, a tree like the trained params."""

    inner: Any
    average: Any


def moving_average(decay: float) -> Transform:
    """average <- decay * average + (1 - decay) * params after each update, from the initial params (Polyak and Juditsky 1992)."""
    if not decay:
        return IDENTITY

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        inner = optax.with_extra_args_support(inner)

        def init(params):
            return MovingAverageState(inner.init(params), jax.tree.map(lambda x: x + 0, params))

        def step(updates, state, params, **extra):
            updates, below = inner.update(updates, state.inner, params, **extra)
            average = jax.tree.map(
                lambda u, a, p: (
                    a if u is None else decay * a + (1 - decay) * (p + u)
                ),  # None: a transform inside froze it
                updates,
                state.average,
                params,
                is_leaf=lambda u: u is None,
            )
            return updates, MovingAverageState(below, average)

        return optax.GradientTransformationExtraArgs(init, step)

    return Transform(update=update, label=f"moving_average({decay})")
