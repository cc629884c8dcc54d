"""The commands: what they print, as text and as JSON, and that what a user gets wrong is one line on stderr, exit
status 2, no traceback.
"""

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llm_jax import cli, config, model, sharding

ROOT = Path(__file__).parents[1]
PROMPT = "we the people"
CONFIG = """
from llm_jax.config import Batch, Data, Eval, Optimizer, Run
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config():
    return Run(
        name="tiny", workdir={workdir!r}, steps=2, task=NextToken(), batch=Batch(size=4, length=24),
        model=ModelConfig(vocab_size=300, max_length=48, layers=1, dim=16, heads=2),
        optimizer=Optimizer(learning_rate=0.01), eval=Eval(prompts=({prompt!r},)),
        data=Data(sources=("jsonl:{folder}/corpus.jsonl",), heldout=0.2, tokenizer="bpe:280", window=16))
"""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """On one device, for which compiling takes half as long as for eight."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            lambda sizes=config.Mesh(), devices=None: make_mesh(config.Mesh(), devices or jax.devices()[:1]),
        )
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A config file and its corpus."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [
        json.dumps({"text": f"{PROMPT} of the {n} states, in order to form a more perfect union"}) for n in range(20)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tiny.py").write_text(
        CONFIG.format(workdir=str(folder / "run"), folder=folder, prompt=PROMPT), encoding="utf-8"
    )
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def trained(file):
    """(folder of a run that `train` carried out, what it printed as JSON)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["train", f"--config={file}", "--json"]) == 0
    return file.parent / "run", json.loads(out.getvalue())


