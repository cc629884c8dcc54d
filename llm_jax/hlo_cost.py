"""What a compiled program asks of one device: operations, bytes of its memory, bytes of each kind of collective, all times the trips of loops.

XLA's own `cost_analysis` counts the body of a loop once and a kernel as nothing. Reading the text is `hlo.py`.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from llm_jax.hlo import Computation, Instruction, Module, Type, read, root, trips

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")

FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-done", "async-update", "copy-done", "add-dependency"),
    *("send", "recv"),
)
"""What moves nothing between a device and its memory, or is counted where it begins or inside"""


class Collective(NamedTuple):
    """One collective of a step."""

    kind: str
    payload: float
    """bytes of what comes out on a device: of an all-gather the whole, of a reduce-scatter the part"""
    sent: float
    """bytes that a device sends when its group forms a ring"""
    memory: float
    """bytes that it reads and writes in the device's memory"""
    between: bool = False
    """whether it is that part of a collective that goes over the network between slices"""


class Cost(NamedTuple):
    """What a computation costs each time it runs."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    """of them in kernels, which XLA does not see into"""
    memory: float = 0.0
    """bytes read and written in the device's memory, those of collectives left out"""
    collectives: dict[str, tuple[Collective, float]] = {}  # noqa: RUF012  (never written to)
    """collectives by the name of the instruction, and how often each takes place"""
    unknown: tuple[str, ...] = ()
    """kernels and loops that are not understood: they count as no operations, or as one turn"""

    def summed(self, what: str, between: bool = False) -> dict[str, float]:
        """Bytes of each kind of collective, within a slice or between slices: `payload`, `sent` or `memory`."""
        total: dict[str, float] = {}
        for one, count in (x for x in self.collectives.values() if x[0].between == between):
            total[one.kind] = total.get(one.kind, 0.0) + getattr(one, what) * count
        return total


def times(cost: Cost, count: float) -> Cost:
    """The cost of so many turns."""
    collectives = {name: (one, often * count) for name, (one, often) in cost.collectives.items()}
    return Cost(cost.flops * count, cost.kernel_flops * count, cost.memory * count, collectives, cost.unknown)


def plus(a: Cost, b: Cost) -> Cost:
    """The cost of both."""
    collectives = dict(a.collectives)
    for name, (one, often) in b.collectives.items():
        collectives[name] = (one, often + collectives.get(name, (one, 0.0))[1])
    return Cost(
        a.flops + b.flops,
        a.kernel_flops + b.kernel_flops,
        a.memory + b.memory,
        collectives,
        tuple(dict.fromkeys(a.unknown + b.unknown)),
    )


def _dot(x: Instruction, inside: Computation) -> float:
    """2 x values that come out x length of what is summed over."""
    left = inside[x.operands[0]].types[0]
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
    axes = [int(n) for n in summed[1].split(",") if n] if summed else []
    return 2 * x.types[0].size * math.prod(left.shape[axis] for axis in axes)


@functools.cache
def _met(size: int, kernel: int, out: int, stride: int, pad: int, dilated: int, kernel_dilated: int) -> int:
    """Pairs of a place that comes out and a place of the kernel between which there is a value, along one axis.

    XLA writes a batch axis of a product as an axis of a dilated convolution in which few pairs meet.
    """
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilated - pad
    return int(np.sum((places >= 0) & (places <= (size - 1) * dilated) & (places % dilated == 0)))


