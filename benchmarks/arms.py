"""The arms of an experiment: a config with some fields changed, carried out for several seeds, in folders that are kept.

An experiment that was interrupted goes on where it stopped when its script is started again; runs that are done are evaluated only.
"""

import dataclasses
import json
import runpy
import statistics
from collections.abc import Callable, Sequence
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


def arm(name: str, run: config.Run, seeds: Sequence[int]) -> dict[str, Any]:
    """The run for these seeds: mean, spread and values of each held-out figure, seconds and folders."""
    print(f"== {name}, seeds {seeds}", flush=True)
    found = sweep(dataclasses.replace(run, workdir=str(FOLDER / name)), seeds)
    print({key: x["values"] for key, x in found["eval"].items()}, flush=True)
    return found


def following(name: str, run: Callable[[str], config.Run], before: dict[str, Any]) -> dict[str, Any]:
    """An arm that goes on from another, each seed from that seed's model: `run` makes a run from the folder of the model."""
    each = [arm(name, run(folder), [seed]) for seed, folder in zip(before["seeds"], before["folders"])]
    values = {key: [x["eval"][key]["mean"] for x in each] for key in each[0]["eval"]}
    figures = {
        key: {"mean": statistics.fmean(x), "spread": statistics.stdev(x) if len(x) > 1 else 0.0, "values": x}
        for key, x in values.items()
    }
    folders, seconds = ([x[key][0] for x in each] for key in ("folders", "seconds"))
    return {"name": name, "seeds": before["seeds"], "eval": figures, "seconds": seconds, "folders": folders}


def on(name: str, model: str, **changes: Any) -> config.Run:
    """The run that configs/NAME.py makes of a model, where its `get_config` takes one, with these fields in place of its own."""
    return dataclasses.replace(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](model), **changes)
