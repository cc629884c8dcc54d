"""Freezing: parameters that are read but not trained, at the cost of neither gradient nor moments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.losses import GradFn
from llm_jax.transforms.base import IDENTITY, Transform


def freeze(regexes: Sequence[str]) -> Transform:
    """Parameters whose path a regex matches are split off before differentiation and keep their values bit for bit.

    Raises:
        ConfigError: a regex that matches no parameter, or nothing is left to train.
    """
    if not regexes:
        return IDENTITY

    def trained(params: Any) -> Any:
        chosen = tree.mask(params, regexes, "optimizer.freeze")
        if all(jax.tree.leaves(chosen)):
            raise ConfigError("optimizer.freeze leaves no parameter to train")
        return tree.negate(chosen)

    return train_only(trained)._replace(label=f"freeze({list(regexes)})")


def train_only(chosen: Callable[[Any], Any]) -> Transform:
    """Parameters where `chosen(params)` is true are trained; the others are split off as `freeze` says."""

    def grad(inner: GradFn) -> GradFn:
        def partial(params, batch, key, reference):
            live, fixed = tree.split(params, chosen(params))
            held = reference.get("frozen")
            return inner(live, batch, key, {**reference, "frozen": fixed if held is None else tree.merge(fixed, held)})

        return partial

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        inner = optax.with_extra_args_support(inner)

        def live(params):
            return tree.split(params, chosen(params))[0]

        def step(updates, state, params=None, **extra):
            return inner.update(updates, state, None if params is None else live(params), **extra)

        return optax.GradientTransformationExtraArgs(lambda params: inner.init(live(params)), step)

    return Transform(grad=grad, update=update, label="train_only", trained=chosen)
