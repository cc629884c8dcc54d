"""The modes of a process: what LLM_JAX_REPEATABLE asks of XLA, and the options that a step is compiled with."""

import os
import subprocess
import sys

import jax
import pytest

from llm_jax import platform
from llm_jax.errors import UserError

SEVERAL = 4
TINY = "import jax; from llm_jax.platform import setup; setup(); setup(); jax.jit(lambda x: x + 1)(1.0)"


def test_flags_for_gpus_arrive_at_xla_behind_the_users_own(tmp_path):
    """In a process of its own; XLA writes down the options that it compiled with, those for GPUs on any platform."""
    told = f"--xla_dump_to={tmp_path} --xla_gpu_autotune_level=3"
    environment = {**os.environ, "XLA_FLAGS": told, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    found = {}
    for mode in ("0", "1"):
        subprocess.run([sys.executable, "-c", TINY], env={**environment, "LLM_JAX_REPEATABLE": mode}, check=True)
        path = next(tmp_path.glob("*lambda*.debug_options"))
        found[mode] = path.read_text().splitlines()
        path.unlink()
    assert not any("xla_gpu_deterministic_ops: true" in line for line in found["0"])
    assert "xla_gpu_autotune_level: 3" in found["0"]
    assert {"xla_gpu_deterministic_ops: true", "xla_gpu_autotune_level: 0"} <= set(found["1"])


def test_repeatable_is_asked_for_by_one(monkeypatch):
    for told, meant in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("LLM_JAX_REPEATABLE", raising=False)
        if told is not None:
            monkeypatch.setenv("LLM_JAX_REPEATABLE", told)
        assert platform.repeatable() is meant
    monkeypatch.setenv("LLM_JAX_REPEATABLE", "yes")
    with pytest.raises(UserError, match="LLM_JAX_REPEATABLE is 'yes': it must be 0 or 1"):
        platform.setup()


def test_a_gpu_that_was_touched_cannot_become_repeatable(monkeypatch):
    jax.devices()
    monkeypatch.setenv("LLM_JAX_REPEATABLE", "1")
    before = os.environ.get("XLA_FLAGS")
    platform.setup()  # a CPU need not
    assert os.environ.get("XLA_FLAGS") == before
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="came after a GPU was first used: set it before the process starts"):
        platform.setup()


def test_collectives_of_several_gpus_are_hidden_by_options_that_this_xla_knows(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with platform.planned_for("gpu"):
        made = platform.compiler_options(SEVERAL)
        assert "xla_gpu_enable_latency_hiding_scheduler" in made and platform.compiler_options(1) == {}
        assert set(made) <= set(platform._OVERLAP)  # jax 0.12 pipelines collectives by a mode, which these do not name
        jax.jit(lambda: 0, compiler_options=made).lower().compile()
    with platform.planned_for("tpu"):
        assert platform.compiler_options(SEVERAL) == {}


def test_options_that_the_user_sets_or_xla_does_not_know_are_left_alone(monkeypatch):
    first, *others = (x for x in platform._OVERLAP if platform._knows(x))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_nothing=1 --{first}=false")
    with platform.planned_for("gpu"):
        assert set(platform.compiler_options(SEVERAL)) == set(others)
        monkeypatch.setattr(platform, "_OVERLAP", ("xla_gpu_no_such_option", others[0]))
        assert platform.compiler_options(SEVERAL) == {others[0]: True}
    name, *rest = platform.compiler_options()  # on CPU
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
    assert rest and list(platform.compiler_options()) == rest


MESHED = """
import jax
from llm_jax.platform import setup
from llm_jax.sharding import make_mesh
setup()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1).lower(1.0).compile()
mesh = make_mesh()
with jax.set_mesh(mesh):
    jax.jit(lambda x: x + 2).lower(1.0).compile()
"""


@pytest.mark.parametrize("devices, kept", [(1, 2), (8, 1)])
def test_no_program_over_several_cpus_goes_through_the_compilation_cache(devices, kept, tmp_path):
    """XLA would load it without the order of its collectives, and the devices could wait for each other for ever."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment.pop("XLA_FLAGS", None)
    subprocess.run([sys.executable, "-c", MESHED], env=environment, check=True)
    assert len([path for path in tmp_path.iterdir() if path.name.endswith("-cache")]) == kept
