"""A run leaves what it says it leaves, goes on exactly where it was, and refuses what it cannot go on with."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint, cli, config, continuation, evaluate, loop, model, times
from llm_jax.card import content_hash
from llm_jax.config import Batch, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.config import Checkpoint as Keep
from llm_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from llm_jax.models.config import ModelConfig
from llm_jax.parts import build
from llm_jax.tasks import NextToken
from llm_jax.transforms import Transform, offload_moments

TIMES = ("seconds", "input_wait", "tokens_per_second", "mfu")
"""What differs between two runs that are the same."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 40 short documents of invented words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(40):
            (folder / name / f"{i:02d}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(5, 40))))
    return folder


@pytest.fixture
def tiny(texts: Path, tmp_path: Path) -> Run:
    """A small run with all that has a state: packing, mixing, dropout, Adam, a moving average."""
    return tiny_run(texts, tmp_path / "run")


def tiny_run(texts: Path, workdir: Path) -> Run:
    return Run(
        name="tiny",
        workdir=str(workdir),
        model=ModelConfig(vocab_size=300, max_length=32, layers=1, dim=16, heads=2, dropout=0.1),
        task=NextToken(),
        data=Data(
            sources=(f"text:{texts}/a/*.txt", f"text:{texts}/b/*.txt"),
            weights=(2.0, 1.0),
            tokenizer="bpe:300",
            heldout=0.1,
            window=32,
        ),
        optimizer=Optimizer(learning_rate=1e-2, moving_average=0.9),
        schedule=Schedule(name="constant"),
        steps=12,
        batch=Batch(size=8, length=32),
        checkpoint=Keep(every=4),
        eval=Eval(every=6, batches=1),
    )


def change(run: Run, **changes: Any) -> Run:
    """A run with other values: `change(run, steps=3, model=dict(dim=32))`."""
    return dataclasses.replace(
        run,
        **{
            name: dataclasses.replace(getattr(run, name), **x) if isinstance(x, dict) else x
            for name, x in changes.items()
        },
    )


def lines(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    read = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in entry.items() if name not in TIMES} for entry in read]


def params_hash(run: Run) -> str:
    return checkpoint.read_card(run.folder)["hashes"]["params"]


def train_until(monkeypatch: pytest.MonkeyPatch, run: Run, step: int) -> None:
    """Train, and be interrupted before the step after `step`."""
    one_step = loop._Session.one_step

    def interrupted(session: Any) -> None:
        if session.at == step:
            raise KeyboardInterrupt
        one_step(session)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run)


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """An uninterrupted run, and what it returned. Copy the folder before changing anything in it."""
    run = change(tiny_run(texts, tmp_path_factory.mktemp("whole") / "run"), eval=dict(prompts=("ab", "")))
    return run, loop.train(run)


@pytest.fixture
def copied(whole: tuple[Run, dict[str, Any]], tmp_path: Path) -> Run:
    """The uninterrupted run in a folder of this test's own."""
    run = change(whole[0], workdir=str(tmp_path / "copied"))
    shutil.copytree(whole[0].folder, run.folder)
    return run


def test_leaves_its_files(whole: tuple[Run, dict[str, Any]]):
    run, result = whole
    folder = run.folder
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(config.to_dict(run)))
    card = json.loads((folder / "card.json").read_text())
    assert card == checkpoint.read_card(folder)
    assert (card["step"], card["parents"], card["seed"], card["mesh"]) == (
        12,
        [],
        0,
        {"data": 8, "fsdp": 1, "tensor": 1, "context": 1},
    )
    assert card["results"] == {"step": 12, **result["eval"]} and {
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
    } <= set(result["eval"])
    assert [s["documents"] for s in card["sources"]["sources"]] == [36, 36]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["steps"] == result["steps_this_time"] == 12 and result["skipped"] == 0
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (
        folder / "curves.png"
    ).stat().st_size > 5000
    assert [p.stat().st_size > 100 for p in (folder / "tensorboard").iterdir()] == [True]
    assert checkpoint.steps(folder) == [8, 12] and result["paths"]["checkpoint"] == str(folder / "checkpoints" / "12")
    assert all(Path(path).exists() for path in result["paths"].values())
    assert [s["prompt"] for s in result["samples"]] == ["ab", ""] and all(
        isinstance(s["text"], str) for s in result["samples"]
    )


