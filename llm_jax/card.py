"""What a checkpoint remembers of itself: config, parents, data, code, libraries, machine, results so far, and the hash of its weights."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax import config as configs
from llm_jax import tree
from llm_jax.models.config import ModelConfig
from llm_jax.platform import on_device, repeatable

Card = dict[str, Any]

ORIGINS = ("huggingface", "gguf")
"""Entries that a model from elsewhere hands on to what is made of it."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


@functools.cache
def code_version() -> str:
    """The commit of the source tree, marked when it has changes, or the installed version."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)  # else the repository around it, if any, is that of somebody else
        return git("describe", "--always", "--dirty", "--abbrev=40").strip()
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


def make_card(
    run: configs.Run, model: ModelConfig, mesh: jax.sharding.Mesh, inherited: Card, sources: Any, **counts: Any
) -> Card:
    """The card of a run at some point, whose weights are of the sizes `model`.

    `inherited` names its parents and where they came from, `counts` are step, tokens, operations and results.
    """
    plain = configs.to_dict(run)
    return {
        "name": run.name,
        "config": plain,
        "model": configs.to_dict(model),
        **inherited,
        "transforms": plain["transforms"],
        "sources": sources,
        "seed": run.seed,
        "code": code_version(),
        "libraries": library_versions(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count()},
        "repeatable": repeatable(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        **counts,
    }


@jax.jit
def _leaf_hashes(leaves: list[Array]) -> list[Array]:
    """Two 32-bit sums of each leaf's words mixed with their index: whole-number arithmetic, the same on any mesh."""

    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize <= 4):
            words = x.astype(jnp.uint32)
        else:
            words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")).astype(jnp.uint32)
        index = jnp.zeros(words.shape, jnp.uint32)
        for axis, size in enumerate(words.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> 15)
        zeros = (jnp.uint32(0), jnp.uint32(0))
        # One reduction of both: of two, XLA on CPU keeps the mixed words of every leaf meanwhile, as much memory as the weights.
        both = jax.lax.reduce(
            (mixed, mixed * (2 * index + 1)), zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim))
        )
        return jnp.stack(both)

    return [one(x) for x in leaves]


def content_hash(params: Any, order: Sequence[str] = ()) -> str:
    """A fingerprint of the names, shapes, dtypes and bits of a tree, independent of how it is laid out over devices.

    Args:
        order: the names of its leaves in the order of another tree of these, such as one whose fields came back as keys; by default its own.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = {name: i for i, name in enumerate(order)}
    leaves.sort(key=lambda leaf: places.get(tree.path_name(leaf[0]), 0))
    sums = jax.device_get(_leaf_hashes([on_device(x) for _, x in leaves]))
    digest = hashlib.sha256()
    for (path, x), pair in zip(leaves, sums):
        digest.update(f"{tree.path_name(path)} {x.dtype} {x.shape} {pair[0]:08x} {pair[1]:08x}\n".encode())
    return digest.hexdigest()
