"""How a model is trained on: a recipe (a run's config) with the model it starts from, the old and the new data, and the share of old rows."""

import dataclasses

from llm_jax import model
from llm_jax.config import Run
from llm_jax.errors import ConfigError


def continued(recipe: Run, start: str, old: str, new: str, replay: float) -> Run:
    """The recipe from `start` on `new`, a share `replay` of the pieces from `old`; the held-out loss of both is measured at every evaluation.

    The learning rate is the recipe's: its schedule warms up again and decays again (Ibrahim et al. 2024, 'Simple and scalable strategies to
    continually pre-train large language models', sections 4.1 and 4.2).

    Raises:
        ConfigError: a share that is none.
    """
    if not 0 <= replay < 1:
        raise ConfigError(f"replay is {replay}: it must lie in [0, 1)")
    data = dataclasses.replace(recipe.data, sources=(new, old), weights=(1 - replay, replay), heldout_sources=())
    return dataclasses.replace(recipe, start=start, model=None, data=data)


def retrained(recipe: Run, start: str, tokenizer: str, old: str, new: str) -> Run:
    """The recipe from fresh weights of the sizes of `start`, without transforms, on all documents of both sources alike.

    Args:
        tokenizer: where that of `start` lies as a file, so that losses a token can be compared.
    """
    data = dataclasses.replace(recipe.data, sources=(new, old), weights=(), heldout_sources=(), tokenizer=tokenizer)
    fresh = dataclasses.replace(recipe.schedule, initial=0.0)
    return dataclasses.replace(
        recipe, start="fresh", model=model.sizes(start), transforms=(), data=data, schedule=fresh
    )