def test_metrics_are_an_object_a_step(whole: tuple[Run, dict[str, Any]]):
    run, result = whole
    entries = lines(run)
    training = [e for e in entries if "loss" in e]
    assert [e["step"] for e in training] == list(range(1, 13))
    assert [e["step"] for e in entries if "eval/loss" in e] == [6, 12]
    assert all(
        math.isfinite(e["loss"]) and math.isfinite(e["grad_norm"]) and e["learning_rate"] == pytest.approx(0.01)
        for e in training
    )
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert len({e["samples"] for e in training}) == 12
    assert entries[-1]["eval/loss"] == result["eval"]["loss"]
    timed = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[1])
    assert timed["seconds"] > 0 and 0 < timed["mfu"] < 1 and timed["tokens_per_second"] > 0 and timed["input_wait"] >= 0
    card = checkpoint.read_card(run.folder)
    assert (
        card["tokens"]
        == result["tokens"]
        == result["data"]["tokens"]
        == result["data"]["rows"] * 32 * (1 - result["data"]["padding"])
    )


def test_resumed_equals_uninterrupted(
    whole: tuple[Run, dict[str, Any]], tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Interrupted before a checkpoint, between a checkpoint and the next, and again; weights, losses, samples and counts to the bit."""
    run, result = whole
    tiny = change(tiny, eval=dataclasses.replace(run.eval))
    for step in (3, 7, 10):
        train_until(monkeypatch, tiny, step)
    again = loop.train(tiny)
    assert "resuming" in capsys.readouterr().err
    assert again["steps_this_time"] == 4
    assert lines(tiny) == lines(run)
    assert params_hash(tiny) == params_hash(run)
    assert {k: again[k] for k in ("eval", "data", "tokens", "flops", "samples")} == {
        k: result[k] for k in ("eval", "data", "tokens", "flops", "samples")
    }
    for name in ("params", "state"):
        assert checkpoint.read_card(tiny.folder)["hashes"][name] == checkpoint.read_card(run.folder)["hashes"][name]
    other = change(tiny, workdir=str(tiny.folder) + "-other", seed=1)
    train_until(monkeypatch, other, 2)
    assert lines(other)[0]["samples"] != lines(run)[0]["samples"]


def test_moments_on_the_host_change_nothing(whole: tuple[Run, dict[str, Any]], tiny: Run, monkeypatch):
    """The same weights and moments bit for bit, through an interruption; between updates they are not in the device's memory."""
    run, result = whole
    tiny = change(tiny, transforms=(offload_moments(),), eval=dataclasses.replace(run.eval))
    places = set()
    one_step = loop._Session.one_step

    def seen(session: Any) -> None:
        one_step(session)
        state = session.state
        places.update(x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}

    monkeypatch.setattr(loop._Session, "one_step", seen)
    train_until(monkeypatch, tiny, 7)
    again = loop.train(tiny)
    assert places == {"pinned_host"} and again["eval"] == result["eval"]
    for name in ("params", "state"):
        assert checkpoint.read_card(tiny.folder)["hashes"][name] == checkpoint.read_card(run.folder)["hashes"][name]


def test_what_was_saved_is_what_was_evaluated(whole: tuple[Run, dict[str, Any]]):
    """The weights of a checkpoint are the average; those that are trained are kept beside them."""
    run, _ = whole
    parts = loop.build(run)
    saved = checkpoint.Checkpoints(run.folder, run.checkpoint)
    kept = jax.eval_shape(lambda state: loop._kept(state, parts.extra), parts.abstract)
    found = saved.restore(
        *jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(parts.mesh, jax.P())), kept
        )
    )
    parts.close()
    assert found is not None
    assert (
        content_hash(found.params)
        == content_hash(found.state["opt_state"].average)
        != content_hash(found.state["params"])
    )
    assert content_hash(model.load(run.folder).params) == params_hash(run)


