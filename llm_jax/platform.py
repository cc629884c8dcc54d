"""The processes of a run: their settings of jax (the compilation cache, quiet logs), and what they tell each other."""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from llm_jax.errors import UserError

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)

_REPEATABLE = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"

_OVERLAP = (
    "xla_gpu_enable_latency_hiding_scheduler",
    "xla_gpu_enable_pipelined_all_gather",
    "xla_gpu_enable_pipelined_all_reduce",
    "xla_gpu_enable_while_loop_double_buffering",
)
"""What XLA's optimization level O1 does on GPU and its default O0 does not; reduce-scatters are pipelined at either.

jax 0.12 no longer knows the two in the middle by these names.
"""


def target() -> str:
    """The platform that programs are made for, cpu, gpu or tpu: the one at hand, unless `planned_for` names another.

    What is written in several forms chooses by it: how layers are run, attention, chunks of the loss, dtypes.
    """
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Programs that are traced inside are those of the named platform, though no device of it is at hand."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or Path.home() / ".cache" / "llm_jax")


def setup() -> None:
    """Turn the persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR names another, and quieten libraries.

    On CPU the memory that a step frees is kept for the next one. Called once, before a device is touched. What goes wrong in the
    threads of a save or a load is not lost: the run raises it.

    Raises:
        UserError: LLM_JAX_REPEATABLE is neither 0 nor 1, or came after a GPU was touched.
    """
    if repeatable():
        _be_repeatable()
    for name in ("absl", "asyncio", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if _tunes_memory():
        _keep_freed_memory()


def compile_anew() -> None:
    """From here on this process reads no program from the compilation cache and writes none. For programs over several CPUs.

    XLA loads such a program without the order between the collectives inside of a loop or a branch and those beside it (jaxlib 0.10): two
    devices then wait for each other for ever, in different ones.
    """
    if jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax looks at the setting once, when it first compiles


def repeatable() -> bool:
    """Whether LLM_JAX_REPEATABLE=1 asks that the same run on the same devices gives the same bits, at whatever cost of time.

    Runs on CPU do so by themselves, and nothing is set for them; so do TPUs by design, which was not tried. On GPU `setup` has XLA take no
    operation whose order of sums varies and choose no kernel by timing it. A run's card keeps the mode, and a run goes on in the mode that it began with.

    Raises:
        UserError: the variable is neither 0 nor 1.
    """
    told = os.environ.get("LLM_JAX_REPEATABLE") or "0"
    if told not in ("0", "1"):
        raise UserError(f"LLM_JAX_REPEATABLE is {told!r}: it must be 0 or 1")
    return told == "1"


def _be_repeatable() -> None:
    """Add to XLA_FLAGS what GPUs need, behind the user's own: of two the last one counts. Other platforms do not look at these."""
    from jax._src import xla_bridge  # whether a device was touched has no public name

    told = os.environ.get("XLA_FLAGS", "")
    if told.endswith(_REPEATABLE):
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{told} {_REPEATABLE}".lstrip()
    elif jax.default_backend() == "gpu":
        raise UserError("LLM_JAX_REPEATABLE=1 came after a GPU was first used: set it before the process starts")


def _accelerated() -> bool:
    """Whether jax may find a TPU or a GPU, told without touching a device."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms:
        return platforms.split(",")[0] != "cpu"
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))


def _tunes_memory() -> bool:
    """Whether memory is glibc's, that of the device too, and the user has not set its options."""
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    return not tuned and platform.libc_ver()[0] == "glibc" and not _accelerated()


def _keep_freed_memory() -> None:
    """Let glibc serve large arrays from one heap that shrinks only when told to.

    By default it maps each array of a step anew and returns it to the system, which then clears tens of thousands of pages a step:
    a quarter of the time of a step of a small model on two cores.
    """
    mallopt = ctypes.CDLL(None).mallopt
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # The numbers of malloc.h.
    for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
        mallopt(option, value)


def release_freed_memory() -> None:
    """Return to the system what is freed by now and will not be needed at once, such as that of a compilation."""
    if _tunes_memory():
        ctypes.CDLL(None).malloc_trim(0)


def compiler_options(devices: int = 1) -> dict[str, Any]:
    """XLA's options for a step over so many devices, beside what the user sets in XLA_FLAGS, which stays as it is.

    **CPU**: the finer analysis of which copies a donated state needs: without it Adam's moments are copied before they are overwritten,
    a third of the memory of a step of MiniLM and a seventh of its time. And the order of the instructions that needs least memory, not that
    which lets most of them run at once: on two cores a thirteenth of that step.

    **GPU**, several of them: collectives run beside the arithmetic. They are begun a layer ahead (pipelined), two layers to a turn of the
    loop, and the scheduler moves them away from where they are waited for. Not timed: nobody here has a GPU.

    **TPU**: none. By itself libtpu (0.0.52) moves most collectives beside the arithmetic; of the options that are recommended for it only two
    together change the compiled step: docs/scale.md tells how. They were never timed, so they are left to LIBTPU_INIT_ARGS.
    """
    wanted: dict[str, bool] = {}
    if target() == "cpu":
        wanted = {
            "xla_cpu_copy_insertion_use_region_analysis": True,
            "xla_cpu_enable_concurrency_optimized_scheduler": False,
        }
    elif target() == "gpu" and devices > 1:
        wanted = dict.fromkeys(_OVERLAP, True)
    told = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in wanted.items() if name not in told and _knows(name)}


@functools.cache
def _knows(option: str) -> bool:
    """Whether the XLA at hand has an option that is true or false; another would refuse to compile."""
    try:
        jax.jit(lambda: 0, compiler_options={option: True}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def await_buffers(state: Any) -> None:
    """Wait for the step before, on CPU alone: there the buffers of a step are allocated when it is called, not when it begins."""
    if target() == "cpu":
        jax.block_until_ready(state)


def on_device(tree: Any, after: Any = None) -> Any:
    """A tree whose arrays lie in the device's memory: those that lie in the host's are brought there, in a compiled function once `after` is
    computed. Without it XLA brings them first of all, and they take their room beside all that is computed meanwhile.
    """

    def away(x: Any) -> bool:
        return jax.typeof(x).memory_space == jax.memory.Space.Host

    if not any(map(away, jax.tree.leaves(tree))):
        return tree
    if after is not None:
        tree, _ = jax.lax.optimization_barrier((tree, after))
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if away(x) else x, tree)


def gather(value: Any) -> list[Any]:
    """The JSON-able value that each process gives, by their number; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def fetch(x: Any) -> np.ndarray:
    """The whole of an array that lies over the devices of all processes, on each of them; all must call it."""
    if jax.process_count() == 1 or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
