"""Claim: a decoder grown from two layers to eight reaches the held-out loss of the eight-layer model from scratch with 70% of its operations.

    pip install -e .
    python -m benchmarks.grow [--seeds 0 1 2]

The decoder of configs/quickstart.py on State of the Union addresses. The scratch arm has 1,200 steps and the best of four learning rates. The small
model's own training counts: 500 to 1,400 steps of it at a constant rate, the best of the scratch arm, then it is stacked to eight layers (Du et al. 2024,
G_stack, factor 4), and trained for as many steps as 70% of the scratch arm's operations leave, the rate falling to zero as in the scratch arm. The
small model's steps and the rate afterwards are chosen by the first seed, as the scratch arm's rate is. Beside it stands the small model that was
never grown and had as many operations, at the better of two rates falling to zero.
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
STEPS, SHARE = 1200, 0.7
SMALL_STEPS = (500, 800, 1100, 1400)
RATES = (0.0075, 0.015, 0.03, 0.06)


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

    def scratched(rate: float, seeds: list[int]) -> dict:
        return arms.arm(f"grow_scratch_{rate}", arms.changed(large, optimizer={"learning_rate": rate}), seeds)

    rates = {rate: scratched(rate, seeds[:1])["eval"]["loss"]["mean"] for rate in RATES}
    best = min(rates, key=rates.get)
    scratch = scratched(best, seeds)
    whole = flops(scratch, 0)

    def small_arm(steps: int, seeds: list[int]) -> dict:
        changes = {"model": quick.model.replace(layers=SMALL), "steps": steps, "schedule": {"name": "constant"}}
        return arms.arm(f"grow_small_{steps}", arms.changed(quick, optimizer={"learning_rate": best}, **changes), seeds)

    def grown(small: dict, steps: int, rate: float) -> dict:
        run = dataclasses.replace(quick, model=None, transforms=(grow_depth(LARGE, how="stack"),))
        run = arms.changed(run, optimizer={"learning_rate": rate}, steps=left(small))
        return arms.following(f"grow_grown_{steps}_{rate}", lambda start: dataclasses.replace(run, start=start), small)

    def left(small: dict) -> int:
        return int((SHARE * whole - flops(small, 0)) / (whole / STEPS))

    tried = {
        f"{steps} {rate}": (steps, rate, grown(small_arm(steps, seeds[:1]), steps, rate)["eval"]["loss"]["mean"])
        for steps in SMALL_STEPS
        for rate in RATES[:3]
    }
    small_steps, rate, _ = min(tried.values(), key=lambda x: x[-1])
    small = small_arm(small_steps, seeds)
    found = grown(small, small_steps, rate)
    values = found["eval"]["loss"]["values"]
    shares = [(flops(small, i) + flops(found, i)) / flops(scratch, i) for i in range(len(seeds))]
    alone_steps = int(SHARE * whole / (flops(small, 0) / small_steps))
    alone = {
        rate: arms.arm(
            f"grow_alone_{rate}",
            arms.changed(
                quick,
                model=quick.model.replace(layers=SMALL),
                steps=alone_steps,
                optimizer={"learning_rate": rate},
            ),
            seeds[:1],
        )["eval"]["loss"]["mean"]
        for rate in RATES[1:3]
    }
    goal, value = scratch["eval"]["loss"], statistics.fmean(values)
    detail = {
        "operations": shares,
        "steps": {"scratch": STEPS, "small": small_steps, "grown": left(small), "alone": alone_steps},
        "rates": {"scratch": rates, "grown": {name: loss for name, (_, _, loss) in tried.items()}, "alone": alone},
        "scratch": goal,
        "small": small["eval"]["loss"],
    }
    what = f"held-out loss with {max(shares):.2f} of the operations, that of the model from scratch at most"
    write("grow", [claim(what, value, goal["mean"], value <= goal["mean"], values, **detail)])


if __name__ == "__main__":
    main()
