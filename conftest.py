"""The settings of jax that every test and doctest runs under, made once, before jax initialises. Fixtures are in tests/conftest.py."""

import gc
import os

# Set in the environment too, so that the processes that tests start run on CPU and offline as well. The number of devices is not:
# such a process has one, as a user's has, unless its test says otherwise.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import jax

from llm_jax.platform import cache_folder

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compiled"))

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Tracing makes many small objects that live: to look through all of them again and again takes a tenth of the time of the tests.
gc.set_threshold(50_000, 20, 50)
