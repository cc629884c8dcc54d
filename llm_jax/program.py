"""The functions of a run, made of its config and a mesh alone: what `parts.py` carries out and what `plan.py` compiles ahead of time.

No data is opened here, no weights are read and no device is touched: what a model elsewhere is made of is read off its card.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import checkpoint, evaluate, optim, sharding, step, tree
from llm_jax import model as models
from llm_jax import transforms as tf
from llm_jax.config import Run
from llm_jax.data.packing import STREAMS
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.platform import compiler_options
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.moving_average import moving_average


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes, before anything is computed."""

    model: ModelConfig
    """the sizes after the transforms"""
    mesh: jax.sharding.Mesh
    change: tf.Transform
    schedule: Callable[[Any], Any]
    """step -> factor of the learning rate, jitted"""
    init: Callable[[Any, Any, Any], step.TrainState]
    """(key, weights to start from or None, aux of the transforms) -> the state before the first step, without references"""
    started: Any
    """shapes and places of the weights that the run starts from; None for fresh ones"""
    abstract: step.TrainState
    """shapes and dtypes of the state"""
    shardings: step.TrainState
    masks: tuple[str, ...]
    """the weights whose zeros the update keeps, those that it is to remove among them, by their paths"""
    trained: tuple[str, ...]
    """the weights that are not frozen, by their paths"""
    extra: tuple[str, ...]
    """names at the top of the params that are trained beside the model's and are no part of it"""
    step: Any
    """(state, batch) -> (state, metrics), jitted, so that it can be lowered; the state is donated"""
    eval_step: Callable[..., Any]
    """(params, batch, reference) -> sums and outcomes, jitted"""


def make(run: Run, mesh: jax.sharding.Mesh, aux: Any = None) -> Program:
    """The program of a run whose config is resolved (`resolve`).

    Args:
        aux: the `Calibration` that the transforms ask for, or its shapes.

    Raises:
        ConfigError: parts of the config that do not go together.
    """
    change, began = transform_of(run), run.model
    assert began is not None
    model = change.config(began)
    shapes, axes, beside = _weights(change, model)
    schedule = jax.jit(optim.make_schedule(run.schedule, run.steps))
    trained = _trained(run, change, shapes)
    optimizer = change.update(optim.make_optimizer(run.optimizer, schedule, shapes, axes))
    loss = change.loss(run.task.loss(model))
    judge = run.eval.task or run.task
    grad = change.grad(step.differentiate(loss))

    def init(key: Any, started: Any, aux: Any) -> step.TrainState:
        first, second, third = jax.random.split(key, 3)
        params = transformer.init(began, first) if started is None else started
        params = {**change.params(began, params, second, aux), **change.extra(model, jax.random.fold_in(second, 1))}
        return step.init_state(params, optimizer, third)

    started = None if run.start == "fresh" else models.abstract_params(began, mesh)
    abstract = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), started, aux)
    read = {name: models.abstract_params(config, mesh) for name, config in _read(change).items()}
    places = sharding.state_shardings(mesh, abstract, shapes, sharding.params_shardings(mesh, axes, shapes))
    if change.offload:
        places = places._replace(opt_state=sharding.on_host(places.opt_state, abstract.opt_state))
    shardings = places._replace(reference=jax.tree.map(lambda x: x.sharding, read))
    update = jax.jit(
        sharding.placed(mesh, step.make_step(loss, grad, optimizer)),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(mesh.size),
    )
    return Program(
        model,
        mesh,
        change,
        schedule,
        init,
        started,
        abstract._replace(reference=read),
        shardings,
        tuple(_matching(shapes, change.masks)),
        trained,
        tuple(beside),
        update,
        evaluate.make_eval_step(change.loss(judge.loss(model)), judge),
    )


def _matching(shapes: Any, regexes: Sequence[str]) -> list[str]:
    return [name for name in tree.names(shapes) if any(re.fullmatch(regex, name) for regex in regexes)]


def _trained(run: Run, change: tf.Transform, shapes: Any) -> tuple[str, ...]:
    """The weights that are not frozen.

    Raises:
        ConfigError: a transform is to remove frozen ones bit by bit, which no update reaches.
    """
    if change.trained is None:
        return tuple(tree.names(shapes))
    mask = change.trained(shapes)
    trained = tuple(name for name, live in zip(tree.names(shapes), jax.tree.leaves(mask)) if live)
    for each in run.transforms:
        for name in _matching(shapes, each.masks) if each.steps else ():
            if name not in trained:
                raise ConfigError(
                    f"run.transforms: {each.label} removes weights with the updates, and {name} is frozen: prune it at once, or leave it out of targets"
                )
    return trained


def _weights(change: tf.Transform, model: ModelConfig) -> tuple[Any, Any, Any]:
    """Shapes and axes of all that is trained, and the shapes of what is trained beside the model."""
    shapes, axes = transformer.shapes(model), transformer.axes(model)
    beside = jax.eval_shape(lambda key: change.extra(model, key), jax.random.key(0))
    if taken := sorted(shapes.keys() & beside.keys()):
        raise ConfigError(
            f"a transform trains weights called {taken[0]!r} beside the model's, which has some of that name"
        )
    return {**shapes, **beside}, {**axes, **jax.tree.map(lambda x: (None,) * x.ndim, beside)}, beside


