"""Tasks of lm-eval from files of this disk: the three kinds of question against our own figures, pairs of models, and what is told where it is missing."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax import cli, evaluate, generation, model
from llm_jax.errors import UserError
from llm_jax.lifecycle import gate as gates
from llm_jax.lifecycle.harness import Harness, continuations
from llm_jax.lifecycle.suite import Suite
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needed = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install 'llm_jax[eval]'")

SIZES = ModelConfig(vocab_size=512, max_length=32, layers=1, dim=32, heads=2)
QUESTIONS = [
    {
        "question": f"the state of number {i}",
        "choices": ["union is strong", "senate"],
        "answer": i % 2,
        "kind": "ab"[i % 2],
    }
    for i in range(12)
]


@pytest.fixture(scope="module")
def loaded(tokenizer) -> model.Model:
    return model.Model(SIZES, transformer.init(SIZES, jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks over the same questions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/questions.jsonl\ntest_split: test\n"
    mean = "\n    aggregation: mean\n    higher_is_better: true\n"
    (folder / "choice.yaml").write_text(
        f"task: choice\noutput_type: multiple_choice\n{data}doc_to_text: '{{{{question}}}}'\ndoc_to_choice: '{{{{choices}}}}'\n"
        f"doc_to_target: answer\nmetric_list:\n  - metric: acc{mean}"
    )
    (folder / "text.yaml").write_text(
        f"task: text\noutput_type: loglikelihood_rolling\n{data}doc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    (folder / "answer.yaml").write_text(
        f"task: answer\noutput_type: generate_until\n{data}doc_to_text: '{{{{question}}}}'\ndoc_to_target: ''\n"
        f"generation_kwargs:\n  until: ['the']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match{mean}"
    )
    return folder


def test_a_continuation_given_its_context(loaded: model.Model):
    """log p(context and continuation) - log p(context) by `evaluate.score`, whatever else is in the batch and however long it is."""
    assert loaded.tokenizer is not None
    pairs = [("We the people", " of the United States"), ("", "Congress"), ("the state ", "of"), ("war " * 40, "peace")]
    found = continuations(loaded, pairs)
    for (context, continuation), (nats, _) in zip(pairs[:2], found):
        tokens = evaluate.score(loaded.config, loaded.params, loaded.tokenizer, context + continuation)[:-1]
        before = len(loaded.tokenizer.encode(context))
        assert nats == pytest.approx(sum(p for _, p in tokens[before:]), abs=1e-4)
    assert continuations(loaded, pairs[1:2])[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert all(math.isfinite(nats) and nats < 0 for nats, _ in found)


def test_what_greedy_decoding_gives_is_greedy(loaded: model.Model):
    """The most probable next token is told as such, another one is not."""
    assert loaded.tokenizer is not None
    tokenizer, context = loaded.tokenizer, "We the people"
    chances = {
        i: continuations(loaded, [(context, tokenizer.decode([i]))])[0]
        for i in range(300, 330)
        if list(tokenizer.encode(context + tokenizer.decode([i]))) == [*tokenizer.encode(context), i]
    }
    (text,) = generation.generate(loaded.config, loaded.params, tokenizer, [context], max_new_tokens=1)
    whole = list(tokenizer.encode(context + text))
    if whole[:-1] == list(tokenizer.encode(context)):
        assert continuations(loaded, [(context, text)])[0][1]
    assert len(chances) > 10 and sum(greedy for _, greedy in chances.values()) <= 1


@needed
def test_choices(loaded: model.Model, tasks: Path):
    """The more probable answer is the model's."""
    check = Harness("choice", "choice", str(tasks), 0.1, slices=("kind",))
    found = check.score(loaded)
    pairs = [[(q["question"], f" {choice}") for choice in q["choices"]] for q in QUESTIONS]
    chances = np.array([[nats for nats, _ in continuations(loaded, each)] for each in pairs])
    assert [r["kind"] for r in found.records] == [q["kind"] for q in QUESTIONS]
    assert check.figures(found)[0].tolist() == [float(c.argmax() == q["answer"]) for c, q in zip(chances, QUESTIONS)]


@needed
def test_texts(loaded: model.Model, tasks: Path):
    """Nats a byte of each text, without its end token."""
    check = Harness("text", "text", str(tasks), 0.1, metric="bits_per_byte")
    assert loaded.tokenizer is not None
    value, weight = check.figures(check.score(loaded))
    for i, question in enumerate(QUESTIONS[:3]):
        tokens = evaluate.score(loaded.config, loaded.params, loaded.tokenizer, question["question"])[:-1]
        size = len(question["question"].encode())
        assert (value[i], weight[i]) == (pytest.approx(-sum(p for _, p in tokens) / size, abs=1e-5), size)


@needed
def test_answers(loaded: model.Model, tasks: Path):
    """Generated up to the stop string."""
    found = Harness("answer", "answer", str(tasks), 0.1, metric="exact_match").score(loaded)
    assert len(found) == 12 and set(found.loss) <= {0.0, 1.0}


@needed
def test_the_gate(loaded: model.Model, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A damaged model loses on the texts; the same one passes; the suite's fingerprint is that of the task's files too."""
    spread = jax.tree.map(lambda x: x + 3 * jax.random.normal(jax.random.key(1), x.shape), loaded.params)
    for name, params in (("old", loaded.params), ("damaged", spread)):
        model.save(model.Model(SIZES, params, loaded.tokenizer), tmp_path / name)
    suite = Suite((Harness("text", "text", str(tasks), 0.1, metric="bits_per_byte", slices=("kind",), least=3),))
    old, damaged = str(tmp_path / "old"), str(tmp_path / "damaged")
    assert gates.gate(old, old, suite)["passed"]
    verdict = gates.gate(damaged, old, suite)
    assert not verdict["passed"] and verdict["rows"][0]["documents"] == 12 and verdict["rows"][0]["low"] > 0.1
    assert {x["slice"] for x in verdict["slices"]} == {"kind=a", "kind=b"}
    before = suite.fingerprint()
    (tasks / "more.jsonl").write_text("{}")
    assert suite.fingerprint() != before
    (tmp_path / "suite.py").write_text(
        "from llm_jax.lifecycle.suite import Harness, Suite\n"
        f"def get_suite(): return Suite((Harness('choice', 'choise', {str(tasks)!r}, 0.1),))\n"
    )
    assert cli.main(["gate", old, f"--suite={tmp_path}/suite.py", f"--registry={tmp_path}/r"]) == 2
    assert "has no task 'choise'; did you mean 'choice'?" in capsys.readouterr().err


@needed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(metric="accuracy"), "choice has no metric 'accuracy'"),
        (dict(folder="nowhere"), "no folder nowhere of tasks"),
    ],
)
def test_what_lm_eval_does_not_have(loaded: model.Model, tasks: Path, changes: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        Harness(**{"name": "choice", "task": "choice", "folder": str(tasks), "margin": 0.1, **changes}).score(loaded)


def test_without_lm_eval(loaded: model.Model, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed: pip install 'llm_jax\[eval\]'"):
        Harness("choice", "choice", str(tasks), 0.1).score(loaded)


def test_an_empty_folder_has_no_fingerprint(tmp_path: Path):
    with pytest.raises(UserError, match="holds no files"):
        Harness("choice", "choice", str(tmp_path), 0.1).contents()
