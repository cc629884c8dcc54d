"""Writing a model as a Hugging Face directory: all of it or nothing."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint, model_card
from llm_jax.card import Card
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, choose
from llm_jax.interop import families, names, tensor_files
from llm_jax.interop.family import Family
from llm_jax.interop.tensor_files import DTYPES, Item
from llm_jax.model import Model
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.storage import Path, as_path, is_remote, remove_tree
from llm_jax.transforms.prune import pruned_card

DTYPE_WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes that are written"""

ROLES = ("bos", "eos", "pad")

OURS = "llm_jax"
"""The key of config.json under which stands what only this project reads"""

log = logging.getLogger(__name__)


def save(
    model: Model,
    path: str | Path,
    dtype: str | None = None,
    shard_size: int = 5 * 10**9,
    family: str | None = None,
    ancestors: Sequence[Card] = (),
) -> None:
    """Write a model as a directory that transformers' `from_pretrained` reads: config.json, weights, tokenizer and README.md.

    Where all families that might take the model tie the size of a head to the width, one that lost heads is filled up with heads of zeros, which
    add nothing, and that is logged. What the card names as pruned stands in config.json, under llm_jax, so that zeros are still masks when the
    directory is read again.

    Args:
        path: a folder that does not exist or is empty.
        dtype: float32, bfloat16 or float16; by default that in which an imported model was stored, else float32.
        shard_size: bytes of a file of weights at most.
        family: a `model_type`; by default that of an imported model, else the first that has such a model.
        ancestors: cards of what the model was made of, the nearest first, for README.md.

    Raises:
        CheckpointError: the folder holds something, the disk is full, or no family has such a model.
    """
    path = as_path(path).expanduser().absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path} exists already")
    origin = model.card.get("huggingface", {})
    wanted = family or origin.get("config", {}).get("model_type")
    try:
        chosen = families.choose_family(model.config, wanted)
    except CheckpointError:
        filled = whole_heads(model)
        if filled is model:
            raise
        chosen = families.choose_family(filled.config, wanted)
        added = filled.config.heads - model.config.heads
        log.warning(
            "%s of transformers has heads of width / heads channels: %d heads of zeros were added to the %d of each attention, so that the "
            "function is the same",
            chosen.name,
            added,
            model.config.heads,
        )
        model = filled
    if chosen.name != origin.get("config", {}).get("model_type"):
        origin = {}
    if dtype is not None:
        choose("dtype", dtype, DTYPE_WORDS, CheckpointError)
    stated = config_json(model, chosen, origin, dtype or origin.get("dtype", ""))
    items = list(_items(model, chosen, origin, np.dtype(DTYPES[DTYPE_WORDS[stated["dtype"]]]), dtype is None))
    # In a bucket no folder is renamed: there config.json comes last, without which it is no model.
    unfinished = path if is_remote(path) else path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    done = False
    try:
        unfinished.mkdir(parents=True)
        if origin.get("generation"):
            _write_json(unfinished / "generation_config.json", origin["generation"])
        save_tokenizer(model, unfinished)
        tensor_files.write_folder(unfinished, items, shard_size)
        made = (stated["architectures"][0], chosen.name)
        about = model_card.readme(path.name, model.card, model.config, model.tokenizer, *made, ancestors)
        (unfinished / "README.md").write_text(about, encoding="utf-8")
        _write_json(unfinished / "config.json", stated)
        if unfinished != path:
            unfinished.rename(path)
        done = True
    except OSError as e:
        if checkpoint.is_full(e):
            raise CheckpointError(f"no space left on the disk of {path}: nothing was written") from e
        raise CheckpointError(f"writing {path} failed: {e}") from e
    finally:
        if not done:
            remove_tree(unfinished)


