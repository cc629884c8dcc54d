"""A name stands at one whole model, whoever writes and whatever is killed; only what passed the gate takes it, or what is forced with a reason."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import registry as trials
from llm_jax import checkpoint, cli, loop, model, names
from llm_jax.config import Batch, Data, Eval, Run
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.lifecycle import registry as registries
from llm_jax.lifecycle.registry import RefusedError, Registry, RegistryError, versions
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four small checkpoints by their content hash. Not to be written to: what is kept of them is linked."""
    return trials.make_models(tmp_path_factory.mktemp("made"), 4)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def verdict(candidate: str, incumbent: str | None, passed: bool = True, *reasons: str, **more: Any) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "incumbent": incumbent,
        "passed": passed,
        "suite": "f",
        "reasons": list(reasons),
        **more,
    }


def force(registry: Registry, path: Path, name: str = "production") -> str:
    return registry.promote(name, path, force=True, why="a test").hash


def lines(registry: Registry) -> bytes:
    return (registry.folder / names.MOVES).read_bytes()


def test_a_name_goes_on_and_back(registry: Registry, made: dict[str, Path]):
    (a, first), (b, second), *_ = made.items()
    one = registry.record_gate(verdict(a, None))
    two = registry.record_gate(verdict(b, a))
    assert registry.promote("production", first, why="it is first").hash == a
    found = registry.promote("production", second)
    assert found == registry.resolve("production") and found.path == registry.folder / "models" / b[:16]
    back = registry.rollback("production", why="too slow")
    assert back == registry.resolve("production") and back.hash == a
    told = [{key: x for key, x in entry.items() if key != "time"} for entry in registry.history("production")]
    move = {"name": "production", "forced": False, "why": ""}
    assert told == [
        {**move, "action": "promote", "hash": a, "path": str(first), "model": f"models/{a[:16]}", "from": None}
        | {"gate": one, "why": "it is first"},
        {**move, "action": "promote", "hash": b, "path": str(second), "model": f"models/{b[:16]}", "from": a}
        | {"gate": two},
        {**move, "action": "rollback", "hash": a, "path": str(first), "model": f"models/{a[:16]}", "from": b}
        | {"gate": None, "why": "too slow"},
    ]
    assert all(entry["time"].endswith("+00:00") for entry in registry.moves())
    assert registry.names() == ["production"]
    with pytest.raises(RegistryError, match="'production' stands at its first version: there is nothing to roll back"):
        registry.rollback("production")


MOVE = st.tuples(st.sampled_from("xy"), st.integers(0, 3) | st.none())


@given(asked=st.lists(MOVE, max_size=14))
@settings(deadline=None, max_examples=30)
def test_it_is_a_stack_for_each_name(asked: list[tuple[str, int | None]], tmp_path_factory, made: dict[str, Path]):
    """Held against lists: a promotion is put on top, a rollback takes the top away."""
    registry = Registry(tmp_path_factory.mktemp("stack"))
    hashes = list(made)
    stacks: dict[str, list[str]] = {"x": [], "y": []}
    count = 0
    for name, which in asked:
        stack = stacks[name]
        if which is not None:
            force(registry, made[hashes[which]], name)
            if stack[-1:] != [hashes[which]]:
                stack.append(hashes[which])
                count += 1
        elif len(stack) > 1:
            registry.rollback(name)
            stack.pop()
            count += 1
        else:
            with pytest.raises(UserError):
                registry.rollback(name)
        for each, known in stacks.items():
            if known:
                assert registry.resolve(each).hash == known[-1]
                assert [x["hash"] for x in versions(registry.history(each))] == known
    assert len(registry.moves()) == count
    assert registry.names() == [name for name in "xy" if stacks[name]]


