"""Claims: what a plan tells of memory is the compiler's, its formulas come near, and the 7B step needs no more than MaxText's.

    python -m benchmarks.plans CASE ...    compile these cases
    python -m benchmarks.plans             compile those that are not on file
    python -m benchmarks.plans --formulas  compare the formulas with what is on file again, and write docs/plans.md

Compiles the configs for their topologies with libtpu, one to ten minutes each on one core; each is kept on file as soon as it is done, and the
table in docs/plans.md is written from the file. The peer is MaxText 0.2.5 compiled the same way: Llama 2 7B, rows of 4,096, one a device,
float32 weights and Adam, bfloat16, full remat.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS, claim, write
from llm_jax import config, plan
from llm_jax.chips import Topology, read_topology
from llm_jax.models.remat import REMAT
from llm_jax.transforms import offload_moments

TABLE = Path(__file__).parents[1] / "docs" / "plans.md"


PEAK = "peak by formulas over the compiler's"
OPERATIONS = "operations by formulas over those of the program"


class Case(NamedTuple):
    """A config on a topology."""

    topology: str
    config: str
    changes: tuple[str, ...] = ()
    """keys of the config and their values"""
    peer: tuple[float, float, float] | None = None
    """its peak in GB, operations over the model's, and collectives in GB a step and device"""
    moments: bool = False
    """whether the moments are offloaded"""


def _rows(count: int, *more: str) -> tuple[str, ...]:
    return (f"batch.size={count}", "batch.accumulate=1", *more)


WIDE = ("model.heads=16", "model.kv_heads=4", "model.head_dim=128")
"""As many weights in heads of 128, of which a TPU's tile holds one: a tile of 128 lanes holds one of 64 too, where the other axis is split to less"""

SMALL = (
    *("model.layers=8", "model.dim=1024", "model.heads=8", "model.kv_heads=8", "model.head_dim=128"),
    *("model.mlp_dim=4096", "model.vocab_size=8192", "batch.length=2048"),
)
"""What each policy of rematerialisation costs is compared on this model"""

CASES: dict[str, Case] = {
    "1b-v5e-4": Case("v5e:2x2", "llama32_1b", _rows(4)),
    "1b-v5e-16": Case("v5e:4x4", "llama32_1b", _rows(16)),
    "1b-v5e-64": Case("v5e:8x8", "llama32_1b", _rows(64)),
    "1b-v5e-256": Case("v5e:16x16", "llama32_1b", _rows(256)),
    "1b-wide-v5e-4": Case("v5e:2x2", "llama32_1b", _rows(4, *WIDE)),
    "1b-wide-v5e-16": Case("v5e:4x4", "llama32_1b", _rows(16, *WIDE)),
    "1b-wide-v5e-64": Case("v5e:8x8", "llama32_1b", _rows(64, *WIDE)),
    "1b-wide-v5e-256": Case("v5e:16x16", "llama32_1b", _rows(256, *WIDE)),
    "1b-v5e-2x16": Case("2xv5e:4x4", "llama32_1b", _rows(32, "mesh.data=2")),
    "1b-v5e-4-moments": Case("v5e:2x2", "llama32_1b", _rows(4), moments=True),
    "7b-v5e-16": Case("v5e:4x4", "llama2_7b", _rows(16), (9.69, 1.29, 41.3)),
    "7b-v5e-16-offload": Case("v5e:4x4", "llama2_7b", _rows(16, "model.remat=offload")),
    "7b-v5e-256": Case("v5e:16x16", "llama2_7b", _rows(256), (2.91, 1.29, 39.5)),
    "7b-v5p-64": Case("v5p:4x4x4", "llama2_7b", _rows(64), (4.19, 1.29, 39.5)),
    "70b-v5p-256": Case("v5p:4x8x8", "llama3_70b", _rows(256)),
    "7b-long-v5p-256": Case("v5p:4x8x8", "llama2_7b_long"),
    **{f"remat-{name}": Case("v5e:2x2", "llama32_1b", _rows(8, *SMALL, f"model.remat={name}")) for name in REMAT},
}
"""By name: model, chip, number of chips. The first four and the four that follow are one model each on a growing axis fsdp, one row a device."""

AXIS = tuple(f"1b-wide-v5e-{chips}" for chips in (4, 16, 64, 256))


def prepared(name: str) -> tuple[config.Run, Topology]:
    """The run of a case, and where it runs."""
    case = CASES[name]
    words = (f"--config=configs/{case.config}.py", *(f"--config.{change}" for change in case.changes))
    run = config.parse(words)
    if case.moments:
        run = dataclasses.replace(run, transforms=(*run.transforms, offload_moments()))
    return run, read_topology(case.topology)


