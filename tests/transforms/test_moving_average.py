"""The moving average of the weights: its recurrence, where evaluation finds it, and what does not enter it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim
from llm_jax.losses import Loss
from llm_jax.step import differentiate, init_state, make_step
from llm_jax.transforms import IDENTITY, chain
from llm_jax.transforms.base import Placed
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.moving_average import MovingAverageState, moving_average

DECAY, RATE = 0.8, 0.3
START = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([[3.0]], np.float32)}


def loss(params, batch, key, reference):
    """The gradient of the mean is params - batch."""
    return Loss(sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params)), jnp.float32(2), {})


def run(change, targets, rule=None):
    """The states after each step of SGD towards targets that move."""
    optimizer = change.update(rule or optax.sgd(RATE))
    step = jax.jit(make_step(loss, change.grad(differentiate(loss)), optimizer))
    states = [init_state(jax.tree.map(jnp.asarray, START), optimizer, jax.random.key(0))]
    for target in targets:
        states.append(step(states[-1], jnp.float32(target))[0])
    return states


def test_the_recurrence():
    averaged, plain = run(moving_average(DECAY), (5, -1, 2)), run(IDENTITY, (5, -1, 2))
    expected = START
    for state, bare in zip(averaged, plain):
        jax.tree.map(np.testing.assert_array_equal, state.params, bare.params)  # training is not touched
        if state is not averaged[0]:
            expected = jax.tree.map(
                lambda a, p: DECAY * a + (1 - DECAY) * np.asarray(p, np.float64), expected, state.params
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            optim.eval_params(state.opt_state, state.params),
            expected,
        )
    assert not np.allclose(expected["a"], averaged[-1].params["a"], atol=0.05)


def test_of_weights_that_the_update_places():
    """The average is of the weights after the update, told as a difference or not."""

    def update(updates, state, params=None, *, finite, **extra):
        return jax.tree.map(lambda g, p: Placed(jnp.where(finite, p - RATE * g, p)), updates, params), state

    placing = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    found, expected = (run(moving_average(DECAY), (5, np.nan, 2), rule)[-1] for rule in (placing, None))
    assert int(found.skipped) == 1
    for a, b in ((found.params, expected.params), (found.opt_state.average, expected.opt_state.average)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_with_a_frozen_part():
    """The average holds what is trained; evaluation puts the frozen part beside it."""
    states = run(chain(moving_average(DECAY), freeze(["b"])), (5, -1))
    kept = states[-1].opt_state
    assert isinstance(kept, MovingAverageState) and kept.average["b"] is None
    found = optim.eval_params(kept, states[-1].params)
    np.testing.assert_array_equal(found["b"], START["b"])
    np.testing.assert_array_equal(
        found["a"], optim.eval_params(run(moving_average(DECAY), (5, -1))[-1].opt_state, START)["a"]
    )


def test_what_is_frozen_inside_needs_no_average():
    inside = freeze(["b"])
    states = run(chain(inside, moving_average(DECAY, trained=inside.trained)), (5, -1))
    expected = run(chain(moving_average(DECAY), inside), (5, -1))
    for state, other in zip(states, expected):
        average = state.opt_state.average
        assert average["b"] is None
        np.testing.assert_array_equal(average["a"], other.opt_state.average["a"])
        jax.tree.map(
            np.testing.assert_array_equal,
            optim.eval_params(state.opt_state, state.params),
            optim.eval_params(other.opt_state, other.params),
        )


def test_a_skipped_update_does_not_enter():
    states = run(moving_average(DECAY), (5, float("nan"), -1))
    clean = run(moving_average(DECAY), (5, -1))
    assert int(states[-1].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, states[-1].opt_state, clean[-1].opt_state)


def test_it_averages_what_the_outer_rules_leave():
    """The last of a chain is outermost: an average put after a change of the update sees the changed one."""
    halved = IDENTITY._replace(update=lambda inner: optax.chain(inner, optax.scale(0.5)))
    after, before = (
        run(change, (5,))[-1] for change in (chain(halved, moving_average(DECAY)), chain(moving_average(DECAY), halved))
    )
    np.testing.assert_array_equal(after.params["a"], before.params["a"])
    moved = np.asarray(after.params["a"]) - START["a"]
    np.testing.assert_allclose(
        optim.eval_params(after.opt_state, after.params)["a"], START["a"] + (1 - DECAY) * moved, rtol=1e-6
    )
    np.testing.assert_allclose(
        optim.eval_params(before.opt_state, before.params)["a"], START["a"] + (1 - DECAY) * 2 * moved, rtol=1e-6
    )


def test_extra_arguments_reach_the_rule_below():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * 0 + value, updates), state

    rule = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = run(moving_average(DECAY), (5,), rule)[-1]
    expected = sum(float(((x - 5) ** 2).sum()) for x in START.values()) / 2
    np.testing.assert_allclose(state.params["a"], START["a"] + expected, rtol=1e-6)


def test_the_average_has_buffers_of_its_own():
    """So that a step may donate params and average both."""
    optimizer = moving_average(DECAY).update(optax.sgd(RATE))
    step = jax.jit(make_step(loss, differentiate(loss), optimizer), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.asarray, START), optimizer, jax.random.key(0))
    for _ in range(2):
        state, _ = step(state, jnp.float32(5))
    assert np.isfinite(optim.eval_params(state.opt_state, state.params)["a"]).all()


def test_no_decay_is_the_identity():
    assert moving_average(0.0) is IDENTITY


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_label(decay):
    assert moving_average(decay).label == f"moving_average({decay})"
