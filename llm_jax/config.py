"""A run as data: frozen records, their validation, and the strict reading of config files and overrides.

Nothing here imports jax: a misspelt key is told before a device is touched. The sizes of the model live in `models/config.py`.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import re
import traceback
import typing
from pathlib import Path
from typing import Any

from llm_jax.errors import ConfigError, UserError, choose, suggest
from llm_jax.models.config import ModelConfig


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
    """share of the pieces drawn from each source; empty for shares in proportion to their documents"""
    heldout: float = 0.05
    """share of the documents kept apart for evaluation when heldout_sources is empty"""
    group: str = ""
    """field whose equal values stay on one side of the split; empty splits by document"""
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
    workers: int = 0
    """processes that prepare batches; 0 for a thread"""
    max_dropped: float = 0.05
    """share of examples dropped, of tokens lost, or of rows with nothing to predict that stops the run"""

    def __post_init__(self):
        choose("data.long", self.long, ("split", "truncate", "drop", "error"))
        choose("data.invalid", self.invalid, ("error", "skip"))
        fraction(self, "data", "heldout", "max_dropped")
        positive(self, "data", "window")
        positive(self, "data", "workers", least=0)
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(f"data.weights has {len(self.weights)} values for {len(self.sources)} data.sources")
        if not all(w > 0 for w in self.weights):
            raise ConfigError(f"data.weights are {self.weights}: each must be above 0")
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
    """evaluations in a row without a better checkpoint.best after which the run ends; 0 for none"""
    prompts: tuple[str, ...] = ()
    """texts continued at the end of the run"""
    max_new_tokens: int = 64
    """tokens of each continuation"""
    task: Any = None
    """the task as it is evaluated, e.g. NextToken(overlap=128); None for the run's own"""

    def __post_init__(self):
        positive(self, "eval", "every", "batches", "patience", "max_new_tokens", least=0)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: start from a model, apply transforms, train for some steps on a task, evaluate."""

    name: str = "run"
    workdir: str = ""
    """folder of the results; empty for runs/NAME"""
    seed: int = 0
    start: str = "fresh"
    """fresh, or the path of a checkpoint, a run's folder, a Hugging Face directory or a GGUF file, or asset:NAME"""
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

    def __post_init__(self):
        positive(self, "run", "steps", "epochs", least=0)
        positive(self, "run", "log_every")
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
        return Path(self.workdir or Path("runs") / self.name)


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


def load(path: str | Path) -> Run:
    """The `Run` that the config file's `get_config()` returns.

    Raises:
        ConfigError: no such file, no `get_config` in it, an error in it, or a value that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        raise ConfigError(f"no config file {path}" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path} has no function get_config()")
        run = module.get_config()
    except UserError:
        raise
    except Exception as e:
        lines = [
            f":{frame.lineno}"
            for frame in traceback.extract_tb(e.__traceback__)
            if Path(frame.filename) == path.absolute()
        ]
        said = _with_suggestion(str(e), vars(module))
        raise ConfigError(f"{path}{''.join(lines[-1:])}: {type(e).__name__}: {said}") from e
    if not isinstance(run, Run):
        raise ConfigError(f"{path}: get_config() returned a {type(run).__name__}, not a llm_jax.config.Run")
    _check_types(run, str(path))
    return run


def _with_suggestion(message: str, names: dict[str, Any]) -> str:
    """The message; where it is Python's for a record made with an unknown field, with the nearest one."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    kind = {**globals(), **names}.get(found[1]) if found else None
    if not found or not dataclasses.is_dataclass(kind):
        return message
    return found[0] + suggest(found[2], [f.name for f in dataclasses.fields(kind)])  # newer Pythons suggest one too


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def _describe(annotation: Any) -> str:
    """What a field of this type may hold, in words."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        if options[1:] == (...,):
            return f"a tuple (separated by spaces on the command line), each value {_describe(options[0])}"
        return " and ".join(map(_describe, options))
    return (
        " or ".join(map(_describe, options))
        if options
        else _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    )


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; a whole number may stand for a number."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin is tuple:
        expected = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(expected) and all(map(_fits, value, expected))
    if options:
        return any(_fits(value, option) for option in options)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _check_types(record: Any, path: str, where: str = "config") -> None:
    """Raise unless each field of a record and of the records in it holds what its annotation says."""
    for name, annotation in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, annotation):
            raise ConfigError(f"{path}: {where}.{name} is {value!r}: it must be {_describe(annotation)}")
        if dataclasses.is_dataclass(value):
            _check_types(value, path, f"{where}.{name}")


def _record_type(annotation: Any, value: Any) -> type | None:
    """The dataclass that a field holds, from its value or, where that is None, from its annotation."""
    if dataclasses.is_dataclass(value):
        return type(value)
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _check_key(run: Any, key: str) -> tuple[Any, Any]:
    """(`run` with the optional records on the way to `key` filled in, what `key` may hold); raises unless it names a field at each depth."""
    names = key.replace("-", "_").split(".")
    whole = ".".join(("config", *names))

    def walk(record: Any, depth: int) -> tuple[Any, Any]:
        hints = typing.get_type_hints(type(record))
        name, where = names[depth], ".".join(("config", *names[:depth]))
        if name not in hints:
            raise ConfigError(f"unknown key {whole!r}: {where} has no {name!r}{suggest(name, hints)}")
        value = getattr(record, name)
        kind = _record_type(hints[name], value)
        if depth + 1 == len(names):
            if kind is not None:
                raise ConfigError(
                    f"{whole} is a record: set one of its parts, e.g. --{whole}.{dataclasses.fields(kind)[0].name}=..."
                )
            if Any in (hints[name], *typing.get_args(hints[name])):
                raise ConfigError(f"{whole} cannot be given on the command line: set it in the config file")
            return record, hints[name]
        if kind is None:
            missing = f"is None: set {where}.{name} in the config file" if hints[name] is Any else "has no parts"
            raise ConfigError(f"unknown key {whole!r}: {where}.{name} {missing}")
        filled, annotation = walk(kind() if value is None else value, depth + 1)
        return dataclasses.replace(record, **{name: filled}), annotation

    return walk(run, 0)


def _typed(run: Run, arguments: list[str]) -> Run | None:
    """`run` with the values of checked keys, or None if one has the wrong type."""
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(
                type(run), default=run, args=arguments, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
            )
    except SystemExit:
        return None


def _fits_alone(run: Run, group: list[str]) -> bool:
    """Whether one key's values have its type, be they allowed only together with those of other keys."""
    try:
        return _typed(run, group) is not None
    except ConfigError:
        return True


