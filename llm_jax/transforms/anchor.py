"""Anchors: training on new data that is drawn back to an older model, in its weights or in what it says."""

import functools
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax import divergences, tree
from llm_jax.errors import ConfigError, choose
from llm_jax.losses import Loss, LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import IDENTITY, Calibration, Transform
from llm_jax.transforms.distil import Names, differ, rows_of, say, sizes_of, weights_of

KINDS = ("l2", "fisher", "kl")


def anchor(
    model: Any, kind: str = "l2", *, strength: float = 1.0, fisher: Any = None, exclude: Sequence[str] = ()
) -> Transform:
    """The objective, a mean over tokens, and what moving away from an older model costs; nothing is added in evaluation.

    - l2: strength/2 sum_i (theta_i - theta_0i)^2, with theta_0 the older model's weights (L2-SP; Li et al. 2018, section 3)
    - fisher: strength/2 sum_i F_i (theta_i - theta_0i)^2 (elastic weight consolidation; Kirkpatrick et al. 2017, eq. 3)
    - kl: strength times the mean of KL(p_0, p), p_0 what the older model says of the same targets (learning without forgetting; Li and
      Hoiem 2016, with its own outputs as recorded targets)

    Args:
        model: the older model: where to load it from, or a `Model`.
        kind: l2, fisher or kl.
        strength: 0 for the identity.
        fisher: where to load F from, or a `Model` whose params it is: `Model(config, fisher(config, params, calibration))`.
        exclude: l2, fisher: regexes of parameters, by their path, that may go where they will, such as a head that the older model has not.

    Raises:
        ConfigError: a bad argument; later, weights that the older model has not, or has of another shape.
    """
    choose("anchor", kind, KINDS)
    model, fisher = (fspath(x) if isinstance(x, PathLike) else x for x in (model, fisher))
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"anchor: strength is {strength}: it must not be negative")
    if (kind == "fisher") != (fisher is not None):
        raise ConfigError(
            f"anchor: kind={kind!r} {'needs' if kind == 'fisher' else 'reads no'} Fisher information: "
            "fisher= the model or the path of what llm_jax.transforms.fisher gives, with kind='fisher'"
        )
    if kind == "kl" and exclude:
        raise ConfigError("anchor: exclude is of weights: it does not go with kind='kl'")
    if not strength:
        return IDENTITY
    told = "".join(f", {name}={x!r}" for name, x in (("fisher", fisher), ("exclude", exclude)) if x)
    label = f"anchor({model!r}, {kind!r}, strength={strength}{told})"
    if kind == "kl":
        return Transform(loss=_divergence(model, strength), label=label, reference={"anchor": model})

    def loss(inner: LossFn) -> LossFn:
        def anchored(params: Params, batch: Any, key: Array | None, reference: dict[str, Any]) -> Loss:
            found = inner(params, batch, key, reference)
            if key is None:
                return found
            penalty = strength / 2 * distance(params, reference["anchor"], reference.get("fisher"), exclude)
            total = (
                found.weight * penalty
            )  # totals are divided by the sum of the weights, so that slices add up to it once
            return found.plus(total, {"anchor": total})

        return anchored

    return Transform(
        loss=loss, label=label, reference={"anchor": model} | ({} if fisher is None else {"fisher": fisher})
    )


def _divergence(model: Any, strength: float) -> Callable[[LossFn], LossFn]:
    """The divergence of `distil`, under names of its own, so that a run may have a teacher beside its anchor."""
    names, rule = Names("anchor", "older model", "model"), divergences.named("forward_kl")

    def loss(inner: LossFn) -> LossFn:
        sizes = sizes_of(model)

        def anchored(params: Params, batch: Any, key: Array | None, reference: dict[str, Any]) -> Loss:
            found = inner(params, batch, key, reference)
            if key is None:
                return found
            batch = rows_of(found, batch)
            said = say(names, sizes, reference["anchor"], batch, found.outputs)
            term = strength * differ(names, rule, found.outputs, said, weights_of(found, batch))
            return found.plus(term, {"anchor": term})

        return anchored

    return loss


def distance(
    params: Params, old: Params, fisher: Params | None = None, exclude: Sequence[str] = ()
) -> Float[Array, ""]:
    """sum_i F_i (theta_i - theta_0i)^2 in float32, F = 1 unless given, over the parameters that are not excluded.

    Raises:
        ConfigError: a parameter that the other trees have not, or a regex that matches none.
    """
    sides = [dict(zip(tree.names(x), jax.tree.leaves(x))) for x in (old, *([] if fisher is None else [fisher]))]
    free = tree.mask(params, exclude, "anchor: exclude")
    total = jnp.zeros(())
    for name, x, out in zip(tree.names(params), jax.tree.leaves(params), jax.tree.leaves(free)):
        if out:
            continue
        for side in sides:
            if name not in side or side[name].shape != x.shape:
                shape = f"has it of shape {side[name].shape}" if name in side else "has it not"
                raise ConfigError(
                    f"anchor: {name} is of shape {x.shape}, but the older model {shape}: exclude it, or shrink both"
                )
        square = jnp.square(x.astype(jnp.float32) - sides[0][name].astype(jnp.float32))
        total += jnp.sum(square * sides[1][name] if fisher is not None else square)
    return total


def fisher(config: ModelConfig, params: Params, calibration: Calibration) -> Params:
    """The mean over rows of (d log p(row) / d theta)^2: the diagonal of the empirical Fisher information, a tree like the params.

    log p is that of the targets in the data, not of ones drawn from the model, which would make it the Fisher information itself (Kunstner
    et al. 2019). A row of packed examples counts as one example; rows without anything to predict do not count.
    """
    rows = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, 1, *x.shape[2:]), calibration.batches)
    total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params), jnp.zeros(())
    for i in range(jax.tree.leaves(rows)[0].shape[0]):
        total = _add_row(config, calibration.loss, params, rows, i, total)
    squares, count = total
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1), squares)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _add_row(config: ModelConfig, objective: Any, params: Params, rows: Any, index: int, total: Any) -> Any:
    """The squared gradient of one row's -log p added to the sum, and one to the count."""
    row = jax.tree.map(lambda x: x[index], rows)

    def nll(weights: Params) -> tuple[Array, Array]:
        found = objective(config)(weights, row, None, {})
        return found.total, found.weight

    gradient, weight = jax.grad(nll, has_aux=True)(params)
    squares, count = total
    return jax.tree.map(lambda s, g: s + jnp.square(g.astype(jnp.float32)), squares, gradient), count + (weight > 0)
