"""What a run would take of chips that are not at hand: memory by part, operations, collectives, time and chip-hours.

For a TPU the real training step (`program.py`) is compiled ahead of time by libtpu, on the CPU of this machine, and its cost is read off
what was compiled. For GPUs, and where libtpu is not installed, `estimate.py` reckons it. `search.py` compares plans.
"""

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llm_jax import config, estimate, flops, hlo, hlo_cost, program, sharding, tree
from llm_jax.chips import Topology
from llm_jax.config import Run
from llm_jax.errors import UserError
from llm_jax.platform import planned_for

DAY = 86400


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float
    """its state, such as moments"""
    other: float
    """other arguments: the batch, counters, models that the loss reads"""
    rest: float
    """activations, gradients, gathered weights and whatever else the step needs at its peak beside its arguments"""
    host: float
    """in the memory of its host: moments and activations that wait there; no part of the peak"""
    peak: float
    limit: float
    """what the chip has for a program"""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the chip's memory."""
        return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step and a whole run take. Bytes, operations and seconds are of one device and one step unless said otherwise."""

    run: Run
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    compiled: bool
    """read off the compiled step; else an analytic estimate"""
    memory: Memory
    model_flops: float
    """operations that the model asks for: 6 a parameter and token, and attention"""
    flops: float
    """operations of the program, loops by their trips, kernels included"""
    traffic: float
    """bytes between the device and its memory"""
    payload: dict[str, float]
    """bytes that come out of each kind of collective"""
    sent: dict[str, float]
    """bytes that the device sends for them when each group forms a ring"""
    network: dict[str, float]
    """bytes that the device sends to other slices"""
    tokens: int
    """of a step, on all devices"""
    notes: tuple[str, ...] = ()

    @property
    def times(self) -> dict[str, float]:
        """Least seconds of a step by what could bind it, each at the chip's full rate."""
        chip = self.topology.chip
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "interconnect": sum(self.sent.values()) / chip.interconnect,
            **({"network": sum(self.network.values()) / chip.network} if self.topology.slices > 1 else {}),
        }

    @property
    def seconds(self) -> float:
        """Least seconds of a step: compute, memory, interconnect and network at the same time, the slowest binds."""
        return max(self.times.values())

    @property
    def utilisation(self) -> float:
        """Model operations over what the chip could do in the step's time: the most that the roofline allows."""
        return self.model_flops / self.seconds / self.topology.chip.flops


def prepare() -> None:
    """Keep jax and libtpu from looking for a TPU: this process is to use the CPU. Called before a device is touched."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside other plans, and beside a run that holds the TPU
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what is compiled for chips elsewhere cannot be read back here


def can_compile(topology: Topology) -> bool:
    """Whether the step can be compiled for these chips on this machine."""
    return topology.chip.platform == "tpu" and not lacks_compiler(topology)


def lacks_compiler(topology: Topology) -> bool:
    """Whether libtpu would be needed and is not installed."""
    return topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None


def devices_of(topology: Topology) -> Any:
    """The devices of a TPU topology, to compile for.

    Raises:
        UserError: libtpu knows no such topology, or cannot be loaded.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = (
        {"chip_config_name": "megacore"} if topology.slice.startswith("v4") else {}
    )  # else a device is half a chip
    try:
        options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.slice, **options).devices
    except Exception as e:
        raise UserError(f"topology {topology.name!r}: libtpu says {str(e).splitlines()[0]}") from e


def make(run: Run, topology: Topology, compiled: bool = True) -> Plan:
    """The plan of a run: compiled where that can be done and is asked for, else estimated.

    Raises:
        UserError: what in the config does not fit together, or does not fit the topology.
    """
    compiled = compiled and can_compile(topology)
    with planned_for(topology.chip.platform):
        if compiled:
            mesh: Any = sharding.make_mesh(run.mesh, devices_of(topology))
        else:
            mesh = sharding.abstract_mesh(run.mesh, topology.chips, topology.slices)
        run = program.resolve(run, mesh)
        made, state, batch = program.arguments(run, mesh)
        known = _known(run, topology, made, batch)
        return _compiled(known, made, state, batch) if compiled else _estimated(known, made, state, batch)


