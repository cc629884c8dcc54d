"""One Transformer for every family: stacks of layers, heads, and the pure functions `init` and `apply` over a plain dict of weights.

Flax names and initialises; nothing outside `models/` sees a module. The layers of a stack lie along a leading axis of every leaf. They
are scanned on accelerators, where it keeps the program small, and unrolled on CPU, where a scan costs up to a factor of two.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.models import remat
from llm_jax.models.attention import Mask
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Head, Outputs
from llm_jax.models.layers import (
    DROPOUT,
    MLP,
    Attention,
    Embedding,
    Memory,
    Norm,
    RelativeBias,
    compute_dtype,
    dropout,
    unstack,
)
from llm_jax.platform import target
from llm_jax.sharding import constrain

Params = dict[str, Any]
"""Nested dict of weights; see `axes` for the names of their axes."""


class Cache(NamedTuple):
    """What decoding keeps of the tokens it has seen: T slots a row, and the encoder's keys and values."""

    memory: tuple[Memory, ...]
    """keys and values of each layer, (B, T, K, E)"""
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    """0 in slots that hold no token"""
    offset: Int[Array, ""]
    """slot of the next token"""
    cross: tuple[Memory, ...] = ()
    cross_segments: Int[Array, "B U"] | None = None


class Block(nn.Module):
    """One layer: self-attention, cross-attention where there is an encoder, MLP; each in a residual branch with its norm."""

    config: ModelConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        seen: "Seen",
        memory: Memory | None = None,
        cross_memory: Memory | None = None,
        key: Array | None = None,
        want_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], "Kept"]:
        c = self.config
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))

        def branch(x: Array, name: str, key: Array | None, function: Callable[[Array], Array]) -> Array:
            norm = Norm(c, name=f"{name}_norm")
            if c.norm_place == "pre":
                x = x + dropout(function(norm(x)), c.dropout, key)
            else:
                x = norm(x + dropout(function(x), c.dropout, key))
            return constrain(x, "batch", "length", None)

        kept: dict[str, Any] = {}

        def attention(y: Array) -> Array:
            y, kept["memory"], kept["weights"] = Attention(c, name="attention")(
                y, y, seen.mask, seen.bias, memory, keys[0], want_weights
            )
            return y

        def cross_attention(y: Array) -> Array:
            assert seen.cross_mask is not None
            y, kept["cross"], _ = Attention(c, cross=True, name="cross")(
                y, seen.encoded, seen.cross_mask, None, cross_memory, keys[1]
            )
            return y

        x = branch(x, "attention", keys[2], attention)
        if self.cross:
            x = branch(x, "cross", keys[3], cross_attention)
        x = branch(x, "mlp", keys[4], MLP(c, name="mlp"))
        return x, Kept(kept["memory"], kept.get("cross"), x, kept["weights"])


class Seen(NamedTuple):
    """What every layer of a stack reads besides the residual stream."""

    mask: Mask
    bias: Float[Array, "B H S T"] | None = None
    encoded: Float[Array, "B U D"] | None = None
    cross_mask: Mask | None = None


class Kept(NamedTuple):
    """What a layer leaves behind."""

    memory: Memory | None
    cross: Memory | None
    hidden: Float[Array, "B S D"] | None
    weights: Float[Array, "B H S T"] | None
    inputs: Any = None
    """what each weight of a product is multiplied with, a tree like its weights"""


def _modules(config: ModelConfig) -> dict[str, Any]:
    """The modules of a config by the path of their parameters."""
    modules: dict[str, Any] = {"embed": Embedding(config)}
    for side, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        if depth:
            modules[f"{side}/layers"] = Block(
                config, cross=side == "decoder" and config.architecture == "encoder-decoder"
            )
            if config.norm_place == "pre":
                modules[f"{side}/norm"] = Norm(config)
            if config.positions == "relative":
                modules[f"{side}/relative"] = RelativeBias(config, bidirectional=side == "encoder")
    modules["head"] = Head(config)
    return modules


