"""Claims: four fifths of an encoder's weights go in rounds at one point of accuracy at most, fewer than at once, and stay gone.

    pip install -e .
    python -m benchmarks.prune_schedule [--seeds 0 1 2]

The start is configs/snippets_minilm.py of the same seed, the rounds are those of configs/prune_rounds.py; at once it is one run as long as all of
them, with all the weights gone before its first step. Then the pruned model is fine-tuned further, stopped and started again on the way, and
exported: the zeros are counted. Seeds that stand in the result of the same configs are not run again.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import runpy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from benchmarks import arms
from benchmarks.common import RESULTS, claim, write
from llm_jax import model, tree
from llm_jax.card import code_version
from llm_jax.interop import huggingface
from llm_jax.loop import train
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


def recipe() -> str:
    """A digest of the configs that the figures are of."""
    files = [arms.CONFIGS / f"{name}.py" for name in ("snippets_minilm", "prune_rounds")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def one_seed(seed: int) -> dict[str, Any]:
    """The accuracies of a seed, and the zeros of its pruned model by what was done to it."""
    made = runpy.run_path(str(arms.CONFIGS / "prune_rounds.py"))
    dense = arms.arm("full", arms.load("snippets_minilm"), [seed])
    teacher = dense["folders"][0]
    start, rounds = teacher, []
    for sparsity, epochs in made["ROUNDS"]:
        rounds.append(arms.arm(f"rounds_{sparsity}", made["get_config"](start, teacher, sparsity, epochs), [seed]))
        start = rounds[-1]["folders"][0]
    length = sum(epochs for _, epochs in made["ROUNDS"])
    once = arms.arm("prune_once", made["get_config"](teacher, teacher, SPARSITY, length), [seed])
    found = {"dense": dense, "once": once, **{f"round {i}": x for i, x in enumerate(rounds, 1)}, "rounds": rounds[-1]}
    return {
        **{name: x["eval"]["accuracy"]["values"][0] for name, x in found.items()},
        "zeros": afterwards(start),
        "commit": code_version(),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds, file = parser.parse_args().seeds, RESULTS / "prune_schedule.json"
    before = json.loads(file.read_text(encoding="utf-8"))["claims"][0] if file.exists() else {}
    known = before.get("by_seed", {}) if before.get("recipe") == recipe() else {}
    for seed in seeds:
        if str(seed) not in known:
            known[str(seed)] = one_seed(seed)
            report(dict(sorted(known.items())))


def report(by_seed: dict[str, dict[str, Any]]) -> None:
    """Write the claims of the seeds that are known."""
    each = list(by_seed.values())
    lost = [x["dense"] - x["rounds"] for x in each]
    gain = [x["rounds"] - x["once"] for x in each]
    shares = [x["zeros"]["run"][0] / x["zeros"]["run"][1] for x in each]
    exact = all(tuple(count) == tuple(x["zeros"]["run"]) for x in each for count in x["zeros"].values())
    cost, better = statistics.fmean(lost), statistics.fmean(gain)
    known = {"by_seed": by_seed, "recipe": recipe()}
    write(
        "prune_schedule",
        [
            claim("accuracy lost with 80% of the layers' weights", cost, 0.01, cost <= 0.01, lost, **known),
            claim("accuracy above pruning at once, as long a run", better, 0.0, better > 0, gain),
            claim(
                "sparsity, the same after a further run, a restart and an export",
                statistics.fmean(shares),
                SPARSITY,
                exact and all(abs(share - SPARSITY) < 1e-4 for share in shares),
                shares,
            ),
        ],
    )


if __name__ == "__main__":
    main()