def measure(name: str) -> list[dict[str, Any]]:
    """The claims of a case."""
    case = CASES[name]
    made = plan.make(*prepared(name))
    memory = made.memory
    off = [note for note in made.notes if "by part" in note]
    claims = [
        claim(f"{name}: parts of the arguments that are not the compiler's bytes", len(off), 0, not off),
        claim(f"{name}: peak over the chip's memory", memory.peak / memory.limit, 1, memory.fits),
    ]
    if case.peer:
        figures = (memory.peak / 1e9, made.flops / made.model_flops, sum(made.payload.values()) / 1e9)
        told = ("peak of a device, GB", "operations over the model's", "collectives of a step and device, GB")
        claims += [
            claim(f"{name}: {what}", value, most, value <= most) for what, value, most in zip(told, figures, case.peer)
        ]
    claims[0]["plan"] = {key: value for key, value in plan.to_dict(made).items() if key != "name"}
    claims += formulas(name, claims[0]["plan"])
    for one in claims:
        one["case"] = name
    return claims


def formulas(name: str, compiled: dict[str, Any]) -> list[dict[str, Any]]:
    """What the formulas give of a case over what the compiler says."""
    estimated = plan.make(*prepared(name), compiled=False)
    ratio = estimated.memory.peak / compiled["memory"]["peak"]
    operations = estimated.flops / compiled["flops"]["program"]
    return [
        claim(f"{name}: {PEAK}", ratio, 1, 0.85 <= ratio <= 1.15, case=name),
        claim(f"{name}: {OPERATIONS}", operations, 1, abs(operations - 1) < 0.05, case=name),
    ]


def along_the_axis(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """State of a device times the devices of the axis fsdp, over that of the first case of `AXIS`: 1 where it falls in proportion."""
    plans = {one["case"]: one["plan"] for one in claims if "plan" in one}
    states = {
        name: (plans[name]["memory"]["parameters"] + plans[name]["memory"]["optimizer"]) * plans[name]["mesh"]["fsdp"]
        for name in AXIS
        if name in plans
    }
    if AXIS[0] not in states:
        return []
    ratios = {name: state / states[AXIS[0]] for name, state in states.items() if name != AXIS[0]}
    told = "weights and moments of a device times the chips, over that of 4 chips"
    return [claim(f"{n}: {told}", x, 1, abs(x - 1) < 0.05, case="axis") for n, x in ratios.items()]


def table(claims: list[dict[str, Any]]) -> str:
    """The plans on file as a page of documentation."""
    columns = (
        *("case", "topology", "mesh", "rows", "remat", "weights", "moments", "peak", "host", "estimate", "operations"),
        *("collectives", "to other slices", "seconds", "bound by"),
    )
    lines = [
        "# Plans on file",
        "",
        "One step of each config, compiled ahead of time for TPUs; written by `python -m benchmarks.plans` from `benchmarks/results/plans.json`.",
        "GB of a device; estimate: the peak by formulas over the compiler's; operations: of the program over the model's; seconds: the roofline's.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    ratios = {one["case"]: one["value"] for one in claims if PEAK in one["name"]}
    plans = {one["case"]: one["plan"] for one in claims if "plan" in one}
    for name in (name for name in CASES if name in plans):
        found = plans[name]
        mesh = " ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1)
        memory, roofline = found["memory"], found["roofline"]
        sizes = (memory["parameters"], memory["optimizer"], memory["peak"], memory.get("host", 0.0))
        sent = sum(x["payload"] for x in found["collectives"].values()), sum(found.get("network", {}).values())
        cells = (
            *(name, found["topology"], mesh, found["batch"]["size"], found["remat"]),
            *(f"{size / 1e9:.2f}" for size in sizes),
            *(f"{ratios[name]:.2f}", f"{found['flops']['ratio']:.3f}"),
            *(f"{size / 1e9:.2f}" for size in sent),
            *(f"{roofline['seconds']:.2f}", roofline["bound"]),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    plan.prepare()
    path = RESULTS / "plans.json"
    claims = json.loads(path.read_text())["claims"] if path.exists() else []
    if sys.argv[1:] == ["--formulas"]:
        claims = [one for one in claims if PEAK not in one["name"] and OPERATIONS not in one["name"]]
        for one in [one for one in claims if "plan" in one]:
            claims += formulas(one["case"], one["plan"])
        write("plans", claims)
    else:
        known = {one["case"] for one in claims}
        for name in sys.argv[1:] or [name for name in CASES if name not in known]:
            kept = [one for one in claims if one["case"] not in (name, "axis")] + measure(name)
            claims = kept + along_the_axis(kept)
            write("plans", claims)
    TABLE.write_text(table(claims), encoding="utf-8")


if __name__ == "__main__":
    main()
