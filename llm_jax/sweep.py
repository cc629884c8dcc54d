"""The same run for several seeds: how far a result is chance."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from llm_jax.config import Run
from llm_jax.errors import ConfigError


def sweep(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """Carry out the run once a seed, in folders of its own; each held-out figure with its mean and its spread (standard deviation).

    Written to sweep.json in the run's folder. A seed that is done already is only evaluated again.

    Raises:
        UserError: a seed given twice, or whatever a run raises.
    """
    from llm_jax.loop import train

    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds {list(seeds)} must differ")
    results = [train(dataclasses.replace(run, seed=seed, workdir=str(run.folder / f"seed{seed}"))) for seed in seeds]
    found = summary(run.name, seeds, results)
    (run.folder / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def summary(name: str, seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, spread and values of each held-out figure over the results of these seeds, with their seconds and folders."""
    values = {key: [result["eval"][key] for result in results] for key in results[0]["eval"]}
    return {
        "name": name,
        "seeds": list(seeds),
        "eval": {key: {"mean": statistics.fmean(x), "spread": _spread(x), "values": x} for key, x in values.items()},
        "seconds": [result["seconds"] for result in results],
        "folders": [result["paths"]["folder"] for result in results],
    }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
