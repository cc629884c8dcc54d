"""Checkpoints: complete or absent, written in the background, verified when read. With `remote_arrays.py` all that knows Orbax.

A checkpoint is a folder with `params/` (the weights that are evaluated, so that a model loads without its optimizer), `state/` (the rest of the train
state, with the weights that are trained where others are evaluated) and `about/`: `card.json`, `arrays.json` (types and shapes), `tokenizer.json`,
`data.json` (the place in the data) and their `SHA256SUMS`. Arrays are verified by the hashes in the card. It is complete on a disk once it bears its
name, in a bucket once it holds `COMMIT`, and it ceases to be so before anything of it is moved or removed.
"""

import asyncio
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llm_jax import tree
from llm_jax.card import Card, content_hash
from llm_jax.config import Checkpoint
from llm_jax.errors import CheckpointError, UserError
from llm_jax.metrics import rising
from llm_jax.remote_arrays import reached
from llm_jax.saved import COMMIT, SUMS, find, read_card, root_cause, steps, texts
from llm_jax.saved import read_texts as read_texts
from llm_jax.storage import Path, as_path, is_remote, remove_tree

log = logging.getLogger(__name__)


class _Files:
    """Small text files of a checkpoint, in the interface by which Orbax saves what is no array."""

    def __init__(self, files: dict[str, str]):
        self.files = files

    async def save(self, directory: Any):
        files = dict(self.files)

        async def write():
            folder = as_path(await directory.await_creation())
            if jax.process_index() == 0:
                for name, text in files.items():
                    await asyncio.to_thread((folder / name).write_text, text, encoding="utf-8")

        return write()

    async def load(self, directory: Any):
        raise NotImplementedError  # `_texts` reads them; Orbax asks that there be such a method


def is_full(error: BaseException | None) -> bool:
    """Whether a disk without room is at the bottom of this error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache
def silence_late_writes() -> None:
    """From here on, nothing is printed when a write of arrays ends after its save has failed.

    Orbax closes the event loop of a save at its first failed write; each of tensorstore's others, ending later, finds the loop
    closed and prints a traceback, with no Python object that it concerns. The failure itself is raised by the save.
    """
    before = sys.unraisablehook

    def hook(late: Any) -> None:
        if not (
            late.object is None and late.exc_type is RuntimeError and str(late.exc_value) == "Event loop is closed"
        ):
            before(late)

    sys.unraisablehook = hook


def _described(arrays: Any) -> dict[str, str]:
    """The type and shape of each array of a tree by its path.

    >>> _described({"a": {"b": jax.ShapeDtypeStruct((2, 3), "int8")}})
    {'a/b': 'int8[2,3]'}
    """
    return {
        name: f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for name, x in zip(tree.names(arrays), jax.tree.leaves(arrays))
    }


def _mismatch(saved: dict[str, str], wanted: dict[str, str]) -> str:
    """The first difference between the arrays in a checkpoint and those asked for; empty if there is none."""
    for name in (*wanted, *saved):
        if name not in saved:
            return f"it has no {name!r} {wanted[name]}"
        if name not in wanted:
            return f"{name!r} {saved[name]} of it is not in this config"
        if saved[name] != wanted[name]:
            return f"{name!r} is {saved[name]} there and {wanted[name]} in this config"
    return ""


def difference(found: Any, wanted: Any) -> str:
    """The first array of a tree that has another type or shape than is wanted, in words; empty if there is none."""
    return _mismatch(_described(found), _described(wanted))


def _load(
    path: Path, wanted: dict[str, Any], check: Callable[[Card], None] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays asked for and the text files of a checkpoint; what cannot be read raises what the library raises."""
    files = texts(path)
    card = json.loads(files["card.json"])
    if check is not None:
        check(card)
    arrays = json.loads(files["arrays.json"])
    for name, abstract in wanted.items():
        different = _mismatch(arrays[name], _described(abstract))
        if different:
            raise CheckpointError(f"checkpoint {path} is of another shape: {different}")
    with reached(path) as name:
        loaded = ocp.load_checkpointables(name, wanted)
    for name in wanted:
        if content_hash(loaded[name]) != card["hashes"][name]:
            raise ValueError(f"the bits of {name!r} are not those that were saved")
    return {name: loaded[name] for name in wanted}, files


