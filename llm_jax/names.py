"""What `registry:NAME` stands for: the last whole line about it in a file that is only appended to. Reads alone, and without JAX.

What moves a name is `lifecycle/registry.py`; a reader takes no lock, and what a killed writer left does not disturb it.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from llm_jax import saved
from llm_jax.errors import CheckpointError, UserError, choose
from llm_jax.storage import Path, as_path, is_remote

PREFIX = "registry:"

VARIABLE = "LLM_JAX_REGISTRY"
"""of the environment, names the folder"""

MOVES = "registry.jsonl"
"""The file of all moves of all names, in order"""

Entry = dict[str, Any]
"""name, action (promote or rollback), hash, path (as given), model (below the folder), from (the hash before), gate, forced, why, time"""


class RegistryError(UserError):
    """A name, a folder or a move with which a registry cannot serve."""


@dataclasses.dataclass(frozen=True)
class Version:
    """What a name stands for."""

    path: Path
    """of the checkpoint that the registry keeps"""
    hash: str
    """of its weights"""
    entry: Entry
    """by which the name came there"""

    @property
    def told(self) -> str:
        """In a line."""
        how = {"rollback": ", rolled back"}.get(self.entry["action"], ", by force" if self.entry.get("forced") else "")
        before = (self.entry.get("from") or "nothing")[:16]
        return f"{self.entry['name']}: {before} -> {self.hash[:16]} ({self.path}){how}"


def folder_of(folder: str | Path = "") -> Path:
    """A registry's folder: as given, else as LLM_JAX_REGISTRY says, else `registry`. Raises RegistryError for one in a bucket."""
    told = os.fspath(folder) or os.environ.get(VARIABLE, "") or "registry"
    if is_remote(told):
        raise RegistryError(
            f"{told}: a registry lies on a disk, since nothing can be appended to a file in a bucket: name a local folder"
        )
    return as_path(told).expanduser()


def option(folder: Path) -> str:
    """What a command needs to mean this registry: ` --registry=FOLDER`, or nothing where it is the default one."""
    return "" if folder == folder_of() else f" --registry={shlex.quote(os.fspath(folder))}"


def check_name(name: str) -> str:
    """The name, if it is made of what a name may hold. Raises RegistryError."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise RegistryError(f"{name!r} is no name for the registry: letters, digits, - _ and . only")
    return name


def whole_lines(path: Path) -> bytes:
    """What a file that grows by lines holds, without a last line that is cut short.

    It is read until a second reading goes on from the first: between the parts of one reading, a writer may have cut off what a killed one
    left and appended its own.
    """
    before = None
    while True:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as e:
            raise RegistryError(f"{path} cannot be read: {e.strerror}") from e
        lines = content[: content.rfind(b"\n") + 1]
        if before is not None and lines.startswith(before):
            return lines
        before = lines


def read_lines(path: Path, needed: Sequence[str]) -> list[Entry]:
    """The JSON objects of a file, one a whole line, each with the keys that are needed. Raises RegistryError where a line is none."""
    found = []
    for number, line in enumerate(whole_lines(path).split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            missing = [key for key in needed if key not in entry]
        except (ValueError, TypeError):
            missing = ["JSON"]
        if missing or not isinstance(entry, dict):
            raise RegistryError(
                f"{path}:{number} is not a line of a registry (no {missing or 'object'}): restore the file"
            )
        found.append(entry)
    return found


def moves(folder: Path) -> list[Entry]:
    """All moves of all names, in order."""
    return read_lines(folder / MOVES, ("name", "action", "hash", "model"))


def moves_of(folder: Path, name: str) -> list[Entry]:
    """The moves of a name, the first first. Raises CheckpointError for a name that nothing was promoted to."""
    check_name(name)
    found = moves(folder)
    if not found:
        command = f"python -m llm_jax promote {name} CHECKPOINT{option(folder)}"
        raise CheckpointError(f"there is no name in the registry {folder}: {command}")
    choose(f"name in the registry {folder}:", name, {entry["name"] for entry in found}, CheckpointError)
    return [entry for entry in found if entry["name"] == name]


def version(folder: Path, entry: Entry) -> Version:
    """The model of a move, if the registry has it still. Raises CheckpointError where it is gone or another one."""
    path = folder / entry["model"]
    there = f"{entry['name']!r} of the registry {folder} is {entry['hash'][:16]}"
    mend = "promote that model again, or roll back"
    if not path.is_dir():
        raise CheckpointError(f"{there}, but {path} is not there any more: {mend}")
    try:
        found = saved.params_hash(path)
    except CheckpointError as e:
        raise CheckpointError(f"{there}, but {e}: {mend}") from e
    if found != entry["hash"]:
        raise CheckpointError(f"{there}, but {path} holds {found[:16]}: {mend}")
    return Version(path, found, entry)


def resolve(name: str, folder: str | Path = "") -> Version:
    """What a name stands for now.

    Raises:
        CheckpointError: the name is not known, or its model is gone or another one.
        RegistryError: no name at all, or a folder in a bucket.
    """
    root = folder_of(folder)
    return version(root, moves_of(root, name)[-1])
