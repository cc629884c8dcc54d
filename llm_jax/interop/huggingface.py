"""Directories as transformers writes them: read onto the mesh, and written so that `from_pretrained` reads them.

What a family calls its tensors and its sizes is in `families.py`, the format of the weights in `tensor_files.py`.
"""

import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from llm_jax import model as models
from llm_jax import sharding, tree
from llm_jax.card import Card
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import CheckpointError, ConfigError, choose
from llm_jax.interop import families, names, tensor_files
from llm_jax.interop.family import Family
from llm_jax.interop.fields import Fields, read_json
from llm_jax.interop.huggingface_export import OURS, save
from llm_jax.interop.names import Place
from llm_jax.interop.tensor_files import Tensors
from llm_jax.model import Model
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.storage import Path, as_path
from llm_jax.transforms.prune import check_sparsity

__all__ = ["export_model", "load", "read_pruned", "read_sizes", "read_tokenizer", "save"]

log = logging.getLogger(__name__)

Labels = int | Sequence[str] | None
"""How many classes, or their names; None for what config.json says."""

FLOATS = frozenset(tensor_files.DTYPES[word] for word in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


class Found(NamedTuple):
    """What a directory holds, matched with a model of ours."""

    family: Family
    config: ModelConfig
    original: dict[str, Any]
    prefix: str
    tensors: Tensors
    """by the names of the family's table, or for those it has not by their own"""
    wanted: dict[str, Place]
    fresh: frozenset[str]
    """paths of parameters that are not there and are to be made"""
    copies: list[str]
    left_out: list[str]


def load(
    path: str | Path, mesh: jax.sharding.Mesh | None = None, head: str | None = None, labels: Labels = None
) -> Model:
    """The model in a Hugging Face directory, in float32, each array laid out over `mesh` (all devices by default) as the rules say.

    Args:
        head: none, lm, mlm, classification or span; None for that of config.json. One that is asked for and is not in the files is made
            afresh, from seed 0.
        labels: classes of a classification head, their number or names; None for what config.json says. Where the files have another
            number of them, the scores are made afresh.

    Raises:
        CheckpointError: missing, damaged, of an unknown family, or in need of what is not implemented.
    """
    folder = as_path(path).expanduser()
    found = match(folder, head, labels)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > found.config.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embeddings {found.config.vocab_size} rows: "
            "they do not belong together"
        )
    abstract = models.abstract_params(found.config, mesh or sharding.make_mesh())
    fresh = _fresh(found.config, abstract, found.fresh)
    params = names.assemble(found.config, found.wanted, found.tensors.__getitem__, abstract, fresh)
    card = _card(folder, found, labels)
    try:
        check_sparsity(params, card)
    except CheckpointError as e:
        raise CheckpointError(f"{folder / 'config.json'}: {e}") from e
    return Model(found.config, params, tokenizer, card)


def read_sizes(path: str | Path, head: str | None = None, labels: Labels = None) -> ModelConfig:
    """The sizes of the model that `load` would give; of the weights only the headers are read. Raises as `load`."""
    return match(as_path(path).expanduser(), head, labels).config


