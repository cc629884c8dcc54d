"""Span corruption: spans of the text are replaced by sentinels and written out by the decoder (T5, section 3.1.4)."""

import dataclasses
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
from llm_jax.tasks.next_token import document, vocabulary_loss

SENTINELS = 100


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """-sum_i log p(t_i | t_<i, text without its noise spans), where t is each sentinel followed by the span it stands for."""

    rate: float = 0.15
    """share of the tokens in noise spans"""
    span: float = 3.0
    """mean tokens of a noise span"""
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        fraction(self, "task", "rate", "label_smoothing")
        positive(self, "task", "span")
        positive(self, "task", "z_loss", least=0)
        if self.rate == 1:
            raise ConfigError("task.rate is 1: some of the text must be left to read")

    def spans(self, count: int) -> tuple[int, int]:
        """Noise tokens and noise spans of a text of `count` tokens."""
        noise = min(max(round(count * self.rate), 1), count - 1)
        return noise, min(max(round(noise / self.span), 1), noise, count - noise, SENTINELS)

    def window(self, length: int) -> int:
        """Tokens of text whose corrupted form, with a sentinel a span and an end token, fills a row of `length`."""
        count = 2
        while count + 1 - (spans := self.spans(count + 1))[0] + spans[1] + 1 <= length:
            count += 1
        return count

    def lengths(self, length: int) -> dict[str, int]:
        """Rows of the encoder, and the longest target that a window gives."""
        noise, spans = self.spans(self.window(length))
        return {"tokens": noise + spans + 1, "encoder_tokens": length}

    def extra_tokens(self, tokenizer: Tokenizer) -> int:
        """The sentinels, where the tokenizer has none of its own."""
        return 0 if tokenizer.id("<extra_id_0>") is not None else SENTINELS

    def sentinels(self, tokenizer: Tokenizer) -> np.ndarray:
        """Their ids: <extra_id_0>, ... of the tokenizer, else those above its vocabulary."""
        if tokenizer.id("<extra_id_0>") is None:
            return np.arange(tokenizer.vocab_size, tokenizer.vocab_size + SENTINELS, dtype=np.int32)
        known = [tokenizer.id(f"<extra_id_{i}>") for i in range(SENTINELS)]
        if None in known:
            raise DataError(
                f"the tokenizer has <extra_id_0>, but no <extra_id_{known.index(None)}>: span corruption needs all {SENTINELS} "
                "sentinels, or none"
            )
        return np.array(known, np.int32)

    def examples(
        self, record: dict[str, Any], tokenizer: Tokenizer, length: int, long: str, rng: np.random.Generator
    ) -> Iterator[Example]:
        """Windows of the text with fresh noise each time they are drawn."""
        ids = document(record["text"], tokenizer)[1:-1]
        windows = [(a, b) for a, b in split_long(ids, self.window(length), long, record["id"]) if b - a >= 2]
        lost = len(ids) - sum(stop - start for start, stop in windows)
        for i, (start, stop) in enumerate(windows):
            source, target = self.corrupt(ids[start:stop], tokenizer, rng)
            yield {
                "encoder_tokens": source,
                "tokens": np.concatenate([[tokenizer.start], target[:-1]]).astype(np.int32),
                "targets": target,
                "weights": np.ones(len(target), np.float32),
                "account": account(
                    tokens=stop - start,
                    lost=lost if i == 0 else 0,
                    truncated=float(lost > 1 and i == 0),
                    bytes=len(record["text"].encode()) * (stop - start) / len(ids),
                ),
            }

    def corrupt(self, ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The text with a sentinel for each noise span, and the sentinels each followed by its span; both with an end token."""
        noise, spans = self.spans(len(ids))
        noisy, clean = _parts(noise, spans, rng), _parts(len(ids) - noise, spans, rng)
        end = document("", tokenizer)[-1:]
        source, target, at = [], [], 0
        for sentinel, kept, hidden in zip(self.sentinels(tokenizer), clean, noisy):
            source += [ids[at : at + kept], [sentinel]]
            target += [[sentinel], ids[at + kept : at + kept + hidden]]
            at += kept + hidden
        return np.concatenate([*source, end]).astype(np.int32), np.concatenate([*target, end]).astype(np.int32)

    def row(self, row: Example, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
        """As it is."""
        return row

    def loss(self, config: ModelConfig) -> LossFn:
        """Cross-entropy over the targets."""
        return vocabulary_loss(config, self.label_smoothing, self.z_loss)


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive whole numbers that sum to `total`, all such divisions equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False) + 1) if count > 1 else np.zeros(0, int)
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(int))