def test_what_did_not_pass_is_refused(registry: Registry, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    (a, first), (b, second), (c, third), _ = made.items()

    def refused(path: Path, match: str) -> None:
        before = lines(registry) if registry.names() else b""
        with pytest.raises(RefusedError, match=match) as error:
            registry.promote("production", path)
        assert "\n" not in str(error.value) and "--force --why=" in str(error.value)
        assert (lines(registry) if before else b"") == before

    command = "python -m llm_jax gate"
    refused(first, rf"model0 was never gated, and 'production' stands at no model yet: {command} .*model0 --suite=FILE")
    registry.record_gate(verdict(a, b))
    refused(first, rf"was gated against {b[:16]} \(gate \w+\), but 'production' stands at no model yet: {command}")
    registry.record_gate(verdict(a, None))
    registry.promote("production", first)
    assert not (registry.folder / "models" / b[:16]).exists()
    again = f"{command} {second} --against=registry:production --suite=FILE"
    refused(second, f"never gated, .* stands at {a[:16]}: {again} --registry={registry.folder}, or promote it")
    with monkeypatch.context() as patch:
        patch.setenv(names.VARIABLE, str(registry.folder))  # which the command reads by itself
        refused(second, f"{again}, or promote it")
    bad = registry.record_gate(verdict(b, a, False, "loss on old rose by 3%", "class 2 fell"))
    refused(second, rf"refused by gate {bad}: loss on old rose by 3%; class 2 fell\. Mend it")
    registry.record_gate(verdict(b, None))  # passed, but against nothing
    refused(second, f"refused by gate {bad}")
    registry.record_gate(verdict(b, a))  # tried again, and passed
    registry.record_gate(verdict(c, a))
    registry.promote("production", second)
    refused(third, rf"gated against {a[:16]} \(gate \w+\), but 'production' stands at {b[:16]}: {command}")
    registry.record_gate(verdict(c, b))
    registry.record_gate(verdict(c, b, False, "worse on a second look", time="later"))  # the last one counts
    refused(third, "refused by gate .*: worse on a second look")


def test_force_needs_a_reason_and_is_on_file(registry: Registry, made: dict[str, Path]):
    (a, first), (b, second), *_ = made.items()
    for why in ("", "  \t"):
        with pytest.raises(RegistryError, match=r"--force needs --why='\.\.\.'"):
            registry.promote("production", first, force=True, why=why)
    assert not registry.folder.exists()
    force(registry, first)
    bad = registry.record_gate(verdict(b, a, False, "worse"))
    entry = registry.promote("production", second, force=True, why="needed today").entry
    assert (entry["forced"], entry["gate"], entry["why"]) == (True, bad, "needed today")
    good = registry.record_gate(verdict(a, b))
    entry = registry.promote("production", first, force=True, why="back").entry
    assert (entry["forced"], entry["gate"]) == (False, good)  # it passed: nothing had to be forced


def test_where_it_stands_already_it_stays(registry: Registry, made: dict[str, Path]):
    first, *_ = made.values()
    force(registry, first)
    before = lines(registry)
    assert registry.promote("production", first).entry["why"] == "a test"
    assert lines(registry) == before


def test_a_promoted_checkpoint_outlives_its_run(registry: Registry, tmp_path: Path, made: dict[str, Path]):
    """Of a run's folder the newest is taken; it is linked, and stays when the run removes it."""
    (a, first), (b, second), *_ = made.items()
    for step, path in ((3, first), (12, second)):
        shutil.copytree(path, tmp_path / "run" / "checkpoints" / str(step))
    found = registry.promote("production", tmp_path / "run", force=True, why="x")
    assert found.hash == b and found.entry["path"] == str(tmp_path / "run")
    files = [x for x in (tmp_path / "run/checkpoints/12").rglob("*") if x.is_file()]
    assert len(files) > 5
    assert all(x.samefile(found.path / x.relative_to(tmp_path / "run/checkpoints/12")) for x in files)
    shutil.rmtree(tmp_path / "run")
    assert checkpoint.read_card(registry.resolve("production").path)["hashes"]["params"] == b
    force(registry, first, "other")
    assert registry.promote("third", "registry:other", force=True, why="x").hash == a


def test_copied_where_links_are_impossible(registry: Registry, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def no_link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    (_, first), *_ = made.items()
    force(registry, first)
    path = registry.resolve("production").path
    for file in first.rglob("*"):
        if file.is_file():
            assert (path / file.relative_to(first)).read_bytes() == file.read_bytes()
            assert not file.samefile(path / file.relative_to(first))


def test_a_model_that_is_gone_or_another_one(registry: Registry, made: dict[str, Path]):
    (a, first), (b, second), *_ = made.items()
    force(registry, first)
    force(registry, second)
    there = rf"'production' of the registry .* is {b[:16]}, but .*models/{b[:16]}"
    shutil.rmtree(registry.folder / "models" / b[:16])
    with pytest.raises(CheckpointError, match=rf"{there} is not there any more: promote that model again, or roll"):
        registry.resolve("production")
    force(registry, second)  # made anew, without a move
    assert registry.resolve("production").hash == b and len(registry.moves()) == 2
    shutil.rmtree(registry.folder / "models" / b[:16])
    shutil.copytree(first, registry.folder / "models" / b[:16])
    with pytest.raises(CheckpointError, match=rf"{there} holds {a[:16]}: promote that model again"):
        registry.resolve("production")
    (registry.folder / "models" / b[:16] / "about" / "card.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged: about/card.json is not what was written: promote that model"):
        registry.resolve("production")
    assert registry.rollback("production").hash == a
    force(registry, second)
    assert registry.resolve("production").hash == b
    shutil.rmtree(registry.folder / "models" / a[:16])
    with pytest.raises(CheckpointError, match=rf"{a[:16]} is not there any more"):
        registry.rollback("production")
    assert registry.resolve("production").hash == b


def test_any_cut_of_the_last_line_is_read_over_and_mended(registry: Registry, made: dict[str, Path]):
    """As a kill within a write leaves it: the name stands where it stood, and the next move begins a line."""
    (a, first), (_, second), (c, third), _ = made.items()
    force(registry, first)
    before = lines(registry)
    force(registry, second)
    torn = lines(registry)[len(before) :]
    for cut in range(0, len(torn), 7):
        (registry.folder / names.MOVES).write_bytes(before + torn[:cut])
        assert registry.resolve("production").hash == a
        assert lines(registry) == before + torn[:cut]  # a reader mends nothing
        force(registry, third)
        assert registry.resolve("production").hash == c
        assert lines(registry).startswith(before) and [x["hash"] for x in registry.moves()] == [a, c]
    (registry.folder / "gates.jsonl").write_bytes(b'{"id": "cu')
    kept = registry.record_gate(verdict(a, c))
    assert [x["id"] for x in registry.gates()] == [kept]


def test_a_reader_between_a_cut_and_the_next_line(registry: Registry, made: dict[str, Path], monkeypatch):
    """The first reading ends in a line put together from a killed writer's and the next one's: a whole line, but nobody's."""
    (_, first), (b, second), *_ = made.items()
    force(registry, first)
    one = lines(registry)
    force(registry, second)
    two = lines(registry)
    mixed = one + two[len(one) :].replace(b[:16].encode(), b"f" * 16, 1)
    readings, real = [mixed], Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: readings.pop() if readings and self.suffix == ".jsonl" else real(self)
    )
    assert registry.resolve("production").hash == b and not readings


def test_half_a_kept_model_is_made_anew(registry: Registry, made: dict[str, Path]):
    (a, first), *_ = made.items()
    part = registry.folder / "models" / f"{a[:16]}.part"
    (part / "about").mkdir(parents=True)
    (part / "about" / "card.json").write_text("{}")
    force(registry, first)
    assert registry.resolve("production").hash == a and not part.exists()


def test_a_line_that_is_none_is_told(registry: Registry, made: dict[str, Path]):
    first, second, *_ = made.values()
    force(registry, first)
    before = lines(registry)
    for line in (b"\0\0\0\n", b'{"name": "production"}\n', b"[1]\n", b"3\n"):
        (registry.folder / names.MOVES).write_bytes(before + line)
        for act in (registry.names, lambda: registry.resolve("production"), lambda: force(registry, second)):
            with pytest.raises(
                RegistryError, match=r"registry.jsonl:2 is not a line of a registry .*: restore the file"
            ):
                act()
        assert lines(registry) == before + line


@pytest.mark.parametrize("small_disk", ["200k"], indirect=True)
def test_full_disk(small_disk: Path, made: dict[str, Path]):
    registry = Registry(small_disk / "registry")
    (a, first), (b, second), *_ = made.items()
    force(registry, first)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(b"x" * 300_000)
    before = lines(registry)
    with pytest.raises(RegistryError, match=r"No space left on device: the model was not kept, all names stand where"):
        force(registry, second)
    assert sorted(x.name for x in (registry.folder / "models").iterdir()) == [a[:16]]
    with pytest.raises(RegistryError, match="No space left on device: nothing was written, all names stand where"):
        registry.promote("other", "registry:production", force=True, why="long " * 2000)
    assert lines(registry) == before and registry.resolve("production").hash == a
    ballast.unlink()
    force(registry, second)
    assert registry.resolve("production").hash == b


LIMITED = """
import resource, sys
from llm_jax.lifecycle.registry import Registry, RegistryError
registry, before = Registry(sys.argv[1]), len(open(sys.argv[1] + "/registry.jsonl").read())
resource.setrlimit(resource.RLIMIT_FSIZE, (before + 50, before + 50))  # part of a line has room
try:
    registry.promote("other", "registry:production", force=True, why="x")
except RegistryError as e:
    print(e)
assert "jax" not in sys.modules
"""


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_line_of_which_a_part_was_written_is_taken_back(registry: Registry, made: dict[str, Path]):
    first, *_ = made.values()
    force(registry, first)
    before = lines(registry)
    found = python(LIMITED, registry.folder)
    assert (
        found.stderr == "" and "File too large: nothing was written, all names stand where they stood" in found.stdout
    )
    assert lines(registry) == before


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "é", "a\n", "registry:x"])
def test_what_is_no_name(name: str, registry: Registry, made: dict[str, Path]):
    first, *_ = made.values()
    for act in (lambda: force(registry, first, name), lambda: registry.rollback(name), lambda: registry.resolve(name)):
        with pytest.raises(RegistryError, match=r"is no name for the registry: letters, digits, - _ and \. only"):
            act()
    assert not registry.folder.exists()


