"""Checkpoints come back bit for bit on any mesh, are whole or absent, and what is damaged is never taken for whole."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import checkpoint, tree
from llm_jax.card import content_hash
from llm_jax.checkpoint import Checkpoints, abstract_like
from llm_jax.config import Checkpoint
from llm_jax.errors import CheckpointError


class Average(NamedTuple):
    inner: Any
    average: Any


def bits(x: jax.Array) -> bytes:
    """What an array holds, byte by byte."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(there: Any, here: Any) -> None:
    """Equal trees of arrays equal in type, shape and every bit."""
    assert jax.tree.structure(there) == jax.tree.structure(here)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here)):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def make_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    odd = rng.normal(size=(8, 6)).astype(np.float32)
    odd[0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    return {
        "embed": {"tokens": jnp.asarray(odd)},
        "layers": {"up": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.bfloat16), "scale": jnp.ones(8)},
        "codes": jnp.asarray(rng.integers(-128, 128, (4, 4)), jnp.int8),
        "kept": jnp.asarray([True, False, True]),
    }


def make_state(params: Any) -> dict[str, Any]:
    """All that a train state holds beside the weights: nested tuples of optax, typed keys, counters, None where nothing is trained."""
    floats = {"embed": params["embed"], "layers": {**params["layers"], "scale": None}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16), optax.contrib.schedule_free_sgd(0.1)
    )
    return {
        "step": jnp.int32(7),
        "opt_state": Average(optimizer.init(floats), floats),
        "key": jax.random.key(3),
        "other_key": jax.random.key(4, impl="rbg"),
        "skipped": jnp.int32(0),
    }


def wanted(arrays: Any) -> Any:
    return abstract_like(arrays, jax.tree.map(lambda x: x.sharding, arrays))


def card(step: int, **results: float) -> dict[str, Any]:
    return {"name": "test", "step": step, "results": {"step": step, **results} if results else {}}


def save(run: Checkpoints, step: int, params: Any, **results: float) -> None:
    """Save a checkpoint whose place in the data is its step, and wait for it."""
    run.save(step, params, {"step": jnp.int32(step)}, {"place": step}, card(step, **results), '{"ä": "tokenizer"}')
    run.wait()


def restore(run: Checkpoints, params: Any) -> checkpoint.Restored | None:
    return run.restore(wanted(params), wanted({"step": jnp.int32(0)}))


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, Checkpoint(keep=10))


@pytest.fixture
def params() -> dict[str, Any]:
    """A small tree for tests that look at files, not at types."""
    return {"a": jnp.arange(300, dtype=jnp.float32), "b": {"c": jnp.ones((2, 3))}}


def test_comes_back_bit_for_bit(run: Checkpoints):
    params = make_params()
    state = make_state(params)
    run.save(7, params, state, {"loader": [1, {"x": "é"}]}, card(7, loss=1.5), "tokens")
    run.wait()
    found = run.restore(wanted(params), wanted(state))
    assert found is not None
    assert_same(found.params, params)
    assert_same(found.state, state)
    assert found.data == {"loader": [1, {"x": "é"}]}
    assert {k: v for k, v in found.card.items() if k != "hashes"} == card(7, loss=1.5)
    assert found.card["hashes"]["params"] == content_hash(params)
    assert jax.random.bits(found.state["key"]) == jax.random.bits(state["key"])


