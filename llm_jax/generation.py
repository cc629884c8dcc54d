"""Text from a model: a cache of keys and values, batched rows of any length, and the usual ways to choose the next token.

A row's text depends on its prompt, the seed and its number in the batch, not on the other rows. Beam search and dialogue are elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Cache
from llm_jax.platform import fetch, target


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits: penalty, temperature, then top-k, top-p and min-p, in this order."""

    temperature: float = 0.0
    """0 takes the most probable token"""
    top_k: int = 0
    """keep the k most probable tokens; 0 for all"""
    top_p: float = 1.0
    """keep the fewest tokens whose probabilities reach p (Holtzman et al. 2019)"""
    min_p: float = 0.0
    """keep tokens at least this share as probable as the most probable one (Nguyen et al. 2024)"""
    repetition_penalty: float = 1.0
    """divide positive and multiply negative logits of tokens seen before (CTRL, section 4.1)"""

    def __post_init__(self):
        if (
            self.temperature < 0
            or self.top_k < 0
            or not 0 < self.top_p <= 1
            or not 0 <= self.min_p <= 1
            or self.repetition_penalty <= 0
        ):
            raise UserError(
                f"bad sampling: {self}: temperature and top_k at least 0, top_p in (0, 1], min_p in [0, 1], repetition_penalty above 0"
            )


class _Going(NamedTuple):
    """Rows under way."""

    cache: Cache
    logits: Float[Array, "B V"]
    positions: Int[Array, "B"]
    """of the next token"""
    seen: Bool[Array, "B V"]
    done: Bool[Array, "B"]
    step: Int[Array, ""]


