"""Merging: one model of several that share their sizes. The first is the model that is changed, the others come as `aux`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax import tree
from llm_jax.errors import ConfigError, choose
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Transform, marked, removed

METHODS = ("mean", "moving_average", "slerp", "task_vectors", "ties")

Stack = Float[Array, "N ..."]
"""One weight of all N models"""


def mean(x: Stack, weights: Float[Array, " N"]) -> Array:
    """sum_i w_i x_i, as x_0 + sum_i w_i (x_i - x_0), so that equal weights come out bit for bit (model soups; Wortsman et al. 2022)."""
    return x[0] + jnp.tensordot(weights, x - x[0], 1)


def slerp(x: Stack, t: float) -> Array:
    """sin((1 - t) a) / sin(a) x_0 + sin(t a) / sin(a) x_1, where a is the angle between them; along the straight line where they are parallel."""
    a, b = x
    cosine = jnp.vdot(a, b) / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    straight = sine < 2e-3  # float32 does not tell such an angle from none
    sine = jnp.where(straight, 1, sine)
    along = jnp.sin((1 - t) * angle) / sine * a + jnp.sin(t * angle) / sine * b
    return jnp.where(straight, a + t * (b - a), along)


def task_vectors(x: Stack, scale: float) -> Array:
    """x_0 + scale * sum_i (x_i - x_0), x_0 the model that the others were trained from (Ilharco et al. 2022)."""
    return x[0] + scale * jnp.sum(x[1:] - x[0], axis=0)


def ties(x: Stack, scale: float, keep: float) -> Array:
    """x_0 + scale * the mean of the changes that agree in sign with the elected one (TIES; Yadav et al. 2023, algorithm 1).

    Of each model's change the share `keep` of greatest magnitude is kept; the elected sign is that of their sum.
    """
    change = x[1:] - x[0]
    flat = jnp.abs(change.reshape(change.shape[0], -1))
    count = max(1, round(keep * flat.shape[1]))  # of a small tensor too something is kept
    least = jax.lax.top_k(flat, count)[0][:, -1].reshape(-1, *(1,) * (change.ndim - 1))
    change = jnp.where(jnp.abs(change) >= least, change, 0)
    agree = (change != 0) & (jnp.sign(change) == jnp.sign(jnp.sum(change, axis=0)))
    merged = jnp.sum(jnp.where(agree, change, 0), axis=0) / jnp.maximum(jnp.sum(agree, axis=0), 1)
    return x[0] + scale * merged


def merge(
    method: str = "mean",
    *,
    weights: Sequence[float] = (),
    decay: float = 0.9,
    t: float = 0.5,
    scale: float = 1.0,
    keep: float = 0.2,
) -> Transform:
    """One model of several, weight by weight; each layer's weights are a tensor of their own. `aux` holds the params of the others.

    What is pruned in the first model stays so where it is in all of them.

    Args:
        method: mean, moving_average (of checkpoints in the order of training), slerp (of two), task_vectors or ties (the first is the
            model that the others were trained from).
        weights: of the mean, one for each model, the first included; empty for equal ones.
        decay: of the moving average.
        t: place between two models, from 0 to 1.
        scale: factor of what is added to the first model.
        keep: share of each change that ties keeps, above 0.

    Raises:
        ConfigError: no such method, or arguments that do not go with it.
    """
    choose("method", method, METHODS)
    if any(w < 0 for w in weights) or (weights and not sum(weights) > 0):
        raise ConfigError(f"merge: weights are {tuple(weights)}: they must not be negative, and one must be above 0")
    if weights and method != "mean":
        raise ConfigError(f"merge: weights are of the mean: they do not go with {method}")
    if not math.isfinite(scale):
        raise ConfigError(f"merge: scale is {scale}: it must be a finite number")
    for name, value in (("decay", decay), ("t", t), ("keep", keep)):
        if not 0 <= value <= 1:
            raise ConfigError(f"merge: {name} is {value}: it must lie in [0, 1]")
    own = {"decay": ("moving_average",), "t": ("slerp",), "scale": ("task_vectors", "ties"), "keep": ("ties",)}
    given = {"decay": decay, "t": t, "scale": scale, "keep": keep}
    for name, value in given.items():
        if method not in own[name] and value != (merge.__kwdefaults__ or {})[name]:
            raise ConfigError(f"merge: {name} is of {' and '.join(own[name])}: it does not go with {method}")
    if not keep:
        raise ConfigError("merge: keep is 0: ties would change nothing")

    def shares(count: int) -> Float[Array, " N"]:
        if method == "moving_average":
            own = [1.0, *[1 - decay] * (count - 1)]
            return jnp.array([w * decay ** (count - 1 - i) for i, w in enumerate(own)], jnp.float32)
        if weights and len(weights) != count:
            raise ConfigError(f"merge: {len(weights)} weights for {count} models")
        given = weights or (1.0,) * count
        return jnp.array([w / sum(given) for w in given], jnp.float32)

    def rule(count: int) -> Callable[[Stack], Array]:
        if count < 2 or (method == "slerp" and count != 2):
            raise ConfigError(
                f"merge: {method} of {count} models: it takes {'two' if method == 'slerp' else 'two or more'}"
            )
        if method in ("mean", "moving_average"):
            share = shares(count)
            return lambda x: mean(x, share)
        if method == "slerp":
            return lambda x: slerp(x, t)
        return (lambda x: task_vectors(x, scale)) if method == "task_vectors" else lambda x: ties(x, scale, keep)

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        one = rule(1 + len(aux or ()))

        def leaf(name: str, *each: Array) -> Array:
            stacked = jnp.stack(each)
            made = jax.vmap(one, in_axes=1)(stacked) if "/layers/" in name else one(stacked)
            return marked(made.astype(each[0].dtype), removed(each[0]))

        return tree.map_with_name(leaf, params, *aux)

    every: dict[str, dict[str, Any]] = {
        "mean": {"weights": tuple(weights)},
        "moving_average": {"decay": decay},
        "slerp": {"t": t},
        "task_vectors": {"scale": scale},
        "ties": {"scale": scale, "keep": keep},
    }
    told = ", ".join(f"{name}={value}" for name, value in every[method].items())
    return Transform(params=params, label=f"merge({method!r}, {told})")
