"""A run that grows a model goes on with its optimizer where the run before it stopped."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax import loop, model, parts
from llm_jax.config import Mesh
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.transforms import carry_moments, grow_depth, grow_width, prune
from tests.test_pruned_runs import run_of


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """A run of one layer."""
    folder = tmp_path_factory.mktemp("grown") / "small"
    loop.train(run_of(corpus, folder, transforms=()))
    return folder


def grown(corpus, folder, small, *transforms):
    changes = transforms or (grow_depth(2), grow_width(mlp_dim=72), carry_moments())
    return run_of(corpus, folder, start=str(small), model=None, transforms=changes)


def moments(run):
    """The state before the first step, without what it starts from being trained."""
    made = parts.build(run)
    with jax.set_mesh(made.mesh):
        state, inherited = made.init()
    made.close()
    return state.opt_state, inherited


def test_moments_are_carried_over_and_told(corpus, tmp_path, small, capsys):
    run = grown(corpus, tmp_path / "grown", small)
    state, inherited = moments(run)
    before = moments(run_of(corpus, small, transforms=()))[0]  # fresh: of the same structure
    assert jax.tree.structure(before) == jax.tree.structure(state)
    nu = state[1][0].nu["decoder"]["layers"]["attention"]["query"]
    assert np.all(np.asarray(nu) > 0) and int(state[1][0].count) == 6
    np.testing.assert_array_equal(np.asarray(nu)[0], np.asarray(nu)[1])
    assert nu.sharding == state[1][0].mu["decoder"]["layers"]["attention"]["query"].sharding
    split, _ = moments(dataclasses.replace(run, mesh=Mesh(data=2, fsdp=2, tensor=2)))
    for x, y in zip(jax.tree.leaves(split), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert not split[1][0].nu["decoder"]["layers"]["attention"]["query"].is_fully_replicated
    assert "1/0/mu (10 arrays)" in inherited["moments"].splitlines()[0]
    loop.train(run)
    assert f"moments {inherited['moments']}" in capsys.readouterr().err
    cold = grown(corpus, tmp_path / "cold", small, grow_depth(2))
    loop.train(dataclasses.replace(cold, steps=0))
    assert "moments reset: all; with carry_moments()" in capsys.readouterr().err
    loop.train(dataclasses.replace(run, steps=7, optimizer=run.optimizer))  # goes on from its own state
    assert model.load(run.folder).card["moments"] == inherited["moments"]


def test_there_must_be_a_run_to_carry_them_from(corpus, tmp_path, small):
    run = grown(corpus, tmp_path / "run", small, carry_moments())
    with pytest.raises(ConfigError, match="carry_moments: the run starts from fresh, which no optimizer made"):
        loop.train(dataclasses.replace(run, start="fresh", model=model.sizes(small)))


def test_a_saved_model_has_no_moments(corpus, tmp_path, small):
    model.save(model.load(small), tmp_path / "saved")
    run = grown(corpus, tmp_path / "run", tmp_path / "saved")
    with pytest.raises(CheckpointError, match="holds a model without the state of an optimizer"):
        loop.train(run)


def test_a_change_of_weights_that_is_no_growth_is_refused(corpus, tmp_path, small):
    with pytest.raises(ConfigError, match=r"prune\(0.5\) does not say what becomes of an optimizer's moments"):
        loop.train(grown(corpus, tmp_path / "run", small, prune(0.5), carry_moments()))