def printed(capsys, *arguments, status=0):
    """What a command writes to stdout; its exit status is checked."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == status
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line that a command ends with, without 'error: '."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("error: ") and told.err.endswith("\n")
    return told.err.removeprefix("error: ").removesuffix("\n")


# Training


def test_train_prints_one_json_value_that_result_json_holds(trained):
    folder, result = trained
    assert result == json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 2 and set(result["eval"]) >= {"loss", "perplexity", "bits_per_byte", "accuracy"}
    assert [s["prompt"] for s in result["samples"]] == [PROMPT]


def test_the_same_command_again_has_nothing_left_to_do(trained, file, capsys):
    folder, before = trained
    capsys.readouterr()
    assert cli.main(["train", "--config", str(file)]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert f"prompt: {PROMPT}" in lines and any(line.startswith(PROMPT) for line in lines)
    assert any(
        line.startswith("held out: loss ") and f"perplexity {before['eval']['perplexity']:.4f}" in line
        for line in lines
    )
    assert any(
        line.startswith(f"data: {before['data']['read']} documents read, 0 dropped, 0 truncated; ") for line in lines
    )
    assert any(line.startswith("2 steps, ") for line in lines)
    assert {f"{name}: {path}" for name, path in before["paths"].items()} <= set(lines)
    assert "optimizer.learning_rate = 0.01" in told.err and f"resuming {folder} at step 2" in told.err


def test_another_config_in_the_same_folder_is_refused(trained, file, capsys):
    capsys.readouterr()
    assert cli.main(["train", f"--config={file}", "--config.optimizer.learning_rate=0.5"]) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err and told.out == ""
    assert told.err.splitlines()[-1] == (
        f"error: {trained[0]} holds a run of another config (optimizer.learning_rate is 0.01 there and 0.5 here): "
        "give this one another name or workdir, or remove that folder"
    )


# Afterwards


def test_show(trained, capsys):
    card = json.loads(printed(capsys, "show", trained[0], "--json"))
    assert (
        card["name"] == "tiny" and card["config"]["optimizer"]["learning_rate"] == 0.01 and card["model"]["dim"] == 16
    )
    shown = printed(capsys, "show", trained[0])
    assert card["hashes"]["params"] in shown and "NextToken, 2 steps" in shown


def test_eval(trained, file, capsys):
    folder, result = trained
    found = json.loads(printed(capsys, "eval", folder, "--json"))
    assert found == pytest.approx(result["eval"], rel=1e-5)
    lines = dict(line.split() for line in printed(capsys, "eval", folder).splitlines())
    assert {name: float(x) for name, x in lines.items()} == pytest.approx(found, rel=1e-5)
    whole = json.loads(
        printed(
            capsys, "eval", folder, f"--source=jsonl:{file.parent}/corpus.jsonl", "--length=32", "--batch=8", "--json"
        )
    )
    assert whole["tokens"] > 3 * found["tokens"] and math.isfinite(whole["loss"])


def test_score(trained, capsys, monkeypatch):
    found = json.loads(printed(capsys, "score", trained[0], PROMPT, "--json"))
    assert (
        found["log_probability"] == pytest.approx(sum(t["log_probability"] for t in found["tokens"]))
        and found["log_probability"] < 0
    )
    assert "".join(t["token"] for t in found["tokens"][:-1]) == PROMPT
    lines = printed(capsys, "score", trained[0], PROMPT).splitlines()
    count = len(found["tokens"])
    assert (
        lines[-1].strip() == f"{found['log_probability']:.4f}  in all, {found['log_probability'] / count:.4f} a token"
    )
    assert [line.split("  ", 1)[0].strip() or line.split()[0] for line in lines[:-1]] == [
        f"{t['log_probability']:.4f}" for t in found["tokens"]
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert json.loads(printed(capsys, "score", trained[0], "-", "--json")) == found


def test_generate(trained, capsys):
    """A single prompt is streamed, several are printed when all are done; either way it is the text of the library's
    function.
    """
    loaded = model.load(trained[0])
    one = model.generate(loaded, [PROMPT], max_new_tokens=4)[0]
    assert printed(capsys, "generate", trained[0], PROMPT, "--max-new-tokens=4") == f"{PROMPT}{one}\n"
    assert json.loads(printed(capsys, "generate", trained[0], PROMPT, "--max-new-tokens=4", "--json")) == [
        {"prompt": PROMPT, "text": one}
    ]
    options = [
        "--max-new-tokens=4",
        "--temperature=1.5",
        "--top-k=50",
        "--top-p=0.9",
        "--min-p=0.01",
        "--repetition-penalty=1.2",
        "--seed=3",
    ]
    texts = model.generate(
        loaded,
        [PROMPT, "in order"],
        max_new_tokens=4,
        temperature=1.5,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=3,
    )
    assert (
        printed(capsys, "generate", trained[0], PROMPT, "in order", *options)
        == f"{PROMPT}{texts[0]}\n\nin order{texts[1]}\n"
    )


# What a user gets wrong

KEYS = [
    ("stepz=3", "unknown key 'config.stepz': config has no 'stepz'; did you mean 'steps'?"),
    ("data.sorces=x", "unknown key 'config.data.sorces': config.data has no 'sorces'; did you mean 'sources'?"),
    (
        "optimizer.lerning_rate=1",
        "unknown key 'config.optimizer.lerning_rate': config.optimizer has no 'lerning_rate'; "
        "did you mean 'learning_rate'?",
    ),
    ("task.zloss=1", "unknown key 'config.task.zloss': config.task has no 'zloss'; did you mean 'z_loss'?"),
    (
        "model.vocabsize=1",
        "unknown key 'config.model.vocabsize': config.model has no 'vocabsize'; did you mean 'vocab_size'?",
    ),
    (
        "eval.task.overlap=1",
        "unknown key 'config.eval.task.overlap': config.eval.task is None: set config.eval.task in the config file",
    ),
    ("steps=many", "bad value: config.steps is 'many': it must be a whole number"),
    ("optimizer.learning_rate=fast", "bad value: config.optimizer.learning_rate is 'fast': it must be a number"),
    ("data.pack=yes", "bad value: config.data.pack is 'yes': it must be True or False"),
    ("batch.size=0", "batch.size is 0: it must be at least 1"),
    (
        "optimizer.freeze=(",
        "optimizer: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
    ),
    ("schedule.name=cosin", "unknown schedule.name 'cosin'; did you mean 'cosine'?"),
    ("model.mlp=gelu_tan", "unknown mlp 'gelu_tan'; did you mean 'gelu_tanh'?"),
    # known only when the run is put together
    ("optimizer.name=adamm", "unknown optimizer 'adamm'; did you mean 'adam'?"),
    (
        "optimizer.freeze=embed/token",
        "optimizer.freeze 'embed/token' matches no parameter; did you mean 'embed/tokens'?",
    ),
    ("optimizer.freeze=.*", "optimizer.freeze leaves no parameter to train"),
    ("data.tokenizer=bpee:300", "unknown kind of tokenizer 'bpee' in 'bpee:300'; did you mean 'bpe'?"),
    (
        "model.vocab_size=100",
        "the tokenizer has 280 entries, the model's vocabulary 100: set model.vocab_size=280 or more",
    ),
    ("data.sources=txt:x", "unknown scheme 'txt' of source 'txt:x'; did you mean 'text'?"),
]


@pytest.mark.parametrize("override, message", KEYS, ids=[override for override, _ in KEYS])
def test_a_bad_config_ends_training_with_one_line(file, tmp_path, capsys, override, message):
    assert (
        refused(capsys, "train", f"--config={file}", f"--config.workdir={tmp_path}/new", f"--config.{override}")
        == message
    )


def test_a_record_with_a_missing_field(trained, file, tmp_path, capsys):
    """Told at the first batch, after the config."""
    tokenizer = f"--config.data.tokenizer={trained[0]}/tokenizer.json"
    capsys.readouterr()
    assert (
        cli.main(["train", f"--config={file}", f"--config.workdir={tmp_path}/new", "--config.data.text=txt", tokenizer])
        == 2
    )
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: {file.parent}/corpus.jsonl:")
    assert last.endswith("no field 'txt'; did you mean 'text'? It has: id, text. Set data.text")
    assert not any("Traceback" in line or "Error" in line for line in before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evl", "x"], "unknown verb 'evl'; did you mean 'eval'?"),
        (
            ["--config=x.py"],
            "unknown verb '--config=x.py'; known: advise, cache, cost, diff, drift, eval, export, gate, generate, import, log, merge, plan, "
            "predict, promote, report, rollback, score, show, sweep, train, update",
        ),
        (["train", "--config"], "--config names no file: say --config=configs/NAME.py"),
        (["train", "--steps=3"], "no config: say --config=configs/NAME.py"),
        (
            ["train", "--config=configs/quickstrat.py"],
            "no config file configs/quickstrat.py; did you mean configs/quickstart.py?",
        ),
        (["eval"], "the following arguments are required: checkpoint"),
        (["generate", "x"], "the following arguments are required: prompts"),
        (["generate", "x", "y", "--temprature=1"], "unknown argument '--temprature=1'; did you mean '--temperature'?"),
        (["generate", "x", "y", "--top-k=many"], "argument --top-k: invalid int value: 'many'"),
        (["show", "x", "y"], "unknown argument 'y'; known: --help, --json, -h"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(ROOT)
    assert refused(capsys, *arguments) == message


@pytest.mark.parametrize("verb", ["eval", "score", "generate", "show"])
def test_no_checkpoint(tmp_path, capsys, verb):
    rest = ["a text"] if verb in ("score", "generate") else []
    for path in (tmp_path, tmp_path / "none"):
        assert str(path) in refused(capsys, verb, path, *rest)


@pytest.mark.parametrize(
    "arguments", [["--temperature=-1"], ["--top-p=2"], ["--max-new-tokens=-3"], ["--repetition-penalty=0"]]
)
def test_bad_settings_of_generation(trained, capsys, arguments):
    assert refused(capsys, "generate", trained[0], PROMPT, "in order", *arguments)


def test_bad_source_for_evaluation(trained, capsys, tmp_path):
    told = refused(capsys, "eval", trained[0], f"--source=jsonl:{tmp_path}/none.jsonl")
    assert told.startswith(f"source 'jsonl:{tmp_path}/none.jsonl': no file matches")


# The command line itself


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_help_of_each_verb_has_an_example_and_json(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0 and f"example: python -m llm_jax {verb} " in told and "--json" in told
    assert (cli.VERBS[verb].__doc__ or "?").splitlines()[0][:40] in " ".join(told.split())


def test_help(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        told = printed(capsys, *arguments)
        assert all(f"  {verb} " in told for verb in cli.VERBS)
    for arguments in (["train"], ["train", "--help"]):
        told = printed(capsys, *arguments)
        assert "example: python train.py --config=configs/quickstart.py" in told and "--json" in told


def test_an_interrupt(monkeypatch, capsys):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "show", stop)
    assert cli.main(["show"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "show", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["show"])


def run(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_train_py_in_a_process_of_its_own():
    done = run("train.py", "--config=configs/quickstart.py", "--config.optimizer.lerning_rate=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: unknown key 'config.optimizer.lerning_rate': config.optimizer has no 'lerning_rate'; "
        "did you mean 'learning_rate'?\n"
    )
    done = run("train.py")
    assert done.returncode == 0 and done.stdout.startswith("usage: python train.py") and done.stderr == ""


def test_the_module_in_a_process_of_its_own(tmp_path):
    done = run("-m", "llm_jax", "show", str(tmp_path / "none"))
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )


def test_output_cut_short_by_a_reader(trained):
    """`llm-jax show ... | head -1` is no error."""
    command = f"{sys.executable} -m llm_jax show {trained[0]} --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")
