"""Next-token prediction: p(t_1 .. t_n) = prod_i p(t_i | t_1 .. t_{i-1}), the maximum-likelihood objective of a decoder."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.config import fraction, positive
from llm_jax.data.pieces import account, split_long
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.losses import Loss, LossFn, cross_entropy
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import apply
from llm_jax.tasks.base import Example


@dataclasses.dataclass(frozen=True)
class NextToken:
    """-sum_i log p(t_i | t_<i), each document begun by the tokenizer's begin token and ended by its end token."""

    label_smoothing: float = 0.0
    """a of (1 - a) one-hot + a uniform, in training"""
    z_loss: float = 0.0
    """factor of (log Z)^2, in training"""
    overlap: int = 0
    """tokens that a window of a long document reads again, unweighted, from the one before: more context, for evaluation"""

    def __post_init__(self):
        fraction(self, "task", "label_smoothing")
        positive(self, "task", "z_loss", "overlap", least=0)

    def lengths(self, length: int) -> dict[str, int]:
        """A single stream."""
        return {"tokens": length}

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """Ids above the tokenizer's own that the rows hold: none."""
        return 0

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """Windows of at most `length` inputs; each token of the document is a target with a weight once.

        Raises:
            ConfigError: an overlap that leaves no room for new tokens.
        """
        if self.overlap >= length:
            raise ConfigError(f"task.overlap {self.overlap} leaves no room in rows of {length} tokens")
        symbols = document(record["text"], tokenizer)
        inputs, targets = symbols[:-1], symbols[1:]
        text_bytes = len(record["text"].encode())
        windows = split_long(inputs, length, long, record["id"])
        kept = sum(stop - start for start, stop in windows)
        lost = len(inputs) - kept
        if self.overlap and len(windows) > 1:
            windows = [
                windows[0],
                *((length + a, length + b) for a, b in split_long(inputs[length:], length - self.overlap, "split")),
            ]
        for i, (start, stop) in enumerate(windows):
            count, first = stop - start, max(0, start - self.overlap)
            weights = (np.arange(first, stop) >= start).astype(np.float32)
            yield {
                "tokens": inputs[first:stop],
                "targets": targets[first:stop],
                "weights": weights,
                "account": account(
                    tokens=count,
                    lost=lost if i == 0 else 0,
                    truncated=float(lost > 0 and i == 0),
                    bytes=text_bytes * count / len(inputs),
                ),
            }

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """As it is."""
        return row

    def loss(self, config: ModelConfig) -> LossFn:
        """Cross-entropy over the tokens with a weight."""
        return vocabulary_loss(config, self.label_smoothing, self.z_loss)


def document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a document between its begin and end tokens; the end token stands for a begin token where the tokenizer puts none.

    Raises:
        DataError: the tokenizer has neither.
    """
    end = tokenizer.eos if tokenizer.eos is not None else tokenizer.sep
    begin = next((i for i in (tokenizer.begin, tokenizer.cls, end) if i is not None), None)
    if end is None or begin is None:
        raise DataError("the tokenizer has no token that ends a document (such as </s> or <|endoftext|>): add one")
    return np.concatenate([[begin], tokenizer.encode(text), [end]]).astype(np.int32)


def vocabulary_loss(config: ModelConfig, label_smoothing: float, z_loss: float) -> LossFn:
    """The cross-entropy of a batch's targets; smoothing, z-loss and dropout only where there is a key, that is, in training."""

    def loss(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
        outputs = apply(config, params, batch, key=key if config.drops else None, logits=False)
        training = key is not None
        return cross_entropy(
            outputs,
            batch["targets"],
            batch["weights"],
            label_smoothing=label_smoothing if training else 0.0,
            z_loss=z_loss if training else 0.0,
        )

    return loss