def test_what_a_user_gets_wrong(registry: Registry, tmp_path: Path, made: dict[str, Path], monkeypatch):
    first, *_ = made.values()
    command = f"python -m llm_jax promote prod CHECKPOINT --registry={registry.folder}"
    with pytest.raises(CheckpointError, match=f"no name in the registry .*: {command}$"):
        registry.resolve("prod")
    with pytest.raises(CheckpointError, match="no such file or folder: .*nowhere"):
        force(registry, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no name in the registry"):
        registry.rollback("production")
    assert not registry.folder.exists()
    force(registry, first)
    for act in (lambda: registry.rollback("prodution"), lambda: registry.resolve("prodution")):
        with pytest.raises(CheckpointError, match="'prodution'; did you mean 'production'"):
            act()
    for url in ("gs://bucket/registry", "s3://bucket/registry"):
        monkeypatch.setenv(names.VARIABLE, url)
        for act in (Registry, lambda url=url: Registry(url), lambda: model.locate("registry:production")):
            with pytest.raises(RegistryError, match=f"{url}: a registry lies on a disk, .* name a local folder"):
                act()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistryError, match="the registry .*file cannot be written: File exists"):
        force(Registry(tmp_path / "file"), first)


def test_verdicts_are_on_file_once(registry: Registry):
    one = verdict("a", None, True, id="g1", time="t", figures=(1.5, float("nan")))
    assert registry.record_gate(one) == registry.record_gate(one) == "g1"
    assert len(registry.gates()) == 1
    with pytest.raises(RegistryError, match="has another verdict g1 already"):
        registry.record_gate({**one, "passed": False})
    with pytest.raises(ValueError, match="a verdict without candidate, suite"):
        registry.record_gate({"incumbent": None, "passed": True, "reasons": []})
    other = registry.record_gate(verdict("a", None))
    assert [x["id"] for x in registry.gates()] == ["g1", other] and registry.gates()[1]["time"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, model.Model]:
    """A model that can be loaded, and its checkpoint."""
    tokenizer = load_tokenizer("bpe:280", ["a fine film with a dull plot"] * 3)
    sizes = ModelConfig(vocab_size=300, max_length=16, layers=1, dim=8, heads=1)
    made = model.Model(sizes, transformer.init(sizes, jax.random.key(0)), tokenizer, {"pruned": {}})
    path = tmp_path_factory.mktemp("small") / "model"
    model.save(made, path)
    return path, made


