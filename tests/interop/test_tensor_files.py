"""Folders of safetensors files: what is written is read back; what is damaged or hostile is refused in one line."""

import json
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llm_jax.errors import CheckpointError, UserError
from llm_jax.interop import tensor_files
from llm_jax.interop.tensor_files import Item

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(7, 5)).astype(np.float32),
    "b.weight": RNG.normal(size=(3, 3, 1)).astype(ml_dtypes.bfloat16),
    "c.weight": RNG.normal(size=11).astype(np.float16),
    "d": np.array(3.5, np.float32),
    "e": np.zeros((0, 4), np.float32),
    "position_ids": np.arange(9)[None],
}


def items(arrays: dict[str, np.ndarray]) -> list[Item]:
    return [Item(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert found[name].tobytes() == x.tobytes(), name


def test_one_file(tmp_path: Path):
    tensor_files.write_folder(tmp_path, items(ARRAYS), 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = tensor_files.open_folder(tmp_path)
    assert_equal(found, ARRAYS)
    assert not any(x.flags.writeable for x in found.values() if x.size)
    floats = {name: x for name, x in ARRAYS.items() if x.dtype != ml_dtypes.bfloat16}
    assert_equal(
        {n: x for n, x in safetensors.numpy.load_file(tmp_path / "model.safetensors").items() if n in floats}, floats
    )


def test_shards(tmp_path: Path):
    tensor_files.write_folder(tmp_path, items(ARRAYS), 100)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "model-00001-of-00003.safetensors" and names[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / names[-1]).read_text())
    assert set(index["weight_map"]) == set(ARRAYS)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ARRAYS.values())
    assert_equal(tensor_files.open_folder(tmp_path), ARRAYS)


def test_what_the_library_writes_is_read(tmp_path: Path):
    floats = {name: x for name, x in ARRAYS.items() if x.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(floats, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(tensor_files.open_folder(tmp_path), floats)


def test_a_value_too_large_for_its_dtype_is_refused(tmp_path: Path):
    big = np.array([1.0, 1e6], np.float32)
    with pytest.raises(CheckpointError, match="x holds values too large for float16: say dtype=float32 or bfloat16"):
        tensor_files.write_folder(tmp_path, [Item("x", (2,), np.dtype(np.float16), lambda: big)], 100)
    endless = np.array([1.0, np.inf], np.float32)
    tensor_files.write_folder(tmp_path, [Item("x", (2,), np.dtype(np.float16), lambda: endless)], 100)
    assert np.isinf(tensor_files.open_folder(tmp_path)["x"][1])


def test_same_bits():
    x = RNG.normal(size=(5, 7)).astype(np.float32)
    y = x.copy()
    y[4, 6] = np.nextafter(y[4, 6], 9)
    assert tensor_files.same_bits(x, x.copy(), step=16) and not tensor_files.same_bits(x, y, step=16)
    assert not tensor_files.same_bits(x, x.reshape(7, 5)) and not tensor_files.same_bits(x, x.view(np.int32))


def shards(folder: Path) -> Path:
    tensor_files.write_folder(folder, items(ARRAYS), 100)
    return folder / "model.safetensors.index.json"


def remove_a_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_a_shard(folder: Path) -> None:
    shards(folder)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def edit_index(value: Any) -> Any:
    def edit(folder: Path) -> None:
        path = shards(folder)
        index = json.loads(path.read_text())
        path.write_text(value if isinstance(value, str) else json.dumps(value(index)))

    return edit


def one_file(name: str, content: bytes = b"") -> Any:
    return lambda folder: (folder / name).write_bytes(content)


FIRST, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_a_shard, f"the shard {SECOND} is missing, which model.safetensors.index.json names: fetch it"),
        (cut_a_shard, f"{SECOND}: no sound safetensors file, perhaps cut short: .*; fetch it again"),
        (
            edit_index(lambda i: {"weight_map": {**i["weight_map"], "z": FIRST}}),
            f"{FIRST} does not hold 1 tensors of it: z",
        ),
        (
            edit_index(lambda i: {"weight_map": {"a": "../x.safetensors"}}),
            "'../x.safetensors' is not the name of a .* beside it",
        ),
        (edit_index(lambda i: {"weight_map": {"a": "x.bin"}}), "'x.bin' is not the name of a safetensors file"),
        (edit_index(lambda i: {"weight_map": [1]}), "its weight_map is no table from tensors to files"),
        (edit_index(lambda i: {"weight_map": {"a": 3}}), "its weight_map is no table"),
        (edit_index(lambda i: [i]), "it holds a list, not a JSON object"),
        (edit_index("{"), "index.json: not JSON"),
        (edit_index("[" * 100_000), "index.json: not JSON"),
        (
            one_file("weights.safetensors"),
            "it holds weights.safetensors, but neither .*: rename the file to model.safetensors",
        ),
        (
            one_file("pytorch_model.bin"),
            "weights are in pytorch_model.bin, a pickle, and no pickle is loaded.*safe_serialization=True",
        ),
        (one_file("pytorch_model-00001-of-00002.bin"), "a pickle, and no pickle is loaded"),
        (one_file("notes.txt"), r"no model.safetensors in it \(it holds notes.txt\)"),
        (lambda folder: None, r"no model.safetensors in it \(it holds nothing\)"),
        (one_file("model.safetensors"), "model.safetensors: no sound safetensors file, perhaps cut short"),
        (one_file("model.safetensors", b"\x80\x02}q\x00."), "model.safetensors: no sound safetensors file"),
        (lambda folder: (folder / "model.safetensors.index.json").mkdir(), "no model.safetensors in it"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Any, message: str, tmp_path: Path):
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        tensor_files.open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content, message",
    [
        (
            with_header({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0"),
            "of dtype F4, which is not read",
        ),
        (with_header({"x": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, b"0000"), "is no array"),
        (
            with_header({"x": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
            "is no array|no sound",
        ),
        (with_header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"0000"), "no sound"),
        (with_header(b"[" * 5000, b""), "no sound"),
        ((2**63).to_bytes(8, "little") + b"{}", "no sound"),
        (with_header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"), "no sound"),
    ],
)
def test_a_hostile_header_is_refused(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        tensor_files.open_folder(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    5,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    1.5,
    "4",
    None,
    True,
    [],
    {},
]
WORDS = [*tensor_files.DTYPES, "F4", "F8_E8M0", "C64", "float32", "", 0, None, [], "F" * 200]


def edited(content: bytes, rng: np.random.Generator) -> bytes:
    """A file whose header, still JSON as a rule, says something else."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.integers(1, 3)):
        entry = header[names[rng.integers(len(names))]]
        kind = rng.integers(8)
        if kind == 0 and isinstance(entry, dict):
            entry["dtype"] = WORDS[rng.integers(len(WORDS))]
        elif kind in (1, 2) and isinstance(entry, dict):
            values = list(entry.get("shape", []) if kind == 1 else entry.get("data_offsets", [])) or [0]
            values[rng.integers(len(values))] = NUMBERS[rng.integers(len(NUMBERS))]
            entry["shape" if kind == 1 else "data_offsets"] = values
        elif kind == 3 and isinstance(entry, dict):
            entry["shape"] = [NUMBERS[i] for i in rng.integers(len(NUMBERS), size=rng.integers(70))]
        elif kind == 4 and isinstance(entry, dict) and entry:
            del entry[list(entry)[rng.integers(len(entry))]]
        elif kind == 5:
            header[names[rng.integers(len(names))]] = NUMBERS[rng.integers(len(NUMBERS))]
        elif kind == 6:
            deep: Any = 0
            for _ in range(rng.integers(300)):
                deep = [deep] if rng.integers(2) else {"x": deep}
            header["deep" if rng.integers(2) else "__metadata__"] = deep
        else:
            first, second = (names[i] for i in rng.integers(len(names), size=2))
            header[first], header[second] = header[second], header[first]
    return with_header(header, data)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    kind = rng.integers(6)
    if kind == 0:
        made = bytearray(content)
        for i in rng.integers(len(made), size=rng.integers(1, 5)):
            made[i] ^= 1 << rng.integers(8)
        return bytes(made)
    if kind == 1:
        return content[: rng.integers(len(content))]
    if kind == 2:
        return content + rng.bytes(rng.integers(1, 64))
    if kind == 3:
        length = int.from_bytes(content[:8], "little")
        new = [length + int(rng.integers(-20, 21)), int(rng.integers(2**63)), 2 ** int(rng.integers(64)), 10**8][
            rng.integers(4)
        ]
        return max(new, 0).to_bytes(8, "little") + content[8:]
    if kind == 4:
        depth = int(rng.integers(1, 2000))
        return with_header((b"[" * depth) if rng.integers(2) else b'{"a":' * depth, content[-100:])
    return edited(content, rng)


def expected_of(content: bytes) -> dict[str, bytes]:
    """The bytes of each tensor, by another reading of the format."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


def test_ten_thousand_mutations_are_loaded_rightly_or_refused(tmp_path: Path):
    """No crash and no hang; no allocation beyond ten times the file, but for 64 kB that Python's own objects take."""
    tensor_files.write_folder(tmp_path, items(ARRAYS), 10**9)
    path = tmp_path / "model.safetensors"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = loaded = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for _ in range(10_000):
            hostile = mutated(content, rng)
            path.write_bytes(hostile)
            tracemalloc.reset_peak()
            at_start = tracemalloc.get_traced_memory()[0]
            try:
                found = tensor_files.open_file(path)
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 1000
            else:
                loaded += 1
                assert {name: x.tobytes() for name, x in found.items()} == expected_of(hostile)
            assert tracemalloc.get_traced_memory()[1] - at_start < 10 * len(hostile) + 2**16
    finally:
        tracemalloc.stop()
    assert refused > 5000 and loaded > 200
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # kB: what the library's own code takes
