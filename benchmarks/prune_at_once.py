"""Claim: of a language model that loses half its weights at once, SparseGPT and Wanda leave far more than magnitude does.

    pip install -e .
    python -m benchmarks.prune_at_once [--seeds 0 1 2] [--rows 40]

SmolLM2-135M: perplexity on rows of 512 tokens of State of the Union addresses that calibration did not see, before and after half of the weights
of its layers went, unstructured or 2 of every 4; 32 rows of 512 tokens of the other addresses to calibrate, others for each seed. Published for
LLaMA-2-7B on WikiText, 50%: dense 5.12, magnitude 14.89, Wanda 6.42, SparseGPT 6.51 (Sun et al. 2023, table 3). Each value is kept in
runs/benchmarks/prune_at_once, so that an interrupted script goes on where it stopped.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import evaluate, model
from llm_jax import parts as run_parts
from llm_jax.config import Batch, Data, Optimizer, Run
from llm_jax.platform import setup
from llm_jax.tasks import NextToken
from llm_jax.transforms import IDENTITY, Transform, prune

PATTERNS = {"50%": "unstructured", "2:4": "2:4"}
SCORES = ("magnitude", "wanda", "sparsegpt")
FOLDER = arms.FOLDER / "prune_at_once"
BATCHES = 8
"""to calibrate, of 4 rows each"""

RUN = Run(
    name="prune_at_once",
    start="asset:smollm2",
    workdir=str(FOLDER),
    task=NextToken(),
    data=Data(sources=("asset:sotu",), heldout=0.05),
    optimizer=Optimizer(name="sgd"),
    batch=Batch(size=4, length=512),
)


def measure(rows: int) -> Callable[[Transform, int], dict[str, float]]:
    """(transform, seed of the calibration rows) -> perplexity after it, and the seconds that it took."""
    parts = run_parts.build(RUN)
    dense = model.load(RUN.start, parts.mesh)

    jitted: dict[str, Any] = {}

    @functools.cache
    def rows_to_look_at(seed: int) -> Any:
        return run_parts.calibration(dataclasses.replace(RUN, seed=seed), parts.tokenizer, BATCHES)

    def one(change: Transform, seed: int) -> dict[str, float]:
        aux = rows_to_look_at(seed) if change.calibration else None
        with jax.set_mesh(parts.mesh):
            begin = time.perf_counter()
            changed = jitted.setdefault(change.label, jax.jit(change.params, static_argnums=0))
            params = changed(dense.config, dense.params, jax.random.key(seed), aux)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - begin
            found, _ = evaluate.judge(
                parts.eval_step, params, parts.heldout, parts.mesh, batches=rows // RUN.batch.size
            )
        return {"perplexity": found["perplexity"], "seconds": seconds}

    return one


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    setup()
    FOLDER.mkdir(parents=True, exist_ok=True)
    one: Callable[[Transform, int], dict[str, float]] | None = None

    def kept(name: str, change: Transform, seed: int) -> float:
        """The perplexity, measured where it is not on file."""
        nonlocal one
        path = FOLDER / f"{name}_{seed}_{options.rows}.json"
        if not path.exists():
            one = one or measure(options.rows)
            path.write_text(json.dumps(one(change, seed)))
        found = json.loads(path.read_text())
        print(f"{name} seed {seed}: {found['perplexity']:.2f}, {found['seconds']:.0f} s", flush=True)
        return found["perplexity"]

    dense = kept("dense", IDENTITY, 0)
    table: dict[str, dict[str, list[float]]] = {name: {} for name in PATTERNS}
    for score in SCORES:
        for name, pattern in PATTERNS.items():
            change = prune(0.5, score=score, pattern=pattern, batches=BATCHES)
            # magnitude looks at no rows, so that seeds do not differ
            seeds = options.seeds if change.calibration else options.seeds[:1]
            table[name][score] = [kept(f"{score}_{pattern.replace(':', '_')}", change, seed) for seed in seeds]
    claims = []
    for name, found in table.items():
        (magnitude,) = found["magnitude"]
        for score in ("wanda", "sparsegpt"):
            value = statistics.fmean(found[score])
            what = f"perplexity at {name} by {score}, half of magnitude's at most"
            claims.append(
                claim(what, value, magnitude / 2, value <= magnitude / 2, found[score], dense=dense, table=found)
            )
    write("prune_at_once", claims)


if __name__ == "__main__":
    main()
