"""LoRA: factors of low rank beside frozen weights, and the way back: factors folded into the weights."""

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import LORA_TARGETS, ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import IDENTITY, Transform, marked, removed
from llm_jax.transforms.freeze import train_only

FACTORS = r".*/layers/.*_lora_[ab]"
"""The paths of the factors"""

BESIDE = "trained_beside_factors"
"""The entry of a card with the paths of what was trained beside the factors"""

WITHOUT = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name.startswith("lora_")}
"""What the config of a model without factors says of them"""


def lora(
    rank: int,
    *,
    alpha: float = 16.0,
    targets: Sequence[str] = LORA_TARGETS,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    also: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> Transform:
    """x W becomes x W + alpha/rank (x A) B, and A and B alone are trained (Hu et al. 2021, eq. 3); B starts at zero, A normal with variance 1/fan_in.

    What is frozen costs neither gradient nor moments. A model that has these factors already keeps them and trains on, at the rate of dropout given here.

    Args:
        rank: of the factors; 0 for none, and then all is trained as ever.
        alpha: of the scale.
        targets: regexes of weights by their path in a layer (`attention/query`, `cross/out`, `mlp/up`, ...), by default queries and values.
        rank_stabilised: scale by alpha/sqrt(rank) (Kalajdzievski 2023, section 4).
        dropout: rate, in training, on the x of x A alone; x W reads all of it, as in the authors' code.
        also: regexes of other parameters, by their whole path, that are trained with the factors, such as `head/.*`.
        layers: numbers of the layers that are adapted, from 0 below, by default all. In others A is zero as B is, which no gradient moves;
            they take memory like the rest, since layers are stacked. Of a model that has its factors already those stay adapted that were.

    Raises:
        ConfigError: a value that is not allowed, a target that matches no weight, a layer that is not there, a model with other factors.
    """
    if type(rank) is not int:
        raise ConfigError(f"lora: rank is {rank!r}: it must be an int")
    targets, also = ((x,) if isinstance(x, str) else tuple(x) for x in (targets, also))
    fields: dict[str, Any] = dict(
        lora_rank=rank,
        lora_alpha=alpha,
        lora_targets=targets,
        lora_rank_stabilised=rank_stabilised,
        lora_dropout=dropout,
    )
    ModelConfig(architecture="encoder-decoder", mlp="gated_silu", **fields)  # has every weight that a target may mean
    layers = None if layers is None else tuple(layers)
    if layers is not None and (not layers or any(type(i) is not int or i < 0 for i in layers)):
        raise ConfigError(f"lora: layers is {layers}: name some of the layers by number, from 0 below")
    if not rank:
        return IDENTITY

    def config(sizes: ModelConfig) -> ModelConfig:
        made, depth = sizes.replace(**fields), max(sizes.encoder_depth, sizes.decoder_depth)
        if layers and max(layers) >= depth:
            raise ConfigError(f"lora: layers has {max(layers)}, and the layers of the model are 0 to {depth - 1}")
        if sizes.lora_rank and made != sizes.replace(lora_dropout=dropout):
            raise ConfigError(
                f"lora: the model has factors of rank {sizes.lora_rank} already, of other settings: fold them in with merge_lora() first"
            )
        return made

    def params(sizes: ModelConfig, weights: Params, key: Array, aux: Any) -> Params:
        if sizes.lora_rank:
            return weights
        old = dict(zip(tree.names(weights), jax.tree.leaves(weights)))

        def one(name: str, fresh: Array) -> Array:
            if layers is None or not name.endswith("_lora_a"):
                return old.get(name, fresh)
            adapted = np.isin(np.arange(fresh.shape[0]), layers)
            return jnp.where(adapted.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, 0)

        return tree.map_with_name(one, transformer.init(config(sizes), key))

    trained = train_only(lambda params: tree.mask(params, (FACTORS, *also), "lora: regex"))
    options = {
        "targets": targets,
        "rank_stabilised": rank_stabilised,
        "dropout": dropout,
        "also": also,
        "layers": layers,
    }
    usual = {"targets": LORA_TARGETS, "rank_stabilised": False, "dropout": 0.0, "also": (), "layers": None}
    told = "".join(f", {name}={value!r}" for name, value in options.items() if value != usual[name])
    return trained._replace(config=config, params=params, label=f"lora({rank}, alpha={alpha}{told})")


def merge_lora(*, keep_zeros: bool = True) -> Transform:
    """W + alpha/rank A B in place of W, A and B: the same function without factors (Hu et al. 2021, section 4.1). A model without any stays as it is.

    Args:
        keep_zeros: what is pruned stays zero: zeros in weights that the card of the model, or a change before this one, names as pruned. The function
            of such a model then changes. Zeros in others are weights like any other.
    """
    return _folded(keep_zeros, ())._replace(pruned=functools.partial(_folded, True) if keep_zeros else None)


def _folded(keep_zeros: bool, pruned: tuple[str, ...]) -> Transform:
    """`merge_lora` of a model whose zeros are masks in the weights that the regexes name."""

    def config(sizes: ModelConfig) -> ModelConfig:
        return sizes.replace(**WITHOUT) if sizes.lora_rank else sizes

    def params(sizes: ModelConfig, weights: Params, key: Array, aux: Any) -> Params:
        leaves = dict(zip(tree.names(weights), jax.tree.leaves(weights)))

        def one(name: str, _: Any) -> Array:
            w = leaves[name]
            if f"{name}_lora_a" not in leaves:
                return w
            delta = sizes.lora_scale * product(leaves[f"{name}_lora_a"], leaves[f"{name}_lora_b"])
            gone = removed(w)
            merged = marked((w + delta).astype(w.dtype), gone)
            return jnp.where(gone, w, merged) if any(re.fullmatch(regex, name) for regex in pruned) else merged

        return tree.map_with_name(one, without(weights))

    return Transform(config=config, params=params, label=f"merge_lora({'' if keep_zeros else 'keep_zeros=False'})")


def trained_with_factors(labels: Sequence[str]) -> tuple[str, ...]:
    """The regexes of what the `lora` among the labels of a card trained beside the factors; what came before `merge_lora` is of the base.

    >>> trained_with_factors(["dropout(0.1), lora(8, alpha=16.0, also=('head/.*', '.*bias'))"])
    ('head/.*', '.*bias')
    >>> trained_with_factors(["lora(8, alpha=16.0, also=('.*bias',))", "merge_lora()", "lora(4, alpha=16.0)"])
    ()
    """
    found: tuple[str, ...] = ()
    for name, also in _calls(labels):
        found = () if name == "merge_lora" else (*found, *also)
    return found


def beside_factors(
    card: Mapping[str, Any], labels: Sequence[str], names: Sequence[str], trained: Sequence[str] = ()
) -> list[str]:
    """The paths of what has been trained beside the factors of a model since its base is what it is: the entry `BESIDE` of a card.

    Args:
        card: of the model before.
        labels: of the changes of it, of which a `merge_lora` makes what was trained before one of the base.
        names: the paths of all its weights.
        trained: those that are trained in this run.

    >>> beside_factors({"transforms": ["lora(4, also=('embed/.*',))"]}, [], ["embed/tokens", "head/bias"], ["head/bias"])
    ['embed/tokens', 'head/bias']
    """
    regexes, known = trained_with_factors(card.get("transforms", ())), card.get(BESIDE, ())
    before = {name for name in names if name in known or any(re.fullmatch(regex, name) for regex in regexes)}
    if any(name == "merge_lora" for name, _ in _calls(labels)):
        before = set()
    return sorted({*before, *(name for name in trained if not re.fullmatch(FACTORS, name))})


def _calls(labels: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(lora or merge_lora, its `also`) in turn, from labels of single changes and of chains; one that is no code, since it names a value, has none."""
    found = []
    for label in labels:
        try:
            calls = cast(ast.List, ast.parse(f"[{label}]", mode="eval").body).elts
        except SyntaxError:
            continue
        for call in calls:
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("lora", "merge_lora"):
                also = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "also"]
                found.append((ast.unparse(call.func), tuple(regex for each in also for regex in each)))
    return found


def product(a: Array, b: Array) -> Array:
    """A B of each layer: (L, ..., R) and (L, R, ...) to (L, ..., ...)."""
    return jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST))(a, b)


def without(params: Params) -> Params:
    """The params without their factors."""
    return {
        name: without(x) if isinstance(x, dict) else x
        for name, x in params.items()
        if isinstance(x, dict) or not re.search("_lora_[ab]$", name)
    }