def override(run: Run, arguments: typing.Sequence[str]) -> Run:
    """`run` with `--config.KEY=VALUE` (or `--config.KEY VALUE ...`) applied, keys and types checked.

    Raises:
        ConfigError: an unknown key at any depth, with the nearest name, or a value of the wrong type.
    """
    groups: list[list[str]] = []
    annotations = []
    for argument in arguments:
        if argument.startswith("--"):
            if not argument.startswith("--config."):
                raise ConfigError(
                    f"unknown option {argument.split('=')[0]!r}: overrides are written --config.KEY=VALUE"
                )
            groups.append(["--" + argument.removeprefix("--config.")])
            run, annotation = _check_key(run, groups[-1][0][2:].split("=")[0])
            annotations.append(annotation)
        elif groups:
            groups[-1].append(argument)
        else:
            raise ConfigError(f"unexpected argument {argument!r}: overrides are written --config.KEY=VALUE")
    changed = _typed(run, [word for group in groups for word in group])
    if changed is not None:
        return changed
    wrong = [(group, annotation) for group, annotation in zip(groups, annotations) if not _fits_alone(run, group)]
    group, annotation = wrong[0] if wrong else (groups[-1], annotations[-1])
    key, _, value = group[0][2:].partition("=")
    given = " ".join(filter(None, [value, *group[1:]]))
    raise ConfigError(f"bad value: config.{key.replace('-', '_')} is {given!r}: it must be {_describe(annotation)}")


def parse(arguments: typing.Sequence[str]) -> Run:
    """The run that a command line `--config=FILE [--config.KEY=VALUE ...]` describes."""
    rest = list(arguments)
    for i, argument in enumerate(rest):
        if argument == "--config":
            if i + 1 == len(rest):
                raise ConfigError("--config names no file: say --config=configs/NAME.py")
            return override(load(rest[i + 1]), rest[:i] + rest[i + 2 :])
        if argument.startswith("--config="):
            return override(load(argument.removeprefix("--config=")), rest[:i] + rest[i + 1 :])
    raise ConfigError("no config: say --config=configs/NAME.py")


def show(run: Run) -> str:
    """The resolved config as text, a key a line."""
    lines: list[str] = []

    def walk(prefix: str, value: Any):
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}.{name}" if prefix else name, part)
        else:
            lines.append(f"{prefix} = {json.dumps(value)}")

    walk("", to_dict(run))
    return "\n".join(lines)
