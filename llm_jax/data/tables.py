"""Records by index from parquet files and from TFDS data sets, both without TensorFlow.

Building a TFDS data set of one's own belongs to `tfds_builder.py`.
"""

import collections
import functools
import hashlib
import logging
import os
import re
import threading
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.config import Data
from llm_jax.data import files
from llm_jax.data.files import Record
from llm_jax.errors import DataError, suggest

ROW_GROUP_CACHE = 1 << 28
"""bytes of decoded row groups that a parquet source holds in each process"""


def plain(value: Any, where: str) -> Any:
    """Bytes as text, NumPy scalars and arrays of objects as Python's; other arrays as they are.

    >>> plain({"a": b"x", "b": np.int64(3), "c": [b"y"]}, "record 0")
    {'a': 'x', 'b': 3, 'c': ['y']}
    """
    if isinstance(value, bytes):
        return files.decode(value, where)
    if isinstance(value, dict):
        return {key: plain(part, f"{where}, field {key!r}") for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where) if value.dtype == object or value.ndim == 0 else value
    if isinstance(value, (list, tuple)):
        return [plain(part, where) for part in value]
    return value.item() if isinstance(value, np.generic) else value


class _RowGroups:
    """The row groups of some files, decoded one at a time, those used last held up to `ROW_GROUP_CACHE` bytes."""

    def __init__(self, paths: list[str]):
        self._paths, self._bytes = paths, 0
        self._files: dict[str, Any] = {}
        self._held: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()  # a ParquetFile is not to be read from two threads at once

    def __call__(self, path: str, group: int) -> Any:
        import pyarrow.parquet

        with self._lock:
            key = path, group
            if key not in self._held:
                if path not in self._files:
                    name, system = storage.for_arrow(path)
                    self._files[path] = pyarrow.parquet.ParquetFile(name, filesystem=system)
                self._held[key] = self._files[path].read_row_group(group)
                self._bytes += self._held[key].nbytes
                while self._bytes > ROW_GROUP_CACHE and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
            self._held.move_to_end(key)
            return self._held[key]


class ParquetFiles(files.FileSource):
    """`parquet:GLOB`: one document a row. Row groups are decoded on access and the latest ones held.

    A shuffled pass over files much larger than `ROW_GROUP_CACHE` decodes a row group for almost every record: write
    such data with small row groups (about 1,000 rows), or as jsonl.
    """

    def __init__(self, spec: str, data: Data):
        import pyarrow
        import pyarrow.parquet

        super().__init__(spec, data.invalid == "skip")
        self._groups: list[tuple[int, int, int]] = []  # (file, row group, row of the file it begins with)
        counts = []
        for which, path in enumerate(self.paths):
            name, system = storage.for_arrow(path)
            try:
                meta = pyarrow.parquet.read_metadata(name, filesystem=system)
            except (pyarrow.ArrowInvalid, OSError) as e:
                raise DataError(f"{path}: not a parquet file: {str(e).splitlines()[0]}") from e
            if not meta.num_rows:
                raise DataError(f"{path}: no records: the table has no rows")
            sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            self._groups += [(which, group, start) for group, start in enumerate(starts)]
            counts += sizes
        self._ends = np.cumsum(counts)
        self._read_group = files.Lazy(functools.partial(_RowGroups, self.paths))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        index = files.check_index(index, len(self))
        slot = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[slot - 1]) if slot else 0)
        which, group, start = self._groups[slot]
        path = self.paths[which]
        name = f"{path}:{start + row}"
        return files.guard(lambda: self._read(path, group, row, name), name, self.skip_invalid)

    def _read(self, path: str, group: int, row: int, name: str) -> Record:
        import pyarrow

        record = {}
        table = self._read_group()(path, group)
        for field, column in zip(table.column_names, table.columns, strict=True):
            value = column[row]
            # A string column is not checked when the file is written: take its bytes, so that the error can name the
            # byte.
            if pyarrow.types.is_string(value.type) or pyarrow.types.is_large_string(value.type):
                content = value.as_buffer()
                value = None if content is None else content.to_pybytes()
            else:
                value = value.as_py()
            record[field] = plain(value, f"{name}, field {field!r}")
        return files.with_id(record, name)