def _convolution(x: Instruction, inside: Computation) -> float:
    """2 x batch x features that come out x features that go in x pairs of places that meet."""
    left, kernel = (inside[name].types[0] for name in x.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    if labels is None:
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", x.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(name: str, axis: int, default: str) -> list[int]:
        parts = fields[name].split("x") if name in fields else []
        return [int(n) for n in (parts[axis] if axis < len(parts) else default).split("_")]

    total = 2.0 * x.types[0].shape[labels[3].index("b")] * x.types[0].shape[labels[3].index("f")]
    total *= kernel.shape[labels[2].index("i")]
    for axis in range(sum(c.isdigit() for c in labels[1])):
        total *= _met(
            left.shape[labels[1].index(str(axis))],
            kernel.shape[labels[2].index(str(axis))],
            x.types[0].shape[labels[3].index(str(axis))],
            field("stride", axis, "1")[0],
            field("pad", axis, "0_0")[0],
            field("lhs_dilate", axis, "1")[0],
            field("rhs_dilate", axis, "1")[0],
        )
    return total


def group(x: Instruction, devices: int) -> int:
    """How many devices take part in a collective, in each of the three forms in which XLA prints them.

    >>> of = lambda rest: group(Instruction("x", "f32[]", "all-reduce", (), rest, False), 8)
    >>> of("replica_groups={{0,1},{2,3}}"), of("replica_groups=[2,4]<=[8]"), of("replica_groups=mesh['a'=4,'b'=2] {'a'}"), of("")
    (2, 4, 4, 8)
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", x.rest)
    if listed:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[([\d,]+)\]<=", x.rest)
    if shaped:
        return int(shaped[1].split(",")[-1])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", x.rest)
    if meshed:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", meshed[2]))
    return devices


def _collective(x: Instruction, inside: Computation, devices: int, fused: bool) -> Collective:
    kind = x.opcode.removesuffix("-start")
    if kind == "all-reduce" and fused and {y.opcode for y in _used(inside, x.name)} == {"dynamic-slice"}:
        kind = "reduce-scatter"  # as TPU programs print it: a fusion that sums and keeps this device's part
    arrays = [t for name in x.operands if name in inside for t in inside[name].types]
    given, count = sum(t.bytes for t in arrays), group(x, devices)
    held = sum(t.held for t in arrays if t.space == 0)
    if kind == "all-gather":
        return Collective(kind, given * count, given * (count - 1), held * (count + 1))
    if kind == "collective-permute":
        return Collective(kind, given, given, 2 * held)
    share, made = (count - 1) / count, given / count if kind == "reduce-scatter" else given
    return Collective(kind, made, given * share * (2 if kind == "all-reduce" else 1), 2 * held)


def _between_slices(x: Instruction, inside: Computation) -> Collective | None:
    """The part of a collective that goes over the network between slices, as a TPU program prints it: sent to the host, which passes it on.

    >>> rest = 'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    >>> given = Instruction("a", "bf16[8,4]", "parameter", ("0",), "", False)
    >>> _between_slices(Instruction("x", "()", "send", ("a",), rest, False), {"a": given})
    Collective(kind='all-reduce', payload=64.0, sent=64.0, memory=128.0, between=True)
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', x.rest)
    if kind is None or target is None or x.operands[0] not in inside:
        return None
    ends = [[int(n) for n in part.split(":")] for part in target[1].split(",")]
    slices = sum(part[-1] - part[0] + 1 for part in ends)
    array = inside[x.operands[0]].types[0]
    name, share = kind[1].lower().replace("_", "-"), (slices - 1) / slices
    factor = {"all-reduce": 2 * share, "all-gather": slices - 1}.get(name, share)
    return Collective(name, array.bytes, factor * array.bytes, 2 * array.held, between=True)


def splash_products(name: str) -> int:
    """Products of the size of the scores in a kernel of splash attention, by its name.

    >>> splash_products("splash_mha_fwd_segmented_residuals"), splash_products("splash_mqa_dkv"), splash_products("other")
    (2, 4, 0)

    A kernel of all three gradients bears the name dkv too, and forms one more.
    """
    phase = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", name)
    return {"fwd": 2, "dkv": 4, "dq": 3}[phase[1]] if phase else 0


def kernel_flops(x: Instruction, inside: Computation, share: float) -> float | None:
    """Operations of a kernel: what it states of itself, else those of attention by its name and operands; None where neither tells.

    Args:
        share: of the pairs of a query and a key that an attention kernel visits, a half where it is causal.
    """
    stated = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', x.rest)
    if stated:
        return float(stated[1])
    products = splash_products(x.name) or splash_products(x.rest)
    arrays = [inside[name].types[0] for name in x.operands if name in inside]
    read = [t for t in arrays if len(t.shape) >= 3 and t.dtype[0] in "bf"]
    if not products or len(read) < 2:
        return None
    made = [t for t in x.types if len(t.shape) >= 3 and t.dtype[0] in "bf"]
    products += products == 4 and len(made) > 2
    return 2 * products * read[0].size * read[1].shape[-2] * share


def _moved(found: list[Type]) -> float:
    return sum(t.held for t in found if t.space == 0)


def _used(inner: Computation, name: str) -> list[Instruction]:
    """What reads a value of a fusion, bitcasts looked through."""
    found = []
    for x in inner.values():
        if name in x.operands:
            found += _used(inner, x.name) if x.opcode == "bitcast" else [x]
    return found


def _read_in_fusion(inner: Computation, parameter: Instruction, whole: float) -> float:
    """Bytes that a fusion reads of an operand: of one that it only cuts slices out of, the slices; of one it writes into, none."""
    total = 0.0
    for x in _used(inner, parameter.name):
        if x.opcode in ("dynamic-slice", "gather"):
            total += sum(t.held for t in x.types)
        elif x.opcode.removesuffix("-start") in COLLECTIVES or x.opcode == "custom-call":
            continue
        elif x.opcode != "dynamic-update-slice" or x.operands[0] != parameter.name:
            return whole
    return min(total, whole)


def _memory(module: Module, inside: Computation, x: Instruction) -> float:
    """Bytes that an instruction, a fusion counted as one, reads and writes in the device's memory."""
    if x.opcode in FREE or x.opcode.endswith("-done") or x.opcode.removesuffix("-start") in COLLECTIVES:
        return 0.0
    if x.opcode == "custom-call" and "AllocateBuffer" in x.rest:
        return 0.0
    if x.opcode == "copy-start":
        return _moved(x.types[:2])
    given = [_moved(inside[name].types) if name in inside else 0.0 for name in x.operands]
    made = _moved(x.types)
    inner = module.computations.get(x.called("calls") or "")
    if x.opcode == "fusion" and inner is not None:
        for parameter in (y for y in inner.values() if y.opcode == "parameter"):
            place = int(parameter.operands[0])
            given[place] = _read_in_fusion(inner, parameter, given[place])
        last = root(inner)
        parts = [inner.get(name) for name in last.operands] if last.opcode == "tuple" else [last]
        arrays = x.types if len(x.types) == len(parts) else []
        made = _moved(arrays) if arrays else made
        for part, array in zip(parts, arrays):
            if part is not None and part.opcode == "dynamic-update-slice" and part.operands[1] in inner:
                made -= _moved([array]) - min(inner[part.operands[1]].types[0].held, _moved([array]))
            elif part is not None and part.opcode.removesuffix("-start") in (*COLLECTIVES, "custom-call"):
                made -= _moved([array])
    elif x.opcode in ("dynamic-slice", "gather", "slice"):
        given[0] = min(given[0], made)
    elif x.opcode == "dynamic-update-slice":
        given[0], made = 0.0, given[1]
    return sum(given) + made


def _channel(x: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", x.rest)
    return found[1] if found else x.name


def _begins(x: Instruction, inside: Computation) -> bool:
    """Whether a collective that runs beside other work is printed here where it begins."""
    return any(x.name in y.operands and "AsyncCollectiveStart" in y.rest for y in inside.values())


def _begun(module: Module) -> frozenset[str]:
    """Channels of collectives that run beside other work: each is printed where it begins, in whatever runs meanwhile, and where it ends."""
    return frozenset(
        _channel(x)
        for inside in module.computations.values()
        for x in inside.values()
        if x.opcode in COLLECTIVES and _begins(x, inside)
    )


def _arithmetic(
    x: Instruction, inside: Computation, fused: bool, devices: int, share: float, begun: frozenset[str]
) -> Cost:
    """What an instruction computes or sends by itself, without what it calls.

    Args:
        begun: channels that count where they begin alone.
    """
    if x.opcode == "dot":
        return Cost(_dot(x, inside))
    if x.opcode == "convolution":
        return Cost(_convolution(x, inside))
    if x.opcode == "custom-call" and "tpu_custom_call" in x.rest:
        found = kernel_flops(x, inside, share)
        return Cost(found, found) if found is not None else Cost(unknown=(x.name,))
    if x.opcode.removesuffix("-start") in COLLECTIVES:
        one = _collective(x, inside, devices, fused)
        # In a fusion that does not begin it: one that ends it, or that runs beside it. A reduce-scatter is a fusion by itself.
        again = fused and one.kind != "reduce-scatter" and _channel(x) in begun and not _begins(x, inside)
        return Cost() if again else Cost(collectives={x.name: (one, 1.0)})
    if x.opcode == "send" and (crossing := _between_slices(x, inside)) is not None:
        return Cost(collectives={x.name: (crossing, 1.0)})
    return Cost()


def cost(text: str, devices: int = 1, attention_share: float = 0.5) -> Cost:
    """What one run of a program, as XLA prints it, costs one device.

    Args:
        devices: how many run it together.
        attention_share: of the pairs of a query and a key that an attention kernel visits.
    """
    module = read(text)
    begun = _begun(module)

    def calls(x: Instruction, inside: Computation, fused: bool) -> Cost:
        """What the computations that an instruction runs cost."""
        if x.opcode == "while":
            count = trips(module, inside, x)
            once = computation(x.called("body") or "", False)
            found = times(once, 1 if count is None else count)
            return found if count is not None else found._replace(unknown=(*found.unknown, x.name))
        if x.opcode == "conditional":
            named = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
            listed = named[1].split(",") if named else [x.called(f"{k}_computation") or "" for k in ("true", "false")]
            branches = [computation(name.strip().lstrip("%"), False) for name in listed]
            return max(branches, key=lambda c: (c.flops, c.memory))
        if x.opcode in ("fusion", "async-start"):
            return computation(x.called("calls") or "", fused or x.opcode == "fusion")
        if x.opcode == "call":
            return computation(x.called("to_apply") or "", fused)
        return Cost()

    @functools.cache
    def computation(name: str, fused: bool) -> Cost:
        inside = module.computations.get(name, {})
        total = Cost()
        for x in inside.values():
            for found in (_arithmetic(x, inside, fused, devices, attention_share, begun), calls(x, inside, fused)):
                total = plus(total, found) if found != Cost() else total
            if not fused:
                total = total._replace(memory=total.memory + _memory(module, inside, x))
        return total

    return computation(module.entry, False)
