"""Pruning: weights set to zero at once or on a schedule, kept at zero by the update or by a mask in its state, and what a card says of them.

What a weight is worth is told in `scores.py`. Neurons, heads and layers that are cut out, so that sizes change, are `shrink`'s business.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array

from llm_jax import tree
from llm_jax.errors import CheckpointError, ConfigError, choose
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms import scores
from llm_jax.transforms.base import (
    IDENTITY,
    Calibration,
    Guarded,
    Placed,
    Transform,
    WeightMask,
    effective_params,
    kept_moments,
    marked,
    moved,
    removed,
)
from llm_jax.transforms.scores import Rule, matrix, parse_pattern, select

TARGETS = (r".*/layers/(attention|cross)/(query|key|value|out)", r".*/layers/mlp/(up|gate|down)")
"""The matrices of the products in the layers"""

SCORES = ("magnitude", "random", "taylor", "fisher", "wanda", "sparsegpt", "movement")
FROM_DATA = ("taylor", "fisher", "wanda", "sparsegpt")
"""scores that, at once, look at calibration rows"""
LAYERWISE = ("wanda", "sparsegpt")
"""scores that look at what enters a layer whose predecessors are pruned already"""


def cubic(step: Any, begin: int, end: int, final: float, initial: float = 0.0) -> Array:
    """s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 from t_0 = `begin` to t_0 + n dt = `end`, level before and after (Zhu & Gupta 2017, eq. 1).

    >>> cubic(jnp.array([0, 10, 15, 20, 30]), 10, 20, 0.8).tolist()
    [0.0, 0.0, 0.699999988079071, 0.800000011920929, 0.800000011920929]
    """
    passed = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0, 1)
    return final + (initial - final) * (1 - passed) ** 3


def prune(
    sparsity: float = 0.5,
    *,
    score: str = "magnitude",
    scope: str = "layer",
    pattern: str = "unstructured",
    targets: Sequence[str] = TARGETS,
    schedule: tuple[int, int, int] | None = None,
    initial: float = 0.0,
    straight_through: bool = False,
    batches: int = 8,
    sequential: bool = True,
) -> Transform:
    """The weights that are worth least become zero and stay zero: round(sparsity * size) of each group (`select`), of equal ones the first.

    Without a schedule they go at the start, and whatever is zero in the targets then is kept zero by the update, exactly; in a chain of several
    what an earlier one removed counts. It must be the last of a chain that changes weights. Zeros are kept in params, not in a mask,
    but for `straight_through`.

    Args:
        sparsity: share of zeros in the targets; with N:M it is 1 - N/M.
        score: magnitude, random, taylor, fisher, wanda, sparsegpt (which also changes what is left) or movement; the formulas stand in
            `scores.py`. On a schedule fisher reads the second moments that the optimizer keeps (Adam, RMSProp), of all losses of the run.
        scope: layer (each layer's matrix loses the share; within each output with wanda) or global (all are compared).
        pattern: unstructured; N:M, N of every M along the inputs of a product stay; or block:RxC, R inputs by C outputs go together.
        targets: regexes of the weights, all of them matrices of products in the layers.
        schedule: (begin, end, every): after each `every` updates from `begin` to `end` the share that `cubic` tells goes, by the weights of
            that time; the sparsity is reached with update `end`. Updates that were skipped do not count.
        initial: with a schedule: the share that it begins with, as of a model that is pruned so far already.
        straight_through: with a schedule: what is removed goes on being trained, by the gradient at zero, and may come back until `end`
            (straight-through estimator; Bengio et al. 2013). The weights that are trained and a mask are kept until the run ends, and the model
            is applied, evaluated and saved with zeros. Movement pruning is meant to be used so.
        batches: calibration rows that taylor, fisher, wanda and sparsegpt look at, in batches of the run; none on a schedule. Where the run
            accumulates gradients fisher squares those of slices.
        sequential: wanda and sparsegpt look at each layer after those below it are pruned, as published: all the rows pass through the
            layers together, twice; else at all layers of the dense model, batch by batch.

    Raises:
        ConfigError: a value that is not allowed, or arguments that do not go together; at the start of a run an optimizer that does not.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    rule = Rule(sparsity, score, scope, parse_pattern(pattern), targets)
    _check(rule, pattern, schedule, straight_through, batches)
    if not 0 <= initial <= sparsity or (initial and not schedule):
        raise ConfigError(f"prune: initial is {initial}: it goes with a schedule, and must lie in [0, sparsity]")
    if not sparsity:
        return IDENTITY
    told: dict[str, Any] = dict(score=score, scope=scope, pattern=pattern, targets=rule.targets, schedule=schedule)
    told |= dict(initial=initial, straight_through=straight_through, batches=batches, sequential=sequential)
    default = prune.__kwdefaults__ or {}
    label = ", ".join([f"{sparsity}", *(f"{k}={v!r}" for k, v in told.items() if v != default[k])])

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        chosen = _chosen(rule, params)
        if schedule:
            return params
        if score in FROM_DATA and not isinstance(aux, Calibration):
            raise ConfigError(f"prune: score {score!r} looks at rows of data: it needs aux=Calibration(batches, loss)")
        if score in LAYERWISE:
            return _layerwise(rule, config, params, aux, chosen, sequential)
        weights = {name: matrix(name, x) for name, x in _named(params).items() if name in chosen}
        if score in ("taylor", "fisher"):
            worthy, power = (scores.taylor, 1) if score == "taylor" else (scores.fisher, 2)
            mask = tree.map_with_name(lambda name, _: name in chosen, params)
            found = _named(scores.gradients(aux.loss(config), params, aux.batches, mask, power))
            worth = {name: worthy(w, matrix(name, found[name])) for name, w in weights.items()}
        elif score == "random":
            keys = jax.random.split(key, len(weights))
            worth = {name: scores.random(w, k) for (name, w), k in zip(weights.items(), keys)}
        else:
            worth = {name: scores.magnitude(w) for name, w in weights.items()}
        kept = select(rule, worth, weights)
        return tree.map_with_name(
            lambda name, x: jnp.where(kept[name].reshape(x.shape), x, 0) if name in kept else x, params
        )

    return Transform(
        params=kept_moments(params) if schedule else params,
        update=_gradual(rule, schedule, initial, straight_through) if schedule else _hold(rule.targets),
        label=f"prune({label})",
        calibration=batches if score in FROM_DATA and not schedule else 0,
        steps=schedule[1] if schedule else 0,
        card=lambda params: pruned_card(params, rule.targets),
        masks=rule.targets,
    )


def _check(rule: Rule, pattern: str, schedule: Any, straight_through: bool, batches: int) -> None:
    """Raise where the arguments of `prune` are no values or do not go together."""
    choose("score", rule.score, SCORES)
    choose("scope", rule.scope, ("layer", "global"))
    grouped, blocked = rule.pattern.of, rule.pattern.rows * rule.pattern.columns > 1
    if not 0 <= rule.sparsity < 1:
        raise ConfigError(f"prune: sparsity is {rule.sparsity}: it must lie in [0, 1)")
    if grouped and rule.sparsity and abs(rule.sparsity - (1 - rule.pattern.keep / grouped)) > 1e-6:
        share = 1 - rule.pattern.keep / grouped
        raise ConfigError(f"prune: pattern {pattern!r} has sparsity {share:g}, not {rule.sparsity:g}")
    if rule.scope == "global" and (grouped or rule.score in LAYERWISE):
        what = f"pattern {pattern!r}" if grouped else f"score {rule.score!r}"
        raise ConfigError(f"prune: {what} compares within a layer: scope must be 'layer'")
    if blocked and rule.score in LAYERWISE:
        raise ConfigError(f"prune: score {rule.score!r} compares within each output, not blocks: {pattern!r}")
    if batches < 1:
        raise ConfigError(f"prune: batches is {batches}: it must be at least 1")
    if schedule is None:
        if rule.score == "movement" or straight_through:
            what = "score 'movement'" if rule.score == "movement" else "straight_through"
            raise ConfigError(f"prune: {what} needs a schedule=(begin, end, every)")
        return
    begin, end, every = schedule if isinstance(schedule, Sequence) and len(schedule) == 3 else (0, 0, 0)
    if not 0 <= begin < end or every < 1 or (end - begin) % every:
        raise ConfigError(
            f"prune: schedule is {schedule}: (begin, end, every) must have 0 <= begin < end, and `every` must divide end - begin"
        )
    if rule.score not in scores.GRADUAL:
        raise ConfigError(f"prune: score {rule.score!r} does not go with a schedule: take {', '.join(scores.GRADUAL)}")


def _named(params: Any) -> dict[str, Array]:
    """The weights by their paths."""
    return dict(zip(tree.names(params), jax.tree.leaves(params)))


def _matches(name: str, regexes: Sequence[str]) -> bool:
    return any(re.fullmatch(regex, name) for regex in regexes)


def _chosen(rule: Rule, params: Params) -> list[str]:
    """The paths of the targets. Raises ConfigError where one is no matrix of a product, or is not made of whole groups or blocks."""
    mask = _named(tree.mask(params, rule.targets, "prune: target"))
    chosen = [name for name, chosen in mask.items() if chosen]
    pattern, weights = rule.pattern, _named(params)
    if rule.scope == "global" and (count := sum(weights[name].size for name in chosen)) >= 2**32:
        raise ConfigError(
            f"prune: scope 'global' compares fewer than 2^32 weights, and the targets have {count}: take scope='layer'"
        )
    for name in chosen:
        if not _matches(name, TARGETS):
            raise ConfigError(f"prune: {name} is not the matrix of a product in the layers")
        _, inputs, outputs = jax.eval_shape(functools.partial(matrix, name), weights[name]).shape
        if inputs % (pattern.of or pattern.rows) or outputs % pattern.columns:
            raise ConfigError(
                f"prune: {name} has {inputs} inputs and {outputs} outputs, which do not divide into "
                + (f"groups of {pattern.of} inputs" if pattern.of else f"blocks of {pattern.rows}x{pattern.columns}")
            )
    return chosen


def _layerwise(
    rule: Rule, config: ModelConfig, params: Params, aux: Calibration, chosen: list[str], sequential: bool
) -> Params:
    """Each stack pruned by what its products are multiplied with: a layer at a time, those below it pruned already, or all at once."""
    groups = (rule.pattern.keep, rule.pattern.of) if rule.pattern.of else None
    diagonal = rule.score == "wanda"

    def pruned(name: str, x: Array, moments: Array) -> Array:
        w = matrix(name, x)
        if diagonal:
            kept = select(rule, {"": scores.wanda(w, moments)}, {"": w})[""]
            return jnp.where(kept, w, 0).reshape(x.shape).astype(x.dtype)
        one = functools.partial(scores.sparsegpt, sparsity=rule.sparsity, groups=groups)
        return jax.lax.map(lambda each: one(*each), (w, moments)).reshape(x.shape).astype(x.dtype)

    def in_turn(side: str, own: list[str], params: Params) -> Params:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux.batches)

        def visit(weights: Params, read: Params) -> Params:
            found = _named(read)

            def one(path: str, x: Array) -> Array:
                name = f"{side}/layers/{path}"
                if name not in own:
                    return x
                moments = scores.moments(config, rows, name, found[path][None], diagonal)
                return pruned(name, x[None], moments)[0]

            return tree.map_with_name(one, weights)

        return transformer.revise(config, params, rows, side, visit)

    def together(own: list[str], params: Params) -> Params:
        moments = scores.second_moments(config, params, aux.batches, own, diagonal)
        return tree.map_with_name(lambda name, x: pruned(name, x, moments[name]) if name in own else x, params)

    for side in ("encoder", "decoder"):
        if own := [name for name in chosen if name.startswith(f"{side}/")]:
            params = in_turn(side, own, params) if sequential else together(own, params)
    return params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PruneState(Guarded):
    """The inner optimizer's state, and what pruning on a schedule keeps beside it; trees like the trained params, None where nothing is pruned."""

    inner: Any
    step: Array
    """updates made"""
    mask: WeightMask | None = None
    """straight through: what is removed of the weights that are trained"""
    sums: Any = None
    """what movement sums up of the gradients"""


