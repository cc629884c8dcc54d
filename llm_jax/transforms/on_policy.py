"""On-policy training: the rows that a loss reads are continued by the model itself, so that it learns where its own text leads it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.errors import ConfigError
from llm_jax.generation import Sampling, choose_token
from llm_jax.losses import Loss, LossFn
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.transforms.base import IDENTITY, Transform

READ = ("tokens", "targets", "weights", "segment_ids", "positions")
"""What a row is made of"""


def on_policy(share: float = 0.5, *, prompt: int, temperature: float = 1.0, end: int = -1) -> Transform:
    """loss(batch) becomes, with probability `share` a step, loss(sampled(batch)): all but the first `prompt` tokens are the model's own.

    Beside `distil(teacher, task=0.0, divergence="reverse_kl")` in a chain it is on-policy distillation: the student samples, the teacher scores
    (GKD; Agarwal et al. 2023, algorithm 1). The text is sampled with the step's key, without dropout, and no gradient goes through it; of evaluation
    nothing changes. A `distil` or `anchor` reads these rows in whichever order they stand (`Loss.rows`).

    Args:
        share: of the steps whose rows are sampled (lambda of GKD); 0 for the identity.
        prompt: tokens of each row that are kept. Where rows are packed, the segment that the last of them belongs to goes on.
        temperature: of sampling.
        end: id of the token with which a text ends; what would follow it has no weight. -1 for none: texts go on to the end of the row.

    Raises:
        ConfigError: an argument out of range; when the loss is traced, a model that is no decoder, rows no longer than the prompt.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"on_policy: share is {share}: it must lie in [0, 1]")
    if prompt < 1:
        raise ConfigError(f"on_policy: prompt is {prompt}: it must be at least 1")
    if not temperature > 0:
        raise ConfigError(f"on_policy: temperature is {temperature}: it must be above 0")
    if not share:
        return IDENTITY

    def loss(inner: LossFn) -> LossFn:
        def made(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
            if key is None:
                return inner(params, batch, key, reference)
            with transformer.watched() as configs:
                jax.eval_shape(inner, params, batch, key, reference)
            rows = _rows(configs[0], batch, prompt)
            choose, draw, rest = jax.random.split(key, 3)
            rows = jax.lax.cond(
                jax.random.uniform(choose) < share,
                lambda rows: sampled(configs[0], params, rows, draw, prompt, temperature, end),
                lambda rows: rows,
                rows,
            )
            return inner(params, rows, rest, reference)._replace(rows=rows)

        return made

    told = "".join(
        f", {name}={x!r}" for name, x, usual in (("temperature", temperature, 1.0), ("end", end, -1)) if x != usual
    )
    return Transform(loss=loss, label=f"on_policy({share}, prompt={prompt}{told})")


def _rows(config: ModelConfig, batch: Mapping[str, Array], prompt: int) -> dict[str, Array]:
    """The batch as a decoder reads it. Raises ConfigError for rows of another kind."""
    if config.architecture != "decoder":
        raise ConfigError(f"on_policy: an {config.architecture} does not continue a text: it needs a decoder")
    if other := sorted(set(batch) - set(READ)):
        raise ConfigError(f"on_policy: the rows hold {other[0]}, which does not go with text that is sampled")
    length = batch["tokens"].shape[1]
    if prompt >= length:
        raise ConfigError(f"on_policy: prompt is {prompt}, and a row has {length} tokens: nothing is left to sample")
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), batch["tokens"].shape)
    return {"segment_ids": jnp.ones_like(index), "positions": index, **batch}


def sampled(
    config: ModelConfig,
    params: Any,
    batch: Mapping[str, Array],
    key: Array,
    prompt: int,
    temperature: float = 1.0,
    end: int = -1,
) -> dict[str, Array]:
    """The rows (B, S) with their first P = `prompt` tokens and, after these, what the model says; its own tokens alone are targets with a weight.

    With a key-value cache: one pass over the prompts, then one for each token.
    """
    params = jax.lax.stop_gradient(params)
    tokens, segments, positions = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    rows, length = tokens.shape
    settings, segment, last = Sampling(temperature=temperature), segments[:, prompt - 1], positions[:, prompt - 1]
    seen = jnp.zeros((rows, 1), bool)  # read by a repetition penalty alone

    def read(cache: Any, **stream: Array) -> tuple[Any, Array]:
        predict = jnp.full((rows, 1), stream["tokens"].shape[1] - 1)
        found = transformer.apply(config, params, {**stream, "predict": predict}, cache=cache)
        assert found.logits is not None
        return found.cache, found.logits[:, 0]

    def one(carry: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], Array]:
        cache, logits = carry
        token = choose_token(logits, seen, settings, key, i)
        here = {"positions": (last + 1 + i)[:, None], "segment_ids": segment[:, None]}
        return read(cache, tokens=token[:, None], **here), token

    known = {name: batch[name][:, :prompt] for name in ("tokens", "segment_ids", "positions")}
    begun = read(transformer.empty_cache(config, rows, length), **known)
    (_, logits), made = jax.lax.scan(one, begun, jnp.arange(length - prompt))
    final = choose_token(logits, seen, settings, key, jnp.asarray(length - prompt))
    said = jnp.concatenate([made.T, final[:, None]], axis=1)

    ended = jnp.cumsum(said == end, axis=1) - (said == end) > 0  # after an end, not at it
    alive = ~ended & (segment > 0)[:, None]
    inside = alive[:, 1:] & (said[:, :-1] != end)
    new = jnp.broadcast_to(segment[:, None], inside.shape)
    ahead = last[:, None] + 1 + jnp.arange(length - prompt)
    return {
        "tokens": jnp.concatenate([tokens[:, :prompt], said[:, :-1]], axis=1).astype(tokens.dtype),
        "targets": jnp.concatenate([batch["targets"][:, : prompt - 1], said], axis=1).astype(batch["targets"].dtype),
        "weights": jnp.pad(alive, ((0, 0), (prompt - 1, 0))).astype(batch["weights"].dtype),
        "segment_ids": jnp.concatenate([segments[:, :prompt], jnp.where(inside, new, 0)], axis=1).astype(
            segments.dtype
        ),
        "positions": jnp.concatenate([positions[:, :prompt], ahead], axis=1).astype(positions.dtype),
    }
