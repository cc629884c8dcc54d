"""Checkpoints: complete or absent, written in the background, verified when read. The only module that knows Orbax.

A checkpoint is a folder with `params/` (the weights alone, so that a model loads without its optimizer), `state/` (the rest of the train
state) and `about/`: `card.json`, `tokenizer.json` and `data.json`, the place in the data.
"""

import asyncio
import dataclasses
import errno
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from llm_jax import tree
from llm_jax.config import Checkpoint
from llm_jax.errors import CheckpointError

log = logging.getLogger(__name__)

Card = dict[str, Any]


class _Files:
    """Small text files of a checkpoint, in the interface by which Orbax saves and loads what is no array."""

    def __init__(self, files: dict[str, str]):
        self.files = files

    async def save(self, directory: Any):
        files = dict(self.files)

        async def write():
            folder = Path(await directory.await_creation())
            if jax.process_index() == 0:
                for name, text in files.items():
                    await asyncio.to_thread((folder / name).write_text, text, encoding="utf-8")

        return write()

    async def load(self, directory: Any):
        async def read():
            self.files = {file.name: file.read_text(encoding="utf-8") for file in Path(directory).iterdir()}

        return read()


@jax.jit
def _leaf_hashes(leaves: list[Array]) -> list[Array]:
    """Two 32-bit sums of each leaf's words mixed with their index: whole-number arithmetic, the same on any mesh."""
    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")).astype(jnp.uint32)
        index = jnp.zeros(words.shape, jnp.uint32)
        for axis, size in enumerate(words.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> 15)
        return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (2 * index + 1), dtype=jnp.uint32)])

    return [one(x) for x in leaves]


def content_hash(params: Any) -> str:
    """A fingerprint of the names, shapes, dtypes and bits of a tree, independent of how it is laid out over devices."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_leaf_hashes([x for _, x in leaves]))
    digest = hashlib.sha256()
    for (path, x), pair in zip(leaves, sums):
        digest.update(f"{tree.path_name(path)} {x.dtype} {x.shape} {pair[0]:08x} {pair[1]:08x}\n".encode())
    return digest.hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Whether a disk without room is at the bottom of this error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mismatch(saved: Any, wanted: Any) -> str:
    """The first difference between the shapes in a checkpoint and those asked for; empty if there is none."""
    found = {tree.path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(saved) if hasattr(x, "shape")}
    asked = {tree.path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(wanted)}
    for name, shape in asked.items():
        if name not in found:
            return f"it has no {name!r} {shape}"
        if found[name] != shape:
            return f"{name!r} is {found[name]} there and {shape} in this config"
    extra = sorted(set(found) - set(asked))
    return f"{extra[0]!r} {found[extra[0]]} of it is not in this config" if extra else ""


def _load(path: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays asked for and the text files of a checkpoint; what cannot be read raises what the library raises."""
    about = _Files({})
    metadata = ocp.checkpointables_metadata(path).metadata
    for name, abstract in wanted.items():
        different = _mismatch(metadata[name], abstract)
        if different:
            raise CheckpointError(f"checkpoint {path} is of another shape: {different}")
    loaded = ocp.load_checkpointables(path, {**wanted, "about": about})
    files = {file.name: file.read_text(encoding="utf-8") for file in (path / "about").iterdir()}
    card = json.loads(files["card.json"])
    for name in wanted:
        if content_hash(loaded[name]) != card["hashes"][name]:
            raise ValueError(f"the bits of {name!r} are not those that were saved")
    return {name: loaded[name] for name in wanted}, files


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a run's folder, ascending."""
    root = Path(folder) / "checkpoints"
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir()) if root.is_dir() else []


