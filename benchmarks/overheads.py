"""Claims: saving every 50 steps adds 5% to the quickstart's steps at most; waiting for rows takes less than 1% of their time.

    python -m benchmarks.overheads [--runs 3] [--saves 8] [--dry]

The quickstart's model, optimizer and rows, nothing held out. A save is judged by the steps around it, since the speed of a machine drifts between
runs by more than a save costs: what it holds the loop up, and by how much the ten steps after it, in which it is written in the background, take
longer than as many of the steps before and after those. The median of all saves; of the loop's waits the mean, with the last one, which is waited
for. Wants a machine without other work; `--dry` writes no result.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax.config import Checkpoint, Eval
from llm_jax.loop import train

EVERY = 50
"""Steps between saves"""

BESIDE = 10
"""Steps after a save that may be slower for it"""

AROUND = 15
"""Steps before the save, and after those, that are compared with"""


def timed(steps: int, every: int) -> tuple[dict[str, float], dict[int, float]]:
    """Seconds by part of the quickstart's first steps with a save every so many, and seconds by step."""
    run = arms.load("quickstart", steps=steps, eval=Eval(every=0), checkpoint=Checkpoint(every=every), log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(run, workdir=folder, data=dataclasses.replace(run.data, heldout=0.0))
        parts = train(run)["times"]
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return parts, {row["step"]: row["seconds"] for row in rows if "seconds" in row}


def slowed(seconds: dict[int, float], save: int) -> float:
    """By how many seconds the steps beside the writing of a save take longer than those around them."""
    after = save + 1 + BESIDE
    beside = [seconds[i] for i in range(save + 1, after)]
    around = [seconds[i] for i in (*range(save - AROUND + 1, save + 1), *range(after, after + AROUND))]
    return sum(beside) - BESIDE * statistics.mean(around)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    steps = given.saves * EVERY + BESIDE + AROUND + 1
    added, waited = [], []
    timed(2, 1)  # what is compiled and imported for a process's first save is none of a later one's cost
    for _ in range(given.runs):
        parts, seconds = timed(steps, EVERY)
        held = parts["checkpoint"] / (given.saves + 1)
        step = (parts["input"] + parts["step"]) / (steps - 1)
        found = [slowed(seconds, i * EVERY) for i in range(1, given.saves + 1)]
        added += [(held + x) / (EVERY * step) for x in found]
        waited.append(parts["input"] / (parts["input"] + parts["step"]))
        told = " ".join(f"{x:.2f}" for x in found)
        print(f"a step {step:.4f} s; a save holds the loop up for {held:.3f} s and slows steps by {told} s", flush=True)
    value, wait = statistics.median(added), statistics.median(waited)
    print(f"saves add {value:.4f} ({min(added):.4f} to {max(added):.4f}), rows are waited for {wait:.5f} of the time")
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
