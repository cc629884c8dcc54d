"""A run as data: frozen records, each of which checks its own values."""

import dataclasses
import re
from typing import Any

from llm_jax.errors import ConfigError, choose
from llm_jax.models.config import ModelConfig
from llm_jax.storage import Path, as_path


def positive(record: Any, where: str, *names: str, least: float = 1) -> None:
    """Raise unless the named fields are numbers of at least `least`."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, (int, float)) or not value >= least:
            raise ConfigError(f"{where}.{name} is {value!r}: it must be at least {least}")


def fraction(record: Any, where: str, *names: str) -> None:
    """Raise unless the named fields are numbers in [0, 1]."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{where}.{name} is {value!r}: it must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text comes from and how it becomes rows."""

    sources: tuple[str, ...] = ()
    """tfds:NAME, text:GLOB, jsonl:GLOB, csv:GLOB, parquet:GLOB or asset:NAME, mixed by the weights"""
    weights: tuple[float, ...] = ()
    """share of the pieces drawn from each source, 0 for one that is evaluated only; empty for shares in proportion to their documents"""
    heldout: float = 0.05
    """share of the documents kept apart for evaluation when heldout_sources is empty"""
    group: str = ""
    """field whose equal values stay on one side of the split, and whose null keeps a document out of what is held out; empty splits by document"""
    heldout_sources: tuple[str, ...] = ()
    """sources of the documents for evaluation"""
    tokenizer: str = "bpe:4096"
    """bpe:V or wordpiece:V (trained on the train documents), a tokenizer.json, a Hugging Face directory, or asset:NAME"""
    text: str = "text"
    """field of a record that holds the text"""
    target: str = "target"
    """field of a record that holds the target text, where a task reads pairs"""
    pack: bool = True
    """several examples a row, kept apart by segment; else one a row, padded"""
    buckets: tuple[int, ...] = ()
    """without packing: row lengths to pad to; empty for batch.length alone"""
    long: str = "split"
    """documents longer than a row: split, truncate, drop or error"""
    invalid: str = "error"
    """bytes that are not UTF-8: error or skip (counted)"""
    window: int = 4096
    """pieces held for shuffling"""
    shards: int = 1
    """streams that documents are dealt out to, each of an equal part of the rows: more than one where hosts should not all read everything"""
    workers: int = 0
    """processes that prepare the rows of each shard; 0 for a thread"""
    max_dropped: float = 0.05
    """share of examples dropped, of tokens lost, or of rows with nothing to predict that stops the run"""

    def __post_init__(self):
        choose("data.long", self.long, ("split", "truncate", "drop", "error"))
        choose("data.invalid", self.invalid, ("error", "skip"))
        fraction(self, "data", "heldout", "max_dropped")
        positive(self, "data", "window", "shards")
        positive(self, "data", "workers", least=0)
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(f"data.weights has {len(self.weights)} values for {len(self.sources)} data.sources")
        if self.weights and not (min(self.weights) >= 0 and max(self.weights) > 0):
            raise ConfigError(f"data.weights are {self.weights}: none may be below 0, and one must be above it")
        if list(self.buckets) != sorted(set(self.buckets)) or any(b < 1 for b in self.buckets):
            raise ConfigError(f"data.buckets are {self.buckets}: they must be positive and increasing")