def filter_logits(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits after penalty and temperature, with -inf for tokens that top-k, top-p or min-p leave out."""
    if sampling.repetition_penalty != 1:
        punished = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, punished, logits)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ordered = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        before = jnp.cumsum(ordered, axis=-1) - ordered
        keep = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < sampling.top_p, axis=-1, inplace=False)
        logits = jnp.where(keep, logits, -jnp.inf)
    if sampling.min_p:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def choose_token(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling, key: Array, step: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of each row: the most probable, or drawn with a key of the row and the step."""
    logits = filter_logits(logits, seen, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefill(config: ModelConfig, params: Any, batch: dict[str, Array], slots: int) -> _Going:
    """Read the prompts: tokens (B, P) with lengths (B,), and the encoder's input where there is one."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    rows, width = tokens.shape
    index = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    segments = (index < lengths[:, None]).astype(jnp.int32)
    cache = transformer.empty_cache(config, rows, slots)
    if "encoder_tokens" in batch:
        cache = transformer.cross_cache(config, params, batch, cache)
    outputs = transformer.apply(
        config,
        params,
        {"tokens": tokens, "positions": index, "segment_ids": segments, "predict": lengths[:, None] - 1},
        cache=cache,
    )
    assert outputs.logits is not None
    seen = jnp.zeros((rows, config.vocab_size), bool).at[jnp.arange(rows)[:, None], tokens].max(segments > 0)
    return _Going(outputs.cache, outputs.logits[:, 0], lengths, seen, jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 6), donate_argnums=2)
def _decode(
    config: ModelConfig, params: Any, going: _Going, sampling: Sampling, key: Array, count: int, known: int, end: Array
) -> tuple[_Going, Array]:
    """Up to `count` more tokens below `known` of each row, (count, B); rows that are done repeat `end`."""
    rows = going.done.shape[0]
    named = jnp.arange(config.vocab_size) < known

    def one(carry: tuple[_Going, Array, Array]) -> tuple[_Going, Array, Array]:
        going, made, i = carry
        token = jnp.where(
            going.done,
            end,
            choose_token(jnp.where(named, going.logits, -jnp.inf), going.seen, sampling, key, going.step),
        )
        done = going.done | (token == end)
        outputs = transformer.apply(
            config, params, {"tokens": token[:, None], "positions": going.positions[:, None]}, cache=going.cache
        )
        assert outputs.logits is not None
        seen = going.seen.at[jnp.arange(rows), token].set(True)
        return (
            _Going(outputs.cache, outputs.logits[:, 0], going.positions + 1, seen, done, going.step + 1),
            made.at[i].set(token),
            i + 1,
        )

    made = jnp.full((count, rows), end, jnp.int32)
    going, made, _ = jax.lax.while_loop(
        lambda c: (c[2] < count) & ~jnp.all(c[0].done), one, (going, made, jnp.zeros((), jnp.int32))
    )
    return going, made


def _padded(rows: Sequence[np.ndarray], multiple: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Rows side by side, filled with 0 to a common length that few values are taken by, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    wide = np.zeros((len(rows), -(-int(lengths.max()) // multiple) * multiple), np.int32)
    for to, row in zip(wide, rows):
        to[: len(row)] = row
    return wide, lengths


def _prompts(config: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], end: int) -> dict[str, np.ndarray]:
    """The batch that `_prefill` reads; a text begins and a source ends as in training."""
    begin = tokenizer.begin
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if config.architecture == "encoder-decoder":
        wide, lengths = _padded([np.concatenate([row, [] if end < 0 else [end]]) for row in rows])
        return {
            "tokens": np.full((len(rows), 1), tokenizer.start, np.int32),
            "lengths": np.ones(len(rows), np.int32),
            "encoder_tokens": wide,
            "encoder_segment_ids": (np.arange(wide.shape[1]) < lengths[:, None]).astype(np.int32),
        }
    rows = [row if begin is None else np.concatenate([[begin], row]) for row in rows]
    if any(len(row) == 0 for row in rows):
        raise UserError("an empty prompt needs a tokenizer with a begin token")
    wide, lengths = _padded(rows)
    return {"tokens": wide, "lengths": lengths}


def stream(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    seed: int = 0,
    chunk: int = 8,
) -> Iterator[list[str]]:
    """The texts so far of each prompt, again after each `chunk` tokens; each begins with the one before it.

    Text that may still turn into a stop string, or into another character, is held back until it is settled.

    Raises:
        UserError: an encoder, no prompt, or more positions than the model has.
    """
    if config.architecture == "encoder" or config.head != "lm":
        raise UserError(
            f"a model of architecture {config.architecture!r} with head {config.head!r} cannot generate: it needs a decoder with head 'lm'"
        )
    if not prompts:
        raise UserError("no prompt to continue")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    end = next((i for i in (tokenizer.eos, tokenizer.sep) if i is not None), -1)
    batch = _prompts(config, tokenizer, prompts, end)
    longest = max(
        int(batch["lengths"].max()) + max_new_tokens, int(np.sum(batch.get("encoder_segment_ids", 0), axis=-1).max())
    )
    if longest > config.max_length and config.positions == "learned":
        raise UserError(
            f"prompt and continuation take {longest} positions, the model has {config.max_length}: shorten one of them"
        )
    if target() == "cpu":
        params = transformer.unstacked(config, params)
    chunk = min(chunk, max_new_tokens)
    chunks = -(-max_new_tokens // chunk)
    going = _prefill(config, params, batch, batch["tokens"].shape[1] + chunks * chunk)
    key = jax.random.key(seed)
    made = np.zeros((0, len(prompts)), np.int32)
    stopped = [False] * len(prompts)
    texts = [""] * len(prompts)
    for i in range(chunks):
        going, more = _decode(config, params, going, sampling, key, chunk, tokenizer.vocab_size, jnp.int32(end))
        made = np.concatenate([made, fetch(more)])[:max_new_tokens]
        last = i + 1 == chunks or bool(np.all(fetch(going.done)))
        for row in range(len(prompts)):
            if not stopped[row]:
                ids = made[:, row]
                ids = ids[: int(np.argmax(ids == end))] if (ids == end).any() else ids
                after = [] if "encoder_tokens" in batch else batch["tokens"][row, : batch["lengths"][row]].tolist()
                text = tokenizer.continuation(ids.tolist(), after)
                texts[row], stopped[row] = _settled(text, stop, last or bool(going.done[row]))
        yield list(texts)
        if last or all(stopped):
            return
        if any(stopped):
            going = going._replace(done=going.done | jnp.array(stopped))


def _settled(text: str, stop: Sequence[str], last: bool) -> tuple[str, bool]:
    """The part of a text that further tokens cannot change, and whether a stop string ends it."""
    at = min((text.index(s) for s in stop if s and s in text), default=None)
    if at is not None:
        return text[:at], True
    if last:
        return text, False
    keep = len(text.rstrip("\ufffd"))
    for s in stop:
        keep = min(
            keep, next((len(text) - n for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n])), keep)
        )
    return text[:keep], False


def generate(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
    **sampling: Any,
) -> list[str]:
    """The continuation of each prompt, without it. `on_text(row, more)` is called with each piece of text as it is settled.

    Args:
        sampling: the fields of `Sampling`, e.g. temperature=0.8, top_p=0.95; greedy without them.
    """
    texts = [""] * len(prompts)
    for now in stream(
        config,
        params,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**sampling),
        stop=stop,
        seed=seed,
        chunk=4 if on_text else 32,
    ):
        if on_text:
            for row, (old, new) in enumerate(zip(texts, now)):
                if len(new) > len(old):
                    on_text(row, new[len(old) :])
        texts = now
    return texts
