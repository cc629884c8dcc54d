"""Changes to a model or to how it is trained, as records of five pure functions. One file a transform."""

from llm_jax.transforms.base import IDENTITY, Transform, chain

__all__ = ["IDENTITY", "Transform", "chain"]