def test_a_model_is_read_by_its_name(registry: Registry, small: Any, monkeypatch: pytest.MonkeyPatch):
    path, made = small
    force(registry, path)
    monkeypatch.setenv(names.VARIABLE, str(registry.folder))
    assert model.locate("registry:production") == ("checkpoint", registry.resolve("production").path)
    loaded = model.load("registry:production")
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), loaded.params, made.params)))
    assert model.sizes("registry:production") == made.config
    assert model.read_tokenizer("registry:production") == made.tokenizer
    assert model.pruned("registry:production") == ()
    with pytest.raises(CheckpointError, match="'staging'"):
        model.load("registry:staging")
    monkeypatch.delenv(names.VARIABLE)
    monkeypatch.chdir(registry.folder.parent)  # the folder `registry` by default
    assert model.locate("registry:production")[1].samefile(registry.resolve("production").path)


@pytest.mark.slow
def test_a_run_starts_from_a_name_and_goes_on_when_it_has_moved(
    registry: Registry, small: Any, tmp_path: Path, monkeypatch
):
    path, made = small
    version = force(registry, path)
    monkeypatch.setenv(names.VARIABLE, str(registry.folder))
    (tmp_path / "text.txt").write_text("a fine film with a dull plot " * 50)
    run = Run(
        name="run",
        workdir=str(tmp_path / "run"),
        start="registry:production",
        task=NextToken(),
        data=Data(sources=(f"text:{tmp_path}/text.txt",), tokenizer="bpe:280", heldout=0.0),
        batch=Batch(size=8, length=16),
        eval=Eval(every=0, prompts=()),
        steps=1,
    )
    loop.train(run)
    assert checkpoint.read_card(run.folder)["parents"] == [version]
    model.save(dataclasses.replace(made, params=jax.tree.map(lambda x: x + 1, made.params)), tmp_path / "other")
    assert force(registry, tmp_path / "other") != version
    result = loop.train(dataclasses.replace(run, steps=2))
    assert (result["steps"], checkpoint.read_card(run.folder)["parents"]) == (2, [version])


