"""Tasks of lm-evaluation-harness as checks of a suite: from YAML files and data on this disk, nothing is fetched. Needs the extra `eval`."""

import dataclasses
import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import evaluate, generation
from llm_jax.config import positive
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, UserError, suggest
from llm_jax.lifecycle.scored import Scored
from llm_jax.model import Model
from llm_jax.models.transformer import apply
from llm_jax.storage import as_path
from llm_jax.tasks.next_token import document

LOGS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics that are judged as nats a word or byte: their own scale is no mean over documents"""

ROWS = 8
"""of a batch"""


@dataclasses.dataclass(frozen=True)
class Harness:
    """A task of lm-eval, judged document by document."""

    name: str
    task: str
    """its name, as the YAML file says it"""
    folder: str
    """of the YAML file and of the data that it reads; `data_files` in it are looked for from where the command is run"""
    margin: float
    """loss of the metric that is not to be exceeded"""
    metric: str = "acc"
    """one of the task's that is greater where a model is better, or word_perplexity, byte_perplexity, bits_per_byte: nats"""
    slices: tuple[str, ...] = ()
    """fields of the documents: what shares a value is a slice"""
    slice_margin: float = 0.0
    """loss that no slice may exceed; 0 for twice the margin"""
    least: int = 30
    """documents that a slice has at least, to be judged"""
    group: str = ""
    """field whose equal values are not independent"""
    bound: float | None = None
    """value that the metric must reach whatever the incumbent has"""

    def __post_init__(self):
        positive(self, "check", "least")
        positive(self, "check", "slice_margin", least=0)
        if not self.margin > 0:
            raise ConfigError(f"check.margin of {self.name!r} is {self.margin!r}: it must be above 0")

    @property
    def sign(self) -> int:
        """1 where a greater value is worse, else -1."""
        return 1 if self.metric in LOGS else -1

    @property
    def unit(self) -> str:
        """What the metric is measured in."""
        return f"nats a {'word' if self.metric == LOGS[0] else 'byte'}" if self.metric in LOGS else self.metric

    @property
    def text(self) -> str:
        """The field of a record that shows what it is."""
        return "text"

    def score(self, loaded: Model) -> Scored:
        """What a model makes of the task's documents.

        Raises:
            UserError: lm-eval is not installed, no such task or metric, or a model that gives a text no probability.
        """
        found = _evaluate(_model(loaded), self.task, self.folder)
        samples, better = found["samples"][self.task], found["higher_is_better"][self.task]
        known = {name for sample in samples for name in sample["metrics"]}
        if self.metric not in known:
            raise UserError(
                f"check {self.name!r}: {self.task} has no metric {self.metric!r}{suggest(self.metric, known)}"
            )
        if self.metric not in LOGS and not better.get(self.metric):
            raise UserError(f"check {self.name!r}: of {self.metric} less is better: take another metric")
        samples = sorted({sample["doc_id"]: sample for sample in samples}.values(), key=lambda x: x["doc_id"])
        values = [x[self.metric] if self.metric in LOGS else (x[self.metric], 1) for x in samples]
        total = -self.sign * np.array([float(value) for value, _ in values])  # log-probabilities as losses
        weight = np.array([float(count) for _, count in values])
        records = [
            {**sample["doc"], "id": f"{self.task}/{sample['doc_id']}", "text": str(sample["arguments"][0][0])}
            for sample in samples
        ]
        sizes = np.array([len(record["text"].encode()) for record in records], np.float64)
        return Scored(records, total, weight, sizes)

    def figures(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the metric of each document, and its weight in the mean."""
        return scored.loss / scored.weight, scored.weight

    def same_units(self, scored: Scored, old: Model, new: Model) -> None:
        """Words, bytes and answers do not depend on a tokenizer."""

    def contents(self) -> list[str]:
        """Hashes of the files in the folder."""
        files = sorted(path for path in as_path(self.folder).rglob("*") if path.is_file())
        if not files:
            raise UserError(f"check {self.name!r}: {self.folder} holds no files")
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _evaluate(lm: Any, task: str, folder: str) -> dict[str, Any]:
    """What lm-eval finds of one task, with its samples."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if not as_path(folder).is_dir():
        raise UserError(f"no folder {folder} of tasks")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if task not in manager.all_tasks:
        raise UserError(f"{folder} has no task {task!r}{suggest(task, manager.all_tasks)}")
    return simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")


def _model(loaded: Model) -> Any:
    """A model as lm-eval asks it. Raises UserError where that is not installed, or for a model that gives a text no probability."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'llm_jax[eval]'")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when it is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval.api.model import LM

    sizes, tokenizer = loaded.config, loaded.tokenizer
    if tokenizer is None or sizes.architecture != "decoder" or sizes.head != "lm":
        raise UserError(
            f"lm-eval asks a decoder with head 'lm' and a tokenizer, not {sizes.architecture!r} with head {sizes.head!r}"
        )
    reader: Tokenizer = tokenizer

    class Asked(LM):
        """The three questions that lm-eval has."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return continuations(loaded, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            # Without the end token, which is no part of the text.
            each = [evaluate.score(sizes, loaded.params, reader, request.args[0])[:-1] for request in requests]
            return [sum(p for _, p in tokens) for tokens in each]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [_generated(loaded, *request.args) for request in requests]

    return Asked()


def continuations(loaded: Model, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats of each pair, and whether it is what greedy decoding gives; a context too long is cut at its begin."""
    assert loaded.tokenizer is not None
    made = []
    for context, continuation in pairs:
        bare = context.rstrip()
        whole = document(context + continuation, loaded.tokenizer)[:-1]
        before = len(document(bare, loaded.tokenizer)) - 1  # spaces go with the word after them
        count = max(1, min(len(whole) - before, loaded.config.max_length))
        made.append((whole[-(loaded.config.max_length + 1) :], count))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(made)
    order = sorted(range(len(made)), key=lambda i: len(made[i][0]))
    for at in range(0, len(order), ROWS):
        chosen = order[at : at + ROWS]
        longest = max(len(made[i][0]) for i in chosen) - 1
        length = min(loaded.config.max_length, max(16, 1 << (longest - 1).bit_length()))
        rows = np.zeros((2, ROWS, length), np.int32)
        for row, i in enumerate(chosen):
            ids = made[i][0]
            rows[:, row, : len(ids) - 1] = ids[:-1], ids[1:]
        nats, greedy = map(np.asarray, _asked(loaded.config, loaded.params, rows[0], rows[1]))
        for row, i in enumerate(chosen):
            stop = len(made[i][0]) - 1
            part = slice(stop - made[i][1], stop)
            found[i] = float(nats[row, part].sum(dtype=np.float64)), bool(greedy[row, part].all())
    return found


@functools.partial(jax.jit, static_argnums=0)
def _asked(sizes: Any, params: Any, tokens: Any, targets: Any) -> tuple[Any, Any]:
    """(B, S) log p of each target, and whether it is the most probable one."""
    logits = apply(sizes, params, {"tokens": tokens}).logits
    assert logits is not None
    nats = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return nats, jnp.argmax(logits, axis=-1) == targets


def _generated(loaded: Model, context: str, told: dict[str, Any]) -> str:
    """The greedy continuation of a context up to a stop string; what does not fit before it is cut at its begin."""
    assert loaded.tokenizer is not None
    stop = told.get("until") or []
    count = min(int(told.get("max_gen_toks", 64)), loaded.config.max_length // 2)
    ids = loaded.tokenizer.encode(context)[-(loaded.config.max_length - count - 1) :]
    temperature = float(told.get("temperature", 0.0)) if told.get("do_sample") else 0.0
    (text,) = generation.generate(
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        [loaded.tokenizer.decode(ids)],
        max_new_tokens=count,
        stop=[stop] if isinstance(stop, str) else stop,
        temperature=temperature,
    )
    return text
