"""Records by index: `open_source` and the source over text files.

Responsible for what a source is and for its schemes; jsonl and csv are in `lines.py`, parquet and TFDS in `tables.py`,
packages in `assets.py`; each finds, indexes and reads its records and says what is wrong with a file. Which field a
task needs, mixing, shuffling and splitting belong to the tasks and the pipeline.

Every source reads on access, can be pickled (open files are not carried along), and can be read from several threads.
"""

import glob
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, Protocol

from llm_jax import storage
from llm_jax.config import Data
from llm_jax.data import assets, files, lines, tables
from llm_jax.data.files import Record
from llm_jax.data.selected import Selected, split_spec
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
    """The records that a spec names: `text:GLOB`, `jsonl:GLOB`, `csv:GLOB` (tabulators in .tsv), `parquet:GLOB`,
    `tfds:NAME[/CONFIG][:SPLIT]` or `asset:NAME`; with `#FIELD=LOW..HIGH` or `#FIELD=VALUE,VALUE` behind it, those of such a field.

    `data.text` is the field that the document of a text file stands in; `data.invalid` says whether bytes that are not
    UTF-8 raise on access or give `{"id": ..., "invalid": True}`.

    Raises:
        DataError: an unknown scheme, asset or data set; no file; an empty file. On access: a record that cannot be
            read.

    >>> open_source("txt:a/*.txt", Data())
    Traceback (most recent call last):
    llm_jax.errors.DataError: unknown scheme 'txt' of source 'txt:a/*.txt'; did you mean 'text'?
    """
    whole, condition = split_spec(spec)
    if condition:
        return Selected(open_source(whole, data), condition)
    scheme, colon, _ = spec.partition(":")
    if not colon:
        known = _SUFFIXES.get(PurePath(spec).suffix, "text")
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
        content = storage.as_path(path).read_bytes()
        mark = len(files.BOM) if content.startswith(files.BOM) else 0
        return {"id": path, self._field: files.decode(content[mark:], path, mark)}


def _open_asset(spec: str, data: Data) -> Source:
    path = assets.records(choose("asset", spec.partition(":")[2], assets.ASSETS, DataError))
    source = lines.JsonLines(f"jsonl:{glob.escape(os.fspath(path))}", data)
    source.spec = spec
    return source


_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
}
_SCHEMES: dict[str, Callable[[str, Data], Source]] = {
    "text": TextFiles,
    "jsonl": lines.JsonLines,
    "csv": lines.CsvFiles,
    "parquet": tables.ParquetFiles,
    "tfds": tables.TfdsSource,
    "asset": _open_asset,
}
