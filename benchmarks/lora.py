"""Claims: factors of low rank, under 1% of the parameters, come within half a point of full fine-tuning, and forget less.

    pip install -e .
    python -m benchmarks.lora [--seeds 0 1 2]

LoRA is configs/lora_reviews.py, which SmolLM2-135M learns to classify snippets of reviews with; full fine-tuning is the same run without factors, on the
same texts. Each is taken at the best of its SETTINGS for seed 0. What each forgot is measured on text that neither was tuned on: the perplexity of
20,480 tokens of State of the Union addresses, with the language model's own head back in its place.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from benchmarks.prune_at_once import RUN as ADDRESSES
from llm_jax import config, evaluate, model, tree
from llm_jax.transforms import chain, dropout, merge_lora, new_head

SETTINGS = {
    "lora": ((5e-4, 1, 0.0), (5e-4, 2, 0.0), (5e-4, 1.5, 0.1)),
    "full": ((2e-5, 1, 0.0), (5e-5, 1, 0.0), (5e-5, 1.5, 0.0), (5e-5, 2, 0.0)),
}
"""learning rate, epochs and dropout, tried with seed 0"""


def setting(kind: str, rate: float, epochs: float, dropped: float) -> tuple[str, config.Run]:
    """The name of an arm and its run; "full" is the recipe of LoRA with all weights trained, none of them beside others.

    LoRA's dropout is before the factors, that of full fine-tuning the model's own.
    """
    run = arms.changed(arms.on("lora_reviews", dropped), epochs=epochs, optimizer={"learning_rate": rate})
    if kind == "full":
        run = dataclasses.replace(run, transforms=run.transforms[:1] + ((dropout(dropped),) if dropped else ()))
    return f"lora_reviews_{kind}_{rate:g}_{epochs:g}epochs" + (f"_dropout{dropped:g}" if dropped else ""), run


def best(kind: str, seeds: list[int]) -> tuple[dict[str, Any], dict[str, float]]:
    """The arm of a kind at its best setting, and the accuracy of all settings with the first seed."""
    tries = [setting(kind, *x) for x in SETTINGS[kind]]
    found = {name: arms.arm(name, run, seeds[:1])["eval"]["accuracy"]["mean"] for name, run in tries}
    return arms.arm(*max(tries, key=lambda x: found[x[0]]), seeds), found


def perplexity(start: str) -> float:
    """Of the addresses, by the model as a language model again."""
    tuned = model.transform(model.load(start), chain(merge_lora(), new_head("lm")), jax.random.key(0))
    return evaluate.held_out(tuned, ADDRESSES, batches=10)["perplexity"]


def forgetting(folder: str) -> float:
    """The perplexity by a run's model, kept beside it."""
    return arms.once(Path(folder) / "addresses.json", ADDRESSES, lambda: perplexity(folder))


def trained(folder: str) -> float:
    """The share of the parameters that a run with factors trained."""
    params = model.load(folder).params
    sizes = {name: x.size for name, x in zip(tree.names(params), jax.tree.leaves(params))}
    return sum(n for name, n in sizes.items() if "_lora_" in name or name.startswith("head/")) / sum(sizes.values())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    adapted, lora_tries = best("lora", seeds)
    whole, full_tries = best("full", seeds)
    kept = {
        name: [forgetting(folder) for folder in arm["folders"]] for name, arm in (("lora", adapted), ("full", whole))
    }
    kept["before"] = [perplexity("asset:smollm2")]
    print(kept, flush=True)
    shares = [trained(folder) for folder in adapted["folders"]]
    gaps = [b - a for a, b in zip(adapted["eval"]["accuracy"]["values"], whole["eval"]["accuracy"]["values"])]
    less = [b / a for a, b in zip(kept["lora"], kept["full"])]
    gap, ratio = statistics.fmean(gaps), statistics.fmean(less)
    detail = {"lora": adapted["eval"], "full": whole["eval"], "tried": lora_tries | full_tries}
    write(
        "lora",
        [
            claim("share of the parameters that LoRA trains", max(shares), 0.01, max(shares) < 0.01, shares),
            claim("accuracy below full fine-tuning", gap, 0.005, gap <= 0.005, gaps, **detail),
            claim("perplexity of other text, full fine-tuning over LoRA", ratio, 1.0, ratio > 1, less, perplexity=kept),
        ],
    )


if __name__ == "__main__":
    main()
