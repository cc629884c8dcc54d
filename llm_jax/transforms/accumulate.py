"""Gradient accumulation: the sum over slices of a batch, which is the gradient of the whole, at a slice's memory."""

import jax
import jax.numpy as jnp

from llm_jax.losses import GradFn
from llm_jax.transforms.base import IDENTITY, Transform


def accumulate(slices: int) -> Transform:
    """sum_i grad(rows i, i + n, ...) over n slices: exactly the gradient of the batch, since losses are sums over tokens.

    Slices interleave rows, so that each holds as many rows of every device.
    """
    if slices == 1:
        return IDENTITY

    def grad(inner: GradFn) -> GradFn:
        def summed(params, batch, key, reference):
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(x.shape[0] // slices, slices, *x.shape[1:]), 1, 0), batch
            )
            keys = None if key is None else jax.random.split(key, slices)

            def one(carry, part):
                found = inner(params, part[0], part[1], reference)
                return jax.tree.map(jnp.add, carry, found), None

            shapes = jax.eval_shape(
                lambda part: inner(params, *part, reference), jax.tree.map(lambda x: x[0], (parts, keys))
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.scan(one, zeros, (parts, keys))[0]

        return summed

    return Transform(grad=grad, label=f"accumulate({slices})")