def _read(change: tf.Transform) -> dict[str, ModelConfig]:
    """The sizes of the models that the loss reads beside its own."""
    return {
        name: models.sizes(source) if isinstance(source, str) else source.config
        for name, source in change.reference.items()
    }


def resolve(run: Run, mesh: jax.sharding.Mesh) -> Run:
    """The run with its sizes, which fit its rows and the mesh.

    Raises:
        ConfigError: rows that do not split over the mesh, or are longer than the model's table of positions.
    """
    sharding.check_batch(mesh, run.batch.size // run.batch.accumulate, run.batch.length)
    began = _sizes(run)
    sizes = transform_of(run).config(began)
    if run.batch.length > sizes.max_length and sizes.positions == "learned":
        raise ConfigError(
            f"batch.length {run.batch.length} is longer than the model's table of positions, model.max_length {sizes.max_length}"
        )
    return dataclasses.replace(run, model=began)


def transform_of(run: Run) -> tf.Transform:
    """The transforms of a config, those that its plain fields ask for among them; freezing is outermost, since it hides params.

    Raises:
        ConfigError: one that changes the update after one that keeps zeros.
    """
    for i, change in enumerate(run.transforms):
        for later in run.transforms[i + 1 :] if change.masks else ():
            if later.update is not tf.IDENTITY.update and not later.masks:
                raise ConfigError(
                    f"run.transforms: {later.label} changes the update after {change.label}, which would not keep its zeros: put it before"
                )
    kept, own = pruned(run), tf.chain(*run.transforms)
    return tf.chain(
        accumulate(run.batch.accumulate),
        tf.keep_zeros(kept),  # inside the run's own, which may remove more
        *run.transforms,
        moving_average(run.optimizer.moving_average, (*kept, *own.masks), own.trained),
        freeze(run.optimizer.freeze),
    )


def arguments(run: Run, mesh: Any) -> tuple[Program, Any, dict[str, Any]]:
    """The program of a resolved run, and the shapes and places of what its step is called with."""
    batch = abstract_batch(run, mesh)
    change = transform_of(run)
    aux = None
    if change.calibration:
        shape = calibration_shape(run, change.calibration)
        rows: dict[str, Any] = {n: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype) for n, x in batch.items()}
        aux = tf.Calibration(rows, run.task.loss)
    made = make(run, mesh, aux)
    return made, checkpoint.abstract_like(made.abstract, made.shardings), batch


def calibration_shape(run: Run, count: int) -> tuple[int, int]:
    """(batches, rows of each) of the rows in `count` batches of the run, cut as gradients are accumulated, so that a gradient needs no more memory."""
    return count * run.batch.accumulate, run.batch.size // run.batch.accumulate


def abstract_batch(run: Run, mesh: Any) -> dict[str, Any]:
    """The shapes and places of the arrays of a batch, of a row that the task makes of no text.

    Raises:
        ConfigError: a transform adds to the rows what only the data tells.
    """
    for change in run.transforms:
        if change.rows is not tf.IDENTITY.rows:
            raise ConfigError(f"{change.label} adds to the rows what only the data tells: plan the run without it")
    lengths = run.task.lengths(run.batch.length)
    row: dict[str, np.ndarray] = {}
    for stream in (s for s in STREAMS if s in lengths):
        prefix = stream.removesuffix("tokens")
        row |= {
            f"{prefix}{name}": np.zeros(lengths[stream], np.int32) for name in ("tokens", "segment_ids", "positions")
        }
    row |= {"targets": np.zeros(lengths["tokens"], np.int32), "weights": np.zeros(lengths["tokens"], np.float32)}
    row = run.task.row(row, _tokenizer(), np.random.default_rng(0))
    made = {name: ((run.batch.size, *x.shape), x.dtype) for name, x in row.items()}
    return {n: jax.ShapeDtypeStruct(s, d, sharding=sharding.batch_sharding(mesh, s)) for n, (s, d) in made.items()}


@functools.cache
def _tokenizer() -> Tokenizer:
    """One that has what a task may ask for; its vocabulary does not matter."""
    return load_tokenizer("wordpiece:64", ["a b c"])


def pruned(run: Run) -> tuple[str, ...]:
    """The weights whose zeros the run is to keep: those that the card of its start names, by its own checkpoints where it has begun."""
    if run.start == "fresh" or any(change.densify for change in run.transforms):
        return ()
    for at in reversed(checkpoint.steps(run.folder)):
        try:
            return tuple(checkpoint.read_card(run.folder / "checkpoints" / str(at))["kept"])
        except (CheckpointError, KeyError):  # damaged: told when the weights are restored
            continue
    try:
        return models.pruned(run.start)
    except CheckpointError:  # told when the model is loaded
        return ()


def _sizes(run: Run) -> ModelConfig:
    """The config's sizes, else those that the run's own checkpoints began with, else those of the model it starts from."""
    if run.model is not None:
        return run.model
    for at in reversed(checkpoint.steps(run.folder)):
        try:
            began = checkpoint.read_card(run.folder / "checkpoints" / str(at))["config"]["model"]
            return ModelConfig(**began)
        except (CheckpointError, KeyError, TypeError):  # damaged: told when the weights are restored
            continue
    return ModelConfig() if run.start == "fresh" else models.sizes(run.start)
