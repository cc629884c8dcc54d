"""Records by index from jsonl and csv files: an index of byte offsets finds a record, its own bytes are parsed.

The index of a file is made once and kept in the cache folder. Files and indices are mapped, not held; of a file in a bucket a record is a request.
"""

import csv
import functools
import json
import mmap
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from llm_jax import storage
from llm_jax.config import Data
from llm_jax.data import files
from llm_jax.data.files import Record
from llm_jax.errors import DataError


class _Mapped(NamedTuple):
    """A file, and of each of its records where it lies."""

    places: np.ndarray
    content: mmap.mmap | storage.Ranges


def _map_files(paths: list[str], index: Callable[[str], np.ndarray]) -> list[_Mapped]:
    mapped = []
    for path in paths:
        if storage.is_remote(path):
            mapped.append(_Mapped(index(path), storage.Ranges(path)))
            continue
        with open(path, "rb") as file:
            mapped.append(_Mapped(index(path), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return mapped


def _kept(kind: str, path: str, compute: Callable[[str], np.ndarray]) -> np.ndarray:
    """`compute(path)`, kept in the cache folder and mapped rather than loaded."""
    return files.cached_by_stamp(
        kind, [path], ".npy", lambda: compute(path), functools.partial(np.load, mmap_mode="r"), np.save
    )


class _Indexed(files.FileSource):
    """What the sources share whose files hold many records: the count, and the way from a number to a place."""

    def __init__(self, spec: str, data: Data, index: Callable[[str], np.ndarray], nothing: str):
        super().__init__(spec, data.invalid == "skip")
        counts = [len(index(path)) for path in self.paths]
        if 0 in counts:
            raise DataError(f"{self.paths[counts.index(0)]}: no records: {nothing}")
        self._ends = np.cumsum(counts)
        self._open = files.Lazy(functools.partial(_map_files, self.paths, index))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, list[int], int, mmap.mmap | storage.Ranges]:
        """Number of the file of a record, what the file's index says of the record, where the next begins, and the file's content."""
        index = files.check_index(index, len(self))
        which = int(np.searchsorted(self._ends, index, side="right"))
        places, content = self._open()[which]
        at = index - (int(self._ends[which - 1]) if which else 0)
        following = int(places[at + 1][0]) if at + 1 < len(places) else len(content)
        return which, places[at].tolist(), following, content


# --- jsonl


def _find_lines(path: str) -> np.ndarray:
    """(records, 2) of byte offset and line number of each line that is not blank."""
    found, offset = array("q"), 0
    with storage.open_to_read(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(files.BOM):
                offset, line = len(files.BOM), line[len(files.BOM) :]
            if line.strip():
                found.extend((offset, number))
            offset += len(line)
    return np.array(found, np.int64).reshape(-1, 2)


def _line_index(path: str) -> np.ndarray:
    return _kept("lines", path, _find_lines)


class JsonLines(_Indexed):
    """`jsonl:GLOB`: one document a line, none for a blank one."""

    def __init__(self, spec: str, data: Data):
        super().__init__(spec, data, _line_index, "every line is blank")

    def __getitem__(self, index: int) -> Record:
        which, (start, number), following, content = self._find(index)
        line = content[start:following].partition(b"\n")[0]  # blank lines may come after it
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


# --- csv


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith((".tsv", ".tab")) else ","


def _rows(lines: Iterator[str], path: str) -> Iterator[list[str]]:
    """The rows of a file by RFC 4180, other delimiters apart; what it does not allow raises `csv.Error`."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default, for the whole process: less than many a document
    return csv.reader(lines, delimiter=_delimiter(path), strict=True)


def _explain(error: csv.Error) -> str:
    """What is wrong with a row, for what the csv module says of it."""
    if "unexpected end" in str(error):
        return "a quoted field that begins here is never closed"
    if "expected after" in str(error):
        return "text after a closing quote: quote each field that begins with a quote, and write those inside it twice"
    if "new-line" in str(error):
        return "a carriage return without a newline: end lines with \\n or \\r\\n, and quote fields that hold one"
    return str(error)


class _Counted:
    """The lines of a file from where it stands, in Latin-1, that is, a character a byte, and how much of it was read."""

    def __init__(self, file: BinaryIO):
        self._file, self.offset, self.number = file, file.tell(), 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.offset, self.number = self.offset + len(line), self.number + 1
            yield line.decode("latin-1")


def _find_rows(path: str) -> np.ndarray:
    """(1 + records, 3) of first byte, end and line number of the header and of each row that is not blank.

    The characters that mean something in these files are the same bytes in Latin-1 as in UTF-8.
    """
    found, columns = array("q"), 0
    with storage.open_to_read(path) as file:
        file.seek(len(files.BOM) if file.read(len(files.BOM)) == files.BOM else 0)
        lines = _Counted(file)
        rows = _rows(iter(lines), path)
        while True:
            start, number = lines.offset, lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as e:
                raise DataError(f"{path}:{number}: {_explain(e)}") from e
            if row is None:
                return np.array(found, np.int64).reshape(-1, 3)
            if not row or (len(row) == 1 and row[0].isspace()):
                continue
            columns = columns or len(row)
            if len(row) != columns:
                raise DataError(
                    f"{path}:{number}: {len(row)} fields, but the header has {columns}: "
                    f"quote a field that holds {_delimiter(path)!r} or a newline"
                )
            found.extend((start, lines.offset, number))


def _row_index(path: str) -> np.ndarray:
    return _kept("rows", path, _find_rows)[1:]


def _header(path: str) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: one is empty or not UTF-8, or two are equal.
    """
    start, stop, number = _kept("rows", path, _find_rows)[0].tolist()
    with storage.open_to_read(path) as file:
        file.seek(start)
        content = file.read(stop - start)
    try:
        names = next(_rows(iter([content.decode("utf-8")]), path))
    except UnicodeDecodeError as e:
        raise DataError(f"{path}:{number}: the header is not UTF-8 at byte {start + e.start}: convert it") from e
    for place, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{path}:{number}: column {place} of the header has no name: give it one, or leave it out")
        if names.index(name) < place - 1:
            raise DataError(f"{path}:{number}: two columns are named {name!r}: rename one")
    return names


class CsvFiles(_Indexed):
    """`csv:GLOB`: one document a row, its fields named by the header and all of them strings; none for a blank row.

    Fields are separated by commas, in a file whose name ends in .tsv or .tab by tabulators, and quoted as in RFC 4180.
    """

    def __init__(self, spec: str, data: Data):
        super().__init__(spec, data, _row_index, "there is no row below a header")
        self._columns = [_header(path) for path in self.paths]

    def __getitem__(self, index: int) -> Record:
        which, (start, stop, number), _, content = self._find(index)
        name = f"{self.paths[which]}:{number}"
        return files.guard(lambda: self._read(which, content[start:stop], name, start), name, self.skip_invalid)

    def _read(self, which: int, row: bytes, name: str, start: int) -> Record:
        cells = next(_rows(iter([files.decode(row, name, start)]), self.paths[which]))
        return files.with_id(dict(zip(self._columns[which], cells, strict=True)), name)
