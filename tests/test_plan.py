"""Plans: that what is compiled is what a run runs, that memory by part is the compiler's, and what a user gets wrong."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llm_jax import budget, chips, cli, config, parts, plan, program, reports, search, sharding
from llm_jax.config import Batch, Data, Mesh, Optimizer, Run
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import compute_dtype
from llm_jax.models.remat import REMAT
from llm_jax.platform import planned_for, target
from llm_jax.tasks import Classification, MaskedToken, NextToken, SpanCorruption
from llm_jax.transforms import Transform, chain, new_head, offload_moments

ROOT = Path(__file__).parents[1]
SIZES = ModelConfig(vocab_size=512, max_length=32, layers=2, dim=16, heads=2, norm="rms", mlp="gated_silu")
RUN = Run(
    name="tiny", model=SIZES, task=NextToken(), optimizer=Optimizer(learning_rate=1e-2), steps=6, batch=Batch(8, 32)
)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The settings of this process stay as they are."""
    monkeypatch.setattr(plan, "prepare", lambda: None)


def test_a_program_is_made_for_the_platform_that_is_planned():
    assert target() == jax.default_backend() == "cpu" and compute_dtype(SIZES) == jnp.float32
    with planned_for("tpu"):
        assert target() == "tpu" and compute_dtype(SIZES) == jnp.bfloat16
        with planned_for("gpu"):
            assert target() == "gpu"
    assert target() == "cpu"


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_what_is_planned_is_what_a_run_runs(corpus, tmp_path, sizes):
    mesh = dataclasses.replace(Mesh(), **sizes)
    data = Data(sources=(f"text:{corpus}/*.txt",), tokenizer="bpe:512", heldout=0.1)
    built = parts.build(dataclasses.replace(RUN, workdir=str(tmp_path), data=data, mesh=mesh))
    try:
        with jax.set_mesh(built.mesh):
            batch = sharding.put(built.rows(next(built.train).batch), built.mesh)
            state, _ = built.init()
            run = built.step.lower(state, batch).as_text()
    finally:
        built.close()
    devices = sharding.make_mesh(mesh)
    made, abstract, shapes = program.arguments(program.resolve(dataclasses.replace(RUN, mesh=mesh), devices), devices)
    with jax.set_mesh(devices):
        assert made.step.lower(abstract, shapes).as_text() == run


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_and_optimizer_take_what_the_compiler_says(name):
    """Of each device: the shards of both, with the batch and the counters, are the arguments of the compiled step, byte for byte."""
    run = dataclasses.replace(RUN, mesh=Mesh(data=2, fsdp=2, tensor=2), optimizer=Optimizer(name=name))
    mesh = sharding.make_mesh(run.mesh)
    made, state, batch = program.arguments(program.resolve(run, mesh), mesh)
    with jax.set_mesh(mesh):
        compiled = made.step.lower(state, batch).compile()
    found = plan.argument_bytes(compiled, state, batch)
    for part in ("params", "opt_state"):
        arrays = jax.tree.leaves(getattr(state, part))
        assert found[part] == sum(jnp.zeros(x.sharding.shard_shape(x.shape), x.dtype).nbytes for x in arrays)
    assert sum(found.values()) == compiled.memory_analysis().argument_size_in_bytes


def test_what_a_step_does_not_read_is_no_argument():
    """A model without positions does not ask for those of the batch."""
    run = dataclasses.replace(RUN, model=SIZES.replace(positions="none"))
    mesh = sharding.make_mesh(run.mesh)
    made, state, batch = program.arguments(program.resolve(run, mesh), mesh)
    with jax.set_mesh(mesh):
        compiled = made.step.lower(state, batch).compile()
    found = plan.argument_bytes(compiled, state, batch)
    assert sum(found.values()) == compiled.memory_analysis().argument_size_in_bytes
    assert found["batch"] == 4 * 32 * 4  # of its five arrays a row of each but the positions


