"""A model as a value, and the five functions of a notebook: load, apply, generate, transform, save."""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import Array

from llm_jax import checkpoint, generation, names, sharding, transforms, tree
from llm_jax.card import Card, code_version, content_hash, library_versions
from llm_jax.config import to_dict
from llm_jax.data import assets
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, ConfigError, UserError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Outputs
from llm_jax.storage import Path, as_path
from llm_jax.transforms.lora import BESIDE, beside_factors
from llm_jax.transforms.prune import check_sparsity


@dataclasses.dataclass(frozen=True)
class Model:
    """What was trained: sizes, weights, the tokenizer whose ids they know, and the card of how they came to be."""

    config: ModelConfig
    params: transformer.Params
    tokenizer: Tokenizer | None = None
    card: Card = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Model({self.config.architecture}, {tree.size(self.params) / 1e6:.2f}M parameters, {self.card.get('name', 'without a name')!r})"


def model_config(card: Card, where: Any) -> ModelConfig:
    """The sizes that a card states. Raises CheckpointError where it states others than this version knows."""
    try:
        return ModelConfig(**card["model"])
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"the card of {where} describes no model of this version ({e})") from e


OF_THE_PARENT = ("pruned", "results", "best", "step", "moments", BESIDE)
"""Entries of a card that are not true any more of a model that is made of this one"""


def locate(path: str | Path) -> tuple[str, Path]:
    """(kind, path) of a model: checkpoint, huggingface or gguf; `asset:NAME` is fetched, `registry:NAME` is what the name stands for now.

    >>> locate("runs/quickstart")[0]
    'checkpoint'
    """
    if str(path).startswith(names.PREFIX):
        return "checkpoint", names.resolve(str(path).removeprefix(names.PREFIX)).path
    if str(path).startswith("asset:"):
        path = assets.checkpoint_path(str(path).removeprefix("asset:"))
    path = as_path(path).expanduser()
    if path.suffix == ".gguf":
        return "gguf", path
    foreign = (path / "config.json").is_file() and not (path / "checkpoints").is_dir() and not (path / "about").is_dir()
    return "huggingface" if foreign else "checkpoint", path


def _interop(kind: str) -> Any:
    """The module that reads models of another kind; imported late, since it makes a `Model`."""
    return importlib.import_module(f"llm_jax.interop.{kind}")


def sizes(path: str | Path) -> ModelConfig:
    """The sizes of the model that `load` would give, without its weights. Raises as `load`."""
    kind, path = locate(path)
    if kind == "checkpoint":
        return model_config(checkpoint.read_card(path), path)
    return _interop(kind).read_sizes(path)


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of the model that `load` would give, without its weights. Raises as `load`."""
    kind, path = locate(path)
    if kind == "checkpoint":
        text = checkpoint.read_texts(path).get("tokenizer.json")
        return None if text is None else Tokenizer.from_json(text)
    return _interop(kind).read_tokenizer(path)


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model of a checkpoint, a run's folder, a Hugging Face directory or a GGUF file, of `asset:NAME` or `registry:NAME`.

    Each array is laid out over `mesh` (all devices by default) as the rules say.

    Raises:
        CheckpointError: missing, damaged, or no model that is known.
    """
    kind, path = locate(path)
    mesh = mesh or sharding.make_mesh()
    if kind != "checkpoint":
        return _interop(kind).load(path, mesh)
    config = model_config(checkpoint.read_card(path), path)
    params, card, tokenizer = checkpoint.load_params(path, abstract_params(config, mesh))
    check_sparsity(params, card)
    return Model(config, params, None if tokenizer is None else Tokenizer.from_json(tokenizer), card)


def pruned(path: str | Path) -> tuple[str, ...]:
    """The weights that the card of a model names as pruned, as regexes: what is zero in them is a mask."""
    kind, path = locate(path)
    if kind == "gguf":
        return ()
    stated = checkpoint.read_card(path).get("pruned", {}) if kind == "checkpoint" else _interop(kind).read_pruned(path)
    return tuple(map(re.escape, stated))


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh) -> transformer.Params:
    """The shape, dtype and place on the mesh of each weight."""
    shapes = transformer.shapes(config)
    return checkpoint.abstract_like(shapes, sharding.params_shardings(mesh, transformer.axes(config), shapes))


def save(model: Model, path: str | Path) -> None:
    """Write the model as a checkpoint with its card. Raises CheckpointError when `path` exists already or the disk is full."""
    card = {
        "name": as_path(path).name,
        "parents": [],
        "transforms": [],
        "code": code_version(),
        "libraries": library_versions(),
        **model.card,
        "model": to_dict(model.config),
    }
    checkpoint.save_params(
        as_path(path), model.params, card, None if model.tokenizer is None else model.tokenizer.to_json()
    )


