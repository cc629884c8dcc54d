"""Whether a run goes on from what lies in its folder: the same config but for what may differ, the same start, the same data."""

import json
from typing import Any

from llm_jax import card as cards
from llm_jax import model as models
from llm_jax import saved
from llm_jax.config import Run, to_dict
from llm_jax.data.pipeline import check_fingerprint
from llm_jax.errors import CheckpointError
from llm_jax.models.config import ModelConfig
from llm_jax.parts import Parts
from llm_jax.platform import repeatable

FREE = (
    "steps",
    "log_every",
    "workdir",
    "eval",
    "checkpoint",
    "mesh",
    "data.workers",
    "data.max_dropped",
    "optimizer.max_nonfinite",
    "profile",
)
"""Keys that may differ between a run and its continuation; `check_fingerprint` judges the workers."""


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """The keys in which two configs differ, beside those that may."""
    if prefix in FREE:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for name in sorted({*there, *here})
            for line in _differences(there.get(name), here.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if there == here else [f"{prefix} is {json.dumps(there)} there and {json.dumps(here)} here"]


def _filled(there: Any, default: Any) -> Any:
    """A config with the values of keys that it lacks, since it was written before there were such keys."""
    if not (isinstance(there, dict) and isinstance(default, dict)):
        return there
    known = {name: _filled(x, default.get(name)) for name, x in there.items()}
    return {**json.loads(json.dumps(default)), **known}


def differences(there: dict[str, Any], run: Run) -> list[str]:
    """What of a run, whose config is resolved, may not differ from the config on a card and does; a key that came since then had its default."""
    usual = to_dict(Run(task=run.task, model=ModelConfig()))
    return _differences(_filled(there, usual), json.loads(json.dumps(to_dict(run))))


def _starts_from(start: str, parents: list[str]) -> bool:
    """Whether a run's start is the checkpoint whose weights have this hash."""
    try:
        kind, path = models.locate(start)
        return kind == "checkpoint" and [saved.params_hash(path)] == parents
    except CheckpointError:  # fresh, or none that can be told by its card
        return False


def check_continues(parts: Parts, card: cards.Card) -> None:
    """Raise unless the run continues the one with this card."""
    there = card["config"]
    if there["start"] != parts.run.start and _starts_from(parts.run.start, card["parents"]):
        there = {**there, "start": parts.run.start}  # moved, or spelt otherwise
    if different := differences(there, parts.run):
        raise CheckpointError(
            f"{parts.run.folder} holds a run of another config ({different[0]}): "
            "give this one another name or workdir, or remove that folder"
        )
    if (began := card.get("repeatable", False)) != repeatable():
        raise CheckpointError(
            f"{parts.run.folder} was begun {'with' if began else 'without'} LLM_JAX_REPEATABLE=1: "
            f"{'set' if began else 'unset'} it, or give this run another name or workdir"
        )
    if not parts.run.checkpoint.allow_changed_data:
        check_fingerprint(card["sources"], parts.train.fingerprint())
