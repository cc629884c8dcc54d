"""What a transform may ask of a run: other models that its loss reads, and rows to look at before the first step."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint, loop, model
from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import Classification, NextToken
from llm_jax.transforms import Calibration, Transform, anchor, chain, distil, lora, merge_lora, new_head

SIZES = ModelConfig(vocab_size=512, max_length=16, layers=1, dim=16, heads=2)


def pulled(source: Any, strength: float = 0.5) -> Transform:
    """A loss that draws the weights to those of another model."""

    def loss(inner: Any) -> Any:
        def made(params: Any, batch: Any, key: Any, reference: Any) -> Any:
            found = inner(params, batch, key, reference)
            if key is None:
                return found
            distance = sum(
                jnp.sum(jnp.square(x - y))
                for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(reference["other"]), strict=True)
            )
            return found._replace(total=found.total + strength * found.weight * distance)

        return made

    return Transform(loss=loss, reference={"other": source}, label=f"pulled({strength})")


def run_of(corpus: Path, folder: Path, **changes: Any) -> Run:
    plain = Run(
        name="tiny",
        workdir=str(folder),
        model=SIZES,
        task=NextToken(),
        data=Data(sources=(f"text:{corpus}/*.txt",), tokenizer="bpe:512", heldout=0.1),
        optimizer=Optimizer(learning_rate=1e-2),
        steps=6,
        batch=Batch(size=8, length=16),
        checkpoint=Checkpoint(every=3),
        eval=Eval(every=0, batches=1),
    )
    return dataclasses.replace(plain, **changes)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen nothing."""
    path = tmp_path_factory.mktemp("other") / "model"
    model.save(model.Model(SIZES, transformer.init(SIZES, jax.random.key(5))), path)
    return path


@pytest.mark.parametrize("mesh", [pytest.param({}, marks=pytest.mark.slow), {"fsdp": 4, "tensor": 2}])
def test_a_loss_reads_another_model_and_the_run_resumes_exactly(corpus, other, tmp_path, mesh):
    run = run_of(corpus, tmp_path / "run", transforms=(pulled(str(other)),), mesh=dataclasses.replace(Run.mesh, **mesh))
    loop.train(run)
    whole = losses(tmp_path / "run")
    plain = run_of(corpus, tmp_path / "plain", mesh=run.mesh)
    loop.train(plain)
    assert whole[0] > losses(tmp_path / "plain")[0] + 1  # what it was pulled to was far off
    card = checkpoint.read_card(tmp_path / "run")
    assert card["references"]["other"] == checkpoint.read_card(other)["hashes"]["params"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    loop.train(run)
    assert losses(tmp_path / "run") == whole

    given = dataclasses.replace(run, workdir=str(tmp_path / "value"), transforms=(pulled(model.load(other)),))
    loop.train(given)
    assert losses(tmp_path / "value") == whole


def test_another_model_in_its_place_is_refused(corpus, other, tmp_path):
    shutil.copytree(other, tmp_path / "other")
    run = run_of(corpus, tmp_path / "run", transforms=(pulled(str(tmp_path / "other")),))
    loop.train(dataclasses.replace(run, steps=3))
    shutil.rmtree(tmp_path / "other")
    model.save(model.Model(SIZES, transformer.init(SIZES, jax.random.key(6))), tmp_path / "other")
    with pytest.raises(CheckpointError, match="the model that the run reads as 'other' has changed"):
        loop.train(run)


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two transforms read a model called 'other': a and b"):
        chain(pulled("a"), pulled("b"))
    assert chain(pulled("a"), pulled("a")).reference == {"other": "a"}


def test_a_change_looks_at_rows_of_the_training_data(corpus, tmp_path):
    seen = {}

    def params(config: ModelConfig, weights: Any, key: Any, aux: Calibration) -> Any:
        seen.update({name: x.shape for name, x in aux.batches.items()})
        batch = {name: x[0] for name, x in aux.batches.items()}
        found = aux.loss(config)(weights, batch, None, {})
        return {**weights, "embed": {"tokens": weights["embed"]["tokens"] * 0 + found.total / found.weight}}

    run = run_of(corpus, tmp_path / "run", transforms=(Transform(params=params, calibration=3),), steps=0)
    loop.train(run)
    assert seen["tokens"] == seen["targets"] == (3, 8, 16)
    table = np.asarray(model.load(tmp_path / "run").params["embed"]["tokens"])
    assert (
        np.ptp(table) == 0 and 5.5 < table[0, 0] < 7.5
    )  # the loss of a model that knows nothing of 512 tokens: log 512 is 6.2


@pytest.mark.parametrize("mesh", [pytest.param({}, marks=pytest.mark.slow), {"fsdp": 4, "tensor": 2}])
def test_what_is_trained_beside_the_model_is_no_part_of_it(corpus, other, tmp_path, mesh):
    """Projections of a narrower student: sharded, moved by the optimizer, kept for a resume, left out of the model."""
    change = distil(str(other), soft=0.0, hidden=1.0, projected=True)
    run = run_of(
        corpus,
        tmp_path / "run",
        model=SIZES.replace(dim=8, layers=1),
        transforms=(change,),
        mesh=dataclasses.replace(Run.mesh, **mesh),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, moving_average=0.9),
    )
    loop.train(run)
    whole = losses(tmp_path / "run")
    made = model.load(tmp_path / "run")
    assert jax.tree.structure(made.params) == jax.tree.structure(transformer.shapes(made.config))
    shutil.copytree(tmp_path / "run" / "checkpoints" / "3", tmp_path / "again" / "checkpoints" / "3")
    loop.train(dataclasses.replace(run, workdir=str(tmp_path / "again")))
    assert losses(tmp_path / "again") == whole[3:]
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path / "again").params, made.params)
    held = loop.train(dataclasses.replace(run, workdir=str(tmp_path / "held"), optimizer=Optimizer(freeze=("proj.*",))))
    assert held["eval"]["loss"] > 0