def test_an_estimate_says_so_and_counts_the_shards():
    topology = chips.read_topology("h100:8")
    run = dataclasses.replace(RUN, mesh=Mesh(data=1, fsdp=8))
    made = plan.make(run, topology)
    assert not made.compiled and plan.to_dict(made)["kind"] == "analytic estimate"
    assert made.memory.fits and made.memory.limit == chips.CHIPS["h100"].memory
    mesh = sharding.make_mesh(run.mesh)
    _, state, _ = program.arguments(program.resolve(run, mesh), mesh)
    total = sum(jnp.zeros(x.sharding.shard_shape(x.shape), x.dtype).nbytes for x in jax.tree.leaves(state.params))
    assert made.memory.parameters == total
    assert made.model_flops <= made.flops and set(made.payload) == {"all-gather", "reduce-scatter"}
    one = plan.whole_run(made, seconds=2.0)
    assert one == {
        "tokens_per_day": 256 * 43200,
        "steps": 6,
        "tokens": 6 * 256,
        "days": 12 / 86400,
        "chip_hours": 12 / 3600 * 8,
    }


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (SIZES.replace(architecture="encoder", head="mlm"), MaskedToken()),
        (SIZES.replace(architecture="encoder-decoder"), SpanCorruption()),
        (SIZES.replace(architecture="encoder", head="classification"), Classification(labels=("a", "b"))),
    ],
)
def test_every_task_has_a_batch(model, task):
    run = dataclasses.replace(RUN, model=model, task=task)
    mesh = sharding.make_mesh(run.mesh)
    made, state, batch = program.arguments(program.resolve(run, mesh), mesh)
    with jax.set_mesh(mesh):
        made.step.lower(state, batch)
    assert plan.make(run, chips.read_topology("a100:8")).flops > 0


def test_a_transform_that_starts_and_what_only_the_data_tells():
    run = dataclasses.replace(RUN, transforms=(Transform(rows=lambda batch, fingerprint: dict(batch), label="cached"),))
    with pytest.raises(config.reading.ConfigError, match="cached adds to the rows what only the data tells"):
        plan.make(run, chips.read_topology("h100:8"))
    calibrated = Transform(params=lambda c, params, key, aux: (aux.batches["tokens"].shape, params)[1], calibration=2)
    headed = dataclasses.replace(
        RUN,
        model=SIZES.replace(architecture="encoder", head="none"),
        transforms=(chain(new_head("classification", labels=2), calibrated),),
        task=Classification(labels=("a", "b")),
    )
    assert plan.make(headed, chips.read_topology("h100:8")).parameters > 0


def test_more_devices_take_less_memory_each():
    peaks = [
        plan.make(
            dataclasses.replace(RUN, mesh=Mesh(data=1, fsdp=n), batch=Batch(16, 32)), chips.read_topology(f"h100:{n}")
        ).memory
        for n in (1, 4, 16)
    ]
    assert [round(peaks[0].parameters / m.parameters, 1) for m in peaks] == [
        1.0,
        pytest.approx(4, rel=0.1),
        pytest.approx(16, rel=0.15),
    ]


def test_several_slices_have_a_network_of_their_own():
    """Of two slices each device sends half of its summed gradient twice, of four three quarters; the roofline takes it into account."""
    for slices in (2, 4):
        topology = chips.read_topology(f"{slices}xh100:4")
        assert (topology.chips, topology.slices, topology.slice) == (4 * slices, slices, "h100:4")
        made = plan.make(dataclasses.replace(RUN, mesh=Mesh(data=slices, fsdp=4), batch=Batch(16, 32)), topology)
        table = SIZES.vocab_size * SIZES.dim
        # In bfloat16, of the table twice: of what is looked up in float32
        gradient = (2 * (made.parameters - table) + (4 + 2) * table) / 4
        assert made.network == {"all-reduce": pytest.approx(2 * gradient * (slices - 1) / slices)}
        assert made.times["network"] == pytest.approx(made.network["all-reduce"] / topology.chip.network)
        assert "all-reduce" not in made.sent and f"{slices}xh100:4" in reports.plan(made)
    one = plan.make(dataclasses.replace(RUN, mesh=Mesh(data=2, fsdp=4)), chips.read_topology("h100:8"))
    assert one.network == {} and "network" not in one.times and one.sent["all-reduce"] > 0


