"""The one train loop: takes the steps of a run, saves, evaluates, and tells where everything lies.

The loop knows no task, no transform and no optimizer: they come as functions (`parts.py`). What is exact is kept so by the step number
alone: keys are folded from it, and the place in the data is saved beside the weights.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import card as cards
from llm_jax import checkpoint, evaluate, flops, generation, optim, sharding, step
from llm_jax import log as logs
from llm_jax.config import Run, show, to_dict
from llm_jax.data.accounting import Accounting
from llm_jax.data.pipeline import check_fingerprint
from llm_jax.errors import CheckpointError, NonFiniteError, choose
from llm_jax.parts import Parts, build, describe
from llm_jax.platform import gather, setup

log = logging.getLogger(__name__)

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
)
"""Keys that may differ between a run and its continuation; `check_fingerprint` judges the workers."""


def train(run: Run) -> dict[str, Any]:
    """Carry out a run, from its newest checkpoint if its folder holds one; returns what result.json holds.

    Raises:
        UserError: something that the user can mend; earlier checkpoints stay.
    """
    setup()
    begin = time.time()
    parts = None
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        parts = build(run)
        with jax.set_mesh(parts.mesh):
            return _Session(parts).carry_out(begin)
    except OSError as e:
        if checkpoint.is_full(e):
            raise CheckpointError(
                f"no space left on the disk of {run.folder}: the run stopped; its earlier checkpoints are intact"
            ) from e
        if isinstance(e.filename, str) and _concerns(Path(e.filename).absolute(), run.folder.absolute()):
            raise CheckpointError(f"cannot write {e.filename}: {e.strerror}") from e
        raise
    finally:
        if parts is not None:
            parts.close()


def _concerns(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder or on the way to it."""
    return path.is_relative_to(folder) or folder.is_relative_to(path)


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


def _check_continues(parts: Parts, card: cards.Card) -> None:
    """Raise unless the run continues the one with this card."""
    different = _differences(card["config"], json.loads(json.dumps(to_dict(parts.run))))
    if different:
        raise CheckpointError(
            f"{parts.run.folder} holds a run of another config ({different[0]}): "
            "give this one another name or workdir, or remove that folder"
        )
    if not parts.run.checkpoint.allow_changed_data:
        check_fingerprint(card["sources"], parts.train.fingerprint())


def _kept(state: step.TrainState) -> tuple[Any, dict[str, Any]]:
    """What a checkpoint holds: the weights to evaluate, and the rest, with the trained weights where they are others."""
    params = optim.eval_params(state.opt_state, state.params)
    left = ("reference", "params") if params is state.params else ("reference",)
    return params, {name: x for name, x in state._asdict().items() if name not in left}