def apply(model: Model, batch: dict[str, Array], **options: Any) -> Outputs:
    """One forward pass, jitted: `transformer.apply` with its options (hidden_states, attentions, logits)."""
    return _apply(model.config, model.params, batch, tuple(sorted(options.items())))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(config: ModelConfig, params: Any, batch: dict[str, Array], options: tuple[tuple[str, Any], ...]) -> Outputs:
    return transformer.apply(config, params, batch, **dict(options))


def generate(model: Model, prompts: str | list[str], **options: Any) -> list[str]:
    """The continuation of each prompt; see `llm_jax.generation.generate` for the options."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: load one with it, or give Model(config, params, tokenizer)")
    return generation.generate(
        model.config, model.params, model.tokenizer, [prompts] if isinstance(prompts, str) else prompts, **options
    )


def transform(model: Model, change: transforms.Transform, key: Array, aux: Any = None, name: str = "") -> Model:
    """The model after a change of sizes and weights, with a card that names it and its parent.

    Raises:
        ConfigError: a change that does not go with the model, such as one that names words to a model without a tokenizer.
    """
    if model.tokenizer is not None:
        change = transforms.spell(change, model.tokenizer)
    elif change.spelled:
        raise ConfigError(f"{change.label} names pieces of text, and the model has no tokenizer")
    known = () if change.densify else model.card.get("pruned", {})
    change = transforms.mask(change, tuple(map(re.escape, known)))
    config = change.config(model.config)
    with _mesh_of(model.params) as mesh:
        shapes = transformer.shapes(config)
        placed = None if mesh is None else sharding.params_shardings(mesh, transformer.axes(config), shapes)
        make = jax.jit(change.params, static_argnums=0, out_shardings=placed)
        params = make(model.config, model.params, key, aux)
    parent = content_hash(model.params)
    still = [re.escape(path) for path in known if path in tree.names(params)]
    stated = transforms.chain(transforms.keep_zeros(still), change).card(params)
    if config.lora_rank:
        stated[BESIDE] = beside_factors(model.card, [change.label], tree.names(params))
    card = {
        **{key: entry for key, entry in model.card.items() if key not in OF_THE_PARENT},
        **stated,
        "parents": [parent],
        "transforms": [*model.card.get("transforms", []), name or change.label],
        "model": to_dict(config),
    }
    return Model(config, params, model.tokenizer, json.loads(json.dumps(card)))


@contextlib.contextmanager
def _mesh_of(params: Any) -> Iterator[jax.sharding.Mesh | None]:
    """The mesh of several devices that the params lie on, set while this lasts; None where there is none."""
    places = (x.sharding for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
    mesh = next((s.mesh for s in places if isinstance(s, jax.sharding.NamedSharding) and s.mesh.size > 1), None)
    if not isinstance(mesh, jax.sharding.Mesh):
        yield None
        return
    with jax.set_mesh(mesh):
        yield mesh


def merge(models: Sequence[Model], change: transforms.Transform, name: str = "") -> Model:
    """The first of several models changed by `transforms.merge(...)`, which reads the others; its card names them all as parents.

    Raises:
        UserError: models of other sizes than the first, with another tokenizer, or with factors of low rank, whose product is not that of averages.
    """
    if not models:
        raise UserError("merge: there are no models")
    first, *others = models
    if first.config.lora_rank:
        raise UserError(
            "merge: the models have factors of low rank beside their weights: fold them in with merge_lora() first"
        )
    for other in others:
        different = checkpoint.difference(other.params, first.params)
        if different or _essential(other.config) != _essential(first.config):
            raise UserError(
                f"{other.card.get('name', 'a model')!r} has other sizes than {first.card.get('name', 'the first')!r}"
                f"{': ' + different if different else ''}: only models of one config can be merged"
            )
        if other.tokenizer is not None and first.tokenizer is not None and other.tokenizer != first.tokenizer:
            raise UserError(f"{other.card.get('name', 'a model')!r} has another tokenizer: its weights know other ids")
    made = transform(first, change, jax.random.key(0), tuple(other.params for other in others))
    parents = [content_hash(each.params) for each in models]
    return dataclasses.replace(
        made, card={**made.card, "parents": parents, "name": name or made.card.get("name", "merged")}
    )


def _essential(config: ModelConfig) -> ModelConfig:
    """The sizes without what makes no difference to a trained model."""
    return config.replace(dropout=0.0, lora_dropout=0.0, dtype="auto", remat="none")