def whole_heads(model: Model) -> Model:
    """The model with so many heads of zeros added that all heads together are as wide as the model; itself where they are, or cannot be."""
    config = model.config
    heads, rest = divmod(config.dim, config.head_size)
    if rest or heads <= config.heads or config.kv_heads not in (0, config.heads) or config.positions == "relative":
        return model
    made = config.replace(heads=heads, kv_heads=heads if config.kv_heads else 0)
    missing = heads - config.heads

    def one(x: Any, names: tuple[str, ...]) -> Any:
        return jnp.pad(x, [(0, missing if name in ("heads", "kv") else 0) for name in names])

    params = jax.tree.map(one, model.params, transformer.axes(config))
    stated = pruned_card(params, [re.escape(path) for path in model.card.get("pruned", {})])
    return Model(made, params, model.tokenizer, {**model.card, **(stated if model.card.get("pruned") else {})})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _items(model: Model, family: Family, origin: Mapping[str, Any], dtype: np.dtype, as_stored: bool) -> Iterator[Item]:
    """The tensors to be written, under the names that an imported model had."""
    head = model.config.head
    same_head = head == _head(family, origin)
    prefix = (
        origin["prefix"] if same_head and origin.get("prefix") in family.prefixes.values() else family.prefixes[head]
    )
    wanted = names.places(model.config, family.entries(model.config, prefix))
    others = origin.get("other_dtypes", {}) if as_stored else {}
    made = {}
    for name, shape, fetch in names.arrays(model.params, wanted):
        own = DTYPES.get(DTYPE_WORDS.get(others.get(name, ""), ""), dtype)
        made[name] = Item(name, shape, np.dtype(own), fetch)
    yield from made.values()
    for entry in family.copies(head, prefix):
        if entry.theirs in origin.get("copies", ()) and entry.theirs not in made and entry.ours in wanted:
            yield made[wanted[entry.ours].names[0]]._replace(name=entry.theirs)


def _head(family: Family, origin: Mapping[str, Any]) -> str:
    """The head of the class that an imported model was written by."""
    known = {**{name: head for head, name in family.classes.items()}, **family.also}
    return known.get((origin.get("config", {}).get("architectures") or ["?"])[0], "none")


def config_json(model: Model, family: Family, origin: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What goes into config.json: what an imported model's said, under what this model is now."""
    original = dict(origin.get("config", {}))
    task = model.card.get("config", {}).get("task", {})
    labels = task.get("labels") or model.card.get("labels") or []
    labels = labels if len(labels) == model.config.labels else []
    made = families.describe(family, model.config, original, labels)
    made["architectures"] = [family.classes[model.config.head]]
    made["model_type"] = family.name
    pad, wanted = model.tokenizer and model.tokenizer.pad, family.write(model.config).get("pad_token_id")
    if pad is not None and wanted is not None and pad != wanted:
        raise CheckpointError(
            f"{family.name} of transformers counts positions from its pad token: model.position_offset is "
            f"{model.config.position_offset}, so that its id must be {wanted}, but in this tokenizer it is {pad}"
        )
    made["dtype"] = made["torch_dtype"] = dtype if dtype in DTYPE_WORDS else "float32"
    made.pop(OURS, None)
    if model.card.get("pruned"):
        made[OURS] = {"pruned": model.card["pruned"]}
    return {key: value for key, value in _with_ids(made, model).items() if key != "auto_map"}


def _with_ids(made: dict[str, Any], model: Model) -> dict[str, Any]:
    """The ids of the special tokens: those stated, as far as the vocabulary still has them, else the tokenizer's."""
    size = model.config.vocab_size
    special = model.tokenizer.special if model.tokenizer is not None else {}
    for key, value in made.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= size:
            made[key] = None
    for role in ROLES:
        if made.get(f"{role}_token_id") is None:
            made[f"{role}_token_id"] = special.get(role)
    if model.config.architecture == "encoder-decoder" and made.get("decoder_start_token_id") is None:
        begin = made["pad_token_id"] if model.tokenizer is None else model.tokenizer.start
        made["decoder_start_token_id"] = begin if begin is not None else 0
    return made


def save_tokenizer(model: Model, folder: Path) -> None:
    """Write the tokenizer's files, if the model has one. It frames texts as tasks do, but for a decoder's prompts, which go on."""
    if model.tokenizer is None:
        return
    continued = model.config.architecture == "decoder" and model.config.head == "lm"
    tokenizer = model.tokenizer if continued else model.tokenizer.framed()
    tokenizer.save(folder)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, model.config))


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """What goes into tokenizer_config.json: the tokenizer's own, and what transformers cannot know without it."""
    own = json.loads(tokenizer.config)
    known = {f"{role}_token": tokenizer.token(index) for role, index in tokenizer.special.items() if index is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        **known,
        **own,
    }
