"""A real life of six versions on two cores in under half an hour: pretrained, updated, fine-tuned, pruned, distilled, a refused candidate; its report.

    pip install -e .
    python -m benchmarks.life [--out docs/life.html]

State of the Union: a decoder is pretrained on 1790 to 1945 and promoted; `update` brings it to 2026; it is fine-tuned to BBC news with
addresses among them; half of its weights are pruned while it trains on; a student of half the layers is distilled from it; a candidate trained on
news alone, at a high rate, is gated too. Each goes through the gate of configs/suites/eras.py against what
stands then, and takes the name only where it passed; what the gate says of each is the life's own. All of it lies in runs/benchmarks/life; what is
done is not done again.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import names, saved
from llm_jax.config import Run
from llm_jax.lifecycle.gate import gate, told
from llm_jax.lifecycle.registry import RefusedError, Registry
from llm_jax.lifecycle.report import report
from llm_jax.lifecycle.suite import load_suite
from llm_jax.lifecycle.update import update
from llm_jax.loop import train
from llm_jax.transforms import distil, prune, shrink

FOLDER = arms.FOLDER / "life"
SUITE = "configs/suites/eras.py"
OLD, NEW, NEWS = "asset:sotu#date=..1945", "asset:sotu#date=1946..", "asset:bbc-news"
NAME = "production"


def made(name: str, run: Run) -> str:
    """The run's folder, the run carried out where it is not done yet."""
    run = dataclasses.replace(run, name=name, workdir=str(FOLDER / name))
    if not (run.folder / "result.json").exists():
        train(run)
    return str(run.folder)


def judged(registry: Registry, candidate: str, against: str | None = f"registry:{NAME}") -> bool:
    """Whether a candidate passed, and then took the name; the verdict is on file, and one that is there already stands."""
    made = saved.params_hash(saved.find(Path(candidate)))
    if known := [verdict for verdict in registry.gates() if verdict["candidate"] == made]:
        return known[-1]["passed"]
    verdict = gate(candidate, against, load_suite(SUITE))
    registry.record_gate(verdict)
    print(told(verdict), flush=True)
    try:
        registry.promote(NAME, candidate)
    except RefusedError as e:
        print(e, flush=True)
    return verdict["passed"]


def on(start: str, sources: tuple[str, ...], weights: tuple[float, ...], steps: int, rate: float, **changes) -> Run:
    """The recipe of an update on other sources, from another model."""
    recipe = arms.load("eras_update", start=start, steps=steps, **changes)
    data = dataclasses.replace(recipe.data, sources=sources, weights=weights)
    recipe = dataclasses.replace(recipe, data=data, eval=dataclasses.replace(recipe.eval, every=0))
    return arms.changed(recipe, optimizer={"learning_rate": rate})


def live(registry: Registry) -> dict[str, bool]:
    """The whole life; which candidates passed."""
    passed = {}
    base = arms.load("eras_base", steps=600)
    first = made("pretrained", dataclasses.replace(base, eval=dataclasses.replace(base.eval, every=0)))
    if not registry.names():
        passed["pretrained"] = judged(registry, first, None)
    changed = update(NAME, arms.load("eras_update", steps=300), OLD, NEW, SUITE, 0.5, registry)
    print(changed.outcome, changed.why, flush=True)
    passed["updated"] = changed.outcome == "promoted"
    here = registry.resolve(NAME)
    tuned = made("fine-tuned", on(str(here.path), (NEWS, OLD, NEW), (0.3, 0.4, 0.3), 120, 0.01))
    passed["fine-tuned"] = judged(registry, tuned)
    here = registry.resolve(NAME)
    both = (OLD, NEW), (0.6, 0.4)
    pruned = made("pruned", on(str(here.path), *both, 240, 0.01, transforms=(prune(0.5, schedule=(0, 120, 10)),)))
    passed["pruned"] = judged(registry, pruned)
    here = registry.resolve(NAME)
    change = (shrink(layers=(0, 3)), distil(str(here.path), soft=0.5, task=0.5))
    passed["distilled"] = judged(registry, made("distilled", on(str(here.path), *both, 240, 0.02, transforms=change)))
    here = registry.resolve(NAME)
    passed["news only"] = judged(registry, made("news-only", on(str(here.path), (NEWS, OLD), (1.0, 0.0), 120, 0.05)))
    return passed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="docs/life.html")
    out = Path(parser.parse_args().out)
    begin = time.time()
    os.environ[names.VARIABLE] = str(FOLDER / "registry")
    registry = Registry()
    fresh = not registry.folder.exists()
    passed = live(registry)
    life = report(NAME, out, registry, [FOLDER])
    minutes = (time.time() - begin) / 60
    print(f"{len(life.versions)} versions, {out}, {minutes:.1f} minutes; {json.dumps(passed)}")
    refused = [v.name for v in life.versions if v.fate == "refused"]
    if not fresh:
        print("continued: the time is not that of a whole life, and no result is written")
        return
    write(
        "life",
        [
            claim(
                "versions in the report of a life",
                len(life.versions),
                6,
                len(life.versions) >= 6,
                fates=[(v.name, v.fate) for v in life.versions],
            ),
            claim("minutes that the life took on two cores", minutes, 30, minutes < 30),
            claim("candidates that the gate refused", len(refused), 1, "news-only" in refused, names=refused),
        ],
    )


if __name__ == "__main__":
    main()
