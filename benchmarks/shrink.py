"""Claims: with half the neurons and a third of the heads cut out, distillation brings back 97% of the accuracy, the time falls by at least 0.85 of
what the operations promise, and a shrunk language model reaches the loss of one of its size from scratch with a fifth of the tokens.

    pip install -e .
    python -m benchmarks.shrink train [--seeds 0 1 2]
    python -m benchmarks.shrink speed
    python -m benchmarks.shrink tokens [--seeds 0 1 2]

`train`: configs/prune_then_distil.py from configs/snippets_minilm.py, on 12,808 snippets split by film. `speed` wants a machine without other
work. `tokens`: the decoder of configs/quickstart.py, trained 2,000 steps, loses half its neurons and one of its four heads; it learns from what it
was for 400 steps; the model of the same size from scratch has 2,000 steps and the best of four learning rates.
"""

import argparse
import dataclasses
import statistics

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import cost, model
from llm_jax.config import Schedule
from llm_jax.transforms import distil, shrink

SNIPPETS = shrink(mlp=0.5, heads=8)
LANGUAGE = dict(mlp=0.5, heads=3)
STEPS = 2000


def train(seeds: list[int]) -> None:
    """Cut and taught."""
    teacher = arms.teacher()["eval"]["accuracy"]
    found = arms.arm("shrink", arms.load("prune_then_distil"), seeds)["eval"]
    kept = [x / teacher for x in found["accuracy"]["values"]]
    share = statistics.fmean(kept)
    what = "share of the accuracy kept with half the neurons and two thirds of the heads"
    write("shrink", [claim(what, share, 0.97, share >= 0.97, kept, teacher=teacher, after=found)])


def speed() -> None:
    """A forward pass before and after, five times."""
    before = model.sizes("runs/snippets_minilm")
    found = [cost.compare(before, SNIPPETS.config(before), (32, 64)) for _ in range(5)]
    print(found[-1])
    promised = found[0].before.flops / found[0].after.flops
    values = [x.speedup / promised for x in found]
    share = statistics.median(values)
    speedup = statistics.median(x.speedup for x in found)
    more = {"speedup": speedup, "promised": promised}
    write("shrink_speed", [claim("measured over promised speed-up", share, 0.85, share >= 0.85, values, **more)])


def tokens(seeds: list[int]) -> None:
    """Held-out loss a token of the shrunk and taught model, and of the same size from scratch with five times the tokens."""
    quick = arms.load("quickstart", steps=STEPS)
    quick = dataclasses.replace(quick, eval=dataclasses.replace(quick.eval, every=0, batches=0, prompts=()))
    whole = arms.arm("language_teacher", quick, seeds[:1])
    (folder,) = whole["folders"]
    taught = dataclasses.replace(
        quick,
        start=folder,
        model=None,
        transforms=(shrink(**LANGUAGE, by="taylor"), distil(folder, soft=0.5, task=0.5)),
        schedule=Schedule(name="linear", warmup=20, final=0.0),
        steps=STEPS // 5,
    )
    scratch = dataclasses.replace(quick, model=shrink(**LANGUAGE).config(quick.model))
    rates = {
        rate: arms.arm(f"language_scratch_{rate}", arms.changed(scratch, optimizer={"learning_rate": rate}), seeds[:1])[
            "eval"
        ]["loss"]["mean"]
        for rate in (0.0075, 0.015, 0.03, 0.06)
    }
    best = min(rates, key=rates.get)
    own = {
        rate: arms.arm(f"language_shrunk_{rate}", arms.changed(taught, optimizer={"learning_rate": rate}), seeds[:1])[
            "eval"
        ]["loss"]["mean"]
        for rate in (0.005, 0.01, 0.02)
    }
    rate = min(own, key=own.get)
    reached = arms.arm(f"language_shrunk_{rate}", arms.changed(taught, optimizer={"learning_rate": rate}), seeds)[
        "eval"
    ]["loss"]
    goal = arms.arm(f"language_scratch_{best}", arms.changed(scratch, optimizer={"learning_rate": best}), seeds)[
        "eval"
    ]["loss"]
    detail = {"teacher": whole["eval"], "scratch": goal, "rates": {"scratch": rates, "shrunk": own}}
    what = "held-out loss after a fifth of the tokens, that of the same size from scratch at most"
    holds = reached["mean"] <= goal["mean"]
    write("shrink_tokens", [claim(what, reached["mean"], goal["mean"], holds, reached["values"], **detail)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["train", "speed", "tokens"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.part == "speed":
        speed()
    else:
        {"train": train, "tokens": tokens}[options.part](options.seeds)


if __name__ == "__main__":
    main()
