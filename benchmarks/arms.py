"""The arms of an experiment: a config with some fields changed, carried out for several seeds, in folders that are kept.

An experiment that was interrupted goes on where it stopped when its script is started again; runs that are done are evaluated only.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llm_jax import config
from llm_jax.loop import train
from llm_jax.sweep import sweep

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = Path("runs") / "benchmarks"


def load(name: str, **changes: Any) -> config.Run:
    """The run of configs/NAME.py with these fields in place of its own."""
    return dataclasses.replace(config.load(CONFIGS / f"{name}.py"), **changes)


def changed(run: config.Run, **fields: Any) -> config.Run:
    """The run with other fields; those of optimizer and schedule are named in a dict."""
    for name in ("optimizer", "schedule"):
        if name in fields:
            fields[name] = dataclasses.replace(getattr(run, name), **fields[name])
    return dataclasses.replace(run, **fields)


def teacher(name: str = "snippets_minilm") -> dict[str, Any]:
    """The run that others start from, carried out where it is not done yet: what its result.json holds."""
    run = load(name)
    print(f"== {name}, in {run.folder}", flush=True)
    done = run.folder / "result.json"
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else train(run)


def arm(name: str, run: config.Run, seeds: list[int]) -> dict[str, Any]:
    """The run for these seeds: mean, spread and values of each held-out figure, seconds and folders."""
    print(f"== {name}, seeds {seeds}", flush=True)
    found = sweep(dataclasses.replace(run, workdir=str(FOLDER / name)), seeds)
    print({key: x["values"] for key, x in found["eval"].items()}, flush=True)
    return found
