"""The families of transformers' models that are known: which one a config.json or a ModelConfig belongs to.

A family is one record: a table of names that serves both directions, and a pair of functions between config.json and ModelConfig.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.errors import CheckpointError, UserError, choose, suggest
from llm_jax.interop import decoders, encoder_decoders, encoders, names
from llm_jax.interop.family import Family
from llm_jax.interop.fields import Fields
from llm_jax.models.config import ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*encoders.FAMILIES, *decoders.FAMILIES, *encoder_decoders.FAMILIES)
}
"""By `model_type`; of two that have the same model the likelier comes first."""


def find(fields: Fields) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: none that is known, or quantised weights.
    """
    kind = fields.values.get("model_type")
    if kind is None:
        named = fields.words("architectures")[:1]
        for family in FAMILIES.values():
            if named and named[0] in (*family.classes.values(), *family.also):
                return family
        raise CheckpointError(f"{fields.where}: it has no model_type; known: {', '.join(FAMILIES)}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{fields.where}: unknown model_type {kind!r}{suggest(str(kind), FAMILIES)}")
    if fields.values.get("quantization_config") is not None:
        raise CheckpointError(
            f"{fields.where}: quantization_config is set, and quantised weights are not read: load the model with "
            "transformers, call its dequantize() and save_pretrained()"
        )
    return FAMILIES[kind]


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What of a config makes a difference to a trained model, with defaults resolved."""
    found = dataclasses.asdict(config) | dict(
        head_dim=config.head_size,
        kv_heads=config.kv_size,
        mlp_dim=config.mlp_size,
        decoder_layers=config.decoder_depth if config.architecture == "encoder-decoder" else 0,
    )
    over_vocabulary = config.head in ("lm", "mlm")
    idle = {
        "dtype": True,
        "remat": True,
        "image_size": not config.patch_size,
        "position_offset": config.positions != "learned",
        "rotary_base": config.positions != "rotary",
        "relative_buckets": config.positions != "relative",
        "relative_distance": config.positions != "relative",
        "tie_embeddings": not over_vocabulary,
        "logits_scale": not over_vocabulary or not config.tie_embeddings,
        "logits_bias": config.head != "lm",
        "labels": config.head != "classification",
        **dict.fromkeys(("lora_alpha", "lora_rank_stabilised", "lora_targets", "lora_dropout"), not config.lora_rank),
    }
    return {field: value for field, value in found.items() if not idle.get(field, False)}


def _reread(family: Family, config: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the family would make of a config.json beside this model's tensors."""
    try:
        places = names.places(config, family.entries(config, ""))
        held = frozenset(name for place in places.values() for name in place.names)
    except CheckpointError:  # a parameter without a name there: some field will tell why
        held = frozenset()
    return _essence(family.read(Fields(values, "config.json"), config.head, held))


def differences(family: Family, config: ModelConfig) -> list[str]:
    """Why a family has no such model: the fields that would come back with other values. Empty if it has."""
    if config.head not in family.classes:
        others = differences(family, config.replace(head="none"))
        return [f"head={config.head!r} (its heads: {', '.join(family.classes)})", *others]
    try:
        back = _reread(family, config, {**family.write(config), "num_labels": config.labels})
    except UserError as e:  # nothing comes back
        return [str(e), *_essence(config)]
    found = [
        f"{field}={value!r} (there it would be {back.get(field)!r})"
        for field, value in _essence(config).items()
        if back.get(field) != value
    ]
    if not found:
        try:
            names.places(config, family.entries(config, ""))
        except CheckpointError as e:
            return [str(e)]
    return found


def choose_family(config: ModelConfig, name: str | None) -> Family:
    """The family of this name, or the first that has such a model.

    Raises:
        CheckpointError: no family, or not this one, has such a model; names the first field that stands against it.
    """
    if config.lora_rank:
        raise CheckpointError(
            "a model with factors of low rank beside its weights is no model of transformers: fold them in with merge_lora(), "
            "or write them alone: export --format=peft"
        )
    if name is not None:
        family = FAMILIES[choose("family", name, FAMILIES, CheckpointError)]
        against = differences(family, config)
        if against:
            others = [f"; family={f.name!r} has" for f in FAMILIES.values() if not differences(f, config)]
            raise CheckpointError(f"{name} of transformers has no model with {against[0]}{''.join(others[:1])}")
        return family
    all_against = {family.name: differences(family, config) for family in FAMILIES.values()}
    fitting = [name for name, found in all_against.items() if not found]
    if not fitting:
        nearest = min(all_against, key=lambda name: len(all_against[name]))
        raise CheckpointError(
            f"no family of transformers has such a model: the nearest, {nearest}, has none with {all_against[nearest][0]}"
        )
    return FAMILIES[fitting[0]]


def describe(
    family: Family, config: ModelConfig, original: Mapping[str, Any], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """The config.json of a model: what `original` says, in its own words wherever they still say the same."""
    stated = family.write(config)
    original = dict(original)
    if config.head == "classification":
        named = list(labels) or [f"LABEL_{i}" for i in range(config.labels)]
        stated["id2label"] = {str(i): name for i, name in enumerate(named)}
        stated["label2id"] = {name: i for i, name in enumerate(named)}
    if config.head in ("classification", "span"):
        for key in ("num_labels", "id2label", "label2id"):
            original.pop(key, None)
    made, wanted = {**original, **stated}, _essence(config)
    for key in stated:
        if key in original and original[key] != stated[key]:
            kept = {**made, key: original[key]}
            try:
                made = kept if _reread(family, config, kept) == wanted else made
            except UserError:
                continue
    return made
