"""The update rule: any optimizer of optax by name, its schedule, what decays, and multipliers by regex. Freezing and averages are transforms."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from llm_jax import config, tree
from llm_jax.errors import ConfigError, suggest
from llm_jax.transforms.moving_average import MovingAverageState


def optimizers() -> dict[str, Callable[..., Any]]:
    """Every optimizer of optax and optax.contrib by name: the functions that take a learning rate."""
    found = {}
    for module in (optax.contrib, optax):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_") and "learning_rate" in inspect.signature(function).parameters:
                found[name] = function
    return found


def make_schedule(schedule: config.Schedule, steps: int) -> Callable[[Any], Array]:
    """Factor of the learning rate at a step: `initial` to 1 over the warmup, then the curve to `final` at `steps`, in each cycle.

    cosine: final + (1 - final) (1 + cos(pi t)) / 2 with t the share of the curve that has passed; linear: 1 - (1 - final) t;
    inverse_sqrt: sqrt(warmup / step); wsd: 1, and in the last `decay` of the cycle down to final as 1 - sqrt (Hägele et al. 2024, eq. 2).
    """
    length = max(1, steps // schedule.cycles)
    warmup = min(schedule.warmup, length)

    def factor(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        cycle = jnp.minimum(step // length, schedule.cycles - 1)
        inside = step - cycle * length
        first = jnp.where(cycle == 0, schedule.initial, schedule.final)
        rising = first + (1 - first) * inside / max(1, warmup)
        t = jnp.clip((inside - warmup) / max(1, length - warmup), 0, 1)
        curve = {
            "constant": lambda: jnp.ones(()),
            "cosine": lambda: schedule.final + (1 - schedule.final) * (1 + jnp.cos(jnp.pi * t)) / 2,
            "linear": lambda: 1 - (1 - schedule.final) * t,
            "inverse_sqrt": lambda: jnp.sqrt(max(1, warmup) / jnp.maximum(inside, max(1, warmup))),
            "wsd": lambda: 1 - (1 - schedule.final) * jnp.sqrt(jnp.clip((inside / length - 1 + schedule.decay) / max(schedule.decay, 1e-9), 0, 1)),
        }[schedule.name]()
        return jnp.where(inside < warmup, rising, curve)

    return factor


def decayed(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to biases, norms and embeddings.

    >>> decayed("decoder/layers/mlp/up"), decayed("decoder/layers/mlp_norm/scale"), decayed("embed/tokens")
    (True, False, False)
    """
    return not (name.startswith("embed/") or re.search(r"(^|[/_])(scale|bias|table)$", name))


def _scale_by_regex(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Updates times the factor of the first regex that matches their path."""
    factors = [factor for _, factor in multipliers]
    regexes = [regex for regex, _ in multipliers]

    def update(updates, state, params=None):
        index = tree.map_with_name(
            lambda name, u: next((u * f for r, f in zip(regexes, factors) if re.fullmatch(r, name)), u), updates)
        return index, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _arguments(name: str, factory: Callable[..., Any], given: tuple[tuple[str, float], ...]) -> dict[str, Any]:
    """The named arguments, whole numbers and truth values as the optimizer declares them."""
    declared = inspect.signature(factory).parameters
    made: dict[str, Any] = {}
    for key, value in given:
        if key not in declared:
            raise ConfigError(f"optimizer {name!r} has no argument {key!r}{suggest(key, declared)}")
        default = declared[key].default
        made[key] = type(default)(value) if isinstance(default, (bool, int)) and float(value).is_integer() else value
    return made


def _muon_dimensions(axes: Any) -> Callable[[Any], Any]:
    """For each matrix which axes are contracted and which are made, since heads are axes of their own; None for what Adam updates."""
    named = dict(zip(tree.names(axes, is_leaf=lambda x: isinstance(x, tuple)), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))))

    def one(name: str, leaf: Any) -> Any:
        names = named[name]
        if not decayed(name) or "layers" not in names or len(names) < 3:
            return None
        inner = tuple(range(1, len(names) - 1)) if names[-1] == "embed" else (1,)
        outer = tuple(i for i in range(1, len(names)) if i not in inner)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inner, output_axis=outer)

    return lambda params: tree.map_with_name(one, params)


def make_optimizer(settings: config.Optimizer, schedule: Callable[[Any], Array], shapes: Any, axes: Any) -> optax.GradientTransformationExtraArgs:
    """Clip, the named rule at `learning_rate * schedule(step)`, then the multipliers.

    Raises:
        ConfigError: no such optimizer or argument, or a regex that matches no parameter.
    """
    known = optimizers()
    if settings.name not in known:
        raise ConfigError(f"unknown optimizer {settings.name!r}{suggest(settings.name, known)}")
    tree.match(shapes, [regex for regex, _ in settings.multipliers], "optimizer.multipliers")
    factory = known[settings.name]
    declared = inspect.signature(factory).parameters
    arguments = _arguments(settings.name, factory, settings.arguments)
    decay_mask = lambda params: tree.map_with_name(lambda name, _: decayed(name), params)  # noqa: E731
    parts = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    if "weight_decay" in declared:
        arguments["weight_decay"] = settings.weight_decay
        mask_name = next((m for m in ("weight_decay_mask", "mask") if m in declared), None)
        if mask_name:
            arguments[mask_name] = decay_mask
    elif settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=decay_mask))
    if "muon_weight_dimension_numbers" in declared:
        arguments["muon_weight_dimension_numbers"] = _muon_dimensions(axes)
    parts.append(factory(learning_rate=lambda step: settings.learning_rate * schedule(step), **arguments))
    if settings.multipliers:
        parts.append(_scale_by_regex(settings.multipliers))
    return optax.with_extra_args_support(optax.chain(*parts))


def eval_params(opt_state: Any, params: Any) -> Any:
    """The params to evaluate: the moving average where the optimizer keeps one, else the params as they are."""
    def kept(x: Any) -> bool:
        return isinstance(x, (MovingAverageState, optax.contrib.ScheduleFreeState))

    for state in jax.tree.leaves(opt_state, is_leaf=kept):
        if isinstance(state, MovingAverageState):
            return tree.merge(state.average, params)
        if isinstance(state, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(state, params)
    return params