def _init_boxed(config: ModelConfig, key: Array) -> Params:
    """Weights in flax's boxes, which hold the names of their axes."""
    x = jnp.zeros((1, 1, config.dim))
    ids = jnp.zeros((1, 1), jnp.int32)
    mask = Mask(ids, ids, ids, ids, causal=False)
    seen = Seen(mask, encoded=x, cross_mask=mask)
    params: Params = {}
    for i, (path, module) in enumerate(_modules(config).items()):
        own = jax.random.fold_in(key, i)
        side, _, part = path.partition("/")
        if part == "layers":
            depth = config.encoder_depth if side == "encoder" else config.decoder_depth
            made = jax.vmap(lambda k, m=module: m.init(k, x, seen))(jax.random.split(own, depth))["params"]
            made = jax.tree.map(lambda box: box.replace(names=("layers", *box.names)), made, is_leaf=_is_box)
        elif part == "norm":
            made = module.init(own, x)["params"]
        elif part == "relative":
            made = module.init(own, ids, ids)["params"]
        elif side == "embed":
            example = jnp.zeros((1, config.image_size, config.image_size, 3)) if config.patch_size else ids
            positions = jnp.zeros((1, config.patches + 1), jnp.int32) if config.patch_size else ids
            made = module.init(own, example, positions, None, None)["params"]
        else:
            made = module.init(own, x, jnp.zeros((config.vocab_size, config.dim)), {}, True).get("params", {})
        if made:
            branch = params if not part else params.setdefault(side, {})
            branch[part or side] = made
    return params


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 weights of a model, a nested plain dict with stacked layers."""
    return nn.unbox(_init_boxed(config, key))


def shapes(config: ModelConfig) -> Params:
    """The shape and dtype of each weight, without making one."""
    return nn.unbox(_boxes(config.replace(remat="none")))


def axes(config: ModelConfig) -> Params:
    """The logical axis names of each weight, e.g. ("layers", "embed", "heads", "head_size") for the queries."""
    return jax.tree.map(lambda box: tuple(box.names), _boxes(config.replace(remat="none")), is_leaf=_is_box)


@functools.lru_cache(64)
def _boxes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


def depths(params: Params) -> Params:
    """How far each weight lies below the head: 0 for the head and a stack's last norm, 1 for the top layer, ..., most for the embeddings.

    What is trained beside the model and no part of it lies at 0 too. Of stacked layers an array (L, 1, ...), which goes with the leaf; an
    encoder lies below its decoder. A part of a tree will do.
    """

    def layers(side: str) -> int:
        found = jax.tree.leaves(params.get(side, {}).get("layers", {}))
        return found[0].shape[0] if found else 0

    above = {"decoder": 0, "encoder": layers("decoder")}
    deepest = layers("decoder") + layers("encoder") + 1

    def one(path: Any, leaf: Any) -> Any:
        side, part = path[0].key, path[1].key if len(path) > 1 else ""
        if side == "embed":
            return deepest
        if side not in above:
            return 0
        if part == "layers":
            count = np.arange(leaf.shape[0], 0, -1) + above[side]
            return count.reshape(-1, *(1,) * (leaf.ndim - 1))
        return above[side] + (layers(side) if part == "relative" else 0)

    return jax.tree_util.tree_map_with_path(one, params)


def unstacked(config: ModelConfig, params: Params) -> Params:
    """The params with each stack's layers as a tuple of trees: what decoding on CPU reads, so that no layer is cut out at each token."""
    sides = {
        side: {**params[side], "layers": unstack(params[side]["layers"], depth)}
        for side, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth))
        if depth
    }
    return {**params, **sides}


