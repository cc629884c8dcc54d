"""Records by index: `open_source` and the sources over text and jsonl files.

Responsible for finding, indexing and reading records and for saying what is wrong with a file; parquet and TFDS are in
`tables.py`, packages in `assets.py`. Which field a task needs, mixing, shuffling and splitting belong to the tasks and
the pipeline.

Every source reads on access, can be pickled (open files are not carried along), and can be read from several threads.
"""

import functools
import glob
import json
import mmap
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_jax.config import Data
from llm_jax.data import assets, files, tables
from llm_jax.data.files import Record
from llm_jax.errors import DataError, choose, suggest


class Source(Protocol):
    """Random access to records."""

    spec: str
    """the string it was opened from"""

    @property
    def fingerprint(self) -> str:
        """sha256 of names and contents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(spec: str, data: Data) -> Source:
    """The records that `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB`, `tfds:NAME[/CONFIG][:SPLIT]` or `asset:NAME` names.

    `data.text` is the field that the document of a text file stands in; `data.invalid` says whether bytes that are not
    UTF-8 raise on access or give `{"id": ..., "invalid": True}`.

    Raises:
        DataError: an unknown scheme, asset or data set; no file; an empty file. On access: a record that cannot be
            read.

    >>> open_source("txt:a/*.txt", Data())
    Traceback (most recent call last):
    llm_jax.errors.DataError: unknown scheme 'txt' of source 'txt:a/*.txt'; did you mean 'text'?
    """
    scheme, colon, _ = spec.partition(":")
    if not colon:
        known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(spec).suffix, "text")
        raise DataError(f"source {spec!r} has no scheme: say {known}:{spec}, or one of {', '.join(_SCHEMES)}")
    if scheme not in _SCHEMES:
        raise DataError(f"unknown scheme {scheme!r} of source {spec!r}{suggest(scheme, _SCHEMES)}")
    return _SCHEMES[scheme](spec, data)


def field(record: Record, name: str, setting: str = "") -> Any:
    """`record[name]`, or an error that names the fields there are and the setting that chose this one.

    >>> field({"id": "a.jsonl:1", "txet": "x"}, "text", "data.text")
    Traceback (most recent call last):
    llm_jax.errors.DataError: a.jsonl:1: no field 'text'; did you mean 'txet'? It has: id, txet. Set data.text
    """
    if name not in record:
        near = suggest(name, record)
        near = "." if near.startswith("; known") else near
        has = ", ".join(sorted(record)) or "none"
        raise DataError(
            f"{record.get('id', 'record')}: no field {name!r}{near} It has: {has}"
            + (f". Set {setting}" if setting else "")
        )
    return record[name]


class TextFiles(files.FileSource):
    """`text:GLOB`: one document a file. The text stands in the field that `data.text` names."""

    def __init__(self, spec: str, data: Data):
        super().__init__(spec, data.invalid == "skip")
        self._field = data.text

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        path = self.paths[files.check_index(index, len(self))]
        return files.guard(lambda: self._read(path), path, self.skip_invalid)

    def _read(self, path: str) -> Record:
        content = Path(path).read_bytes()
        mark = len(files.BOM) if content.startswith(files.BOM) else 0
        return {"id": path, self._field: files.decode(content[mark:], path, mark)}


def _index_lines(path: str) -> np.ndarray:
    """(records, 2) of byte offset and line number of each line that is not blank."""
    found, offset = array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(files.BOM):
                offset, line = len(files.BOM), line[len(files.BOM) :]
            if line.strip():
                found.extend((offset, number))
            offset += len(line)
    return np.array(found, np.int64).reshape(-1, 2)


def _line_index(path: str) -> np.ndarray:
    """`_index_lines(path)`, kept in the cache folder and mapped rather than loaded."""
    return files.cached_by_stamp(
        "lines", [path], ".npy", lambda: _index_lines(path), functools.partial(np.load, mmap_mode="r"), np.save
    )


def _map_lines(paths: list[str]) -> list[tuple[np.ndarray, mmap.mmap]]:
    pairs = []
    for path in paths:
        with open(path, "rb") as file:
            pairs.append((_line_index(path), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return pairs


class JsonLines(files.FileSource):
    """`jsonl:GLOB`: one document a line, none for a blank one. Files and index are mapped, not held."""

    def __init__(self, spec: str, data: Data):
        super().__init__(spec, data.invalid == "skip")
        counts = [len(_line_index(path)) for path in self.paths]
        if 0 in counts:
            raise DataError(f"{self.paths[counts.index(0)]}: no records: every line is blank")
        self._ends = np.cumsum(counts)
        self._open = files.Lazy(functools.partial(_map_lines, self.paths))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        index = files.check_index(index, len(self))
        which = int(np.searchsorted(self._ends, index, side="right"))
        lines, content = self._open()[which]
        start, number = (int(x) for x in lines[index - (int(self._ends[which - 1]) if which else 0)])
        stop = content.find(b"\n", start)
        line = content[start : len(content) if stop < 0 else stop]
        name = f"{self.paths[which]}:{number}"
        return files.guard(lambda: _parse(line, name, start), name, self.skip_invalid)


def _parse(line: bytes, name: str, start: int) -> Record:
    """The object in a line of a jsonl file; its own `id` is kept, as a string."""
    text = files.decode(line, name, start)
    try:
        record = json.loads(text)
    except ValueError as e:
        raise DataError(f"{name}: not JSON: {e}") from e
    if not isinstance(record, dict):
        raise DataError(f'{name}: a JSON {type(record).__name__}, not an object such as {{"text": "..."}}')
    if "\\u" in text:
        _check_escapes(record, name)
    return files.with_id(record, name)


def _check_escapes(record: Record, name: str):
    """A lone \\ud800 is valid JSON but no character: no tokenizer takes it."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise files.NotText(
            f"{name}: not text: half of a surrogate pair (\\u{ord(e.object[e.start]):04x}): "
            "mend the line, or set data.invalid to skip"
        ) from e


def _open_asset(spec: str, data: Data) -> Source:
    path = assets.records(choose("asset", spec.partition(":")[2], assets.ASSETS, DataError))
    source = JsonLines(f"jsonl:{glob.escape(os.fspath(path))}", data)
    source.spec = spec
    return source


_SCHEMES: dict[str, Callable[[str, Data], Source]] = {
    "text": TextFiles,
    "jsonl": JsonLines,
    "parquet": tables.ParquetFiles,
    "tfds": tables.TfdsSource,
    "asset": _open_asset,
}
