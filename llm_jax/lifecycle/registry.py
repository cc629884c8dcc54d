"""Moving names: promote, roll back, and the verdicts that allow it. Atomic under a kill at any moment and under several writers.

A folder holds `registry.jsonl` (every move; a name stands where its last line says), `gates.jsonl` (every verdict) and `models/` (what was
promoted, by content hash, kept whole before the line that names it is written). Lines are only appended, under one lock, so that a move is judged
and written against the same state. Reading is in `llm_jax/names.py`.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax import names, saved, storage
from llm_jax.errors import CheckpointError
from llm_jax.names import Entry, RegistryError, Version
from llm_jax.storage import Path, is_remote, remove_tree

GATES = "gates.jsonl"
"""The file of all verdicts, in order"""

VERDICT = ("candidate", "incumbent", "passed", "suite", "reasons")
"""What a verdict says at least; `id` and `time` are given to one that has none"""


class RefusedError(RegistryError):
    """A model that passed no gate against the one that it would replace."""


@dataclasses.dataclass(frozen=True)
class Registry:
    """Names and the models they stand for, in a folder: as given, else as LLM_JAX_REGISTRY says, else `registry`."""

    folder: Path

    def __init__(self, folder: str | Path = ""):
        object.__setattr__(self, "folder", names.folder_of(folder))

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({entry["name"] for entry in self.moves()})

    def moves(self) -> list[Entry]:
        """All moves of all names, the first first."""
        return names.moves(self.folder)

    def history(self, name: str) -> list[Entry]:
        """The moves of a name, the first first. Raises CheckpointError for an unknown one."""
        return names.moves_of(self.folder, name)

    def resolve(self, name: str) -> Version:
        """What a name stands for now. Raises CheckpointError where it is unknown, or its model is gone or another one."""
        return names.resolve(name, self.folder)

    def locate(self, path: str | Path) -> str:
        """A model's place: of `registry:NAME` what the name stands for here, any other as it is. Raises as `resolve`."""
        given = os.fspath(path)
        return str(self.resolve(given.removeprefix(names.PREFIX)).path) if given.startswith(names.PREFIX) else given

    def gates(self) -> list[dict[str, Any]]:
        """All verdicts, the first first."""
        return names.read_lines(self.folder / GATES, ("id", *VERDICT))

    def record_gate(self, verdict: dict[str, Any]) -> str:
        """Append a verdict; the id under which it is on file. One that is there already is not appended again.

        Raises:
            RegistryError: it cannot be written, or another one has its id.
        """
        missing = [key for key in VERDICT if key not in verdict]
        if missing:
            raise ValueError(f"a verdict without {', '.join(missing)}")
        whole = {"time": _now(), **verdict}
        whole.setdefault("id", hashlib.sha256(_text(whole).encode()).hexdigest()[:12])
        with _locked(self.folder):
            for known in self.gates():
                if known["id"] == whole["id"]:
                    if _text({**known, **verdict}) != _text(known):
                        raise RegistryError(f"{self.folder / GATES} has another verdict {whole['id']} already")
                    return known["id"]
            _append(self.folder / GATES, whole)
        return whole["id"]

    def promote(self, name: str, checkpoint: str | Path, *, force: bool = False, why: str = "") -> Version:
        """Move a name to a checkpoint that passed the gate against the model it stands for; where it stands there already, it stays.

        Args:
            checkpoint: a checkpoint, a run's folder, or `registry:NAME` of this registry.
            force: move it whatever the gate said; needs `why`.

        Raises:
            RefusedError: the gate did not pass it against what stands there now.
            RegistryError: a bad name, force without why, or a disk that cannot be written.
            CheckpointError: the checkpoint is missing or damaged.
        """
        names.check_name(name)
        if force and not why.strip():
            raise RegistryError("--force needs --why='...': what is promoted past the gate has its reason on file")
        given = str(checkpoint)
        path = saved.find(storage.as_path(self.locate(checkpoint)))
        content = saved.params_hash(path)
        with _locked(self.folder):
            before = next((entry for entry in reversed(self.moves()) if entry["name"] == name), None)
            if before is not None and before["hash"] == content:
                _keep(path, content, self.folder)
                return names.version(self.folder, before)
            stands = None if before is None else before["hash"]
            verdict = _latest(self.gates(), content, stands)
            if not force and not (verdict and verdict["passed"]):
                other = _latest(self.gates(), content)
                raise RefusedError(_refusal(name, given, stands, verdict, other, names.option(self.folder)))
            model = _keep(path, content, self.folder)
            entry = {"name": name, "action": "promote", "hash": content, "path": given, "model": model, "from": stands}
            judged = {"gate": verdict and verdict["id"], "forced": not (verdict and verdict["passed"])}
            return self._move({**entry, **judged, "why": why.strip()})

    def rollback(self, name: str, why: str = "") -> Version:
        """Move a name back to the version before the one that stands; twice goes two back.

        Raises:
            RegistryError: there is nothing before it, or the disk cannot be written.
            CheckpointError: the name is unknown, or the model before is gone.
        """
        self.history(name)  # an unknown name makes no folder
        with _locked(self.folder):
            *earlier, now = versions(self.history(name))
            if not earlier:
                raise RegistryError(f"{name!r} stands at its first version: there is nothing to roll back to")
            back = earlier[-1]
            names.version(self.folder, back)
            entry = {"name": name, "action": "rollback", **{key: back.get(key) for key in ("hash", "path", "model")}}
            return self._move({**entry, "from": now["hash"], "gate": None, "forced": False, "why": why.strip()})

    def _move(self, entry: Entry) -> Version:
        entry = {**entry, "time": _now()}
        _append(self.folder / names.MOVES, entry)
        return Version(self.folder / entry["model"], entry["hash"], entry)