def _stack(
    config: ModelConfig,
    cross: bool,
    stacked: Any,
    x: Array,
    seen: Seen,
    key: Array | None,
    memory: tuple[Memory, ...] | None,
    cross_memory: tuple[Memory, ...],
    keep_hidden: bool,
    want_weights: bool,
    keep_inputs: bool,
    revision: "Revision | None" = None,
) -> tuple[Array, Any]:
    """All layers of a stack: scanned over the leading axis, or one after the other on CPU and where there is a cache."""
    module = Block(config, cross)

    def layer(x: Array, weights: Params, memory: Any, cross_memory: Any, key: Array | None) -> tuple[Array, Kept]:
        x = remat.named(x, remat.INPUT)
        rngs = {} if key is None else {DROPOUT: key}
        found = cast(Any, module.apply)(
            {"params": weights}, x, seen, memory, cross_memory, key, want_weights, rngs=rngs, mutable=["inputs"]
        )
        (x, kept), read = found
        return x, Kept(
            kept.memory if memory is not None else None,
            kept.cross if memory is not None else None,
            kept.hidden if keep_hidden else None,
            kept.weights,
            read["inputs"] if keep_inputs or revision else None,
        )

    if revision is not None:

        def revised(x: Array, weights: Params) -> tuple[Array, Params]:
            made = revision.visit(weights, layer(x, weights, None, None, None)[1].inputs)
            return layer(x, made, None, None, None)[0], made

        x, made = jax.lax.scan(revised, x, stacked)
        revision.made.append(made)
        return x, Kept(None, None, None, None)

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=remat.policy(config.remat), prevent_cse=True)
    depth = len(stacked) if isinstance(stacked, tuple) else jax.tree.leaves(stacked)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)
    if memory is None and not isinstance(stacked, tuple) and target() != "cpu":
        return jax.lax.scan(lambda x, each: layer(x, each[0], None, None, each[1]), x, (stacked, keys))
    kept: list[Any] = []
    for i, weights in enumerate(stacked if isinstance(stacked, tuple) else unstack(stacked, depth)):
        x, one = layer(
            x,
            weights,
            memory[i] if memory else None,
            cross_memory[i] if cross_memory else None,
            None if keys is None else keys[i],
        )
        kept.append(one)
    if memory is not None:
        return x, Kept(cast(Any, tuple(k.memory for k in kept)), cast(Any, tuple(k.cross for k in kept)), None, None)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def _run(
    config: ModelConfig,
    side: str,
    params: Params,
    tokens: Array,
    positions: Array,
    mask: Mask,
    types: Array | None,
    key: Array | None,
    encoded: Array | None = None,
    cross_mask: Mask | None = None,
    memory: Any = None,
    cross_memory: Any = (),
    keep_hidden: bool = False,
    want_weights: bool = False,
    keep_inputs: bool = False,
) -> tuple[Array, Any]:
    """Embedding, stack and last norm of one side."""
    modules = _modules(config)
    first, rest, last = (None, None, None) if key is None else jax.random.split(key, 3)
    x = modules["embed"].apply({"params": params["embed"]}, tokens, positions, types, first)
    bias = None
    if config.positions == "relative":
        bias = modules[f"{side}/relative"].apply(
            {"params": params[side]["relative"]}, mask.query_positions, mask.key_positions
        )
    x, kept = _stack(
        config,
        modules[f"{side}/layers"].cross,
        params[side]["layers"],
        x,
        Seen(mask, bias, encoded, cross_mask),
        rest,
        memory,
        cross_memory,
        keep_hidden,
        want_weights,
        keep_inputs,
        revision if (revision := _REVISION.get()) is not None and revision.side == side else None,
    )
    if config.norm_place == "pre":
        x = modules[f"{side}/norm"].apply({"params": params[side]["norm"]}, x)
        if config.architecture == "encoder-decoder":
            x = dropout(
                x, config.dropout, last
            )  # as T5 does after its last norm; 'Attention is all you need' has none there
    return x, kept


def _stream(batch: dict[str, Array], prefix: str = "") -> tuple[Array, Array, Array]:
    """Tokens, positions and segments of a stream; a row without them is one example from position 0."""
    tokens = batch[f"{prefix}tokens"]
    positions = batch.get(f"{prefix}positions")
    segments = batch.get(f"{prefix}segment_ids")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return tokens, positions, jnp.ones_like(tokens) if segments is None else segments


def encode(
    config: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    key: Array | None = None,
    keep_hidden: bool = False,
    want_weights: bool = False,
    keep_inputs: bool = False,
) -> tuple[Array, Array, Any]:
    """The encoder's last hidden state (B, U, D), its segments (B, U) and what was asked to be kept."""
    if config.patch_size:
        tokens = batch["images"]
        segments = jnp.ones((tokens.shape[0], config.patches + 1), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(config.patches + 1), segments.shape)
    else:
        tokens, positions, segments = _stream(batch, "encoder_" if config.architecture == "encoder-decoder" else "")
    mask = Mask(segments, segments, positions, positions, causal=False)
    x, kept = _run(
        config,
        "encoder",
        params,
        tokens,
        positions,
        mask,
        batch.get("types"),
        key,
        keep_hidden=keep_hidden,
        want_weights=want_weights,
        keep_inputs=keep_inputs,
    )
    return x, segments, kept


_REQUESTED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("requested", default=frozenset())


@contextlib.contextmanager
def requested(*outputs: str) -> Iterator[None]:
    """`apply`, called or traced in here, gives these outputs too: hidden_states, attentions.

    For what adds terms to a loss: the loss calls `apply` itself, and there is to be one forward pass.
    """
    token = _REQUESTED.set(_REQUESTED.get() | frozenset(outputs))
    try:
        yield
    finally:
        _REQUESTED.reset(token)


_WATCHED: contextvars.ContextVar[list[ModelConfig] | None] = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[ModelConfig]]:
    """The configs of the models that `apply`, traced in here, is called with, in turn: a loss does not tell of which model it is."""
    found: list[ModelConfig] = []
    token = _WATCHED.set(found)
    try:
        yield found
    finally:
        _WATCHED.reset(token)


class Revision(NamedTuple):
    """New weights for each layer of a stack, made while a batch passes through it."""

    side: str
    visit: Callable[[Params, Params], Params]
    made: list[Params]


_REVISION: contextvars.ContextVar[Revision | None] = contextvars.ContextVar("revision", default=None)


