"""Accumulation over slices is exact: the loss, the metrics and the gradient of the whole batch, however unequal its
rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.losses import Loss
from llm_jax.models import transformer
from llm_jax.transforms import IDENTITY, chain
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.freeze import freeze

FAST = {"xla_backend_optimization_level": 0}


def means(found):
    """The objective, its metrics and its gradient: sums over tokens by their weight."""
    loss, gradient = found
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) / float(loss.weight), ((loss.total, loss.metrics), gradient)
    )


def close(found, expected, tolerance=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max()))),
        found,
        expected,
    )


@pytest.mark.parametrize("slices", [2, 8])
def test_the_sum_over_slices_is_the_whole(problem, slices):
    found = problem.run(accumulate(slices).grad(problem.grad))
    assert float(found[0].weight) == problem.batch["weights"].sum() == float(problem.whole[0].weight)
    close(means(found), means(problem.whole))


def test_a_mean_of_means_would_be_another_objective(problem):
    """The rows are so unequal that the tolerance above tells the two apart by far."""
    rows = [
        problem.run(
            lambda params, batch, *rest, i=i: problem.grad(
                params, {name: x[i : i + 4] for name, x in batch.items()}, *rest
            )
        )
        for i in (0, 4)
    ]
    losses = [float(loss.total / loss.weight) for loss, _ in rows]
    assert abs(np.mean(losses) - float(problem.whole[0].total / problem.whole[0].weight)) > 1e-3


def test_with_a_frozen_part(problem):
    change = chain(accumulate(4), freeze(["embed/.*", ".*/mlp/.*"]))
    found = problem.run(change.grad(problem.grad))
    (loss, gradient), (whole_loss, whole) = means(found), means(problem.whole)
    assert gradient["embed"]["tokens"] is None and gradient["decoder"]["layers"]["mlp"] == {
        "down": None,
        "gate": None,
        "up": None,
    }
    close(loss, whole_loss)
    close(gradient["head"], whole["head"])
    close(gradient["decoder"]["layers"]["attention"], whole["decoder"]["layers"]["attention"])


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_on_8_devices(problem, mesh, axes):
    """Slices hold as many rows of every device, whichever axes the mesh has."""
    here = mesh(**axes)
    shapes, names = transformer.shapes(problem.config), transformer.axes(problem.config)
    placed = sharding.params_shardings(here, names, shapes)
    batch = {name: np.concatenate([x, x[::-1]]) for name, x in problem.batch.items()}  # each row twice: the same means
    change = chain(accumulate(2), freeze(["embed/.*"]))
    with jax.set_mesh(here):
        grad = jax.jit(
            lambda params, batch: change.grad(problem.grad)(params, batch, jax.random.key(0), {}), compiler_options=FAST
        )
        found = grad(jax.device_put(problem.params, placed), sharding.put(batch, here))
    assert found[0].total.sharding.device_set == set(here.devices.flat)
    (loss, gradient), (whole_loss, whole) = means(found), means(problem.whole)
    close(loss, whole_loss)
    close({**gradient, "embed": None}, {**whole, "embed": None})
    assert gradient["embed"]["tokens"] is None


def test_slices_interleave_rows():
    """Rows i, i + n, ...: a slice of contiguous rows would lie on a part of the devices."""

    def grad(params, batch, key, reference):
        return Loss(jnp.max(batch["x"]), jnp.float32(len(batch["x"])), {"least": jnp.min(batch["x"])}), params

    loss, _ = accumulate(2).grad(grad)(jnp.zeros(()), {"x": jnp.arange(8.0)}, None, {})
    assert (float(loss.total), float(loss.metrics["least"]), float(loss.weight)) == (6 + 7, 0 + 1, 8)


def test_each_slice_has_a_key_of_its_own():
    def grad(params, batch, key, reference):
        return Loss(jax.random.uniform(key), jnp.float32(1), {}), params

    key = jax.random.key(3)
    loss, _ = accumulate(4).grad(grad)(jnp.zeros(()), {"x": jnp.zeros(8)}, key, {})
    draws = [float(jax.random.uniform(k)) for k in jax.random.split(key, 4)]
    assert len(set(draws)) == 4 and float(loss.total) == pytest.approx(sum(draws))


def test_the_reference_is_handed_to_every_slice():
    def grad(params, batch, key, reference):
        return Loss(reference["teacher"] * 1.0, jnp.float32(1), {}), params

    loss, _ = accumulate(4).grad(grad)(jnp.zeros(()), {"x": jnp.zeros(8)}, None, {"teacher": jnp.float32(5)})
    assert float(loss.total) == 20


def test_one_slice_is_the_identity():
    assert accumulate(1) is IDENTITY


def test_memory_is_that_of_a_slice(problem):
    """What the backward pass keeps shrinks with the slices."""

    def kept(slices):
        grad = accumulate(slices).grad(problem.grad)
        batch = {name: np.tile(x, (8, 1)) for name, x in problem.batch.items()}
        compiled = jax.jit(lambda params, batch: grad(params, batch, None, {})).lower(problem.params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept(8) < 0.4 * kept(1)
