"""Compiled programs as XLA prints them: computations, instructions, types, and how often a loop runs. What they cost is `hlo_cost.py`.

The text is that of `compiled.as_text()` after optimisation and partitioning: what one device does.
"""

import functools
import math
import re
from typing import NamedTuple


class Type(NamedTuple):
    """An array's type and how it lies in memory."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """its axes from minor to major"""
    tile: tuple[int, ...]
    """of the minor axes; empty where there are no tiles"""
    space: int
    """memory in which it lies: 0 the device's main memory, 1 on TPU the chip's own, 5 that of the host"""

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """What its values take by themselves: what crosses a network."""
        return self.size * width(self.dtype)

    @property
    def held(self) -> float:
        """What it takes in memory, filled up to whole tiles."""
        return padded(self.shape, self.order, self.tile) * width(self.dtype)


def width(dtype: str) -> float:
    """Bytes of a value by the name that XLA gives its type.

    >>> width("bf16"), width("pred"), width("s4"), width("f8e4m3fn"), width("token")
    (2.0, 1.0, 0.5, 1.0, 0.0)
    """
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else float(dtype == "pred")


def padded(shape: tuple[int, ...], order: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """Values of an array whose minor axes are filled up to whole tiles; of a scalar a tile.

    >>> padded((6, 5, 7), (2, 1, 0), (8, 128)), padded((), (), (128,)), padded((5, 7), (1, 0), ())
    (6144, 128, 35)
    """
    sizes = [shape[axis] for axis in order]
    sizes += [1] * (len(tile) - len(sizes))
    for i, length in enumerate(reversed(tile)):
        sizes[i] = -(-sizes[i] // length) * length
    return math.prod(sizes)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    """as text, that of a tuple in brackets"""
    opcode: str
    operands: tuple[str, ...]
    """names of instructions of the same computation; of a constant or a parameter what stands there"""
    rest: str
    """attributes as text"""
    root: bool

    @property
    def types(self) -> list[Type]:
        """The array, or the arrays of a tuple."""
        return types(self.type)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]
"""Its instructions by name, in order"""


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str


_TYPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")


@functools.lru_cache(2**14)
def _types(text: str) -> tuple[Type, ...]:
    found = []
    for dtype, shape, layout in _TYPE.findall(text):
        sizes = tuple(int(n.strip("<= ")) for n in shape.split(",") if n.strip())
        order = tuple(int(n) for n in layout.partition(":")[0].split(",") if n)
        tile, space = re.search(r"T\(([\d,]+)\)", layout), re.search(r"S\((\d+)\)", layout)
        found.append(
            Type(
                dtype,
                sizes,
                order if len(order) == len(sizes) else tuple(reversed(range(len(sizes)))),
                tuple(map(int, tile[1].split(","))) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def types(text: str) -> list[Type]:
    """The arrays of a type.

    >>> types("(f32[2,3]{1,0:T(8,128)S(1)}, u32[])")[0]
    Type(dtype='f32', shape=(2, 3), order=(1, 0), tile=(8, 128), space=1)
    """
    return list(_types(text))


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if named is None:
        return None
    at = named.end()
    stop = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", stop)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(w.strip() for w in inside.split(",") if w.strip())
    return Instruction(
        named[2], line[at:stop], line[stop:opening].strip(), operands, line[closing + 1 :], bool(named[1])
    )


def read(text: str) -> Module:
    """The program that XLA printed."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if inside is None:
            header = _HEADER.match(line)
            if header:
                inside = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif re.match(r"\}(,|$)", line):
            inside = None
        else:
            found = _instruction(line)
            if found is not None:
                inside[found.name] = found
            elif inside:  # the attributes of a kernel go on over several lines
                last = next(reversed(inside))
                inside[last] = inside[last]._replace(rest=inside[last].rest + line)
    return Module(computations, entry)


def root(computation: Computation) -> Instruction:
    """What a computation gives."""
    return next((x for x in computation.values() if x.root), list(computation.values())[-1])


_SAME = ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape", "opt-barrier")
"""What gives the value of its first operand"""


def _traced(module: Module, computation: Computation, name: str, bound: tuple[str, ...] = ()) -> tuple[str, str | int]:
    """Where a value comes from: ("constant", its text), ("element", its place in a loop's state) or ("value", its name).

    Args:
        bound: inside a fusion, the operands outside for its parameters.
    """
    x = computation.get(name)
    while x is not None and x.opcode in _SAME:
        x = computation.get(x.operands[0])
    if x is None:
        return "value", name
    if x.opcode == "constant":
        return "constant", x.operands[0] if x.operands else ""
    if x.opcode == "get-tuple-element":
        return "element", int((re.search(r"index=(\d+)", x.rest) or ["", "-1"])[1])
    if x.opcode == "parameter" and bound:
        return "bound", bound[int(x.operands[0])]
    return "value", x.name


def _bound(module: Module, outer: Computation, x: Instruction) -> tuple[Instruction, list[tuple[str, str | int]]]:
    """The instruction that makes a value, looked up in a fusion where it is one, and where its operands come from."""
    inner = module.computations.get(x.called("calls") or "")
    if x.opcode != "fusion" or inner is None:
        return x, [_traced(module, outer, name) for name in x.operands]
    made, found = root(inner), []
    for name in made.operands:
        kind, value = _traced(module, inner, name, x.operands)
        found.append(_traced(module, outer, str(value)) if kind == "bound" else (kind, value))
    return made, found


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs: what XLA states, else by its condition on a counter; None where neither tells."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated:
        return int(stated[1])
    condition = module.computations.get(loop.called("condition") or "", {})
    body = module.computations.get(loop.called("body") or "", {})
    if not condition or not body:
        return None
    before = computation.get(loop.operands[0])

    def begin(place: int) -> int | None:
        """The value of an element of the state before the loop, where it is a constant."""
        if before is None or before.opcode != "tuple":
            return None
        kind, value = _traced(module, computation, before.operands[place])
        return int(value) if kind == "constant" and re.fullmatch(r"-?\d+", str(value)) else None

    def number(source: tuple[str, str | int]) -> int | None:
        kind, value = source
        if kind == "element":
            return begin(int(value))
        return int(value) if kind == "constant" and re.fullmatch(r"-?\d+", str(value)) else None

    compare, sides = _bound(module, condition, root(condition))
    direction = re.search(r"direction=(\w\w)", compare.rest)
    if compare.opcode != "compare" or direction is None:
        return None
    after = root(body)

    def step(place: int) -> int | None:
        """What a turn adds to an element of the state; None where it is not a counter."""
        made = body.get(after.operands[place]) if after.opcode == "tuple" else None
        while made is not None and made.opcode in _SAME:
            made = body.get(made.operands[0])
        if made is None:
            return None
        made, parts = _bound(module, body, made)
        if made.opcode not in ("add", "subtract") or parts[0] != ("element", place):
            return None
        added = number(parts[1])
        return None if added is None else added if made.opcode == "add" else -added

    for (kind, place), other, flipped in ((sides[0], sides[1], False), (sides[1], sides[0], True)):
        if kind != "element":
            continue
        by, first, last = step(int(place)), begin(int(place)), number(other)
        if by and first is not None and last is not None:
            return _count(first, last, by, direction[1], flipped)
    return None


def _count(first: int, last: int, by: int, direction: str, flipped: bool) -> int | None:
    """Turns of a counter from `first` by steps while it compares so with `last`."""
    if flipped:
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if direction in ("LE", "GE"):
        last += 1 if direction == "LE" else -1
    if direction in ("EQ",) or (last - first) * by < 0:
        return 0
    return -(-(last - first) // by)
