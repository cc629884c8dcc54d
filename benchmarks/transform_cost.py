"""Claims: pruning adds 2% to a step at most; a step of distillation costs at most 1.15 of the teacher's forward pass and the student's step.

    pip install -e .
    python -m benchmarks.transform_cost [--processes 16] [--repeats 50]

MiniLM (22.7M parameters) and half of it, 4 rows of 64 tokens, AdamW. Single steps take turns in one process, beginning with another one each time;
a process has the median of the ratios to the plain step of the same turn. On a schedule most updates choose nothing; those that choose what goes
take longer, and count for as many as there are: every 20th by magnitude and by Fisher, as configs/prune_magnitude.py and prune_fisher.py have it,
every 100th by movement, the most often that Zhu & Gupta (2017) advise. So that enough are timed, every fifth chooses here. Where in memory a
step's arrays lie, which each process finds anew, changes its time by half a percent either way, so that the figure is the mean over processes, one
after another. A second plain step tells how far the noise goes. The sums of movement are read and written with each update, and straight through a
mask is read, whatever the rows, so that these are measured over 8 rows (as in configs/prune_fisher.py) and 32 too, with fewer turns. That the memory
of distillation does not grow with tokens x vocabulary is tested in tests/transforms/test_distil.py. The teacher, configs/snippets_minilm.py, is
trained first where it is not there. Wants a machine without other work: an hour and ten minutes.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import parts as run_parts
from llm_jax.models import transformer
from llm_jax.platform import compiler_options, setup
from llm_jax.transforms import distil, new_head, prune, shrink

ROWS = {4: 1, 8: 2, 32: 5}
"""Rows of a step, each with how much fewer turns"""
CHOOSES, WARM = 5, 2
SCHEDULE = (WARM, WARM + 10_000 * CHOOSES, CHOOSES)
WAYS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "a second plain one": (),
    "keeping pruned weights": (prune(0.8),),
    "pruning on a schedule, by magnitude": (prune(0.8, schedule=SCHEDULE),),
    "pruning on a schedule, by fisher": (prune(0.8, score="fisher", schedule=SCHEDULE),),
    "by movement": (prune(0.8, score="movement", schedule=SCHEDULE),),
    "straight through": (prune(0.8, score="movement", schedule=SCHEDULE, straight_through=True),),
}
EVERY = {
    "pruning on a schedule, by magnitude": 20,
    "pruning on a schedule, by fisher": 20,
    "by movement": 100,
    "straight through": 100,
}
"""How many updates there are to one that chooses"""
FEW = ("plain", "a second plain one", "by movement", "straight through")
Times = dict[str, list[float]]
Timed = Callable[[], float]


def timed(function: Callable[[], Any]) -> Timed:
    """Seconds of a call, which has been called before."""

    def turn() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - begin

    for _ in range(WARM):
        turn()
    return turn


def step_of(folder: str, name: str, transforms: tuple[Any, ...], rows: int = 4) -> Timed:
    """A step of the run with these transforms."""
    workdir = f"{folder}/{name}"
    run = arms.load("snippets_minilm", transforms=transforms, workdir=workdir, epochs=0.0, steps=100_000)
    parts = run_parts.build(arms.changed(run, batch=dict(size=rows)))
    held, batch = [parts.init()[0]], jax.device_put(next(parts.train).batch)
    parts.close()

    def one() -> Any:
        held[0], metrics = parts.step(held[0], batch)
        return held[0].params, metrics

    return timed(one)


def forward(folder: str) -> Timed:
    """A forward pass of the teacher over 4 rows."""
    parts = run_parts.build(arms.load("snippets_minilm", workdir=f"{folder}/forward"))
    params, batch = parts.init()[0].params, jax.device_put(next(parts.train).batch)
    parts.close()
    read = jax.jit(
        lambda params, batch: transformer.apply(parts.model, params, batch, hidden_states=True),
        compiler_options=compiler_options(),
    )
    return timed(lambda: read(params, batch))


def in_turn(makers: dict[str, Callable[[], Timed]], first: int, repeats: int) -> Times:
    """The seconds of each one, in turns that go forth and back and begin with another one each time; they are made from the `first` on."""
    names = list(makers)[first % len(makers) :] + list(makers)[: first % len(makers)]
    turns = {name: makers[name]() for name in names}
    times: Times = {name: [] for name in makers}
    for i in range(repeats):
        begin = i % len(names)
        for name in (names[begin:] + names[:begin])[:: 1 if i % 2 else -1]:
            times[name].append(turns[name]())
    return times


def pruning(process: int, rows: int, repeats: int) -> Times:
    """The steps of a process over so many rows, plain and pruned."""
    setup()
    head = new_head("classification", labels=2)
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            name: functools.partial(step_of, folder, name, (head, *WAYS[name]), rows)
            for name in (WAYS if rows == min(ROWS) else FEW)
        }
        return in_turn(makers, process, repeats)


def distilling(process: int, teacher: str, repeats: int) -> Times:
    """The student's step in a process, with and without its teacher, and the teacher's forward pass."""
    setup()
    student = new_head("classification", labels=2), shrink(layers=(0, 2, 4))
    taught = distil(teacher, temperature=2.0, soft=0.5, task=0.5, cosine=0.5)
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "student": functools.partial(step_of, folder, "student", student),
            "distil": functools.partial(step_of, folder, "distil", (*student, taught)),
            "teacher": functools.partial(forward, folder),
        }
        return in_turn(makers, process, repeats)


def over(seconds: Times, name: str, *by: str) -> float:
    """The median of the ratios of one to the sum of others in the same turn."""
    return statistics.median(a / sum(b) for a, *b in zip(seconds[name], *(seconds[x] for x in by)))


def parted(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Those of the turns whose updates choose nothing on a schedule, and of the others."""
    return [x for i, x in enumerate(values, 1) if i % CHOOSES], list(values[CHOOSES - 1 :: CHOOSES])