def load_params(path: Path, abstract: Any) -> tuple[Any, Card, str | None]:
    """The weights of a checkpoint, laid out as `abstract` says, its card and its tokenizer.

    Raises:
        CheckpointError: missing, damaged, or of another shape.
    """
    path = find(path)
    try:
        loaded, files = _load(path, {"params": abstract})
    except UserError:
        raise
    except Exception as e:  # Orbax raises many kinds; for the user it is one
        raise CheckpointError(f"checkpoint {path} is damaged: {root_cause(e)}") from e
    return loaded["params"], json.loads(files["card.json"]), files.get("tokenizer.json")


def load_optimizer(path: Path, place: Callable[[Any], Any]) -> Any:
    """The optimizer's state in the checkpoint of a run, as nested dicts and lists.

    Args:
        path: a checkpoint or a run's folder.
        place: from the shapes and dtypes of that state to a sharding of each array.

    Raises:
        CheckpointError: missing or damaged, or of a model without a run.
    """
    path = find(path)
    if "state" not in read_card(path)["hashes"]:
        raise CheckpointError(
            f"{path} holds a model without the state of an optimizer: only a run's checkpoint has one"
        )
    try:
        with reached(path) as name:
            saved = ocp.checkpointables_metadata(name).metadata["state"]
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
            loaded = ocp.load_checkpointables(name, {"state": abstract_like(shapes, place(shapes))})["state"]
        order = list(json.loads(texts(path)["arrays.json"])["state"])  # of the state's fields, which are keys now
        if content_hash(loaded, order) != read_card(path)["hashes"]["state"]:
            raise ValueError("the bits of 'state' are not those that were saved")
    except UserError:
        raise
    except Exception as e:  # Orbax raises many kinds; for the user it is one
        raise CheckpointError(f"checkpoint {path} is damaged: {root_cause(e)}") from e
    return loaded["opt_state"]


def save_params(path: Path, params: Any, card: Card, tokenizer: str | None = None) -> None:
    """Write a checkpoint of the weights alone, with its card. Raises CheckpointError when `path` exists or the disk is full."""
    path = as_path(path).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path} exists already")
    about = _about(card, {"params": params}, tokenizer, None)
    try:
        with reached(path) as name:
            ocp.save_checkpointables(name, {"params": params, "about": about}, overwrite=True)
    except UserError:
        raise
    except Exception as e:
        _remove_unfinished(path.parent, path.name)
        raise _failed(e, path) from e


def _about(card: Card, arrays: dict[str, Any], tokenizer: str | None, data: Any) -> _Files:
    card = {**card, "hashes": {name: content_hash(x) for name, x in arrays.items()}}
    described = {name: _described(x) for name, x in arrays.items()}
    files = {
        "card.json": json.dumps(card, indent=1),
        "arrays.json": json.dumps(described, indent=1),
        "tokenizer.json": tokenizer,
        "data.json": None if data is None else json.dumps(data),
    }
    kept = {name: text for name, text in files.items() if text is not None}
    sums = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in kept.items())
    return _Files({**kept, SUMS: sums})


def _failed(error: BaseException, where: Path) -> CheckpointError:
    if is_full(error):
        return CheckpointError(
            f"no space left on the disk of {where}: the checkpoint was not written; earlier ones are intact"
        )
    return CheckpointError(f"writing {where} failed: {root_cause(error)}")


def _remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what saves and removals that were cut short left in a folder."""
    if is_remote(folder):
        held = [folder / name] if name else folder.iterdir() if folder.is_dir() else ()
        found = [path for path in held if ".damaged" not in path.name and not (path / COMMIT).is_file()]
    else:
        found = [*folder.glob(f"{name}*orbax-checkpoint-tmp*"), *folder.glob(f"{name}*.removing*")]
    for path in found:
        remove_tree(path)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a run: its arrays, its place in the data, its card."""

    params: Any
    state: Any
    data: Any
    card: Card


