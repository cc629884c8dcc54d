"""Masked-token prediction: some tokens are hidden and predicted from both sides (BERT, section 3.1)."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.config import fraction, positive
from llm_jax.data.pieces import account, split_long
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.tasks.base import Example
from llm_jax.tasks.next_token import vocabulary_loss


@dataclasses.dataclass(frozen=True)
class MaskedToken:
    """-sum over the chosen positions of log p(t_i | the row with them hidden), chosen anew each time a row is drawn."""

    rate: float = 0.15
    """share of the tokens that is predicted"""
    mask: float = 0.8
    """share of the chosen that become the mask token"""
    random: float = 0.1
    """share of the chosen that become another token; the rest stay as they are"""
    whole_words: bool = False
    """choose all tokens of a word or none; each of them is then hidden, changed or kept by itself"""
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        fraction(self, "task", "rate", "mask", "random", "label_smoothing")
        positive(self, "task", "z_loss", least=0)
        if self.mask + self.random > 1:
            raise ConfigError(
                f"task.mask {self.mask} and task.random {self.random} are shares of the same tokens: together at most 1"
            )

    def lengths(self, length: int) -> dict[str, int]:
        """A single stream."""
        return {"tokens": length}

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """Ids above the tokenizer's own that the rows hold: none."""
        return 0

    def predictions(self, length: int) -> int:
        """M: positions of a row that may be predicted."""
        return max(1, math.ceil(self.rate * length))

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """Windows of the text, each between the class and the separator token."""
        if tokenizer.cls is None or tokenizer.sep is None or tokenizer.mask is None:
            raise DataError("masked-token prediction needs a tokenizer with [CLS], [SEP] and [MASK]")
        if self.whole_words and not tokenizer.continues.any():
            raise DataError(
                "no token of this tokenizer is marked as the continuation of a word: set task.whole_words to False"
            )
        ids = tokenizer.encode(record["text"])
        windows = split_long(ids, length - 2, long, record["id"])
        lost = len(ids) - sum(stop - start for start, stop in windows)
        for i, (start, stop) in enumerate(windows):
            piece = np.concatenate([[tokenizer.cls], ids[start:stop], [tokenizer.sep]]).astype(np.int32)
            yield {
                "tokens": piece,
                "account": account(
                    tokens=stop - start,
                    lost=lost if i == 0 else 0,
                    truncated=float(lost > 0 and i == 0),
                    bytes=len(record["text"].encode()) * (stop - start) / len(ids),
                ),
            }

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """Hide tokens of the row; `predict` (M,) names the positions, `targets` and `weights` (M,) what stood there."""
        tokens = row["tokens"]
        special = [i for i in (tokenizer.cls, tokenizer.sep, tokenizer.pad) if i is not None]
        candidates = np.flatnonzero((row["segment_ids"] > 0) & ~np.isin(tokens, special))
        slots = self.predictions(len(tokens))
        count = min(slots, len(candidates), max(1, round(self.rate * len(candidates))))
        if self.whole_words:
            chosen = np.sort(_whole_words(candidates, row, tokenizer.continues, count, rng))
            count = len(chosen)
        else:
            chosen = np.sort(rng.permutation(candidates)[:count])
        fate = rng.random(count)
        hidden = np.where(fate < self.mask, tokenizer.mask, tokens[chosen])
        hidden = np.where(
            (fate >= self.mask) & (fate < self.mask + self.random), rng.integers(0, tokenizer.vocab_size, count), hidden
        )
        predict, targets, weights = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.zeros(slots, np.float32)
        predict[:count], targets[:count], weights[:count] = chosen, tokens[chosen], 1
        changed = tokens.copy()
        changed[chosen] = hidden
        return {**row, "tokens": changed, "predict": predict, "targets": targets, "weights": weights}

    def loss(self, config: ModelConfig) -> LossFn:
        """Cross-entropy at the chosen positions."""
        return vocabulary_loss(config, self.label_smoothing, self.z_loss)


def _whole_words(
    candidates: np.ndarray, row: Example, continues: np.ndarray, budget: int, rng: np.random.Generator
) -> np.ndarray:
    """Places of the tokens of words drawn at random, `budget` at most: a word larger than what is left is passed over.

    The rule, and that each token has a fate of its own, are those of BERT's release with whole-word masking (2019).
    There a continuing token after a separator belongs to the word before it; here a word ends with its example.
    """
    follows = (np.diff(candidates, prepend=-2) == 1) & (np.diff(row["segment_ids"][candidates], prepend=0) == 0)
    words = np.split(candidates, np.flatnonzero(~(follows & continues[row["tokens"][candidates]])))[1:]
    chosen: list[int] = []
    for which in rng.permutation(len(words)):
        if len(chosen) + len(words[which]) <= budget:
            chosen += words[which].tolist()
        if len(chosen) == budget:
            break
    return np.array(chosen, np.int64)
