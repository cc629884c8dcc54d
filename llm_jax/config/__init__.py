"""A run as data (`records.py`), and the strict reading of config files and overrides (`reading.py`).

Nothing here imports jax: a misspelt key is told before a device is touched. The sizes of the model live in `models/config.py`.
"""

from llm_jax.config.reading import load, load_record, override, parse, show
from llm_jax.config.records import (
    Batch,
    Checkpoint,
    Data,
    Eval,
    Mesh,
    Optimizer,
    Run,
    Schedule,
    fraction,
    positive,
    to_dict,
)

__all__ = [
    "Batch",
    "Checkpoint",
    "Data",
    "Eval",
    "Mesh",
    "Optimizer",
    "Run",
    "Schedule",
    "fraction",
    "load",
    "load_record",
    "override",
    "parse",
    "positive",
    "show",
    "to_dict",
]