def shard(x: jax.Array, mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first axis that divides over fsdp, the last over tensor."""
    parts = [None] * x.ndim
    if x.ndim and x.shape[0] % mesh.shape["fsdp"] == 0:
        parts[0] = "fsdp"
    if x.ndim > 1 and x.shape[-1] % mesh.shape["tensor"] == 0:
        parts[-1] = "tensor"
    return NamedSharding(mesh, PartitionSpec(*parts))


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {}, {"fsdp": 2, "tensor": 4}], ids=["two", "one", "eight-otherwise"])
def test_saved_on_eight_devices_restored_on(sizes: dict[str, int], run: Checkpoints, mesh):
    arrays = {
        "w": jnp.arange(8 * 6 * 4, dtype=jnp.float32).reshape(8, 6, 4),
        "h": jnp.linspace(0, 1, 8).astype(jnp.bfloat16),
        "s": jnp.float32(2),
    }
    key = {"key": jax.random.key(1)}
    eight = mesh(fsdp=4, tensor=2)
    spread = jax.tree.map(lambda x: jax.device_put(x, shard(x, eight)), arrays)
    assert len(spread["w"].sharding.device_set) == 8 and not spread["w"].is_fully_replicated
    run.save(1, spread, jax.device_put(key, NamedSharding(eight, PartitionSpec())), {}, card(1), None)
    run.wait()
    few = mesh(**sizes)
    placed = jax.tree.map(lambda x: shard(x, few), arrays)
    found = run.restore(abstract_like(arrays, placed), abstract_like(key, {"key": NamedSharding(few, PartitionSpec())}))
    assert found is not None
    assert_same(found.params, arrays)
    assert_same(found.state, key)
    assert jax.tree.map(lambda x: x.sharding, found.params) == placed
    assert content_hash(found.params) == content_hash(spread) == content_hash(arrays)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_saved_is_not_what_donated_buffers_become(devices: int, run: Checkpoints, mesh):
    """The step goes on in the buffers of the state that is being written."""
    placed = NamedSharding(mesh(fsdp=devices), PartitionSpec("fsdp"))
    step = jax.jit(lambda x: jax.tree.map(lambda a: a * 1.5 + 1, x), donate_argnums=0)
    state = {name: jax.device_put(jnp.full(2**20, i, jnp.float32), placed) for i, name in enumerate("abcd")}
    want = {}
    for at in (1, 2, 3):
        for _ in range(3):
            state = step(state)
        want[at] = {name: np.array(x, copy=True) for name, x in state.items()}
        run.save(at, state, {"step": jnp.int32(at)}, {}, card(at), None)
        while not run._saving.done():
            state = step(state)
    run.wait()
    for at in (1, 2, 3):
        found, _, _ = checkpoint.load_params(
            run.root / str(at), abstract_like(want[at], dict.fromkeys(want[at], placed))
        )
        for name, x in want[at].items():
            np.testing.assert_array_equal(found[name], x)


HASHED = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": {"c": np.array([1, 2, 3], np.int8), "d": np.array([True, False])},
    "e": np.arange(4).astype(jnp.bfloat16),
}


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_hash_tells_any_bit(data: st.DataObject):
    leaves, structure = jax.tree.flatten(HASHED)
    which = data.draw(st.integers(0, len(leaves) - 1))
    words = np.array(leaves[which]).view(np.uint8).copy()
    place, bit = data.draw(st.integers(0, words.size - 1)), data.draw(st.integers(0, 7))
    flat = words.reshape(-1)
    flat[place] ^= 1 if leaves[which].dtype == bool else 1 << bit
    changed = [words.view(x.dtype) if i == which else x for i, x in enumerate(leaves)]
    assert content_hash(jax.tree.unflatten(structure, map(jnp.asarray, changed))) != content_hash(
        jax.tree.map(jnp.asarray, HASHED)
    )


@pytest.mark.parametrize(
    "other",
    [
        {"A": HASHED["a"], **{k: v for k, v in HASHED.items() if k != "a"}},
        {**HASHED, "a": HASHED["a"].reshape(3, 2)},
        {**HASHED, "a": HASHED["a"].view(np.int32)},
        {**HASHED, "a": HASHED["a"].reshape(-1)[::-1].reshape(2, 3)},
        {**HASHED, "a": HASHED["a"] + [[0, 1, -1], [0, 0, 0]]},
        {**HASHED, "f": np.zeros(1, np.float32)},
        {"a": HASHED["a"], "e": HASHED["e"]},
    ],
    ids=["name", "shape", "dtype", "order", "exchange", "more", "less"],
)
def test_hash_tells(other: dict[str, Any]):
    assert content_hash(jax.tree.map(jnp.asarray, other)) != content_hash(jax.tree.map(jnp.asarray, HASHED))


def test_hash_by_its_formula():
    """Cards name their parents by it: another formula is another name."""
    arrays = {
        "b": jnp.ones(2, jnp.bfloat16),
        "k": jax.random.key(5),
        "n": jnp.int8(-3),
        "w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
    }
    words = {
        "b": np.asarray(arrays["b"]).view(np.uint16),
        "k": np.array([0, 5]),
        "n": np.array([2**32 - 3]),
        "w": np.asarray(arrays["w"]).view(np.uint32).reshape(-1),
    }
    lines = ""
    for name, x in arrays.items():
        index = np.arange(words[name].size, dtype=np.uint64)
        mixed = (words[name].astype(np.uint64) ^ (index * 0x9E3779B1 % 2**32)) * 0x85EBCA6B % 2**32
        mixed ^= mixed >> np.uint64(15)
        lines += f"{name} {x.dtype} {x.shape} {int(mixed.sum()) % 2**32:08x} {int((mixed * (2 * index + 1)).sum()) % 2**32:08x}\n"
    assert content_hash(arrays) == hashlib.sha256(lines.encode()).hexdigest()


def damage(kind: str, path: Path) -> None:
    """Spoil a checkpoint's folder in one of the ways in which disks and people do."""
    data = max((p for p in path.glob("params/**/d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    if kind == "empty folder":
        shutil.rmtree(path)
        path.mkdir()
    elif kind == "truncated array":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif kind == "empty array":
        data.write_bytes(b"")
    elif kind == "flipped byte in the arrays":
        flip(data)
    elif kind == "weights of another":
        shutil.rmtree(path / "params")
        shutil.copytree(path.with_name("1") / "params", path / "params")
    elif kind.startswith("missing "):
        target = path / kind.removeprefix("missing ")
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    else:
        flip(path / kind.removeprefix("flipped byte in "))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


DAMAGES = [
    "empty folder",
    "truncated array",
    "empty array",
    "flipped byte in the arrays",
    "weights of another",
    "missing params",
    "missing state",
    "missing about",
    "missing about/card.json",
    "missing about/arrays.json",
    "missing about/data.json",
    "missing about/tokenizer.json",
    "missing about/SHA256SUMS",
    "missing params/_METADATA",
    "missing params/manifest.ocdbt",
    "missing params/d",
    "flipped byte in about/card.json",
    "flipped byte in about/data.json",
    "flipped byte in about/tokenizer.json",
    "flipped byte in about/SHA256SUMS",
    "flipped byte in params/manifest.ocdbt",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_falls_back(kind: str, run: Checkpoints, params: Any, caplog: pytest.LogCaptureFixture):
    save(run, 1, params)
    save(run, 2, jax.tree.map(lambda x: x + 1, params))
    damage(kind, run.root / "2")
    with caplog.at_level(logging.WARNING):
        found = restore(run, params)
    assert found is not None and found.data == {"place": 1}
    assert_same(found.params, params)
    assert [
        r.getMessage()
        for r in caplog.records
        if "is incomplete or damaged" in r.getMessage() and "set aside as 2.damaged" in r.getMessage()
    ]
    assert sorted(p.name for p in run.root.iterdir()) == ["1", "2.damaged"]
    save(run, 2, params)  # the run goes on over the same step
    again = restore(run, params)
    assert again is not None and again.data == {"place": 2}


def test_what_the_runtime_fails_at_is_not_damage(run: Checkpoints, params: Any, monkeypatch: pytest.MonkeyPatch):
    """A process that is gone, or no memory: the newest checkpoint stays where it is, and none before it is taken instead."""
    save(run, 1, params)
    save(run, 2, params)
    whole = checkpoint._load

    def load(path: Path, *rest: Any) -> Any:
        if path.name == "2":
            raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
        return whole(path, *rest)

    monkeypatch.setattr(checkpoint, "_load", load)
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        restore(run, params)
    assert sorted(p.name for p in run.root.iterdir()) == ["1", "2"]


def test_every_byte_counts(run: Checkpoints, params: Any, caplog: pytest.LogCaptureFixture):
    """A byte changed in any file of a checkpoint either leaves all it holds as it was, or is noticed."""
    save(run, 1, params)
    other = jax.tree.map(lambda x: x + 1, params)
    save(run, 2, other)
    whole = run.root.parent / "whole"
    shutil.copytree(run.root / "2", whole)
    rng = random.Random(0)
    names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.stat().st_size)
    noticed = 0
    for name in names:
        content = bytearray((whole / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (run.root / "2" / name).write_bytes(content)
        found = restore(run, params)
        assert found is not None
        assert_same(found.params, other if found.data == {"place": 2} else params)
        noticed += found.data == {"place": 1}
        for path in run.root.glob("2*"):
            shutil.rmtree(path)
        shutil.copytree(whole, run.root / "2")
    assert noticed > 5


def test_all_damaged_is_an_error_and_all_are_left(run: Checkpoints, params: Any):
    for step in (1, 2, 3):
        save(run, step, params)
        damage("truncated array", run.root / str(step))
    with pytest.raises(
        CheckpointError,
        match=r"none of the 3 checkpoints in .*checkpoints can be read; they were left in place \(3: .+\). "
        "Remove that folder to begin the run anew",
    ):
        restore(run, params)
    assert sorted(p.name for p in run.root.iterdir()) == ["1", "2", "3"]


def test_no_checkpoint_is_none(run: Checkpoints, params: Any):
    assert restore(run, params) is None


def test_keeps_the_newest_and_the_best(tmp_path: Path, params: Any):
    run = Checkpoints(tmp_path, Checkpoint(keep=2, best="loss"))
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 3.5, 6: 3.2}
    seen = []
    for step, loss in losses.items():
        save(run, step, params, loss=loss)
        seen.append(checkpoint.steps(tmp_path))
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    later = Checkpoints(tmp_path, Checkpoint(keep=1, best="loss"))  # another process, which reads the cards
    save(later, 7, params, loss=2.0)
    assert checkpoint.steps(tmp_path) == [7]


def test_keeps_the_newest_alone_without_a_metric(tmp_path: Path, params: Any):
    run = Checkpoints(tmp_path, Checkpoint(keep=2, best=""))
    for step in range(1, 5):
        save(run, step, params, loss=step)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_stale_metric_does_not_keep(tmp_path: Path, params: Any):
    """Results that a card carries on from an earlier step are not those of its weights."""
    run = Checkpoints(tmp_path, Checkpoint(keep=1, best="loss"))
    save(run, 1, params, loss=2.0)
    run.save(2, params, {"step": jnp.int32(2)}, {}, {**card(2), "results": {"step": 1, "loss": 1.0}}, None)
    run.wait()
    save(run, 3, params)
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_what_a_removal_or_save_left_behind_goes(tmp_path: Path, params: Any):
    run = Checkpoints(tmp_path, Checkpoint())
    save(run, 1, params)
    for name in ("2.orbax-checkpoint-tmp-123", "0.removing", "0.removing1", "3.damaged"):
        (run.root / name).mkdir()
    Checkpoints(tmp_path, Checkpoint())
    assert sorted(p.name for p in run.root.iterdir()) == ["1", "3.damaged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "a": jnp.zeros(301)}, r"'a' is float32\[300\] there and float32\[301\] in this config"),
        (
            lambda p: {**p, "a": p["a"].astype(jnp.bfloat16)},
            r"'a' is float32\[300\] there and bfloat16\[300\] in this config",
        ),
        (lambda p: {**p, "new": jnp.zeros(2)}, r"it has no 'new' float32\[2\]"),
        (lambda p: {"a": p["a"]}, r"'b/c' float32\[2,3\] of it is not in this config"),
    ],
    ids=["shape", "dtype", "more", "less"],
)
def test_other_shape_names_the_first_difference(change: Any, message: str, run: Checkpoints, params: Any):
    save(run, 1, params)
    with pytest.raises(CheckpointError, match=f"checkpoint .*/1 is of another shape: {message}"):
        restore(run, change(params))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_params(run.root.parent, wanted(change(params)))
    assert checkpoint.steps(run.root.parent) == [1]


def test_a_refused_card_is_not_damage(run: Checkpoints, params: Any):
    save(run, 1, params)

    def refuse(found: dict[str, Any]) -> None:
        raise CheckpointError(f"not the run {found['name']}")

    with pytest.raises(CheckpointError, match="not the run test"):
        run.restore(wanted(params), wanted({"step": jnp.int32(0)}), refuse)
    assert checkpoint.steps(run.root.parent) == [1]


def test_load_of_what_is_no_checkpoint(tmp_path: Path, run: Checkpoints, params: Any):
    with pytest.raises(CheckpointError, match="no such file or folder: .*nowhere"):
        checkpoint.read_card(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"no checkpoint in {path}"):
            checkpoint.load_params(path, wanted(params))
    save(run, 1, params)
    flip(run.root / "1" / "about" / "card.json")
    for read in (checkpoint.read_card, lambda path: checkpoint.load_params(path, wanted(params))):
        with pytest.raises(
            CheckpointError, match="checkpoint .*/1 is damaged: about/card.json is not what was written"
        ):
            read(tmp_path)
    (run.root / "2").mkdir()  # nothing in it: not taken for the newest
    assert checkpoint.find(tmp_path) == run.root / "1"


def test_weights_alone(tmp_path: Path, params: Any):
    path = tmp_path / "kept" / "model"
    checkpoint.save_params(path, params, {"name": "kept"}, "tokens")
    found, about, tokenizer = checkpoint.load_params(path, wanted(params))
    assert_same(found, params)
    assert (about["name"], about["hashes"], tokenizer) == ("kept", {"params": content_hash(params)}, "tokens")
    with pytest.raises(CheckpointError, match=f"{path} exists already"):
        checkpoint.save_params(path, params, {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file exists already"):
        checkpoint.save_params(tmp_path / "file", params, {})


def test_the_optimizer_comes_back_by_name(run: Checkpoints):
    """As dicts, whose keys come in another order than the fields of the states and the places of tuples."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load() -> Any:
        return checkpoint.load_optimizer(run.root / "1", lambda saved: jax.tree.map(lambda _: where, saved))

    state = {"opt_state": make_state(make_params())["opt_state"]}
    run.save(1, make_params(), state, {}, card(1), "tokens")
    run.wait()
    expected = state["opt_state"]
    found = dict(zip(tree.names(load()), jax.tree.leaves(load())))
    assert found.keys() == set(tree.names(expected)) and list(found) != tree.names(expected)
    for name, x in zip(tree.names(expected), jax.tree.leaves(expected)):
        assert (found[name].dtype, bits(found[name])) == (x.dtype, bits(x)), name
    swapped = {name: x for name, x in found.items() if x.dtype == jnp.float32}
    assert content_hash(swapped, list(swapped)[::-1]) != content_hash(swapped) == content_hash(swapped, list(swapped))


def test_sums_are_what_sha256sum_reads(run: Checkpoints, params: Any):
    save(run, 1, params)
    about = run.root / "1" / "about"
    lines = dict(reversed(line.split("  ")) for line in (about / "SHA256SUMS").read_text().splitlines())
    assert lines == {
        name: hashlib.sha256((about / name).read_bytes()).hexdigest()
        for name in ("card.json", "arrays.json", "tokenizer.json", "data.json")
    }
    assert json.loads((about / "card.json").read_text())["hashes"] == {
        "params": content_hash(params),
        "state": content_hash({"step": jnp.int32(1)}),
    }


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_full_disk(small_disk: Path):
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    run = Checkpoints(small_disk, Checkpoint(keep=10))
    save(run, 1, params)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(b"x" * 2**21)
    ballast.write_bytes(ballast.read_bytes()[:-100_000])
    with pytest.raises(
        CheckpointError,
        match="no space left on the disk of .*/2: the checkpoint was not written; earlier ones are intact",
    ):
        save(run, 2, params)
    run.abandon()
    assert sorted(p.name for p in run.root.iterdir()) == ["1"]
    with pytest.raises(CheckpointError, match="no space left on the disk of .*/alone: the checkpoint was not written"):
        checkpoint.save_params(small_disk / "alone", params, {})
    found = restore(run, params)
    assert found is not None
    assert_same(found.params, params)
    ballast.unlink()
    save(run, 2, params)
    assert checkpoint.steps(small_disk) == [1, 2]


SAVER = """
import sys
import jax.numpy as jnp
from llm_jax.checkpoint import Checkpoints
from llm_jax.config import Checkpoint
from llm_jax.platform import setup
setup()
run = Checkpoints(sys.argv[1], Checkpoint(keep=1000))
first = int(sys.argv[2])
for step in range(first, first + 1000):
    params = {f"w{i}": jnp.full((50, 1000), step, jnp.float32) for i in range(10)}
    run.save(step, params, {"step": jnp.int32(step)}, {}, {"results": {}}, None)
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_while_saving(kills: int, tmp_path: Path):
    """SIGKILL at a random moment in a process that saves without end: what has a number is whole."""
    rng = random.Random(kills)
    first = 1
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])},
        ) as process:
            assert process.stdout is not None
            begun = 0
            for _ in range(rng.randrange(3, 9)):
                begun = int(process.stdout.readline())
            try:
                process.wait(rng.random() * 0.05)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        known = checkpoint.steps(tmp_path)
        assert known and begun - 1 <= known[-1]
        for step in known:
            expected = {f"w{i}": jnp.full((50, 1000), step, jnp.float32) for i in range(10)}
            found, _, _ = checkpoint.load_params(tmp_path / "checkpoints" / str(step), wanted(expected))
            assert_same(found, expected)
        first = known[-1] + 1


LATE = """
import asyncio, logging, sys
import tensorstore
from llm_jax.checkpoint import silence_late_writes

logging.disable()
async def begin(future):
    async def wait():
        await future
    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0.05)
    return waiting

if sys.argv[1] == "silenced":
    silence_late_writes()
promise, future = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
waiting = loop.run_until_complete(begin(future))
loop.close()
promise.set_result(1)

promise, future = tensorstore.Promise.new()
future.add_done_callback(lambda _: 1 / 0)
promise.set_result(1)
"""


def test_a_write_that_ends_after_its_save_failed_prints_nothing():
    """Of what Python prints where no caller is left to raise to, this alone is left out."""

    def printed(how: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", LATE, how], capture_output=True, text=True, check=True, timeout=120
        ).stderr

    told, silenced = printed("told"), printed("silenced")
    assert "Event loop is closed" in told and "ZeroDivisionError" in told
    assert "Event loop is closed" not in silenced and "ZeroDivisionError" in silenced
