"""Products with split weights: values and gradients as on one device, gradients put together by reduce-scatters, ring by ring."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config, losses, sharding
from llm_jax.models import layers, split
from llm_jax.models.heads import Outputs

AXES = ("embed", "heads", "head_size")


def products(x: jax.Array, w: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of sum(x w * by)."""
    return jax.grad(lambda x, w: jnp.sum(layers.contract(x, w, 1, AXES) * by), argnums=(0, 1))(x, w)


@pytest.fixture(scope="module")
def arrays():
    shapes = ((8, 6, 16), (16, 4, 3), (8, 6, 4, 3))
    return tuple(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))


def place(mesh, arrays):
    names = (("batch", "length", None), AXES, ("batch", "length", "heads", None))
    return tuple(jax.device_put(x, sharding.fitted(mesh, n, x.shape)) for x, n in zip(arrays, names))


SIZES = (config.Mesh(data=1, fsdp=8), config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=1, fsdp=4, context=2))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_those_of_one_device(sizes, arrays):
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        compiled = jax.jit(products, out_shardings=tuple(x.sharding for x in place(mesh, arrays)[:2])).lower(
            *place(mesh, arrays)
        )
        compiled = compiled.compile()
        found = compiled(*place(mesh, arrays))
    assert "reduce-scatter" in compiled.as_text()
    for one, other in zip(products(*arrays), found):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [6, 1])
def test_rows_that_the_mesh_does_not_divide_are_left_to_xla(rows, arrays):
    x, w, by = arrays[0][:rows], arrays[1], arrays[2][:rows]
    with jax.set_mesh(sharding.make_mesh(config.Mesh(data=1, fsdp=8))):
        assert split.split(x, w, AXES) is None
        found = jax.jit(products)(x, w, by)
    for one, other in zip(products(x, w, by), found):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def torus(shape: tuple[int, ...], order: tuple[int, ...]) -> SimpleNamespace:
    """The devices of a box of chips along the axis fsdp, the dimensions of the box from the slowest to the fastest in this order."""
    grid = np.moveaxis(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1), order, range(len(order)))
    line = [SimpleNamespace(coords=tuple(c)) for c in grid.reshape(-1, 3)]
    devices = np.empty((1, len(line), 1, 1), object)
    devices[0, :, 0, 0] = line
    return SimpleNamespace(devices=devices)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2), (8, 1, 1)])
def test_ring_by_ring_gives_each_device_its_own_part(shape, order, arrays, monkeypatch):
    groups = sharding.placed(torus(shape, order), lambda: sharding.rings("fsdp"))()
    assert sorted(len(g[0]) for g in groups) == sorted(n for n in shape if n > 1)
    monkeypatch.setattr(split, "rings", lambda axis: groups)
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        _, found = jax.jit(products)(*place(mesh, arrays))
    np.testing.assert_allclose(products(*arrays)[1], found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_over_three_dimensions_the_last_ring_is_gathered_first(order, monkeypatch):
    steps = sharding.placed(torus((2, 2, 2), order), lambda: sharding.gathers("fsdp"))()
    assert [len(groups[0]) for groups in steps] == [2, 4]
    assert len(sharding.placed(torus((2, 4, 1), order), lambda: sharding.gathers("fsdp"))()) == 1
    monkeypatch.setattr(split, "gathers", lambda axis: steps)
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=8))
    names, w = ("mlp", "embed"), np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    lying = jax.device_put(w, sharding.fitted(mesh, names, w.shape))
    with jax.set_mesh(mesh):
        gather = jax.jit(lambda w: split.whole(w, names)).lower(lying).compile()
        found = gather(lying)
    np.testing.assert_array_equal(found, w)
    assert found.sharding.is_fully_replicated and gather.as_text().count(" all-gather(") == 2


def test_an_axis_that_fills_no_box_is_one_group():
    line = torus((2, 4, 1), (0, 1, 2))
    line.devices = line.devices[:, [0, 1, 4, 5, 2, 3, 6, 7]]
    assert sharding.placed(line, lambda: sharding.rings("fsdp"))() == [[list(range(8))]]


def test_the_loss_gathers_its_table_and_sums_its_gradient_once(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 64 * 32)  # several chunks
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=4))
    key = jax.random.key(0)
    hidden, kernel = jax.random.normal(key, (8, 32, 16)), jax.random.normal(key, (64, 16))
    targets = jax.random.randint(key, (8, 32), 0, 64)

    def gradients(hidden, kernel):
        def total(hidden, kernel):
            return losses.cross_entropy(Outputs(hidden, None, kernel), targets, jnp.ones((8, 32)), z_loss=0.1).total

        return jax.grad(total, argnums=(0, 1))(hidden, kernel)

    placed = (
        jax.device_put(hidden, sharding.fitted(mesh, ("batch", "length", None), hidden.shape)),
        jax.device_put(kernel, sharding.fitted(mesh, losses.TABLE, kernel.shape)),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients, out_shardings=tuple(x.sharding for x in placed)).lower(*placed).compile()
        found = compiled(*placed)
    expected = gradients(hidden, kernel)
    text = compiled.as_text()
    assert text.count(" reduce-scatter(") == 1 and text.count(" all-gather(") == 1
    for one, other in zip(expected, found):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
