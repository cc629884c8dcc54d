"""A new task for a trained model: its head replaced by a fresh one."""

from typing import Any

from jaxtyping import Array

from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Transform

POOLER = ("pooler", "pooler_bias")


def new_head(head: str, labels: int = 0, pooler: str = "") -> Transform:
    """Embeddings and layers as they are, under a fresh head; a pooler that was trained is kept.

    Args:
        head: none, lm, mlm, classification or span.
        labels: classes of a classification head; 0 for as many as the config states.
        pooler: none, tanh or relu; empty for the model's own.
    """

    def config(sizes: ModelConfig) -> ModelConfig:
        return sizes.replace(head=head, labels=labels or sizes.labels, pooler=pooler or sizes.pooler)

    def params(sizes: ModelConfig, weights: Params, key: Array, aux: Any) -> Params:
        made = transformer.init(config(sizes), key).get("head", {})
        old = weights.get("head", {})
        kept = {name: old[name] for name in POOLER if name in made and name in old}
        body = {name: x for name, x in weights.items() if name != "head"}
        return {**body, "head": {**made, **kept}} if made else body

    label = ", ".join(
        [repr(head), *([f"labels={labels}"] if labels else []), *([f"pooler={pooler!r}"] if pooler else [])]
    )
    return Transform(config=config, params=params, label=f"new_head({label})")
