"""The whole loop in one command: is the model stale, train it on, is it better, does it take the name. Killed anywhere, it goes on from there.

What was done is in a folder of its own for each (incumbent, data, recipe, suite): one JSON file a stage, each written whole. A second call with
nothing changed finds its answer there, also where the name has moved to what the first one made, so that cron may call as often as one likes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_jax.config import Run, to_dict
from llm_jax.data.files import write_atomically
from llm_jax.data.sources import open_source
from llm_jax.errors import UserError
from llm_jax.lifecycle import drift as drifts
from llm_jax.lifecycle import gate as gates
from llm_jax.lifecycle.recipes import continued
from llm_jax.lifecycle.registry import RefusedError, Registry
from llm_jax.lifecycle.suite import load_suite
from llm_jax.storage import in_one_line


class BusyError(UserError):
    """Another update of the same name is under way."""


class NotCurrentError(UserError):
    """The update was refused, or the model is to be retrained."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Updated:
    """What an update came to."""

    outcome: str
    """left (nothing changed enough), retrain (the recipe cannot serve), promoted or refused"""
    why: str
    folder: str
    """where its stages, its run and its verdict lie"""
    stages: dict[str, Any]

    @property
    def status(self) -> int:
        """Of the command: 0 where the name stands for a model that is right for the data, else 1."""
        return 0 if self.outcome in ("left", "promoted") else 1


def update(
    name: str, recipe: Run, old: str, new: str, suite: str, replay: float, registry: Registry, force: bool = False
) -> Updated:
    """Drift, train, gate, promote: each stage once, whatever is killed in between.

    Args:
        name: in the registry, of the model that is kept current.
        recipe: the run that updates; its start, sources and weights are put in their place.
        old, new: sources, what the model knows and what came since.
        suite: the file of the gate's suite.
        replay: share of the pieces that are drawn from `old`.
        force: train although nothing drifted.

    Raises:
        BusyError: another update of this name is under way.
        UserError: whatever the stages raise, or a disk that refuses: never an OSError, whose status would tell of a refused model.
    """
    registry.history(name)  # an unknown name, or one that is none, makes no folder
    with in_one_line(registry.folder), _alone(registry.folder / "updates" / f"{name}.lock", name):
        incumbent = registry.resolve(name)
        asked: dict[str, Any] = {
            "name": name,
            "incumbent": incumbent.hash,
            "recipe": {key: x for key, x in to_dict(recipe).items() if key not in ("name", "workdir", "start")},
            "old": [old, open_source(old, recipe.data).fingerprint],
            "new": [new, open_source(new, recipe.data).fingerprint],
            "suite": load_suite(suite).fingerprint(),
            "replay": replay,
            "force": force,
        }
        stages = _Stages(_folder(registry.folder.absolute() / "updates" / name, asked))
        start = _kept(registry, name, stages.once("asked", lambda: asked)["incumbent"])
        found = stages.once("drift", lambda: dataclasses.asdict(drifts.drift(start, [old], [new])))
        if found["verdict"] == "leave" and not force:
            return stages.end("left", found["why"])
        if found["verdict"] == "retrain" and not force:
            return stages.end("retrain", found["why"])
        run = continued(recipe, start, old, new, replay)
        run = dataclasses.replace(run, name=f"{name}_{stages.folder.name}", workdir=str(stages.folder / "run"))
        stages.once("trained", lambda: _trained(run))
        verdict = stages.once("gate", lambda: _gated(str(run.folder), start, suite, registry))
        if not verdict["passed"]:
            return stages.end("refused", "; ".join(verdict["reasons"]))
        try:
            made = stages.once("promoted", lambda: _promoted(registry, name, str(run.folder), found["why"]))
        except RefusedError as e:  # the name has moved since
            return stages.end("refused", str(e))
        if incumbent.hash != made["hash"] and registry.resolve(name).hash != made["hash"]:
            return stages.end(
                "refused", f"{name!r} stood at what this update made, {made['hash'][:16]}, and was moved back since"
            )
        return stages.end("promoted", found["why"])


def _folder(updates: Path, asked: dict[str, Any]) -> Path:
    """Where the stages of what is asked lie; of an update that made the model which stands now, its own: it is not updated by the same data again."""
    for done in sorted(updates.glob("*/gate.json")):
        before = json.loads((done.parent / "asked.json").read_text(encoding="utf-8"))
        made = json.loads(done.read_text(encoding="utf-8"))["candidate"]
        if made == asked["incumbent"] and all(before[key] == x for key, x in asked.items() if key != "incumbent"):
            return done.parent
    return updates / hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def _kept(registry: Registry, name: str, content: str) -> str:
    """Where a version that the name stood for lies, by the registry as it is found now: it may have been moved since a stage was done."""
    model = next(move["model"] for move in registry.history(name) if move["hash"] == content)
    return str(registry.folder.absolute() / model)


class _Stages:
    """The results of stages, a file each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the stage gave, made now if it was not before."""
        path = self.folder / f"{stage}.json"
        if not path.exists():
            text = json.dumps(make(), indent=1, ensure_ascii=False)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.done[stage] = json.loads(path.read_text(encoding="utf-8"))
        return self.done[stage]

    def end(self, outcome: str, why: str) -> Updated:
        """The result of all."""
        return Updated(outcome, why, str(self.folder), self.done)


def _trained(run: Run) -> dict[str, Any]:
    """The run carried out; one that was begun goes on."""
    from llm_jax.loop import train

    result = train(run)
    return {"steps": result["steps"], "eval": result["eval"], "flops": result["flops"]}


def _gated(candidate: str, incumbent: str, suite: str, registry: Registry) -> dict[str, Any]:
    """The verdict on a candidate, on file in the registry before the stage is."""
    verdict = gates.gate(candidate, incumbent, load_suite(suite))
    registry.record_gate(verdict)
    return verdict


def _promoted(registry: Registry, name: str, candidate: str, why: str) -> dict[str, Any]:
    """The move; where a kill came between move and stage, it is found in the registry."""
    from llm_jax import checkpoint

    made = checkpoint.read_card(Path(candidate))["hashes"]["params"]
    if registry.resolve(name).hash != made:
        registry.promote(name, candidate, why=f"update: {why}")
    return {"hash": made}


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Hold a lock that goes with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BusyError(f"another update of {name!r} is under way") from e
        yield