@dataclasses.dataclass(frozen=True)
class Batch:
    """How many tokens an update sees: size rows of length tokens."""

    size: int = 8
    """B: rows of the global batch"""
    length: int = 256
    """S: tokens of a row"""
    accumulate: int = 1
    """slices of the batch whose gradients are summed before the update"""

    def __post_init__(self):
        positive(self, "batch", "size", "length", "accumulate")
        if self.size % self.accumulate:
            raise ConfigError(f"batch.size {self.size} is not a multiple of batch.accumulate {self.accumulate}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule and what it is allowed to touch."""

    name: str = "adamw"
    """any optimizer of optax or optax.contrib"""
    learning_rate: float = 1e-3
    """peak of the schedule"""
    weight_decay: float = 0.0
    """decoupled decay of the matrices; biases, norms and embeddings are not decayed"""
    arguments: tuple[tuple[str, float], ...] = ()
    """further arguments of the optimizer by name, e.g. b2 0.95"""
    clip: float = 1.0
    """largest global norm of the gradient; 0 for no clipping"""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(regex, factor): the update of matching parameters is scaled; the first match counts"""
    layer_decay: float = 1.0
    """factor of the update for each layer further below the head; 1 for equal rates"""
    freeze: tuple[str, ...] = ()
    """regexes of parameters that are not trained"""
    moving_average: float = 0.0
    """decay of an exponential moving average of the weights, used to evaluate; 0 for none"""
    max_nonfinite: int = 5
    """updates in a row that may be skipped because the loss is not finite"""

    def __post_init__(self):
        positive(self, "optimizer", "learning_rate", "weight_decay", "clip", least=0)
        positive(self, "optimizer", "max_nonfinite")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optimizer.layer_decay is {self.layer_decay}: it must lie in (0, 1]")
        if not 0 <= self.moving_average < 1:
            raise ConfigError(f"optimizer.moving_average is {self.moving_average}: it must lie in [0, 1)")
        for regex in (*self.freeze, *(name for name, _ in self.multipliers)):
            try:
                re.compile(regex)
            except re.error as e:
                raise ConfigError(f"optimizer: {regex!r} is not a regular expression ({e})") from e


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate over the steps: warmup, then the named curve down to `final`."""

    name: str = "cosine"
    """constant, cosine, linear, inverse_sqrt or wsd (warmup, stable, decay)"""
    warmup: int = 0
    """steps from initial to 1"""
    decay: float = 0.2
    """wsd: share of the steps in which it falls to final"""
    initial: float = 0.0
    """factor at step 0: above 0 to re-warm a trained model"""
    final: float = 0.1
    """factor at the end"""
    cycles: int = 1
    """times the curve is run; each further one re-warms from final and decays again"""

    def __post_init__(self):
        choose("schedule.name", self.name, ("constant", "cosine", "linear", "inverse_sqrt", "wsd"))
        positive(self, "schedule", "warmup", least=0)
        positive(self, "schedule", "cycles")
        fraction(self, "schedule", "decay", "initial", "final")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; one of them may be -1 for all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh is {sizes}: each axis is a positive number, and at most one is -1")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved and which checkpoints stay."""

    every: int = 500
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """newest checkpoints kept"""
    best: str = "loss"
    """held-out metric whose best checkpoint is kept too, e.g. loss or accuracy; empty for none"""
    allow_changed_data: bool = False
    """resume although a source's content or the number of workers changed"""

    def __post_init__(self):
        positive(self, "checkpoint", "every", "keep")


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured on held-out documents."""

    every: int = 500
    """steps between evaluations; 0 for the last step alone"""
    batches: int = 0
    """batches of each but the last evaluation; 0 for all"""
    patience: int = 0
    """evaluations in a row without a better checkpoint.best after which the run ends; 0 for none. Those before a transform has come to its end, such
    as pruning on a schedule, do not count"""
    prompts: tuple[str, ...] = ()
    """texts continued at the end of the run, by up to 64 tokens"""
    task: Any = None
    """the task as it is evaluated, e.g. NextToken(overlap=128); None for the run's own"""

    def __post_init__(self):
        positive(self, "eval", "every", "batches", "patience", least=0)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: start from a model, apply transforms, train for some steps on a task, evaluate."""

    name: str = "run"
    workdir: str = ""
    """folder of the results; empty for runs/NAME"""
    seed: int = 0
    start: str = "fresh"
    """fresh, or the path of a checkpoint, a run's folder, a Hugging Face directory or a GGUF file, or asset:NAME, or registry:NAME"""
    model: ModelConfig | None = None
    """sizes; None for those of the model it starts from, or, where that is fresh, the defaults"""
    transforms: tuple[Any, ...] = ()
    task: Any = None
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    steps: int = 1000
    epochs: float = 0.0
    """passes over the training documents in place of steps; 0 for steps. They are read once beforehand, to count their rows"""
    batch: Batch = Batch()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log_every: int = 1
    """steps between lines of metrics.jsonl"""
    profile: tuple[int, int] = (0, 0)
    """first and last step of a trace for a profiler, in the run's folder under profile/; 0 0 for none"""

    def __post_init__(self):
        positive(self, "run", "steps", "epochs", least=0)
        positive(self, "run", "log_every")
        if tuple(self.profile) != (0, 0) and not 1 <= self.profile[0] <= self.profile[1]:
            raise ConfigError(
                f"run.profile is {self.profile}: it must be a first and a last step, from 1, or 0 0 for none"
            )
        if self.task is None:
            raise ConfigError("run.task is not set: name one of llm_jax.tasks, e.g. NextToken()")
        for name, task in (("run.task", self.task), ("eval.task", self.eval.task)):
            if task is not None and (not dataclasses.is_dataclass(task) or isinstance(task, type)):
                raise ConfigError(f"{name} is {task!r}: it must be a record of llm_jax.tasks, e.g. NextToken()")
        for transform in self.transforms:
            if not hasattr(transform, "label"):
                raise ConfigError(
                    f"run.transforms holds {transform!r}: each must be a Transform, as the functions of llm_jax.transforms make"
                )
        if not self.name or "/" in self.name:
            raise ConfigError(f"run.name {self.name!r} must be a name without '/'")

    @property
    def folder(self) -> Path:
        """The folder of the run's results."""
        return as_path(self.workdir or f"runs/{self.name}")


def to_dict(record: Any) -> Any:
    """Nested plain data of a record, with the class of each part that a config may choose.

    >>> to_dict(Batch(size=4))
    {'size': 4, 'length': 256, 'accumulate': 1}
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        plain = {f.name: to_dict(getattr(record, f.name)) for f in dataclasses.fields(record)}
        return (
            plain
            if type(record).__module__ in (__name__, ModelConfig.__module__)
            else {"kind": type(record).__name__, **plain}
        )
    if hasattr(record, "label"):  # a transform is functions; its label tells which, with their arguments
        return record.label
    if isinstance(record, (tuple, list)):
        return [to_dict(x) for x in record]
    return record