def variants(runs: Sequence[Run], topology: Topology) -> list[Plan]:
    """The estimated plans of runs that differ in the batch and in remat alone. Raises as `make`."""
    with planned_for(topology.chip.platform):
        mesh = sharding.abstract_mesh(runs[0].mesh, topology.chips, topology.slices)
        runs = [program.resolve(run, mesh) for run in runs]
        made, state, _ = program.arguments(runs[0], mesh)
        found = []
        for run in runs:
            assert run.model is not None
            one = dataclasses.replace(made, model=made.model.replace(remat=run.model.remat))
            batch = program.abstract_batch(run, mesh)
            found.append(_estimated(_known(run, topology, one, batch), one, state, batch))
        return found


def _known(run: Run, topology: Topology, made: program.Program, batch: dict[str, Any]) -> dict[str, Any]:
    """What a plan tells that needs no compiler."""
    shapes = {name: x.shape for name, x in batch.items()}
    return {
        "run": run,
        "topology": topology,
        "mesh": dict(made.mesh.shape),
        "parameters": tree.size(made.abstract.params),
        "model_flops": flops.train_flops(made.model, shapes) / topology.chips,
        "tokens": math.prod(shapes["tokens"]),
    }


def _compiled(known: dict[str, Any], made: program.Program, state: Any, batch: Any) -> Plan:
    """The plan of the step as libtpu compiles it."""
    chip, chips = known["topology"].chip, known["topology"].chips
    with jax.set_mesh(made.mesh):
        try:
            compiled, text = _compile(made.step.lower(state, batch))
        except jax.errors.JaxRuntimeError as e:
            return _too_large(known, made, state, batch, e)
    memory, notes = _memory(compiled, argument_bytes(compiled, state, batch), chip.memory)
    share = 0.5 if made.model.architecture == "decoder" else 1.0
    found = hlo_cost.cost(text, chips, share)
    notes += [f"not understood, counted as no operations or one turn: {name}" for name in found.unknown]
    return Plan(
        **known,
        compiled=True,
        memory=memory,
        flops=found.flops,
        traffic=found.memory + sum(found.summed("memory").values()),
        payload=found.summed("payload"),
        sent=found.summed("sent"),
        network=found.summed("sent", between=True),
        notes=tuple(notes),
    )


