"""The process's settings of jax: the compilation cache and quiet logs. Called once, before a device is touched."""

import logging
import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or Path.home() / ".cache" / "llm_jax")


def setup() -> None:
    """Turn the persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR names another, and quieten libraries."""
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
