"""Sequence to sequence: p(target | source) = prod_i p(t_i | t_<i, source), for pairs of texts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.config import fraction, positive
from llm_jax.data.pieces import Dropped, account
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import DataError
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.tasks.base import Example
from llm_jax.tasks.next_token import document, vocabulary_loss


@dataclasses.dataclass(frozen=True)
class SequenceToSequence:
    """-sum_i log p(t_i | t_<i, source) for the records' fields data.text and data.target."""

    prefix: str = ""
    """put before each source, e.g. 'translate English to German: '"""
    target_length: int = 0
    """tokens of a row of targets; 0 for batch.length"""
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        fraction(self, "task", "label_smoothing")
        positive(self, "task", "target_length", "z_loss", least=0)

    def lengths(self, length: int) -> dict[str, int]:
        """Targets and sources."""
        return {"tokens": self.target_length or length, "encoder_tokens": length}

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """Ids above the tokenizer's own that the rows hold: none."""
        return 0

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """The pair; one that is longer than its row is cut, dropped or refused, since half a sentence has no translation."""
        source = document(self.prefix + record["text"], tokenizer)[1:]
        symbols = document(record["target"], tokenizer)
        symbols[0] = tokenizer.start
        room = self.lengths(length)
        over = max(0, len(source) - room["encoder_tokens"]) + max(0, len(symbols) - 1 - room["tokens"])
        if over and long == "drop":
            raise Dropped(f"{over} tokens over the row", len(source) + len(symbols) - 1)
        if over and long in ("error", "split"):
            raise DataError(
                f"document {record['id']} has {len(source)} and {len(symbols) - 1} tokens, a row holds {room['encoder_tokens']} "
                f"and {room['tokens']}: set data.long to truncate or drop, or raise batch.length"
            )
        source, inputs, targets = source[:length], symbols[:-1][: room["tokens"]], symbols[1:][: room["tokens"]]
        yield {
            "encoder_tokens": source,
            "tokens": inputs,
            "targets": targets,
            "weights": np.ones(len(targets), np.float32),
            "account": account(
                tokens=len(source) + len(targets),
                lost=over,
                truncated=float(over > 0),
                bytes=len(record["target"].encode()) * len(targets) / (len(symbols) - 1),
            ),
        }

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """As it is."""
        return row

    def loss(self, config: ModelConfig) -> LossFn:
        """Cross-entropy over the targets."""
        return vocabulary_loss(config, self.label_smoothing, self.z_loss)
