"""What a run works with, built from its config: data, mesh, initial state, step. Nothing is trained here; that is `loop.py`."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax import checkpoint, cost, evaluate, program, sharding, step, tree
from llm_jax import model as models
from llm_jax import transforms as tf
from llm_jax.card import ORIGINS, Card, content_hash
from llm_jax.config import Run
from llm_jax.data.documents import documents, open_sources
from llm_jax.data.pipeline import Loader, count_rows
from llm_jax.data.sources import field
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.vocabulary import TRAINERS
from llm_jax.errors import CheckpointError, ConfigError, DataError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.platform import on_device, target
from llm_jax.program import transform_of
from llm_jax.tasks.base import Templated
from llm_jax.transforms.lora import BESIDE, beside_factors

log = logging.getLogger(__name__)

INHERITED = ("parents", "kept", "references", "moments", BESIDE, *ORIGINS)
"""Entries of a card that a run's first step has, by `Parts.init`, and every later one keeps"""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run works with, built once from its config."""

    run: Run
    model: ModelConfig
    """the sizes after the transforms"""
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    train: Loader
    heldout: tuple[Loader, ...]
    """one for each source of which documents are held out"""
    schedule: Callable[[Any], Any]
    """step -> factor of the learning rate, jitted"""
    reference: Callable[[], tuple[dict[str, Any], dict[str, str]]]
    """() -> other weights that the loss reads, such as a teacher's, by name, and the hash of each; they are part of no checkpoint"""
    init: Callable[[], tuple[step.TrainState, Card]]
    """() -> the state before the first step, and what its card inherits: the hashes of the weights it starts from, their origin"""
    abstract: step.TrainState
    """shapes and dtypes of the state"""
    shardings: step.TrainState
    card: Callable[[Any], Card]
    """params -> what the card states of them"""
    rows: Callable[[dict[str, np.ndarray]], dict[str, Any]]
    """training rows -> the same with what the transforms add to them, on the host"""
    masks: tuple[str, ...]
    """the weights whose zeros the update keeps, those that it is to remove among them, by their paths"""
    extra: tuple[str, ...]
    """names at the top of the params that are trained beside the model's and are no part of it"""
    step: Callable[..., Any]
    """(state, batch) -> (state, metrics), jitted; the state is donated"""
    eval_step: Callable[..., Any]
    """(params, batch, reference) -> sums and outcomes, jitted"""

    def close(self) -> None:
        """Release the threads and processes that read."""
        for loader in (self.train, *self.heldout):
            loader.close()


def build(run: Run) -> Parts:
    """Open the data, make the mesh, and compile nothing yet.

    Raises:
        UserError: whatever in the config, the data or the machine does not fit together.
    """
    mesh = sharding.make_mesh(run.mesh)
    run = program.resolve(run, mesh)
    sources = open_sources(run.data, "train")
    tokenizer = _tokenizer(run, sources)
    run = dataclasses.replace(run, transforms=tuple(tf.spell(change, tokenizer) for change in run.transforms))
    assert run.model is not None
    model = transform_of(run).config(run.model)
    _check_references(run, tokenizer)
    run.task.loss(model)  # whether the task and the model go together is told before the data is read
    needed = tokenizer.vocab_size + run.task.extra_tokens(tokenizer)
    if needed > model.vocab_size:
        raise DataError(
            f"the tokenizer has {needed} entries, the model's vocabulary {model.vocab_size}: set model.vocab_size={needed} or more"
        )
    if run.epochs:
        rows = count_rows(sources, tokenizer, run.task, run.data, run.batch)
        run = dataclasses.replace(run, steps=math.ceil(run.epochs * rows / run.batch.size))
    for change in run.transforms:
        if change.steps > run.steps:
            raise ConfigError(
                f"{change.label} needs {change.steps} steps, and the run has {run.steps}: it would end half-way"
            )
    place: dict[str, Any] = dict(zip(("process_index", "process_count"), sharding.rows_here(mesh)))
    train = Loader(sources, tokenizer, run.task, run.data, run.batch, run.seed, "train", **place)
    judged: Any = run.eval.task or run.task
    heldout = evaluate.held_out_loaders(tokenizer, judged, run.data, run.batch, **place)
    wanted = transform_of(run).calibration
    aux = calibration(run, tokenizer, wanted) if wanted else None
    return assemble(run, mesh, tokenizer, train, heldout, aux)


