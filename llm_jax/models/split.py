"""Products with weights that lie split over the mesh axis fsdp: whole while a layer needs them, their gradients summed part by part.

Left to itself XLA sums such a gradient whole on every device, of which each then keeps its part: twice the bytes of a reduce-scatter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from llm_jax.sharding import constrain, fitted_spec, gathers, rings, spec

AXIS = "fsdp"
ROWS = ("data", "fsdp", "context")
"""The mesh axes that the rows and tokens of a batch lie over"""

Product = Callable[[Array, Array], Array]
"""(x (B, S, ...), w) -> y (B, S, ...), linear in each"""


def whole(w: Array, names: tuple[str | None, ...]) -> Array:
    """`w` gathered along fsdp, still split over the other axes of the mesh that its names say. It has no gradient of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    places = () if mesh.empty or mesh.manual_axes else fitted_spec(mesh, names, w.shape)
    if AXIS in places and len(steps := gathers(AXIS)) > 1:
        axis = places.index(AXIS)

        def each(w: Array) -> Array:
            for groups in steps:
                w = jax.lax.all_gather(w, AXIS, axis=axis, axis_index_groups=groups, tiled=True)
            return w

        lies = PartitionSpec(*(None,) * axis, AXIS)
        w = jax.shard_map(
            each, mesh=mesh, in_specs=lies, out_specs=PartitionSpec(), axis_names={AXIS}, check_vma=False
        )(w)
    return constrain(w, *(None if AXIS in _axes(name) else name for name in names))


def _axes(name: str | None) -> tuple[str, ...]:
    (part,) = spec((name,))
    return (part,) if isinstance(part, str) else part or ()


def split(x: Any, w: Any, names: tuple[str | None, ...]) -> int | None:
    """The axis of `w` that lies over fsdp, where the rows of `x` lie over the mesh too; None where there is nothing to put together."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[AXIS] == 1 or mesh.manual_axes or x.ndim < 3:
        return None
    if None in row_spec(x):
        return None
    places = fitted_spec(mesh, names, w.shape)
    return next((i for i, place in enumerate(places) if place == AXIS), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def multiply(product: Product, x: Array, w: Array, names: tuple[str | None, ...], axis: int) -> Array:
    """product(x, w) with `w` gathered in the type of x; its gradient leaves as a reduce-scatter along `axis`."""
    return product(x, whole(w.astype(x.dtype), names))


def _forward(product: Product, x: Array, w: Array, names: tuple[str | None, ...], axis: int) -> tuple[Array, Any]:
    return multiply.fun(product, x, w, names, axis), (x, w)


def _backward(product: Product, names: tuple[str | None, ...], axis: int, kept: Any, dy: Array) -> tuple[Array, Array]:
    x, w = kept
    gathered = whole(w.astype(x.dtype), names)
    (dx,) = jax.linear_transpose(lambda x: product(x, gathered), x)(dy)
    return dx, scattered(product, x, dy, jax.ShapeDtypeStruct(w.shape, x.dtype), axis).astype(w.dtype)


multiply.defvjp(_forward, _backward)


def scattered(product: Product, x: Array, dy: Array, w: Any, axis: int) -> Array:
    """The gradient of sum(product(x, w) * dy) by w: each device that of its rows, put together over the mesh and split along `axis`."""

    def each(x: Array, dy: Array) -> Array:
        (dw,) = jax.linear_transpose(lambda w: product(x, w), w)(dy)
        return reduce_scatter(dw, axis)

    rows = row_spec(x)
    return on_rows(each, (rows, rows), PartitionSpec(*(None,) * axis, AXIS))(x, dy)


def row_spec(x: Any) -> PartitionSpec:
    """Where the rows and tokens of `x` (B, S, ...) lie."""
    return fitted_spec(jax.sharding.get_abstract_mesh(), ("batch", "length"), x.shape[:2])


def on_rows(function: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
    """The function on each device's rows and tokens, which sums over devices itself; what it reads and makes lies as the specs say.

    The axis tensor stays XLA's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=made, axis_names=set(ROWS), check_vma=False)


def reduce_scatter(x: Array, axis: int) -> Array:
    """The sum of `x` over all rows, each device's part of it along `axis`: ring by ring of the torus, since a TPU scatters along one ring only.

    Over several at once XLA makes it a whole all-reduce, twice the bytes.
    """
    for groups in rings(AXIS):
        x = jax.lax.psum_scatter(x, AXIS, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return jax.lax.psum(x, tuple(name for name in ROWS if name != AXIS))
