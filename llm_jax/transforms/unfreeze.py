"""Gradual unfreezing: the layers of a trained model join its fine-tuning one after the other, from the head down."""

from typing import Any

import jax.numpy as jnp
import optax

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.models.transformer import depths
from llm_jax.transforms.base import Transform


def unfreeze(every: int) -> Transform:
    """Head and top layer move from the first step on, one layer more after each `every` steps, the embeddings last (ULMFiT, section 3.3).

    What still waits has its update set to zero, bit for bit; its moments gather meanwhile, so that it starts with them warm.

    Raises:
        ConfigError: `every` below 1.
    """
    if every < 1:
        raise ConfigError(f"unfreeze(every={every}): it must be at least 1")

    def update(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        rule = optax.with_extra_args_support(inner)

        def init(params: Any) -> Any:
            return {"step": jnp.zeros((), jnp.int32), "inner": rule.init(params)}

        def step(updates, state, params=None, **extra):
            updates, below = rule.update(updates, state["inner"], params, **extra)
            stage = 1 + state["step"] // every
            updates = tree.map_with_name(
                lambda _, u, depth: jnp.where(jnp.asarray(depth) <= stage, u, -0.0).astype(
                    u.dtype
                ),  # p + -0 is p, also where p is -0
                updates,
                depths(updates),
            )
            return updates, {"step": state["step"] + 1, "inner": below}

        return optax.GradientTransformationExtraArgs(init, step)

    return Transform(update=update, label=f"unfreeze(every={every})")
