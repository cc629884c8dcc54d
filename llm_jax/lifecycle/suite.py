"""What a gate asks of a model: checks with their margins and slices, and limits of size, latency and memory. A Python file with `get_suite()`."""

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

import numpy as np

from llm_jax.config import Batch, Data, fraction, load_record, positive, to_dict
from llm_jax.data.documents import open_sources
from llm_jax.errors import ConfigError, UserError, choose
from llm_jax.lifecycle.harness import Harness
from llm_jax.lifecycle.scored import Scored, score_documents
from llm_jax.model import Model
from llm_jax.storage import Path

UNITS = {"loss": "loss, nats a token or text", "bits": "bits a byte of text", "accuracy": "accuracy"}
"""What each metric is measured in"""


@dataclasses.dataclass(frozen=True)
class Check:
    """A task on held-out documents, and how much a candidate may lose on it."""

    name: str
    task: Any
    data: Data
    margin: float
    """loss of the metric that is not to be exceeded, in its units"""
    metric: str = "loss"
    """loss (nats a token, or a text of a class), bits (a byte of text: for models of different tokenizers), or accuracy"""
    batch: Batch = dataclasses.field(default_factory=Batch)
    slices: tuple[str, ...] = ()
    """fields of the records: what shares a value is a slice, judged on its own; of a number or a date by its first characters, FIELD:3"""
    slice_margin: float = 0.0
    """loss that no slice may exceed; 0 for twice the margin"""
    least: int = 30
    """documents that a slice has at least, to be judged"""
    group: str = ""
    """field whose equal values are not independent, such as the film of a review; empty where documents are"""
    bound: float | None = None
    """value that the metric must reach whatever the incumbent has: at most, or of an accuracy at least"""

    def __post_init__(self):
        choose("check.metric", self.metric, UNITS)
        positive(self, "check", "least")
        positive(self, "check", "slice_margin", least=0)
        if not self.margin > 0:
            raise ConfigError(f"check.margin of {self.name!r} is {self.margin!r}: it must be above 0")
        if self.metric == "bits" and self.data.long == "truncate":
            raise ConfigError(
                f"check.data.long of {self.name!r} is 'truncate': bits a byte of text are of all of it: 'split'"
            )
        for field in self.slices:
            if not re.fullmatch(r"[^:]+(:[1-9]\d*)?", field):
                raise ConfigError(f"check.slices of {self.name!r} has {field!r}: it must be FIELD, or FIELD:N")

    @property
    def sign(self) -> int:
        """1 where a greater value is worse, else -1."""
        return -1 if self.metric == "accuracy" else 1

    @property
    def unit(self) -> str:
        """What the metric is measured in."""
        return UNITS[self.metric]

    @property
    def text(self) -> str:
        """The field of a record that shows what it is."""
        return self.data.text

    def score(self, loaded: Model) -> Scored:
        """What a model makes of the documents."""
        return score_documents(loaded, self.task, self.data, self.batch)

    def figures(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the metric of each document, and its weight in the mean. Raises UserError where the task has no such metric."""
        if self.metric == "accuracy":
            if scored.correct is None:
                raise UserError(f"check {self.name!r}: a task without classes has no accuracy: metric='loss'")
            return scored.correct, np.ones(len(scored))
        if self.metric == "bits":
            return scored.loss / math.log(2) / np.maximum(scored.bytes, 1), scored.bytes
        return scored.loss / scored.weight, scored.weight

    def same_units(self, scored: Scored, old: Model, new: Model) -> None:
        """Raise UserError where the figures of two models are of different things."""
        told = [None if each.tokenizer is None else each.tokenizer.fingerprint for each in (old, new)]
        if self.metric == "loss" and scored.correct is None and told[0] != told[1]:
            raise UserError(
                f"check {self.name!r}: the models have different tokenizers, so that losses a token differ: metric='bits'"
            )

    def contents(self) -> list[str]:
        """Fingerprints of what is read."""
        return [source.fingerprint for source in open_sources(self.data, "heldout")]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a candidate may take, as multiples of what the incumbent does; 0 for no limit."""

    size: float = 0.0
    """bytes of its weights"""
    latency: float = 0.0
    """measured time of a forward pass; two models of one size differ by a tenth on a busy machine"""
    memory: float = 0.0
    """peak of a forward pass, as it is compiled"""
    parameters: float = 0.0
    """how many it may have, by itself"""
    rows: int = 8
    """of the batch that is timed"""
    length: int = 128
    """tokens of a row of it"""

    def __post_init__(self):
        positive(self, "limits", "size", "latency", "memory", "parameters", least=0)
        positive(self, "limits", "rows", "length")


@dataclasses.dataclass(frozen=True)
class Suite:
    """All that a gate asks."""

    checks: tuple[Check | Harness, ...]
    limits: Limits = Limits()
    level: float = 0.05
    """chance of passing a model that has lost a margin, at most, and of refusing one for a slice that has lost nothing"""

    def __post_init__(self):
        fraction(self, "suite", "level")
        if not 0 < self.level < 0.5:
            raise ConfigError(f"suite.level is {self.level!r}: it must lie between 0 and 0.5")
        names = [check.name for check in self.checks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"suite.checks are named {names}: there must be one, and each must have a name of its own"
            )

    def fingerprint(self) -> str:
        """Identity of what is asked: checks, margins, limits, and the contents of the sources."""
        sources = [check.contents() for check in self.checks]
        return hashlib.sha256(json.dumps([to_dict(self), sources], sort_keys=True).encode()).hexdigest()


def load_suite(path: str | Path) -> Suite:
    """The suite that a file's `get_suite()` returns. Raises ConfigError where there is none, or with a value that is not allowed."""
    return load_record(path, "get_suite", Suite)
