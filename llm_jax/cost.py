"""What a change of sizes saves: parameters, operations and measured time of a forward pass, before and after it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax import flops, tree
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params

REPEATS = 9
"""Forward passes timed of each model"""
MEASURED = 500_000_000
"""Parameters of two models up to which a run times them"""
SIZES = ("layers", "decoder_depth", "dim", "heads", "kv_heads", "head_size", "mlp_size", "vocab_size")
"""What decides a model's cost"""
HEADER = f"{'':<24}{'before':>12}{'after':>12}{'after/before':>14}"
WORK = "forward, GFLOP"
NO_SPEED_UP = "a dense product multiplies zeros too, so no speed-up is to be expected"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model costs."""

    parameters: int
    zeros: int
    """parameters that are 0"""
    flops: float
    """operations of the forward pass of one batch"""
    seconds: float
    """median time of it on this machine"""
    spread: tuple[float, float]
    """its first and third quartile"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models side by side. `str` of it is a table."""

    before: Cost
    after: Cost
    batch_shape: tuple[int, int]
    device: str
    same_shapes: bool
    """whether the two differ in the values of their weights alone"""

    @property
    def speedup(self) -> float:
        """Measured time before over time after."""
        return self.before.seconds / self.after.seconds

    def __str__(self) -> str:
        a, b = self.before, self.after
        lines = [
            HEADER,
            _row("parameters, M", a.parameters / 1e6, b.parameters / 1e6),
            *([_row("of them 0, M", a.zeros / 1e6, b.zeros / 1e6)] if a.zeros or b.zeros else []),
            _row(WORK, a.flops / 1e9, b.flops / 1e9),
            _row("forward, ms (measured)", a.seconds * 1e3, b.seconds * 1e3),
            f"medians of {REPEATS} passes over {self.batch_shape[0]} rows of {self.batch_shape[1]} tokens on {self.device}; quartiles "
            + " and ".join(f"{c.spread[0] * 1e3:.3g} to {c.spread[1] * 1e3:.3g} ms" for c in (a, b)),
        ]
        if self.same_shapes:
            lines.append(
                f"The shapes are equal, and {b.zeros / b.parameters:.1%} of the weights after are 0 ({a.zeros / a.parameters:.1%} before): "
                f"{NO_SPEED_UP}."
            )
        return "\n".join(lines)


def _row(name: str, before: float, after: float) -> str:
    ratio = f"{after / before:14.3f}" if before else f"{'-':>14}"
    return f"{name:<24}{before:>12.4g}{after:>12.4g}{ratio}"


def compare(
    before: ModelConfig,
    after: ModelConfig,
    batch_shape: tuple[int, int],
    params_before: Params | None = None,
    params_after: Params | None = None,
) -> Comparison:
    """Parameters, operations (`flops.forward_flops`) and the measured time of a jitted forward pass of two models.

    The passes of the two take turns, so that what else the machine does falls on both, after two passes each that are not counted.
    Weights that are not given are drawn: time hardly depends on their values.

    Args:
        before, after: the two sizes.
        batch_shape: (B, S), rows and tokens of a row; an encoder-decoder reads as many on both sides, images have an S of their own.
        params_before, params_after: the weights, whose zeros are counted.
    """
    models = []
    for config, params in ((before, params_before), (after, params_after)):
        weights = jax.device_put(_drawn(config) if params is None else params)
        models.append((config, weights, _forward(config, weights, batch_shape)))
    times = _times([run for *_, run in models])
    costs = [
        Cost(
            tree.size(params),
            sum(map(int, _zeros(params))),
            flops.forward_flops(config, _shapes(config, batch_shape)),
            statistics.median(seconds),
            (float(np.quantile(seconds, 0.25)), float(np.quantile(seconds, 0.75))),
        )
        for (config, params, _), seconds in zip(models, times)
    ]
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), params) for _, params, _ in models]
    shape = _shapes(before, batch_shape)["tokens"]
    return Comparison(costs[0], costs[1], shape, jax.devices()[0].device_kind, kinds[0] == kinds[1])


def peak_memory(config: ModelConfig, batch_shape: tuple[int, int]) -> int:
    """Bytes that a forward pass holds at once as it is compiled here: weights, batch, results and what lies between."""
    compiled = _compiled(config, transformer.shapes(config), batch_shape)[0]
    used = compiled.memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes


def told(before: ModelConfig, after: ModelConfig, batch_shape: tuple[int, int], pruned: Collection[str]) -> str:
    """What a run says of its transforms before its first step: the table of `compare` where sizes change, and that zeros save no time where
    weights are pruned.

    Args:
        pruned: the weights that are pruned, or will be.

    Passes are timed on one device; models of over half a billion parameters together are not, since both are held at once.
    """
    zeros = [f"pruned: {len(pruned)} stacks of matrices; {NO_SPEED_UP}"] if pruned else []
    if all(getattr(before, name) == getattr(after, name) for name in SIZES):
        return "\n".join(zeros)
    counts = [tree.size(transformer.shapes(config)) for config in (before, after)]
    if sum(counts) <= MEASURED:
        return "\n".join([str(compare(before, after, batch_shape)), *zeros])
    work = [flops.forward_flops(config, _shapes(config, batch_shape)) for config in (before, after)]
    rows = [_row("parameters, M", *(n / 1e6 for n in counts)), _row(WORK, *(n / 1e9 for n in work))]
    why = f"not timed: models of more than {MEASURED / 1e6:.0f}M parameters together"
    return "\n".join([HEADER, *rows, why, *zeros])


def _drawn(config: ModelConfig) -> Params:
    """Weights of no meaning, without a compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.02 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype), transformer.shapes(config)
    )


@jax.jit
def _zeros(params: Params) -> list[Array]:
    """How many values of each weight are 0."""
    return [jnp.sum(x == 0) for x in jax.tree.leaves(params)]


def _shapes(config: ModelConfig, batch_shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The shapes of a batch, as `forward_flops` reads them."""
    rows, length = batch_shape
    if config.patch_size:
        return {"tokens": (rows, config.patches + 1)}
    names = ("tokens", "encoder_tokens") if config.architecture == "encoder-decoder" else ("tokens",)
    return dict.fromkeys(names, (rows, length))


def _forward(config: ModelConfig, params: Params, batch_shape: tuple[int, int]) -> Callable[[], Any]:
    """A pass that waits for its result, compiled already."""
    compiled, batch = _compiled(config, params, batch_shape)
    return lambda: jax.block_until_ready(compiled(params, batch))


def _compiled(config: ModelConfig, params: Params, batch_shape: tuple[int, int]) -> tuple[Any, Any]:
    """A forward pass, compiled for weights of these shapes, and a batch for it."""
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {
        name: rng.integers(0, config.vocab_size, shape).astype(np.int32)
        for name, shape in _shapes(config, batch_shape).items()
    }
    if config.patch_size:
        batch = {"images": rng.standard_normal((batch_shape[0], config.image_size, config.image_size, 3), np.float32)}
    batch = jax.device_put(batch)

    def forward(params: Params, batch: Any) -> Any:
        found = transformer.apply(config, params, batch)
        return found.hidden if found.logits is None else found.logits

    return jax.jit(forward).lower(params, batch).compile(), batch


def _times(runs: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each pass of each model."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(-2, REPEATS):
        for run, seconds in zip(runs, times):
            start = time.perf_counter()
            run()
            if turn >= 0:
                seconds.append(time.perf_counter() - start)
    return times