class Checkpoints:
    """The checkpoints of one run: saves in the background, keeps the newest and the best, falls back past damaged ones."""

    def __init__(self, folder: Path, settings: Checkpoint, best_from: int = 0):
        """`best_from` is the first step that may be the best."""
        self.root = as_path(folder).absolute() / "checkpoints"
        self.settings, self.best_from = settings, best_from
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        if jax.process_index() == 0:
            _remove_unfinished(self.root)

    def restore(self, params: Any, state: Any, check: Callable[[Card], None] | None = None) -> Restored | None:
        """The newest checkpoint that can be read, None if there is none; damaged newer ones are set aside with a warning.

        Args:
            params, state: shapes, dtypes and shardings, see `abstract_like`.
            check: raises if a run with this card is not to be continued.

        Raises:
            CheckpointError: its shapes are not those of the config, or all checkpoints are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for step in reversed(steps(self.root.parent)):
            path = self.root / str(step)
            try:
                arrays, files = _load(path, {"params": params, "state": state}, check)
                found = Restored(
                    arrays["params"], arrays["state"], json.loads(files["data.json"]), json.loads(files["card.json"])
                )
            except (UserError, jax.errors.JaxRuntimeError):  # the latter of a process that is gone, or of memory
                raise
            except Exception as e:  # whatever is wrong with it, the one before may be whole
                damaged.append((path, root_cause(e)))
                continue
            for broken, reason in damaged:
                self._set_aside(broken, reason, path)
            return found
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self.root} can be read; they were left in place "
                f"({damaged[0][0].name}: {damaged[0][1]}). Remove that folder to begin the run anew"
            )
        return None

    def _set_aside(self, path: Path, reason: str, instead: Path) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again."""
        aside = _free_name(path.with_name(f"{path.name}.damaged"))
        if jax.process_index() == 0:
            if is_remote(path):
                (path / COMMIT).unlink(missing_ok=True)
            path.rename(aside)
        log.warning(
            "checkpoint %s is incomplete or damaged (%s): set aside as %s, falling back to %s",
            path,
            reason,
            aside.name,
            instead,
        )

    def save(self, step: int, params: Any, state: Any, data: Any, card: Card, tokenizer: str | None) -> None:
        """Begin to write the checkpoint of a step, after the one before it is whole. What is saved is what the arrays hold now.

        Raises:
            CheckpointError: this or the save before it failed, e.g. for want of space.
        """
        self.wait()
        silence_late_writes()
        path = self.root / str(step)
        try:
            about = _about(card, {"params": params, "state": state}, tokenizer, data)
            with reached(path) as name:
                response = ocp.save_checkpointables_async(name, {"params": params, "state": state, "about": about})
        except Exception as e:
            raise _failed(e, path) from e
        self._saving = self._background.submit(self._complete, response, path)

    def _complete(self, response: Any, path: Path) -> None:
        """Wait until a checkpoint is whole, then remove those that need not be kept."""
        try:
            response.result()
        except Exception as e:
            raise _failed(e, path) from e
        if jax.process_index() == 0:
            self._prune()

    def _prune(self) -> None:
        known = steps(self.root.parent)
        scores = {step: score for step in known if math.isfinite(score := self._score(step))}
        sign = -1 if self.settings.best and rising(self.settings.best) else 1
        kept = {*known[-self.settings.keep :], *sorted(scores, key=lambda step: sign * scores[step])[:1]}
        for step in set(known) - kept:
            gone = self.root / str(step)
            if is_remote(gone):
                (gone / COMMIT).unlink()
            else:
                gone = gone.rename(_free_name(self.root / f"{step}.removing"))
            remove_tree(gone)

    def _score(self, step: int) -> float:
        """The held-out metric of a checkpoint at its own step, by which the best is kept; not finite where there is none, or it may not be the best."""
        if step < self.best_from:
            return math.inf
        try:
            results = read_card(self.root / str(step))["results"]
        except (CheckpointError, KeyError):
            return math.inf
        return results.get(self.settings.best, math.inf) if results.get("step") == step else math.inf

    def wait(self) -> None:
        """Return when the last save is whole. Raises as `save`."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def abandon(self) -> None:
        """After a failure: let a save under way come to its end, and remove what a failed one left behind."""
        try:
            self.wait()
        except CheckpointError as e:
            log.warning("%s", e)
        if jax.process_index() == 0:
            _remove_unfinished(self.root)


def _free_name(path: Path) -> Path:
    return (
        path
        if not path.exists()
        else next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}{i}")).exists())
    )


def abstract_like(tree_of_arrays: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, as restoring wants them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree_of_arrays, shardings)
