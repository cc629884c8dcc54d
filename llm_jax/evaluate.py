"""How good a model is: sums of the loss over held-out rows, and the log-probability of a text token by token."""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import config, losses, model, sharding, tasks
from llm_jax.card import Card
from llm_jax.data.accounting import FIELDS
from llm_jax.data.documents import documents, open_sources
from llm_jax.data.pipeline import Loader, Rows
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import apply
from llm_jax.platform import gather
from llm_jax.sharding import put, rows_here
from llm_jax.tasks.base import Judged, Judgement
from llm_jax.tasks.next_token import document


def make_eval_step(loss: LossFn, task: Any = None):
    """(params, batch, reference) -> (sums over the batch, outcomes of its examples), without dropout or smoothing.

    The outcomes are those of a task that is `Judged`, of the one forward pass; else there are none.
    """

    def eval_step(params: Any, batch: Any, reference: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = loss(params, batch, None, reference)
        outcomes = task.outcome(found.outputs, batch) if isinstance(task, Judged) else {}
        return {"total": found.total, "weight": found.weight, **found.metrics}, outcomes

    return jax.jit(eval_step)


def held_out_loaders(
    tokenizer: Tokenizer, task: Any, data: config.Data, batch: config.Batch, **place: Any
) -> tuple[Loader, ...]:
    """A loader for each source of which documents are held out; none where the data holds nothing out.

    Raises:
        UserError: sources that cannot be read, or none of which a document is held out.
    """
    if not (data.heldout or data.heldout_sources):
        return ()
    sources = open_sources(data, "heldout")
    held = [which for which, source in enumerate(sources) if len(documents(source, data, "heldout"))]
    each = [(which,) for which in held] if len(held) > 1 else [(None,)]
    return tuple(Loader(sources, tokenizer, task, data, batch, 0, "heldout", only=only, **place) for (only,) in each)


@dataclasses.dataclass
class _Sums:
    """What is summed over rows; sums of several sources add up."""

    values: dict[str, float]
    account: np.ndarray
    outcomes: list[dict[str, np.ndarray]]

    def __add__(self, other: "_Sums") -> "_Sums":
        names = dict.fromkeys([*self.values, *other.values])
        values = {name: self.values.get(name, 0.0) + other.values.get(name, 0.0) for name in names}
        return _Sums(values, self.account + other.account, self.outcomes + other.outcomes)


def _sums(
    eval_step: Any, params: Any, loader: Loader, mesh: jax.sharding.Mesh, reference: Any, batches: int, task: Any
) -> _Sums:
    """The sums over a loader's rows (the first `batches`, or all), which is put back to where it was."""
    begin, total = loader.get_state(), _Sums({}, np.zeros(len(FIELDS)), [])
    for rows in itertools.islice(loader, batches or None):
        found, each = eval_step(params, put(rows.batch, mesh), reference or {})
        values = {name: float(value) for name, value in jax.device_get(found).items()}
        outcomes = [_examples(each, rows, mesh)] if task is not None and each else []
        total += _Sums(values, rows.account, outcomes)
    loader.set_state(begin)
    return total


def judge(
    eval_step: Any,
    params: Any,
    loaders: Sequence[Loader],
    mesh: jax.sharding.Mesh,
    reference: Any = None,
    batches: int = 0,
    task: Any = None,
) -> tuple[dict[str, float], Judgement | None]:
    """Loss a token, perplexity, bits a byte of text and accuracy over the loaders' rows (the first `batches` of each, or all).

    Bits a byte are given where each token of the text is predicted once. Where a `Judged` task is given, the figures are its
    judgement's beside the loss. Of several loaders the loss of each is given too, as `loss/SOURCE`.
    """
    parts = [_sums(eval_step, params, loader, mesh, reference, batches, task) for loader in loaders]
    figures, judgement = _figures(functools.reduce(operator.add, parts), mesh, task)
    if len(parts) > 1:
        for loader, part in zip(loaders, parts):
            found, _ = _figures(part, mesh, task)
            figures |= {f"{name}/{loader.only}": found[name] for name in ("loss", "accuracy") if name in found}
    return figures, judgement


def _figures(total: _Sums, mesh: jax.sharding.Mesh, task: Any) -> tuple[dict[str, float], Judgement | None]:
    """The figures of some sums, and the judgement where examples were judged."""
    sums, account, outcomes = dict(total.values), total.account, total.outcomes
    weight = sums.pop("weight", 0.0)
    if not weight:
        return {}, None
    judgement = None
    if outcomes:
        judgement = task.judge({name: np.concatenate([each[name] for each in outcomes]) for name in outcomes[0]})
    nll = sums.get("nll", sums["total"])
    if judgement is not None:
        return {"loss": sums["total"] / weight, **judgement.metrics, "examples": len(judgement.examples)}, judgement
    result = {"loss": sums["total"] / weight, "perplexity": math.exp(min(nll / weight, 700)), "tokens": weight}
    read = dict(zip(FIELDS, of_all_rows(account.tolist(), mesh)))
    if read["bytes"] and read["tokens"] == weight:
        result["bits_per_byte"] = nll / math.log(2) / read["bytes"]
    if "correct" in sums:
        result["accuracy"] = sums["correct"] / weight
    return result, None


def of_all_rows(counts: list[float], mesh: jax.sharding.Mesh) -> list[float]:
    """The sums over the rows of all processes; rows that several hold are counted once."""
    every: dict[int, list[float]] = {}
    for part, each in gather([rows_here(mesh)[0], counts]):
        every.setdefault(part, each)
    return [sum(each) for each in zip(*every.values())]


def _examples(outcomes: dict[str, Any], rows: Rows, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """The outcomes (B, M, ...) of a batch as (N, ...) arrays of its examples, with the documents they are of; of all processes."""
    predict = rows.batch.get("predict")  # absent where each token is an example
    documents = rows.ids if predict is None else np.take_along_axis(rows.ids, predict, axis=1)
    found: dict[str, Any] = {**outcomes, "documents": documents}
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found |= put({"documents": documents}, mesh)
        found = {name: multihost_utils.process_allgather(x, tiled=True) for name, x in found.items()}
    found = jax.device_get(found)
    there = found["weights"] > 0
    return {name: x[there] for name, x in found.items()}


def score(sizes: ModelConfig, params: Any, tokenizer: Tokenizer, text: str) -> list[tuple[str, float]]:
    """log p(t_i | t_<i) of each token of the text with its end token, in nats; rows longer than the model are cut in windows.

    A window after the first sees the last half of the one before it.

    Raises:
        UserError: the model is no decoder of text.
    """
    if sizes.architecture != "decoder" or sizes.head != "lm":
        raise UserError(
            f"a model of architecture {sizes.architecture!r} with head {sizes.head!r} gives a text no probability: "
            "it needs a decoder with head 'lm'"
        )
    symbols = document(text, tokenizer)
    inputs, targets = symbols[:-1], symbols[1:]
    length = min(sizes.max_length, max(16, 1 << (len(inputs) - 1).bit_length()))
    found: list[float] = []
    while len(found) < len(targets):
        start = 0 if not found else max(0, min(len(found) - length // 2, len(targets) - length))
        row = np.zeros((2, 1, length), np.int32)
        count = min(length, len(targets) - start)
        row[0, 0, :count], row[1, 0, :count] = inputs[start : start + count], targets[start : start + count]
        logs = np.asarray(_log_probabilities(sizes, params, row[0], row[1]))[0]
        found += [float(x) for x in logs[len(found) - start : count]]
    return [(tokenizer.token(int(t)), p) for t, p in zip(targets, found)]


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(sizes: ModelConfig, params: Any, tokens: Any, targets: Any) -> Any:
    return losses.log_probabilities(apply(sizes, params, {"tokens": tokens}, logits=False), targets)


def saved_run(card: Card, where: Any) -> tuple[Any, config.Data, config.Batch]:
    """The task as it is evaluated, the data and the batch of the run that a card tells of. Raises CheckpointError where it tells of none."""
    try:
        saved = card["config"]
        task = tasks.from_dict(saved["eval"]["task"] or saved["task"])
        plain: dict[str, Any] = {
            name: tuple(map(_tuple, x)) if isinstance(x, list) else x for name, x in saved["data"].items()
        }
        return task, config.Data(**plain), config.Batch(**saved["batch"])
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"the card of {where} describes no run of this version ({e})") from e


def evaluate_checkpoint(path: str, sources: tuple[str, ...] = (), length: int = 0, rows: int = 0) -> dict[str, float]:
    """The `evaluate` figures of a checkpoint's task: on the documents its run held out, or on all documents of other sources.

    Raises:
        UserError: no checkpoint, no run's config in its card, nothing held out, or sources that cannot be read.
    """
    loaded = model.load(path)
    if "config" not in loaded.card:
        raise CheckpointError(f"the card of {path} names no run, so its task is not known")
    if loaded.tokenizer is None:
        raise CheckpointError(f"checkpoint {path} has no tokenizer")
    task, data, batch = saved_run(loaded.card, path)
    batch = dataclasses.replace(batch, size=rows or batch.size, length=length or batch.length, accumulate=1)
    if sources:
        data = dataclasses.replace(data, heldout_sources=sources)
    return _held_out(loaded, task, data, batch)


def held_out(loaded: model.Model, run: config.Run, batches: int = 0) -> dict[str, float]:
    """The `evaluate` figures of a model on the documents that a run holds out, by the task it is evaluated on (the first `batches`, or all).

    Raises:
        UserError: a model without a tokenizer or without the task's head, nothing held out, sources that cannot be read.
    """
    if loaded.tokenizer is None:
        raise UserError("a model without a tokenizer reads no documents")
    return _held_out(loaded, run.eval.task or run.task, run.data, dataclasses.replace(run.batch, accumulate=1), batches)


def _held_out(
    loaded: model.Model, task: Any, data: config.Data, batch: config.Batch, batches: int = 0
) -> dict[str, float]:
    """The figures of a task on what is held out of the data."""
    if loaded.config.positions == "learned" and batch.length > loaded.config.max_length:
        raise UserError(
            f"rows of {batch.length} tokens are longer than the model's table of positions, {loaded.config.max_length}"
        )
    assert loaded.tokenizer is not None
    mesh = sharding.make_mesh()
    with contextlib.ExitStack() as stack, jax.set_mesh(mesh):
        loaders = held_out_loaders(loaded.tokenizer, task, data, batch)
        for loader in loaders:
            stack.enter_context(loader)
        if not loaders:
            raise UserError("no document is held out: set data.heldout above 0, or data.heldout_sources")
        return judge(_step_of(task, loaded.config), loaded.params, loaders, mesh, batches=batches, task=task)[0]


@functools.lru_cache(maxsize=8)
def _step_of(task: Any, sizes: ModelConfig) -> Any:
    """The evaluation step, compiled once for models of the same sizes."""
    return make_eval_step(task.loss(sizes), task)


class _Texts:
    """Records that are in memory, as a source."""

    spec = "the texts given"
    fingerprint = ""

    def __init__(self, records: list[dict[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]


def _classifier(loaded: model.Model) -> tuple[Any, config.Data, config.Batch]:
    """The task, data and batch of a run, or what goes with a classifier from elsewhere: its labels, and rows of up to 512 tokens."""
    sizes = loaded.config
    if "config" in loaded.card:
        return saved_run(loaded.card, "this model")
    if sizes.head != "classification":
        raise UserError(f"this model has head {sizes.head!r}: predict needs one that was trained to classify")
    named = loaded.card.get("labels") or [f"LABEL_{i}" for i in range(sizes.labels)]
    batch = config.Batch(size=8, length=min(512, sizes.max_length))
    return tasks.Classification(labels=tuple(named)), config.Data(long="truncate"), batch


def predict(loaded: model.Model, texts: Sequence[str], pairs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The class and the probabilities of each text, or of each pair of texts, by a model that was trained to classify.

    Raises:
        UserError: a model of another task, or texts and pairs that do not go together.
    """
    task, data, batch = _classifier(loaded)
    if not isinstance(task, tasks.Classification):
        raise UserError(
            f"this model was trained on {type(task).__name__}: predict needs one that was trained to classify"
        )
    if loaded.tokenizer is None:
        raise UserError("this model has no tokenizer")
    if len(pairs) != (len(texts) if task.pair else 0):
        raise UserError(
            f"this model classifies {'pairs of texts: give each a second one' if task.pair else 'single texts'}"
        )
    records = [
        {"id": f"text {i + 1}", data.text: text, task.label: 0, **({task.pair: pairs[i]} if task.pair else {})}
        for i, text in enumerate(texts)
    ]
    data = dataclasses.replace(data, heldout_sources=("texts:",), group="", heldout=0.0)
    mesh = sharding.make_mesh()
    with (
        Loader([_Texts(records)], loaded.tokenizer, task, data, batch, 0, "heldout") as loader,
        jax.set_mesh(mesh),
    ):
        step = make_eval_step(task.loss(loaded.config), task)
        judgement = judge(step, loaded.params, [loader], mesh, task=task)[1]
    assert judgement is not None
    answers = {example["document"]: example for example in judgement.examples}
    return [
        {"text": text, "label": answers[i]["predicted"], "probabilities": answers[i]["probabilities"]}
        if i in answers
        else {"text": text, "label": None, "probabilities": {}}
        for i, text in enumerate(texts)
    ]


def _tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
