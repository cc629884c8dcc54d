"""Claims: saving every 50 steps adds 5% to the quickstart's steps at most; waiting for rows takes less than 1% of their time.

    python -m benchmarks.overheads [--pairs 5] [--saves 4] [--dry]

The quickstart's model, optimizer and rows, nothing held out. Two runs a pair, one with a save every 50 steps and one without, in changing
order; both save once at the end, 25 steps after the last of the others, so that this save is no part of the difference. In it is what a save
holds the loop up, and what writing in the background takes from the steps beside it. Wants a machine without other work; `--dry` writes no result.
"""

import argparse
import dataclasses
import statistics
import tempfile

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax.config import Checkpoint, Eval
from llm_jax.loop import train

EVERY = 50
"""Steps between saves"""


def times(steps: int, every: int) -> dict[str, float]:
    """Seconds by part of the quickstart's first steps with a save every so many."""
    run = arms.load("quickstart", steps=steps, eval=Eval(every=0), checkpoint=Checkpoint(every=every))
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(run, workdir=folder, data=dataclasses.replace(run.data, heldout=0.0))
        return train(run)["times"]


def looped(parts: dict[str, float]) -> float:
    """Seconds of the loop after its first step."""
    return parts["input"] + parts["step"] + parts["checkpoint"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    steps = given.saves * EVERY + EVERY // 2
    added, waited = [], []
    times(2, 1)  # what is compiled and imported for a process's first save is none of a later one's cost
    for i in range(given.pairs):
        found = {every: times(steps, every) for every in (EVERY, steps)[:: 1 if i % 2 else -1]}
        plain = (found[steps]["input"] + found[steps]["step"]) / (steps - 1)
        save = (looped(found[EVERY]) - looped(found[steps])) / given.saves
        added.append(save / (EVERY * plain))
        waited += [x["input"] / (x["input"] + x["step"]) for x in found.values()]
        print(f"a step {plain:.4f} s, a save {save:.3f} s, {added[-1]:.4f} of its steps; {found}", flush=True)
    value, wait = statistics.median(added), statistics.median(waited)
    print(f"saves add {value:.4f}, rows are waited for {wait:.5f} of the time")
    if given.dry:
        return
    write(
        "overheads",
        [
            claim(f"a save every {EVERY} steps, in parts of those steps' time", value, 0.05, value <= 0.05, added),
            claim("waiting for rows, in parts of the steps' time", wait, 0.01, wait < 0.01, waited),
        ],
    )


if __name__ == "__main__":
    main()
