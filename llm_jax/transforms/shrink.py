"""Structured shrinking: neurons, heads, layers and channels leave a model, and what is left is a smaller dense model.

What each of them is worth is read off in `importance.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llm_jax import tree
from llm_jax.errors import ConfigError, choose
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Transform, marked, removed, take
from llm_jax.transforms.importance import FROM_ROWS, METHODS, OUTGOING, best, best_heads, importance, stacks
from llm_jax.transforms.prune import keep_zeros

Size = float | int | None
"""The share kept (a float in (0, 1]), the number kept (an int), or None for all"""

Kept = dict[str, Int[Array, "..."]]
"""The indices that stay, ascending, under a path; one without an entry stays whole. `SIDE/layers` (n,), `SIDE/layers/mlp` (n, F),
`SIDE/layers/attention/heads` (n, H) and `/kv` (n, K), likewise `cross`, and `dim` (D,)"""


def shrink(
    *,
    mlp: Size = None,
    heads: Size = None,
    layers: Size | Sequence[int] = None,
    decoder_layers: Size | Sequence[int] = None,
    dim: Size = None,
    by: str = "magnitude",
    multiple: int = 1,
    batches: int = 8,
) -> Transform:
    """The model without its least important neurons, heads, layers and channels: smaller weights, no masks, a config of its own.

    Each of the first five is a share (0.5 keeps half, 1.0 all), a number (1 keeps one) or None. All are chosen by the importances of
    the whole model. Everything kept is bit for bit as it was, and what contributed nothing is not missed, but two cases change what
    is kept: a layer with its norm after the branch (BERT) is missed even where its branches are zero, and with fewer channels every
    norm divides by the root mean square of those that are left.

    Args:
        mlp: neurons of each MLP. Every layer keeps as many, its own most important ones.
        heads: query heads of each attention, self- and cross-. Where key-value heads are shared, whole groups go if the number kept
            is a multiple of the group, else as many query heads of each group if it is a multiple of the groups; a share is rounded
            to the nearest such number. Every layer keeps its own heads, but with relative positions, whose table the layers of a stack
            share, all layers keep the same ones, by the sum of their importances.
        layers: layers of the one stack, or of the encoder in an encoder-decoder; also a tuple of the indices kept.
        decoder_layers: the same of the decoder in an encoder-decoder.
        dim: channels of the residual stream; heads keep their size. The outputs of a pooler and of the dense layer of a masked-token
            head lose the same indices. Tokens scaled by sqrt(D) are multiplied by sqrt(D / D') so that they enter as before. Logits
            that are tied to them, and those scaled by 1/sqrt(D), thereby grow by sqrt(D / D') a channel, which makes up for the fewer
            channels. Sinusoidal positions become those of the new width.
        by: magnitude, activation, taylor (see `importance.py`), random, or even: evenly spaced, as DistilBERT took its layers.
        multiple: the numbers that shares of mlp and dim come to are rounded to multiples of it, as suits the hardware.
        batches: batches of calibration rows, for activation and taylor, in slices where the run accumulates gradients.

    Raises:
        ConfigError: nothing to shrink, a share or a number out of range or not allowed by the model's sizes, or a model with LoRA.

    >>> shrink(mlp=0.5, heads=4).config(ModelConfig(dim=64, heads=8)).head_dim
    8
    """
    asked = _Asked("shrink", mlp, heads, layers, decoder_layers, dim, by, multiple, batches)

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        smaller = asked.config(config)
        if smaller == config:
            return params
        made = _take(config, params, asked.kept(config, params, key, aux))
        if config.embedding_scale and smaller.dim < config.dim:
            tokens = made["embed"]["tokens"] * math.sqrt(config.dim / smaller.dim)
            made = {**made, "embed": {**made["embed"], "tokens": tokens.astype(made["embed"]["tokens"].dtype)}}
        return made

    return Transform(config=asked.config, params=params, label=asked.label, calibration=asked.calibration)


def silence(
    *,
    mlp: Size = None,
    heads: Size = None,
    layers: Size | Sequence[int] = None,
    decoder_layers: Size | Sequence[int] = None,
    by: str = "magnitude",
    multiple: int = 1,
    batches: int = 8,
) -> Transform:
    """The model of the same sizes in which all that `shrink` with these arguments would remove adds 0 to the residual stream.

    The outgoing weights of neurons and heads are set to 0, with their biases those of layers, and the update keeps them there as that of
    `prune` does. `shrink` by magnitude, at once or after training, then removes exactly these and keeps the function, layers with their norm
    after the branch excepted. Channels are not silenced: the norms would still count them. Arguments and errors as of `shrink`.
    """
    asked = _Asked("silence", mlp, heads, layers, decoder_layers, None, by, multiple, batches)

    def config(config: ModelConfig) -> ModelConfig:
        asked.config(config)  # for its errors
        return config

    def params(config: ModelConfig, params: Params, key: Array, aux: Any) -> Params:
        if asked.config(config) == config:
            return params
        return _zero(params, asked.kept(config, params, key, aux), asked.biases)

    masks = asked.silenced
    if not masks:
        return Transform(config=config, params=params, label=asked.label)
    return keep_zeros(masks)._replace(config=config, params=params, label=asked.label, calibration=asked.calibration)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The arguments of `shrink` or `silence`, checked, and what they mean for a model."""

    name: str
    mlp: Size
    heads: Size
    layers: Size | Sequence[int]
    decoder_layers: Size | Sequence[int]
    dim: Size
    by: str
    multiple: int
    batches: int

    def __post_init__(self):
        choose("importance", self.by, METHODS)
        sizes = {name: getattr(self, name) for name in ("mlp", "heads", "layers", "decoder_layers", "dim")}
        if all(value is None for value in sizes.values()):
            raise ConfigError(
                f"{self.name}: nothing is asked for: give {', '.join(sizes)}, each a share or a number to keep"
            )
        for name, value in sizes.items():
            if name.endswith("layers") and isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
                if not value or any(type(i) is not int or i < 0 for i in value) or list(value) != sorted(set(value)):
                    raise ConfigError(f"{self.name}: {name} is {value}: indices to keep are ascending, from 0")
            elif not (value is None or (type(value) is float and 0 < value <= 1) or (type(value) is int and value > 0)):
                raise ConfigError(
                    f"{self.name}: {name} is {value!r}: it must be a share to keep, a float in (0, 1], or a number, an int above 0"
                )
        for name in ("multiple", "batches"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{self.name}: {name} is {getattr(self, name)!r}: it must be at least 1")

    @property
    def label(self) -> str:
        """The call."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        idle = {"multiple": 1, "batches": 8} | ({} if self.calibration else {"batches": self.batches})
        given = (f"{name}={value!r}" for name, value in told.items() if value is not None and idle.get(name) != value)
        return f"{self.name}({', '.join(given)})"

    @property
    def calibration(self) -> int:
        """Batches of rows that the choice looks at."""
        chosen = (self.mlp, self.heads, self.layers, self.decoder_layers, self.dim)
        return self.batches if self.by in FROM_ROWS and any(type(size) in (int, float) for size in chosen) else 0

    @property
    def biases(self) -> bool:
        """Whether layers go, and so the biases of what they write."""
        return any(map(_less, (self.layers, self.decoder_layers)))

    @property
    def silenced(self) -> tuple[str, ...]:
        """The weights, as regexes, in which zeros stand for what goes; empty where everything stays."""
        bias = "(_bias)?" if self.biases else ""
        asked = {"(attention|cross)/out": self.heads, "mlp/down": self.mlp}
        return tuple(f".*/layers/{name}{bias}" for name, size in asked.items() if self.biases or _less(size))

    def number(self, what: str, wanted: Size, size: int, multiple: int = 1) -> int:
        """How many of `size` stay."""
        if wanted is None or (type(wanted) is float and wanted == 1):
            return size
        if type(wanted) is float:
            return self.fewer(what, min(size, max(1, round(wanted * size / multiple)) * multiple), size)
        if wanted > size:
            raise ConfigError(f"{self.name}: {what} is {wanted}, but the model has {size}: shrinking adds none")
        return int(wanted)

    def fewer(self, what: str, count: int, size: int) -> int:
        """The number, which a share below 1 came to. Raises ConfigError where that is all there are."""
        if count == size:
            raise ConfigError(
                f"{self.name}: {what} is {getattr(self, what)}, which keeps all {size}: give a smaller share"
            )
        return count

    def depth(self, side: str, config: ModelConfig) -> int:
        """How many layers of a side stay."""
        first = side == "encoder" or config.architecture != "encoder-decoder"
        wanted = self.layers if first else self.decoder_layers
        what = "layers" if first else "decoder_layers"
        size = config.encoder_depth if side == "encoder" else config.decoder_depth
        if not isinstance(wanted, tuple):
            return self.number(what, wanted, size)  # type: ignore[arg-type]
        if wanted[-1] >= size:
            raise ConfigError(f"{self.name}: {what} is {wanted}, but the last of {size} layers is {size - 1}")
        return len(wanted)

    def groups(self, config: ModelConfig) -> tuple[int, int]:
        """How many query heads and how many key-value heads stay."""
        h, k = config.heads, config.kv_size
        allowed = [n for n in range(1, h + 1) if n % (h // k) == 0 or n % k == 0]
        if isinstance(self.heads, float):
            wanted = self.heads * h
            n = min(allowed, key=lambda n: abs(n - wanted))
            if self.heads < 1:
                self.fewer("heads", n, h)
        else:
            n = self.number("heads", self.heads, h)
        if n not in allowed:
            raise ConfigError(
                f"{self.name}: heads is {n}, but {h} query heads share {k} key-value heads: of them "
                f"{', '.join(map(str, allowed[:-1]))} can be kept, whole groups or as many of each"
            )
        return n, n * k // h if n % (h // k) == 0 else k

    def config(self, config: ModelConfig) -> ModelConfig:
        """The sizes of what stays; what followed from sizes that change is stated."""
        if config.lora_rank:
            raise ConfigError(
                f"{self.name}: the weights have factors of low rank beside them: chain(merge_lora(), {self.name}(...))"
            )
        if self.decoder_layers is not None and config.architecture != "encoder-decoder":
            raise ConfigError(
                f"{self.name}: decoder_layers is for an encoder-decoder; layers are those of this {config.architecture}"
            )
        changes: dict[str, Any] = {}
        even = config.positions.startswith("sinusoidal")
        dim = self.number("dim", self.dim, config.dim, math.lcm(self.multiple, 2) if even else self.multiple)
        mlp = self.number("mlp", self.mlp, config.mlp_size, self.multiple)
        heads, kv_heads = self.groups(config)
        if dim != config.dim or mlp != config.mlp_size:
            changes |= {"dim": dim, "mlp_dim": mlp}
        if dim != config.dim or heads != config.heads:
            changes |= {"heads": heads, "kv_heads": kv_heads if config.kv_heads else 0, "head_dim": config.head_size}
        depths = [self.depth(side, config) for side in ("encoder", "decoder") if _depth(config, side)]
        if depths[0] != config.layers or depths[-1] != (config.decoder_depth or config.layers):
            changes |= {"layers": depths[0]} | ({"decoder_layers": depths[1]} if len(depths) > 1 else {})
        return config.replace(**changes)

    def kept(self, config: ModelConfig, params: Params, key: Array, aux: Any) -> Kept:
        """Which neurons, heads, layers and channels stay."""
        smaller = self.config(config)
        scores = importance(
            config, params, key, aux, self.by if self.calibration or self.by not in FROM_ROWS else "even"
        )
        kept: Kept = {}
        for side, layers in stacks(params):
            path = f"{side}/layers"
            rows: Any = slice(None)
            listed = (
                self.layers if side == "encoder" or config.architecture != "encoder-decoder" else self.decoder_layers
            )
            if _depth(smaller, side) < _depth(config, side):
                if isinstance(listed, tuple):
                    kept[path] = rows = jnp.array(listed)
                else:
                    kept[path] = rows = best(scores[path], _depth(smaller, side), self.by)
            if smaller.mlp_size < config.mlp_size:
                kept[f"{path}/mlp"] = best(scores[f"{path}/mlp"][rows], smaller.mlp_size, self.by)
            for block in ("attention", "cross") if smaller.heads < config.heads else ():
                if block in layers:
                    own = scores[f"{path}/{block}"][rows]
                    if block == "attention" and config.positions == "relative":
                        own = jnp.broadcast_to(jnp.sum(own, axis=0), own.shape)
                    query, kv = best_heads(own, config, smaller, self.by)
                    kept |= {f"{path}/{block}/heads": query, f"{path}/{block}/kv": kv}
        if smaller.dim < config.dim:
            kept["dim"] = best(scores["dim"], smaller.dim, self.by)
        return kept


def _less(size: Size | Sequence[int]) -> bool:
    """Whether a size asks for less than all, as far as it tells without a model."""
    return size is not None and not (type(size) is float and size == 1)


def _depth(config: ModelConfig, side: str) -> int:
    return config.encoder_depth if side == "encoder" else config.decoder_depth


def _take(config: ModelConfig, params: Params, kept: Kept) -> Params:
    """What stays of each weight, found by the names of its axes."""

    def one(path: str, x: Array, names: tuple[str, ...]) -> Array:
        parts = path.split("/")
        stack, block = "/".join(parts[:2]), "/".join(parts[:3])
        if parts[1:2] == ["relative"]:  # a table of all layers, which keep the same heads
            index = kept.get(f"{parts[0]}/layers/attention/heads")
            return x if index is None else take(x, index[0], axis=names.index("heads"))
        for axis, name in enumerate(names):
            where = {"layers": stack, "mlp": block, "embed": "dim", "hidden": "dim"}.get(name, f"{block}/{name}")
            index = kept.get(where)
            if index is None:
                continue
            if index.ndim == 2:
                x = jax.vmap(lambda w, i, axis=axis: take(w, i, axis=axis - 1))(x, index)
            else:
                x = take(x, index, axis=axis)
        return x

    return tree.map_with_name(one, params, transformer.axes(config))


def _zero(params: Params, kept: Kept, biases: bool) -> Params:
    """The params with 0 where what does not stay writes to the residual stream; in biases, where they go, no other 0 is a mask."""

    def silenced(path: str, block: Params, name: str) -> Params:
        depth, units = block[name].shape[:2]
        stack, _, kind = path.rpartition("/")
        rows = kept.get(stack, jnp.arange(depth))
        index = kept.get(path if kind == "mlp" else f"{path}/heads")
        index = jnp.broadcast_to(jnp.arange(units), (rows.shape[0], units)) if index is None else index
        stays = jnp.zeros((depth, units), bool).at[rows[:, None], index].set(True)
        made = {**block, name: jnp.where(stays.reshape(depth, units, *(1,) * (block[name].ndim - 2)), block[name], 0)}
        if f"{name}_bias" in block:
            present = jnp.zeros((depth, 1), bool).at[rows].set(True)
            bias = block[f"{name}_bias"]
            gone = ~present if biases else removed(bias)
            made[f"{name}_bias"] = marked(jnp.where(present, bias, 0), gone)
        return made

    for side, layers in stacks(params):
        made = {
            block: silenced(f"{side}/layers/{block}", layers[block], name)
            for block, name in OUTGOING.items()
            if block in layers
        }
        params = {**params, side: {**params[side], "layers": {**layers, **made}}}
    return params
