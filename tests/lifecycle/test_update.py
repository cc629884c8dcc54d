"""The whole loop: left where nothing drifted, trained, gated, promoted or refused; killed anywhere and called again, each stage is done once."""

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_jax import cli
from llm_jax.config import Batch, Data, Eval, Optimizer, Run, Schedule
from llm_jax.errors import CheckpointError, UserError
from llm_jax.lifecycle import update as updates
from llm_jax.lifecycle.registry import Registry
from llm_jax.loop import train
from llm_jax.models.config import ModelConfig
from llm_jax.saved import read_card
from llm_jax.tasks import NextToken


def words(kind: str, count: int) -> list[str]:
    """Documents of a language of numbers: counting up, or counting down."""
    made = []
    for i in range(count):
        numbers = [(7 * i + k) % 50 for k in range(12)]
        made.append(" ".join(str(n) for n in (numbers if kind == "up" else reversed(numbers))))
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that count up and down, a model of the former, and a suite that lets a model lose nothing of the latter but all of the former."""
    folder = tmp_path_factory.mktemp("world")
    for kind in ("up", "down"):
        rows = [json.dumps({"id": f"{kind}{i}", "text": text}) for i, text in enumerate(words(kind, 120))]
        (folder / f"{kind}.jsonl").write_text("\n".join(rows))
    train(recipe(folder, steps=60, start="fresh", workdir=str(folder / "base"), name="base"))
    for name, margin in (("loose", 50.0), ("strict", 1e-6)):
        (folder / f"{name}.py").write_text(
            "from llm_jax.config import Batch, Data\nfrom llm_jax.lifecycle.suite import Check, Suite\nfrom llm_jax.tasks import NextToken\n"
            "def check(kind, margin):\n"
            f"    data = Data(sources=(f'jsonl:{folder}/{{kind}}.jsonl',), heldout=0.25)\n"
            "    return Check(kind, NextToken(), data, margin, batch=Batch(size=8, length=64))\n"
            f"def get_suite(): return Suite((check('up', {margin}), check('down', 0.01)))\n"
        )
    return folder


def recipe(folder: Path, **changes) -> Run:
    run = Run(
        model=ModelConfig(vocab_size=300, max_length=64, layers=1, dim=32, heads=2),
        task=NextToken(),
        data=Data(sources=(source(folder, "up"),), tokenizer="bpe:300", heldout=0.25, window=64),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="linear", warmup=4, final=0.0),
        steps=20,
        batch=Batch(size=8, length=64),
        eval=Eval(every=0),
    )
    return dataclasses.replace(run, **changes)


def source(folder: Path, kind: str) -> str:
    return f"jsonl:{folder}/{kind}.jsonl"


@pytest.fixture
def registry(world: Path, tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "registry")
    made.promote("production", world / "base", force=True, why="the first")
    return made


def call(world: Path, registry: Registry, new: str = "down", suite: str = "loose", **changes) -> updates.Updated:
    run = recipe(world, **changes)
    return updates.update(
        "production", run, source(world, "up"), source(world, new), str(world / f"{suite}.py"), 0.25, registry
    )


def test_nothing_drifted(world: Path, registry: Registry):
    found = call(world, registry, new="up")
    assert (found.outcome, found.status) == ("left", 0) and set(found.stages) == {"asked", "drift"}
    assert registry.resolve("production").entry["why"] == "the first"


def test_promoted_and_called_again(world: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    """The update is promoted; at every stage a kill loses nothing, and the same call later finds its answer without training."""
    first = registry.resolve("production").hash
    before: dict[str, Callable] = {name: getattr(updates, name) for name in ("_trained", "_gated", "_promoted")}
    calls = []

    def killed(name: str) -> Callable:
        def once(*arguments):
            calls.append(name)
            if calls.count(name) == 1:
                if name == "_promoted":  # after the move, before it is noted
                    before[name](*arguments)
                raise KeyboardInterrupt
            return before[name](*arguments)

        return once

    for name in before:
        monkeypatch.setattr(updates, name, killed(name))
    changes = dict(steps=20)
    monkeypatch.setattr(updates.drifts, "drift", lambda *a: Verdict("update", "it counts down"))
    for _ in before:
        with pytest.raises(KeyboardInterrupt):
            call(world, registry, **changes)
    found = call(world, registry, **changes)
    assert (found.outcome, found.status) == ("promoted", 0)
    assert calls == ["_trained", "_trained", "_gated", "_gated", "_promoted", "_promoted"]
    assert [move["action"] for move in registry.history("production")] == ["promote", "promote"]  # moved once
    now = registry.resolve("production")
    assert (
        now.entry["from"] == first
        and now.entry["why"] == "update: it counts down"
        and now.entry["gate"] == found.stages["gate"]["id"]
    )
    assert found.stages["gate"]["rows"][1]["difference"] < -0.1  # it learned to count down
    assert call(world, registry, **changes) == found and len(calls) == 6  # cron calls again: nothing is done twice
    registry.rollback("production")  # someone's decision, which an update does not turn round
    again = call(world, registry, **changes)
    assert (again.outcome, again.status) == ("refused", 1) and "was moved back since" in again.why
    assert registry.resolve("production").hash == first


def test_it_goes_on_from_another_folder_and_where_the_registry_was_moved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Begun by relative paths and killed in the middle of training and after it: each call finds what was done."""
    monkeypatch.chdir(tmp_path)
    first = Registry("registry").promote("production", world / "base", force=True, why="the first").hash
    monkeypatch.setattr(updates.drifts, "drift", lambda *a: Verdict("update", "it counts down"))
    trained, runs = updates._trained, []

    def half(run: Run):
        runs.append(dataclasses.replace(run, steps=10))
        trained(runs[0])
        raise KeyboardInterrupt

    for name, kill in (("_trained", half), ("_gated", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(updates, name, kill)
            call(world, Registry("registry" if name == "_trained" else "../registry"))
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "registry", tmp_path / "moved")
    moved = Registry(tmp_path / "moved")
    found = call(world, moved)
    assert found.outcome == "promoted" and found.folder.startswith(f"{moved.folder}/updates/production/")
    card = read_card(moved.resolve("production").path)
    assert (card["parents"], card["step"]) == ([first], 20)
    lines = (Path(found.folder) / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [*range(1, 21)]
    assert call(world, moved) == found
    other = dataclasses.replace(runs[0], workdir=f"{found.folder}/run", start=str(moved.resolve("production").path))
    with pytest.raises(CheckpointError, match="holds a run of another config .start is"):
        train(other)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the update reads of a drift."""

    verdict: str
    why: str


def test_drift_is_found_and_a_gate_refuses(world: Path, registry: Registry):
    """The real drift of counting down, and a suite that allows no forgetting: trained, refused, and not trained again."""
    found = call(world, registry, suite="strict", steps=6)
    assert found.stages["drift"]["verdict"] in ("update", "retrain")
    if found.outcome == "retrain":  # told apart by a threshold, not by this test
        assert found.status == 1 and set(found.stages) == {"asked", "drift"}
        return
    assert (found.outcome, found.status) == ("refused", 1) and "up: worse by" in found.why
    again = call(world, registry, suite="strict", steps=6)
    assert again == found and len(registry.gates()) == 1
    assert registry.resolve("production").entry["why"] == "the first"


def test_two_at_once(world: Path, registry: Registry):
    lock = registry.folder / "updates" / "production.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(updates.BusyError, match="another update of 'production' is under way"):
            call(world, registry)


def test_what_is_no_name_makes_no_folder(world: Path, registry: Registry):
    before = sorted(registry.folder.parent.rglob("*"))
    for name, message in (("../../x", "is no name for the registry"), ("staging", "unknown name in the registry")):
        with pytest.raises(UserError, match=message):
            updates.update(name, recipe(world), "a", "b", "c", 0.25, registry)
    assert sorted(registry.folder.parent.rglob("*")) == before


def test_a_disk_that_refuses(world: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    """A line with status 2, not a traceback, whose 1 would tell of a refused model."""

    def full(path: Path, write: Callable) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(updates, "write_atomically", full)
        with pytest.raises(UserError, match=r"asked\.json: No space left on device$") as told:
            call(world, registry)
    assert told.value.status == 2
    shutil.rmtree(registry.folder / "updates")
    (registry.folder / "updates").write_text("a file")
    with pytest.raises(UserError, match="updates: File exists"):
        call(world, registry)


def test_a_report_and_an_advice_that_cannot_be_written(world: Path, registry: Registry, tmp_path: Path, capsys):
    """A line each, and nothing is left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")

    def refused(*arguments: str) -> str:
        before = sorted(tmp_path.iterdir())
        assert cli.main([*arguments]) == 2 and sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    report = ("report", "production", f"--registry={registry.folder}")
    assert refused(*report, f"--out={tmp_path}/folder") == f"error: {tmp_path}/folder: Is a directory\n"
    assert refused(*report, f"--out={tmp_path}/file/x.html") == f"error: {tmp_path}/file: File exists\n"
    sources = (f"--old={source(world, 'up')}", f"--new={source(world, 'down')}", f"--start={world}/base")
    advise = ("advise", "--config=configs/eras_update.py", *sources)
    assert refused(*advise, f"--out={tmp_path}/file") == f"error: {tmp_path}/file: File exists\n"


def test_the_command(
    world: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Status 0 where nothing drifted; 2 and one line for what is wrong."""
    monkeypatch.setenv("LLM_JAX_REGISTRY", str(registry.folder))
    (tmp_path / "recipe.py").write_text(
        "from llm_jax.config import *\nfrom llm_jax.tasks import NextToken\n"
        "def get_config(): return Run(task=NextToken(), data=Data(heldout=0.25), steps=4, batch=Batch(size=8, length=64))\n"
    )
    common = [f"--config={tmp_path}/recipe.py", f"--old={source(world, 'up')}", f"--new={source(world, 'up')}"]
    assert cli.main(["update", "production", *common, f"--suite={world}/loose.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "left"
    for config in ([f"--config={tmp_path}/recipe.py"], ["--config", f"{tmp_path}/recipe.py"]):
        assert cli.main(["update", *config, "production", *common[1:], f"--suite={world}/loose.py"]) == 0
    capsys.readouterr()
    assert cli.main(["update", "staging", *common, f"--suite={world}/loose.py"]) == 2
    assert "'staging'" in capsys.readouterr().err
    assert cli.main(["update", "production", *common, f"--suite={world}/none.py"]) == 2
    assert "no config file" in capsys.readouterr().err
