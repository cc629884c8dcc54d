"""The one kind of change: a record of five pure functions, each the identity unless given, with what it asks of a run; and their composition."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from llm_jax import tree
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError
from llm_jax.losses import GradFn, LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.platform import on_device


class _ConfigChange(Protocol):
    def __call__(self, config: ModelConfig, /) -> ModelConfig: ...


class _ParamsChange(Protocol):
    def __call__(self, config: ModelConfig, params: Params, key: Array, aux: Any, /) -> Params: ...


class _Extra(Protocol):
    def __call__(self, config: ModelConfig, key: Array, /) -> Params: ...


class _Rows(Protocol):
    def __call__(self, batch: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> dict[str, Any]: ...


class _LossChange(Protocol):
    def __call__(self, loss: LossFn, /) -> LossFn: ...


class _GradChange(Protocol):
    def __call__(self, grad: GradFn, /) -> GradFn: ...


class _UpdateChange(Protocol):
    def __call__(self, update: optax.GradientTransformation, /) -> optax.GradientTransformation: ...


class Guarded:
    """A state of an update, or a part of it, that the update leaves as it is, bit for bit, where its extra argument `finite` is false.

    The step leaves any other state as it is itself. For an update that reads again what it wrote: the step's own choice between new and old would
    be one more pass over it. Such a state is a dataclass that derives from this and that jax knows as a tree.
    """


@dataclasses.dataclass(frozen=True)
class Placed:
    """A weight as it is after an update, in place of the difference; where `finite` is false it is the weight of before.

    For an update that looks again at what it moved: a difference to the weights of before would be one more pass over both. jax knows it not as a
    tree, so that what calculates with updates fails on it: no other update may come after one that gives this.
    """

    value: Array


def moved(p: Array, u: Array | Placed | None, finite: Any = True) -> Array:
    """The weight after an update: p + u, or where the update placed it; p where it is frozen (None), and where the update is skipped.

    >>> moved(jnp.array([1.0]), jnp.array([2.0])), moved(jnp.array([1.0]), Placed(jnp.array([2.0]))), moved(jnp.array([1.0]), None)
    (Array([3.], dtype=float32), Array([2.], dtype=float32), Array([1.], dtype=float32))
    """
    if u is None:
        return p
    return u.value if isinstance(u, Placed) else jnp.where(finite, p + u, p).astype(p.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightMask:
    """In the state of an update: which of the weights that are trained the model is applied, evaluated and saved without (`effective_params`)."""

    kept: Any
    """a tree like the trained params: False where a weight is removed, None where none is"""


def effective_params(opt_state: Any, params: Any) -> Any:
    """The weights that the model is applied with: those that are trained, with zeros where the update's state has a `WeightMask`.

    They are differentiated straight through: the gradient at a zero is that of the weight behind it.
    """
    for mask in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, WeightMask)):
        if isinstance(mask, WeightMask):
            kept = on_device(mask.kept)
            params = jax.tree.map(
                lambda kept, x: x if kept is None or x is None else _masked_straight_through(kept, x),
                kept,
                params,
                is_leaf=lambda x: x is None,
            )
    return params


@jax.custom_jvp
def _masked_straight_through(kept: Bool[Array, "..."], x: Array) -> Array:
    return jnp.where(kept, x, 0)


_masked_straight_through.defjvps(None, lambda tangent, *_: tangent)


Change = Callable[[ModelConfig, Params, Array], Params]
"""A tree like the params of the larger model from one like those of the smaller, by the key of the change"""


@dataclasses.dataclass(frozen=True)
class Growth:
    """The `params` of a growth, and what it makes of trees like the params that an optimizer keeps.

    Growth is linear: the new weights are w' = T w, so by the chain rule the gradients obey T^T g' = g. Where a weight has n copies, each c
    times the old one, they are equal by symmetry: g' = g / (n c). So what divides a weight leaves its gradient alone, and what merely
    copies it divides its gradient; squares of gradients go by (n c)^2. Growing the optimizer's state so that it is the one a larger
    model would have follows Shen et al. 2022 (Staged training for transformer language models, section 3.1).
    """

    weights: Change
    """also of averages of weights"""
    gradients: Change
    """first moments and sums of gradients"""
    squares: Change
    """second moments"""

    def __call__(self, config: ModelConfig, params: Params, key: Array, aux: Any, /) -> Params:
        return self.weights(config, params, key)


def kept_moments(check: _ParamsChange) -> Growth:
    """The growth of a change that looks at the weights and leaves them, and so the moments, as they are."""
    return Growth(
        lambda config, params, key: check(config, params, key, None),
        lambda _, tree, key: tree,
        lambda _, tree, key: tree,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """Some rows that a change of the weights may look at: which of them matter is read off what the model does with these."""

    batches: dict[str, Array]
    """N batches, or slices of them, as the task makes them: leaves (N, B, ...)"""
    loss: Callable[[ModelConfig], LossFn] = dataclasses.field(metadata={"static": True})
    """the task's objective for a model of these sizes"""


