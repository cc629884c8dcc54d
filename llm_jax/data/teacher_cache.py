"""What a teacher found most probable in each row of a run, on disk, so that a student learns from it without the teacher.

A folder of `cache.json`, the header, and shards `00000.npz` of rows: `keys` (N, 16) uint8, `ids` (N, S, k) and `log_p` (N, S, k + 1) float16,
whose last entry is that of all other tokens.
A row's key is a digest of all that the model reads and is asked in it, so that no row can be taken for another.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm_jax.errors import DataError
from llm_jax.storage import Path, as_path, write_whole

HEADER = "cache.json"
EXTRA = ("teacher_ids", "teacher_log_p")
"""What a cache adds to a batch"""

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a cache is of."""

    teacher: str
    """content hash of the teacher's weights"""
    data: str
    """fingerprint of the data that the rows were made of"""
    k: int
    temperature: float
    rows: int = 0
    mass: float = 0.0
    """share of the teacher's probability that the k tokens hold, a weighted mean over the targets"""
    vocab_size: int = 0
    """the teacher's; 0 in a cache of before it was kept"""


def read_header(folder: Path) -> Header:
    """The header of a complete cache. Raises DataError where there is none."""
    try:
        return Header(**json.loads((folder / HEADER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"{folder} holds no complete cache of a teacher ({e})") from e


def data_fingerprint(stream: Mapping[str, Any]) -> str:
    """The digest of all that a stream of rows depends on (`Loader.fingerprint`)."""
    return hashlib.blake2b(json.dumps(stream, sort_keys=True).encode(), digest_size=16).hexdigest()


def row_keys(batch: Batch) -> list[bytes]:
    """The digest of each row, of names, types, shapes and values."""
    names = sorted(name for name in batch if name not in EXTRA)
    count = len(batch[names[0]])
    keys = []
    for i in range(count):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            x = np.ascontiguousarray(batch[name][i])
            digest.update(f"{name} {x.dtype} {x.shape}\n".encode() + x.tobytes())
        keys.append(digest.digest())
    return keys


def write_cache(
    folder: Path, header: Header, batches: Iterable[tuple[Batch, np.ndarray, np.ndarray]], shard_rows: int = 1024
) -> Header:
    """Write each (batch, ids (B, S, k), log_p (B, S, k + 1)); equal rows once. The header, with rows and mass, is written last.

    What a writer that was stopped left in the folder is removed first.

    Raises:
        DataError: the folder holds a cache already, or there is nothing to write.
    """
    if (folder / HEADER).exists():
        raise DataError(f"{folder} holds a cache already")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("[0-9]*.npz"):
        left.unlink()
    pending: list[tuple[bytes, np.ndarray, np.ndarray]] = []
    seen: set[bytes] = set()
    shards, mass, weight = 0, 0.0, 0.0

    def flush() -> None:
        nonlocal shards
        keys, ids, log_p = zip(*pending)
        small = np.uint16 if max(int(x.max()) for x in ids) < 2**16 else np.int32
        with (folder / f"{shards:05d}.npz").open("wb") as file:
            np.savez(
                file,
                keys=np.stack([np.frombuffer(key, np.uint8) for key in keys]),
                ids=np.stack(ids).astype(small),
                log_p=np.stack(log_p).astype(np.float16),
            )
        pending.clear()
        shards += 1

    for batch, ids, log_p in batches:
        covered = np.exp(np.asarray(log_p, np.float64)[..., : header.k]).sum(axis=-1)
        for i, key in enumerate(row_keys(batch)):
            if key in seen:
                continue
            seen.add(key)
            pending.append((key, np.asarray(ids[i]), np.asarray(log_p[i])))
            mass += float((covered[i] * batch["weights"][i]).sum())
            weight += float(batch["weights"][i].sum())
            if len(pending) == shard_rows:
                flush()
    if pending:
        flush()
    if not seen:
        raise DataError("there are no rows to keep of the teacher")
    done = dataclasses.replace(header, rows=len(seen), mass=mass / max(weight, 1e-9))
    write_whole(folder / HEADER, json.dumps(dataclasses.asdict(done), indent=1).encode())
    return done


class TeacherCache:
    """A cache that is read.

    Args:
        folder: where it lies.
        teacher: content hash that its teacher must have; empty for any.
        data: fingerprint that its data must have; empty for any.

    Raises:
        DataError: no cache, one of another teacher or of other data, or one that lacks rows.
    """

    def __init__(self, folder: str | Path, teacher: str = "", data: str = ""):
        self.folder = as_path(folder)
        self.header = read_header(self.folder)
        for what, there, here in (("teacher", self.header.teacher, teacher), ("data", self.header.data, data)):
            if here and there != here:
                raise DataError(f"the cache {folder} is of another {what}: {there[:12]} there and {here[:12]} here")
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(self.folder.glob("*.npz")):
            with path.open("rb") as file, np.load(file) as shard:
                for i, key in enumerate(shard["keys"]):
                    self._places[key.tobytes()] = (len(self._shards), i)
                self._shards.append((shard["ids"], shard["log_p"]))
        if len(self._places) != self.header.rows:
            raise DataError(f"the cache {folder} holds {len(self._places)} of its {self.header.rows} rows")

    def add(self, batch: Batch) -> dict[str, Any]:
        """The batch with `teacher_ids` int32 and `teacher_log_p` float32, (B, S, k) and (B, S, k + 1). Raises DataError for a row that is not there."""
        found = []
        for key in row_keys(batch):
            if key not in self._places:
                raise DataError(
                    f"a row of this run is not in the cache {self.folder}: write one of as many steps, with the same task, data, batch and seed"
                )
            shard, i = self._places[key]
            found.append((self._shards[shard][0][i], self._shards[shard][1][i]))
        ids, log_p = (np.stack(each) for each in zip(*found))
        return {**batch, "teacher_ids": ids.astype(np.int32), "teacher_log_p": log_p.astype(np.float32)}