def test_complete_run_evaluates_again(whole: tuple[Run, dict[str, Any]], copied: Run):
    _, result = whole
    before = lines(copied)
    again = loop.train(copied)
    assert again["steps_this_time"] == 0 and again["steps"] == 12
    assert again["eval"] == result["eval"] and again["samples"] == result["samples"] and again["data"] == result["data"]
    assert lines(copied) == before
    shorter = loop.train(change(copied, steps=8))
    assert shorter["steps"] == 12 and shorter["eval"] == result["eval"]


def test_more_steps_go_on_elsewhere(copied: Run):
    """Where it runs, how often it tells and saves, and what stops it, are no part of what a run computes."""
    before = lines(copied)
    result = loop.train(
        change(
            copied,
            steps=14,
            checkpoint=dict(keep=1, best="", every=5),
            mesh=dict(data=2, fsdp=4),
            log_every=2,
            data=dict(max_dropped=0.5),
            optimizer=dict(max_nonfinite=2),
            eval=dict(every=0),
        )
    )
    assert (result["steps"], result["steps_this_time"]) == (14, 2)
    assert lines(copied)[: len(before)] == before
    assert [e["step"] for e in lines(copied)[len(before) :]] == [14, 14]
    assert checkpoint.steps(copied.folder) == [14]


