"""What a task is: how a record becomes examples, how examples become a row, and what is minimised.

A task is a frozen dataclass in a file of its own under `llm_jax/tasks/`; its fields are its part of the config. There is no base
class to inherit from: the methods below are the whole contract.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Outputs

Example = dict[str, np.ndarray]
"""Arrays (S',) of one example before packing, all features of one stream of equal length."""

Batch = dict[str, Array]
"""Arrays (B, S) of a global batch: tokens, targets, weights, segment_ids, positions and what the task adds."""


class Task(Protocol):
    """A frozen dataclass with these methods."""

    def lengths(self, length: int) -> dict[str, int]:
        """Tokens of a row for each stream, e.g. `{"tokens": S}`; an encoder-decoder has also `"encoder_tokens"`."""

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """Ids above the tokenizer's own that the rows hold."""

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """The examples of a record, none longer than a row, in the order of the text. `rng` is fresh each time a record is drawn.

        The record has `id`, `text` and, where there is one, `target`, whatever the source calls them.

        Features: `tokens` and what is aligned with it (`targets`, `weights`), `encoder_tokens` and what is aligned with that.
        Raises `llm_jax.data.pieces.Dropped` when the record has to be dropped.
        """

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """The last step on a packed or padded row, e.g. masking; the place for what is random."""

    def loss(self, config: ModelConfig) -> LossFn:
        """The objective as a function of the params of a model of this config."""


@runtime_checkable
class Templated(Protocol):
    """A task that may put a text into a template of its own (`Tokenizer.templated`)."""

    @property
    def template(self) -> str:
        """With {text} in the text's place; empty for none."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What became of each held-out example."""

    metrics: dict[str, float]
    examples: list[dict[str, Any]]
    """one a document, with its number `document`: what was asked, expected and answered; a line each of predictions.jsonl"""
    draw: Callable[[Path], dict[str, str]]
    """writes pictures into a folder; their paths by name"""


@runtime_checkable
class Judged(Protocol):
    """A task that is judged example by example, beside the sums of its loss, has these methods too."""

    def outcome(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """What judging needs of each of M examples a row: arrays (B, M, ...), with `weights` above 0 where there is an example."""

    def judge(self, outcomes: dict[str, np.ndarray]) -> Judgement:
        """The verdict on all examples, (N, ...) arrays of what `outcome` gave, with `documents` (N,), the numbers of their documents."""
