"""Claims: pruning adds 2% to a step at most; a step of distillation costs at most 1.15 of the teacher's forward pass and the student's step.

    pip install -e .
    python -m benchmarks.transform_cost [--repeats 100]

MiniLM (22.7M parameters) and half of it, 4 rows of 64 tokens, AdamW. Single steps take turns in one process, beginning with another one each time;
medians of the ratios to the plain step of the same turn. Where in memory a step's arrays lie changes its time by half a percent either way, so that
each step is built three times, in another order each time, and a turn counts the mean of the three; a process has a chance of its own besides. A
second plain step tells how far the noise goes. The sums of movement are read and written with each update, and straight through a mask is read,
whatever the rows, so that these are measured over 8 rows (as in configs/prune_fisher.py) and 32 too, 32 with a quarter of the turns. That the memory
of distillation does not grow with tokens x vocabulary is tested in tests/transforms/test_distil.py. The teacher, configs/snippets_minilm.py, is
trained first where it is not there. Wants a machine without other work: half an hour.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import parts as run_parts
from llm_jax.models import transformer
from llm_jax.platform import compiler_options, setup
from llm_jax.transforms import distil, new_head, prune, shrink

ROWS, MORE = 4, {8: 1, 32: 4}
"""Rows of a step, and of more with how much fewer turns"""
COPIES = 3
Timed = Callable[[], float]


def timed(function: Callable[[], Any]) -> Timed:
    """Seconds of a call, which has been called before."""

    def turn() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - begin

    for _ in range(2):
        turn()
    return turn


def step_of(name: str, folder: Path, transforms: tuple[Any, ...], rows: int = ROWS) -> Timed:
    """A step of the run with these transforms."""
    run = arms.load("snippets_minilm", transforms=transforms, workdir=str(folder / name), epochs=0.0, steps=100_000)
    parts = run_parts.build(arms.changed(run, batch=dict(size=rows)))
    held, batch = [parts.init()[0]], jax.device_put(next(parts.train).batch)
    parts.close()

    def one() -> Any:
        held[0], metrics = parts.step(held[0], batch)
        return held[0].params, metrics

    return timed(one)


def forward(folder: Path) -> Timed:
    """A forward pass of the teacher over the same rows."""
    parts = run_parts.build(arms.load("snippets_minilm", workdir=str(folder / "forward")))
    params, batch = parts.init()[0].params, jax.device_put(next(parts.train).batch)
    parts.close()
    read = jax.jit(
        lambda params, batch: transformer.apply(parts.model, params, batch, hidden_states=True),
        compiler_options=compiler_options(),
    )
    return timed(lambda: read(params, batch))


def in_turn(makers: dict[str, Callable[[], Timed]], repeats: int) -> dict[str, list[float]]:
    """The mean seconds of each one's copies, in turns that go forth and back and begin with another one each time."""
    turns: list[tuple[str, Timed]] = []
    for i in range(COPIES):
        names = list(makers)[i:] + list(makers)[:i]
        turns += [(name, makers[name]()) for name in names]
    times: dict[str, list[float]] = {name: [0.0] * repeats for name in makers}
    for i in range(repeats):
        begin = i % len(turns)
        for name, turn in (turns[begin:] + turns[:begin])[:: 1 if i % 2 else -1]:
            times[name][i] += turn() / COPIES
    print({name: f"{statistics.median(x) * 1e3:.1f} ms" for name, x in times.items()}, flush=True)
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    setup()
    head, half = new_head("classification", labels=2), shrink(layers=(0, 2, 4))
    teacher = arms.teacher()["paths"]["folder"]
    taught = distil(teacher, temperature=2.0, soft=0.5, task=0.5, cosine=0.5)
    schedule = (2, 50_002, 100)
    ways = {
        "plain": (),
        "a second plain one": (),
        "keeping pruned weights": (prune(0.8),),
        "pruning on a schedule, by magnitude": (prune(0.8, schedule=schedule),),
        "pruning on a schedule, by fisher": (prune(0.8, score="fisher", schedule=schedule),),
        "by movement": (prune(0.8, score="movement", schedule=schedule),),
        "straight through": (prune(0.8, score="movement", schedule=schedule, straight_through=True),),
    }
    few = ("plain", "by movement", "straight through")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def steps(names: Iterable[str], rows: int) -> dict[str, Callable[[], Timed]]:
            return {
                name: functools.partial(step_of, f"{name}_{rows}", folder, (head, *ways[name]), rows) for name in names
            }

        taking = {
            "student": functools.partial(step_of, "student", folder, (head, half)),
            "distil": functools.partial(step_of, "distil", folder, (head, half, taught)),
            "teacher": functools.partial(forward, folder),
        }
        times = {ROWS: in_turn(steps(ways, ROWS), repeats), 0: in_turn(taking, repeats)}
        for rows, fewer in MORE.items():
            times[rows] = in_turn(steps(few, rows), max(2, repeats // fewer))

    claims = []
    for rows, each in times.items():
        for name in each if rows else ():
            ratios = [a / b for a, b in zip(each[name], each["plain"])]
            value = statistics.median(ratios)
            quartiles = statistics.quantiles(ratios, n=4)
            if name != "plain":
                title = f"a step of {rows} rows, {name}"
                claims.append(claim(title, value, 1.02, value <= 1.02, ratios, quartiles=quartiles))
    apart = [a / (b + c) for a, b, c in zip(*(times[0][name] for name in ("distil", "student", "teacher")))]
    both = statistics.median(apart)
    claims.append(claim("a distillation step over forward and step", both, 1.15, both <= 1.15, apart))
    medians = {str(rows): {k: statistics.median(x) for k, x in each.items()} for rows, each in times.items()}
    claims[0]["seconds"] = medians
    write("transform_cost", claims)


if __name__ == "__main__":
    main()
