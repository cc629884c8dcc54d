"""The one train loop: builds what a run needs, takes its steps, saves, evaluates, and tells where everything lies.

The loop knows no task, no transform and no optimizer: they come as functions. What is exact is kept so by the step number alone:
keys are folded from it, and the place in the data is saved beside the weights.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import card as cards
from llm_jax import checkpoint, evaluate, flops, optim, sharding, step
from llm_jax import log as logs
from llm_jax import transforms as tf
from llm_jax.config import Run, show, to_dict
from llm_jax.data.accounting import Accounting
from llm_jax.data.documents import documents, open_sources
from llm_jax.data.pipeline import Loader, check_fingerprint
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from llm_jax.models import transformer
from llm_jax.platform import setup
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.moving_average import moving_average

log = logging.getLogger(__name__)

FREE = ("steps", "log_every", "workdir", "eval", "checkpoint", "mesh", "data.workers")
"""Keys that may differ between a run and its continuation."""


@dataclasses.dataclass
class Parts:
    """What a run works with, built once from its config."""

    run: Run
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    train: Loader
    heldout: Loader | None
    schedule: Any
    init: Any
    """key -> TrainState, jitted and laid out over the mesh"""
    shardings: Any
    abstract: step.TrainState
    step: Any
    """(state, batch) -> (state, metrics), jitted"""
    eval_step: Any
    parents: list[str]


def transform_of(run: Run) -> tf.Transform:
    """The transforms of a config, those that its plain fields ask for among them; freezing is outermost, since it hides params."""
    return tf.chain(accumulate(run.batch.accumulate), *run.transforms, moving_average(run.optimizer.moving_average),
                    freeze(run.optimizer.freeze))


def training_texts(run: Run, sources: list[Any]) -> Iterator[str]:
    """The texts of the documents that are not held out, for training a tokenizer."""
    for source in sources:
        for index in documents(source, run.data, "train"):
            record = source[int(index)]
            yield from (record[field] for field in (run.data.text, run.data.target) if isinstance(record.get(field), str))


def build(run: Run, tokenizer: Tokenizer | None = None) -> Parts:
    """Open the data, make the mesh, and compile nothing yet.

    Raises:
        UserError: whatever in the config, the data or the machine does not fit together.
    """
    mesh = sharding.make_mesh(run.mesh)
    sharding.check_batch(mesh, run.batch.size // run.batch.accumulate, run.batch.length)
    if run.batch.length > run.model.max_length and run.model.positions == "learned":
        raise ConfigError(f"batch.length {run.batch.length} is longer than the model's table of positions, model.max_length {run.model.max_length}")
    sources = open_sources(run.data, "train")
    tokenizer = tokenizer or load_tokenizer(run.data.tokenizer, lambda: training_texts(run, sources))
    needed = tokenizer.vocab_size + run.task.extra_tokens(tokenizer)
    if needed > run.model.vocab_size:
        raise DataError(f"the tokenizer has {needed} entries, the model's vocabulary {run.model.vocab_size}: set model.vocab_size={needed} or more")
    place = dict(process_index=jax.process_index(), process_count=jax.process_count())
    train = Loader(sources, tokenizer, run.task, run.data, run.batch, run.seed, "train", **place)
    heldout = None
    if run.data.heldout or run.data.heldout_sources:
        heldout = Loader(open_sources(run.data, "heldout"), tokenizer, run.task, run.data, run.batch, run.seed, "heldout", **place)
    return assemble(run, mesh, tokenizer, train, heldout)


def assemble(run: Run, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, train: Loader, heldout: Loader | None) -> Parts:
    """The functions of a run: initial state, step, evaluation step, with their shardings."""
    change = transform_of(run)
    config = change.config(run.model)
    shapes, axes = transformer.shapes(config), transformer.axes(config)
    schedule = optim.make_schedule(run.schedule, run.steps)
    optimizer = change.update(optim.make_optimizer(run.optimizer, schedule, shapes, axes))
    loss = change.loss(run.task.loss(config))
    grad = change.grad(step.differentiate(loss))
    started, parents = _start(run, mesh)

    def init(key: Any, started: Any) -> step.TrainState:
        first, second, third = jax.random.split(key, 3)
        params = transformer.init(run.model, first) if started is None else started
        params = change.params(run.model, params, second, None)
        return step.init_state(params, optimizer, third)

    key = jax.random.key(run.seed)
    abstract = jax.eval_shape(init, key, started)
    placed = sharding.state_shardings(mesh, abstract, sharding.params_shardings(mesh, axes, shapes))
    compiled_init = jax.jit(init, out_shardings=placed)
    compiled_step = jax.jit(step.make_step(loss, grad, optimizer), donate_argnums=0, out_shardings=(placed, None))
    return Parts(run, mesh, tokenizer, train, heldout, schedule, lambda: compiled_init(key, started), placed, abstract, compiled_step,
                 evaluate.make_eval_step(loss), parents)


def _start(run: Run, mesh: jax.sharding.Mesh) -> tuple[Any, list[str]]:
    """The weights that a run starts from and their hash; None for fresh ones."""
    if run.start == "fresh":
        return None, []
    shapes = transformer.shapes(run.model)
    placed = sharding.params_shardings(mesh, transformer.axes(run.model), shapes)
    params, files = checkpoint.load_params(Path(run.start), checkpoint.abstract_like(shapes, placed))
    return params, [json.loads(files["card.json"])["hashes"]["params"]]


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """The keys in which two configs differ, beside those that may."""
    if prefix in FREE:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        return [line for name in sorted({*there, *here})
                for line in _differences(there.get(name), here.get(name), f"{prefix}.{name}" if prefix else name)]
    return [] if there == here else [f"{prefix} is {json.dumps(there)} there and {json.dumps(here)} here"]


def _restore(parts: Parts, saved: checkpoint.Checkpoints) -> tuple[step.TrainState | None, Accounting, dict[str, Any]]:
    """The state of the newest checkpoint and its counts; the loader is put at its place."""
    wanted = checkpoint.abstract_like(parts.abstract, parts.shardings)
    found = saved.restore(wanted.params, _rest(wanted))
    if found is None:
        return None, Accounting(), {"tokens": 0.0, "flops": 0.0}
    different = _differences(found.card["config"], json.loads(json.dumps(to_dict(parts.run))))
    if different:
        raise CheckpointError(f"{parts.run.folder} holds a run of another config ({different[0]}): "
                              "give this one another name or workdir, or remove that folder")
    if not parts.run.checkpoint.allow_changed_data:
        check_fingerprint(found.card["sources"], parts.train.fingerprint())
    parts.train.set_state(found.data["loader"])
    state = parts.abstract._replace(**{**found.state, "params": found.params, "reference": {}})
    return state, Accounting(found.data["accounting"]), {"tokens": found.card["tokens"], "flops": found.card["flops"]}


def _rest(state: step.TrainState) -> dict[str, Any]:
    """The parts of a state beside the params and what is not saved, as a dict."""
    return {name: x for name, x in state._asdict().items() if name not in ("params", "reference")}


def saved_tokenizer(run: Run) -> Tokenizer | None:
    """The tokenizer that the run's newest checkpoint holds."""
    for at in reversed(checkpoint.steps(run.folder)):
        file = run.folder / "checkpoints" / str(at) / "about" / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_json(file.read_text(encoding="utf-8"))
    return None


