"""What all benchmarks share: the form of a result and where it is written."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from llm_jax.card import code_version, library_versions

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and memory in a line."""
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def write(name: str, claims: list[dict]) -> None:
    """Write results/NAME.json and print the claims. A claim has name, value, target, holds, seeds and spread."""
    for claim in claims:
        claim.setdefault("seeds", 1)
        claim.setdefault("spread", None)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps(
            {
                "claims": claims,
                "machine": machine(),
                "versions": library_versions(),
                "commit": code_version(),
                "date": datetime.date.today().isoformat(),
            },
            indent=1,
        )
        + "\n"
    )
    for claim in claims:
        print(line(name, claim))


def claim(name: str, value: float, target: float, holds: bool, values: list[float] | None = None, **more: Any) -> dict:
    """A claim for `write`; its spread is the least and the greatest of the values, one a seed."""
    spread = [min(values), max(values)] if values else None
    return {
        "name": name,
        "value": value,
        "target": target,
        "holds": bool(holds),
        "seeds": len(values) if values else 1,
        "spread": spread,
        "values": values,
        **more,
    }


def line(script: str, claim: dict) -> str:
    """A claim as a line of the table."""

    def short(x) -> str:
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    spread = "" if claim["spread"] is None else f" [{', '.join(short(x) for x in claim['spread'])}]"
    return f"{'holds ' if claim['holds'] else 'FAILS '} {script:22} {short(claim['value']) + spread:28} target {short(claim['target']):12} {claim['name']}"