def _check_references(run: Run, tokenizer: Tokenizer) -> None:
    """Raise where a model that the loss reads knows other ids than the run's rows hold."""
    for name, source in tf.chain(*run.transforms).reference.items():
        known = models.read_tokenizer(source) if isinstance(source, str) else source.tokenizer
        if known is not None and not known.same_tokens(tokenizer):
            raise DataError(
                f"the model {source} that the run reads as {name!r} has another tokenizer than the run: its tokens mean something else"
            )


def calibration(run: Run, tokenizer: Tokenizer, count: int) -> tf.Calibration:
    """The first `count` batches that one process alone would train on, in slices as gradients are accumulated, for a transform to look at; the same
    on every process."""
    sources, shape = open_sources(run.data, "train"), program.calibration_shape(run, count)
    with contextlib.closing(Loader(sources, tokenizer, run.task, run.data, run.batch, run.seed, "train")) as rows:
        batches = [next(rows).batch for _ in range(count)]
    if any(x.shape != batches[0][name].shape for batch in batches for name, x in batch.items()):
        raise ConfigError("the rows that a transform looks at must be of one length: leave data.buckets empty")
    stacked: dict[str, Any] = {
        name: np.stack([batch[name] for batch in batches]).reshape(*shape, *x.shape[1:])
        for name, x in batches[0].items()
    }
    return tf.Calibration(stacked, run.task.loss)


def _tokenizer(run: Run, sources: list[Any]) -> Tokenizer:
    """That of the run's checkpoints, else of the model it starts from where the config names none that exists, else the config's; with the task's
    template."""
    for at in reversed(checkpoint.steps(run.folder)):
        try:
            return Tokenizer.from_json(checkpoint.read_texts(run.folder / "checkpoints" / str(at))["tokenizer.json"])
        except (CheckpointError, KeyError):  # damaged: told when the weights are restored
            continue
    started = None if run.start == "fresh" else models.read_tokenizer(run.start)
    if started is not None and run.data.tokenizer.partition(":")[0] in TRAINERS:
        return _templated(run, started)
    tokenizer = load_tokenizer(run.data.tokenizer, lambda: _texts(run, sources))
    if started is not None and not tokenizer.continues_ids(started):
        log.warning(
            "data.tokenizer %s is not the tokenizer of %s, whose weights know other ids", run.data.tokenizer, run.start
        )
    return _templated(run, tokenizer)