def test_what_waits_on_the_host_takes_none_of_the_device():
    topology = chips.read_topology("h100:8")
    run = dataclasses.replace(RUN, mesh=Mesh(data=1, fsdp=8), model=SIZES.replace(remat="full"))
    plain = plan.make(run, topology).memory
    moments = plan.make(dataclasses.replace(run, transforms=(offload_moments(),)), topology).memory
    assert moments.parameters == plain.parameters and moments.rest == plain.rest and plain.host == 0
    assert moments.host == plain.optimizer - moments.optimizer and moments.optimizer < 100  # counters stay
    # Of one short row the update needs the most: gradients, the moments that come, and what they become
    short = dataclasses.replace(run, mesh=Mesh(data=1, fsdp=1), batch=Batch(1, 32), transforms=(offload_moments(),))
    update = plan.make(short, chips.read_topology("h100:1")).memory
    assert update.rest == update.host + 2 * update.parameters
    inputs = plan.make(dataclasses.replace(run, model=SIZES.replace(remat="offload")), topology).memory
    assert inputs.host == plain.rest - inputs.rest == 2 * 2 * 32 * 16  # layers x bytes x tokens x width
    ranked = {
        name: plan.make(dataclasses.replace(run, model=SIZES.replace(remat=name)), topology)
        for name in ("full", "out", "qkv", "dots")
    }
    kept, again = ([f(x) for x in ranked.values()] for f in (lambda x: x.memory.peak, lambda x: -x.flops))
    assert kept == sorted(kept) and again == sorted(again) and len(set(again)) == 4


def test_a_search_ranks_what_fits(monkeypatch):
    monkeypatch.setattr(search, "ROWS", (1, 4))
    monkeypatch.setattr(search, "TENSOR", (1, 2))
    found = search.search(RUN, chips.read_topology("h100:4"))
    times = [p.seconds / p.tokens for p in found]
    assert times == sorted(times) and all(p.memory.fits for p in found) and len(found) > 8
    assert {p.run.model.remat for p in found} == set(REMAT)
    monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.CHIPS["h100"], memory=1000.0))
    with pytest.raises(Exception, match="nothing that was tried fits h100:4: the least needs"):
        search.search(RUN, chips.read_topology("h100:4"))