BUCKET = """
import os, sys
from moto import server
running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
running.start()
host, port = running.get_host_and_port()
os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "LLM_JAX_REGISTRY": sys.argv[1]}
import jax
from llm_jax import model, storage
from llm_jax.lifecycle.registry import Registry
storage.file_system("s3").mkdir("bucket")
made = model.load(sys.argv[2])
model.save(made, "s3://bucket/runs/one")
Registry().promote("production", "s3://bucket/runs/one", force=True, why="x")
loaded = model.load("registry:production")
print("same", jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), made.params, loaded.params)))
running.stop()
"""


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_fetched(registry: Registry, small: Any):
    pytest.importorskip("moto.server", reason="needs moto, flask and s3fs of the extra 'dev'")
    pytest.importorskip("s3fs", reason="needs moto, flask and s3fs of the extra 'dev'")
    found = python(BUCKET, registry.folder, small[0])
    assert "same True" in found.stdout, found.stderr


def test_a_name_is_found_without_jax(registry: Registry, made: dict[str, Path]):
    (a, first), *_ = made.items()
    force(registry, first)
    code = "import sys; from llm_jax.names import resolve; print(resolve('production', sys.argv[1]).hash, 'jax' in sys.modules)"
    assert python(code, registry.folder).stdout == f"{a} False\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main([str(x) for x in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_commands(registry: Registry, made: dict[str, Path], capsys, monkeypatch: pytest.MonkeyPatch):
    (a, first), (b, second), *_ = made.items()
    monkeypatch.setenv(names.VARIABLE, str(registry.folder))
    status, out, err = run(capsys, "promote", "production", first)
    assert (status, out) == (2, "") and err.startswith("error: ") and "was never gated" in err and err.count("\n") == 1
    assert run(capsys, "promote", "production", first, "--force")[::2] == (
        2,
        "error: --force needs --why='...': what is promoted past the gate has its reason on file\n",
    )
    status, out, _ = run(capsys, "promote", "production", first, "--force", "--why=first")
    kept = registry.folder / "models" / a[:16]
    assert (status, out) == (0, f"production: nothing -> {a[:16]} ({kept}), by force\n")
    registry.record_gate(verdict(b, a))
    status, out, _ = run(capsys, "promote", "production", second, "--json")
    assert status == 0 and json.loads(out) == {
        **registry.moves()[-1],
        "checkpoint": str(registry.folder / "models" / b[:16]),
    }
    assert "it stands there already, by production: " in run(capsys, "promote", "production", second)[1]
    status, out, _ = run(capsys, "rollback", "production", "--why=slow")
    assert (status, out) == (0, f"production: {b[:16]} -> {a[:16]} ({kept}), rolled back\n")
    assert registry.moves()[-1]["why"] == "slow"
    assert run(capsys, "rollback", "production")[0] == 2
    other = registry.folder.parent / "other"
    assert run(capsys, "promote", "x", "registry:production", f"--registry={other}", "--force", "--why=y")[0] == 2
    assert run(capsys, "promote", "x", first, f"--registry={other}", "--force", "--why=y")[0] == 0
    assert Registry(other).resolve("x").hash == a and registry.names() == ["production"]