def _templated(run: Run, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the template that the task states. Raises ConfigError where evaluations state another."""
    stated = run.task.template if isinstance(run.task, Templated) else ""
    judged = run.eval.task.template if isinstance(run.eval.task, Templated) else ""
    if judged and judged != stated:
        raise ConfigError(
            f"eval.task.template is {judged!r} and task.template {stated!r}: a model reads texts in one template"
        )
    return tokenizer.templated(stated) if stated else tokenizer


def _texts(run: Run, sources: list[Any]) -> Iterator[str]:
    """The texts of the documents that are not held out, for training a tokenizer."""
    for source, weight in zip(sources, run.data.weights or [1.0] * len(sources)):
        for index in documents(source, run.data, "train") if weight else ():
            record = source[int(index)]
            if not record.get("invalid"):
                texts = (field(record, run.data.text, "data.text"), record.get(run.data.target))
                yield from (text for text in texts if isinstance(text, str))


def assemble(
    run: Run,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    train: Loader,
    heldout: tuple[Loader, ...],
    aux: tf.Calibration | None,
) -> Parts:
    """The functions of a run, with what they read: data, weights to start from, other models."""
    made = program.make(run, mesh, aux)
    change = made.change
    placed = made.shardings._replace(reference={})

    # What runs once need not be fast: on CPU that cuts its compilation, as long as that of the step, to a quarter. The values are the same.
    quick = {"xla_backend_optimization_level": 1} if target() == "cpu" else None

    def start() -> tuple[step.TrainState, Card]:
        key, started, inherited = jax.random.key(run.seed), None, Card(parents=[])
        card = Card()
        if made.started is not None:
            loaded = models.load(run.start, mesh)
            different = checkpoint.difference(loaded.params, made.started)
            if different:
                raise CheckpointError(f"the model {run.start} is of another shape: {different}")
            started, card = loaded.params, loaded.card
            inherited["parents"] = [card.get("hashes", {}).get("params") or content_hash(started)]
            inherited |= {name: card[name] for name in ORIGINS if name in card}
        state = jax.jit(made.init, out_shardings=placed, compiler_options=quick)(key, started, aux)
        del started
        inherited["kept"] = list(program.pruned(run))
        if made.model.lora_rank:
            labels = [each.label for each in run.transforms]
            inherited[BESIDE] = beside_factors(card, labels, tree.names(made.abstract.params), made.trained)
        if change.moments:
            state, inherited["moments"] = _warm(run, mesh, state, placed, jax.random.split(key, 3)[1])
        others, hashes = reference()
        if hashes:
            inherited["references"] = hashes
        return state._replace(reference=others), inherited

    def reference() -> tuple[dict[str, Any], dict[str, str]]:
        others = _references(change, mesh, made.shardings.reference)
        return others, {name: content_hash(x) for name, x in others.items()}

    return Parts(
        run,
        made.model,
        mesh,
        tokenizer,
        train,
        heldout,
        made.schedule,
        reference,
        start,
        made.abstract,
        made.shardings,
        change.card,
        functools.partial(change.rows, fingerprint=train.fingerprint()),
        made.masks,
        made.extra,
        made.step,
        made.eval_step,
    )


def _references(change: tf.Transform, mesh: jax.sharding.Mesh, places: dict[str, Any]) -> dict[str, Any]:
    """The weights of the models that the loss reads beside its own."""
    return {
        name: models.load(source, mesh).params
        if isinstance(source, str)
        else jax.device_put(source.params, places[name])
        for name, source in change.reference.items()
    }


def _warm(
    run: Run, mesh: jax.sharding.Mesh, state: step.TrainState, placed: step.TrainState, key: Any
) -> tuple[step.TrainState, str]:
    """The state with the moments of the run that it starts from, grown by the run's transforms, and what was kept and what was not."""
    assert run.model is not None
    kind, path = models.locate(run.start) if run.start != "fresh" else ("fresh", None)
    if path is None or kind != "checkpoint":
        raise ConfigError(
            f"carry_moments: the run starts from {run.start}, which no optimizer made: name a run's folder"
        )
    began = models.abstract_params(run.model, mesh)
    where = jax.tree.map(lambda x: x.sharding, began)
    held = checkpoint.load_optimizer(path, lambda saved: sharding.state_shardings(mesh, saved, began, where))
    carried, told = tf.carry(run.transforms, run.model, held, on_device(state.opt_state), key)
    return state._replace(opt_state=jax.device_put(carried, placed.opt_state)), told


def cost_told(parts: Parts, params: Any) -> str:
    """What the run's transforms save or cost, by `cost.told`, timed on one device with the rows that it has of a step; empty where they change
    no sizes and prune nothing."""
    assert parts.run.model is not None
    shares = parts.run.batch.accumulate * parts.mesh.shape["data"] * parts.mesh.shape["fsdp"]
    batch_shape = (max(1, parts.run.batch.size // shares), parts.run.batch.length)
    pruned = parts.card(params).get("pruned", {}) or parts.masks
    with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices()[:1])):
        return cost.told(parts.run.model, parts.model, batch_shape, pruned)


def moments_told(parts: Parts, inherited: Card) -> str:
    """What of the optimizer's state a run keeps that grows the model that it starts from; empty where it grows none."""
    if carried := inherited.get("moments"):
        return f"moments {carried}"
    grows = isinstance(tf.chain(*parts.run.transforms).params, tf.Growth)
    if not grows or parts.run.start == "fresh" or parts.run.model is None:
        return ""
    if transformer.shapes(parts.run.model) == transformer.shapes(parts.model):
        return ""
    return "moments reset: all; with carry_moments() among the transforms those of the run that the model comes from are grown with it"


def describe(parts: Parts) -> str:
    """What is about to happen: parameters and mesh."""
    count = tree.size(transformer.shapes(parts.model))
    assert parts.run.model is not None
    before = tree.size(transformer.shapes(parts.run.model))
    was = f", {before / 1e6:.2f}M before the transforms," if count != before else ""
    mesh = ", ".join(f"{axis}={n}" for axis, n in parts.mesh.shape.items() if n > 1) or "one device"
    return f"{count / 1e6:.2f}M parameters{was} on {mesh} ({jax.devices()[0].device_kind})"
