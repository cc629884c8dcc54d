"""Where arrays live: the one mesh, the one table from logical axis names to mesh axes, and the shardings made of them.

The mesh has Auto axes with constraints at layer boundaries. Explicit axes were tried: Muon, Prodigy, D-Adaptation and GaLore of optax
contract or decompose sharded weights and are rejected by the type checker of shardings (`benchmarks/explicit_axes.py`).
`jax.jit` with these shardings is what was once called pjit.
"""

import contextvars
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax import config, tree
from llm_jax.errors import ConfigError
from llm_jax.platform import compile_anew

AXES = ("data", "fsdp", "tensor", "context")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "head_size": (),
    "layers": (),
    "hidden": (),
    "positions": (),
    "types": (),
    "labels": (),
    "buckets": (),
    "pixels": (),
    "rank": (),
}
"""Logical axis of an array -> mesh axes it is split over."""


def make_mesh(sizes: config.Mesh = config.Mesh(), devices: Any = None) -> jax.sharding.Mesh:
    """The mesh of the given sizes over all devices (or those given); an axis of -1 takes what the others leave.

    Over several CPUs it turns the compilation cache of this process off (`platform.compile_anew`).

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or TPU slices do not divide the axis data.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) > 1 and devices[0].platform == "cpu":
        compile_anew()
    slices = len({getattr(x, "slice_index", 0) for x in devices}) if devices[0].platform == "tpu" else 1
    shape = mesh_shape(sizes, len(devices), slices)
    placed = over_slices(shape, slices, devices) if slices > 1 else _arranged(shape, devices)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Any) -> np.ndarray:
    """The devices in an array of this shape, neighbours on an axis near each other: an axis that has them all goes through the torus row by row."""
    if max(shape) == len(devices) and all(hasattr(d, "coords") for d in devices):
        return np.array(sorted(devices, key=lambda d: (*d.coords, d.core_on_chip))).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def over_slices(shape: tuple[int, ...], slices: int, devices: Any) -> np.ndarray:
    """The devices of several TPU slices in the shape of the mesh: the axis data goes over the slices first, then within each.

    Only gradients are summed over it, once a step; all other axes stay within a slice, whose chips have a network of their own.
    """
    within = (shape[0] // slices, *shape[1:])
    own: dict[int, list[Any]] = {}
    for device in devices:
        own.setdefault(device.slice_index, []).append(device)
    return np.concatenate([_arranged(within, own[i]) for i in sorted(own)])


def mesh_shape(sizes: config.Mesh, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sizes of the mesh's axes over so many devices in so many slices. Raises as `make_mesh`."""
    wanted = [getattr(sizes, axis) for axis in AXES]
    known = int(np.prod([n for n in wanted if n > 0]))
    if devices % known or (-1 not in wanted and known != devices):
        named = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, wanted))
        raise ConfigError(f"mesh ({named}) does not divide the {devices} devices: its sizes multiply to {known}")
    shape = tuple(devices // known if n == -1 else n for n in wanted)
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data is {shape[0]}: it must be a multiple of the {slices} slices, since it alone goes over the network between them"
        )
    return shape