class _Pace:
    """Where the time goes: steps, waiting for input, and the rest."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.waited = 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


def train(run: Run) -> dict[str, Any]:
    """Carry out a run, from its newest checkpoint if its folder holds one; returns what result.json holds.

    Raises:
        UserError: something that the user can mend; earlier checkpoints stay.
    """
    setup()
    begin = time.time()
    run.folder.mkdir(parents=True, exist_ok=True)
    parts = build(run, saved_tokenizer(run))
    saved = checkpoint.Checkpoints(run.folder, run.checkpoint)
    with jax.set_mesh(parts.mesh):
        try:
            return _Session(parts, saved).carry_out(begin)
        except OSError as e:
            if checkpoint.is_full(e):
                raise CheckpointError(f"no space left on the disk of {run.folder}: the run stopped; its earlier checkpoints are intact") from e
            raise
        finally:
            parts.train.close()
            if parts.heldout is not None:
                parts.heldout.close()


class _Session:
    """One carrying out of a run."""

    def __init__(self, parts: Parts, saved: checkpoint.Checkpoints):
        self.parts, self.saved, self.run = parts, saved, parts.run
        state, self.accounting, self.counts = _restore(parts, saved)
        self.state = parts.init() if state is None else state
        self.start = int(self.state.step)
        self.peak, self.peak_source = flops.peak_flops(list(parts.mesh.devices.flat))
        self.results: dict[str, Any] = {}
        self.pending: list[tuple[int, Any, dict[str, Any]]] = []
        (self.run.folder / "config.json").write_text(json.dumps(to_dict(self.run), indent=1), encoding="utf-8")
        parts.tokenizer.save(self.run.folder / "tokenizer.json")
        self.metrics = logs.Metrics(self.run.folder, self.start, self.run.steps)
        self.pace = _Pace()

    def carry_out(self, begin: float) -> dict[str, Any]:
        """All remaining steps, then the last evaluation."""
        run = self.run
        self.metrics.say(f"{show(run)}\n{describe(self.parts)}")
        if self.start:
            self.metrics.say(f"resuming {run.folder} at step {self.start}")
        try:
            for at in range(self.start, run.steps):
                self.one_step(at)
                last = at + 1 == run.steps
                if last or (run.eval.every and (at + 1) % run.eval.every == 0):
                    self.evaluate(at + 1, 0 if last else run.eval.batches)
                if last or (at + 1) % run.checkpoint.every == 0:
                    self.save(at + 1)
            if self.start >= run.steps or not self.results:
                self.evaluate(run.steps, 0)
            self.flush(0)
            self.accounting.check(run.data.max_dropped, final=True)
            self.saved.close()
        except BaseException:
            self.saved.abandon()
            raise
        finally:
            self.metrics.close()
        return self.finish(begin)

    def one_step(self, at: int) -> None:
        """Take a batch and a step; read the metrics of the step before, so that the device is never waited for."""
        before = time.perf_counter()
        rows = next(self.parts.train)
        waited = time.perf_counter() - before
        self.accounting.add(rows.account)
        self.accounting.check(self.run.data.max_dropped)
        shapes = {name: (x.shape[0] * jax.process_count(), *x.shape[1:]) for name, x in rows.batch.items()}
        work = flops.train_flops(self.parts.run.model, shapes)
        self.state, metrics = self.parts.step(self.state, sharding.put(rows.batch, self.parts.mesh))
        tokens = int(np.prod(shapes["tokens"])) if "tokens" in shapes else shapes["images"][0]
        self.counts["flops"] += work
        self.pending.append((at + 1, metrics, {"samples": rows.digest, "input_wait": waited, "work": work, "slots": tokens}))
        self.flush(1)

    def flush(self, keep: int) -> None:
        """Write the metrics of all but the newest `keep` steps."""
        while len(self.pending) > keep:
            at, metrics, told = self.pending.pop(0)
            values = {name: x.item() for name, x in jax.device_get(metrics).items()}
            seconds = self.pace.lap()
            tokens = values.pop("weight")
            self.counts["tokens"] += tokens
            if values["skipped_in_a_row"] >= self.run.optimizer.max_nonfinite:
                self.saved.wait()
                known = checkpoint.steps(self.run.folder)
                raise NonFiniteError(
                    f"step {at}: loss or gradient was not finite {int(values['skipped_in_a_row'])} times in a row (optimizer.max_nonfinite); "
                    + (f"the last checkpoint is step {known[-1]} in {self.run.folder}" if known else "no checkpoint was saved yet"))
            if at % self.run.log_every == 0 or at == self.run.steps:
                values |= {"learning_rate": self.run.optimizer.learning_rate * float(self.parts.schedule(at - 1)),
                           "samples": told["samples"], "seconds": seconds, "input_wait": told["input_wait"],
                           "tokens_per_second": tokens / seconds, "mfu": told["work"] / seconds / self.peak if self.peak else 0.0}
                self.metrics.write(at, values)
            self.metrics.show(at, {"loss": values["loss"], "tokens/s": tokens / seconds})

    def evaluate(self, at: int, batches: int) -> None:
        """Held-out loss with the averaged weights, written beside the training metrics."""
        if self.parts.heldout is None:
            return
        self.flush(0)
        params = optim.eval_params(self.state.opt_state, self.state.params)
        found = evaluate.evaluate(self.parts.eval_step, params, self.parts.heldout, self.parts.mesh, self.state.reference, batches)
        self.results = {"step": at, **found}
        self.metrics.write(at, {f"eval/{name}": x for name, x in found.items()})
        self.metrics.say(f"step {at}  held out: " + "  ".join(f"{name} {x:.4f}" for name, x in found.items() if name != "tokens"))
        self.pace.lap()

    def save(self, at: int) -> None:
        """A checkpoint of this step, begun in the background."""
        self.flush(0)
        card = cards.make_card(self.run, self.parts.mesh, self.parts.parents, self.parts.train.fingerprint(), step=at, results=self.results,
                               tokens=self.counts["tokens"], flops=self.counts["flops"])
        place = {"loader": self.parts.train.get_state(), "accounting": self.accounting.totals}
        fresh = {name: x for name, x in self.results.items() if name != "step"} if self.results.get("step") == at else None
        self.saved.save(at, self.state.params, _rest(self.state), place, card, self.parts.tokenizer.to_json(), fresh)
        self.pace.lap()

    def finish(self, begin: float) -> dict[str, Any]:
        """result.json, card.json, the curves, and the samples."""
        folder = self.run.folder
        params = optim.eval_params(self.state.opt_state, self.state.params)
        curves = logs.draw_curves(folder) if jax.process_index() == 0 else folder / "curves.png"
        newest = checkpoint.find(folder)
        (folder / "card.json").write_text((newest / "about" / "card.json").read_text(encoding="utf-8"), encoding="utf-8")
        result = {"name": self.run.name, "steps": self.run.steps, "eval": {k: v for k, v in self.results.items() if k != "step"},
                  "data": self.accounting.report(), "skipped": int(self.state.skipped), "tokens": self.counts["tokens"], "flops": self.counts["flops"],
                  "seconds": time.time() - begin, "steps_this_time": self.run.steps - self.start, "peak_flops": [self.peak, self.peak_source],
                  "samples": self.samples(params), "paths": {"folder": str(folder), "checkpoint": str(newest), "metrics": str(folder / "metrics.jsonl"),
                                                             "tensorboard": str(folder / "tensorboard"), "curves": str(curves)}}
        (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return result

    def samples(self, params: Any) -> list[dict[str, str]]:
        """Continuations of the config's prompts."""
        if not self.run.eval.prompts or self.run.model.architecture == "encoder":
            return []
        from llm_jax.generate import generate

        texts = generate(self.run.model, params, self.parts.tokenizer, list(self.run.eval.prompts), max_new_tokens=self.run.eval.max_new_tokens,
                         temperature=0.8, top_p=0.95, seed=self.run.seed)
        return [{"prompt": p, "text": t} for p, t in zip(self.run.eval.prompts, texts)]


def describe(parts: Parts) -> str:
    """What is about to happen: parameters, mesh, data."""
    from llm_jax import tree

    count = tree.size(parts.abstract.params)
    mesh = ", ".join(f"{axis}={n}" for axis, n in parts.mesh.shape.items() if n > 1) or "one device"
    return f"{count / 1e6:.2f}M parameters on {mesh} ({jax.devices()[0].device_kind})"
