"""Classification of texts or pairs of texts: p(label | text), read off the vector at the text's first token (last in a decoder)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax import metrics
from llm_jax.config import fraction, positive
from llm_jax.data.pieces import account, split_long
from llm_jax.data.tokenizer import PAIR, TEXT, Tokenizer, places
from llm_jax.errors import ConfigError, DataError, choose
from llm_jax.losses import Loss, LossFn, class_cross_entropy
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Outputs
from llm_jax.models.transformer import apply
from llm_jax.tasks.base import Example, Judgement

KEEP = ("head", "tail", "head_tail")


@dataclasses.dataclass(frozen=True)
class Classification:
    """-sum_i log p(label_i | text_i). A text longer than a row is cut (data.long=truncate) or read in windows (split).

    Windows weigh together as much as one text; their probabilities are averaged. Several short texts share a row where data.pack is set.
    """

    labels: tuple[str, ...] = ("negative", "positive")
    """names of the classes, in the order of their numbers"""
    label: str = "label"
    """field of a record that holds the class, by its number or its name"""
    pair: str = ""
    """field of a second text; empty for single texts"""
    template: str = ""
    """what stands around a text, such as a question to a language model: {text} in its place and, for pairs, {pair} in that of the second. Empty for
    what the tokenizer adds, or the template that the model which the run starts from was trained with"""
    keep: str = "head"
    """what is kept of a text that is cut: head, tail, or head_tail (a quarter and three quarters of the row; Sun et al. 2019)"""
    overlap: int = 0
    """tokens that a window repeats of the one before it"""
    class_weights: tuple[float, ...] = ()
    """factor of each class in training; empty for 1"""
    label_smoothing: float = 0.0
    """a of (1 - a) one-hot + a uniform, in training"""

    def __post_init__(self):
        choose("task.keep", self.keep, KEEP)
        positive(self, "task", "overlap", least=0)
        fraction(self, "task", "label_smoothing")
        if self.template and places(self.template) != [TEXT, PAIR][: 1 + bool(self.pair)]:
            wanted = f"{TEXT} once, then {PAIR} once" if self.pair else f"{TEXT} once, and {PAIR} with task.pair alone"
            raise ConfigError(f"task.template is {self.template!r}: it must have {wanted}")
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"task.labels are {self.labels}: there must be at least two, all different")
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} values for {len(self.labels)} task.labels"
            )
        if any(not w > 0 for w in self.class_weights):
            raise ConfigError(f"task.class_weights are {self.class_weights}: each must be above 0")

    def lengths(self, length: int) -> dict[str, int]:
        """A single stream."""
        return {"tokens": length}

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """Ids above the tokenizer's own that the rows hold: none."""
        return 0

    def number(self, record: Any) -> int:
        """The class of a record. Raises DataError when it is none of the labels."""
        value = record[self.label]
        if isinstance(value, str):
            if value in self.labels:
                return self.labels.index(value)
            value = int(value) if value.strip().isdecimal() else value
        if isinstance(value, (int, float)) and value in range(len(self.labels)):
            return int(value)
        raise DataError(
            f"{record['id']}: {self.label} is {value!r}: it must be a number from 0 to {len(self.labels) - 1} or one of "
            f"{', '.join(self.labels)} (task.labels)"
        )

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """The text between the tokens that the tokenizer puts around it; the class stands at the first token.

        Raises:
            DataError: a label that is none, or a row too short for any text.
        """
        number = self.number(record)
        first = tokenizer.encode(record["text"])
        second = tokenizer.encode(record[self.pair]) if self.pair else None
        frame = tokenizer.frame(pair=second is not None)
        room = length - sum(map(len, frame))
        if room < (1 if second is None else 2):
            raise DataError(f"a row of {length} tokens has no room for a text: raise batch.length")
        size = len(first) + (0 if second is None else len(second))
        if second is not None:
            short = room // 2 if len(first) > room // 2 else room - len(first)
            second = self._cut(second, max(short, 1)) if size > room else second
            room -= len(second)
        cuts = self._windows(first, room, long, record["id"])
        kept = len(np.unique(np.concatenate(cuts))) + (0 if second is None else len(second))
        total_bytes = sum(len(record[name].encode()) for name in ("text", self.pair) if name)
        for i, chosen in enumerate(cuts):
            tokens, types = _framed(frame, first[chosen], second)
            targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
            targets[0], weights[0] = number, 1 / len(cuts)
            yield {
                "tokens": tokens,
                "targets": targets,
                "weights": weights,
                **({} if second is None else {"types": types}),
                "account": account(tokens=kept, lost=size - kept, truncated=float(size > kept), bytes=total_bytes)
                if i == 0
                else account(),
            }

    def _windows(self, ids: np.ndarray, room: int, long: str, name: str) -> list[np.ndarray]:
        """Places of the tokens that each example reads."""
        if long == "truncate" and len(ids) > room:
            return [self._cut(np.arange(len(ids)), room)]
        if long != "split" or len(ids) <= room:
            return [np.arange(start, stop) for start, stop in split_long(ids, room, long, name)] or [np.arange(0)]
        if self.overlap >= room:
            raise ConfigError(f"task.overlap {self.overlap} leaves no room in windows of {room} tokens")
        starts = range(0, len(ids) - self.overlap, room - self.overlap)
        return [np.arange(start, min(start + room, len(ids))) for start in starts]

    def _cut(self, ids: np.ndarray, room: int) -> np.ndarray:
        """The `room` tokens that are kept of a longer text."""
        if len(ids) <= room:
            return ids
        head = {"head": room, "tail": 0, "head_tail": room // 4}[self.keep]
        return np.concatenate([ids[:head], ids[len(ids) - (room - head) :]])

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """`predict` (M,) names the first token of each example, `targets` and `weights` (M,) its class and what it weighs."""
        slots = max(1, len(row["tokens"]) // (1 + sum(map(len, tokenizer.frame(pair=False)))))
        at = np.flatnonzero(row["weights"] > 0)
        made = {name: np.zeros(slots, row[name].dtype) for name in ("targets", "weights")}
        predict = np.zeros(slots, np.int32)
        predict[: len(at)] = at
        for name, to in made.items():
            to[: len(at)] = row[name][at]
        return {**row, **made, "predict": predict}

    def loss(self, config: ModelConfig) -> LossFn:
        """Cross-entropy of each example; class weights and smoothing only where there is a key, that is, in training.

        Raises:
            ConfigError: a model without a head for these classes.
        """
        if config.head != "classification" or config.labels != len(self.labels):
            has = f"{config.labels} classes" if config.head == "classification" else f"head {config.head!r}"
            raise ConfigError(
                f"the model has {has}, the task {len(self.labels)} labels: put "
                f"new_head('classification', labels={len(self.labels)}) into transforms"
            )
        if config.architecture == "encoder-decoder":
            raise ConfigError("classification reads an encoder or a decoder, not an encoder-decoder")
        factors = jnp.asarray(self.class_weights or (1.0,) * len(self.labels), jnp.float32)

        def loss(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
            outputs = apply(config, params, batch, key=key if config.drops else None)
            training = key is not None
            weights = batch["weights"] * factors[batch["targets"]] if training else batch["weights"]
            smoothing = self.label_smoothing if training else 0.0
            return class_cross_entropy(outputs, batch["targets"], weights, label_smoothing=smoothing)

        return loss

    def outcome(self, outputs: Outputs, batch: Any) -> dict[str, Array]:
        """Of each example its probabilities (B, M, C), its class and its weight (B, M)."""
        assert outputs.logits is not None
        probabilities = jax.nn.softmax(outputs.logits, axis=-1)
        return {"probabilities": probabilities, "targets": batch["targets"], "weights": batch["weights"]}

    def judge(self, outcomes: dict[str, np.ndarray]) -> Judgement:
        """Accuracy, precision, recall, F1 and calibration, by document: the probabilities of its windows are averaged."""
        documents, first, of = np.unique(outcomes["documents"], return_index=True, return_inverse=True)
        summed = np.zeros((len(documents), len(self.labels)))
        np.add.at(summed, of, outcomes["probabilities"])
        probabilities = summed / np.bincount(of)[:, None]
        truth = outcomes["targets"][first]
        guess = probabilities.argmax(axis=1)
        examples = [
            {
                "document": int(document),
                "label": self.labels[t],
                "predicted": self.labels[g],
                "probabilities": {name: round(float(x), 6) for name, x in zip(self.labels, p)},
            }
            for document, t, g, p in zip(documents, truth, guess, probabilities)
        ]

        def draw(folder: Any) -> dict[str, str]:
            paths = {"confusion": folder / "confusion.png", "calibration": folder / "calibration.png"}
            matrix = metrics.confusion_matrix(truth, guess, len(self.labels))
            metrics.draw_confusion(matrix, self.labels, paths["confusion"])
            metrics.draw_calibration(truth, probabilities, paths["calibration"])
            return {name: str(path) for name, path in paths.items()}

        return Judgement(metrics.classification_metrics(truth, probabilities, self.labels), examples, draw)


def _framed(
    frame: tuple[np.ndarray, ...], first: np.ndarray, second: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and types of an example: what stands before, between and after its texts is the frame."""
    if second is None:
        tokens = np.concatenate([frame[0], first, frame[1]]).astype(np.int32)
        return tokens, np.zeros(len(tokens), np.int32)
    ones = len(second) + len(frame[2])
    tokens = np.concatenate([frame[0], first, frame[1], second, frame[2]]).astype(np.int32)
    return tokens, (np.arange(len(tokens)) >= len(tokens) - ones).astype(np.int32)
