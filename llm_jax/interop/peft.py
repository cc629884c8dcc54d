"""LoRA adapters as PEFT writes them: read onto a base model, and written so that PEFT puts them onto the base of transformers."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from llm_jax import model as models
from llm_jax import sharding, tree
from llm_jax.card import content_hash
from llm_jax.errors import CheckpointError
from llm_jax.interop import families, names, tensor_files
from llm_jax.interop.family import Family
from llm_jax.interop.fields import Fields, read_json
from llm_jax.interop.huggingface_export import save_tokenizer
from llm_jax.interop.names import Place
from llm_jax.model import Model
from llm_jax.models.config import ModelConfig
from llm_jax.storage import Path, as_path
from llm_jax.transforms.lora import WITHOUT, beside_factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base"""

LINEAR = (names.FLIP, names.HEADS_OUT, names.HEADS_IN)
"""Layouts of torch's Linear; what else is adapted is the Conv1D of GPT-2, which PEFT calls fan_in_fan_out"""

REWRITTEN = ("pissa", "olora", "corda", "loftq")
"""Beginnings of `init_lora_weights` that change the weights of the base too"""

TASKS = {"classification": "SEQ_CLS", "span": "QUESTION_ANS", "none": "FEATURE_EXTRACTION"}
"""PEFT's word for a head; that of lm depends on the architecture, for mlm there is none"""

HEADS = ("classification", "span")
"""Heads whose weights lie in an adapter"""

Tensors = dict[str, np.ndarray]


class Module(NamedTuple):
    """A product of transformers' model, and the parameters here that it holds: one, or several where it is fused."""

    theirs: str
    """its path there, with {} for the number of the layer"""
    depth: int
    parts: dict[str, Place]
    """by the path here of the weight"""
    layers: tuple[int, ...]
    """those that are adapted"""

    @property
    def pattern(self) -> str:
        """A regex of its path in the layers that are adapted."""
        numbers = r"\d+" if len(self.layers) == self.depth else f"({'|'.join(map(str, self.layers))})"
        return re.escape(self.theirs).replace(r"\{\}", numbers)


def save(model: Model, path: str | Path, base: str = "") -> None:
    """Write the factors of a model as `adapter_config.json` and `adapter_model.safetensors`; with a classification or span head its weights too.

    Its tokenizer lies beside them, since the base's need not frame texts as this model has read them (`Tokenizer.framed`).

    Queries, keys and values of GPT-2 lie in one product there: its factors are those of the adapted ones side by side, of as many times the rank.

    Args:
        path: a folder that does not exist or is empty.
        base: where PEFT finds the base model; empty to leave it open.

    Raises:
        CheckpointError: no factors, a folder that holds something, a base that no family of transformers has, or weights that were trained
            beside the factors and have no place in such a file.
    """
    config, path = model.config, as_path(path).expanduser()
    if not config.lora_rank:
        raise CheckpointError("the model has no factors of low rank, so that there is no adapter to write")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path} exists already")
    _refuse_more(model)
    family, plain = _base(model)
    places = names.places(plain, family.entries(plain, family.prefixes[plain.head]))
    leaves = {name: np.asarray(jax.device_get(x)) for name, x in _factors_and_head(model)}
    modules = [_adapted(config, module, leaves) for module in _modules(plain, places)]
    modules = [module for module in modules if module.parts and module.layers]
    if not modules:
        raise CheckpointError("all factors of the model are zero, so that there is no adapter to write")
    tensors = {name: x for module in modules for name, x in _write(module, leaves)}
    head = {} if config.head not in HEADS else {p: x for p, x in places.items() if p in leaves}
    tensors |= {PREFIX + name: fetch() for name, _, fetch in names.arrays(model.params, head)}
    kept = {_top(name, family.prefixes[plain.head]) for place in head.values() for name in place.names}
    stated = _describe(config, modules, sorted(kept), base)
    path.mkdir(parents=True, exist_ok=True)
    try:
        contiguous = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
        save_tokenizer(model, path)
        (path / WEIGHTS).write_bytes(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))
        # last, since a folder without it is no adapter
        (path / CONFIG).write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"writing {path} failed: {e}") from e


