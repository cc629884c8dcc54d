"""How much arithmetic a model asks for, and how much the hardware could do: what utilisation is measured against."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import chips, tree
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig


def forward_flops(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """2 N a token for the products with weights, and 4 S H E a token and layer for attention, half of it where it is causal.

    `shapes` are those of a batch: (B, S) of `tokens`, (B, U) of `encoder_tokens`, (B, M) of `predict`.
    """
    weights = transformer.shapes(config)

    def stack(side: str, skip: tuple[str, ...] = ()) -> float:
        return sum(
            tree.size(x)
            for name, x in zip(tree.names(weights[side]), jax.tree.leaves(weights[side]))
            if "norm" not in name and "bias" not in name and not any(s in name for s in skip)
        )

    rows, length = shapes["tokens"]
    width = config.heads * config.head_size
    total = 0.0
    if config.architecture == "encoder":
        total += rows * length * (2 * stack("encoder") + 4 * config.layers * length * width)
    if config.architecture == "decoder":
        total += rows * length * (2 * stack("decoder") + 2 * config.layers * length * width)
    if config.architecture == "encoder-decoder":
        source = shapes["encoder_tokens"][1]
        cross = tree.size(
            [
                x
                for name, x in weights["decoder"]["layers"]["cross"].items()
                if name.startswith(("key", "value")) and not name.endswith(("bias", "norm"))
            ]
        )
        total += rows * source * (2 * stack("encoder") + 4 * config.layers * source * width + 2 * cross)
        total += (
            rows * length * (2 * (stack("decoder") - cross) + config.decoder_depth * width * (2 * length + 4 * source))
        )
    if config.head in ("lm", "mlm"):
        asked = shapes.get("predict", shapes["tokens"])
        dense = config.dim**2 if config.head == "mlm" else 0
        total += 2 * asked[0] * asked[1] * (config.vocab_size * config.dim + dense)
    return total


def train_flops(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Three times the forward pass: the backward pass has two products for each of its products."""
    return _train_flops(config, tuple(shapes.items()))


@functools.cache
def _train_flops(config: ModelConfig, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> float:
    """Remembered, for it is asked at each step and traces the model's initialisation."""
    return 3 * forward_flops(config, dict(shapes))


def peak_flops(devices: Any) -> tuple[float, str]:
    """Operations a second that all the devices could do, and where the figure comes from.

    An accelerator's is its data sheet's; a CPU's is that of a float32 product of 1024-cubes, measured now. Unknown hardware gives 0.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measured(), "measured float32 matrix product"
    chip = chips.of_kind(kind)
    if chip is None:
        return 0.0, f"unknown device {kind!r}"
    return chip.flops * len(devices), "data sheet, bfloat16"


@functools.cache
def _measured(size: int = 1024, repeats: int = 8) -> float:
    """The best rate of a few products, over all cores."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
