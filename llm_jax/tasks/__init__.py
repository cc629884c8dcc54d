"""What a model is trained and judged on. One file a task; the contract is `base.Task`."""

import dataclasses
from typing import Any

from llm_jax.errors import ConfigError, choose
from llm_jax.tasks.classification import Classification
from llm_jax.tasks.masked_token import MaskedToken
from llm_jax.tasks.next_token import NextToken
from llm_jax.tasks.sequence_to_sequence import SequenceToSequence
from llm_jax.tasks.span_corruption import SpanCorruption

__all__ = ["Classification", "MaskedToken", "NextToken", "SequenceToSequence", "SpanCorruption"]


def from_dict(plain: dict[str, Any]) -> Any:
    """The task that `config.to_dict` wrote.

    >>> from_dict({"kind": "NextToken", "label_smoothing": 0.0, "z_loss": 0.0})
    NextToken(label_smoothing=0.0, z_loss=0.0, overlap=0)
    """
    kind = globals()[choose("task", plain["kind"], __all__)]
    fields = {f.name for f in dataclasses.fields(kind)}
    unknown = set(plain) - fields - {"kind"}
    if unknown:
        raise ConfigError(f"task {plain['kind']} has no {sorted(unknown)[0]!r}")
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in plain.items() if name != "kind"})