def _kept(params: Any, targets: Sequence[str]) -> Any:
    """False where a target's weight is removed, None at other weights: the zeros are the mask."""
    return tree.map_with_name(lambda name, p: ~removed(p) if _matches(name, targets) else None, params)


def _at(function: Callable[..., Any], kept: Any, x: Any, *more: Any) -> Any:
    """function(kept, x, ...) where all are there, else x: `kept` is None where nothing is pruned, others where params are frozen."""

    def one(*leaves: Any) -> Any:
        return leaves[1] if any(leaf is None for leaf in leaves) else function(*leaves)

    return jax.tree.map(one, kept, x, *more, is_leaf=lambda leaf: leaf is None)


def _still(u: Any) -> Any:
    """The update by which a weight that does not move stays -0 where it was."""
    return u if isinstance(u, Placed) else jnp.where(u == 0, -0.0, u)


def _settled(kept: Array, u: Any, p: Array) -> Any:
    """The update after which a weight that is not kept is 0."""
    return Placed(jnp.where(kept, u.value, 0)) if isinstance(u, Placed) else jnp.where(kept, _still(u), -p)


def _hold(targets: Sequence[str]) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """An update that leaves the targets' weights that are removed at zero: theirs is -p, whatever the rule says, and that of others what it says.

    Gradient and moments of what is removed are left as they are: to mask them, wherever it is done, costs reading the weights in each pass
    over the gradient, 4% of a step of MiniLM.
    """

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        rule = optax.with_extra_args_support(inner)

        def step(updates, state, params=None, **extra):
            updates, state = rule.update(updates, state, params, **extra)
            return _at(_settled, _kept(params, targets), updates, params), state

        return optax.GradientTransformationExtraArgs(rule.init, step)

    return update


