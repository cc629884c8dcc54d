"""A model as a value, and the five functions of a notebook: load, apply, generate, transform, save."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from llm_jax import checkpoint, generation, sharding, transforms, tree
from llm_jax.card import Card, code_version, content_hash, library_versions
from llm_jax.config import to_dict
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Outputs


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


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model of a checkpoint or of a run's folder, each array laid out over `mesh` (all devices by default) as the rules say.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint.
    """
    card = checkpoint.read_card(Path(path))
    config = model_config(card, path)
    params, card, tokenizer = checkpoint.load_params(Path(path), abstract_params(config, mesh or sharding.make_mesh()))
    return Model(config, params, None if tokenizer is None else Tokenizer.from_json(tokenizer), card)


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh) -> transformer.Params:
    """The shape, dtype and place on the mesh of each weight."""
    shapes = transformer.shapes(config)
    return checkpoint.abstract_like(shapes, sharding.params_shardings(mesh, transformer.axes(config), shapes))


def save(model: Model, path: str | Path) -> None:
    """Write the model as a checkpoint with its card. Raises CheckpointError when `path` exists already or the disk is full."""
    card = {
        "name": Path(path).name,
        "parents": [],
        "transforms": [],
        "code": code_version(),
        "libraries": library_versions(),
        **model.card,
        "model": to_dict(model.config),
    }
    checkpoint.save_params(
        Path(path), model.params, card, None if model.tokenizer is None else model.tokenizer.to_json()
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
    """The model after a change of sizes and weights, with a card that names it and its parent."""
    config = change.config(model.config)
    params = jax.jit(change.params, static_argnums=0)(model.config, model.params, key, aux)
    parent = content_hash(model.params)
    card = {
        **model.card,
        "parents": [parent],
        "transforms": [*model.card.get("transforms", []), name or change.label],
        "model": to_dict(config),
    }
    return Model(config, params, model.tokenizer, json.loads(json.dumps(card)))
