"""Fine-tuning as a user does it: a trained encoder gets a head, learns labels from a CSV file, stops early, is asked for predictions."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax import checkpoint, cli, loop, model
from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import ConfigError, UserError
from llm_jax.evaluate import predict
from llm_jax.models import presets, transformer
from llm_jax.sweep import sweep
from llm_jax.tasks import Classification
from llm_jax.transforms import new_head

GOOD, BAD, OTHER = ["bright", "warm", "witty"], ["dull", "cold", "stale"], ["film", "story", "cast", "plot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CSV file of reviews whose words tell their class, and an encoder that has not seen them."""
    folder = tmp_path_factory.mktemp("finetuning")
    rng = np.random.default_rng(0)
    rows = ["text,label,movie"]
    for i in range(160):
        label = i % 2
        words = [*rng.choice(OTHER, int(rng.integers(1, 6))), *rng.choice([BAD, GOOD][label], 2)]
        rows.append(f'"{" ".join(rng.permutation(words))}",{["bad", "good"][label]},film {i % 20}')
    (folder / "reviews.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer("wordpiece:120", [" ".join([*GOOD, *BAD, *OTHER])] * 3)
    sizes = presets.bert(vocab_size=128, max_length=32, layers=2, dim=32, heads=4, mlp_dim=64, head="mlm", dropout=0.0)
    params = transformer.init(sizes, jax.random.key(0))
    model.save(model.Model(sizes, params, tokenizer, {"name": "base"}), folder / "base")
    return folder


def run_of(folder, name, **changes):
    fields = dict(
        name=name,
        workdir=str(folder / name),
        start=str(folder / "base"),
        transforms=(new_head("classification", labels=2),),
        task=Classification(labels=("bad", "good")),
        data=Data(sources=(f"csv:{folder}/reviews.csv",), group="movie", heldout=0.25, long="truncate"),
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule(name="constant"),
        epochs=3,
        batch=Batch(size=8, length=32),
        checkpoint=Checkpoint(best="accuracy", every=1000),
        eval=Eval(every=0),
    )
    return Run(**{**fields, **changes})


@pytest.fixture(scope="module")
def tuned(folder):
    run = run_of(folder, "tuned")
    return run, loop.train(run)


def test_it_learns_and_leaves_its_judgement(tuned):
    run, result = tuned
    assert result["eval"]["accuracy"] > 0.9 and result["eval"]["examples"] == 40
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and {"id", "label", "predicted", "probabilities"} == set(lines[0])
    right = np.mean([line["label"] == line["predicted"] for line in lines])
    assert right == pytest.approx(result["eval"]["accuracy"])
    for picture in ("confusion", "calibration"):
        assert (run.folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert result["paths"][picture].endswith(f"{picture}.png")


def test_epochs_are_passes_over_the_training_documents(tuned):
    run, result = tuned
    read = result["data"]["read"]
    assert 3 * 120 - 40 <= read <= 3 * 120 + 40
    card = checkpoint.read_card(run.folder)
    assert card["config"]["steps"] == result["steps"] and card["config"]["epochs"] == 3
    assert card["parents"] == [checkpoint.read_card(run.folder.parent / "base")["hashes"]["params"]]


def test_the_sizes_are_those_of_the_model_it_starts_from(tuned):
    loaded = model.load(tuned[0].folder)
    assert (loaded.config.layers, loaded.config.head, loaded.config.labels) == (2, "classification", 2)


def test_a_finished_run_is_only_evaluated_again(tuned):
    run, result = tuned
    again = loop.train(run)
    assert again["steps_this_time"] == 0 and again["eval"] == result["eval"]


def test_predict(tuned, capsys):
    folder = str(tuned[0].folder)
    assert cli.main(["predict", folder, "a warm witty film", "the cast is dull and stale", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["label"] for x in found] == ["good", "bad"]
    assert all(sum(x["probabilities"].values()) == pytest.approx(1, abs=1e-4) for x in found)
    assert cli.main(["predict", folder, "warm", "--pair=cold"]) == 2
    assert "this model classifies single texts" in capsys.readouterr().err
    assert cli.main(["predict", folder, "warm witty"]) == 0
    assert capsys.readouterr().out.startswith("good ")


def test_eval_of_a_classifier(tuned, capsys):
    assert cli.main(["eval", str(tuned[0].folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(tuned[1]["eval"]["accuracy"])


def test_predict_needs_a_classifier(folder):
    with pytest.raises(UserError, match="this model has head 'mlm': predict needs one that was trained to classify"):
        predict(model.load(folder / "base"), ["warm"])


def test_predict_by_a_classifier_from_elsewhere(tuned):
    """One that was imported has no run on its card: its own labels are told."""
    loaded = model.load(tuned[0].folder)
    texts = ["a warm witty film", "the cast is dull and stale"]
    card = {"name": "imported", "labels": ["poor", "fine"]}
    found = predict(dataclasses.replace(loaded, card=card), texts)
    assert [x["label"] for x in found] == ["fine", "poor"]
    assert [x["label"] for x in predict(dataclasses.replace(loaded, card={}), texts)] == ["LABEL_1", "LABEL_0"]


def test_early_stopping_ends_with_the_best_weights(folder):
    """At a rate that is far too high the metric goes up and down; the run ends `patience` evaluations after its best."""
    run = run_of(
        folder,
        "stopped",
        epochs=0.0,
        steps=60,
        optimizer=Optimizer(learning_rate=0.03),
        eval=Eval(every=2, patience=3),
    )
    result = loop.train(run)
    entries = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["eval/accuracy"] for e in entries if "eval/accuracy" in e}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert result["steps"] == best + 6 < 60
    assert result["eval"]["accuracy"] == pytest.approx(scores[best])
    assert result["paths"]["checkpoint"].endswith(f"/{best}") and checkpoint.find(run.folder).name == str(best)
    again = loop.train(run)
    assert again["steps_this_time"] == 0 and again["eval"] == result["eval"]


def test_several_seeds_in_one_command(folder, monkeypatch, capsys):
    run = run_of(folder, "seeds", epochs=0.0, steps=3)
    monkeypatch.setattr("llm_jax.config.parse", lambda told: run)
    assert cli.main(["sweep", "--config=any.py", "--seeds", "0", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = [
        json.loads((folder / "seeds" / f"seed{i}" / "result.json").read_text())["eval"]["accuracy"] for i in (0, 1)
    ]
    assert found["eval"]["accuracy"]["values"] == scores
    assert found["eval"]["accuracy"]["mean"] == pytest.approx(np.mean(scores))
    assert found["eval"]["accuracy"]["spread"] == pytest.approx(np.std(scores, ddof=1))
    assert json.loads((folder / "seeds" / "sweep.json").read_text()) == found
    with pytest.raises(ConfigError, match="must differ"):
        sweep(run, [1, 1])


def test_a_language_model_is_asked_in_a_template(folder):
    tokenizer = load_tokenizer("bpe:300", [" ".join([*GOOD, *BAD, *OTHER])] * 3)
    sizes = presets.llama(vocab_size=300, max_length=48, layers=1, dim=16, heads=2, kv_heads=1, mlp_dim=32, head="lm")
    base = model.Model(sizes, transformer.init(sizes, jax.random.key(0)), tokenizer, {"name": "base"})
    model.save(base, folder / "decoder")
    task = Classification(labels=("bad", "good"), template="film: {text} is")
    words = new_head("classification", words=(" dull", " warm"))
    short = dict(transforms=(words,), task=task, epochs=0, steps=2, batch=Batch(size=8, length=48))
    run = run_of(folder, "asked", start=str(folder / "decoder"), **short)
    loop.train(run)
    loaded = model.load(run.folder)
    (answer,) = predict(loaded, ["a warm plot"])
    tokens = np.concatenate([tokenizer.encode(x) for x in ("film: ", "a warm plot", " is")])[None]
    rows = {"tokens": tokens, "segments": np.ones_like(tokens)}
    expected = jax.nn.softmax(transformer.apply(loaded.config, loaded.params, rows).logits[0])
    assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    short |= dict(transforms=(), task=dataclasses.replace(task, template=""))
    further = run_of(folder, "asked_further", start=str(run.folder), **short)
    loop.train(further)
    assert model.load(further.folder).tokenizer == loaded.tokenizer and loaded.tokenizer.template == "film: {text} is"
    short |= dict(eval=Eval(every=0, task=task))
    with pytest.raises(ConfigError, match="a model reads texts in one template"):
        loop.train(run_of(folder, "asked_twice", start=str(run.folder), **short))


def test_a_task_without_its_head_is_told_before_anything_is_read(folder):
    with pytest.raises(ConfigError, match="put new_head"):
        loop.train(run_of(folder, "headless", transforms=()))


def test_a_label_that_is_none_is_told(folder):
    task = Classification(labels=("poor", "fine"))
    with pytest.raises(UserError, match=r"label is '(good|bad)': it must be a number from 0 to 1 or one of poor, fine"):
        loop.train(run_of(folder, "mislabelled", task=task))
