"""The arms of an experiment: a config with some fields changed, carried out for several seeds, in folders that are kept.

An experiment that was interrupted goes on where it stopped when its script is started again; runs that are
done are read where the code is the same, and evaluated again where it is another.
"""

import dataclasses
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_jax import config
from llm_jax.card import code_version
from llm_jax.loop import train
from llm_jax.sweep import summary

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = Path("runs") / "benchmarks"


def load(name: str, **changes: Any) -> config.Run:
    """The run of configs/NAME.py with these fields in place of its own."""
    return dataclasses.replace(config.load(CONFIGS / f"{name}.py"), **changes)


def changed(run: config.Run, **fields: Any) -> config.Run:
    """The run with other fields; those of optimizer, schedule and batch are named in a dict."""
    for name in ("optimizer", "schedule", "batch"):
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
    found = summary(name, seeds, [_done(run, FOLDER / name / f"seed{seed}", seed) for seed in seeds])
    print({key: x["values"] for key, x in found["eval"].items()}, flush=True)
    return found


def following(name: str, run: Callable[[str], config.Run], before: dict[str, Any]) -> dict[str, Any]:
    """An arm that goes on from another, each seed from that seed's model: `run` makes a run from the folder of the model."""
    runs = [(run(folder), seed) for seed, folder in zip(before["seeds"], before["folders"])]
    return summary(name, before["seeds"], [_done(x, FOLDER / name / f"seed{seed}", seed) for x, seed in runs])


def _done(run: config.Run, folder: Path, seed: int) -> dict[str, Any]:
    """What result.json of the run holds."""
    run = dataclasses.replace(run, seed=seed, workdir=str(folder))
    return once(folder / "arm.json", run, lambda: train(run))


def once(path: Path, run: config.Run, result: Callable[[], Any]) -> Any:
    """The result of a run, of which this file is kept; read from it where this very config and this code made it before."""
    made_by = {"config": json.loads(json.dumps(config.to_dict(run))), "code": code_version()}
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))) == {
        **made_by,
        "result": kept["result"],
    }:
        return kept["result"]
    made = result()
    path.write_text(json.dumps({**made_by, "result": made}, indent=1), encoding="utf-8")
    return made


def on(name: str, argument: Any, **changes: Any) -> config.Run:
    """The run that configs/NAME.py makes of a model, or of what else its `get_config` takes, with these fields in place of its own."""
    return dataclasses.replace(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](argument), **changes)