def read_pruned(path: str | Path) -> dict[str, float]:
    """The weights that an export of ours names as pruned, and their shares of zeros."""
    stated = read_json(as_path(path).expanduser() / "config.json").get(OURS)
    found = stated.get("pruned") if isinstance(stated, dict) else None
    return {
        name: share for name, share in (found if isinstance(found, dict) else {}).items() if isinstance(share, float)
    }


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a directory; None, with a warning, where there is no file that describes one whole.

    Raises:
        DataError: a file that is no tokenizer.
    """
    folder = as_path(path).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(str(folder))
    log.warning(
        "%s has no %s: the model comes without a tokenizer; transformers.AutoTokenizer.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER) may write one",
        folder,
        " or ".join(TOKENIZER_FILES),
    )
    return None


def export_model(
    checkpoint: str | Path, out: str | Path, dtype: str | None = None, family: str | None = None
) -> dict[str, Any]:
    """Make a Hugging Face directory of a checkpoint; what was written. Raises as `save`.

    README.md tells of what the model was made of as far as cards are found beside the checkpoint, in `runs` and in the registry.
    """
    loaded = models.load(checkpoint)
    save(loaded, out, dtype=dtype, family=family, ancestors=_ancestors(checkpoint, loaded.card))
    written = read_json(as_path(out) / "config.json")
    return {
        "parameters": tree.size(loaded.params),
        "architecture": written["architectures"][0],
        "dtype": written["dtype"],
        "path": str(out),
    }


def _ancestors(path: str | Path, card: Card) -> list[Card]:
    kind, place = models.locate(path)
    if kind != "checkpoint" or not card.get("parents"):
        return []
    # Late, since it is a layer above this one.
    lineage = importlib.import_module("llm_jax.lifecycle.lineage")
    return [version.card for version in lineage.near(place).ancestors(card["parents"])]


def match(folder: Path, head: str | None = None, labels: Labels = None) -> Found:
    """Hold the tensors of a directory against its config.json. Raises as `load`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    original = read_json(folder / "config.json")
    fields = Fields(original, folder / "config.json")
    family = families.find(fields)
    if head is not None:
        choose(f"head of {family.name}", head, family.classes, CheckpointError)
    tensors = _modern(tensor_files.open_folder(folder), folder)
    wanted_head = head or family.head(fields)
    if labels is not None and wanted_head != "classification":
        raise CheckpointError(
            f"{folder}: labels are for a classification head, not for {wanted_head}: ask for that head"
        )
    prefix = family.prefix(tensors)
    config = _read(family, fields, wanted_head, labels, tensors, prefix)
    found = _match(folder, family, config, original, prefix, tensors, head is not None, labels is not None)
    if found is None:
        log.warning("%s: the head that its config.json names is not in the files: the base alone is loaded", folder)
        config = _read(family, fields, "none", None, tensors, prefix)
        found = _match(folder, family, config, original, prefix, tensors)
        assert found is not None
    stated = original.get("max_position_embeddings")
    if config.positions == "rotary" and isinstance(stated, int) and stated > config.max_length:
        log.warning(
            "%s: attention to a sliding window is not implemented: rows are cut to its %d tokens, where it makes no difference",
            folder,
            config.max_length,
        )
    return found


def _modern(tensors: Tensors, folder: Path) -> Tensors:
    """The tensors with the names that norms have had since 2019."""
    endings = {"gamma": "weight", "beta": "bias"}
    made: Tensors = {}
    for name, x in tensors.items():
        new = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: endings[m[0]], name)
        if new in made or (new != name and new in tensors):
            raise CheckpointError(f"{folder}: {new} is there under its old name too")
        made[new] = x
    return made


def _read(family: Family, fields: Fields, head: str, labels: Labels, tensors: Tensors, prefix: str) -> ModelConfig:
    """The sizes that config.json states, refused where they are beyond what the tensors can hold."""
    held = frozenset(name.removeprefix(prefix) for name in tensors)
    try:
        config = family.read(fields, head, held)
        if labels is not None and head == "classification":
            config = config.replace(labels=labels if isinstance(labels, int) else len(labels))
    except ConfigError as e:
        raise CheckpointError(f"{fields.where}: {e}") from e
    depth = config.encoder_depth + config.decoder_depth
    table = config.max_length if config.positions == "learned" else 0
    needed = (config.vocab_size + table + depth * (config.mlp_size + config.heads * config.head_size)) * config.dim
    present = sum(x.size for x in tensors.values())
    if depth > 10 * len(tensors) + 100 or needed > 100 * present + 10**6:
        raise CheckpointError(
            f"{fields.where}: its sizes ask for over {needed} values in {depth} layers, the files hold {present} in "
            f"{len(tensors)} tensors"
        )
    return config