def test_damaged_newest_falls_back_and_the_run_goes_on(
    whole: tuple[Run, dict[str, Any]], copied: Run, caplog: pytest.LogCaptureFixture
):
    newest = copied.folder / "checkpoints" / "12"
    shutil.rmtree(newest)
    newest.mkdir()
    with caplog.at_level(logging.WARNING):
        result = loop.train(copied)
    assert any("12 is incomplete or damaged" in r.getMessage() for r in caplog.records)
    assert result["steps_this_time"] == 4 and result["eval"] == whole[1]["eval"]
    assert lines(copied) == lines(whole[0]) and params_hash(copied) == params_hash(whole[0])
    for step in checkpoint.steps(copied.folder):
        (copied.folder / "checkpoints" / str(step) / "about" / "card.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* can be read; they were left in place"):
        loop.train(copied)
    assert checkpoint.steps(copied.folder) == [8, 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(optimizer=dict(learning_rate=0.02)),
            r"\(optimizer.learning_rate is 0.01 there and 0.02 here\): give this one another name or workdir",
        ),
        (dict(model=dict(dim=32)), r"\(model.dim is 16 there and 32 here\)"),
        (dict(seed=5), r"\(seed is 0 there and 5 here\)"),
        (dict(task=NextToken(z_loss=0.1)), r"\(task.z_loss is 0.0 there and 0.1 here\)"),
        (dict(data=dict(weights=(1.0, 1.0))), r"\(data.weights is \[2.0, 1.0\] there and \[1.0, 1.0\] here\)"),
        (dict(transforms=(Transform(label="other(1)"),)), r"\(transforms is \[\] there and \[\"other\(1\)\"\] here\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_config_in_the_folder(changes: dict[str, Any], message: str, whole: tuple[Run, dict[str, Any]]):
    run = change(whole[0], **changes)
    with pytest.raises(CheckpointError, match=f"{run.folder} holds a run of another config {message}"):
        loop.train(run)


def test_changed_source_is_refused(tiny: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "texts"
    shutil.copytree(texts, own)
    run = change(tiny, data=dict(sources=(f"text:{own}/a/*.txt", f"text:{own}/b/*.txt")))
    train_until(monkeypatch, run, 9)
    (own / "b" / "00.txt").write_text("another text")
    with pytest.raises(
        DataError,
        match=r"the run cannot continue on the same samples: source text:.*/b/\*.txt has other content .*"
        "set config.checkpoint.allow_changed_data=True",
    ):
        loop.train(run)
    result = loop.train(change(run, checkpoint=dict(allow_changed_data=True)))
    assert result["steps_this_time"] == 4


def test_other_worker_count_is_refused(whole: tuple[Run, dict[str, Any]]):
    with pytest.raises(DataError, match="data.workers was 0, now 1"):
        loop.train(change(whole[0], data=dict(workers=1)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            dict(model=dict(vocab_size=280)),
            DataError,
            "the tokenizer has 300 entries, the model's vocabulary 280: set model.vocab_size=300 or more",
        ),
        (
            dict(model=dict(positions="learned", max_length=16)),
            ConfigError,
            "batch.length 32 is longer than the model's table of positions",
        ),
        (dict(mesh=Mesh(data=3)), ConfigError, r"mesh \(data=3.*\) does not divide the 8 devices"),
        (dict(batch=dict(size=4)), ConfigError, "4 rows do not divide over the 8 devices of mesh axes data and fsdp"),
        (dict(data=dict(sources=("text:/nowhere/*.txt",), weights=())), DataError, "/nowhere"),
        (dict(optimizer=dict(name="adamx")), ConfigError, "unknown optimizer 'adamx'"),
        (
            dict(optimizer=dict(freeze=("encoder/.*",))),
            ConfigError,
            "optimizer.freeze 'encoder/.*' matches no parameter",
        ),
        (dict(start="/nowhere"), CheckpointError, "no such file or folder: /nowhere"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit(changes: dict[str, Any], error: type[Exception], message: str, tiny: Run):
    with pytest.raises(error, match=message):
        loop.train(change(tiny, **changes))


def test_workdir_that_cannot_be(tiny: Run, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/file.*: "):
        loop.train(change(tiny, workdir=str(tmp_path / "file" / "run")))


def test_unknown_metric_for_the_best(tiny: Run):
    with pytest.raises(ConfigError, match="unknown checkpoint.best 'los'; did you mean 'loss'?"):
        loop.train(change(tiny, checkpoint=dict(best="los"), eval=dict(every=1)))


def test_logs_every_few_steps_and_evaluates_once(tiny: Run):
    run = change(tiny, log_every=5, eval=dict(every=0), checkpoint=dict(every=100))
    loop.train(run)
    assert [e["step"] for e in lines(run)] == [5, 10, 12, 12]
    assert checkpoint.steps(run.folder) == [12]


def test_no_steps_keep_the_model(tiny: Run):
    """A run of no steps is how a change without training is carried out and kept."""
    run = change(tiny, steps=0, data=dict(heldout=0.0))
    result = loop.train(run)
    assert result["steps"] == 0 and result["eval"] == {}
    assert checkpoint.read_card(run.folder)["step"] == 0
    assert loop.train(run)["steps"] == 0


def test_start_from_a_checkpoint(
    whole: tuple[Run, dict[str, Any]], tiny: Run, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    """It begins with the evaluated weights and the tokenizer of the other run, and its card names them."""
    parent, _ = whole
    data = dict(sources=(f"text:{texts}/b/*.txt",), weights=(), tokenizer="bpe:270")
    run = change(tiny, start=str(parent.folder), steps=0, data=data)
    loop.train(run)
    card = checkpoint.read_card(run.folder)
    assert card["parents"] == [params_hash(parent)] and card["hashes"]["params"] == params_hash(parent)
    assert (run.folder / "tokenizer.json").read_bytes() == (parent.folder / "tokenizer.json").read_bytes()
    after = change(tiny, workdir=str(tiny.folder) + "-after", start=str(parent.folder / "checkpoints" / "12"))
    train_until(monkeypatch, after, 2)
    assert lines(after)[0]["loss"] < lines(parent)[0]["loss"] - 0.5
    with pytest.raises(
        CheckpointError,
        match=r"the model .* is of another shape: '.*' is float32\[.*16.*\] there and float32\[.*32.*\] in this config",
    ):
        loop.train(
            change(tiny, workdir=str(tiny.folder) + "-wide", start=str(parent.folder), model=dict(dim=32), steps=0)
        )


def test_another_tokenizer_than_the_start_is_told(
    whole: tuple[Run, dict[str, Any]], tiny: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    other = loop.train(change(tiny, workdir=str(tmp_path / "other"), data=dict(tokenizer="bpe:280"), steps=0))
    with caplog.at_level(logging.WARNING):
        loop.train(
            change(
                tiny,
                start=str(whole[0].folder),
                steps=0,
                data=dict(tokenizer=f"{other['paths']['folder']}/tokenizer.json"),
            )
        )
    assert any("is not the tokenizer of" in r.getMessage() for r in caplog.records)


def test_resumes_without_the_model_it_began_with(
    whole: tuple[Run, dict[str, Any]], tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parent = tmp_path / "parent"
    shutil.copytree(whole[0].folder / "checkpoints" / "12", parent)
    run = change(tiny, start=str(parent))
    train_until(monkeypatch, run, 9)
    parents = checkpoint.read_card(run.folder)["parents"]
    shutil.rmtree(parent)
    assert loop.train(run)["steps_this_time"] == 4
    assert checkpoint.read_card(run.folder)["parents"] == parents == [params_hash(whole[0])]


def test_bfloat16(tiny: Run):
    run = change(tiny, model=dict(dtype="bfloat16"), steps=4, checkpoint=dict(every=2))
    result = loop.train(run)
    losses = [e["loss"] for e in lines(run) if "loss" in e]
    assert math.isfinite(result["eval"]["loss"]) and losses[-1] < losses[0]
    kept = model.load(run.folder)
    assert {x.dtype for x in jax.tree.leaves(kept.params)} == {jnp.dtype("float32")}
    assert model.apply(kept, {"tokens": jnp.ones((1, 4), jnp.int32)}).hidden.dtype == jnp.bfloat16


def test_stops_when_too_much_is_lost(tiny: Run):
    """At the end at the latest; what was trained is kept, and goes on where more may be lost."""
    run = change(tiny, data=dict(long="truncate"))
    with pytest.raises(DataError, match=r"of the tokens are lost \(\d+ of \d+\): data.max_dropped allows 5.0%"):
        loop.train(run)
    result = loop.train(change(run, data=dict(max_dropped=1.0)))
    assert result["data"]["lost"] > 0 and result["data"]["truncated"] > 0


def blow_up(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """Let the weights that are trained be multiplied by a factor after a step."""

    def build(run: Run) -> Any:
        parts = build_parts(run)

        def multiplied(state: Any, batch: Any) -> Any:
            state, metrics = parts.step(state, batch)
            if int(state.step) == step:
                state = state._replace(params=jax.tree.map(lambda x: x * factor, state.params))
            return state, metrics

        return dataclasses.replace(parts, step=multiplied)

    build_parts = loop.build
    monkeypatch.setattr(loop, "build", build)


@pytest.mark.parametrize(
    ("factor", "message", "last"),
    [
        (
            1e38,
            r"step 7: loss or gradient was not finite 3 times in a row \(optimizer.max_nonfinite\); the last checkpoint is step 4",
            4,
        ),
        (float("inf"), "step 4: the weights are not finite, so it is not saved; the last checkpoint is step 3", 3),
    ],
    ids=["huge", "infinite"],
)
def test_loss_that_is_not_finite(
    factor: float, message: str, last: int, tiny: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = change(tiny, checkpoint=dict(every=1, best=""), eval=dict(every=0), optimizer=dict(max_nonfinite=3))
    blow_up(monkeypatch, 4, factor)
    with caplog.at_level(logging.WARNING), pytest.raises(NonFiniteError, match=f"{message} in {run.folder}"):
        loop.train(run)
    assert checkpoint.steps(run.folder) == [last - 1, last]
    for step in checkpoint.steps(run.folder):
        kept = model.load(run.folder / "checkpoints" / str(step))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept.params))
    if last == 4:
        assert [None in (e["loss"], e["grad_norm"]) for e in lines(run)] == [False] * 4 + [True] * 3
        assert [e["skipped_in_a_row"] for e in lines(run)] == [0, 0, 0, 0, 1, 2, 3]
        assert any(
            "step 5 is not saved: its update and 0 before it were skipped" in r.getMessage() for r in caplog.records
        )


def test_ends_on_skipped_updates(tiny: Run, monkeypatch: pytest.MonkeyPatch):
    blow_up(monkeypatch, 4, 1e38)
    with pytest.raises(
        NonFiniteError, match="step 12: its update was skipped, so it is not saved; the last checkpoint is step 4"
    ):
        loop.train(change(tiny, eval=dict(every=0), optimizer=dict(max_nonfinite=100)))


CONFIG = """
from llm_jax.config import *
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken

def get_config():
    return Run(
        name="tiny", workdir="{workdir}", model=ModelConfig(vocab_size=300, max_length=32, layers=1, dim=16, heads=2),
        task=NextToken(), data=Data(sources=("text:{texts}/a/*.txt",), tokenizer="bpe:300", heldout=0.1, window=32),
        optimizer=Optimizer(learning_rate=1e-2), steps=6, batch=Batch(size=8, length=32), checkpoint=Checkpoint(every=1), eval=Eval(every=0))
"""


def test_command_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Status 0 and the result; status 2 and one line when the loss is not finite."""
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG.format(workdir=tmp_path / "run", texts=texts))
    assert cli.main(["train", f"--config={file}", "--config.steps=0", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 0 and "optimizer.learning_rate = 0.01" in said.err
    assert (
        cli.main(
            ["train", f"--config={file}", f"--config.workdir={tmp_path}/nan", "--config.optimizer.learning_rate=1e38"]
        )
        == 2
    )
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    assert [line for line in said.err.splitlines() if line.startswith("error: ")] == said.err.splitlines()[-1:]
    assert "(optimizer.max_nonfinite); the last checkpoint is step 1 in" in said.err.splitlines()[-1]


def size_on_disk(path: Path) -> int:
    """Bytes of a folder in pages, as a disk in memory counts them."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in path.rglob("*"))


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_full_disk(whole: tuple[Run, dict[str, Any]], texts: Path, tmp_path: Path, small_disk: Path):
    """The run ends with one clear line, what was saved can be read, and with space the same command goes on."""
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG.format(workdir=small_disk / "run", texts=texts))

    def command() -> subprocess.CompletedProcess[str]:
        root = Path(loop.__file__).parents[1]
        return subprocess.run(
            [sys.executable, str(root / "train.py"), f"--config={file}"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(b"x" * (free - int(1.5 * size_on_disk(whole[0].folder / "checkpoints" / "12"))))
    full = command()
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr and "Exception" not in full.stderr
    assert [
        line for line in full.stderr.splitlines() if "rror:" in line or " space" in line
    ] == full.stderr.splitlines()[-1:]
    assert full.stderr.splitlines()[-1].startswith(f"error: no space left on the disk of {small_disk}/run")
    known = checkpoint.steps(small_disk / "run")
    assert known and known[-1] < 6
    for step in known:
        model.load(small_disk / "run" / "checkpoints" / str(step))
    ballast.unlink()
    after = command()
    assert after.returncode == 0, after.stderr
    assert f"resuming {small_disk}/run at step {known[-1]}" in after.stderr
    entries = [json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_times_and_a_trace_of_chosen_steps(tiny, tmp_path, monkeypatch):
    """The wait for the first batch, here a long one, is part of the start."""

    class Slow:
        """Rows whose first batch takes its time."""

        def __init__(self, rows: Any):
            self.rows, self.wait = rows, 2.0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.rows, name)

        def __next__(self) -> Any:
            time.sleep(self.wait)
            self.wait = 0.0
            return next(self.rows)

    def slow(run: Run) -> Any:
        parts = build(run)
        return dataclasses.replace(parts, train=Slow(parts.train))

    monkeypatch.setattr(loop, "build", slow)
    result = loop.train(dataclasses.replace(tiny, workdir=str(tmp_path / "traced"), steps=4, profile=(2, 3)))
    assert list(result["times"]) == list(times.PARTS) and all(x >= 0 for x in result["times"].values())
    assert 0.5 * result["seconds"] < sum(result["times"].values()) <= result["seconds"]
    assert result["times"]["start"] > 2 > result["times"]["input"]
    assert json.loads((tmp_path / "traced" / "metrics.jsonl").read_text().splitlines()[0])["input_wait"] > 2
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ConfigError, match=r"run.profile is \(3, 2\)"):
        dataclasses.replace(tiny, profile=(3, 2))


def test_a_config_that_lacks_a_newer_key_had_its_default():
    run = Run(task=NextToken(), model=ModelConfig(layers=2))
    there = json.loads(json.dumps(config.to_dict(run)))
    del there["data"]["shards"], there["profile"], there["model"]["lora_dropout"]
    assert not continuation.differences(there, run)
    other = change(run, data=dict(shards=2), model=dict(lora_dropout=0.1))
    assert continuation.differences(there, other) == [
        "data.shards is 1 there and 2 here",
        "model.lora_dropout is 0.0 there and 0.1 here",
    ]


def test_repeatable_runs_are_equal_and_go_on_in_their_mode(texts: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_REPEATABLE", "1")
    runs = [change(tiny_run(texts, tmp_path / name), steps=4, eval=dict(every=4)) for name in ("a", "b")]
    for run in runs:
        loop.train(run)
    assert lines(runs[0]) == lines(runs[1]) and params_hash(runs[0]) == params_hash(runs[1])
    assert checkpoint.read_card(runs[0].folder)["repeatable"] is True
    monkeypatch.setenv("LLM_JAX_REPEATABLE", "0")
    with pytest.raises(CheckpointError, match="was begun with LLM_JAX_REPEATABLE=1: set it, or give"):
        loop.train(runs[0])


def test_a_run_that_was_not_begun_repeatable_stays_so(copied: Run, monkeypatch: pytest.MonkeyPatch):
    assert checkpoint.read_card(copied.folder)["repeatable"] is False
    monkeypatch.setenv("LLM_JAX_REPEATABLE", "1")
    with pytest.raises(CheckpointError, match="was begun without LLM_JAX_REPEATABLE=1: unset it, or give"):
        loop.train(copied)


def test_what_is_held_out_of_several_sources_is_measured_apart(tiny: Run, texts: Path):
    """The loss of each source's own documents, at every evaluation, makes up that of all; one of weight 0 is never trained on."""
    a, b = f"text:{texts}/a/*.txt", f"text:{texts}/b/*.txt"
    found = loop.train(change(tiny, steps=6, eval=dict(batches=0)))["eval"]
    assert found["loss/" + a] != found["loss/" + b]
    alone = evaluate.evaluate_checkpoint(str(tiny.folder), (a,))  # all of its documents
    assert f"loss/{a}" not in alone
    lines = [json.loads(line) for line in (tiny.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if f"eval/loss/{a}" in line] == [6]
    assert min(found["loss/" + a], found["loss/" + b]) < found["loss"] < max(found["loss/" + a], found["loss/" + b])

    only = loop.train(change(tiny, workdir=str(tiny.folder / "only"), steps=6, data=dict(weights=(1.0, 0.0))))
    assert {"loss/" + a, "loss/" + b} <= set(only["eval"])
    with contextlib.closing(build(change(tiny, data=dict(weights=(1.0, 0.0))))) as parts:
        seen = {parts.train.record_id(int(n)) for _ in range(30) for n in np.unique(next(parts.train).ids) if n >= 0}
    assert seen and all("/a/" in name for name in seen)
