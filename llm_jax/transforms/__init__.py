"""Changes to a model or to how it is trained, as records of five pure functions. One file a transform."""

from llm_jax.transforms.base import IDENTITY, Calibration, Transform, chain
from llm_jax.transforms.merge import merge
from llm_jax.transforms.new_head import new_head
from llm_jax.transforms.unfreeze import unfreeze

__all__ = ["IDENTITY", "Calibration", "Transform", "chain", "merge", "new_head", "unfreeze"]