def abstract_mesh(sizes: config.Mesh, devices: int, slices: int = 1) -> Any:
    """A mesh of devices that are not at hand: shapes and places can be told from it, nothing compiled. Raises as `make_mesh`."""
    return jax.sharding.AbstractMesh(mesh_shape(sizes, devices, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names; a mesh axis is used once, by the first that claims it.

    >>> spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp"), "context", None)
    True
    """
    used: set[str] = set()
    parts: list[Any] = []
    for name in names:
        axes = tuple(a for a in RULES[name] if a not in used) if name is not None else ()
        used.update(axes)
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*parts)


def fitted_spec(mesh: Any, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The mesh axes of an array with logical axes `names`; an axis that its mesh axes do not divide is replicated."""
    parts = []
    for part, size in zip(spec(names), shape):
        axes = (part,) if isinstance(part, str) else part or ()
        parts.append(part if size % int(np.prod([mesh.shape[a] for a in axes])) == 0 else None)
    return PartitionSpec(*parts)


def fitted(mesh: jax.sharding.Mesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding by `fitted_spec` on a mesh."""
    return NamedSharding(mesh, fitted_spec(mesh, names, shape))


def params_shardings(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
    """The sharding of each parameter, from the tree of logical names and the tree of shapes."""
    return jax.tree.map(lambda x, names: fitted(mesh, names, x.shape), shapes, axes)


def state_shardings(mesh: jax.sharding.Mesh, state: Any, shapes: Any, params: Any) -> Any:
    """The sharding of each array of a train state, or of a part of one: for a moment that of the parameter whose path ends its own.

    What no parameter's path and shape explain, such as counters and factored moments, is replicated.

    Args:
        shapes, params: the shape and the sharding of each parameter.
    """
    known = {
        name: (x.shape, s) for name, x, s in zip(tree.names(shapes), jax.tree.leaves(shapes), jax.tree.leaves(params))
    }

    def one(name: str, x: Any) -> NamedSharding:
        parts = name.split("/")
        for i in range(len(parts)):
            shape, found = known.get("/".join(parts[i:]), (None, None))
            if shape == x.shape:
                return found
        return replicated(mesh)

    return tree.map_with_name(one, state)


def on_host(shardings: Any, arrays: Any) -> Any:
    """The same places in the memory of each device's host, for all but numbers."""
    return jax.tree.map(lambda s, x: s.with_memory_kind("pinned_host") if x.ndim else s, shardings, arrays)


def check_batch(mesh: jax.sharding.Mesh, rows: int, length: int) -> None:
    """Raise unless rows and length split evenly over the mesh.

    Raises:
        ConfigError: naming the axes that do not divide.
    """
    over = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % over:
        raise ConfigError(f"{rows} rows do not divide over the {over} devices of mesh axes data and fsdp")
    if length % mesh.shape["context"]:
        raise ConfigError(
            f"rows of {length} tokens do not divide over the {mesh.shape['context']} devices of mesh axis context"
        )


def batch_sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Rows (the first axis) over data and fsdp, tokens (the second) over context, where they divide."""
    names = ("batch", "length", *(None,) * len(shape))[: len(shape)]
    return fitted(mesh, names, shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out over the current mesh by its logical axis names; `x` itself where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted_spec(mesh, names, x.shape))


_PLACED: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar("placed", default=None)


def placed(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which knows the mesh's devices while it is traced: in there jax tells the mesh's sizes alone."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _PLACED.set(mesh)
        try:
            return function(*args, **kwargs)
        finally:
            _PLACED.reset(token)

    return traced


def rings(axis: str) -> list[list[list[int]]]:
    """The places along a mesh axis in groups, each a ring of the torus, for each of its dimensions in turn: what is scattered within the groups
    of the first, then of the second, and so on, lies along the axis in order.

    One group of all where the devices are no TPU's, do not fill a box, or are not known (`placed`).
    """
    mesh, at = _PLACED.get(), AXES.index(axis)
    size = jax.sharding.get_abstract_mesh().shape[axis] if mesh is None else mesh.devices.shape[at]
    line: Any = [] if mesh is None else np.moveaxis(mesh.devices, at, 0).reshape(size, -1)[:, 0]
    if not all(hasattr(d, "coords") for d in line):
        return [[list(range(size))]]
    places = np.array([d.coords for d in line]).reshape(-1, 3)
    sizes = [len(set(column)) for column in places.T]
    for order in itertools.permutations(i for i, n in enumerate(sizes) if n > 1):
        block, found = size, []
        for i in order:
            block //= sizes[i]
            if (np.ptp(places[:, i].reshape(-1, block), axis=1) > 0).any():
                break
            ring: dict[tuple[int, ...], list[int]] = {}
            for place, coordinates in enumerate(np.delete(places, i, axis=1)):
                ring.setdefault(tuple(coordinates), []).append(place)
            found.append(list(ring.values()))
        if block == 1 and len(found) == len(order) and found:
            return found
    return [[list(range(size))]]


def gathers(axis: str) -> list[list[list[int]]]:
    """The places along a mesh axis in groups, for each step in which what lies along it is gathered: one, but for a torus of three dimensions.

    There its last ring comes first, a small part of the bytes, and then the plane of the others: XLA makes a gather over three dimensions at
    once a whole all-reduce.
    """
    along = rings(axis)
    if len(along) < 3:
        return [[sorted(place for group in along[0] for place in group)]]
    last, size = along[-1], sum(map(len, along[-1]))
    step = len(last[0])
    return [last, [list(range(i, size, step)) for i in range(step)]]


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def rows_here(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(i, n): this process holds the i-th of n equal parts of the rows of every batch.

    Several processes hold the same part where the axis tensor or context lies across them.

    Raises:
        ConfigError: its devices hold rows that do not lie together, so that no part is its own.
    """
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    places = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))).addressable_devices_indices_map((count,))
    here = sorted({index[0].start or 0 for index in places.values() if index is not None})
    if count % len(here) or here != list(range(here[0], here[0] + len(here))) or here[0] % len(here):
        raise ConfigError(
            f"the devices of process {jax.process_index()} hold the parts {here} of {count} of the rows: the sizes of the mesh "
            "must be such that each process holds rows that lie together"
        )
    return here[0] // len(here), count // len(here)


def put(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The rows that this process holds of a batch (`rows_here`) as global arrays over the mesh."""
    part, parts = rows_here(mesh)

    def one(x: np.ndarray) -> jax.Array:
        shape, first = (len(x) * parts, *x.shape[1:]), len(x) * part

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), piece)

    return {name: one(x) for name, x in batch.items()}