def versions(history: Sequence[Entry]) -> list[Entry]:
    """The promotions of a name that a rollback can reach, the last being where it stands.

    >>> [x["hash"] for x in versions([{"action": "promote", "hash": h} for h in "abc"] + [{"action": "rollback"}])]
    ['a', 'b']
    """
    reached: list[Entry] = []
    for entry in history:
        if entry["action"] == "rollback":
            reached.pop()
        else:
            reached.append(entry)
    return reached


def _text(entry: Entry) -> str:
    """An entry as it can be compared: lists and tuples are the same, and so is one NaN and another."""
    return json.dumps(entry, sort_keys=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


_ANY = "any"


def _latest(verdicts: Sequence[dict[str, Any]], candidate: str, incumbent: str | None = _ANY) -> dict[str, Any] | None:
    """The last verdict on a model against another one, or against whichever."""
    wanted = (v for v in reversed(verdicts) if v["candidate"] == candidate and incumbent in (_ANY, v["incumbent"]))
    return next(wanted, None)


def _refusal(name: str, path: str, stands: str | None, verdict: Any, other: Any, option: str) -> str:
    """Why a model may not take a name, and what to do; `option` names the registry to a command."""
    against = f" --against={names.PREFIX}{name}" if stands else ""
    again = f"python -m llm_jax gate {path}{against} --suite=FILE{option}"
    past = "or promote it with --force --why='...'"
    if verdict:
        reasons = "; ".join(verdict["reasons"][:3]) or "no reason given"
        return f"{path} was refused by gate {verdict['id']}: {reasons}. Mend it, {past}"
    now = f"{name!r} stands at {stands[:16]}" if stands else f"{name!r} stands at no model yet"
    if other:
        against = other["incumbent"][:16] if other["incumbent"] else "no model"
        return f"{path} was gated against {against} (gate {other['id']}), but {now}: {again}, {past}"
    return f"{path} was never gated, and {now}: {again}, {past}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the writers of a folder while this lasts; the system lets go when a writer dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise RegistryError(f"the registry {folder} cannot be written: {e.strerror}") from e
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _append(path: Path, entry: Entry) -> None:
    """Add a line, on the disk when this returns; what a killed writer left of one is cut off. Under the lock.

    Raises:
        RegistryError: it could not be written; the file holds what it held.
    """
    line = json.dumps(entry).encode() + b"\n"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            held = len(names.whole_lines(path))
            os.ftruncate(file, held)
            if not held:
                _sync(path.parent)
            try:
                written = os.write(file, line)
                while written < len(line):  # the disk took a part of it: now it says why
                    written += os.write(file, line[written:])
                os.fsync(file)
            except BaseException:
                os.ftruncate(file, held)
                raise
        finally:
            os.close(file)
    except OSError as e:
        raise RegistryError(f"{path}: {e.strerror}: nothing was written, all names stand where they stood") from e


def _sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of files, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _keep(path: Path, content: str, folder: Path) -> str:
    """Have a checkpoint below the registry's folder, whole, and give its place. Under the lock, so that what is unfinished has no maker.

    Raises:
        RegistryError: it cannot be written.
        CheckpointError: it changed meanwhile.
    """
    place = f"models/{content[:16]}"
    target = folder / place
    with contextlib.suppress(CheckpointError):  # not there or damaged: made anew
        if target.is_dir() and saved.params_hash(target) == content:
            return place
    part = target.with_name(f"{target.name}.part")
    try:
        remove_tree(part)
        part.mkdir(parents=True)
        _copy(path, part)
        if saved.params_hash(part) != content:
            raise CheckpointError(f"{path} changed while it was read: promote it again")
        remove_tree(target)
        part.rename(target)
        _sync(target.parent)
    except FileNotFoundError as e:
        remove_tree(part)
        raise CheckpointError(f"{path} was removed while it was read: promote another one") from e
    except OSError as e:
        remove_tree(part)
        raise RegistryError(f"{target}: {e.strerror}: the model was not kept, all names stand where they stood") from e
    return place


def _copy(source: Path, target: Path) -> None:
    """All files of a folder in another one, on the disk: linked where that is possible, so that they take no room."""
    if is_remote(source):
        files = [storage.as_path(name) for name in storage.glob(f"{glob.escape(str(source))}/**")]
    else:
        files = [file for file in source.rglob("*") if file.is_file()]
    for file in files:
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(file):
            with storage.open_to_read(os.fspath(file)) as content, to.open("wb") as copied:
                shutil.copyfileobj(content, copied, 2**23)
        else:
            try:
                os.link(file, to)
            except OSError:  # another disk, or one without links
                shutil.copyfile(file, to)
        _sync(to)
    for inner, _, _ in os.walk(target):
        _sync(Path(inner))