def revise(
    config: ModelConfig, params: Params, batch: dict[str, Array], side: str, visit: Callable[[Params, Params], Params]
) -> Params:
    """The params with each layer of a stack replaced in turn, the first one first, in two passes of the batch through each layer.

    Args:
        side: encoder or decoder.
        visit: from the weights of a layer, and what each of its products is multiplied with, (B, S, ...) under the path of the weight, when
            the layers below it are replaced already, to its new weights, of the same shapes.
    """
    revision = Revision(side, visit, [])
    token = _REVISION.set(revision)
    try:
        apply(config, params, batch, logits=False)
    finally:
        _REVISION.reset(token)
    return {**params, side: {**params[side], "layers": revision.made[0]}}


def apply(
    config: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    *,
    key: Array | None = None,
    cache: Cache | None = None,
    logits: bool = True,
    hidden_states: bool = False,
    attentions: bool = False,
    inputs: bool = False,
) -> Outputs:
    """One forward pass.

    batch holds `tokens` (B, S), or `images`, and optionally `positions`, `segment_ids`, `types` (B, S) and `predict` (B, M), the positions
    whose logits are wanted; an encoder-decoder reads `encoder_tokens` (B, U) likewise. With a key there is dropout. With a cache the
    S tokens are new ones, and the outputs hold the cache with them in it. `logits=False` leaves the product with the unembedding out.
    """
    hidden_states, attentions = (
        asked or name in _REQUESTED.get()
        for name, asked in (("hidden_states", hidden_states), ("attentions", attentions))
    )
    if (calls := _WATCHED.get()) is not None:
        calls.append(config)
    keys: Any = (None, None, None) if key is None else jax.random.split(key, 3)
    new_cache, read = None, {}
    if config.architecture == "encoder":
        x, segments, kept = encode(config, params, batch, keys[0], hidden_states, attentions, inputs)
        read["encoder"] = {"layers": kept.inputs}
    else:
        tokens, positions, segments = _stream(batch)
        encoded, cross_segments, cross_mask = None, None, None
        if cache is not None:
            cross_segments = cache.cross_segments
        elif config.architecture == "encoder-decoder":
            encoded, cross_segments, below = encode(config, params, batch, keys[0], keep_inputs=inputs)
            read["encoder"] = {"layers": below.inputs}
        if cross_segments is not None:
            zeros = jnp.zeros_like(cross_segments)
            cross_mask = Mask(segments, cross_segments, positions, zeros, causal=False, aligned=False)
        mask, memory = Mask(segments, segments, positions, positions, causal=True), None
        if cache is not None:
            cache = cache._replace(
                positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.offset, axis=1),
                segments=jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.offset, axis=1),
            )
            memory = cache.memory
            mask = Mask(
                segments, cache.segments, positions, cache.positions, causal=True, offset=cache.offset, aligned=False
            )
        x, kept = _run(
            config,
            "decoder",
            params,
            tokens,
            positions,
            mask,
            batch.get("types"),
            keys[1],
            encoded,
            cross_mask,
            memory,
            cache.cross if cache is not None else (),
            hidden_states,
            attentions,
            inputs,
        )
        read["decoder"] = {"layers": kept.inputs}
        if cache is not None:
            new_cache = cache._replace(memory=kept.memory, offset=cache.offset + tokens.shape[1])
    table = params["embed"].get("tokens")
    out = cast(Any, Head(config).apply)(
        {"params": params.get("head", {})},
        x,
        table,
        {"segments": segments, "predict": batch.get("predict")},
        logits,
        keys[2],
    )
    return out._replace(
        hidden_states=kept.hidden if hidden_states else None,
        attentions=kept.weights if attentions else None,
        inputs=read if inputs else None,
        cache=new_cache,
    )


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache of T = slots slots a row that has seen nothing."""
    shape = (rows, slots, config.kv_size, config.head_size)
    dtype = compute_dtype(config)
    memory = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.decoder_depth))
    return Cache(
        memory, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32)
    )


def cross_cache(config: ModelConfig, params: Params, batch: dict[str, Array], cache: Cache) -> Cache:
    """The cache with the keys and values of the encoder's output for each layer of the decoder."""
    encoded, segments, _ = encode(config, params, batch)
    stacked = params["decoder"]["layers"]
    each = stacked if isinstance(stacked, tuple) else unstack(stacked, config.decoder_depth)
    attention = Attention(config, cross=True)
    cross = tuple(
        cast(Any, attention.apply)({"params": weights["cross"]}, encoded, method="keys_and_values") for weights in each
    )
    return cache._replace(cross=cross, cross_segments=segments)
