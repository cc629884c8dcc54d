"""A gate on real models: what passes, what is refused and why, what is on file afterwards, and what a user sees."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import cli, model
from llm_jax.config import Batch, Data
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import UserError
from llm_jax.lifecycle import gate as gates
from llm_jax.lifecycle.registry import Registry
from llm_jax.lifecycle.scored import Scored, score_documents
from llm_jax.lifecycle.suite import Check, Limits, Suite
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import Classification, NextToken

SIZES = ModelConfig(vocab_size=512, max_length=64, layers=2, dim=32, heads=2)


def noisy(params: Any, share: float, seed: int) -> Any:
    """Weights with noise of a share of their own spread."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [x + share * jnp.std(x) * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    )


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: a model, one nearly like it, a damaged one, and one of four times the layers."""
    folder = tmp_path_factory.mktemp("gated")
    params = transformer.init(SIZES, jax.random.key(0))
    sizes = SIZES.replace(vocab_size=512)
    for name, made in (("old", params), ("near", noisy(params, 0.01, 1)), ("damaged", noisy(params, 30.0, 2))):
        model.save(model.Model(sizes, made, tokenizer), folder / name)
    deep = sizes.replace(layers=8)
    model.save(model.Model(deep, transformer.init(deep, jax.random.key(0)), tokenizer), folder / "deep")
    return folder


@pytest.fixture(scope="module")
def suite(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A check on the corpus' paragraphs, by the address that they are of."""
    folder = tmp_path_factory.mktemp("suite")
    lines = []
    for path in sorted(corpus.glob("*.txt"))[:12]:
        text = path.read_text()
        for i in range(0, 2400, 300):
            lines.append(
                json.dumps({"text": text[i : i + 300], "address": path.stem, "half": "a" if path.stem < "06" else "b"})
            )
    (folder / "paragraphs.jsonl").write_text("\n".join(lines))
    data = Data(sources=(f"jsonl:{folder}/paragraphs.jsonl",), heldout_sources=(f"jsonl:{folder}/paragraphs.jsonl",))
    check = Check("text", NextToken(), data, 0.05, batch=Batch(size=8, length=64), slices=("half",), group="address")
    return Suite((check,))


