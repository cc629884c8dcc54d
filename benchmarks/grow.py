"""Claim: a decoder grown from two layers to eight reaches the held-out loss of the eight-layer model from scratch with 70% of its operations.

    pip install -e .
    python -m benchmarks.grow [--seeds 0 1 2]

The decoder of configs/quickstart.py on State of the Union addresses. The scratch arm has 1,200 steps and the best of three learning rates. The small
model's own training counts: 500 steps of it at a constant rate, then it is stacked to eight layers (Du et al. 2024, G_stack, factor 4), and trained
for as many steps as 70% of the scratch arm's operations leave, the rate falling to zero as in the scratch arm.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax.transforms import grow_depth

SMALL, LARGE = 2, 8
STEPS, SMALL_STEPS, SHARE = 1200, 500, 0.7


def flops(arm: dict, i: int) -> float:
    """Operations of one seed's training."""
    return json.loads((Path(arm["folders"][i]) / "card.json").read_text(encoding="utf-8"))["flops"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    quick = arms.load("quickstart", steps=STEPS)
    quick = dataclasses.replace(quick, eval=dataclasses.replace(quick.eval, every=0, batches=0, prompts=()))
    large = arms.changed(quick, model=quick.model.replace(layers=LARGE))
    rates = {}
    for rate in (0.015, 0.03, 0.06):
        run = arms.changed(large, optimizer={"learning_rate": rate})
        rates[rate] = arms.arm(f"grow_scratch_{rate}", run, seeds[:1])["eval"]["loss"]["mean"]
    best = min(rates, key=rates.get)
    scratch = arms.arm(f"grow_scratch_{best}", arms.changed(large, optimizer={"learning_rate": best}), seeds)

    constant = {"name": "constant"}
    model = quick.model.replace(layers=SMALL)
    small = arms.arm("grow_small", arms.changed(quick, model=model, steps=SMALL_STEPS, schedule=constant), seeds)
    left = SHARE * flops(scratch, 0) - flops(small, 0)
    steps = int(left / (flops(scratch, 0) / STEPS))

    def grown(rate: float, seeds: list[int]) -> list[dict]:
        return [
            arms.arm(
                f"grow_grown_{rate}",
                arms.changed(
                    quick,
                    start=folder,
                    model=None,
                    steps=steps,
                    optimizer={"learning_rate": rate},
                    transforms=(grow_depth(LARGE, how="stack"),),
                ),
                [seed],
            )
            for seed, folder in zip(seeds, small["folders"])
        ]

    own = {rate: grown(rate, seeds[:1])[0]["eval"]["loss"]["mean"] for rate in (0.015, 0.03)}
    found = grown(min(own, key=own.get), seeds)
    values = [arm["eval"]["loss"]["mean"] for arm in found]
    shares = [(flops(small, i) + flops(arm, 0)) / flops(scratch, i) for i, arm in enumerate(found)]
    goal, value = scratch["eval"]["loss"], statistics.fmean(values)
    detail = {
        "operations": shares,
        "steps": {"scratch": STEPS, "small": SMALL_STEPS, "grown": steps},
        "rates": {"scratch": rates, "grown": own},
        "scratch": goal,
        "small": small["eval"]["loss"],
    }
    what = f"held-out loss with {max(shares):.2f} of the operations, that of the model from scratch at most"
    write("grow", [claim(what, value, goal["mean"], value <= goal["mean"], values, **detail)])


if __name__ == "__main__":
    main()
