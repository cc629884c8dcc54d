"""What a model makes of each document of a source: the pairs and slices of drift and gate are made of these."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import losses, sharding
from llm_jax.config import Batch, Data
from llm_jax.data.documents import open_sources
from llm_jax.data.pipeline import Loader
from llm_jax.errors import DataError, UserError
from llm_jax.evaluate import judge, make_eval_step
from llm_jax.model import Model
from llm_jax.models.config import ModelConfig
from llm_jax.tasks.base import Judged, Judgement


@dataclasses.dataclass(frozen=True)
class Scored:
    """Figures of N documents, in the order of their sources."""

    records: list[dict[str, Any]]
    """each with its `id`, its text and its other fields"""
    loss: np.ndarray
    """(N,) nats of a document: -sum log p of the tokens that are predicted in it, or of its class"""
    weight: np.ndarray
    """(N,) how many those are; the mean loss of several documents is sum(loss) / sum(weight)"""
    bytes: np.ndarray
    """(N,) of its text in UTF-8"""
    correct: np.ndarray | None = None
    """(N,) 1 where the class was found, 0 where not; None for a task without classes"""
    said: tuple[str, ...] = ()
    """the class that was found for each; empty for a task without classes"""

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, chosen: np.ndarray) -> "Scored":
        """The documents at these places."""
        places = np.arange(len(self))[chosen]
        correct = None if self.correct is None else self.correct[places]
        records = [self.records[i] for i in places]
        said = tuple(self.said[i] for i in places) if self.said else ()
        return Scored(records, self.loss[places], self.weight[places], self.bytes[places], correct, said)

    @property
    def mean(self) -> float:
        """Nats a token, or an example."""
        return float(self.loss.sum() / self.weight.sum())


def join_scored(*parts: Scored) -> Scored:
    """The documents of several, one after the other; answers only where all have them."""
    answers = [part.correct for part in parts if part.correct is not None]
    all_answered = len(answers) == len(parts)
    return Scored(
        [record for part in parts for record in part.records],
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.bytes for part in parts]),
        np.concatenate(answers) if all_answered else None,
        tuple(said for part in parts for said in part.said) if all_answered else (),
    )


@dataclasses.dataclass(frozen=True)
class _ByToken:
    """A task of tokens judged document by document: the same objective, and its sum for each document."""

    task: Any

    def outcome(self, outputs: Any, batch: Any) -> dict[str, Any]:
        """(B, S) nats and weight of each token."""
        nats = -losses.log_probabilities(outputs, batch["targets"]) * batch["weights"]
        return {"loss": nats.astype(jnp.float32), "weights": batch["weights"]}

    def judge(self, outcomes: dict[str, np.ndarray]) -> Judgement:
        """Loss and weight of each document."""
        numbers, of = np.unique(outcomes["documents"], return_inverse=True)
        loss, weight = (np.bincount(of, outcomes[name].astype(np.float64)) for name in ("loss", "weights"))
        examples = [
            {"document": int(n), "loss": float(x), "weight": float(w)} for n, x, w in zip(numbers, loss, weight)
        ]
        return Judgement({}, examples, lambda folder: {})


def score_documents(loaded: Model, task: Any, data: Data, batch: Batch, split: str = "heldout") -> Scored:
    """Loss of each document of a split by a model, those that yield no example left out. What a task draws at random is the same for every model.

    Raises:
        UserError: a model without a tokenizer or without the task's head, no documents, sources that cannot be read.
    """
    if loaded.tokenizer is None:
        raise UserError("a model without a tokenizer reads no documents")
    mesh = sharding.make_mesh()
    sources = open_sources(data, split)
    batch = dataclasses.replace(batch, accumulate=1)
    if loaded.config.positions == "learned" and batch.length > loaded.config.max_length:
        batch = dataclasses.replace(batch, length=loaded.config.max_length)
    judged = task if isinstance(task, Judged) else _ByToken(task)
    with Loader(sources, loaded.tokenizer, task, data, batch, 0, split, once=True) as loader, jax.set_mesh(mesh):
        _, judgement = judge(_step(task, loaded.config), loaded.params, [loader], mesh, task=judged)
    if judgement is None:
        raise DataError(f"nothing of {', '.join(source.spec for source in sources)} is predicted by the task")
    offsets = np.cumsum([0, *map(len, sources)])
    examples = sorted(judgement.examples, key=lambda example: example["document"])
    records = []
    for example in examples:
        which = int(np.searchsorted(offsets, example["document"], side="right")) - 1
        records.append({**sources[which][example["document"] - int(offsets[which])], "source": sources[which].spec})
    sizes = np.array([_size(record, data) for record in records], np.float64)
    if isinstance(judged, _ByToken):
        loss, weight = (np.array([example[name] for example in examples]) for name in ("loss", "weight"))
        return Scored(records, loss, weight, sizes)
    if not all("probabilities" in example for example in examples):
        raise UserError(f"{type(task).__name__} is not judged by classes, so it gives no loss for each document")
    chances = np.array([example["probabilities"][example["label"]] for example in examples])
    correct = np.array([float(example["label"] == example["predicted"]) for example in examples])
    said = tuple(example["predicted"] for example in examples)
    return Scored(records, -np.log(np.maximum(chances, 1e-6)), np.ones(len(examples)), sizes, correct, said)


def _size(record: dict[str, Any], data: Data) -> int:
    """Bytes of a document's text."""
    return sum(len(record[name].encode()) for name in (data.text, data.target) if isinstance(record.get(name), str))


@functools.lru_cache(maxsize=8)
def _step(task: Any, sizes: ModelConfig) -> Any:
    """The step of an evaluation, compiled once for models of the same sizes."""
    return make_eval_step(task.loss(sizes), task if isinstance(task, Judged) else _ByToken(task))