def parted_medians(each: list[Times], name: str) -> tuple[float, float]:
    """The seconds of an update that chooses nothing and of one that does, over all processes."""
    others, choosing = zip(*(parted(seconds[name]) for seconds in each))
    return statistics.median(itertools.chain(*others)), statistics.median(itertools.chain(*choosing))


def pruned_over(seconds: Times, name: str) -> float:
    """The ratio of a pruned step to a plain one, in the mean over updates that choose and others."""
    ratios = [a / b for a, b in zip(seconds[name], seconds["plain"])]
    if name not in EVERY:
        return statistics.median(ratios)
    others, choosing = (statistics.median(x) for x in parted(ratios))
    return others + (choosing - others) / EVERY[name]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=50)
    asked = parser.parse_args()
    teacher = arms.teacher()["paths"]["folder"]
    pruned: dict[int, list[Times]] = {rows: [] for rows in ROWS}
    distilled: list[Times] = []
    # a new process for each: an array's place in memory is its chance
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for process in range(asked.processes):
            for rows, fewer in ROWS.items():
                turns = CHOOSES * math.ceil(asked.repeats / fewer / CHOOSES)
                seconds = pool.submit(pruning, process, rows, turns).result()
                pruned[rows].append(seconds)
                print(process, rows, {name: round(pruned_over(seconds, name), 4) for name in seconds}, flush=True)
            distilled.append(pool.submit(distilling, process, teacher, asked.repeats).result())

    claims = []
    for rows, each in pruned.items():
        for name in list(each[0])[1:]:
            ratios = [pruned_over(seconds, name) for seconds in each]
            value = statistics.mean(ratios)
            error = statistics.stdev(ratios) / math.sqrt(len(ratios))
            title = f"a step of {rows} rows, {name}" + (f", choosing every {EVERY[name]}" if name in EVERY else "")
            claims.append(claim(title, value, 1.02, value <= 1.02, ratios, standard_error=error))
    ratios = [over(seconds, "distil", "student", "teacher") for seconds in distilled]
    value = statistics.mean(ratios)
    claims.append(claim("a distillation step over forward and step", value, 1.15, value <= 1.15, ratios))
    medians = {
        rows: {name: parted_medians(each, name) for name in each[0]} for rows, each in {**pruned, 0: distilled}.items()
    }
    claims[0]["seconds"] = {rows: {name: others for name, (others, _) in of.items()} for rows, of in medians.items()}
    claims[0]["seconds of choosing"] = {
        rows: {name: choosing - others for name, (others, choosing) in of.items() if name in EVERY}
        for rows, of in medians.items()
        if rows
    }
    write("transform_cost", claims)


if __name__ == "__main__":
    main()
