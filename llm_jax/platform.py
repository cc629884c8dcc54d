"""The processes of a run: their settings of jax (the compilation cache, quiet logs), and what they tell each other."""

import ctypes
import importlib.util
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or Path.home() / ".cache" / "llm_jax")


def setup() -> None:
    """Turn the persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR names another, and quieten libraries.

    On CPU the memory that a step frees is kept for the next one. Called once, before a device is touched. What goes wrong in the
    threads of a save or a load is not lost: the run raises it.
    """
    for name in ("absl", "asyncio", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if not _accelerated():
        _keep_freed_memory()


def _accelerated() -> bool:
    """Whether jax may find a TPU or a GPU, told without touching a device."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms:
        return platforms.split(",")[0] != "cpu"
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))


def _keep_freed_memory() -> None:
    """Let glibc serve large arrays from one heap that never shrinks, unless the user has set its options.

    By default it maps each array of a step anew and returns it to the system, which then clears tens of thousands of pages a step:
    a quarter of the time of a step of a small model on two cores.
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if tuned or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # The numbers of malloc.h.
    for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
        mallopt(option, value)


def gather(value: Any) -> list[Any]:
    """The JSON-able value that each process gives, by their number; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]
