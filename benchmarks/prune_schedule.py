"""Claims: four fifths of an encoder's weights go on a schedule at one point of accuracy at most, fewer than at once, and stay gone.

    pip install -e .
    python -m benchmarks.prune_schedule [--seeds 0 1 2 | --kept]

The start is configs/snippets_minilm.py of the same seed; on a schedule it is configs/prune_fisher.py; at once it is the same run, as long, with the
weights gone before its first step by SparseGPT, the best of the scores at once. Then the pruned model is fine-tuned further, stopped and started
again on the way, and exported: the zeros are counted. Three hours on two cores; with --kept, for a change of the schedule alone, the arm at once is
taken from the results on file, and its claim states the commit and the machine that it is from.
"""

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from benchmarks import arms
from benchmarks.common import RESULTS, claim, write
from llm_jax import config, model, tree
from llm_jax.interop import huggingface
from llm_jax.loop import train
from llm_jax.transforms import prune
from llm_jax.transforms.prune import TARGETS

SPARSITY = 0.8
LAYERS = r"(bert\.)?encoder\.layer\.\d+\..*(query|key|value|dense)\.weight"
"""The same matrices in an export"""


def zeros(weights: dict[str, np.ndarray], regexes: tuple[str, ...]) -> tuple[int, int]:
    """How many of the weights whose names match are 0, and how many there are."""
    chosen = [np.asarray(x) for name, x in weights.items() if any(re.fullmatch(regex, name) for regex in regexes)]
    return sum(int((x == 0).sum()) for x in chosen), sum(x.size for x in chosen)


def of_model(folder: str) -> tuple[int, int]:
    """Zeros of a run's or a checkpoint's targets."""
    params = model.load(folder).params
    return zeros(dict(zip(tree.names(params), map(np.asarray, jax.tree.leaves(params)))), TARGETS)


def afterwards(folder: str) -> dict[str, tuple[int, int]]:
    """Zeros and weights after the run, after a further one, after that one was stopped and started again, and in an export."""
    with tempfile.TemporaryDirectory() as temporary:
        further = arms.load("snippets_minilm", start=folder, transforms=(), epochs=0.0, workdir=f"{temporary}/further")
        found = {"run": of_model(folder)}
        for name, steps in (("further", 40), ("restarted", 80)):
            train(dataclasses.replace(further, steps=steps))
            found[name] = of_model(further.workdir)
        out = Path(temporary) / "export"
        huggingface.export_model(further.workdir, out)
        found["export"] = zeros(load_file(out / "model.safetensors"), (LAYERS,))
    return found


def on_file() -> dict[str, Any]:
    """The figures of the arm at once that are on file, and the commit and machine that they are from."""
    known = json.loads((RESULTS / "prune_schedule.json").read_text(encoding="utf-8"))
    return {"commit": known["commit"], "machine": known["machine"], **known["claims"][0]["once"]}


def main():
    parser = argparse.ArgumentParser()
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    either.add_argument("--kept", action="store_true", help="take the arm at once from the results on file")
    options = parser.parse_args()
    seeds, kept = options.seeds, on_file() if options.kept else None
    starts = arms.arm("full", arms.load("snippets_minilm"), seeds)
    gradual = arms.following("prune_schedule", lambda start: arms.on("prune_fisher", start), starts)

    def at_once(start: str) -> config.Run:
        run = arms.on("prune_fisher", start)
        *others, _ = run.transforms
        return dataclasses.replace(run, transforms=(*others, prune(SPARSITY, score="sparsegpt", batches=128)))

    once = kept or arms.following("prune_once", at_once, starts)["eval"]
    dense, values = starts["eval"]["accuracy"]["values"], gradual["eval"]["accuracy"]["values"]
    lost = [a - b for a, b in zip(dense, values)]
    gain = [a - b for a, b in zip(values, once["accuracy"]["values"], strict=True)]
    counted = afterwards(gradual["folders"][0])
    exact = all(x == counted["run"] for x in counted.values())
    share = counted["run"][0] / counted["run"][1]
    detail = {"dense": starts["eval"], "schedule": gradual["eval"], "once": once}
    cost, better = statistics.fmean(lost), statistics.fmean(gain)
    write(
        "prune_schedule",
        [
            claim("accuracy lost with 80% of the layers' weights", cost, 0.01, cost <= 0.01, lost, **detail),
            claim(
                "accuracy above pruning at once, as long a run",
                better,
                0.0,
                better > 0,
                gain,
                **{name: once[name] for name in ("commit", "machine") if name in once},
            ),
            claim(
                "sparsity, the same after a further run, a restart and an export",
                share,
                SPARSITY,
                exact and abs(share - SPARSITY) < 1e-4,
                zeros=counted,
            ),
        ],
    )


if __name__ == "__main__":
    main()
