"""Attention around the ring of the mesh axis context against the formula, on eight devices: values and gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import platform
from llm_jax.models import attention, presets, ring, transformer
from llm_jax.models.attention import Mask


def tensors(heads=4, kv=2, rows=4, length=32):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((rows, length, heads, 8), np.float32)
    k, v = (rng.standard_normal((rows, length, kv, 8), np.float32) for _ in range(2))
    lengths = rng.integers(1, 12, (rows, length))
    segments = np.stack([np.repeat(np.arange(1, length + 1), each)[:length] for each in lengths]).astype(np.int32)
    segments[:, -3:] = 0  # padding
    positions = np.stack(
        [np.concatenate([np.arange(n) for n in np.unique(s, return_counts=True)[1]]) for s in segments]
    )
    return (q, k, v), segments, positions


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "heads", "kv"),
    [
        (dict(context=8), 4, 2),
        (dict(data=2, context=2, tensor=2), 4, 2),
        (dict(fsdp=2, context=2, tensor=2), 4, 1),
        (dict(data=2, context=4), 6, 3),
    ],
    ids=str,
)
def test_the_ring_is_the_formula(mesh, sizes, heads, kv, causal, monkeypatch):
    monkeypatch.setattr(
        ring, "BLOCK", 4 if sizes.get("context") == 2 else 512
    )  # four blocks of queries a device, or one
    every, segments, _ = tensors(heads, kv)
    here = mesh(**sizes)
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    mask = Mask(segments, segments, index, index, causal)

    def expected(q, k, v):
        return attention._einsum(q, k, v, mask.allowed(), None, 0.3, 0.0, None, False)[0]

    def summed(function, *x):
        y = function(*x)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size), y

    with jax.set_mesh(here):
        found = functools.partial(summed, lambda q, k, v: ring.attend(q, k, v, segments, causal, 0.3, here))
        (_, y), gradient = jax.jit(jax.value_and_grad(found, argnums=(0, 1, 2), has_aux=True))(*every)
    (_, z), other = jax.jit(jax.value_and_grad(functools.partial(summed, expected), argnums=(0, 1, 2), has_aux=True))(
        *every
    )
    np.testing.assert_allclose(y, z, atol=1e-5)
    for a, b in zip(gradient, other):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_row_that_is_split_goes_around_the_ring(mesh):
    """And no device gathers the keys of the others: parts are passed on, and nothing else."""
    (q, k, v), segments, positions = tensors()
    here = mesh(context=8)
    mask = Mask(segments, segments, positions, positions, causal=True)
    with jax.set_mesh(here):
        where = jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec(None, "context"))
        placed = jax.device_put((q, k, v), where)
        text = jax.jit(lambda q, k, v: attention.attend(q, k, v, mask, scale=0.3)[0]).lower(*placed).compile().as_text()
    assert "collective-permute" in text and "all-gather(" not in text


@pytest.mark.parametrize("remat", ["full", "none"])
def test_no_mask_of_all_scores_is_kept(mesh, monkeypatch, remat):
    """What is hidden depends on numbers alone that no gradient flows through: a loop over layers would find it once for all and keep it."""
    monkeypatch.setattr(ring, "BLOCK", 8)
    config = presets.llama(
        layers=2, dim=32, heads=4, kv_heads=4, mlp_dim=64, vocab_size=64, max_length=128, remat=remat
    )
    tokens = jnp.ones((2, 128), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": tokens, "positions": jnp.broadcast_to(jnp.arange(128), tokens.shape)}

    def total(params):
        return transformer.apply(config, params, batch).hidden.astype(jnp.float32).sum()

    with jax.set_mesh(mesh(context=4)), platform.planned_for("tpu"):
        text = str(jax.make_jaxpr(jax.grad(total))(transformer.shapes(config)))
    masks = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"bool\[([\d,]+)\]", text)]
    assert masks and max(masks) == 2 * 4 * 8 * 32  # rows, heads, a block of queries, the keys of a device
