"""A GGUF file as it lies on disk: its metadata and the place of each tensor, every number checked against the bytes that are there.

What the keys mean is in `gguf.py` and `gguf_tokenizer.py`. The reader of package `gguf` believes what a file says of itself: a length
that is not true makes it read on past the end, and never come back. So only its types and its dequantisation are used.
"""

import dataclasses
import math
import mmap
import reprlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

from llm_jax.errors import CheckpointError
from llm_jax.storage import Path, as_path, at_hand

Value = int | float | bool | str | list[str] | np.ndarray
"""A value of the metadata; an array of numbers is a view of the file"""

Content = mmap.mmap | bytes

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""types of values -> their code in `struct`"""
_STRING, _ARRAY = 8, 9
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}
_VERSIONS = (2, 3)
_AXES = 4  # of a tensor, at most
_LONGEST_NAME = 65535
_LEAST_PAIR, _LEAST_TENSOR, _LEAST_STRING = 13, 32, 8  # bytes that one takes when its text is empty


class Tensor(NamedTuple):
    """Where a tensor lies in the file, and how it is quantised."""

    shape: tuple[int, ...]
    """as numpy has it, the axis whose values lie side by side last"""
    kind: gguf.GGMLQuantizationType
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class File:
    """The header of a GGUF file, and its content mapped into memory."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]
    content: Content = dataclasses.field(repr=False)

    def wrong(self, key: str, why: str) -> CheckpointError:
        """The error of a key whose value cannot be used."""
        return CheckpointError(f"{self.path}: {key} is {short(self.metadata.get(key))}: {why}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        """The value of a key, the default where it is absent.

        Raises:
            CheckpointError: it is of another type.
        """
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.wrong(key, f"it must be {_WORDS[kind]}")
        return value

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised. It is a copy: an array that jax takes as it is must not change with the file."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.content, np.uint8, tensor.stop - tensor.start, tensor.start)
        made = _dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind).reshape(tensor.shape)
        if tensor.kind == gguf.GGMLQuantizationType.F32:
            return made.copy()
        # a zero of a block with a negative scale is -0, which is no mask where it was pruned
        return made + np.float32(0)

    def check_kinds(self) -> None:
        """Raise CheckpointError where a tensor is quantised in a way that cannot be undone."""
        for kind in {tensor.kind for tensor in self.tensors.values()}:
            try:
                _dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as e:
                name = next(name for name, tensor in self.tensors.items() if tensor.kind == kind)
                raise CheckpointError(f"{self.path}: {name} is of type {kind.name}, which cannot be dequantised") from e


def _dequantize(blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The values of quantised rows; what is no number in a damaged file is no reason to warn."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, kind)


def short(value: Any) -> str:
    """A value as an error shows it, on one line."""
    return reprlib.repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 8 else value).replace(
        "\n", " "
    )


class _Cursor:
    """Reads a mapped file from its start, and never past its end."""

    def __init__(self, content: Content, path: Path):
        self.content, self.path, self.at = content, path, 0

    def damaged(self, why: str, at: int | None = None) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: damaged GGUF file: {why} at byte {self.at if at is None else at} of {len(self.content)}"
        )

    def take(self, size: int, what: str) -> int:
        """Pass over `size` bytes; returns where they begin."""
        if size > len(self.content) - self.at:
            raise self.damaged(f"{what} of {size} bytes goes past the end")
        start, self.at = self.at, self.at + size
        return start

    def number(self, code: str, what: str) -> Any:
        """One number; its code as in `struct`."""
        return struct.unpack_from(f"<{code}", self.content, self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, least: int, what: str) -> int:
        """A number of things that follow, each of at least `least` bytes."""
        count = self.number("Q", what)
        if count > (len(self.content) - self.at) // least:
            raise self.damaged(f"{what} is {count}, more than the file can hold,", self.at - 8)
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        size = self.count(1, f"the length of {what}")
        if longest is not None and size > longest:
            raise self.damaged(f"the length of {what} is {size}, above {longest},")
        start = self.take(size, what)
        try:
            return self.content[start : self.at].decode()
        except UnicodeDecodeError as e:
            raise self.damaged(f"{what} is not UTF-8", start + e.start) from e

    def value(self, what: str) -> Value:
        """A value after its type."""
        kind = self.number("I", f"the type of {what}")
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            raise self.damaged(f"{what} has the unknown type {kind}", self.at - 4)
        number = self.number("B" if _NUMBERS[kind] == "?" else _NUMBERS[kind], what)
        if _NUMBERS[kind] == "?":
            if number > 1:
                raise self.damaged(f"{what} is neither true nor false", self.at - 1)
            return bool(number)
        return number

    def array(self, what: str) -> list[str] | np.ndarray:
        kind = self.number("I", f"the type of {what}")
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(_LEAST_STRING, f"the number of {what}"))]
        if kind not in _NUMBERS:  # arrays of arrays are written by nobody, and read by nobody
            raise self.damaged(f"{what} is an array of the type {kind}, which is not supported,", self.at - 4)
        dtype = np.dtype(np.uint8 if _NUMBERS[kind] == "?" else f"<{_NUMBERS[kind]}")
        count = self.count(dtype.itemsize, f"the number of {what}")
        return np.frombuffer(self.content, dtype, count, self.take(count * dtype.itemsize, what))

    def unique(self, what: str, known: dict[str, Any]) -> str:
        """A name that is not known yet, and that an error can show."""
        at, name = self.at, self.string(f"the name of a {what}", _LONGEST_NAME)
        if not name.isprintable():
            raise self.damaged(f"the {what} {short(name)} is not printable", at)
        if name in known:
            raise self.damaged(f"the {what} {short(name)} stands there twice, again", at)
        return name


def open_file(path: str | Path) -> File:
    """Read the header of a GGUF file and map the file.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file, or does not hold what its header says.
    """
    path = as_path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file" if path.exists() else f"{path}: no such file")
    try:
        with at_hand(path) as local, open(local, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    return parse(content, path)


def parse(content: Content, path: Path) -> File:
    """The file with this content. Raises as `open_file`."""
    if content[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with GGUF")
    cursor = _Cursor(content, path)
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        order = " of a machine with the other byte order" if version.to_bytes(4, "big")[0] in _VERSIONS else ""
        raise CheckpointError(f"{path}: GGUF version {version}{order} is not supported; known: 2, 3")
    tensors = cursor.count(_LEAST_TENSOR, "the number of tensors")
    pairs = cursor.count(_LEAST_PAIR, "the number of keys")
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.unique("key", metadata)
        metadata[key] = cursor.value(short(key))
    return File(path, metadata, _places(cursor, tensors, metadata.get("general.alignment", 32)), content)


def _places(cursor: _Cursor, count: int, alignment: Any) -> dict[str, Tensor]:
    """The place of each tensor, from their descriptions, which come after the metadata."""
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.path}: general.alignment is {short(alignment)}: it must be a power of two")
    found: dict[str, Tensor] = {}
    for _ in range(count):
        name = cursor.unique("tensor", found)
        found[name] = _tensor(cursor, short(name), alignment)
    base = -(-cursor.at // alignment) * alignment
    found = {n: t._replace(start=t.start + base, stop=t.stop + base) for n, t in found.items()}
    end = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.stop > len(cursor.content):
            raise cursor.damaged(f"{short(name)} goes to byte {tensor.stop}: the file is cut off", tensor.start)
        if tensor.start < end:
            raise cursor.damaged(f"{short(name)} overlaps another tensor", tensor.start)
        end = tensor.stop
    return found


def _tensor(cursor: _Cursor, name: str, alignment: int) -> Tensor:
    """The description of a tensor; its place counted from the first of them."""
    axes = cursor.number("I", f"the number of axes of {name}")
    if not 1 <= axes <= _AXES:
        raise cursor.damaged(f"{name} has {axes} axes", cursor.at - 4)
    shape = tuple(cursor.number("Q", f"an axis of {name}") for _ in range(axes))[::-1]
    number = cursor.number("I", f"the type of {name}")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as e:
        raise cursor.damaged(f"{name} has the unknown type {number}", cursor.at - 4) from e
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % values:
        raise cursor.damaged(f"{name} has the shape {list(shape)}, which type {kind.name} does not allow,")
    start = cursor.number("Q", f"the place of {name}")
    if start % alignment:
        raise cursor.damaged(f"{name} begins at {start}, which is no multiple of {alignment},", cursor.at - 8)
    return Tensor(shape, kind, start, start + math.prod(shape) // values * size)