class _Session:
    """One carrying out of a run."""

    def __init__(self, parts: Parts):
        self.parts, self.run = parts, parts.run
        self.lead = jax.process_index() == 0
        self.saved = checkpoint.Checkpoints(self.run.folder, self.run.checkpoint)
        self.results: dict[str, Any] = {}
        self.pending: list[tuple[int, Any, dict[str, Any]]] = []
        self.state = self._begin()
        self.start = self.at = int(self.state.step)
        self.peak, self.peak_source = flops.peak_flops(list(parts.mesh.devices.flat))
        if self.lead:
            (self.run.folder / "config.json").write_text(json.dumps(to_dict(self.run), indent=1), encoding="utf-8")
            parts.tokenizer.save(self.run.folder / "tokenizer.json")
        self.metrics = logs.Metrics(self.run.folder, self.start, self.run.steps, silent=not self.lead)
        self.lap = time.perf_counter()

    def _begin(self) -> step.TrainState:
        """The state of the newest checkpoint with all that belongs to it, else a fresh one."""
        parts = self.parts
        params, rest = jax.eval_shape(_kept, parts.abstract)
        placed = parts.shardings._asdict()
        found = self.saved.restore(
            checkpoint.abstract_like(params, placed["params"]),
            {name: checkpoint.abstract_like(x, placed[name]) for name, x in rest.items()},
            lambda card: _check_continues(parts, card),
        )
        self.resumed = found is not None
        if found is None:
            self.accounting, self.counts = Accounting(), {"tokens": 0.0, "flops": 0.0}
            state, self.parents = parts.init()
            return state
        places = found.data["loader"]
        parts.train.set_state(places[jax.process_index() % len(places)])
        self.accounting = Accounting(found.data["accounting"] if self.lead else None)
        self.counts = {name: found.card[name] for name in ("tokens", "flops")}
        self.results, self.parents = found.card["results"], found.card["parents"]
        return step.TrainState(**{"params": found.params, **found.state})

    def carry_out(self, begin: float) -> dict[str, Any]:
        """All remaining steps, then the last evaluation."""
        run = self.run
        try:
            self.metrics.say(f"{show(run)}\n{describe(self.parts)}")
            if self.resumed:
                self.metrics.say(f"resuming {run.folder} at step {self.start}")
            while self.at < run.steps:
                self.one_step()
                last = self.at == run.steps
                if last or (run.eval.every and self.at % run.eval.every == 0):
                    self.evaluate(0 if last else run.eval.batches)
                if last or self.at % run.checkpoint.every == 0:
                    self.save()
            if self.at == self.start:
                self.evaluate(0)
                if not self.resumed:
                    self.save()
            Accounting(self.totals()).check(run.data.max_dropped, final=True)
            self.saved.wait()
            return self.finish(begin)
        except BaseException:
            self.saved.abandon()
            raise
        finally:
            self.metrics.close()

    def one_step(self) -> None:
        """Take a batch and a step; read the metrics of the step before, so that the device is never waited for."""
        before = time.perf_counter()
        rows = next(self.parts.train)
        waited = time.perf_counter() - before
        self.accounting.add(rows.account)
        self.accounting.check(self.run.data.max_dropped)
        batch = sharding.put(rows.batch, self.parts.mesh)
        work = flops.train_flops(self.parts.model, {name: x.shape for name, x in batch.items()})
        self.state, metrics = self.parts.step(self.state, batch)
        self.at += 1
        self.counts["flops"] += work
        self.pending.append((self.at, metrics, {"samples": rows.digest, "input_wait": waited, "work": work}))
        self.flush(1)

    def flush(self, keep: int = 0) -> None:
        """Write the metrics of all but the newest `keep` steps.

        Raises:
            NonFiniteError: too many updates were skipped in a row.
        """
        while len(self.pending) > keep:
            at, metrics, told = self.pending.pop(0)
            values = {name: x.item() for name, x in jax.device_get(metrics).items()}
            seconds = self._lap()
            tokens = values.pop("weight")
            self.counts["tokens"] += tokens
            if at % self.run.log_every == 0 or at == self.run.steps:
                self.metrics.write(
                    at,
                    {
                        **values,
                        "learning_rate": self.run.optimizer.learning_rate * float(self.parts.schedule(at - 1)),
                        "samples": told["samples"],
                        "seconds": seconds,
                        "input_wait": told["input_wait"],
                        "tokens_per_second": tokens / seconds,
                        "mfu": told["work"] / seconds / self.peak if self.peak else 0.0,
                    },
                )
            self.metrics.show(at, {"loss": values["loss"], "tokens/s": tokens / seconds})
            if values["skipped_in_a_row"] >= self.run.optimizer.max_nonfinite:
                self.stop(
                    f"step {at}: loss or gradient was not finite {values['skipped_in_a_row']} times in a row (optimizer.max_nonfinite)"
                )

    def _lap(self) -> float:
        """Seconds since it was last asked."""
        before, self.lap = self.lap, time.perf_counter()
        return self.lap - before

    def stop(self, reason: str) -> None:
        """Raise a NonFiniteError that says where the last good weights are."""
        self.saved.wait()
        known = checkpoint.steps(self.run.folder)
        raise NonFiniteError(
            f"{reason}; "
            + (
                f"the last checkpoint is step {known[-1]} in {self.run.folder}"
                if known
                else "no checkpoint was saved yet"
            )
        )

    def evaluate(self, batches: int) -> None:
        """Held-out loss with the averaged weights, written beside the training metrics."""
        self.flush()
        if self.parts.heldout is None:
            return
        params = optim.eval_params(self.state.opt_state, self.state.params)
        found = evaluate.evaluate(
            self.parts.eval_step, params, self.parts.heldout, self.parts.mesh, self.state.reference, batches
        )
        if found and self.run.checkpoint.best:
            choose("checkpoint.best", self.run.checkpoint.best, found)
        self.results = {"step": self.at, **found}
        if not (self.resumed and self.at == self.start):  # else the file has it already
            self.metrics.write(self.at, {f"eval/{name}": x for name, x in found.items()})
        self.metrics.say(
            f"step {self.at}  held out: "
            + "  ".join(f"{name} {x:.4f}" for name, x in found.items() if name != "tokens")
        )
        self._lap()

    def save(self) -> None:
        """A checkpoint of this step, begun in the background; none while updates are skipped, for the weights are those of an earlier step.

        Raises:
            NonFiniteError: the weights are not finite, or the run ends on skipped updates.
        """
        self.flush()
        params, rest = _kept(self.state)
        skipped = int(self.state.skipped_in_a_row)
        if skipped and self.at < self.run.steps:
            log.warning("step %d is not saved: its update and %d before it were skipped", self.at, skipped - 1)
            return
        if skipped or not all(jax.device_get(_finite(jax.tree.leaves((params, rest.get("params")))))):
            self.stop(
                f"step {self.at}: {'its update was skipped' if skipped else 'the weights are not finite'}, so it is not saved"
            )
        parts = self.parts
        data = {"loader": gather(parts.train.get_state()), "accounting": self.totals()}
        card = cards.make_card(
            self.run,
            parts.model,
            parts.mesh,
            self.parents,
            parts.train.fingerprint(),
            step=self.at,
            results=self.results,
            **self.counts,
        )
        self.saved.save(self.at, params, rest, data, card, parts.tokenizer.to_json())
        self._lap()

    def totals(self) -> list[float]:
        """The account of all processes."""
        return [sum(each) for each in zip(*gather(self.accounting.totals))]

    def finish(self, begin: float) -> dict[str, Any]:
        """result.json, card.json, the curves, and the samples."""
        folder, newest = self.run.folder, checkpoint.find(self.run.folder)
        names = {"metrics": "metrics.jsonl", "tensorboard": "tensorboard", "curves": "curves.png"}
        result = {
            "name": self.run.name,
            "steps": self.at,
            "eval": {k: v for k, v in self.results.items() if k != "step"},
            "data": Accounting(self.totals()).report(),
            "skipped": int(self.state.skipped),
            **self.counts,
            "seconds": time.time() - begin,
            "steps_this_time": self.at - self.start,
            "peak_flops": [self.peak, self.peak_source],
            "samples": self.samples(),
            "paths": {
                "folder": str(folder),
                "checkpoint": str(newest),
                **{what: str(folder / name) for what, name in names.items()},
            },
        }
        if self.lead:
            logs.draw_curves(folder)
            (folder / "card.json").write_text(json.dumps(checkpoint.read_card(newest), indent=1), encoding="utf-8")
            (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return result

    def samples(self) -> list[dict[str, str]]:
        """Continuations of the config's prompts."""
        prompts, model = self.run.eval.prompts, self.parts.model
        if not prompts or model.architecture == "encoder":
            return []
        params = optim.eval_params(self.state.opt_state, self.state.params)
        texts = generation.generate(
            model,
            params,
            self.parts.tokenizer,
            prompts,
            max_new_tokens=self.run.eval.max_new_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=self.run.seed,
        )
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]


@jax.jit
def _finite(leaves: list[Any]) -> list[Any]:
    return [jnp.all(jnp.isfinite(x)) for x in leaves]
