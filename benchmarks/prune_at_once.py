"""Claim: of a language model that loses half its weights at once, SparseGPT and Wanda leave far more than magnitude does.

    pip install -e .
    python -m benchmarks.prune_at_once [--seeds 0 1 2] [--rows 40]

SmolLM2-135M: perplexity on rows of 512 tokens of State of the Union addresses that calibration did not see, before and after half of the weights
of its layers went, unstructured or 2 of every 4; 32 rows of 512 tokens of the other addresses to calibrate, others for each seed. Published for
LLaMA-2-7B on WikiText, 50%: dense 5.12, magnitude 14.89, Wanda 6.42, SparseGPT 6.51 (Sun et al. 2023, table 3).
"""

import argparse
import statistics
import time
from pathlib import Path

import jax

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import evaluate
from llm_jax import parts as run_parts
from llm_jax.config import Batch, Data, Optimizer, Run
from llm_jax.platform import setup
from llm_jax.tasks import NextToken
from llm_jax.transforms import prune

PATTERNS = {"50%": "unstructured", "2:4": "2:4"}


def perplexity(seed: int, rows: int, *transforms) -> tuple[float, float]:
    """Of the model after the transforms, and the seconds they took with the loading."""
    run = Run(
        name="prune_at_once",
        start="asset:smollm2",
        workdir=str(arms.FOLDER / "prune_at_once"),
        task=NextToken(),
        data=Data(sources=("asset:sotu",), heldout=0.05),
        optimizer=Optimizer(name="sgd"),
        batch=Batch(size=4, length=512),
        transforms=transforms,
        seed=seed,
    )
    Path(run.workdir).mkdir(parents=True, exist_ok=True)
    parts = run_parts.build(run)
    begin = time.perf_counter()
    with jax.set_mesh(parts.mesh):
        params = jax.block_until_ready(parts.init()[0].params)
        seconds = time.perf_counter() - begin
        found = evaluate.evaluate(parts.eval_step, params, parts.heldout, parts.mesh, batches=rows // run.batch.size)
    parts.close()
    return found["perplexity"], seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    setup()
    dense = perplexity(0, options.rows)[0]
    print(f"dense {dense:.2f}", flush=True)
    table: dict[str, dict[str, list[float]]] = {name: {} for name in PATTERNS}
    for score in ("magnitude", "wanda", "sparsegpt"):
        for name, pattern in PATTERNS.items():
            # magnitude looks at no rows, so that seeds do not differ
            for seed in options.seeds if score != "magnitude" else options.seeds[:1]:
                value, seconds = perplexity(seed, options.rows, prune(0.5, score=score, pattern=pattern))
                table[name].setdefault(score, []).append(value)
                print(f"{name} {score} seed {seed}: {value:.2f}, {seconds:.0f} s", flush=True)
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
