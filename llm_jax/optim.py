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
from llm_jax.models.transformer import depths
from llm_jax.platform import on_device
from llm_jax.transforms.base import effective_params, removed
from llm_jax.transforms.moving_average import MovingAverageState

RATES = ("learning_rate", "max_learning_rate")
"""What the functions of optax call a learning rate."""

UNSCHEDULED = ("optimistic_adam", "polyak_sgd", "rprop", "sm3")
"""Rules whose learning rate is a number; what they make of the gradient is multiplied by the schedule instead."""


WHOLE = ("galore",)
"""Rules that fail on params of which a part is left out."""


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _required(function: Callable[..., Any]) -> list[str]:
    """Arguments without a default, the learning rate and those of a variable number left out."""
    return [
        name
        for name, p in _parameters(function).items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in RATES
    ]


def optimizers() -> dict[str, Callable[..., Any]]:
    """Every optimizer of optax and optax.contrib by name: the functions that make one of a learning rate alone.

    So it leaves out what wraps another optimizer (schedule_free, sam, lookahead, mechanize: take schedule_free_adamw or
    schedule_free_sgd), what differentiates each example (dpsgd), and the building blocks (scale_by_...). galore projects the
    tables of embeddings alone, since it knows no stacked layers.
    """
    found: dict[str, Callable[..., Any]] = {}
    for module in (optax.contrib, optax):
        for name, function in vars(module).items():
            if (
                inspect.isfunction(function)
                and not name.startswith(("_", "scale_by_"))
                and set(RATES) & set(_parameters(function))
                and not _required(function)
            ):
                found[name] = function
    return found


