"""What becomes of an optimizer's state when the model under it grows: moments follow their weights, so that training goes on warm.

Each growth says in a `Growth` (`base.py`) how weights, gradients and squares of gradients map to those of the larger model; nothing here knows which
growth it is, and nothing is trained.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.platform import target
from llm_jax.transforms.base import IDENTITY, Growth, Transform, chain

KINDS = {
    "average": "weights",
    "params0": "weights",
    "mu": "gradients",
    "trace": "gradients",
    "exp_avg": "gradients",
    "grad_sum": "gradients",
    "nu": "squares",
    "nu_max": "squares",
    "exp_avg_sq": "squares",
    "sum_of_squares": "squares",
}
"""What a tree in an optimizer's state holds, by its name in optax; any other is reset"""

AROUND = "around/"
"""Before the names of what changes of the update keep for themselves, which no other run goes on from"""


def carry_moments() -> Transform:
    """The optimizer of a run goes on from its state in the run that its model comes from, grown as the model is: see `carry`.

    Without it a run begins with moments of zero. For a run that starts from another run's folder, with the same optimizer; of its other
    changes those that touch weights must be growths. The run tells, and its card keeps, what was kept and what starts afresh.
    """
    return Transform(label="carry_moments()", moments=True)


def carry(
    change: Transform | Sequence[Transform], config: ModelConfig, old_opt_state: Any, new_opt_state: Any, key: Array
) -> tuple[Any, str]:
    """The optimizer's state for the model after a growth, and a report of what was kept and what starts afresh.

    Each tree like the params, found by the paths of its leaves and known by its name (`KINDS`), grows as `Growth` says; counters beside such
    trees stay as they are, but start again beside one that had to be reset, since they correct its bias. A counter that stands alone is that
    of a schedule, which begins anew. Factored moments (adafactor) and what has
    a meaning unknown here are reset, unless their parameter keeps its shape. adamax calls `nu` a maximum of magnitudes, not of squares,
    so that it grows too small here.

    Args:
        change: a growth, or several that were applied one after the other.
        config: of the model before.
        old_opt_state: of the params before the change.
        new_opt_state: `optimizer.init` of the params after it, with the same optimizer.
        key: the one that the change of the params had: where neurons are copied at random, it says which.

    Raises:
        ConfigError: a change of the weights that is not a growth.
    """
    changes = (change,) if isinstance(change, Transform) else tuple(change)
    for each in changes:
        if not isinstance(each.params, Growth) and each.params is not IDENTITY.params:
            raise ConfigError(f"{each.label} does not say what becomes of an optimizer's moments, as growths do")
    whole = chain(*changes)
    shapes, after = transformer.shapes(config), transformer.shapes(whole.config(config))
    before, now = _by_name(shapes), _by_name(after)
    held = _plain(old_opt_state)
    for name, kept in held.items():
        average = re.sub(f"^({AROUND})+mask/kept/", "average/", name)  # of weights that the model was applied without
        if average != name and average in held:
            held[average] = jnp.where(kept, held[average], 0)
    held = {name: x for name, x in held.items() if not name.startswith(AROUND)}

    def place(name: str) -> tuple[str, str]:
        """The path of the tree that a leaf is in, and the parameter it belongs to; of a counter its state and nothing."""
        parts = name.split("/")
        found = next((i for i in range(len(parts)) if "/".join(parts[i:]) in before), None)
        return ("/".join(parts[:-1]), "") if found is None else ("/".join(parts[:found]), "/".join(parts[found:]))

    trees: dict[str, dict[str, Any]] = {}
    for name, x in held.items():
        root, param = place(name)
        if param and jnp.shape(x) == before[param].shape and root.split("/")[-1] in KINDS:
            trees.setdefault(root, {})[param] = x
    grown = _grow(whole.params, config, shapes, trees, key)

    fresh = _plain(new_opt_state)
    made: dict[str, Any] = {}
    for name, new in fresh.items():
        root, param = place(name)
        if param in grown.get(root, {}):
            made[name] = grown[root][param]
        elif param and name in held and before[param].shape == now[param].shape and _same(held[name], new):
            made[name] = held[name]
    every = {place(name)[0] for name in fresh if place(name)[1]}
    reset = {place(name)[0] for name in fresh if place(name)[1] and name not in made}

    def beside(root: str, trees: set[str]) -> bool:
        return any(other.rpartition("/")[0] == root for other in trees)

    for name, new in fresh.items():
        root, param = place(name)
        if param or not beside(root, every) or beside(root, reset):
            continue
        if name in held and _same(held[name], new):
            made[name] = held[name]
    leaves = [_put(made[name], new) if name in made else new for name, new in fresh.items()]
    state = jax.tree.unflatten(jax.tree.structure(new_opt_state), leaves)
    return state, _report(fresh, made, place)


def _grow(
    growth: Any, config: ModelConfig, shapes: Params, trees: dict[str, dict[str, Any]], key: Array
) -> dict[str, dict[str, Array]]:
    """Trees like the params, or parts of them, grown by path; the part that is missing is taken to be zero and left out again."""

    def one(root: str, own: dict[str, Any], key: Array) -> dict[str, Array]:
        whole = tree.map_with_name(lambda name, x: own.get(name, jnp.zeros(x.shape, x.dtype)), shapes)
        if isinstance(growth, Growth):
            whole = getattr(growth, KINDS[root.split("/")[-1]])(config, whole, key)
        return {name: x for name, x in _by_name(whole).items() if name in own}

    # What runs once need not be fast; the values are the same.
    quick = {"xla_backend_optimization_level": 0} if target() == "cpu" else None
    every = jax.jit(
        lambda trees, key: {root: one(root, own, key) for root, own in trees.items()}, compiler_options=quick
    )
    return every(trees, key)


def _plain(state: Any) -> dict[str, Any]:
    """The leaves of an optimizer's state by their paths without the states around it that changes of the update keep (`inner`), so that one with such
    a change is found in one without; what those keep themselves bears a name that begins with `AROUND`, but for the average of the weights."""
    found = tree.names(state)
    while any(name.startswith("inner/") for name in found):
        averages = {name for name in found if name.startswith("average/")}
        inside = [name.removeprefix("inner/") if name.startswith("inner/") else None for name in found]
        found = [
            AROUND + full if name in averages or (name is None and full not in averages) else name or full
            for name, full in zip(inside, found)
        ]
    return dict(zip(found, jax.tree.leaves(state), strict=True))


def _by_name(leaves: Any) -> dict[str, Any]:
    return dict(zip(tree.names(leaves), jax.tree.leaves(leaves), strict=True))


def _same(old: Any, new: Any) -> bool:
    return jnp.shape(old) == jnp.shape(new)


def _put(x: Any, like: Any) -> Any:
    """x in the dtype of `like`, and where that lies."""
    x = x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x, like.dtype)
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) and not _traced(x, like) else x


def _traced(*arrays: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)


def _report(fresh: dict[str, Any], made: dict[str, Any], place: Callable[[str], tuple[str, str]]) -> str:
    """A line of what was kept and one of what was reset: trees with the number of their arrays, and counters."""
    lines = []
    for verb, chosen in (("kept", True), ("reset", False)):
        counts: dict[str, int] = {}
        for name in fresh:
            if (name in made) == chosen:
                root, param = place(name)
                told = root if param else name
                counts[told] = counts.get(told, 0) + 1
        told = ", ".join(f"{name} ({n} array{'s' * (n > 1)})" for name, n in counts.items())
        lines.append(f"{verb}: {told or 'nothing'}")
    return "\n".join(lines)
