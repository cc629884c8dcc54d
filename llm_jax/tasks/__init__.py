"""What a model is trained and judged on. One file a task; the contract is `base.Task`."""

from llm_jax.tasks.masked_token import MaskedToken
from llm_jax.tasks.next_token import NextToken
from llm_jax.tasks.sequence_to_sequence import SequenceToSequence
from llm_jax.tasks.span_corruption import SpanCorruption

__all__ = ["MaskedToken", "NextToken", "SequenceToSequence", "SpanCorruption"]
