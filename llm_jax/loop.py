"""The one train loop: takes the steps of a run, saves, evaluates, and tells where everything lies.

The loop knows no task, no transform and no optimizer: they come as functions (`parts.py`). What is exact is kept so by the step number
alone: keys are folded from it, and the place in the data is saved beside the weights.
"""

import functools
import json
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import card as cards
from llm_jax import checkpoint, evaluate, flops, optim, processes, results, sharding, step
from llm_jax import log as logs
from llm_jax.config import Run, show, to_dict
from llm_jax.continuation import check_continues
from llm_jax.data.accounting import FIELDS, Accounting
from llm_jax.errors import CheckpointError, NonFiniteError, choose
from llm_jax.metrics import rising
from llm_jax.parts import INHERITED, Parts, build, cost_told, describe, moments_told
from llm_jax.platform import await_buffers, gather, release_freed_memory, setup
from llm_jax.storage import Path, as_path
from llm_jax.tasks.base import Judgement
from llm_jax.times import Times, Trace

log = logging.getLogger(__name__)


def train(run: Run) -> dict[str, Any]:
    """Carry out a run, from its newest checkpoint if its folder holds one; returns what result.json holds.

    Raises:
        UserError: something that the user can mend; earlier checkpoints stay.
    """
    setup()
    watch = processes.join()
    begin = time.time()
    with processes.together(watch) as others:
        return _train(run, others, begin)


def _train(run: Run, others: processes.Together, begin: float) -> dict[str, Any]:
    """`train`, beside the other processes."""
    parts = None
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        parts = build(run)
        with jax.set_mesh(parts.mesh):
            return _Session(parts, others, begin).carry_out(begin)
    except OSError as e:
        if checkpoint.is_full(e):
            raise CheckpointError(
                f"no space left on the disk of {run.folder}: the run stopped; its earlier checkpoints are intact"
            ) from e
        if isinstance(e.filename, str) and _concerns(as_path(e.filename).absolute(), run.folder.absolute()):
            raise CheckpointError(f"cannot write {e.filename}: {e.strerror}") from e
        raise
    finally:
        if parts is not None:
            parts.close()


