"""Runs of several processes on this machine: the same losses however many there are, and all end when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax import checkpoint, processes
from llm_jax.errors import UserError

CONFIG = """
import os
import time
import jax
from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.errors import DataError
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken
from llm_jax.transforms import Transform

seen = [0]


def rows(batch, fingerprint):
    seen[0] += 1
    if jax.process_index() == 1 and seen[0] == {at}:
        {what}
    return dict(batch)


def get_config():
    return Run(
        name="run",
        model=ModelConfig(vocab_size=512, max_length=32, layers=1, dim=16, heads=2),
        transforms=(Transform(rows=rows, label="rows"),),
        task=NextToken(),
        data=Data(sources=("text:{corpus}/*.txt",), tokenizer="bpe:512", heldout=0.2, shards=2),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="constant"),
        batch=Batch(size=8, length=32),
        mesh=Mesh(data=2, fsdp=2),
        checkpoint=Checkpoint(every=4),
        eval=Eval(every=0, batches=2, prompts=("The state",)),
        steps=8,
    )
"""
PATIENCE = 15.0


@pytest.fixture
def start(corpus, tmp_path):
    """(processes, options) -> the started processes, four devices in all."""
    running = []

    def launch(count: int, *options: str, at: int = 0, what: str = "pass") -> list[subprocess.Popen]:
        config = tmp_path / "config.py"
        config.write_text(CONFIG.format(corpus=corpus, at=at, what=what))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        own = []
        for index in range(count):
            several = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            environment = {
                **os.environ,
                **(several if count > 1 else {}),
                "JAX_NUM_CPU_DEVICES": str(4 // count),
                "LLM_JAX_PATIENCE": str(PATIENCE),
            }
            command = [sys.executable, "-m", "llm_jax", "train", f"--config={config}", *options]
            with (tmp_path / f"error{index}").open("w") as error:
                own.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error))
        running.extend(own)
        return own

    yield launch
    for process in running:
        process.kill()
        process.wait()


def ends(started: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    """The exit status of each."""
    until = time.monotonic() + seconds
    return [process.wait(max(0.1, until - time.monotonic())) for process in started]


def said(tmp_path: Path, index: int) -> str:
    return (tmp_path / f"error{index}").read_text()


def lines(folder: Path) -> dict[int, float]:
    """The loss of each step."""
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in every if "loss" in line}


def until(what, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(start, tmp_path):
    """Nor where a run that four began is continued by two, and one: what they saved is whole."""
    found = {}
    for name, stages in {"one": ((1, 8),), "many": ((2, 3), (4, 6), (1, 8))}.items():
        folder = tmp_path / name
        for count, steps in stages:
            options = (f"--config.workdir={folder}", f"--config.steps={steps}")
            assert ends(start(count, *options)) == [0] * count, said(tmp_path, 0)
        found[name] = lines(folder)
    assert list(found["one"]) == list(found["many"]) == list(range(1, 9))
    assert list(found["many"].values()) == pytest.approx(list(found["one"].values()), abs=1e-5)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_one_dies_the_others_end_and_name_it(start, tmp_path, how):
    started = start(2, f"--config.workdir={tmp_path / 'run'}", "--config.steps=100000")
    until(lambda: (tmp_path / "run" / "checkpoints" / "4").is_dir())
    begin = time.monotonic()
    started[1].send_signal(how)
    assert started[0].wait(3 * PATIENCE) == processes.LOST, said(tmp_path, 0)
    assert time.monotonic() - begin < 3 * PATIENCE
    assert f"error: process 1 of 2 ({socket.gethostname()}, pid {started[1].pid})" in said(tmp_path, 0)
    assert "start the same command again" in said(tmp_path, 0)
    started[1].kill()
    last = checkpoint.steps(tmp_path / "run")[-1]
    again = start(2, f"--config.workdir={tmp_path / 'run'}", f"--config.steps={last + 2}")
    assert ends(again) == [0, 0]
    assert checkpoint.steps(tmp_path / "run")[-1] == last + 2


@pytest.mark.slow
def test_one_that_dies_in_a_save_is_named(start, tmp_path):
    """Not the checkpoint that could not be written without it, nor with the status of a mistake: it is to be started again."""
    dies = "from jax.experimental import multihost_utils as m; m.broadcast_one_to_all = lambda *_, **__: os.kill(os.getpid(), 9)"
    started = start(2, f"--config.workdir={tmp_path / 'run'}", at=1, what=dies)
    assert ends(started) == [processes.LOST, -signal.SIGKILL], said(tmp_path, 0)
    assert f"error: process 1 of 2 ({socket.gethostname()}, pid {started[1].pid})" in said(tmp_path, 0)


@pytest.mark.slow
def test_one_that_does_not_come_is_waited_for_no_longer_than_told(start, tmp_path):
    started = start(2, f"--config.workdir={tmp_path / 'run'}")
    started[1].kill()
    assert started[0].wait(6 * PATIENCE) == processes.LOST
    assert "process 0 of 2 has waited 45 s for the others to come" in said(tmp_path, 0)


@pytest.mark.slow
def test_one_that_hangs_is_named(start, tmp_path):
    started = start(2, f"--config.workdir={tmp_path / 'run'}", at=3, what="time.sleep(1000)")
    assert ends(started) == [processes.LOST] * 2
    for index in range(2):
        assert "process 1 of 2" in said(tmp_path, index) and "has not begun step 3" in said(tmp_path, index)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [("DataError", 2), ("RuntimeError", 1)])
def test_one_that_fails_is_named(start, tmp_path, error, status):
    started = start(2, f"--config.workdir={tmp_path / 'run'}", at=3, what=f"raise {error}('no such file')")
    assert ends(started) == [processes.LOST, status]
    assert "failed: no such file" in said(tmp_path, 0) and "rror: no such file" in said(tmp_path, 1)
    assert ("Traceback" in said(tmp_path, 1)) == (status == 1)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_ends(start, tmp_path, count):
    folder = tmp_path / "run"
    options = (f"--config.workdir={folder}", "--config.checkpoint.every=100000", "--config.steps=100000")
    started = start(count, *options)
    until(lambda: (folder / "metrics.jsonl").is_file() and len(lines(folder)) > 2)
    started[-1].terminate()
    assert ends(started) == [processes.STOPPED] * count
    (saved,) = checkpoint.steps(folder)
    assert f"told to stop: step {saved} is saved" in said(tmp_path, 0) and "Traceback" not in said(tmp_path, 0)
    assert ends(start(count, *options[:2], f"--config.steps={saved + 1}")) == [0] * count
    assert list(lines(folder))[-2:] == [saved, saved + 1]


def test_patience_must_be_a_number(monkeypatch):
    monkeypatch.setenv("LLM_JAX_PATIENCE", "soon")
    with pytest.raises(UserError, match="LLM_JAX_PATIENCE is 'soon': it must be a number of seconds above 0"):
        processes.patience()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_what_the_environment_tells(monkeypatch, environment, expected):
    for name in ("JAX_COORDINATOR_ADDRESS", *environment):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._several() is expected