class Transform(NamedTuple):
    """What a change does to the sizes, the weights, the objective, what is differentiated, and the update.

    `params` is jitted with the config (the one before the change) as a static argument; `aux` is what it may need beside the model:
    a `Calibration`, or the weights of other models. `label` is what config and card call the change: its name with its arguments.
    """

    config: _ConfigChange = lambda config: config
    params: _ParamsChange = lambda config, params, key, aux: params
    loss: _LossChange = lambda loss: loss
    grad: _GradChange = lambda grad: grad
    update: _UpdateChange = lambda update: update
    label: str = "transform"
    reference: Mapping[str, Any] = {}
    """models whose weights the loss finds in its `reference`, by name: where to load each from, or a `Model`"""
    calibration: int = 0
    """batches of training rows that `params` wants in a `Calibration` as its aux, cut as the run accumulates gradients"""
    steps: int = 0
    """updates that it needs to come to its end; a shorter run is refused"""
    card: Callable[[Params], dict[str, Any]] = lambda params: {}
    """what the card of the model states of its weights, such as which are pruned"""
    extra: _Extra = lambda config, key: {}
    """weights, by a name of their own at the top of the tree, that the loss reads and that are trained with the model's, of the sizes after
    all changes; they are whole on every device, are kept where a stopped run goes on, and are no part of the model that a run leaves"""
    rows: _Rows = lambda batch, fingerprint: dict(batch)
    """what it adds, on the host, to the rows of a training batch of one process, given what their stream depends on (`Loader.fingerprint`)"""
    masks: tuple[str, ...] = ()
    """regexes of weights whose zeros its update keeps: they are a mask, and no other update may come after it"""
    trained: Callable[[Params], Any] | None = None
    """True at each weight that is trained, of those that are there; None where it hides none"""
    densify: bool = False
    """whether the zeros that the card of the start names as pruned are weights like any other"""
    offload: bool = False
    """whether the optimizer's state lies in the host's memory between updates"""
    moments: bool = False
    """whether the optimizer goes on from its state in the run that the model comes from, grown with the model (`moments.carry`)"""
    spelled: "Callable[[Tokenizer], Transform] | None" = None
    """the same change for a tokenizer, where it names pieces of text; until then its `params` give weights of the right shapes alone"""
    pruned: "Callable[[tuple[str, ...]], Transform] | None" = None
    """the same change of a model whose zeros are masks in the weights that these regexes name, where that makes a difference; `chain` tells it
    the masks of those before it"""


IDENTITY = Transform(label="identity")


def chain(*transforms: Transform) -> Transform:
    """The transform that applies each in turn; of loss, grad and update the last is outermost. Associative, with `IDENTITY` neutral.

    Each member sees the config that those before it made, and the same key and aux.
    """
    if any(transform.pruned for transform in transforms):
        return _masked(transforms, ())
    return _composed(transforms)


def _masked(transforms: tuple[Transform, ...], known: tuple[str, ...]) -> Transform:
    """The chain of changes of a model whose zeros are masks in `known`, each told of these and of what those before it prune."""
    told, regexes = [], known
    for transform in transforms:
        told.append(mask(transform, regexes))
        regexes += transform.masks
    made = _composed(tuple(told))

    def spelled(tokenizer: Tokenizer) -> Transform:
        return _masked(tuple(spell(transform, tokenizer) for transform in transforms), known)

    return made._replace(spelled=spelled if made.spelled else None, pruned=lambda known: _masked(transforms, known))


def mask(transform: Transform, known: tuple[str, ...]) -> Transform:
    """The transform of a model whose zeros are masks in the weights that the regexes name; most do not ask."""
    return transform if transform.pruned is None else transform.pruned(known)