def _compile(lowered: Any) -> tuple[Any, str]:
    """The compiled program and its text, as the compiler itself writes it down.

    `compiled.as_text()` is not used: it fails on programs for v5p whose asynchronous collectives have several operands (libtpu 0.0.42).
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = Path(folder).glob("*.after_optimizations.txt")
        return compiled, max((path.read_text(encoding="utf-8") for path in texts), key=len)


def _memory(compiled: Any, parts: dict[str, float], limit: float) -> tuple[Memory, list[str]]:
    """What the compiler says of memory, and where it differs from the arguments by part.

    Its peak is that of both memories together, the host's arguments and values among it. Where there are such, the device's is no more than
    what it allots there: arguments, results that are not written over them, and the space for all else.
    """
    found = compiled.memory_analysis()
    away = parts.pop("host", 0.0)
    peak, given = float(found.peak_memory_in_bytes), float(found.argument_size_in_bytes)
    host = float(found.host_argument_size_in_bytes + found.host_temp_size_in_bytes)
    if host:
        made = found.output_size_in_bytes - found.alias_size_in_bytes
        peak = min(peak, given + made + found.temp_size_in_bytes)
    other = given - parts["params"] - parts["opt_state"]
    notes = [
        f"the arguments{where} by part are {told:.0f} bytes, those of the compiler {size:.0f}"
        for where, told, size in (
            ("", sum(parts.values()), given),
            (" on the host", away, found.host_argument_size_in_bytes),
        )
        if told != size
    ]
    return Memory(parts["params"], parts["opt_state"], other, peak - given, host, peak, limit), notes


def argument_bytes(compiled: Any, state: Any, batch: Any) -> dict[str, float]:
    """Bytes of a device by part of the state, and those of the batch, as the compiled step lays them out, whole tiles counted.

    What lies in the host's memory is counted as `host` and in no part.
    """
    formats, _ = compiled.input_formats
    total: Counter[str] = Counter()
    given = {**state._asdict(), "batch": batch}
    laid = {**formats[0]._asdict(), "batch": formats[1]}
    named = [(name, x) for name, part in given.items() for x in jax.tree.leaves(part)]
    forms = [form for part in laid.values() for form in jax.tree.leaves(part)]
    for (name, x), form in zip(named, forms, strict=True):
        if form.layout is None:  # the step does not read it
            continue
        shape, width = x.sharding.shard_shape(x.shape), x.dtype.itemsize
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, x)
            shape, width = (*shape, *data.shape[x.ndim :]), data.dtype.itemsize
        tile = tuple(form.layout.tiling[0]) if form.layout.tiling else ()
        away = x.sharding.memory_kind == "pinned_host"
        total["host" if away else name] += hlo.padded(shape, tuple(reversed(form.layout.major_to_minor)), tile) * width
    return {"params": 0.0, "opt_state": 0.0, **total}


def _too_large(known: dict[str, Any], made: program.Program, state: Any, batch: Any, error: Exception) -> Plan:
    """The plan of a step that the compiler refuses because it needs more memory than the chip has: estimated, but for the peak.

    Raises:
        Exception: the compiler's error where it is about something else.
    """
    needed = re.search(
        r"Used (\S+)([KMGT]) of (\S+)([KMGT]) hbm|\((\S+)([KMGT])\) exceeds available HBM \((\S+)([KMGT])\)", str(error)
    )
    if needed is None:
        raise error
    peak, peak_unit, limit, limit_unit = (x for x in needed.groups() if x is not None)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    plan = _estimated(known, made, state, batch)
    total = float(peak) * units[peak_unit]
    rest = total - plan.memory.peak + plan.memory.rest
    memory = dataclasses.replace(plan.memory, rest=rest, peak=total, limit=float(limit) * units[limit_unit])
    note = f"the compiler refused the step: it needs {peak}{peak_unit} or more of {limit}{limit_unit}; all but the peak is estimated"
    return dataclasses.replace(plan, memory=memory, notes=(note,))


def _estimated(known: dict[str, Any], made: program.Program, state: Any, batch: Any) -> Plan:
    """The plan by formulas."""
    run, chip = known["run"], known["topology"].chip
    found = estimate.step(run, made.model, dict(made.mesh.shape), state, batch, known["topology"])
    given = found.parameters + found.optimizer + found.other
    memory = Memory(
        found.parameters, found.optimizer, found.other, found.rest, found.host, given + found.rest, chip.memory
    )
    return Plan(
        **known,
        compiled=False,
        memory=memory,
        flops=found.flops,
        traffic=found.traffic,
        payload=found.payload,
        sent=found.sent,
        network=found.network,
    )


def whole_run(plan: Plan, seconds: float | None = None) -> dict[str, float]:
    """Tokens a day, days and chip-hours of all steps of the run, at the roofline's time of a step or at the one given.

    Of a run over epochs, whose steps are known when its data is read, tokens a day alone.
    """
    seconds = seconds or plan.seconds
    steps = plan.run.steps
    rate = {"tokens_per_day": plan.tokens / seconds * DAY}
    if plan.run.epochs:
        return rate
    return {
        **rate,
        "steps": steps,
        "tokens": float(plan.tokens * steps),
        "days": seconds * steps / DAY,
        "chip_hours": seconds * steps / 3600 * plan.topology.chips,
    }


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able data."""
    model = plan.run.model
    assert model is not None
    return {
        "name": plan.run.name,
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "kind": "compiled" if plan.compiled else "analytic estimate",
        "mesh": plan.mesh,
        "batch": config.to_dict(plan.run.batch),
        "remat": model.remat,
        "parameters": plan.parameters,
        "memory": {
            **dataclasses.asdict(plan.memory),
            "fits": plan.memory.fits,
            "free": plan.memory.limit - plan.memory.peak,
        },
        "flops": {"program": plan.flops, "model": plan.model_flops, "ratio": plan.flops / plan.model_flops},
        "traffic": plan.traffic,
        "collectives": {
            name: {"payload": plan.payload[name], "sent": plan.sent[name]} for name in sorted(plan.payload)
        },
        "network": plan.network,
        "roofline": {
            **plan.times,
            "seconds": plan.seconds,
            "bound": max(plan.times, key=lambda name: plan.times[name]),
            "utilisation": plan.utilisation,
        },
        "run": {"tokens_per_step": plan.tokens, **whole_run(plan)},
        "notes": list(plan.notes),
    }
