"""The processes of a run: their settings of jax (the compilation cache, quiet logs), and what they tell each other."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or Path.home() / ".cache" / "llm_jax")


def setup() -> None:
    """Turn the persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR names another, and quieten libraries.

    Called once, before a device is touched. What goes wrong in the threads of a save or a load is not lost: the run raises it.
    """
    for name in ("absl", "asyncio", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def gather(value: Any) -> list[Any]:
    """The JSON-able value that each process gives, by their number; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]
