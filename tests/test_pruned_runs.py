"""Zeros that a card names as pruned stay zero over the life of a model: training, restarts, further runs, until one says otherwise."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import checkpoint, loop, model, parts
from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken
from llm_jax.transforms import densify, grow_depth, lengthen, lora, offload_moments, prune, shrink, silence, unfreeze
from llm_jax.transforms.prune import cubic

UP = "decoder/layers/mlp/up"


def run_of(corpus: Path, folder: Path, **changes: Any) -> Run:
    plain = Run(
        name=folder.name,
        workdir=str(folder),
        model=ModelConfig(vocab_size=512, max_length=16, layers=1, dim=16, heads=2),
        transforms=(prune(0.75, schedule=(1, 5, 2)),),
        task=NextToken(),
        data=Data(sources=(f"text:{corpus}/*.txt",), tokenizer="bpe:512", heldout=0.1),
        optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.1),
        steps=6,
        batch=Batch(size=8, length=16),
        checkpoint=Checkpoint(every=3),
        eval=Eval(every=0, batches=1),
    )
    return dataclasses.replace(plain, **changes)


def trained(run: Run) -> Path:
    loop.train(run)
    return run.folder


def zeros(path: Path) -> np.ndarray:
    return np.asarray(model.load(path).params["decoder"]["layers"]["mlp"]["up"]) == 0


@pytest.fixture(scope="module")
def pruned(corpus, tmp_path_factory):
    """A run that prunes while it trains."""
    folder = tmp_path_factory.mktemp("pruned") / "run"
    loop.train(run_of(corpus, folder))
    return folder


def test_a_run_says_what_its_transforms_save(corpus, tmp_path, capsys):
    for transforms, told in (
        ((prune(0.5),), "no speed-up is to be expected"),
        ((shrink(mlp=0.5),), "forward, ms (measured)"),  # on one of the eight devices
    ):
        run = run_of(corpus, tmp_path / told[:2], steps=0, transforms=transforms)
        loop.train(run)
        assert told in capsys.readouterr().err
        loop.train(run)  # a run that goes on has said it
        assert told not in capsys.readouterr().err


def test_the_card_states_what_is_pruned_and_a_restart_changes_nothing(pruned, corpus, tmp_path):
    assert zeros(pruned).mean() == 0.75
    assert checkpoint.read_card(pruned)["pruned"][UP] == 0.75
    shutil.copytree(pruned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    loop.train(run_of(corpus, tmp_path / "run", name="run"))
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path / "run").params, model.load(pruned).params)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_straight_through_the_model_has_zeros_and_the_run_the_weights_behind_them(corpus, tmp_path, average):
    """What is evaluated, saved and loaded is pruned; the dense weights and the mask go on after a stop, wherever they lie meanwhile."""
    change = prune(0.75, schedule=(1, 5, 2), straight_through=True)
    settings = dict(optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.1, moving_average=average))
    folder = trained(run_of(corpus, tmp_path / "run", transforms=(change,), **settings))
    assert zeros(folder).mean() == 0.75 and checkpoint.read_card(folder)["pruned"][UP] == 0.75
    held = zeros(folder / "checkpoints" / "3").mean()
    assert held == pytest.approx(float(cubic(3, 1, 5, 0.75)), abs=1e-3), "half way, on the schedule"

    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    again = trained(run_of(corpus, tmp_path / "again", transforms=(change,), name="run", **settings))
    beside = trained(run_of(corpus, tmp_path / "host", transforms=(change, offload_moments()), **settings))
    hashes = [checkpoint.read_card(each)["hashes"] for each in (folder, again, beside)]
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_schedule_longer_than_the_run_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"prune\(0.75, schedule=\(1, 5, 2\)\) needs 5 steps, and the run has 4"):
        loop.train(run_of(corpus, tmp_path / "run", steps=4))


def test_a_later_run_keeps_the_zeros_unless_told_to_densify(pruned, corpus, tmp_path):
    kept = run_of(corpus, tmp_path / "kept", start=str(pruned), model=None, transforms=(), steps=4)
    loop.train(kept)
    assert (zeros(tmp_path / "kept") == zeros(pruned)).all()
    assert checkpoint.read_card(tmp_path / "kept")["pruned"][UP] == 0.75
    loop.train(dataclasses.replace(kept, workdir=str(tmp_path / "dense"), transforms=(densify(),)))
    assert not zeros(tmp_path / "dense").any()
    assert "pruned" not in checkpoint.read_card(tmp_path / "dense")
    for folder, schedule, share in (("again", None, 0.25), ("gradual", (0, 4, 2), 0.25)):
        anew = (densify(), prune(0.25, schedule=schedule))
        loop.train(dataclasses.replace(kept, workdir=str(tmp_path / folder), transforms=anew))
        assert zeros(tmp_path / folder).mean() == share, folder


def test_what_is_silenced_stays_so_until_it_is_removed(corpus, tmp_path):
    """Masks first, training, and the smaller model later: its logits are those of the masked one."""
    loop.train(run_of(corpus, tmp_path / "quiet", transforms=(silence(mlp=0.5),)))
    quiet = model.load(tmp_path / "quiet")
    assert quiet.card["pruned"] == {"decoder/layers/mlp/down": 0.5}
    small = model.transform(quiet, shrink(mlp=0.5), jax.random.key(0))
    assert not small.card["pruned"] and small.config.mlp_size == quiet.config.mlp_size // 2
    batch = {"tokens": np.arange(16).reshape(2, 8)}
    before, after = (np.asarray(model.apply(x, batch).logits) for x in (quiet, small))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_a_schedule_begins_where_it_is_told_to(corpus, tmp_path, pruned):
    further = prune(0.9, schedule=(0, 4, 2), initial=0.75)
    run = run_of(corpus, tmp_path / "more", start=str(pruned), model=None, transforms=(further,))
    loop.train(run)
    assert zeros(run.folder).mean() == pytest.approx(0.9, abs=1e-3) and np.all(zeros(run.folder)[zeros(pruned)])


def test_a_change_hands_the_masks_on(pruned):
    loaded = model.load(pruned)
    made = model.transform(loaded, shrink(mlp=0.5), jax.random.key(0))
    assert made.card["pruned"][UP] == np.mean(np.asarray(made.params["decoder"]["layers"]["mlp"]["up"]) == 0)


def test_weights_with_fewer_zeros_than_their_card_states_are_refused(pruned, tmp_path):
    loaded = model.load(pruned)
    filled = jax.tree.map(lambda x: x + 1e-3, loaded.params)
    model.save(dataclasses.replace(loaded, params=filled), tmp_path / "filled")
    with pytest.raises(
        CheckpointError, match="the card states that 75.0000% of decoder/layers/.* are zero; 0.0000% are"
    ):
        model.load(tmp_path / "filled")
    assert json.loads(json.dumps(loaded.card["pruned"])) == loaded.card["pruned"]


def test_layers_that_a_growth_adds_to_a_pruned_model_learn(corpus, tmp_path, pruned):
    """What was pruned stays zero in every copy; the other last products of the new layer begin at zero and do not stay there."""
    grown = tmp_path / "grown"
    run = run_of(corpus, grown, start=str(pruned), model=None, transforms=(grow_depth(2, how="zero"),), steps=0)
    loop.train(run)
    begun = model.load(grown).params["decoder"]["layers"]["mlp"]
    assert not np.any(np.asarray(begun["down"][1]))
    loop.train(dataclasses.replace(run, steps=3, start=str(grown), transforms=(), workdir=str(tmp_path / "trained")))
    loop.train(dataclasses.replace(run, steps=3, workdir=str(tmp_path / "at_once")))
    for folder in ("trained", "at_once"):
        layers = model.load(tmp_path / folder).params["decoder"]["layers"]["mlp"]
        np.testing.assert_array_equal(np.asarray(layers["up"]) == 0, np.repeat(zeros(pruned), 2, axis=0))
        gone, new = (np.asarray(layers["down"][i]) == 0 for i in range(2))
        assert new[gone].all() and np.mean(~new[~gone]) > 0.9, folder  # but those of neurons that read nothing


def test_the_average_of_what_is_pruned_is_zero(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "averaged", optimizer=Optimizer(learning_rate=1e-2, moving_average=0.9))
    loop.train(run)
    assert zeros(run.folder).mean() == 0.75


def test_a_pruned_model_is_pruned_further(corpus, tmp_path, pruned):
    run = run_of(corpus, tmp_path / "more", start=str(pruned), model=None, transforms=(prune(0.9, schedule=(0, 4, 2)),))
    loop.train(run)
    assert zeros(run.folder).mean() == pytest.approx(0.9, abs=1e-3) and np.all(zeros(run.folder)[zeros(pruned)])


def test_no_update_comes_after_that_which_prunes(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "run", transforms=(prune(0.5), unfreeze(every=2)))
    with pytest.raises(ConfigError, match=r"unfreeze\(every=2\) changes the update after prune\(0.5\)"):
        loop.train(run)
    assert zeros(trained(dataclasses.replace(run, transforms=(unfreeze(every=2), prune(0.5))))).mean() == 0.5


def test_a_schedule_says_that_nothing_gets_faster(corpus, tmp_path, capsys):
    loop.train(run_of(corpus, tmp_path / "run"))
    assert "no speed-up is to be expected" in capsys.readouterr().err


def test_a_longer_table_of_positions_reads_longer_rows(corpus, tmp_path):
    sizes = ModelConfig(vocab_size=512, max_length=16, layers=1, dim=16, heads=2, positions="learned")
    short = run_of(corpus, tmp_path / "short", transforms=(), model=sizes, steps=1)
    loop.train(short)
    longer = run_of(
        corpus,
        tmp_path / "long",
        start=str(short.folder),
        model=None,
        transforms=(lengthen(32),),
        batch=Batch(size=8, length=32),
        steps=1,
    )
    loop.train(longer)
    assert model.load(longer.folder).config.max_length == 32


@pytest.mark.parametrize(
    "changes",
    [
        dict(transforms=(lora(2), prune(0.5, schedule=(0, 4, 1)))),
        dict(optimizer=Optimizer(freeze=(".*/layers/.*",)), transforms=(prune(0.5, schedule=(0, 4, 1)),)),
    ],
    ids=["lora", "freeze"],
)
def test_what_is_frozen_is_not_pruned_by_an_update(corpus, tmp_path, changes):
    with pytest.raises(
        ConfigError, match=r"schedule=\(0, 4, 1\)\) removes weights with the updates, and decoder/.* is frozen"
    ):
        loop.train(run_of(corpus, tmp_path / "run", **changes))


def test_frozen_weights_are_pruned_at_once(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "run", transforms=(lora(2), prune(0.5)))
    assert zeros(trained(run)).mean() == 0.5


@pytest.mark.parametrize("learning_rate", [1e-6, 10.0], ids=["still", "wild"])
def test_patience_waits_for_the_end_of_a_schedule(corpus, tmp_path, learning_rate):
    """No half pruned model is the best one."""
    patient = dict(checkpoint=Checkpoint(every=1, keep=1, best="loss"), eval=Eval(every=1, patience=2))
    loop.train(run_of(corpus, tmp_path / "dense", transforms=(), steps=20))
    run = run_of(
        corpus,
        tmp_path / "run",
        start=str(tmp_path / "dense"),
        model=None,
        transforms=(prune(0.95, schedule=(0, 5, 1)),),
        optimizer=Optimizer(name="sgd", learning_rate=learning_rate),
        steps=9,
        **patient,
    )
    assert zeros(trained(run)).mean() == pytest.approx(0.95, abs=1e-3)
    assert checkpoint.read_card(run.folder)["best"]["step"] >= 5
    assert checkpoint.steps(run.folder)[0] >= 5


def test_calibration_looks_at_slices_as_gradients_are_accumulated(corpus, tmp_path):
    """The same rows, whichever streams they come from."""
    seen, data = [], dataclasses.replace(run_of(corpus, tmp_path).data, shards=16)
    for slices in (1, 4):
        batch = Batch(size=32, length=16, accumulate=slices)
        made = parts.build(run_of(corpus, tmp_path / f"{slices}", batch=batch, data=data))
        found = parts.calibration(made.run, made.tokenizer, 2).batches["tokens"]
        made.close()
        assert found.shape == (2 * slices, 32 // slices, 16)
        seen.append(found.reshape(64, 16))
    np.testing.assert_array_equal(*seen)