def find(path: Path) -> Path:
    """The folder of the newest checkpoint below `path`, a checkpoint or a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path).absolute()
    if (path / "about" / "card.json").is_file():
        return path
    for step in reversed(steps(path)):
        if (path / "checkpoints" / str(step) / "about" / "card.json").is_file():
            return path / "checkpoints" / str(step)
    raise CheckpointError(f"no checkpoint in {path}" if path.exists() else f"no such file or folder: {path}")


def read_card(path: Path) -> Card:
    """The card of a checkpoint. Raises CheckpointError when it is missing or no JSON."""
    try:
        return json.loads((find(path) / "about" / "card.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"the card of {path} cannot be read: {e}") from e


def load_params(path: Path, abstract: Any) -> tuple[Any, dict[str, str]]:
    """The weights of a checkpoint, laid out as `abstract` says, and its text files.

    Raises:
        CheckpointError: missing, damaged, or of another shape.
    """
    path = find(path)
    try:
        loaded, files = _load(path, {"params": abstract})
    except CheckpointError:
        raise
    except Exception as e:  # Orbax raises many kinds; for the user it is one
        raise CheckpointError(f"checkpoint {path} is damaged: {_reason(e)}") from e
    return loaded["params"], files


def save_params(path: Path, params: Any, card: Card, tokenizer: str | None = None) -> None:
    """Write a checkpoint of the weights alone, with its card. Raises CheckpointError when `path` exists or the disk is full."""
    path = Path(path).absolute()
    if path.exists() and any(path.iterdir()):
        raise CheckpointError(f"{path} exists already")
    try:
        ocp.save_checkpointables(path, {"params": params, "about": _about(card, {"params": params}, tokenizer, None)}, overwrite=True)
    except Exception as e:
        raise _failed(e, path) from e


def _about(card: Card, arrays: dict[str, Any], tokenizer: str | None, data: Any) -> _Files:
    card = {**card, "hashes": {name: content_hash(x) for name, x in arrays.items()}}
    files = {"card.json": json.dumps(card, indent=1), "tokenizer.json": tokenizer, "data.json": None if data is None else json.dumps(data)}
    return _Files({name: text for name, text in files.items() if text is not None})


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _failed(error: BaseException, where: Path) -> CheckpointError:
    if is_full(error):
        return CheckpointError(f"no space left on the disk of {where}: the checkpoint was not written; earlier ones are intact")
    return CheckpointError(f"writing {where} failed: {_reason(error)}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a run: its arrays, its place in the data, its card."""

    step: int
    params: Any
    state: Any
    data: Any
    card: Card
    tokenizer: str | None


class Checkpoints:
    """The checkpoints of one run: saves in the background, keeps the newest and the best, falls back past damaged ones."""

    def __init__(self, folder: Path, settings: Checkpoint):
        self.root = Path(folder).absolute() / "checkpoints"
        self.settings = settings
        self._manager: ocp.training.Checkpointer | None = None

    def restore(self, params: Any, state: Any) -> Restored | None:
        """The newest checkpoint that can be read, None if there is none; damaged ones are set aside with a warning.

        Raises:
            CheckpointError: its shapes are not those of the config.
        """
        for step in reversed(steps(self.root.parent)):
            path = self.root / str(step)
            try:
                arrays, files = _load(path, {"params": params, "state": state})
                return Restored(step, arrays["params"], arrays["state"], json.loads(files["data.json"]), json.loads(files["card.json"]),
                                files.get("tokenizer.json"))
            except CheckpointError:
                raise
            except Exception as e:  # whatever is wrong with it, the one before may be whole
                aside = _free_name(self.root / f"{step}.damaged")
                if jax.process_index() == 0:
                    path.rename(aside)
                log.warning("checkpoint %s is incomplete or damaged (%s): set aside as %s, falling back to the one before",
                            path, _reason(e), aside.name)
        return None

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            keep = [ocp.training.preservation_policies.LatestN(self.settings.keep)]
            if self.settings.best:
                keep.append(ocp.training.preservation_policies.BestN(
                    get_metric_fn=lambda metrics: -float(metrics[self.settings.best]), n=1, keep_checkpoints_without_metrics=False))
            self._manager = ocp.training.Checkpointer(
                self.root, preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True)
        return self._manager

    def save(self, step: int, params: Any, state: Any, data: Any, card: Card, tokenizer: str | None,
             metrics: dict[str, float] | None = None) -> None:
        """Begin to write the checkpoint of a step, after the one before it is whole.

        Raises:
            CheckpointError: this or the save before it failed, e.g. for want of space.
        """
        metrics = metrics if metrics and self.settings.best in metrics else None
        try:
            about = _about(card, {"params": params, "state": state}, tokenizer, data)
            self._open().save_checkpointables_async(step, {"params": params, "state": state, "about": about}, force=True, metrics=metrics)
        except Exception as e:
            raise _failed(e, self.root / str(step)) from e

    def wait(self) -> None:
        """Return when the last save is whole. Raises as `save`."""
        if self._manager is not None:
            try:
                self._manager._manager.wait_until_finished()  # noqa: SLF001  (v1 has no public way to wait for a save begun earlier)
            except Exception as e:
                raise _failed(e, self.root) from e

    def close(self) -> None:
        """Wait and release what the library holds."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            try:
                manager.close()
            except Exception as e:
                raise _failed(e, self.root) from e

    def abandon(self) -> None:
        """Remove what a failed save left behind."""
        for path in self.root.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def _free_name(path: Path) -> Path:
    return path if not path.exists() else next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}{i}")).exists())


def abstract_like(tree_of_arrays: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, as restoring wants them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree_of_arrays, shardings)


def to_numpy(params: Any) -> Any:
    """Params as NumPy arrays on the host."""
    return jax.tree.map(np.asarray, params)
