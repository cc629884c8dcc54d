"""What a checkpoint remembers of itself: config, parents, data, code, libraries, machine, and results so far."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


@functools.cache
def code_version() -> str:
    """The commit of the source tree, marked when it has changes, or the installed version."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True,
                                   text=True, timeout=10, check=True)
        return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return _version("llm-jax")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def library_versions() -> dict[str, str]:
    """The versions of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def make_card(run: configs.Run, mesh: jax.sharding.Mesh, parents: list[str], sources: Any, **counts: Any) -> dict[str, Any]:
    """The card of a run at some point: `counts` are steps, tokens, floating-point operations and results."""
    plain = configs.to_dict(run)
    return {
        "name": run.name, "config": plain, "model": plain["model"], "parents": parents, "transforms": plain["transforms"], "sources": sources,
        "seed": run.seed, "code": code_version(), "libraries": library_versions(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count()},
        "mesh": {name: int(size) for name, size in mesh.shape.items()}, **counts,
    }
