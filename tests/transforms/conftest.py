"""A small decoder, a batch whose rows weigh unequally, and the plain gradient of its objective, computed once."""

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from llm_jax import tree
from llm_jax.losses import GradFn, Loss
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.step import differentiate
from llm_jax.tasks import NextToken

FAST = {"xla_backend_optimization_level": 0}
SIZES = presets.llama(vocab_size=48, max_length=12, layers=2, dim=16, heads=4, kv_heads=2, mlp_dim=24)


class Problem(NamedTuple):
    """What a transform is tried on."""

    config: ModelConfig
    params: Any
    batch: dict[str, np.ndarray]
    loss: Any
    grad: GradFn
    whole: tuple[Loss, Any]
    """the loss and the gradient of the batch as a whole, by all params, on one device"""

    def run(self, grad: GradFn) -> tuple[Loss, Any]:
        """A GradFn on the batch as in training, compiled fast rather than to be fast."""
        return jax.jit(lambda *arguments: grad(*arguments, {}), compiler_options=FAST)(
            self.params, self.batch, jax.random.key(0)
        )


@pytest.fixture(scope="session")
def problem() -> Problem:
    def one(name: str, x: Any) -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape)
        return (1 + 0.2 * drawn if name.endswith("scale") else 0.3 * drawn).astype(np.float32)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (8, 13)).astype(np.int32)
    # from rows of full weight to rows of none: a mean of means over slices would be another objective
    weights = (np.arange(12) < np.array([12, 1, 0, 7, 3, 12, 2, 0])[:, None]).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    loss = NextToken(z_loss=1e-3).loss(SIZES)
    made = Problem(
        SIZES, tree.map_with_name(one, transformer.shapes(SIZES)), batch, loss, differentiate(loss), (None, None)
    )
    return made._replace(whole=jax.device_get(made.run(made.grad)))
