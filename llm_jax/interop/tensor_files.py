"""Folders of safetensors files: read as views of the mapped files, written one tensor at a time. No model is known here."""

import collections
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from llm_jax.errors import CheckpointError
from llm_jax.interop.fields import read_json
from llm_jax.storage import Path, at_hand, is_remote

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The format's words for dtypes"""

WORDS = {np.dtype(dtype): word for word, dtype in DTYPES.items()}

Tensors = dict[str, np.ndarray]


def open_file(path: Path) -> Tensors:
    """The tensors of a safetensors file by name: views of the mapped file, of which nothing is read yet.

    Raises:
        CheckpointError: no such file, or one that is not whole and sound.
    """
    try:
        with at_hand(path) as local:
            with safetensors.safe_open(local, "np") as file:
                names = file.offset_keys()
                kinds = [(file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in names]
            with open(local, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(
            f"{path}: no sound safetensors file, perhaps cut short: {reason}; fetch it again, or read it with "
            "transformers and save_pretrained(..., safe_serialization=True)"
        ) from e
    # The library has made sure that the tensors lie one after the other without gaps and fill the file.
    start, found = 8 + int.from_bytes(mapped[:8], "little"), {}
    for name, (word, shape) in zip(names, kinds):
        if word not in DTYPES:
            raise CheckpointError(f"{path}: {name} is of dtype {word}, which is not read; known: {', '.join(DTYPES)}")
        dtype, count = np.dtype(DTYPES[word]), math.prod(shape)
        try:
            flat = np.frombuffer(mapped, dtype, count, start) if count else np.empty(0, dtype)
            found[name] = flat.reshape(shape)
        except ValueError as e:
            raise CheckpointError(f"{path}: {name} of shape {list(shape)[:8]} is no array: {e}") from e
        start += count * dtype.itemsize
    return found


def open_folder(folder: Path) -> Tensors:
    """The tensors of a folder with one file of weights, or with shards and their index.

    Raises:
        CheckpointError: no weights, weights of another kind, a shard that is missing or damaged, an index that names what is not there.
    """
    if (folder / WEIGHTS).is_file():
        return open_file(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in held if name.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{folder}: it holds {', '.join(others[:3])}, but neither {WEIGHTS} nor {INDEX}: "
            f"rename the file to {WEIGHTS} if it is the whole model"
        )
    pickles = [name for name in held if re.fullmatch(r"pytorch_model.*\.bin|.*\.(bin|pt|pth|ckpt)", name)]
    if pickles:
        raise CheckpointError(
            f"{folder}: its weights are in {pickles[0]}, a pickle, and no pickle is loaded, since it can run code: "
            "load the model with transformers where you trust it and call save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS} in it (it holds {', '.join(held[:8]) or 'nothing'})")


def _open_shards(folder: Path) -> Tensors:
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{folder / INDEX}: its weight_map is no table from tensors to files")
    found: Tensors = {}
    for name in sorted(set(table.values())):
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing, which {INDEX} names: fetch it")
        tensors = open_file(folder / name)
        absent = sorted(tensor for tensor, file in table.items() if file == name and tensor not in tensors)
        if absent:
            raise CheckpointError(
                f"{folder / INDEX}: {name} does not hold {len(absent)} tensors of it: {absent[0]}, ..."
            )
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise CheckpointError(f"{folder}: {twice[0]} is in two shards, {name} the later")
        found |= tensors
    return found


def same_bits(x: np.ndarray, y: np.ndarray, step: int = 2**24) -> bool:
    """Whether two arrays are equal bit for bit; compared in parts, so that a mapped file is not held in memory."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    a, b = (z.reshape(-1).view(np.uint8) for z in (x, y))
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, a.size, step))


class Item(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, items: Iterable[Item], shard_size: int) -> None:
    """Write the weights into a folder: one file, or shards of at most `shard_size` bytes and their index. One tensor is in memory at a time.

    Raises:
        CheckpointError: a value too large for its dtype.
        OSError: the disk is full.
    """
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + item.nbytes > shard_size:
            shards.append([])
        shards[-1].append(item)
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0])
        return
    table: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        table |= {item.name: name for item in shard}
    total = sum(item.nbytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(path: Path, items: Sequence[Item]) -> None:
    items = sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in items:
        start, end = end, end + item.nbytes
        header[item.name] = {
            "dtype": WORDS[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            _write_array(file, item)
        if not is_remote(path):
            file.flush()
            os.fsync(file.fileno())


def _write_array(file: Any, item: Item) -> None:
    x = item.fetch()
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(x, item.dtype)
    if item.dtype.itemsize < x.dtype.itemsize and not np.isfinite(made).all() and np.isfinite(x).all():
        raise CheckpointError(f"{item.name} holds values too large for {item.dtype}: say dtype=float32 or bfloat16")
    file.write(made.reshape(-1).view(np.uint8).data)


def main_dtype(arrays: Iterable[np.ndarray]) -> np.dtype:
    """The dtype of most values."""
    counts: collections.Counter[np.dtype] = collections.Counter()
    for x in arrays:
        counts[x.dtype] += x.size
    return counts.most_common(1)[0][0]
