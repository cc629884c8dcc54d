"""The splash kernel, in Pallas' interpreter, against the formula: values and gradients, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import attention, splash


@pytest.mark.parametrize(
    ("sizes", "heads", "kv", "causal", "parts"),
    [
        ({}, 4, 2, True, 1),
        ({}, 4, 2, True, 0),
        ({}, 2, 2, False, 0),
        (dict(data=2, tensor=2), 4, 2, True, 1),
        (dict(fsdp=2, tensor=2), 4, 1, True, 0),
    ],
    ids=str,
)
def test_the_kernel_is_the_formula(mesh, monkeypatch, sizes, heads, kv, causal, parts):
    """Gradients by one kernel, as of rows of so few blocks, and by two."""
    monkeypatch.setattr(splash, "PARTS", parts)
    rng = np.random.default_rng(0)
    rows, length, size = 2, 256, 64
    q = rng.standard_normal((rows, length, heads, size), np.float32)
    k, v = (rng.standard_normal((rows, length, kv, size), np.float32) for _ in range(2))
    segments = np.repeat([[1, 2, 3, 0]], rows, axis=0).repeat([100, 60, 70, 26], axis=1).astype(np.int32)
    index = jnp.broadcast_to(jnp.arange(length), segments.shape)
    mask = attention.Mask(segments, segments, index, index, causal)
    here = mesh(**sizes)

    def kernel(q, k, v):
        return splash.attend(q, k, v, segments, causal, 0.125, here, interpret=True)

    def formula(q, k, v):
        return attention._einsum(q, k, v, mask.allowed(), None, 0.125, 0.0, None, False)[0]

    def summed(function, *x):
        y = function(*x)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size), y

    def both(function):
        return jax.jit(jax.value_and_grad(functools.partial(summed, function), argnums=(0, 1, 2), has_aux=True))

    (_, expected), other = both(formula)(q, k, v)
    with jax.set_mesh(here):
        (_, found), gradient = both(kernel)(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(gradient, other):
        np.testing.assert_allclose(a, b, atol=5e-5)
