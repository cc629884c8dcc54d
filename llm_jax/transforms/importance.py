"""How much each neuron, head, layer and channel matters, read off the weights or off what a model does with calibration rows.

How many are kept, and what is made of them, is decided in `shrink.py`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import contract
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Calibration

METHODS = ("magnitude", "activation", "taylor", "random", "even")
FROM_ROWS = ("activation", "taylor")
"""methods that need a `Calibration`"""

Scores = dict[str, Array]
"""Importances under the path of what they are of: `SIDE/layers/mlp` (L, F), `SIDE/layers/attention` and `SIDE/layers/cross` (L, H),
`SIDE/layers` (L,), `dim` (D,), for each side (encoder, decoder) of the model"""

OUTGOING = {"attention": "out", "cross": "out", "mlp": "down"}
"""the weight by which each block writes to the residual stream; its rows are the outgoing weights of heads and neurons"""


def importance(config: ModelConfig, params: Params, key: Array, aux: Any, by: str) -> Scores:
    """The scores of one of `METHODS`; of `even`, which looks at nothing, they are 0.

    Raises:
        ConfigError: a method that looks at rows, and `aux` is no `Calibration`.
    """
    if by in FROM_ROWS:
        if not isinstance(aux, Calibration):
            raise ConfigError(f"by={by!r} looks at rows of text: it needs aux=Calibration(batches, loss)")
        return activation(config, params, aux) if by == "activation" else taylor(config, params, aux)
    if by == "magnitude":
        return magnitude(params)
    shapes = jax.eval_shape(magnitude, params)
    if by == "random":
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.uniform(k, x.shape) for k, (name, x) in zip(keys, sorted(shapes.items()))}
    return {name: jnp.zeros(x.shape) for name, x in shapes.items()}


def magnitude(params: Params) -> Scores:
    """The L2 norm of the outgoing weights: a neuron's row of down, a head's slice of out, both with their biases for a layer.

    Of a channel, the norm of the weights by which the layers read it.
    """
    square = jax.tree.map(lambda w: jnp.square(w.astype(jnp.float32)), params)
    return {name: jnp.sqrt(x) for name, x in _sums(square).items()}


def activation(config: ModelConfig, params: Params, calibration: Calibration) -> Scores:
    """The root mean square over tokens of the vector that a neuron or a head adds to the residual stream, |a_f down_f| or |y_h out_h|.

    Of a layer, 1 - the mean cosine of the stream before and after it: block influence (ShortGPT; Men et al. 2024, eq. 1). Of a channel,
    the root mean square of what the attention and the MLP of the layers read from it, summed over layers (as Minitron's embedding
    channels; Muralidharan et al. 2024, section 2.2). Padding does not count.
    """

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _statistics(config, params, batch)), None

    first = jax.tree.map(lambda x: x[0], calibration.batches)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda b: _statistics(config, params, b), first)
    )
    total, _ = jax.lax.scan(add, zeros, calibration.batches)
    scores: Scores = {"dim": jnp.zeros(config.dim)}
    for side, found in total.items():
        mean = {name: x / jnp.maximum(found["tokens"], 1) for name, x in found.items()}
        scores[f"{side}/layers"] = mean["layers"]
        scores["dim"] += mean["dim"]
        scores |= {f"{side}/layers/{block}": jnp.sqrt(mean[block]) for block in OUTGOING if block in mean}
    return scores | {"dim": jnp.sqrt(scores["dim"])}


def taylor(config: ModelConfig, params: Params, calibration: Calibration) -> Scores:
    """|dloss/dgate| of a gate of 1 on what is scored, the mean over batches (Michel et al. 2019, eq. 5; Molchanov et al. 2019).

    There is no gate in the model: by the product rule its derivative is the sum of gradient times weight over the outgoing weights
    that it multiplies, those of `magnitude`. The absolute value is taken batch by batch, or slice by slice where a run accumulates gradients: give
    several.
    """
    loss = calibration.loss(config)

    def mean_loss(weights: Params, batch: Any) -> Array:
        found = loss(weights, batch, None, {})
        return found.total / jnp.maximum(found.weight, 1e-9)

    def add(total: Scores, batch: Any) -> tuple[Scores, None]:
        gradient = jax.grad(mean_loss)(params, batch)
        found = _sums(jax.tree.map(lambda g, w: (g * w).astype(jnp.float32), gradient, params))
        return {name: total[name] + jnp.abs(x) for name, x in found.items()}, None

    zeros = {name: jnp.zeros(x.shape) for name, x in jax.eval_shape(_sums, params).items()}
    total, _ = jax.lax.scan(add, zeros, calibration.batches)
    count = jax.tree.leaves(calibration.batches)[0].shape[0]
    return {name: x / count for name, x in total.items()}


def best(scores: Float[Array, "... N"], count: int, by: str) -> Int[Array, "... n"]:
    """The indices of the greatest scores, ascending; by `even`, indices evenly spaced from the first to the last."""
    if by == "even":
        spaced = np.round(np.linspace(0, scores.shape[-1] - 1, count)).astype(np.int32)
        return jnp.broadcast_to(spaced, (*scores.shape[:-1], count))
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


def best_heads(
    scores: Float[Array, "L H"], config: ModelConfig, smaller: ModelConfig, by: str
) -> tuple[Int[Array, "L h"], Int[Array, "L k"]]:
    """The query heads and the key-value heads that a smaller model keeps: whole groups, else as many query heads of each group."""
    k, group = config.kv_size, config.heads // config.kv_size
    by_group = scores.reshape(-1, k, group)
    if smaller.kv_size * group == smaller.heads:
        kv = best(jnp.sum(by_group, axis=-1), smaller.kv_size, by)
        query = kv[..., None] * group + jnp.arange(group)
    else:
        kv = jnp.broadcast_to(jnp.arange(k), by_group.shape[:2])
        query = kv[..., None] * group + best(by_group, smaller.heads // k, by)
    return query.reshape(scores.shape[0], -1), kv


def stacks(params: Params) -> Iterator[tuple[str, Params]]:
    """The name of each side (encoder, decoder) that a model has, with its stacked layers."""
    for side in ("encoder", "decoder"):
        if side in params:
            yield side, params[side]["layers"]


def _sums(values: Params) -> Scores:
    """The sum of a value per weight over the outgoing weights of each neuron, head, layer and channel."""
    scores: Scores = {"dim": jnp.zeros(())}
    for side, layers in stacks(values):
        whole = jnp.zeros(())
        for block, name in OUTGOING.items():
            if block not in layers:
                continue
            each = layers[block][name]
            scores[f"{side}/layers/{block}"] = units = jnp.sum(each, axis=tuple(range(2, each.ndim)))
            whole = whole + jnp.sum(units, axis=1)
            if f"{name}_bias" in layers[block]:
                whole = whole + jnp.sum(layers[block][f"{name}_bias"], axis=1)
            for reader in ("query", "key", "value", "up", "gate"):
                if reader in layers[block]:
                    x = layers[block][reader]
                    scores["dim"] += jnp.sum(x, axis=(0, *range(2, x.ndim)))
        scores[f"{side}/layers"] = whole
    return scores


def _statistics(config: ModelConfig, params: Params, batch: Any) -> dict[str, dict[str, Array]]:
    """Of each side, the sums over tokens of what `activation` takes means of, and the number of tokens."""
    found = transformer.apply(config, params, batch, inputs=True, hidden_states=True, logits=False)
    last = "encoder" if config.architecture == "encoder" else "decoder"
    after: dict[str, Any] = {last: found.hidden_states}
    if config.architecture == "encoder-decoder":
        after["encoder"] = transformer.encode(config, params, batch, keep_hidden=True)[2].hidden
    made = {}
    for side, layers in stacks(params):
        hidden, inputs = after[side].astype(jnp.float32), found.inputs[side]["layers"]
        segments = batch.get(
            "encoder_segment_ids" if config.architecture == "encoder-decoder" and side == "encoder" else "segment_ids"
        )
        real = jnp.ones(hidden.shape[1:3]) if segments is None else (segments > 0).astype(jnp.float32)

        before = jnp.concatenate([_entry(config, layers, inputs, hidden)[None], hidden[:-1]])
        cosine = jnp.sum(before * hidden, axis=-1) / jnp.maximum(_norm(before) * _norm(hidden), 1e-30)
        sums = {"tokens": jnp.sum(real), "layers": jnp.einsum("lbs,bs->l", 1 - cosine, real)}
        reads = [
            jnp.einsum("lbsd,bs->d", jnp.square(inputs[block][name].astype(jnp.float32)), real)
            for block, name in (("attention", "query"), ("cross", "query"), ("mlp", "up"))
            if block in layers
        ]
        sums["dim"] = functools.reduce(jnp.add, reads)
        for block, name in OUTGOING.items():
            if block in layers:
                sums[block] = _contributions(inputs[block][name], layers[block][name], real)
        made[side] = sums
    return made


def _contributions(x: Array, w: Array, real: Array) -> Array:
    """sum over tokens of |x_u w_u|^2 for each unit u: neurons x (L, B, S, F), w (L, F, D), or heads x (L, B, S, H, E), w (L, H, E, D)."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if x.ndim == 4:
        return jnp.einsum("lbsf,bs->lf", jnp.square(x), real) * jnp.sum(jnp.square(w), axis=-1)
    gram = jnp.einsum("lhed,lhfd->lhef", w, w)  # |y W|^2 = y W W^T y^T: no vector of width D for each head and token
    return jnp.einsum("lbshe,lhef,lbshf,bs->lh", x, gram, x, real)


def _entry(config: ModelConfig, layers: Params, inputs: Any, hidden: Array) -> Array:
    """The residual stream before the first layer (B, S, D): with norms after the branches what its attention reads, else what is left
    of the stream after the layer when the branches are taken off."""
    if config.norm_place == "post":
        return inputs["attention"]["query"][0].astype(jnp.float32)
    x = hidden[0]
    for block, name in OUTGOING.items():
        if block in layers:
            weight = layers[block][name][0]
            x = x - contract(inputs[block][name][0], weight, over=weight.ndim - 1).astype(jnp.float32)
            if f"{name}_bias" in layers[block]:
                x = x - layers[block][f"{name}_bias"][0]
    return x


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=-1)
