"""Claim: a run killed at 50 random moments, one process of two at times, has bit for bit the losses and samples of an uninterrupted one.

    python -m benchmarks.resume [--kills 35] [--kills-of-two 15] [--steps 1000]

Packing, mixing of two sources, dropout, accumulation and a moving average are on. Each kill is SIGKILL at a random moment, by even chances of
a process's start or of a stretch of its steps, where a save is often under way; then the same command goes on. Of two processes, one by chance
is killed, and the other has to end by itself. Compared are loss, gradient norm and sample digest of every step, the held-out losses, and the
hashes of the last weights and of the rest of the state. After each kill the newest checkpoint must be there still, or a newer one. Runs of one
process and of two go on beside each other.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import write
from llm_jax import checkpoint
from llm_jax.checkpoint import find, read_card
from llm_jax.config import Data
from llm_jax.data.documents import open_sources
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer

PATIENCE = 10.0
"""Seconds after which a process gives another one up"""
HUNG = 120.0
"""Seconds after which a process that has not ended hangs"""
COMPARED = ("step", "loss", "grad_norm", "samples", "eval/loss")

CONFIG = """
from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config():
    return Run(
        name="resume", model=ModelConfig(vocab_size=512, max_length=64, layers=1, dim=32, heads=2, dropout=0.1), task=NextToken(),
        data=Data(sources={sources!r}, weights=(2.0, 1.0), tokenizer={tokenizer!r}, heldout=0.02, window=64),
        optimizer=Optimizer(name="adamw", moving_average=0.9), schedule=Schedule(warmup=5), steps={steps},
        batch=Batch(size=4, length=64, accumulate=2), checkpoint=Checkpoint(every=7, keep=3), eval=Eval(every=40, batches=4))
"""


def start(config: Path, folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """The run as a user starts it, in so many processes of one device each."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "JAX_NUM_CPU_DEVICES": "1",
        "LLM_JAX_PATIENCE": str(PATIENCE),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(count):
        met = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(root / "train.py"), f"--config={config}", f"--config.workdir={folder}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                text=True,
                env={**environment, **(met if count > 1 else {})},
            )
        )
    return started


def await_end(started: list[subprocess.Popen[str]]) -> list[int]:
    """The exit status of each.

    Raises:
        SystemExit: one hangs.
    """
    try:
        return [process.wait(HUNG) for process in started]
    except subprocess.TimeoutExpired:
        raise SystemExit(f"a process has not ended {HUNG:.0f} s after another was killed") from None
    finally:
        for process in started:
            process.kill()


def finish(config: Path, folder: Path, count: int) -> None:
    """Run to the end."""
    started = start(config, folder, count)
    _, said = started[0].communicate()
    if any(statuses := await_end(started)):
        raise SystemExit(f"the run ended with status {statuses}:\n{said[-2000:]}")


def entries(folder: Path) -> list[dict]:
    """What metrics.jsonl holds."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compared(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """What is compared of two runs."""
    told = [{name: entry[name] for name in COMPARED if name in entry} for entry in entries(folder)]
    return told, read_card(find(folder))["hashes"]


def kill(
    config: Path, folder: Path, count: int, startup: float, stretch: float, rng: random.Random
) -> tuple[float, str] | None:
    """Start the run and kill one of its processes, by even chances before the first step or within a stretch of steps.

    Returns the seconds to the first step and what the kill met; None if the run ended before.

    Raises:
        SystemExit: the others hang, or a checkpoint is lost.
    """
    moment, met, victim = rng.uniform(0, startup), "start", rng.randrange(count)
    begin = time.monotonic()
    started = start(config, folder, count)
    if startup and rng.random() < 0.5:
        time.sleep(moment)
    else:
        assert started[0].stderr is not None
        while "parameters on" not in started[0].stderr.readline() and started[0].poll() is None:
            pass  # that is the last that it says before the first step
        size = (folder / "metrics.jsonl").stat().st_size
        while (folder / "metrics.jsonl").stat().st_size == size and started[0].poll() is None:
            time.sleep(0.01)
        startup, met = time.monotonic() - begin, "steps"
        time.sleep(rng.uniform(0, stretch))
    ended = started[victim].poll() is not None
    before = checkpoint.steps(folder)
    started[victim].kill()
    saving = any((folder / "checkpoints").glob("*orbax-checkpoint-tmp*"))
    if started[0].stderr is not None:
        threading.Thread(target=started[0].stderr.read, daemon=True).start()  # what it says must not fill the pipe
    await_end(started)
    after = checkpoint.steps(folder)
    if before and not (after and after[-1] >= before[-1]):
        raise SystemExit(f"checkpoint {before[-1]} is lost: {after} is left")
    return None if ended else (startup, "save" if saving else met)


def measure(
    sources: tuple[str, ...], tokenizer: Tokenizer, kills: int, steps: int, seed: int, count: int = 1
) -> dict[str, Any]:
    """The claim for a run of so many processes over two sources: its value is the number of kills after which nothing differed."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tokenizer.save(root / "tokenizer.json")
        config = root / "resume.py"
        config.write_text(CONFIG.format(steps=steps, sources=sources, tokenizer=str(root / "tokenizer.json")))
        finish(config, root / "whole", count)
        training = sum(entry.get("seconds", 0.0) for entry in entries(root / "whole")[1:])
        startup, met = 0.0, []
        for _ in range(kills):
            found = kill(config, root / "killed", count, startup, 2 * training / kills, rng)
            if found is None:
                break
            startup = found[0]
            met.append((found[1], max((entry["step"] for entry in entries(root / "killed")), default=0)))
        finish(config, root / "killed", count)
        same = compared(root / "whole") == compared(root / "killed")
    print(f"{training:.0f} s of steps, {startup:.1f} s to the first; what the kills met, at the step: {met}")
    return {
        "name": "SIGKILLs after which losses, samples and weights equal the uninterrupted run's bit for bit"
        + (f", each of one process of {count}" if count > 1 else ""),
        "value": len(met) if same else 0,
        "target": kills,
        "holds": same and len(met) == kills,
        "kills": met,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=35)
    parser.add_argument("--kills-of-two", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources = ("asset:sotu", "asset:bbc-news")
    tokenizer = load_tokenizer(
        "bpe:512", [record["text"] for record in list(open_sources(Data(sources=sources[:1]))[0])[:20]]
    )
    with ThreadPoolExecutor(2) as both:  # what takes time is in other processes
        one = both.submit(measure, sources, tokenizer, options.kills, options.steps, options.seed)
        two = both.submit(measure, sources, tokenizer, options.kills_of_two, options.steps // 2, options.seed, count=2)
        write("resume", [one.result(), two.result()])


if __name__ == "__main__":
    main()