def _match(
    folder: Path,
    family: Family,
    config: ModelConfig,
    original: dict[str, Any],
    prefix: str,
    tensors: Tensors,
    head_asked: bool = False,
    labels_asked: bool = False,
) -> Found | None:
    """The tensors as the config needs them; None if its head is not there and was not asked for."""
    tensors = dict(tensors)
    wanted = names.places(config, family.entries(config, prefix))
    copies = _copies(family, config, prefix, wanted, tensors, folder)
    absent = {path for path, place in wanted.items() if path.startswith("head/") and place.names[0] not in tensors}
    own = {entry.ours for entry in family.heads[config.head]} & set(wanted)
    if not head_asked and own and own <= absent:
        return None
    fresh = absent if head_asked else set()
    if labels_asked:
        scores = {path for path in own - absent if path.startswith("head/classification")}
        fresh |= {path for path in scores if tensors[wanted[path].names[0]].shape != wanted[path].there}
    for path in sorted(fresh):
        log.warning("%s: %s is made afresh", folder, wanted[path].names[0])
    stored = {path: place for path, place in wanted.items() if path not in fresh}
    used = {name for place in stored.values() for name in place.names}
    others = family.of_other_heads(prefix)
    left_out = [
        name
        for name in sorted(set(tensors) - used - set(copies))
        if name in others or any(re.fullmatch(regex, name) for regex in family.constants)
    ]
    shapes = {name: x.shape for name, x in tensors.items()}
    names.check(shapes, stored, (*copies, *left_out), folder)
    for name in sorted(used):
        if tensors[name].dtype.type not in FLOATS:
            raise CheckpointError(f"{folder}: {name} is of dtype {tensors[name].dtype}: quantised weights are not read")
    return Found(family, config, original, prefix, tensors, stored, frozenset(fresh), copies, left_out)


def _copies(
    family: Family, config: ModelConfig, prefix: str, wanted: Mapping[str, Place], tensors: Tensors, folder: Path
) -> list[str]:
    """The second names that tied parameters have in the files; one stands in for the first where that is absent.

    Raises:
        CheckpointError: two names of one parameter with different values.
    """
    found = []
    needed = {name for place in wanted.values() for name in place.names}
    for entry in family.copies(config.head, prefix):
        if entry.theirs in needed or entry.theirs not in tensors or entry.ours not in wanted:
            continue
        first = wanted[entry.ours].names[0]
        found.append(entry.theirs)
        if first not in tensors:
            tensors[first] = tensors[entry.theirs]
        elif not tensor_files.same_bits(tensors[first], tensors[entry.theirs]):
            raise CheckpointError(
                f"{folder}: {entry.theirs} differs from {first}, to which config.json ties it (tie_word_embeddings)"
            )
    return found


def _fresh(config: ModelConfig, abstract: Any, paths: frozenset[str]) -> dict[str, jax.Array]:
    """Fresh parameters of the head; nothing else of the model is made."""
    if not paths:
        return {}
    shardings = jax.tree.map(lambda x: x.sharding, abstract["head"])
    make: Callable[[jax.Array], Any] = jax.jit(
        lambda key: transformer.init(config, key)["head"], out_shardings=shardings
    )
    made = {"head": make(jax.random.key(0))}
    return {path: x for path, x in zip(tree.names(made), jax.tree.leaves(made)) if path in paths}


def _card(folder: Path, found: Found, labels: Labels) -> Card:
    """Where the model came from, and what is needed to write it as it was."""
    used = {name: found.tensors[name] for place in found.wanted.values() for name in place.names}
    main = tensor_files.main_dtype(used.values())
    card: Card = {
        "name": folder.resolve().name,
        "parents": [],
        "transforms": [],
        "huggingface": {
            "config": found.original,
            "dtype": str(main),
            "other_dtypes": {name: str(x.dtype) for name, x in used.items() if x.dtype != main},
            "prefix": found.prefix,
            "copies": found.copies,
            "left_out": found.left_out,
        },
    }
    if pruned := read_pruned(folder):
        card["pruned"] = pruned
    generation = folder / "generation_config.json"
    if generation.is_file():
        card["huggingface"]["generation"] = read_json(generation)
    if found.config.head == "classification":
        named = list(labels) if isinstance(labels, Sequence) else _label_names(found.original, found.config.labels)
        if named:
            card["labels"] = named
    return card


def _label_names(original: Mapping[str, Any], count: int) -> list[str]:
    """The names of the classes in a config.json; none where it only numbers them."""
    table = original.get("id2label") or {}
    named = [table.get(str(i)) for i in range(count)]
    told = all(isinstance(name, str) for name in named) and named != [f"LABEL_{i}" for i in range(count)]
    return [str(name) for name in named] if told and len(table) == count else []