def _squares(state: Any) -> dict[str, Array]:
    """E[g^2] by the paths of the params, as optax keeps it (`nu`), in parts where the optimizer treats params differently."""
    return {k: x for _, nu in optax.tree_utils.tree_get_all_with_path(state, "nu") for k, x in _named(nu).items()}


def _gradual(
    rule: Rule, schedule: tuple[int, int, int], initial: float, straight_through: bool
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """An update that removes weights on the schedule, by the weights and moments after it. What goes is chosen when it is due alone, and goes in
    place (`Placed`): any other update writes what a plain one does, and the sums where they are kept. Straight through the params are all the
    weights that are trained, and the state keeps a mask of those that are removed (`WeightMask`).
    """
    (begin, end, every), score = schedule, scores.GRADUAL[rule.score]
    add = score.add

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        optimizer = optax.with_extra_args_support(inner)

        def init(params: Any) -> PruneState:
            below = optimizer.init(params)
            leaves = jax.tree.leaves(below, is_leaf=lambda x: isinstance(x, optax.contrib.ScheduleFreeState))
            if any(isinstance(x, optax.contrib.ScheduleFreeState) for x in leaves):
                raise ConfigError(
                    "prune: a schedule does not go with a schedule-free optimizer, which keeps its own copy"
                )
            targets = tree.map_with_name(lambda name, x: x if _matches(name, rule.targets) else None, params)
            known = _squares(below) if score.squares else _named(targets)
            if any(name not in known or known[name].shape != x.shape for name, x in _named(targets).items()):
                raise ConfigError(
                    f"prune: on a schedule score {rule.score!r} reads second moments, which this optimizer does not keep: take adam or adamw"
                )

            mask = WeightMask(_kept(params, rule.targets)) if straight_through else None
            sums = jax.tree.map(jnp.zeros_like, targets) if score.add else None
            return PruneState(below, jnp.zeros((), jnp.int32), mask, sums)

        def step(updates, state, params=None, *, finite=True, **extra):
            kept, now = state.mask.kept if straight_through else _kept(params, rule.targets), state.step + 1

            def live(new: Any, old: Any) -> Any:
                return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

            sums = _at(lambda _, *read: add(*read), kept, state.sums, params, updates) if add else None
            updates, below = optimizer.update(updates, state.inner, params, finite=finite, **extra)
            inner, sums = live(below, state.inner), live(sums, state.sums)
            trained = _named(updates)
            masks = {name: x for name, x in _named(kept).items() if name in trained}

            def own(weights: Any) -> dict[str, Array]:
                return {name: x for name, x in _named(weights).items() if name in masks}

            def stays(weights: dict[str, Array], read: dict[str, Array]) -> dict[str, Array]:
                # what a mask inside of this update removed is gone already
                seen = own(effective_params(inner, tree.map_with_name(lambda name, _: weights.get(name), kept)))
                chosen = {name: matrix(name, x) for name, x in seen.items()}
                worth = {name: score.worth(x, matrix(name, read[name]) if read else x) for name, x in chosen.items()}
                found = select(rule, worth, chosen, cubic(now, begin, end, 1.0, initial / rule.sparsity))
                return {name: x.reshape(weights[name].shape) for name, x in found.items()}

            def zeroed(weights: dict[str, Array], masks: dict[str, Array]) -> dict[str, Array]:
                return {name: jnp.where(masks[name], x, 0) for name, x in weights.items()}

            due = finite & (now > begin) & (now <= end) & ((now - begin) % every == 0)
            placed = own(_at(lambda _, p, u: moved(p, _still(u), finite), kept, params, updates))
            read = own(_squares(inner) if score.squares else sums)
            if straight_through:
                masks = jax.lax.cond(due, lambda _, *by: stays(*by), lambda masks, *_: masks, masks, placed, read)
            else:
                placed = jax.lax.cond(
                    due, lambda x, read: zeroed(x, stays(x, read)), lambda x, _: x, zeroed(placed, masks), read
                )
            mask = WeightMask(tree.map_with_name(masks.get, kept)) if straight_through else None
            updates = tree.map_with_name(lambda name, u: Placed(placed[name]) if name in placed else u, updates)
            return updates, PruneState(inner, live(now, state.step), mask, sums)

        return optax.GradientTransformationExtraArgs(init, step)

    return update


def keep_zeros(names: Sequence[str]) -> Transform:
    """What is zero at the start of a run in the named weights (regexes) stays zero: for a run from a model whose card names them as pruned.

    Raises:
        ConfigError: a regex that matches no parameter.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        return IDENTITY

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        tree.mask(params, names, "keep_zeros")
        return params

    return Transform(
        params=kept_moments(params),
        update=_hold(names),
        label=f"keep_zeros({list(names)})",
        card=lambda params: pruned_card(params, names),
        masks=names,
    )


def densify() -> Transform:
    """A run from a pruned model that says so trains its zeros like other weights; a `prune` after it begins anew."""

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        return jax.tree.map(lambda x: marked(x, jnp.zeros((), bool)), params)

    return Transform(params=kept_moments(params), label="densify()", densify=True)


def sparsities(params: Params, names: Sequence[str]) -> dict[str, float]:
    """The share of zeros in each weight whose path a regex of `names` matches.

    >>> sparsities({"a": np.array([0.0, 1.0]), "b": np.zeros(3)}, ["a"])
    {'a': 0.5}
    """
    tree.match(params, names, "sparsities")
    chosen = {name: x for name, x in _named(params).items() if _matches(name, names)}
    zeros = _zeros(chosen)
    return {name: int(np.asarray(zeros[name], np.int64).sum()) / x.size for name, x in chosen.items()}


@jax.jit
def _zeros(params: Any) -> Any:
    """How many are removed of each weight, by its leading axis."""
    return jax.tree.map(lambda x: jnp.sum(removed(x), axis=tuple(range(1, x.ndim))), params)


def pruned_card(params: Params, targets: Sequence[str] = TARGETS) -> dict[str, dict[str, float]]:
    """What a card states of pruned weights: {"pruned": {path: share of zeros}}, those without a zero left out."""
    return {"pruned": {name: share for name, share in sparsities(params, targets).items() if share}}


def check_sparsity(params: Params, card: dict[str, Any]) -> None:
    """Raise unless the weights have the zeros that their card states.

    Raises:
        CheckpointError: naming the first weight that has fewer, or is missing.
    """
    stated = card.get("pruned") or {}
    known = _named(params)
    for name in stated:
        if name not in known:
            raise CheckpointError(f"the card states that {name} is pruned, and the model has no such weight")
    found = sparsities(params, [re.escape(name) for name in stated])
    for name, share in stated.items():
        if (share - found[name]) * known[name].size > 0.5:
            raise CheckpointError(f"the card states that {share:.4%} of {name} are zero; {found[name]:.4%} are")