def _factory(name: str) -> Callable[..., Any]:
    """The function of optax that makes the named optimizer."""
    known = optimizers()
    if name in known:
        return known[name]
    other = vars(optax.contrib).get(name) or vars(optax).get(name)
    if inspect.isfunction(other) and _required(other):
        raise ConfigError(f"optimizer {name!r} cannot be used by its name: it needs {', '.join(_required(other))} too")
    raise ConfigError(f"unknown optimizer {name!r}{suggest(name, known)}")


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
            "wsd": lambda: (
                1
                - (1 - schedule.final)
                * jnp.sqrt(jnp.clip((inside / length - 1 + schedule.decay) / max(schedule.decay, 1e-9), 0, 1))
            ),
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
            lambda name, u: next((u * f for r, f in zip(regexes, factors) if re.fullmatch(r, name)), u), updates
        )
        return index, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_depth(factor: float) -> optax.GradientTransformation:
    """Updates times factor^depth, the depth below the head (ELECTRA, appendix A)."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, depth: u * jnp.asarray(factor**depth, u.dtype), updates, depths(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _arguments(settings: config.Optimizer, factory: Callable[..., Any]) -> dict[str, Any]:
    """`optimizer.arguments` by name, whole numbers and truth values as the optimizer declares them."""
    declared = _parameters(factory)
    made: dict[str, Any] = {}
    for key, value in settings.arguments:
        if key not in declared:
            raise ConfigError(f"optimizer {settings.name!r} has no argument {key!r}{suggest(key, declared)}")
        default = declared[key].default
        if key in (*RATES, "weight_decay"):
            raise ConfigError(f"optimizer.arguments has {key!r}: set optimizer.{key.removeprefix('max_')} instead")
        if default is not None and not isinstance(default, (bool, int, float)):
            raise ConfigError(
                f"optimizer.arguments has {key!r}, which is not a number but {default!r} in optimizer {settings.name!r}"
            )
        whole = float(value).is_integer() and not isinstance(default, float)
        made[key] = bool(value) if isinstance(default, bool) else int(value) if whole else value
    return made


def _decay_mask(params: Any) -> Any:
    return tree.map_with_name(lambda name, _: decayed(name), params)


def _muon_dimensions(axes: Any) -> Callable[[Any], Any]:
    """For each matrix which axes are contracted and which are made, since heads are axes of their own; None for what Adam updates."""
    named = dict(
        zip(
            tree.names(axes, is_leaf=lambda x: isinstance(x, tuple)),
            jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        )
    )

    def one(name: str, leaf: Any) -> Any:
        names = named[name]
        if not decayed(name) or "layers" not in names or len(names) < 3:
            return None
        inner = tuple(range(1, len(names) - 1)) if names[-1] in ("embed", "rank") else (1,)
        outer = tuple(i for i in range(1, len(names)) if i not in inner)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inner, output_axis=outer)

    return lambda params: tree.map_with_name(one, params)


def _rule(
    settings: config.Optimizer, factory: Callable[..., Any], arguments: dict[str, Any], schedule: Callable[[Any], Array]
) -> optax.GradientTransformationExtraArgs:
    """The named rule at `learning_rate * schedule(step)`."""
    declared = _parameters(factory)
    rate = next(name for name in RATES if name in declared)
    try:
        if settings.name in UNSCHEDULED:
            rule = optax.chain(
                factory(**{rate: settings.learning_rate}, **arguments), optax.scale_by_schedule(schedule)
            )
        else:
            rule = factory(**{rate: lambda step: settings.learning_rate * schedule(step)}, **arguments)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"optimizer {settings.name!r} does not take these arguments: {e}") from e
    rule = optax.with_extra_args_support(rule)

    def update(updates, state, params=None, *, finite=None, **extra):
        del finite  # line searches refuse what they do not know
        if "hessian_diagonal_fn" in declared:
            extra["obj_fn"] = extra.pop("value_fn", None)  # as the estimators of the Hessian call the objective
        return rule.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def make_optimizer(
    settings: config.Optimizer, schedule: Callable[[Any], Array], shapes: Any, axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Clip, the named rule at `learning_rate * schedule(step)`, then the multipliers and the decay over layers.

    Weight decay is the rule's own where it has one (it reaches all parameters in the few that take no mask, such as prodigy), else
    -learning_rate * schedule(step) * weight_decay * matrix is added to the update.

    Raises:
        ConfigError: no such optimizer or argument, or a regex that matches no parameter.
    """
    factory = _factory(settings.name)
    if settings.freeze and settings.name in WHOLE:
        raise ConfigError(
            f"optimizer {settings.name!r} cannot leave a part of the params out: optimizer.freeze must be empty"
        )
    tree.match(shapes, [regex for regex, _ in settings.multipliers], "optimizer.multipliers")
    declared = _parameters(factory)
    arguments = _arguments(settings, factory)
    parts = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    if "weight_decay" in declared:
        arguments["weight_decay"] = settings.weight_decay
        mask_name = next((m for m in ("weight_decay_mask", "mask") if m in declared), None)
        if mask_name:
            arguments[mask_name] = _decay_mask
    if "muon_weight_dimension_numbers" in declared:
        arguments["muon_weight_dimension_numbers"] = _muon_dimensions(axes)
    parts.append(_rule(settings, factory, arguments, schedule))
    if settings.weight_decay and "weight_decay" not in declared:
        parts.append(
            optax.add_decayed_weights(
                lambda step: -settings.learning_rate * settings.weight_decay * schedule(step), mask=_decay_mask
            )
        )
    if settings.multipliers:
        parts.append(_scale_by_regex(settings.multipliers))
    if settings.layer_decay != 1:
        parts.append(_scale_by_depth(settings.layer_decay))
    return optax.with_extra_args_support(optax.chain(*parts))


def eval_params(opt_state: Any, params: Any) -> Any:
    """The params to evaluate: the moving average where the optimizer keeps one, else those that are trained, with the zeros of its `WeightMask`s."""
    return effective_params(opt_state, _averaged(opt_state, params))


def _averaged(opt_state: Any, params: Any) -> Any:
    """The moving average where the optimizer keeps one, else the params as they are."""

    def kept(x: Any) -> bool:
        return isinstance(x, (MovingAverageState, optax.contrib.ScheduleFreeState))

    for state in jax.tree.leaves(opt_state, is_leaf=kept):
        if isinstance(state, MovingAverageState):
            return tree.merge(on_device(state.average), params)
        if isinstance(state, optax.contrib.ScheduleFreeState):
            state = on_device(state)
            trained = jax.tree.map(lambda z, x: None if z is None else x, state.z, params, is_leaf=lambda z: z is None)
            found = optax.contrib.schedule_free_eval_params(state, trained)
            # The rule's own copy of a weight that pruning holds at zero drifts, since its gradient is left to it.
            held = jax.tree.map(lambda x, y: jnp.where(removed(y), 0, x), found, trained)
            return tree.merge(held, params)
    return params
