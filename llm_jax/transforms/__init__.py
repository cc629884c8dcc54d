"""Changes to a model or to how it is trained, as records of five pure functions. One file a transform."""

from llm_jax.transforms.anchor import anchor, fisher
from llm_jax.transforms.base import IDENTITY, Calibration, Growth, Transform, chain, mask, spell
from llm_jax.transforms.distil import cached, distil
from llm_jax.transforms.dropout import dropout
from llm_jax.transforms.extend_vocabulary import extend_vocabulary, pieces_of
from llm_jax.transforms.grow_depth import grow_depth
from llm_jax.transforms.grow_width import grow_width
from llm_jax.transforms.lengthen import lengthen
from llm_jax.transforms.lora import lora, merge_lora
from llm_jax.transforms.merge import merge
from llm_jax.transforms.moments import carry, carry_moments
from llm_jax.transforms.new_head import new_head
from llm_jax.transforms.offload_moments import offload_moments
from llm_jax.transforms.on_policy import on_policy
from llm_jax.transforms.prune import densify, keep_zeros, prune
from llm_jax.transforms.shrink import shrink, silence
from llm_jax.transforms.unfreeze import unfreeze

__all__ = [
    "IDENTITY",
    "Calibration",
    "Growth",
    "Transform",
    "anchor",
    "cached",
    "carry",
    "carry_moments",
    "chain",
    "densify",
    "distil",
    "dropout",
    "extend_vocabulary",
    "fisher",
    "grow_depth",
    "grow_width",
    "keep_zeros",
    "lengthen",
    "lora",
    "mask",
    "merge",
    "merge_lora",
    "new_head",
    "offload_moments",
    "on_policy",
    "pieces_of",
    "prune",
    "shrink",
    "silence",
    "spell",
    "unfreeze",
]