def test_a_budget():
    topology = chips.read_topology("v5p:4x4x4")
    found = budget.choices(topology, 10, 0.5)
    for one in found:
        assert 6 * one.parameters * one.tokens == pytest.approx(64 * 459e12 * 0.5 * 10 * 86400)
        assert 12 * one.layers * one.dim**2 == pytest.approx(one.parameters, rel=0.1)
    assert found[0].tokens == 20 * found[0].parameters and found[0].parameters > found[-1].parameters


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--topology=v5x:2x2 --config={file}", "unknown chip 'v5x'; did you mean"),
        ("--topology=v5e --config={file}", "say a chip and how many"),
        ("--topology=v5e:4 --config={file}", "v5e is given by 2 sizes of at least 1, e.g. v5e:4x4"),
        ("--topology=h100:0 --config={file}", "at least 1"),
        ("--topology=h100:8", "no config"),
        ("--config={file}", "the following arguments are required: --topology"),
        ("--topology=h100:8 --config={file} --config.batch.sise=4", "did you mean 'size'"),
        ("--topology=h100:8 --config={file} --config.batch.size=6", "6 rows do not divide over the 8 devices"),
        ("--topology=h100:6 --config={file} --config.mesh.data=4", "does not divide the 6 devices"),
        ("--topology=h100:8 --budget", "--budget goes with --topology and --days=N"),
        ("--topology=h100:8 --budget --days=0", "--days must be above 0"),
        ("--topology=h100:8 --days=3 --config={file}", "--days goes with --budget"),
        ("--topology=h100:8 --config={file} --serch", "did you mean '--search'"),
    ],
)
def test_bad_input_is_one_line(capsys, line, told):
    file = ROOT / "configs" / "quickstart.py"
    assert cli.main(["plan", *line.format(file=file).split()]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and told in found.err


def test_the_command(capsys):
    words = ["plan", "--config", str(ROOT / "configs" / "llama2_7b.py"), "--topology=h100:64"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "ANALYTIC ESTIMATE: nothing was compiled" in text and "chip-hours" in text and "remat full" in text
    assert cli.main([*words, "--json", "--config.data.sources", "text:a", "text:b"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 6738415616 and found["memory"]["parameters"] == pytest.approx(
        4 * 6738415616 / 64, rel=1e-2
    )
    assert cli.main(["plan", "--budget", "--topology=v5e:16x16", "--days=7"]) == 0
    assert "assumed utilisation of 40%" in capsys.readouterr().out


def test_without_libtpu_a_tpu_is_estimated(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest)
    )
    assert cli.main(["plan", f"--config={ROOT}/configs/llama2_7b.py", "--topology=v5e:16x16"]) == 0
    text = capsys.readouterr().out
    assert "ANALYTIC ESTIMATE" in text and "libtpu" in text


WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'llm_jax[plan]'"
)


def planned(folder: Path, *words: str, transforms: str = "") -> dict[str, Any]:
    """The plan of a tiny decoder, made in a process of its own, as a user starts it."""
    (folder / "tiny.py").write_text(
        "from llm_jax.config import Batch, Mesh, Run\nfrom llm_jax.models.presets import llama\nfrom llm_jax.tasks import NextToken\n"
        "from llm_jax.transforms import offload_moments\n\n"
        "def get_config():\n    model = llama(remat='full', layers=3, dim=256, heads=2, mlp_dim=512, vocab_size=1024)\n"
        "    return Run(name='tiny', model=model, task=NextToken(), batch=Batch(8, 512), mesh=Mesh(data=1, fsdp=-1), steps=10,\n"
        f"               transforms=({transforms}))\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "llm_jax", "plan", f"--config={folder}/tiny.py", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@WITH_LIBTPU
def test_a_tpu_topology_is_compiled_for(tmp_path):
    """The estimate of what can be reckoned exactly is the compiler's."""
    compiled, estimated = (planned(tmp_path, "--topology=v5e:2x2", *extra) for extra in ((), ("--estimate",)))
    assert compiled["kind"] == "compiled" and estimated["kind"] == "analytic estimate"
    assert compiled["memory"]["parameters"] >= estimated["memory"]["parameters"] and compiled["memory"]["fits"]
    assert compiled["memory"]["parameters"] == pytest.approx(estimated["memory"]["parameters"], rel=0.01)  # whole tiles
    assert compiled["flops"]["model"] == estimated["flops"]["model"]
    assert compiled["flops"]["program"] == pytest.approx(estimated["flops"]["program"], rel=0.05)
    assert compiled["collectives"]["all-gather"]["payload"] > 0 and compiled["notes"] == []
    assert compiled["collectives"]["reduce-scatter"]["payload"] > 0  # of gradients, ring by ring


@pytest.mark.slow
@WITH_LIBTPU
def test_two_slices_are_compiled_for(tmp_path):
    """Gradients cross between the slices, of each device its part, and nothing else does."""
    words = ("--topology=2xv5e:2x2", "--config.mesh.data=2")
    found = planned(tmp_path, *words, transforms="offload_moments(),")
    least = 2 * found["parameters"] / 4  # half of it, in bfloat16, twice
    assert set(found["network"]) == {"all-reduce"} and least <= found["network"]["all-reduce"] <= 2 * least
    assert found["roofline"]["network"] == found["network"]["all-reduce"] / 3.125e9
    memory = found["memory"]
    assert memory["host"] >= 2 * memory["parameters"] and memory["optimizer"] < 2e4 and found["notes"] == []


@pytest.mark.parametrize(
    "told",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (17.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_the_compiler_refuses_is_planned_all_the_same(told):
    topology = chips.read_topology("v5e:2x4")
    mesh = sharding.make_mesh(RUN.mesh)
    run = program.resolve(RUN, mesh)
    made, state, batch = program.arguments(run, mesh)
    known = plan._known(run, topology, made, batch)
    found = plan._too_large(known, made, state, batch, RuntimeError(told))
    memory = found.memory
    assert not memory.fits and memory.peak == 17.5 * 2**30 and memory.limit == 15.75 * 2**30
    assert memory.parameters + memory.optimizer + memory.other + memory.rest == pytest.approx(memory.peak)
    assert "the compiler refused the step" in found.notes[0]
    with pytest.raises(RuntimeError, match="something else"):
        plan._too_large(known, made, state, batch, RuntimeError("something else"))