def _composed(transforms: tuple[Transform, ...]) -> Transform:
    """`chain` of transforms that know all that they ask for."""
    for i, transform in enumerate(transforms):
        pruning = next((other for other in transforms[:i] if other.masks), None)
        if transform.densify and pruning is not None:
            raise ConfigError(f"{transform.label} comes after {pruning.label}, whose zeros it would take for weights")

    def config(sizes: ModelConfig) -> ModelConfig:
        for transform in transforms:
            sizes = transform.config(sizes)
        return sizes

    def wrap(name: str):
        def wrapped(function: Any) -> Any:
            for transform in transforms:
                function = getattr(transform, name)(function)
            return function

        identity = getattr(IDENTITY, name)
        return identity if all(getattr(transform, name) is identity for transform in transforms) else wrapped

    label = (
        ", ".join(transform.label for transform in transforms if transform.label != IDENTITY.label) or IDENTITY.label
    )
    reference: dict[str, Any] = {}
    for transform in transforms:
        for name, model in transform.reference.items():
            known = reference.get(name, model)
            if known is not model and not (isinstance(known, str) and known == model):
                raise ConfigError(f"two transforms read a model called {name!r}: {_named(known)} and {_named(model)}")
            reference[name] = model
    calibration = max((transform.calibration for transform in transforms), default=0)
    steps = max((transform.steps for transform in transforms), default=0)

    def card(weights: Params) -> dict[str, Any]:
        stated: dict[str, Any] = {}
        for transform in transforms:
            for name, entry in transform.card(weights).items():
                stated[name] = {**stated.get(name, {}), **entry} if isinstance(entry, dict) else entry
        return stated

    def extra(sizes: ModelConfig, key: Array) -> Params:
        """The last argument is the config after the whole chain."""
        found: Params = {}
        for transform in transforms:
            made = transform.extra(sizes, key)
            if both := sorted(found.keys() & made.keys()):
                raise ConfigError(f"two transforms train weights called {both[0]!r} beside the model's")
            found |= made
        return found

    def trained(weights: Params) -> Any:
        live = weights
        for transform in reversed(transforms):
            if transform.trained is not None:
                live = tree.split(live, transform.trained(live))[0]
        names = set(tree.names(live))
        return tree.map_with_name(lambda name, _: name in names, weights)

    def rows(batch: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        for transform in transforms:
            batch = transform.rows(batch, fingerprint)
        return dict(batch)

    functions = (config, _in_turn(transforms), wrap("loss"), wrap("grad"), wrap("update"))
    masks = tuple(regex for transform in transforms for regex in transform.masks)

    def spelled(tokenizer: Tokenizer) -> Transform:
        return chain(*(spell(transform, tokenizer) for transform in transforms))

    if all(transform.rows is IDENTITY.rows for transform in transforms):
        rows = IDENTITY.rows
    return Transform(
        *functions,
        label,
        reference,
        calibration,
        steps,
        card,
        extra,
        rows,
        masks,
        trained=trained if any(transform.trained for transform in transforms) else None,
        densify=any(transform.densify for transform in transforms),
        offload=any(transform.offload for transform in transforms),
        moments=any(transform.moments for transform in transforms),
        spelled=spelled if any(transform.spelled for transform in transforms) else None,
    )


def _named(model: Any) -> str:
    """A model as messages name it."""
    return model if isinstance(model, str) else "one that is given as a value"


def spell(transform: Transform, tokenizer: Tokenizer) -> Transform:
    """The transform for this tokenizer; most do not ask for one."""
    return transform if transform.spelled is None else transform.spelled(tokenizer)


def _in_turn(transforms: tuple[Transform, ...]) -> _ParamsChange:
    """What `chain` makes of the weights; a `Growth` where each member that touches them is one."""

    def params(sizes: ModelConfig, weights: Params, key: Array, aux: Any) -> Params:
        for transform in transforms:
            weights = transform.params(sizes, weights, key, aux)
            sizes = transform.config(sizes)
        return weights

    def along(kind: str) -> Change:
        def change(sizes: ModelConfig, leaves: Params, key: Array) -> Params:
            for transform in transforms:
                if isinstance(transform.params, Growth):
                    leaves = getattr(transform.params, kind)(sizes, leaves, key)
                sizes = transform.config(sizes)
            return leaves

        return change

    touching = [transform.params for transform in transforms if transform.params is not IDENTITY.params]
    if not touching:
        return IDENTITY.params
    if all(isinstance(change, Growth) for change in touching):
        return Growth(along("weights"), along("gradients"), along("squares"))
    return params


def removed(x: Array) -> Bool[Array, "..."]:
    """Where a weight is 0 and not -0: a growth gives new weights that begin at zero the negative one, so that no zero of theirs is a mask.

    >>> removed(jnp.array([0.0, -0.0, 1.0])).tolist()
    [True, False, False]
    """
    return (x == 0) & ~jnp.signbit(x)


def take(x: Array, index: Any, axis: int) -> Array:
    """The entries at `index` along an axis, bit for bit: along one that is sharded XLA takes floats by a masked sum, in which -0 + 0 is 0.

    >>> take(jnp.array([0.0, -0.0, 1.0]), jnp.array([1, 2]), axis=0).tolist()
    [-0.0, 1.0]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jnp.take(bits, index, axis=axis, mode="clip"), x.dtype)


def marked(x: Array, gone: Bool[Array, "..."]) -> Array:
    """x whose zeros are masks where a weight is `gone`, and weights like any other, -0, where it is not.

    >>> marked(jnp.array([0.0, 0.0, 1.0]), jnp.array([True, False, True])).tolist()
    [0.0, -0.0, 1.0]
    """
    return jnp.where(x == 0, jnp.where(gone, 0.0, -0.0), x).astype(x.dtype)
