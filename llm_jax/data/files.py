"""What the sources share: the files that a pattern names, their fingerprint, the cache folder, bytes as text.

What a record is belongs to `sources.py` and `tables.py`.
"""

import difflib
import functools
import glob
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_jax import storage
from llm_jax.errors import DataError
from llm_jax.storage import as_path

BOM = b"\xef\xbb\xbf"

Record = dict[str, Any]
"""The fields of a document and `id`, a string that names it. One that is not text: `{"id": ..., "invalid": True}`."""


class NotText(DataError):
    """Bytes that are not UTF-8, or an escape that is no character: what `data.invalid` is about."""


def cache_folder() -> Path:
    """Where what was fetched or computed is kept: `LLM_JAX_CACHE`, else `~/.cache/llm_jax`."""
    return Path(os.environ.get("LLM_JAX_CACHE") or Path.home() / ".cache" / "llm_jax")


def _nearest(pattern: str) -> str:
    """A hint for a pattern that names nothing: the entry nearest to its first part that does not exist."""
    whole = as_path(pattern)
    here = storage.top(whole)
    for part in whole.relative_to(here).parts:
        if not glob.has_magic(part) and (here / part).is_dir():
            here = here / part
            continue
        try:
            names = sorted(path.name for path in here.iterdir())
        except FileNotFoundError:
            return f"; there is no {here}"
        except PermissionError:
            names = []
        near = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
        where = "the current folder" if here == Path() else str(here)
        if near:
            return f"; did you mean {here / near[0]}?"
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return f"; {where} holds {shown}" if names else f"; {where} is empty"
    return f"; {pattern} is a folder: say {pattern.rstrip('/')}/** for all files below it"


def expand(spec: str) -> list[str]:
    """The files that `scheme:GLOB` names, sorted; `**` matches folders at any depth.

    Raises:
        DataError: no file matches, with the nearest name there is, or a file cannot be read.
    """
    pattern = os.path.expanduser(spec.partition(":")[2])
    if not pattern:
        raise DataError(f"source {spec!r} names no file: say {spec}PATH or {spec}FOLDER/**")
    paths = storage.glob(pattern)
    if not paths:
        raise DataError(f"source {spec!r}: no file matches{_nearest(pattern)}")
    for path in paths:
        if not storage.is_remote(path) and not os.access(path, os.R_OK):
            raise DataError(f"{path}: no permission to read it")
    return paths


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Make `path` by `write(temporary path)` and a rename, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def cached_by_stamp(
    kind: str, paths: Sequence[str], suffix: str, compute: Callable, read: Callable, write: Callable
) -> Any:
    """`compute()`, kept under the cache folder for as long as path, size and modification time of the files stay, or in a bucket their tag.

    Local files changed within the last two seconds are not trusted: a second write of the same size could bear the same time.
    """
    stamps = [storage.stamp(path) for path in paths]
    key = hashlib.sha256(json.dumps([kind, stamps]).encode()).hexdigest()
    cached = cache_folder() / kind / f"{key}{suffix}"
    if cached.is_file():
        return read(cached)
    value = compute()
    if (
        time.time_ns() - max((changed for _, _, changed in stamps if isinstance(changed, int)), default=0)
        > 2_000_000_000
    ):
        try:
            write_atomically(cached, lambda path: write(path, value))
        except OSError as e:  # only speed is lost: it is computed anew at the next start
            logging.getLogger(__name__).warning("cannot write to the cache folder %s: %s", cache_folder(), e)
    return value


def fingerprint(paths: Sequence[str]) -> str:
    """sha256 of the files' names, relative to the folder they share, and of their whole contents."""

    def compute() -> str:
        root = os.path.commonpath([os.path.dirname(storage.absolute(path)) for path in paths])
        total = hashlib.sha256()
        for path in paths:
            with storage.open_to_read(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(
                f"{os.path.relpath(storage.absolute(path), root)}\0{content}\n".encode("utf-8", "surrogateescape")
            )
        return total.hexdigest()

    return cached_by_stamp("fingerprint", paths, ".txt", compute, Path.read_text, Path.write_text)


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """The UTF-8 text of `data`, which begins at byte `offset` of the file `where`.

    Raises:
        NotText: not UTF-8; names the file and the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise NotText(
            f"{where}: not UTF-8 at byte {offset + e.start} (0x{data[e.start]:02x}): "
            "convert it, or set data.invalid to skip"
        ) from e


def guard(read: Callable[[], Record], name: str, skip: bool) -> Record:
    """The record that `read()` gives; with `skip`, the mark of an invalid one in place of `NotText`."""
    try:
        return read()
    except NotText:
        if not skip:
            raise
        return {"id": name, "invalid": True}


def with_id(record: Record, name: str) -> Record:
    """The record with its own `id` as a string, or `name` where it has none."""
    own = record.get("id")
    return {**record, "id": name if own is None or own == "" else str(own)}


def check_index(index: int, count: int) -> int:
    """`index` as an int, or IndexError, which ends a plain loop over a source."""
    if not 0 <= index < count:
        raise IndexError(f"record {index} of {count}")
    return int(index)


class Lazy:
    """A value made at first use in each process by `make`: what holds open files is made anew after unpickling."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._lock = make, threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            if not hasattr(self, "_value"):
                self._value = self._make()
            return self._value

    def __reduce__(self):
        return type(self), (self._make,)


class FileSource:
    """What the sources over files share: the spec, the sorted paths, none of them empty, and the fingerprint."""

    def __init__(self, spec: str, skip_invalid: bool):
        self.spec, self.skip_invalid, self.paths = spec, skip_invalid, expand(spec)
        for path in self.paths:
            if storage.stamp(path)[1] == 0:
                raise DataError(f"{path}: the file is empty: remove it, or narrow {spec!r}")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of names and contents."""
        return fingerprint(self.paths)