@pytest.mark.parametrize(("kills", "writers"), [(5, 2), pytest.param(60, 8, marks=pytest.mark.slow)])
def test_killed_writers(kills: int, writers: int, tmp_path: Path, made: dict[str, Path]):
    found = trials.killed(tmp_path / "trial", made, kills, writers, seed=kills, at_once=2)
    assert found.faults == [] and found.said() and found.reads


@pytest.mark.parametrize(("writers", "moves"), [(2, 20), pytest.param(8, 40, marks=pytest.mark.slow)])
def test_several_writers_at_once(writers: int, moves: int, tmp_path: Path, made: dict[str, Path]):
    found = trials.together(tmp_path / "trial", made, writers, moves)
    assert found.faults == [] and found.reads
    log = found.registry.folder / names.MOVES
    whole = log.read_bytes().splitlines(keepends=True)

    def faults(*changed: bytes) -> list[str]:
        log.write_bytes(b"".join(changed))
        found.faults.clear()
        found.check()
        return found.faults

    assert faults(*whole) == []
    assert any("0 lines of a move" in x for x in faults(*whole[:-3], *whole[-2:]))  # the trial sees what is lost,
    assert any("2 lines of a move" in x for x in faults(*whole, whole[-1]))  # what is repeated,
    assert any("does not go on" in x for x in faults(*whole[:-2], whole[-1], whole[-2]))  # what is out of order,
    victim = next((found.registry.folder / "models").iterdir())
    (victim / "params" / "manifest.ocdbt").unlink()
    assert any("is not whole" in x for x in faults(*whole))  # and a model with a part missing


def test_writers_without_a_lock_would_be_seen(tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """Two moves that are judged before either is written: without the lock the second does not go on from the first."""
    first, second, third, _ = made.values()
    registry = Registry(tmp_path / "registry")
    force(registry, first)
    keep = registries._keep

    def meanwhile(path: Path, content: str, folder: Path) -> str:
        monkeypatch.setattr(registries, "_keep", keep)
        force(registry, third)
        return keep(path, content, folder)

    with monkeypatch.context() as patch:
        patch.setattr(registries, "_locked", lambda folder: registries.contextlib.nullcontext())
        patch.setattr(registries, "_keep", meanwhile)
        force(registry, second)
    assert trials._broken(Registry(registry.folder))