def test_the_same_model_passes(saved: Path, suite: Suite):
    verdict = gates.gate(str(saved / "old"), str(saved / "old"), suite)
    (row,) = verdict["rows"]
    assert verdict["passed"] and (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    assert (row["documents"], row["groups"]) == (96, 12)
    assert [x["slice"] for x in verdict["slices"]] == ["half=a", "half=b"]
    assert verdict["candidate"] == verdict["incumbent"] == model.load(saved / "old").card["hashes"]["params"]


def test_the_figures_are_those_of_the_documents(saved: Path, suite: Suite):
    """Incumbent and candidate by the sums over documents; the difference is theirs."""
    verdict = gates.gate(str(saved / "near"), str(saved / "old"), suite)
    (row,), check = verdict["rows"], suite.checks[0]
    means = [
        score_documents(model.load(saved / name), check.task, check.data, check.batch).mean for name in ("old", "near")
    ]
    assert (row["incumbent"], row["candidate"]) == pytest.approx(means)
    assert row["difference"] == pytest.approx(means[1] - means[0], abs=1e-6)
    assert verdict["passed"] and row["low"] < row["difference"] < row["high"] < 0.05


def test_a_damaged_model_is_refused(saved: Path, suite: Suite):
    verdict = gates.gate(str(saved / "damaged"), str(saved / "old"), suite)
    assert not verdict["passed"]
    assert any(reason.startswith("text: worse by +") and "margin 0.05" in reason for reason in verdict["reasons"])
    lost = [x for x in verdict["slices"] if not x["passed"]]
    assert lost and lost[0]["documents"] == 48 and lost[0]["reason"] in verdict["reasons"]
    flips = verdict["flips"]["text"]
    rises = [x["candidate"] - x["incumbent"] for x in flips["examples"]]
    assert flips["worse"] > 60 and len(rises) == gates.FLIPS and rises == sorted(rises, reverse=True)
    told = gates.told(verdict)
    assert "REFUSED" in told and flips["examples"][0]["id"] in told


def test_a_slice_that_lost_is_not_hidden_by_the_average(saved: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch):
    """Half of the documents lose what the others gain."""
    real = Check.score
    loaded = model.load(saved / "near")

    def other(check, given):
        found = real(check, given)
        if given.card["hashes"] != loaded.card["hashes"]:
            return found
        sign = np.array([1.0 if record["half"] == "b" else -1.0 for record in found.records])
        return dataclasses.replace(found, loss=found.loss + 0.4 * sign * found.weight)

    monkeypatch.setattr(Check, "score", other)
    wide = dataclasses.replace(suite, checks=(dataclasses.replace(suite.checks[0], margin=0.35, slice_margin=0.2),))
    verdict = gates.gate(str(saved / "near"), str(saved / "old"), wide)
    assert verdict["rows"][0]["passed"] and not verdict["passed"]
    assert [x["slice"] for x in verdict["slices"] if not x["passed"]] == ["half=b"]
    assert verdict["reasons"][0].startswith("text, half=b: 48 documents lost 0.")


def test_what_cannot_be_told_says_how_much_would_tell(saved: Path, suite: Suite):
    tight = dataclasses.replace(suite, checks=(dataclasses.replace(suite.checks[0], margin=1e-4, slices=()),))
    verdicts = [gates.gate(str(saved / a), str(saved / b), tight) for a, b in (("near", "old"), ("old", "near"))]
    worse = next(v for v in verdicts if v["rows"][0]["difference"] > 0)  # one of the two is
    (row,), (reason,) = worse["rows"], worse["reasons"]
    assert reason.startswith("text: worse by +")
    if row["low"] < 1e-4:
        assert "a loss of that size is not excluded" in reason


def test_limits(saved: Path, suite: Suite):
    """Four times the layers are larger, take more memory and have more parameters; the same sizes are within what noise asks for."""
    limited = dataclasses.replace(
        suite, limits=Limits(size=1.1, latency=1.5, memory=1.01, parameters=1e4, rows=8, length=64)
    )
    verdict = gates.gate(str(saved / "deep"), str(saved / "old"), limited)
    found = {x["name"]: x for x in verdict["limits"]}
    sizes = [sum(x.nbytes for x in jax.tree.leaves(model.load(saved / name).params)) for name in ("deep", "old")]
    assert found["size"]["value"] == pytest.approx(sizes[0] / sizes[1]) and not found["size"]["passed"]
    assert found["latency"]["value"] > 1.2 and not found["memory"]["passed"] and not found["parameters"]["passed"]
    assert any(reason.startswith("size: ") for reason in verdict["reasons"])


def test_without_an_incumbent_bounds_are_judged(saved: Path, suite: Suite):
    check = suite.checks[0]
    for bound, passed in ((7.0, True), (5.0, False)):
        bounded = dataclasses.replace(suite, checks=(dataclasses.replace(check, bound=bound),))
        verdict = gates.gate(str(saved / "old"), None, bounded)
        assert verdict["incumbent"] is None and verdict["passed"] == passed


def write_suite(suite: Suite, path: Path) -> None:
    """A suite's file with a check on its source."""
    (source,) = suite.checks[0].data.heldout_sources
    path.write_text(
        "from llm_jax.config import Batch, Data\nfrom llm_jax.lifecycle.suite import Check, Suite\nfrom llm_jax.tasks import NextToken\n"
        f"def get_suite():\n    data = Data(sources=({source!r},), heldout_sources=({source!r},))\n"
        "    return Suite((Check('text', NextToken(), data, 0.05, batch=Batch(size=8, length=64), group='address', bound=7.0),))\n"
    )


def test_names_are_those_of_the_registry_that_is_asked(saved: Path, suite: Suite, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_suite(suite, tmp_path / "suite.py")
    for folder, name in (("registry", "deep"), ("other", "old")):
        Registry(folder).promote("production", saved / name, force=True, why="a test")
    asked = ["--suite=suite.py", "--registry=other", "--json"]
    assert cli.main(["gate", str(saved / "near"), "--against=registry:production", *asked]) == 0
    old = Registry("other").resolve("production").hash
    assert json.loads(capsys.readouterr().out)["incumbent"] == old
    assert cli.main(["gate", "registry:production", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"] == old
    assert len(Registry("other").gates()) == 2 and not Registry().gates()


def test_the_command_and_what_it_leaves(
    saved: Path, suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
):
    """Status 0 and 1; the verdict is on file, and `promote` goes by it."""
    monkeypatch.chdir(tmp_path)
    write_suite(suite, tmp_path / "suite.py")
    old, near, damaged = (str(saved / name) for name in ("old", "near", "damaged"))
    assert cli.main(["promote", "production", old]) == 2
    assert "was never gated" in capsys.readouterr().err
    assert cli.main(["gate", old, "--suite=suite.py"]) == 0
    assert cli.main(["promote", "production", old]) == 0
    capsys.readouterr()
    assert cli.main(["gate", damaged, "--against=registry:production", "--suite=suite.py", "--json"]) == 1
    said = capsys.readouterr()
    verdict = json.loads(said.out)
    assert said.err == f"gate {verdict['id']} refused {damaged}\n"
    assert cli.main(["promote", "production", damaged]) == 2
    assert f"was refused by gate {verdict['id']}" in capsys.readouterr().err
    assert cli.main(["gate", near, "--against=registry:production", "--suite=suite.py"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    assert cli.main(["promote", "production", near]) == 0
    registry = Registry("registry")
    assert [x["passed"] for x in registry.gates()] == [True, False, True]
    assert registry.resolve("production").hash == registry.gates()[-1]["candidate"]


def test_checks_that_do_not_fit_the_models(saved: Path, suite: Suite):
    check = suite.checks[0]
    for changes, message in (
        (dict(metric="accuracy"), "a task without classes has no accuracy"),
        (dict(slices=("film",)), "no field 'film' to slice by; it has"),
        (dict(group="adress"), "unknown check 'text': group 'adress'; did you mean 'address'"),
        (dict(task=Classification(labels=("a", "b"))), "head"),
    ):
        wrong = Suite((dataclasses.replace(check, **changes),))
        with pytest.raises(UserError, match=message):
            gates.gate(str(saved / "near"), str(saved / "old"), wrong)


def test_a_model_that_blew_up_is_refused(saved: Path, suite: Suite):
    """A comparison with a loss that is no number is never won, and the verdict is JSON that others can read."""
    old = model.load(saved / "old")
    model.save(dataclasses.replace(old, params=jax.tree.map(lambda x: x * jnp.nan, old.params), card={}), saved / "nan")
    verdict = gates.gate(str(saved / "nan"), str(saved / "old"), suite)
    assert not verdict["passed"]
    (reason,) = verdict["reasons"]
    assert reason.startswith("text: the candidate gives no number for 96 documents, ")
    assert reason.endswith("paragraphs.jsonl:1 first")
    assert "REFUSED" in gates.told(verdict)
    json.dumps(verdict, allow_nan=False)


def test_a_single_group_cannot_be_told(saved: Path, suite: Suite):
    one = dataclasses.replace(suite, checks=(dataclasses.replace(suite.checks[0], group="source", slices=()),))
    verdict = gates.gate(str(saved / "near"), str(saved / "old"), one)
    assert verdict["reasons"] == ["text: cannot be told: all documents are of one group, 'source'"]
    assert "unknown" in gates.told(verdict)
    json.dumps(verdict, allow_nan=False)
    assert gates.gate(str(saved / "old"), str(saved / "old"), one)["passed"]


def test_the_same_weights_under_another_tokenizer_are_another_model(saved: Path, suite: Suite, tmp_path: Path):
    texts = [record["text"] for record in map(json.loads, Path(source_of(suite)).read_text().splitlines())]
    old = model.load(saved / "old")
    other = dataclasses.replace(old, tokenizer=load_tokenizer("bpe:400", texts), card={})
    model.save(other, tmp_path / "other")
    check = dataclasses.replace(suite.checks[0], metric="bits", margin=10.0)
    (row,) = gates.gate(str(tmp_path / "other"), str(saved / "old"), Suite((check,)))["rows"]
    assert row["difference"] != 0


def test_documents_of_no_group_stay_alone():
    records = [{"id": str(i), "film": film} for i, film in enumerate(("a", None, "a", None, "None"))]
    scored = Scored(records, np.ones(5), np.ones(5), np.ones(5))
    numbers = gates._groups(Check("x", NextToken(), Data(), 1.0, group="film"), scored)
    assert numbers is not None and len(set(numbers)) == 4 and numbers[0] == numbers[2]


def test_a_model_that_reads_less_is_not_better(saved: Path, suite: Suite, tmp_path: Path):
    """Rows that one of the models cannot hold are cut for it alone: losses of different tokens are not compared."""
    old = model.load(saved / "old")
    sizes = SIZES.replace(positions="learned", max_length=64)
    params = transformer.init(sizes, jax.random.key(0))
    cut = {**params, "embed": {**params["embed"], "positions": params["embed"]["positions"][:16]}}
    model.save(model.Model(sizes, params, old.tokenizer), tmp_path / "long")
    model.save(model.Model(sizes.replace(max_length=16), cut, old.tokenizer), tmp_path / "short")
    check = suite.checks[0]
    cutting = dataclasses.replace(check, data=dataclasses.replace(check.data, long="truncate"))
    with pytest.raises(UserError, match="the incumbent predicts 64 tokens, the candidate 16: set data.long='split'"):
        gates.gate(str(tmp_path / "short"), str(tmp_path / "long"), Suite((cutting,)))
    (row,) = gates.gate(str(tmp_path / "short"), str(tmp_path / "long"), suite)["rows"]
    assert np.isfinite(row["difference"])


def test_one_program_is_not_timed(saved: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch):
    """Models of the same sizes take the same time: a busy machine refuses none of them. Rows are as long as both models can read."""
    monkeypatch.setattr(gates.cost, "compare", lambda *a: pytest.fail("timed"))
    limited = dataclasses.replace(suite, limits=Limits(latency=1.0, memory=1.0, length=512))
    verdict = gates.gate(str(saved / "near"), str(saved / "old"), limited)
    assert [(x["name"], x["value"]) for x in verdict["limits"]] == [("latency", 1.0), ("memory", 1.0)]


def test_models_of_different_tokenizers_are_compared_by_the_byte(saved: Path, suite: Suite, tmp_path: Path):
    """Losses a token of two vocabularies are not of one unit; bits a byte are, and are those of the documents."""
    texts = [record["text"] for record in map(json.loads, Path(source_of(suite)).read_text().splitlines())]
    small = load_tokenizer("bpe:300", texts)
    sizes = SIZES.replace(vocab_size=300)
    other = model.Model(sizes, transformer.init(sizes, jax.random.key(3)), small)
    model.save(other, tmp_path / "other")
    with pytest.raises(UserError, match="the models have different tokenizers, so that losses a token differ"):
        gates.gate(str(tmp_path / "other"), str(saved / "old"), suite)
    check = dataclasses.replace(suite.checks[0], metric="bits", margin=10.0)
    (row,) = gates.gate(str(tmp_path / "other"), str(saved / "old"), Suite((check,)))["rows"]
    found = score_documents(other, check.task, check.data, check.batch)
    size = sum(len(text.encode()) for text in texts)
    assert row["candidate"] == pytest.approx(found.loss.sum() / np.log(2) / size)
    assert row["difference"] == pytest.approx(row["candidate"] - row["incumbent"])


def source_of(suite: Suite) -> str:
    return suite.checks[0].data.heldout_sources[0].removeprefix("jsonl:")


def test_accuracy_and_what_was_said(tokenizer, corpus: Path, tmp_path: Path):
    """A classifier against itself with its classes exchanged: every document flips, and the verdict says which way."""
    lines = [
        {"text": path.read_text()[i : i + 80], "label": int(i > 0), "address": path.stem}
        for path in sorted(corpus.glob("*.txt"))
        for i in (0, 200)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = f"jsonl:{tmp_path}/texts.jsonl"
    sizes = SIZES.replace(architecture="encoder", head="classification", labels=2)
    params = transformer.init(sizes, jax.random.key(0))
    turned = {**params, "head": jax.tree.map(lambda x: -x, params["head"])}
    for name, made in (("old", params), ("turned", turned)):
        model.save(model.Model(sizes, made, tokenizer), tmp_path / name)
    data = Data(sources=(source,), heldout_sources=(source,), long="truncate")
    task = Classification(labels=("early", "late"))
    check = Check("classes", task, data, 0.05, metric="accuracy", batch=Batch(size=8, length=64), slices=("label",))
    old = check.score(model.load(tmp_path / "old"))
    assert old.correct is not None
    better, worse = ("old", "turned") if old.correct.mean() > 0.5 else ("turned", "old")
    verdict = gates.gate(str(tmp_path / worse), str(tmp_path / better), Suite((dataclasses.replace(check, least=5),)))
    (row,), flips = verdict["rows"], verdict["flips"]["classes"]
    assert row["incumbent"] == pytest.approx(1 - row["candidate"])
    assert row["difference"] == pytest.approx(row["incumbent"] - row["candidate"])
    assert flips["worse"] + flips["better"] == 48
    assert all(sorted(x["said"]) == ["early", "late"] and len(x["text"]) <= 80 for x in flips["examples"])
    assert {x["slice"] for x in verdict["slices"]} == {"label=0", "label=1"}