def _parse_spec(spec: str) -> tuple[str, str]:
    """(name for TFDS, split). A version may stand before the split.

    >>> _parse_spec("tfds:imdb_reviews/plain_text:1.0.0:test[:10%]"), _parse_spec("tfds:mine")
    (('imdb_reviews/plain_text:1.0.0', 'test[:10%]'), ('mine', 'train'))
    """
    match = re.fullmatch(r"tfds:([^:\[\]]+(?::\d+\.\d+\.\d+)?)(?::(.+))?", spec)
    if not match:
        raise DataError(
            f"source {spec!r}: say tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT, e.g. tfds:imdb_reviews:train[:90%]"
        )
    return match[1], match[2] or "train"


def _prepared_builder(spec: str, name: str) -> Any:
    """The TFDS builder of a data set that lies on disk as ArrayRecord; prepares it if it does not."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    folder = os.environ.get("TFDS_DATA_DIR") or None
    try:
        builder = tfds.builder(name, data_dir=folder)
        if not builder.is_prepared():
            logging.getLogger(__name__).info("preparing the TFDS data set %s once, in %s", name, builder.data_dir)
            builder = tfds.builder(name, data_dir=folder, file_format="array_record")
            builder.download_and_prepare()
        return builder
    except DatasetNotFoundError as e:
        local = os.path.expanduser(folder or "~/tensorflow_datasets")
        known = tfds.list_builders(with_community_datasets=False) + (os.listdir(local) if os.path.isdir(local) else [])
        near = suggest(re.split("[/:]", name)[0], known)
        near = "" if near.startswith("; known") else near
        raise DataError(f"source {spec!r}: no TFDS data set of that name in {local} or in TFDS itself{near}") from e
    except ModuleNotFoundError as e:  # TFDS imports what a data set needs when it is prepared
        raise DataError(f"source {spec!r}: TFDS cannot prepare it: {e}: install that module") from e
    except Exception as e:  # a data set's own code and its downloads fail with any kind of error
        reason = (str(e).splitlines() or [""])[0][:300]
        raise DataError(
            f"source {spec!r}: the data set is not prepared, and preparing it failed ({type(e).__name__}: {reason}). "
            'Prepare it where there is a network: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\", copy its folder here, "
            "and name that folder's parent in TFDS_DATA_DIR"
        ) from e


def _open_tfds(spec: str) -> Any:
    name, split = _parse_spec(spec)
    builder = _prepared_builder(spec, name)
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as e:
        raise DataError(
            f"source {spec!r}: {builder.data_dir} is not in ArrayRecord format: remove it and prepare it again "
            "with file_format='array_record'"
        ) from e
    except (ValueError, KeyError) as e:
        base = re.split(r"[\[+]", split)[0]
        near = suggest(base, builder.info.splits) if base not in builder.info.splits else f": {str(e).splitlines()[0]}"
        raise DataError(f"source {spec!r}: no split {split!r}{near}") from e


class TfdsSource:
    """`tfds:NAME`, `tfds:NAME/CONFIG`, `tfds:NAME:SPLIT`: a TFDS data set in ArrayRecord format, bytes decoded, without
    TensorFlow.

    It is looked for in `TFDS_DATA_DIR`, else in `~/tensorflow_datasets`, and prepared there if it is missing. The
    default split is train.
    """

    def __init__(self, spec: str, data: Data):
        self.spec, self.skip_invalid = spec, data.invalid == "skip"
        self._open = files.Lazy(functools.partial(_open_tfds, spec))
        self._count = len(self._open())
        if not self._count:
            raise DataError(f"source {spec!r}: no records in this split")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the names and contents of the split's files, and of the part of them that is read."""
        name, split = _parse_spec(self.spec)
        info = _prepared_builder(self.spec, name).info.splits[split]
        content = files.fingerprint(sorted(os.fspath(path) for path in info.filepaths))
        part = [(os.path.basename(x.filename), x.skip, x.take) for x in info.file_instructions]
        return hashlib.sha256(f"{content} {part}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        index = files.check_index(index, self._count)
        name = f"{self.spec.removeprefix('tfds:')}:{index}"
        return files.guard(lambda: self._read(index, name), name, self.skip_invalid)

    def _read(self, index: int, name: str) -> Record:
        record = self._open()[index]
        return files.with_id({key: plain(value, f"{name}, field {key!r}") for key, value in record.items()}, name)