def _concerns(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder or on the way to it."""
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _kept(state: step.TrainState, extra: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """What a checkpoint holds: the model's weights to evaluate, and the rest, with the trained weights where they are others."""
    params = _of_model(optim.eval_params(state.opt_state, state.params), extra)
    left = ("reference", "params") if params is state.params else ("reference",)
    return params, {name: x for name, x in state._asdict().items() if name not in left}


def _of_model(params: Any, extra: tuple[str, ...]) -> Any:
    """The params without what was trained beside the model."""
    return {name: x for name, x in params.items() if name not in extra} if extra else params


class _Session:
    """One carrying out of a run."""

    def __init__(self, parts: Parts, others: processes.Together, begin: float):
        self.parts, self.run, self.others = parts, parts.run, others
        self.lead = jax.process_index() == 0
        # what is half pruned is no model to end with
        self.whole = max((change.steps for change in self.run.transforms), default=0)
        self.saved = checkpoint.Checkpoints(self.run.folder, self.run.checkpoint, self.whole)
        self.results: dict[str, Any] = {}
        self.best: dict[str, Any] = {"value": None, "step": 0, "stale": 0}
        self.judgement: Judgement | None = None
        self.final: Any = None
        self.pending: list[tuple[int, Any, dict[str, Any]]] = []
        self.state = self._begin()
        self.start = self.at = int(self.state.step)
        self.peak, self.peak_source = flops.peak_flops(list(parts.mesh.devices.flat))
        if self.lead:
            (self.run.folder / "config.json").write_text(json.dumps(to_dict(self.run), indent=1), encoding="utf-8")
            parts.tokenizer.save(self.run.folder / "tokenizer.json")
        self.metrics = logs.Metrics(self.run.folder, self.start, self.run.steps, silent=not self.lead)
        self.times, self.trace = Times(begin), Trace(self.run.folder, self.run.profile)
        self.lap = time.perf_counter()

    def _begin(self) -> step.TrainState:
        """The state of the newest checkpoint with all that belongs to it, else a fresh one."""
        parts = self.parts
        params, rest = jax.eval_shape(functools.partial(_kept, extra=parts.extra), parts.abstract)
        placed = parts.shardings._asdict()
        found = self.saved.restore(
            checkpoint.abstract_like(params, _of_model(placed["params"], parts.extra)),
            {name: checkpoint.abstract_like(x, placed[name]) for name, x in rest.items()},
            lambda card: check_continues(parts, card),
        )
        self.resumed = found is not None
        if found is None:
            self.accounting, self.counts = Accounting(), {"tokens": 0.0, "flops": 0.0}
            state, self.inherited = parts.init()
            return state
        parts.train.set_state(*found.data["loader"])
        self.accounting = Accounting(found.data["accounting"] if self.lead else None)
        self.counts = {name: found.card[name] for name in ("tokens", "flops")}
        self.results = found.card["results"]
        if found.card["best"]["step"] >= self.whole:
            self.best = found.card["best"]
        self.inherited = {name: found.card[name] for name in INHERITED if name in found.card}
        others, hashes = parts.reference()
        for name, before in found.card.get("references", {}).items():
            if hashes.get(name) != before:
                raise CheckpointError(
                    f"the model that the run reads as {name!r} has changed since {self.run.folder} was begun"
                )
        for name, stated in parts.card(found.params).items():
            if name != "pruned" and json.loads(json.dumps(stated)) != found.card.get(name):
                raise CheckpointError(f"what the run reads as {name!r} has changed since {self.run.folder} was begun")
        return step.TrainState(**{"params": found.params, **found.state, "reference": others})

    def carry_out(self, begin: float) -> dict[str, Any]:
        """All remaining steps, then the last evaluation."""
        run = self.run
        try:
            self.metrics.say(f"{show(run)}\n{describe(self.parts)}")
            if self.resumed:
                self.metrics.say(f"resuming {run.folder} at step {self.start}")
            elif said := cost_told(self.parts, self.state.params):  # on every process: a card reads sharded weights
                self.metrics.say(said)
            if not self.resumed and (told := moments_told(self.parts, self.inherited)):
                self.metrics.say(told)
            while not self.ended:
                with self.times.of("compile" if self.at == self.start else "step"):
                    self.one_step()
                last = self.at == run.steps
                if last or (run.eval.every and self.at % run.eval.every == 0):
                    with self.times.of("evaluation"):
                        self.evaluate(0 if last and not run.eval.patience else run.eval.batches)
                improved = run.eval.patience and self.best["step"] == self.at
                stopping = self.others.stopping(self.at) and not self.ended
                if self.ended or improved or stopping or self.at % run.checkpoint.every == 0:
                    with self.times.of("checkpoint"):
                        self.save()
                if stopping:
                    self.saved.wait()
                    raise processes.Stopped(
                        f"told to stop: step {self.at} is saved, the same command goes on from there"
                    )
            if self.at == self.start and not run.eval.patience:
                self.evaluate(0)
            if self.at == self.start and not self.resumed:
                self.save()
            Accounting(self.totals()).check(run.data.max_dropped, final=True)
            with self.times.of("checkpoint"):
                self.saved.wait()
            if run.eval.patience:
                self.return_to_best()
            return self.finish(begin)
        except BaseException:
            self.saved.abandon()
            raise
        finally:
            self.trace.close()
            self.metrics.close()

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or the held-out metric has not improved for too long."""
        patience = self.run.eval.patience
        return self.at >= self.run.steps or bool(patience and self.best["stale"] >= patience)

    def one_step(self) -> None:
        """Take a batch and a step; read the metrics of the step before, so that the device is never waited for."""
        part = (
            "start" if self.at == self.start else "input"
        )  # the first batch comes once readers and packing are under way
        before = self.times.seconds[part]
        with self.times.of(part):
            rows = next(self.parts.train)
        waited = self.times.seconds[part] - before
        self.accounting.add(rows.account)
        self.accounting.check(self.run.data.max_dropped)
        batch = sharding.put(self.parts.rows(rows.batch), self.parts.mesh)
        work = flops.train_flops(self.parts.model, {name: x.shape for name, x in batch.items()})
        await_buffers(self.state)
        self.others.begin(self.at + 1)
        self.trace.before(self.at + 1)
        self.state, metrics = self.parts.step(self.state, batch)
        self.at += 1
        self.trace.after(self.at, self.state)
        self.counts["flops"] += work
        filled = rows.account[FIELDS.index("filled")] * sharding.rows_here(self.parts.mesh)[1]
        told = {"samples": rows.digest, "input_wait": waited, "work": work, "tokens": float(filled)}
        self.pending.append((self.at, metrics, told))
        self.flush(1)
        if self.at - self.start <= 2:  # the first step is compiled; the second finds its buffers a lasting place
            release_freed_memory()

    def flush(self, keep: int = 0) -> None:
        """Write the metrics of all but the newest `keep` steps.

        Raises:
            NonFiniteError: too many updates were skipped in a row.
        """
        while len(self.pending) > keep:
            at, metrics, told = self.pending.pop(0)
            values = {name: x.item() for name, x in jax.device_get(metrics).items()}
            seconds = self._lap()
            values.pop("weight")
            tokens = told["tokens"]
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

    def weights(self) -> Any:
        """The weights to evaluate: those of the best checkpoint at the end of a run with patience, else `optim.eval_params`."""
        if self.final is not None:
            return self.final
        return _of_model(optim.eval_params(self.state.opt_state, self.state.params), self.parts.extra)

    def measure(self, batches: int) -> dict[str, float]:
        """Held-out figures; of a task that judges each example also its judgement."""
        self.flush()
        parts, run = self.parts, self.run
        if not parts.heldout:
            return {}
        release_freed_memory()
        found, self.judgement = evaluate.judge(
            parts.eval_step,
            self.weights(),
            parts.heldout,
            parts.mesh,
            self.state.reference,
            batches,
            task=run.eval.task or run.task,
        )
        if found and run.checkpoint.best:
            choose("checkpoint.best", run.checkpoint.best, found)
        return found

    def evaluate(self, batches: int) -> None:
        """Held-out figures, written beside the training metrics, and whether they are the best so far."""
        found, metric = self.measure(batches), self.run.checkpoint.best
        if not self.parts.heldout:
            return
        if found and metric and self.at >= self.whole:
            before, value = self.best["value"], found[metric]
            if before is None or (value > before if rising(metric) else value < before):
                self.best = {"value": value, "step": self.at, "stale": 0}
            else:
                self.best = {**self.best, "stale": self.best["stale"] + 1}
        self.results = {"step": self.at, **found}
        if not (self.resumed and self.at == self.start):  # else the file has it already
            self.metrics.write(self.at, {f"eval/{name}": x for name, x in found.items()})
        self.say_found()
        release_freed_memory()
        self._lap()

    def say_found(self) -> None:
        """The main figures of an evaluation."""
        told = {
            name: x
            for name, x in self.results.items()
            if ("/" not in name and name not in ("step", "tokens", "examples")) or name.startswith("loss/")
        }
        said = "  ".join(f"{name} {x:.4f}" for name, x in told.items())
        self.metrics.say(f"step {self.results['step']}  held out: {said}")

    def return_to_best(self) -> None:
        """End with the weights of the best checkpoint, judged on all that is held out."""
        at = self.best["step"]
        if self.best["value"] is None:
            return
        if at != self.at:
            self.metrics.say(f"{self.run.checkpoint.best} was best at step {at}: the run ends with those weights")
        params, _ = jax.eval_shape(functools.partial(_kept, extra=self.parts.extra), self.parts.abstract)
        abstract = checkpoint.abstract_like(params, _of_model(self.parts.shardings.params, self.parts.extra))
        self.final, _, _ = checkpoint.load_params(self.saved.root / str(at), abstract)
        self.results = {"step": at, **self.measure(0)}
        self.say_found()

    def save(self) -> None:
        """A checkpoint of this step, begun in the background; none while updates are skipped, for the weights are those of an earlier step.

        Raises:
            NonFiniteError: the weights are not finite, or the run ends on skipped updates.
        """
        self.flush()
        params, rest = _kept(self.state, self.parts.extra)
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
            {**self.inherited, **parts.card(params)},
            parts.train.fingerprint(),
            step=self.at,
            results=self.results,
            best=self.best,
            **self.counts,
        )
        self.metrics.sync()
        self.saved.save(self.at, params, rest, data, card, parts.tokenizer.to_json())
        self._lap()

    def totals(self) -> list[float]:
        """The account of all processes."""
        return evaluate.of_all_rows(list(self.accounting.totals), self.parts.mesh)

    def finish(self, begin: float) -> dict[str, Any]:
        """What result.json holds."""
        release_freed_memory()
        facts = {
            "name": self.run.name,
            "steps": self.at,
            "eval": {k: v for k, v in self.results.items() if k != "step"},
            "data": Accounting(self.totals()).report(),
            "skipped": int(self.state.skipped),
            **self.counts,
            "seconds": time.time() - begin,
            "times": {name: round(seconds, 3) for name, seconds in self.times.seconds.items()},
            "steps_this_time": self.at - self.start,
            "peak_flops": [self.peak, self.peak_source],
        }
        return results.write(self.parts, self.weights(), self.judgement, facts)


@jax.jit
def _finite(leaves: list[Any]) -> list[Any]:
    return [jnp.all(jnp.isfinite(x)) for x in leaves]
