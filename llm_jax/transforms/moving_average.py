"""An exponential moving average of the weights, kept by the optimizer and read by evaluation."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax import tree
from llm_jax.transforms.base import IDENTITY, Placed, Transform, removed


class MovingAverageState(NamedTuple):
    """The inner optimizer's state and the average, a tree like the trained params."""

    inner: Any
    average: Any


def moving_average(decay: float, masks: Sequence[str] = (), trained: Callable[[Any], Any] | None = None) -> Transform:
    """average <- decay * average + (1 - decay) * params after each update, from the initial params (Polyak and Juditsky 1992).

    Args:
        decay: 0 for none.
        masks: regexes of weights whose zeros are a mask; the average of such a zero is 0.
        trained: True at each weight that transforms inside of it leave to be trained (`Transform.trained`); others need no average. By default all.
    """
    if not decay:
        return IDENTITY

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        inner = optax.with_extra_args_support(inner)

        def init(params):
            live = params if trained is None else tree.split(params, trained(params))[0]
            return MovingAverageState(inner.init(params), jax.tree.map(jnp.copy, live))

        def step(updates, state, params, **extra):
            updates, below = inner.update(updates, state.inner, params, **extra)

            def one(name: str, u: Any, a: Any, p: Any) -> Any:
                x = u.value if isinstance(u, Placed) else p + u
                now = decay * a + (1 - decay) * x
                return jnp.where(removed(x), 0, now) if any(re.fullmatch(regex, name) for regex in masks) else now

            names = tree.map_with_name(lambda name, _: name, state.average)
            average = jax.tree.map(
                lambda u, name, a, p: a if u is None else one(name, u, a, p),  # None: a transform inside froze it
                updates,
                names,
                state.average,
                params,
                is_leaf=lambda u: u is None,
            )
            return updates, MovingAverageState(below, average)

        return optax.GradientTransformationExtraArgs(init, step)

    return Transform(update=update, label=f"moving_average({decay})")
