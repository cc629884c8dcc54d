"""Claims: what a plan tells of memory is the compiler's, its formulas come near, and the 7B step needs no more than MaxText's.

    python -m benchmarks.plans [CASE ...]

Compiles the configs for their topologies with libtpu, two to five minutes each on two cores; cases that are not named keep what is on file. The
peer is MaxText 0.2.5 compiled the same way: Llama 2 7B, rows of 4,096, one a device, float32 weights and Adam, bfloat16, full remat.
"""

import json
import sys
from typing import Any

from benchmarks.common import RESULTS, claim, write
from llm_jax import config, plan
from llm_jax.chips import read_topology

CASES: dict[str, tuple[str, tuple[str, ...], tuple[float, float, float] | None]] = {
    "7b-v5e-16": ("v5e:4x4", ("--config=configs/llama2_7b.py", "--config.batch.size=16"), (9.69, 1.29, 41.3)),
    "7b-v5e-256": ("v5e:16x16", ("--config=configs/llama2_7b.py", "--config.batch.size=256"), (2.91, 1.29, 39.5)),
    "7b-v5p-64": ("v5p:4x4x4", ("--config=configs/llama2_7b.py", "--config.batch.size=64"), (4.19, 1.29, 39.5)),
}
"""Topology, config, and the peer's peak in GB, operations over the model's, and collectives in GB a step and device"""


def measure(name: str) -> list[dict[str, Any]]:
    """The claims of a case."""
    where, words, peer = CASES[name]
    topology, run = read_topology(where), config.parse(words)
    estimated = plan.make(run, topology, compiled=False)
    made = plan.make(run, topology)
    memory = made.memory
    off = [note for note in made.notes if "by part" in note]
    ratio = estimated.memory.peak / memory.peak
    claims = [
        claim(f"{name}: parts of the arguments that are not the compiler's bytes", len(off), 0, not off),
        claim(f"{name}: peak by formulas over the compiler's", ratio, 1, 0.85 <= ratio <= 1.15),
        claim(
            f"{name}: operations by formulas over those of the program",
            estimated.flops / made.flops,
            1,
            abs(estimated.flops / made.flops - 1) < 0.05,
        ),
    ]
    if peer:
        figures = (memory.peak / 1e9, made.flops / made.model_flops, sum(made.payload.values()) / 1e9)
        told = ("peak of a device, GB", "operations over the model's", "collectives of a step and device, GB")
        claims += [
            claim(f"{name}: {what}", value, most, value <= most) for what, value, most in zip(told, figures, peer)
        ]
    for one in claims:
        one["case"] = name
    claims[0]["plan"] = {key: value for key, value in plan.to_dict(made).items() if key != "name"}
    return claims


def main() -> None:
    plan.prepare()
    names = sys.argv[1:] or list(CASES)
    path = RESULTS / "plans.json"
    before = json.loads(path.read_text())["claims"] if path.exists() else []
    for name in names:
        before = [one for one in before if one["case"] != name] + measure(name)
        write("plans", before)


if __name__ == "__main__":
    main()
