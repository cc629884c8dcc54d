"""Pruning on a schedule: so many weights go at each step of it, those that the score names; straight through a mask removes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim
from llm_jax.errors import ConfigError
from llm_jax.losses import Loss
from llm_jax.step import differentiate, init_state, make_step
from llm_jax.transforms.base import IDENTITY, Transform, chain, effective_params, moved
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.prune import cubic, keep_zeros, prune
from llm_jax.transforms.scores import GRADUAL
from tests.transforms.laws import FAST
from tests.transforms.test_prune import DOWN, UP, least, matrices, named, optimizer_of, train


def test_a_schedule(problem):
    change = prune(0.8, scope="global", schedule=(2, 8, 3), targets=[".*/mlp/.*"])
    states = train(problem, change, 10)
    jax.tree.map(np.testing.assert_array_equal, states[0].params, problem.params)
    size = sum(x.size for name, x in matrices(problem.params).items() if "/mlp/" in name)
    counts = [round(0.8 * size * share) for share in (0, 1 - 0.5**3, 1)]
    zeros = [sum(int((x == 0).sum()) for x in matrices(state.params).values()) for state in states]
    assert zeros == [counts[0]] * 5 + [counts[1]] * 3 + [counts[2]] * 3
    dense = matrices(train(problem, IDENTITY, 5, problem.params)[-1].params)
    flat = np.concatenate([x.ravel() for name, x in dense.items() if "/mlp/" in name])
    found = np.concatenate([x.ravel() for name, x in matrices(states[5].params).items() if "/mlp/" in name])
    np.testing.assert_array_equal(found, np.where(least(np.abs(flat), counts[1]), 0, flat))
    gone = {name: x == 0 for name, x in matrices(states[5].params).items()}
    assert all((matrices(states[-1].params)[name][x] == 0).all() for name, x in gone.items()), "what went stays away"


def test_a_schedule_goes_on_from_a_sparsity():
    begun, total = prune(0.8, schedule=(0, 4, 1), initial=0.5), 10_000
    rule = begun.update(optax.sgd(0.0))
    x = np.random.default_rng(0).permutation(total).reshape(1, 100, 100).astype(np.float32) + 1
    params = {"decoder": {"layers": {"mlp": {"up": jnp.asarray(np.where(x <= total / 2, 0, x))}}}}
    state, shares = rule.init(params), []
    for _ in range(4):
        updates, state = rule.update(params, state, params)
        params = jax.tree.map(moved, params, updates)
        shares.append(float(np.mean(params["decoder"]["layers"]["mlp"]["up"] == 0)))
    np.testing.assert_allclose(shares, [0.8 - 0.3 * (1 - i / 4) ** 3 for i in (1, 2, 3, 4)], atol=1e-4)
    assert begun.label == "prune(0.8, schedule=(0, 4, 1), initial=0.5)"
    for arguments in (dict(initial=0.5), dict(initial=0.9, schedule=(0, 4, 1)), dict(initial=-0.1, schedule=(0, 4, 1))):
        with pytest.raises(ConfigError, match="it goes with a schedule, and must lie in"):
            prune(0.8, **arguments)


def test_the_cubic_schedule():
    steps = np.arange(0, 130, 10)
    final, initial, begin, dt, n = 0.9, 0.1, 20, 10, 8
    inside = final + (initial - final) * (1 - (steps - begin) / (n * dt)) ** 3
    expected = np.where(steps < begin, initial, np.where(steps > begin + n * dt, final, inside))
    np.testing.assert_allclose(cubic(steps, begin, begin + n * dt, final, initial), expected, atol=1e-6)


@pytest.mark.parametrize("pattern, share", [("2:4", 0.5), ("block:4x2", 0.4)])
def test_a_schedule_of_a_pattern(problem, pattern, share):
    last = train(problem, prune(share, pattern=pattern, schedule=(0, 4, 2)), 5)[-1]
    for name, x in matrices(last.params).items():
        if pattern == "2:4":
            assert ((x == 0).reshape(x.shape[0], -1, 4, x.shape[2]).sum(2) == 2).all(), name
        else:
            blocks = (x == 0).reshape(x.shape[0], x.shape[1] // 4, 4, x.shape[2] // 2, 2).sum((2, 4))
            assert set(np.unique(blocks)) == {0, 8}
            assert ((blocks == 8).sum((1, 2)) == round(share * blocks[0].size)).all()


# One matrix of a toy, whose gradient is params - target, so that each step can be written down

PATH = "decoder/layers/mlp/up"
W = np.array([[[1.0, -2.0, 0.5], [0.3, 4.0, -1.5]]], np.float32)
TARGET = np.array([[[3.0, -1.0, -2.0], [2.5, 3.0, 0.0]]], np.float32)


def toy(w):
    return {"decoder": {"layers": {"mlp": {"up": jnp.asarray(w)}}}, "embed": {"tokens": jnp.ones(2)}}


def toy_loss(params, batch, key, reference):
    return Loss(jnp.sum((params["decoder"]["layers"]["mlp"]["up"] - TARGET) ** 2) / 2, jnp.float32(1), {})


def up_of(state):
    """The matrix of the toy as the model is applied with it."""
    return effective_params(state.opt_state, state.params)["decoder"]["layers"]["mlp"]["up"]


def toy_train(change, steps, rule=None):
    optimizer = change.update(rule or optax.sgd(0.25))
    step = jax.jit(make_step(toy_loss, differentiate(toy_loss), optimizer), compiler_options=FAST)
    states = [init_state(toy(W), optimizer, jax.random.key(0))]
    for _ in range(steps):
        states.append(step(states[-1], None)[0])
    return [np.asarray(up_of(state)) for state in states], states


@pytest.mark.parametrize("score", ["magnitude", "fisher", "movement"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_each_step_of_a_schedule(score, straight_through):
    """With the estimator the gradient at the pruned weights reaches the dense ones, which choose and may come back; else it stops at zeros."""
    begin, end, lr = 0, 4, 0.25
    change = prune(0.5, score=score, schedule=(begin, end, 1), straight_through=straight_through)
    kept_squares = optax.GradientTransformation(  # plain descent that keeps them as Adam does
        lambda params: optax.ScaleByRmsState(nu=jax.tree.map(jnp.zeros_like, params)),
        lambda g, state, params=None: (
            jax.tree.map(lambda g: -lr * g, g),
            optax.ScaleByRmsState(nu=jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, state.nu, g)),
        ),
    )
    found, states = toy_train(change, 7, kept_squares)
    dense, kept, worth, squares = W.astype(np.float64), np.ones(W.shape, bool), np.zeros(W.shape), np.zeros(W.shape)
    back = False
    for t in range(1, 8):
        gradient = np.where(kept, dense, 0) - TARGET
        weights = dense if straight_through else np.where(kept, dense, 0)
        worth = worth - gradient * weights
        live = kept | (straight_through and t <= end)
        now = weights - lr * np.where(live, gradient, 0)
        squares = 0.99 * squares + 0.01 * gradient**2
        if begin < t <= end:
            chosen = {"movement": worth, "fisher": squares * now**2, "magnitude": np.abs(now)}[score]
            chosen = np.where(live, chosen, -np.inf)
            new = ~least(chosen, round(3 * (1 - (1 - (t - begin) / (end - begin)) ** 3)))
            back |= bool((new & ~kept).any())
            kept = new
        dense = now
        np.testing.assert_allclose(found[t], np.where(kept, dense, 0), atol=1e-5, err_msg=f"{t}")
        assert (found[t] == 0).sum() == (~kept).sum()
        if straight_through and t <= end:
            np.testing.assert_allclose(states[t].params["decoder"]["layers"]["mlp"]["up"], dense, atol=1e-5)
    assert back == straight_through or score == "movement"
    np.testing.assert_array_equal(up_of(states[-1]) != 0, kept)


def test_the_objective_straight_through_is_that_of_the_pruned_model():
    """Where an update may ask for it again, as a line search does: of the weights that it names, without those that are removed; and its
    gradient is the one that it is given."""

    def ask(g, state, params, *, value, value_fn, **_):
        again, gradient = jax.value_and_grad(value_fn)(params)
        return g, (jnp.stack([value, again]), gradient, g)

    asked = optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(2), params, params), ask)
    _, states = toy_train(prune(0.5, schedule=(0, 2, 1), straight_through=True), 3, asked)
    (value, again), *gradients = states[-1].opt_state.inner
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    dense = toy_loss(states[-2].params, None, None, {}).total
    assert value == again == toy_loss(toy(up_of(states[-2])), None, None, {}).total != dense


@pytest.mark.parametrize("straight_through", [True, False])
def test_what_a_mask_inside_removed_counts(problem, straight_through):
    """So that one and the other take no more than is asked for."""
    inside = prune(0.5, pattern="2:4", schedule=(0, 2, 1), straight_through=True)
    change = chain(inside, prune(0.75, schedule=(0, 2, 1), straight_through=straight_through))
    last = train(problem, change, 3)[-1]
    for name, x in matrices(effective_params(last.opt_state, last.params)).items():
        assert (x == 0).mean() == 0.75, name


def test_what_is_frozen_inside_is_not_masked(problem):
    change = chain(freeze([UP]), prune(0.5, schedule=(0, 2, 1), straight_through=True))
    last = train(problem, change, 3)[-1]
    found = named(effective_params(last.opt_state, last.params))
    np.testing.assert_array_equal(found[UP], named(problem.params)[UP])
    assert (found[DOWN] == 0).mean() == 0.5


def test_several_masks_straight_through(problem):
    """Each keeps one of its own."""
    changes = [
        prune(share, targets=[target], schedule=(0, 2, 1), straight_through=True)
        for target, share in ((UP, 0.5), (DOWN, 0.75))
    ]
    last = train(problem, chain(*changes), 3)[-1]
    found = named(effective_params(last.opt_state, last.params))
    assert (found[UP] == 0).mean() == 0.5 and (found[DOWN] == 0).mean() == 0.75
    for name, x in named(last.params).items():
        assert (x != 0).all() or name not in (UP, DOWN)
        np.testing.assert_array_equal(found[name], np.where(found[name] == 0, 0, x))


def test_a_new_weight_does_not_end_at_the_zero_of_one_that_is_removed():
    """A new weight begins at -0: an update of 0 leaves it there, any other moves it; one that is removed stays."""
    up = np.array([[[0.0, -0.0, -0.0, 0.25, 0.0]]], np.float32)
    wanted = np.array([[[1.0, 0.0, 0.5, -0.5, -0.0]]], np.float32)
    rule = optax.GradientTransformation(lambda params: (), lambda updates, state, params: (toy(wanted), state))
    params, update = toy(up), keep_zeros([UP]).update(rule)
    made = optax.apply_updates(params, update.update(params, update.init(params), params)[0])
    found = np.asarray(made["decoder"]["layers"]["mlp"]["up"])
    np.testing.assert_array_equal(found, [[[0, 0, 0.5, -0.25, 0]]])
    np.testing.assert_array_equal(np.signbit(found), [[[False, True, False, True, False]]])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_what_is_pruned_already_is_pruned_further(inside, straight_through):
    """On a schedule, whether the zeros that were there are kept inside of it or outside."""
    further = prune(
        0.75,
        schedule=(0, 4, 1),
        score="movement" if straight_through else "magnitude",
        straight_through=straight_through,
    )
    both = (keep_zeros([UP]), further) if inside else (further, keep_zeros([UP]))
    rng = np.random.default_rng(0)
    params = toy(np.where(rng.random((1, 8, 8)) < 0.25, 0, rng.standard_normal((1, 8, 8))).astype(np.float32))
    optimizer = chain(*both).update(optax.sgd(0.01))
    state, gone = optimizer.init(params), np.asarray(params["decoder"]["layers"]["mlp"]["up"] == 0)
    for _ in range(6):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(moved, params, updates)
        assert (params["decoder"]["layers"]["mlp"]["up"] == 0)[gone].all()
    assert int((effective_params(state, params)["decoder"]["layers"]["mlp"]["up"] == 0).sum()) == 48


@pytest.mark.parametrize("straight_through", [True, False])
def test_a_new_weight_waits_for_the_schedule(straight_through):
    """At -0, where an update of 0 leaves it."""
    change = prune(0.5, schedule=(2, 4, 1), straight_through=straight_through)
    start = toy(np.where(W > 0, W, -0.0))
    optimizer = change.update(optax.set_to_zero())  # an update of +0
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, start), optimizer.init(start), start)
    found = np.asarray(jax.tree.map(moved, start, updates)["decoder"]["layers"]["mlp"]["up"])
    np.testing.assert_array_equal(np.signbit(found), W <= 0)


def test_what_calculates_with_updates_fails_on_placed_weights():
    change = chain(prune(0.5, schedule=(0, 4, 1)), Transform(update=lambda inner: optax.chain(inner, optax.scale(0.5))))
    optimizer = change.update(optax.sgd(0.1))
    with pytest.raises(TypeError, match="Placed"):
        optimizer.update(toy(W), optimizer.init(toy(W)), toy(W))


def test_schedule_free_weights_are_pruned_too(problem):
    last = train(problem, prune(0.5), 3, name="schedule_free_adamw")[-1]
    for name, x in matrices(optim.eval_params(last.opt_state, last.params)).items():
        assert (x == 0).mean() == 0.5, name


@pytest.mark.parametrize("score", GRADUAL)
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_skipped_update_is_no_step_of_the_schedule(score, straight_through):
    change = prune(0.5, score=score, schedule=(0, 4, 1), straight_through=straight_through)
    optimizer = change.update(optax.adam(0.01))

    def loss(params, batch, key, reference):
        return toy_loss(params, batch, key, reference)._replace(total=toy_loss(params, None, key, {}).total * batch)

    step = jax.jit(make_step(loss, differentiate(loss), optimizer), compiler_options=FAST)
    state = init_state(toy(W), optimizer, jax.random.key(0))
    for factor, zeros in ((1.0, 2), (float("nan"), 2), (1.0, 3)):
        before, state = state, step(state, jnp.float32(factor))[0]
        assert int((up_of(state) == 0).sum()) == zeros
        if np.isnan(factor):
            bits = [
                [x.tobytes() for x in jax.tree.leaves(jax.device_get((s.params, s.opt_state)))] for s in (before, state)
            ]
            assert bits[0] == bits[1]
    assert int(state.opt_state.step) == 2 and int(state.skipped) == 1


def test_fisher_on_a_schedule_reads_what_the_optimizer_keeps(problem):
    change = prune(0.75, score="fisher", schedule=(1, 5, 1))
    for name in ("adamw", "rmsprop"):
        for x in matrices(train(problem, change, 6, name=name)[-1].params).values():
            assert (x == 0).mean() == 0.75
    with pytest.raises(
        ConfigError, match="'fisher' reads second moments, which this optimizer does not keep: take adam"
    ):
        change.update(optax.sgd(0.1)).init(problem.params)
    with pytest.raises(ConfigError, match="reads second moments, which this optimizer does not keep"):  # one a matrix
        change.update(optax.novograd(0.1)).init(problem.params)


def test_a_schedule_free_optimizer_takes_no_schedule(problem):
    with pytest.raises(ConfigError, match="a schedule does not go with a schedule-free optimizer"):
        optimizer_of(problem, prune(schedule=(0, 2, 1)), name="schedule_free_adamw").init(problem.params)
