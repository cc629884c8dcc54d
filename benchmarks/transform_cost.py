"""Claims: pruning adds 2% to a step at most; a step of distillation costs at most 1.15 of the teacher's forward pass and the student's step.

    pip install -e .
    python -m benchmarks.transform_cost [--repeats 41]

MiniLM (22.7M parameters) and half of it, 4 rows of 64 tokens, AdamW. The steps take turns in one process; medians of the ratios of each turn. The
sums of movement are read and written with each update, whatever the rows, so that it is measured over 8 rows (as in configs/prune_fisher.py) and 32
too. That the memory of distillation does not grow with tokens x vocabulary is tested in tests/transforms/test_distil.py. The teacher,
configs/snippets_minilm.py, is trained first where it is not there. Wants a machine without other work: fifteen minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import parts as run_parts
from llm_jax.models import transformer
from llm_jax.platform import compiler_options, setup
from llm_jax.transforms import distil, new_head, prune, shrink

ROWS, MORE = 4, (8, 32)
A_TURN = 20
"""Rows that the steps of a turn read in all, at least those of one step"""


def steps_of(name: str, folder: Path, transforms: tuple[Any, ...], rows: int = ROWS) -> Callable[[], float]:
    """Seconds of a step of the run with these transforms, over those of a turn."""
    run = arms.load("snippets_minilm", transforms=transforms, workdir=str(folder / name), epochs=0.0, steps=100_000)
    run = arms.changed(run, batch=dict(size=rows))
    steps = max(1, A_TURN // rows)
    parts = run_parts.build(run)
    state, _ = parts.init()
    batch = next(parts.train).batch
    batch = jax.device_put(batch)
    held = {"state": state}
    parts.close()

    def turn() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            held["state"], metrics = parts.step(held["state"], batch)
        jax.block_until_ready((held["state"].params, metrics))
        return (time.perf_counter() - begin) / steps

    turn()
    return turn


def forward(folder: Path) -> Callable[[], float]:
    """Seconds of a forward pass of the teacher over the same rows."""
    run = arms.load("snippets_minilm", workdir=str(folder / "forward"))
    parts = run_parts.build(run)
    params = parts.init()[0].params
    batch = jax.device_put(next(parts.train).batch)
    parts.close()
    read = jax.jit(
        lambda params, batch: transformer.apply(parts.model, params, batch, hidden_states=True),
        compiler_options=compiler_options(),
    )

    def turn() -> float:
        begin = time.perf_counter()
        for _ in range(A_TURN // ROWS):
            out = read(params, batch)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / (A_TURN // ROWS)

    turn()
    return turn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=41)
    repeats = parser.parse_args().repeats
    setup()
    head, half = new_head("classification", labels=2), shrink(layers=(0, 2, 4))
    teacher = arms.teacher()["paths"]["folder"]
    taught = distil(teacher, temperature=2.0, soft=0.5, task=0.5, cosine=0.5)
    schedule = (2, 50_002, 100)
    gradual = {
        "magnitude": prune(0.8, schedule=schedule),
        "fisher": prune(0.8, score="fisher", schedule=schedule),
        "movement": prune(0.8, score="movement", schedule=schedule),
        "movement, straight through": prune(0.8, score="movement", schedule=schedule, straight_through=True),
    }
    summing = [name for name in gradual if name.startswith("movement")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        turns = {
            "plain": steps_of("plain", folder, (head,)),
            "pruned": steps_of("pruned", folder, (head, prune(0.8))),
            **{name: steps_of(name, folder, (head, change)) for name, change in gradual.items()},
            **{f"plain, {n} rows": steps_of(f"plain_{n}", folder, (head,), n) for n in MORE},
            **{f"{x}, {n} rows": steps_of(f"{x}_{n}", folder, (head, gradual[x]), n) for n in MORE for x in summing},
            "student": steps_of("student", folder, (head, half)),
            "distil": steps_of("distil", folder, (head, half, taught)),
            "teacher": forward(folder),
        }
        times: dict[str, list[float]] = {name: [] for name in turns}
        for i in range(repeats):
            for name in list(turns)[:: 1 if i % 2 else -1]:
                times[name].append(turns[name]())
    print({name: f"{statistics.median(x) * 1e3:.1f} ms" for name, x in times.items()}, flush=True)

    def adds(title: str, name: str, rows: str = "", **more: Any) -> dict:
        ratios = [a / b for a, b in zip(times[name + rows], times["plain" + rows])]
        value = statistics.median(ratios)
        return claim(title, value, 1.02, value <= 1.02, ratios, **more)

    both = [a / (b + c) for a, b, c in zip(times["distil"], times["student"], times["teacher"])]
    write(
        "transform_cost",
        [
            adds("a step that keeps pruned weights over a plain one", "pruned"),
            adds("a step of pruning on a schedule, by magnitude", "magnitude", times=times),
            *(adds(f"a step of pruning on a schedule, by {x}", x) for x in gradual if x != "magnitude"),
            *(adds(f"a step of {n} rows, by {x}", x, f", {n} rows") for n in MORE for x in summing),
            claim(
                "a distillation step over forward and step",
                statistics.median(both),
                1.15,
                statistics.median(both) <= 1.15,
                both,
            ),
        ],
    )


if __name__ == "__main__":
    main()
