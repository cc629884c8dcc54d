"""A run as data: what is refused and in which words, what an override does, and that nothing is lost on the way to the
card.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import tasks
from llm_jax.config import (
    Batch,
    Checkpoint,
    Data,
    Eval,
    Mesh,
    Optimizer,
    Run,
    Schedule,
    load,
    override,
    parse,
    show,
    to_dict,
)
from llm_jax.errors import ConfigError
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import MaskedToken, NextToken, SequenceToSequence, SpanCorruption
from llm_jax.transforms import IDENTITY, Transform, chain
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.freeze import freeze

RUN = Run(task=NextToken(), model=ModelConfig())


@dataclasses.dataclass(frozen=True)
class Schedules:
    """A record two levels below an optional field."""

    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Probe:
    """A record that a run may lack."""

    layer: int = 0
    schedules: Schedules | None = None


@dataclasses.dataclass(frozen=True)
class Probed(Run):
    """A run with an optional record, None unless a key below it is set."""

    probe: Probe | None = None


def told(function, *arguments):
    """The message of the ConfigError that a call ends with: one line."""
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def leaves(plain, prefix=""):
    """(dotted key, value) of everything in nested dicts."""
    for name, value in plain.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


# Unknown keys

MISSPELT = [
    ("stepz", "config has no 'stepz'; did you mean 'steps'?"),
    ("modle.dim", "config has no 'modle'; did you mean 'model'?"),
    ("data.sorces", "config.data has no 'sorces'; did you mean 'sources'?"),
    ("batch.lenght", "config.batch has no 'lenght'; did you mean 'length'?"),
    ("optimizer.lerning_rate", "config.optimizer has no 'lerning_rate'; did you mean 'learning_rate'?"),
    ("optimizer.lerning-rate", "config.optimizer has no 'lerning_rate'; did you mean 'learning_rate'?"),
    ("schedule.warmpu", "config.schedule has no 'warmpu'; did you mean 'warmup'?"),
    ("mesh.fdsp", "config.mesh has no 'fdsp'; did you mean 'fsdp'?"),
    ("checkpoint.evry", "config.checkpoint has no 'evry'; did you mean 'every'?"),
    ("eval.promts", "config.eval has no 'promts'; did you mean 'prompts'?"),
    ("task.lable_smoothing", "config.task has no 'lable_smoothing'; did you mean 'label_smoothing'?"),
    ("model.vocabsize", "config.model has no 'vocabsize'; did you mean 'vocab_size'?"),
    ("mesh.qqqq", "config.mesh has no 'qqqq'; known: context, data, fsdp, tensor"),
    ("model.dim.x", "config.model.dim has no parts"),
    ("transforms.x", "config.transforms has no parts"),
    ("eval.task.overlap", "config.eval.task is None: set config.eval.task in the config file"),
]


@pytest.mark.parametrize("key, message", MISSPELT, ids=[key for key, _ in MISSPELT])
def test_a_misspelt_key_at_each_depth(key, message):
    spelt = key.replace("-", "_")
    assert told(override, RUN, [f"--config.{key}=3"]) == f"unknown key 'config.{spelt}': {message}"
    assert told(override, RUN, [f"--config.{key}", "3"]) == f"unknown key 'config.{spelt}': {message}"


def test_a_misspelt_key_of_another_task_for_evaluation():
    run = dataclasses.replace(RUN, eval=Eval(task=NextToken(overlap=128)))
    assert told(override, run, ["--config.eval.task.overlp=64"]) == (
        "unknown key 'config.eval.task.overlp': config.eval.task has no 'overlp'; did you mean 'overlap'?"
    )
    assert override(run, ["--config.eval.task.overlap=64"]).eval.task == NextToken(overlap=64)


@pytest.mark.parametrize(
    "key, message",
    [
        ("prob.layer", "config has no 'prob'; did you mean 'probe'?"),
        ("probe.layr", "config.probe has no 'layr'; did you mean 'layer'?"),
        ("probe.schedules.rte", "config.probe.schedules has no 'rte'; did you mean 'rate'?"),
        ("probe.layer.x", "config.probe.layer has no parts"),
    ],
)
def test_a_misspelt_key_below_an_optional_field(key, message):
    assert told(override, Probed(task=NextToken()), [f"--config.{key}=3"]) == f"unknown key 'config.{key}': {message}"


def test_a_key_below_an_optional_field_fills_it_in():
    run = override(Probed(task=NextToken()), ["--config.probe.layer=3"])
    assert run.probe == Probe(layer=3)
    run = override(Probed(task=NextToken()), ["--config.probe.schedules.rate", "0.25"])
    assert run.probe == Probe(schedules=Schedules(0.25))
    assert override(Probed(task=NextToken()), ["--config.steps=3"]).probe is None


# Bad values

BAD = [
    (["--config.steps=abc"], "bad value: config.steps is 'abc': it must be a whole number"),
    (["--config.steps=1.5"], "bad value: config.steps is '1.5': it must be a whole number"),
    (["--config.steps=3", "4"], "bad value: config.steps is '3 4': it must be a whole number"),
    (["--config.steps"], "bad value: config.steps is '': it must be a whole number"),
    (
        ["--config.optimizer.learning_rate=fast"],
        "bad value: config.optimizer.learning_rate is 'fast': it must be a number",
    ),
    (
        ["--config.optimizer.learning-rate", "fast"],
        "bad value: config.optimizer.learning_rate is 'fast': it must be a number",
    ),
    (["--config.data.pack=maybe"], "bad value: config.data.pack is 'maybe': it must be True or False"),
    (["--config.data.pack"], "bad value: config.data.pack is '': it must be True or False"),
    (["--config.model.dim=wide"], "bad value: config.model.dim is 'wide': it must be a whole number"),
    (["--config.task.z_loss=no"], "bad value: config.task.z_loss is 'no': it must be a number"),
    (
        ["--config.data.sources", "a", "b", "--config.data.weights", "1", "x"],
        "bad value: config.data.weights is '1 x': it must be a tuple "
        "(separated by spaces on the command line), each value a number",
    ),
    (
        ["--config.optimizer.multipliers", "embed/.*", "half"],
        "bad value: config.optimizer.multipliers is 'embed/.* half': it must be a tuple "
        "(separated by spaces on the command line), each value a text and a number",
    ),
    (
        ["--config.optimizer.multipliers", "embed/.*"],
        "bad value: config.optimizer.multipliers is 'embed/.*': it must be a tuple "
        "(separated by spaces on the command line), each value a text and a number",
    ),
    (["--config.steps=3", "--config.seed=x"], "bad value: config.seed is 'x': it must be a whole number"),
    (
        ["--config.task=NextToken"],
        "config.task is a record: set one of its parts, e.g. --config.task.label_smoothing=...",
    ),
    (
        ["--config.model", "gpt2"],
        "config.model is a record: set one of its parts, e.g. --config.model.architecture=...",
    ),
    (
        ["--config.eval.task=NextToken"],
        "config.eval.task cannot be given on the command line: set it in the config file",
    ),
    (
        ["--config.transforms", "prune"],
        "config.transforms cannot be given on the command line: set it in the config file",
    ),
    (["--steps=3"], "unknown option '--steps': overrides are written --config.KEY=VALUE"),
    (["steps=3"], "unexpected argument 'steps=3': overrides are written --config.KEY=VALUE"),
    (["--config.batch.size=0"], "batch.size is 0: it must be at least 1"),
    (["--config.steps=-1"], "run.steps is -1: it must be at least 0"),
    (["--config.optimizer.learning_rate=nan"], "optimizer.learning_rate is nan: it must be at least 0"),
    (["--config.data.long=cut"], "unknown data.long 'cut'; known: drop, error, split, truncate"),
    (["--config.data.long=trunctate"], "unknown data.long 'trunctate'; did you mean 'truncate'?"),
    (["--config.schedule.name=cosin"], "unknown schedule.name 'cosin'; did you mean 'cosine'?"),
    (["--config.model.positions=rotery"], "unknown positions 'rotery'; did you mean 'rotary'?"),
    (
        ["--config.optimizer.freeze=("],
        "optimizer: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_bad_override(arguments, message):
    assert told(override, RUN, arguments) == message


RECORDS = [
    (lambda: Data(invalid="ignore"), "unknown data.invalid 'ignore'; known: error, skip"),
    (lambda: Data(heldout=1.5), "data.heldout is 1.5: it must lie in [0, 1]"),
    (lambda: Data(heldout="some"), "data.heldout is 'some': it must lie in [0, 1]"),
    (lambda: Data(max_dropped=-0.1), "data.max_dropped is -0.1: it must lie in [0, 1]"),
    (lambda: Data(window=0), "data.window is 0: it must be at least 1"),
    (lambda: Data(workers=-1), "data.workers is -1: it must be at least 0"),
    (lambda: Data(sources=("a",), weights=(1.0, 2.0)), "data.weights has 2 values for 1 data.sources"),
    (
        lambda: Data(sources=("a", "b"), weights=(1.0, -1.0)),
        "data.weights are (1.0, -1.0): none may be below 0, and one must be above it",
    ),
    (
        lambda: Data(sources=("a",), weights=(0.0,)),
        "data.weights are (0.0,): none may be below 0, and one must be above it",
    ),
    (
        lambda: Data(sources=("a",), weights=(float("nan"),)),
        "data.weights are (nan,): none may be below 0, and one must be above it",
    ),
    (lambda: Data(buckets=(8, 4)), "data.buckets are (8, 4): they must be positive and increasing"),
    (lambda: Data(buckets=(8, 8)), "data.buckets are (8, 8): they must be positive and increasing"),
    (lambda: Data(buckets=(0, 8)), "data.buckets are (0, 8): they must be positive and increasing"),
    (lambda: Batch(length=0), "batch.length is 0: it must be at least 1"),
    (lambda: Batch(accumulate=0), "batch.accumulate is 0: it must be at least 1"),
    (lambda: Batch(size=8, accumulate=3), "batch.size 8 is not a multiple of batch.accumulate 3"),
    (lambda: Optimizer(weight_decay=-1.0), "optimizer.weight_decay is -1.0: it must be at least 0"),
    (lambda: Optimizer(clip=-1.0), "optimizer.clip is -1.0: it must be at least 0"),
    (lambda: Optimizer(max_nonfinite=0), "optimizer.max_nonfinite is 0: it must be at least 1"),
    (lambda: Optimizer(moving_average=1.0), "optimizer.moving_average is 1.0: it must lie in [0, 1)"),
    (
        lambda: Optimizer(multipliers=(("a(", 1.0),)),
        "optimizer: 'a(' is not a regular expression (missing ), unterminated subpattern at position 1)",
    ),
    (lambda: Schedule(warmup=-1), "schedule.warmup is -1: it must be at least 0"),
    (lambda: Schedule(cycles=0), "schedule.cycles is 0: it must be at least 1"),
    (lambda: Schedule(final=2.0), "schedule.final is 2.0: it must lie in [0, 1]"),
    (lambda: Schedule(initial=-1.0), "schedule.initial is -1.0: it must lie in [0, 1]"),
    (lambda: Schedule(decay=1.1), "schedule.decay is 1.1: it must lie in [0, 1]"),
    (lambda: Mesh(data=0), "mesh is (0, 1, 1, 1): each axis is a positive number, and at most one is -1"),
    (lambda: Mesh(data=-1, fsdp=-1), "mesh is (-1, -1, 1, 1): each axis is a positive number, and at most one is -1"),
    (lambda: Mesh(tensor=-2), "mesh is (-1, 1, -2, 1): each axis is a positive number, and at most one is -1"),
    (lambda: Checkpoint(every=0), "checkpoint.every is 0: it must be at least 1"),
    (lambda: Checkpoint(keep=0), "checkpoint.keep is 0: it must be at least 1"),
    (lambda: Eval(every=-1), "eval.every is -1: it must be at least 0"),
    (lambda: Run(), "run.task is not set: name one of llm_jax.tasks, e.g. NextToken()"),
    (lambda: Run(task="NextToken"), "run.task is 'NextToken': it must be a record of llm_jax.tasks, e.g. NextToken()"),
    (
        lambda: Run(task=NextToken),
        "run.task is <class 'llm_jax.tasks.next_token.NextToken'>: "
        "it must be a record of llm_jax.tasks, e.g. NextToken()",
    ),
    (
        lambda: Run(task=NextToken(), eval=Eval(task="NextToken")),
        "eval.task is 'NextToken': it must be a record of llm_jax.tasks, e.g. NextToken()",
    ),
    (lambda: Run(task=NextToken(), name="a/b"), "run.name 'a/b' must be a name without '/'"),
    (lambda: Run(task=NextToken(), name=""), "run.name '' must be a name without '/'"),
    (lambda: Run(task=NextToken(), steps="many"), "run.steps is 'many': it must be at least 0"),
    (lambda: Run(task=NextToken(), log_every=0), "run.log_every is 0: it must be at least 1"),
    (
        lambda: Run(task=NextToken(), transforms=("prune",)),
        "run.transforms holds 'prune': each must be a Transform, as the functions of llm_jax.transforms make",
    ),
]


@pytest.mark.parametrize("make, message", RECORDS, ids=[message[:40] for _, message in RECORDS])
def test_a_record_refuses_a_bad_value(make, message):
    assert told(make) == message


# Overrides that hold

GOOD = [
    (["--config.steps=3"], {"steps": 3}),
    (["--config.steps", "3"], {"steps": 3}),
    (["--config.log-every=2"], {"log_every": 2}),
    (["--config.optimizer.learning_rate=3e-4"], {"optimizer.learning_rate": 3e-4}),
    (["--config.optimizer.learning-rate", "1"], {"optimizer.learning_rate": 1.0}),
    (["--config.data.pack=False"], {"data.pack": False}),
    (["--config.checkpoint.allow_changed_data", "True"], {"checkpoint.allow_changed_data": True}),
    (
        ["--config.data.sources", "text:a*.txt", "asset:sotu", "--config.data.weights", "1", "2.5"],
        {"data.sources": ["text:a*.txt", "asset:sotu"], "data.weights": [1.0, 2.5]},
    ),
    (["--config.data.weights", "1", "--config.data.sources=a"], {"data.sources": ["a"], "data.weights": [1.0]}),
    (["--config.data.buckets", "16", "32"], {"data.buckets": [16, 32]}),
    (
        ["--config.eval.prompts", "Once upon a time", "--config.steps=3"],
        {"eval.prompts": ["Once upon a time"], "steps": 3},
    ),
    (
        ["--config.optimizer.multipliers", "embed/.*", "0.5", ".*", "2"],
        {"optimizer.multipliers": [["embed/.*", 0.5], [".*", 2.0]]},
    ),
    (["--config.optimizer.arguments", "b2", "0.95"], {"optimizer.arguments": [["b2", 0.95]]}),
    (["--config.optimizer.freeze", "embed/.*", ".*/norm/.*"], {"optimizer.freeze": ["embed/.*", ".*/norm/.*"]}),
    (
        ["--config.task.z_loss=1e-4", "--config.task.label-smoothing=0.1"],
        {"task.z_loss": 1e-4, "task.label_smoothing": 0.1},
    ),
    (
        ["--config.model.dim=64", "--config.model.heads=4", "--config.model.qk-norm=True"],
        {"model.dim": 64, "model.heads": 4, "model.qk_norm": True},
    ),
    (["--config.mesh.data=2", "--config.mesh.fsdp=-1"], {"mesh.data": 2, "mesh.fsdp": -1}),
    (["--config.seed", "-3"], {"seed": -3}),
    (["--config.steps=3", "--config.steps=4"], {"steps": 4}),
    ([], {}),
]


@pytest.mark.parametrize("arguments, changes", GOOD, ids=[" ".join(arguments) for arguments, _ in GOOD])
def test_an_override_changes_what_it_names_and_nothing_else(arguments, changes):
    before, after = dict(leaves(to_dict(RUN))), dict(leaves(to_dict(override(RUN, arguments))))
    assert {key: value for key, value in after.items() if value != before[key]} == changes
    assert list(before) == list(after)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-12, 1e3), st.integers(0, 2**31))
def test_numbers_come_through_exactly(rate, seed):
    run = override(RUN, [f"--config.optimizer.learning_rate={rate!r}", f"--config.seed={seed}"])
    assert (run.optimizer.learning_rate, run.seed) == (rate, seed)


def test_an_override_keeps_what_the_file_said():
    run = Run(
        task=SpanCorruption(rate=0.3),
        model=ModelConfig(dim=48, heads=4),
        data=Data(sources=("a", "b"), weights=(1.0, 3.0)),
        transforms=(accumulate(2),),
        name="mine",
    )
    assert override(run, ["--config.task.span=4", "--config.model.layers=2"]) == dataclasses.replace(
        run, task=SpanCorruption(rate=0.3, span=4.0), model=ModelConfig(dim=48, heads=4, layers=2)
    )


# Config files


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


HEAD = "from llm_jax.config import *\nfrom llm_jax.models.presets import gpt2\nfrom llm_jax.tasks import NextToken\n"
FILE = HEAD + "def get_config():\n    return Run(task=NextToken(), {})\n"


def test_both_ways_to_name_the_file(tmp_path):
    path = write(tmp_path, FILE.format("steps=7"))
    expected = Run(task=NextToken(), steps=7)
    assert load(path) == load(str(path)) == expected
    assert parse([f"--config={path}"]) == parse(["--config", str(path)]) == expected
    changed = dataclasses.replace(expected, seed=5)
    for arguments in (
        ["--config.seed=5", f"--config={path}"],
        ["--config.seed", "5", "--config", str(path)],
        ["--config", str(path), "--config.seed=5"],
    ):
        assert parse(arguments) == changed


def test_no_file():
    assert told(parse, []) == told(parse, ["--config.steps=3"]) == "no config: say --config=configs/NAME.py"
    assert told(parse, ["--config.steps=3", "--config"]) == "--config names no file: say --config=configs/NAME.py"


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "", "quickstart.py")
    assert (
        told(load, tmp_path / "quickstrat.py")
        == f"no config file {tmp_path}/quickstrat.py; did you mean {tmp_path}/quickstart.py?"
    )
    assert told(load, tmp_path / "zzz.py") == f"no config file {tmp_path}/zzz.py"
    assert told(load, tmp_path / "no" / "folder.py") == f"no config file {tmp_path}/no/folder.py"
    assert told(load, tmp_path) == f"no config file {tmp_path}"


FILES = [
    ("steps = 3\n", "{path} has no function get_config()"),
    ("get_config = lambda: dict(steps=3)\n", "{path}: get_config() returned a dict, not a llm_jax.config.Run"),
    ("def get_config():\n    pass\n", "{path}: get_config() returned a NoneType, not a llm_jax.config.Run"),
    ("import numpie\n", "{path}:1: ModuleNotFoundError: No module named 'numpie'"),
    ("\n\ndef get_config():\n    return Runn()\n", "{path}:4: NameError: name 'Runn' is not defined"),
    ("def get_config():\n    return {}['a']\n", "{path}:2: KeyError: 'a'"),
    (FILE.format("batch=Batch(size=0)"), "batch.size is 0: it must be at least 1"),
    (
        FILE.format("optimizer=Optimizer(lerning_rate=1.0)"),
        "{path}:5: TypeError: Optimizer.__init__() got an unexpected keyword argument 'lerning_rate'; "
        "did you mean 'learning_rate'?",
    ),
    (
        FILE.format("step=3"),
        "{path}:5: TypeError: Run.__init__() got an unexpected keyword argument 'step'; did you mean 'steps'?",
    ),
    (
        FILE.format("model=gpt2(layer=3)"),
        "{path}:5: TypeError: ModelConfig.__init__() got an unexpected keyword argument 'layer'; "
        "did you mean 'layers'?",
    ),
    (
        FILE.replace("NextToken()", "NextToken(zloss=1.0)").format(""),
        "{path}:5: TypeError: NextToken.__init__() got an unexpected keyword argument 'zloss'; did you mean 'z_loss'?",
    ),
    (
        FILE.format("data=Data(sources='asset:sotu')"),
        "{path}: config.data.sources is 'asset:sotu': it must be a tuple "
        "(separated by spaces on the command line), each value a text",
    ),
    (
        FILE.format("data=Data(sources=('a', 3))"),
        "{path}: config.data.sources is ('a', 3): it must be a tuple "
        "(separated by spaces on the command line), each value a text",
    ),
    (
        FILE.format("optimizer=Optimizer(arguments=(('b2', 'x'),))"),
        "{path}: config.optimizer.arguments is (('b2', 'x'),): it must be a tuple "
        "(separated by spaces on the command line), each value a text and a number",
    ),
    (FILE.format("optimizer=Optimizer(name=3)"), "{path}: config.optimizer.name is 3: it must be a text"),
    (FILE.format("steps=1.5"), "{path}: config.steps is 1.5: it must be a whole number"),
    (FILE.format("seed=True"), "{path}: config.seed is True: it must be a whole number"),
    (FILE.format("data=Data(pack=1)"), "{path}: config.data.pack is 1: it must be True or False"),
    (FILE.format("batch=8"), "{path}: config.batch is 8: it must be Batch"),
    (FILE.replace("NextToken()", "NextToken(z_loss=None)").format(""), "task.z_loss is None: it must be at least 0"),
]


@pytest.mark.parametrize("text, message", FILES, ids=[message[:60] for _, message in FILES])
def test_a_bad_file(tmp_path, text, message):
    path = write(tmp_path, text)
    assert told(load, path) == message.format(path=path)


def test_a_file_that_is_not_python(tmp_path):
    path = write(tmp_path, "def get_config(:\n")
    assert told(load, path).startswith(f"{path}: SyntaxError: invalid syntax")
    path = write(tmp_path, "{}", "mine.json")
    assert told(load, path) == f"{path} is not a Python file"


def test_a_whole_number_may_stand_for_a_number(tmp_path):
    assert (
        load(
            write(tmp_path, FILE.format("optimizer=Optimizer(learning_rate=1, arguments=(('b2', 1),))"))
        ).optimizer.learning_rate
        == 1
    )


# The way out

FULL = Run(
    name="full",
    workdir="somewhere",
    seed=3,
    start="runs/other",
    model=ModelConfig(dim=48, heads=4, mlp="relu"),
    transforms=(accumulate(2), freeze(["embed/.*"])),
    task=SpanCorruption(rate=0.3),
    data=Data(sources=("a", "b"), weights=(1.0, 2.0), pack=False, buckets=(16, 32)),
    optimizer=Optimizer(name="lion", arguments=(("b2", 0.95),), multipliers=(("embed/.*", 0.5),), freeze=("head/.*",)),
    schedule=Schedule(name="wsd", cycles=2),
    steps=7,
    batch=Batch(size=16, accumulate=2),
    mesh=Mesh(fsdp=2),
    checkpoint=Checkpoint(keep=5),
    eval=Eval(prompts=("a", "b c"), task=NextToken(overlap=8)),
    log_every=3,
)


def rebuilt(plain):
    """The record that a dict describes, but for the transforms, of which it holds the names."""

    def tuples(x):
        return tuple(map(tuples, x)) if isinstance(x, list) else tasks.from_dict(x) if isinstance(x, dict) else x

    kinds = {
        f.name: type(getattr(FULL, f.name))
        for f in dataclasses.fields(Run)
        if dataclasses.is_dataclass(getattr(FULL, f.name))
    }
    made = {
        name: kinds[name](**{k: tuples(v) for k, v in part.items()})
        for name, part in plain.items()
        if name in kinds and name != "task"
    }
    rest = {name: tuples(x) for name, x in plain.items() if name not in kinds and name != "transforms"}
    return Run(**rest, **made, task=tasks.from_dict(plain["task"]))


def test_to_dict_round_trip():
    plain = json.loads(json.dumps(to_dict(FULL)))
    assert plain == to_dict(FULL)
    assert rebuilt(plain) == dataclasses.replace(FULL, transforms=())
    assert plain["task"]["kind"] == "SpanCorruption" and "kind" not in plain["data"] and "kind" not in plain["model"]


def test_transforms_are_written_by_name_and_arguments():
    assert to_dict(FULL)["transforms"] == ["accumulate(2)", "freeze(['embed/.*'])"]
    assert to_dict(accumulate(2)) != to_dict(accumulate(4))
    assert to_dict(chain(accumulate(2), IDENTITY, freeze(["a"]))) == "accumulate(2), freeze(['a'])"
    assert to_dict(chain()) == to_dict(IDENTITY) == "identity"
    assert to_dict(Transform()) == "transform"


@pytest.mark.parametrize("run", [RUN, FULL], ids=["default", "full"])
def test_show_prints_every_key(run):
    lines = show(run).splitlines()
    printed = {line.split(" = ")[0]: json.loads(line.split(" = ", 1)[1]) for line in lines}
    assert len(printed) == len(lines) and printed == dict(leaves(to_dict(run)))
    fields = {f"optimizer.{f.name}" for f in dataclasses.fields(Optimizer)} | {
        f"model.{f.name}" for f in dataclasses.fields(ModelConfig)
    }
    assert fields <= set(printed)


def count(kind):
    """Fields of a record and of the records in it."""
    parts = [getattr(RUN, f.name) if kind is Run else None for f in dataclasses.fields(kind)]
    return sum(
        count(type(part)) if dataclasses.is_dataclass(part) and type(part) not in (ModelConfig, NextToken) else 1
        for part in parts
    )


def test_a_config_has_under_60_fields():
    assert count(Run) == len([key for key in dict(leaves(to_dict(RUN))) if not key.startswith(("model.", "task."))]) + 2
    assert count(Run) < 60


def test_every_record_is_frozen():
    for record in (RUN, *(getattr(RUN, f.name) for f in dataclasses.fields(RUN))):
        if dataclasses.is_dataclass(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, dataclasses.fields(record)[0].name, None)


def test_the_folder():
    assert RUN.folder == Path("runs/run")
    assert dataclasses.replace(RUN, name="a").folder == Path("runs/a")
    assert dataclasses.replace(RUN, name="a", workdir="/x/y").folder == Path("/x/y")


def test_a_task_of_any_kind_is_overridden_by_its_fields():
    for task, key in ((MaskedToken(), "rate"), (SequenceToSequence(), "label_smoothing"), (SpanCorruption(), "rate")):
        changed = override(Run(task=task), [f"--config.task.{key}=0.25"])
        assert changed.task == dataclasses.replace(task, **{key: 0.25})


def test_reading_a_config_does_not_import_jax():
    """A misspelt key is told before a device is touched. Only tasks that a file names bring jax with them."""
    code = "import sys, llm_jax.config; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
