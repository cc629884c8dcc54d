"""The arms of an experiment: a config with some fields changed, carried out for several seeds, in folders that are kept.

An experiment that was interrupted goes on where it stopped when its script is started again; runs that are done are evaluated only.
"""

import dataclasses
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


def teacher(name: str = "snippets_minilm") -> dict[str, Any]:
    """The run that others start from, carried out where it is not done yet: what its result.json holds."""
    run = load(name)
    print(f"== {name}, in {run.folder}", flush=True)
    return train(run)


def arm(name: str, run: config.Run, seeds: list[int]) -> dict[str, Any]:
    """The run for these seeds: mean, spread and values of each held-out figure, seconds and folders."""
    print(f"== {name}, seeds {seeds}", flush=True)
    found = sweep(dataclasses.replace(run, workdir=str(FOLDER / name)), seeds)
    print({key: x["values"] for key, x in found["eval"].items()}, flush=True)
    return found


def claim(name: str, value: float, target: float, holds: bool, values: list[float] | None = None, **more: Any) -> dict:
    """A claim for `common.write`; its spread is the least and the greatest of the values, one a seed."""
    spread = [min(values), max(values)] if values else None
    return {
        "name": name,
        "value": value,
        "target": target,
        "holds": bool(holds),
        "seeds": len(values) if values else 1,
        "spread": spread,
        "values": values,
        **more,
    }
