"""What a task is: how a record becomes examples, how examples become a row, and what is minimised.

A task is a frozen dataclass in a file of its own under `llm_jax/tasks/`; its fields are its part of the config. There is no base
class to inherit from: the methods below are the whole contract.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig

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