def load(path: str | Path, model: Model, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A base model with the factors of an adapter beside its weights, and the head that the adapter brings, if any.

    Where modules have factors of different rank or scale, all get the greatest rank, filled up with zeros, and B takes the ratio of the scales;
    layers and sides that the adapter leaves out get zeros; each part of a fused product gets the whole A.

    Raises:
        CheckpointError: missing, damaged, of a kind that is not implemented, or not of this model.
    """
    folder = as_path(path).expanduser()
    if model.config.lora_rank:
        raise CheckpointError("the model has factors of low rank already: fold them in with merge_lora() first")
    fields = Fields(read_json(folder / CONFIG), folder / CONFIG)
    fields.only(peft_type="LORA", bias="none", use_dora=False, lora_bias=False, alora_invocation_tokens=None)
    start = fields.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REWRITTEN):
        raise CheckpointError(
            f"{fields.where}: init_lora_weights is {start!r}, which changes the base: not implemented"
        )
    tensors = {name.removeprefix(PREFIX): x for name, x in tensor_files.open_file(folder / WEIGHTS).items()}
    family, plain = _base(model)
    prefix = family.prefix(name.replace(".lora_A.", ".") for name in tensors)
    places = names.places(plain, family.entries(plain, prefix))
    held = [_Held(module, fields, tensors) for module in _modules(plain, places)]
    held = [each for each in held if each.layers]
    if not held:
        raise CheckpointError(f"{folder}: it has factors for no weight of this model: an adapter of another family?")
    config = _sizes(plain, held, fields)
    leaves = dict(zip(tree.names(model.params), jax.tree.leaves(model.params)))
    for each in held:
        leaves |= each.read(config)
    leaves |= _head(places, tensors)
    if tensors:
        left = sorted(tensors)
        raise CheckpointError(
            f"{folder}: this model has no place for {len(left)} of its tensors: {', '.join(left[:3])}"
        )
    abstract = models.abstract_params(config, mesh or sharding.make_mesh())

    def place(name: str, leaf: Any) -> Any:
        x = leaves[name] if name in leaves else np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(x.astype(leaf.dtype), leaf.sharding)

    card = {
        **model.card,
        "parents": [content_hash(model.params)],
        "transforms": [*model.card.get("transforms", []), f"peft.load({str(path)!r})"],
    }
    return Model(config, tree.map_with_name(place, abstract), model.tokenizer, card)


def _base(model: Model) -> tuple[Family, ModelConfig]:
    """The family of a model, and its config without factors."""
    plain = model.config.replace(**WITHOUT)
    origin = model.card.get("huggingface", {}).get("config", {})
    return families.choose_family(plain, origin.get("model_type")), plain


def _refuse_more(model: Model) -> None:
    """Raise where its card tells of a trained weight that is no factor and of no head that is written."""
    for name in beside_factors(model.card, (), tree.names(model.params)):
        if not (name.startswith("head/") and model.config.head in HEADS):
            raise CheckpointError(
                f"{name} was trained beside the factors and has no place in an adapter: fold the factors in with merge_lora() and export the whole model"
            )


def _adapted(config: ModelConfig, module: Module, leaves: Tensors) -> Module:
    """The module with its adapted parts and layers alone; a layer is not adapted where A and B are zero."""
    parts = {ours: place for ours, place in module.parts.items() if config.adapted(ours.split("/layers/")[1])}
    factors = [leaves[f"{ours}_lora_{which}"] for ours in parts for which in "ab"]
    return module._replace(parts=parts, layers=tuple(i for i in module.layers if any(x[i].any() for x in factors)))


def _modules(plain: ModelConfig, places: dict[str, Place]) -> list[Module]:
    """The products of the layers."""
    found: dict[str, Module] = {}
    for ours, place in places.items():
        side, _, within = ours.partition("/layers/")
        if within in plain.products:
            theirs = place.entry.theirs.removesuffix(".weight")
            depth = plain.encoder_depth if side == "encoder" else plain.decoder_depth
            found.setdefault(theirs, Module(theirs, depth, {}, tuple(range(depth)))).parts[ours] = place
    return list(found.values())


def _factors_and_head(model: Model) -> Iterator[tuple[str, Any]]:
    for name, x in zip(tree.names(model.params), jax.tree.leaves(model.params)):
        if name.endswith(("_lora_a", "_lora_b")) or name.startswith("head/"):
            yield name, x


def _split(place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that a weight takes in and those that it makes."""
    over = 2 if place.entry.ours.endswith("/out") else 1
    return place.own[:over], place.own[over:]


def _write(module: Module, leaves: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """lora_A (R, in) and lora_B (out, R) of each adapted layer; of a fused product, B has a block for each part."""
    for layer in module.layers:
        rows, columns = [], []
        for ours, place in module.parts.items():
            taken, made = _split(place)
            a, b = leaves[f"{ours}_lora_a"][layer], leaves[f"{ours}_lora_b"][layer]
            rows.append(a.reshape(math.prod(taken), -1).T)
            part = b.reshape(-1, math.prod(made)).T
            blocks = np.zeros((place.entry.layout.parts, *part.shape), part.dtype)
            blocks[place.entry.part] = part
            columns.append(blocks.reshape(-1, part.shape[1]))
        name = PREFIX + module.theirs.format(layer)
        yield f"{name}.lora_A.weight", np.concatenate(rows)
        yield f"{name}.lora_B.weight", np.concatenate(columns, axis=1)


def _top(name: str, prefix: str) -> str:
    """The module of a head that is saved whole, from the name of one of its tensors."""
    return name.rpartition(".")[0] if prefix and name.startswith(prefix) else name.split(".")[0]


def _describe(config: ModelConfig, modules: list[Module], kept: list[str], base: str) -> dict[str, Any]:
    """What goes into adapter_config.json."""
    task = TASKS.get(config.head)
    if config.head == "lm":
        task = "SEQ_2_SEQ_LM" if config.architecture == "encoder-decoder" else "CAUSAL_LM"
    ranks, alphas = {}, {}
    for module in modules:
        count = len(module.parts)
        if count > 1:  # of so many times the rank, and yet of the same scale
            key = re.escape(module.theirs.rpartition("{}.")[2])
            ranks[key] = count * config.lora_rank
            alphas[key] = config.lora_alpha * (count**0.5 if config.lora_rank_stabilised else count)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.lora_rank_stabilised,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": any(p.entry.layout not in LINEAR for module in modules for p in module.parts.values()),
        "target_modules": "|".join(module.pattern for module in modules),
        "modules_to_save": kept or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


class _Held:
    """What an adapter holds for a module: A, B and the scale of each layer that it adapts; taken out of `tensors`."""

    def __init__(self, module: Module, fields: Fields, tensors: Tensors):
        self.module, self.fields = module, fields
        self.layers: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}
        for layer in range(module.depth):
            name = module.theirs.format(layer)
            pair = [tensors.pop(f"{name}.lora_{which}.weight", None) for which in "AB"]
            if pair[0] is None and pair[1] is None:
                continue
            rank = int(_pattern(fields, "rank_pattern", name, fields.integer("r", 8)))
            shapes = (rank, self._size(0)), (self._size(1), rank)
            for which, x, shape in zip("AB", pair, shapes):
                if x is None or x.shape != shape:
                    said = "missing" if x is None else f"of shape {list(x.shape)}"
                    raise CheckpointError(f"{fields.where}: {name}.lora_{which} is {said}, not of shape {list(shape)}")
            alpha = _pattern(fields, "alpha_pattern", name, fields.number("lora_alpha", 8))
            a, b = (np.asarray(x, np.float32) for x in pair)
            self.layers[layer] = a, b, alpha / (rank**0.5 if fields.flag("use_rslora", False) else rank)

    def _size(self, side: int) -> int:
        """Of what the module takes in (0) or makes (1)."""
        place = next(iter(self.module.parts.values()))
        return math.prod(_split(place)[side]) * (place.entry.layout.parts if side else 1)

    def read(self, config: ModelConfig) -> Tensors:
        """The stacked factors of each part."""
        found: Tensors = {}
        for ours, place in self.module.parts.items():
            taken, made = _split(place)
            a = np.zeros((self.module.depth, *taken, config.lora_rank), np.float32)
            b = np.zeros((self.module.depth, config.lora_rank, *made), np.float32)
            for layer, (down, up, scale) in self.layers.items():
                rank, ratio = down.shape[0], scale / config.lora_scale
                a[layer, ..., :rank] = down.T.reshape(*taken, rank)
                part = np.split(up, place.entry.layout.parts)[place.entry.part]
                b[layer, :rank] = (part if ratio == 1 else ratio * part).T.reshape(rank, *made)
            found |= {f"{ours}_lora_a": a, f"{ours}_lora_b": b}
        return found


def _pattern(fields: Fields, key: str, name: str, usual: float) -> float:
    """What a table of patterns says of a module, by its ending as PEFT matches it."""
    section = fields.section(key)
    for pattern in section.values:
        if re.match(rf"(.*\.)?({pattern})$", name):
            return section.number(pattern)
    return usual


def _sizes(plain: ModelConfig, held: list[_Held], fields: Fields) -> ModelConfig:
    """The sizes with the greatest rank of all modules, and the scale of one that has it."""
    rank, scale = max((a.shape[0], scale) for each in held for a, _, scale in each.layers.values())
    stabilised = fields.flag("use_rslora", False)
    root, alpha = rank**0.5 if stabilised else rank, fields.number("lora_alpha", 8)
    return plain.replace(
        lora_rank=rank,
        lora_alpha=alpha if alpha / root == scale else scale * root,
        lora_rank_stabilised=stabilised,
        lora_targets=tuple(sorted({ours.split("/layers/")[1] for each in held for ours in each.module.parts})),
        lora_dropout=fields.rate("lora_dropout", 0.0),
    )


def _head(places: dict[str, Place], tensors: Tensors) -> Tensors:
    """The parameters of the head that an adapter brings; taken out of `tensors`."""
    found: Tensors = {}
    for ours, place in places.items():
        if ours.startswith("head/") and place.names[0] in tensors:
            x = tensors.pop(place.names[0])
            if x.shape != place.there:
                raise CheckpointError(
                    f"the adapter's {place.names[0]} is {list(x.shape)}, the model's {list(place.there)}"
                )
            found[ours] = place.entry.layout.read(x, place.own, place.entry.part)
    return found