def test_two_that_train_weights_of_one_name_are_refused(corpus, other, tmp_path):
    change = distil(str(other), soft=0.0, hidden=1.0, projected=True)
    with pytest.raises(ConfigError, match="two transforms train weights called 'projections' beside the model's"):
        loop.train(run_of(corpus, tmp_path / "run", transforms=(change, change)))
    clash = Transform(extra=lambda config, key: {"embed": jnp.zeros(2)})
    with pytest.raises(ConfigError, match="weights called 'embed' beside the model's, which has some of that name"):
        loop.train(run_of(corpus, tmp_path / "run", transforms=(clash,)))


def test_models_that_are_values_and_differ_are_refused():
    one, other = (model.Model(SIZES, transformer.init(SIZES, jax.random.key(i))) for i in (1, 2))
    with pytest.raises(ConfigError, match="called 'other': one that is given as a value and one that is given as"):
        chain(pulled(one), pulled(other))
    assert chain(pulled(one), pulled(one)).reference == {"other": one}


def test_an_anchor_may_be_without_the_template_of_the_run(corpus, tmp_path):
    """A template is what texts stand in: the tokens mean the same."""
    loop.train(run_of(corpus, tmp_path / "base", steps=0))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(64)), encoding="utf-8"
    )
    run = run_of(
        corpus,
        tmp_path / "run",
        model=None,
        start=str(tmp_path / "base"),
        data=Data(sources=(f"jsonl:{tmp_path}/texts.jsonl",), tokenizer="bpe:512", heldout=0.1),
        task=Classification(labels=("a", "b"), template="{text} Which?"),
        transforms=(
            new_head("classification", labels=2),
            anchor(str(tmp_path / "base"), exclude=("head/.*",)),
        ),
        steps=1,
    )
    assert np.isfinite(loop.train(run)["eval"]["loss"])


def test_what_is_trained_beside_factors_is_kept_on_the_card(corpus, tmp_path):
    """Over several runs, until the factors are folded in."""
    told = []
    runs = (dict(transforms=(lora(2, also=("embed/.*",)),)), dict(transforms=(lora(2),)), dict(),
            dict(transforms=(chain(merge_lora(), lora(4)),)))  # fmt: skip
    for i, changes in enumerate(runs):
        before = {"start": str(tmp_path / str(i - 1)), "model": None} if i else {}
        for steps in (1, 2):  # also where a run goes on
            loop.train(run_of(corpus, tmp_path / str(i), steps=steps, **before, **changes))
        told.append(checkpoint.read_card(tmp_path / str(i))["trained_beside_factors"])
    assert told[0] == told[1] == ["embed/tokens"] and told[3] == []
    assert len(told[2]) > 5 and not any("_lora_" in name for name in told[2]), "a run without lora trains all"
