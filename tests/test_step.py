"""One update as a pure function: what it minimises, what it does with a loss that is not finite, and what it leaves
alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim, tree
from llm_jax.config import Optimizer, Schedule
from llm_jax.losses import Loss
from llm_jax.models import presets, transformer
from llm_jax.step import TrainState, differentiate, init_state, make_step
from llm_jax.tasks import NextToken
from llm_jax.transforms.base import Guarded, Placed

START = {"a": np.array([1.0, -2.0, 0.5], np.float32), "b": {"c": np.array([[3.0, -1.0]], np.float32)}}


def loss(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
    """Rows (B, 3) pull `a`, weighed by w; `kink` adds a term whose value is 0 and whose gradient is infinite, `lift`
    one without gradient.
    """
    pulled = jnp.sum(batch["w"] * jnp.sum((params["a"] - batch["x"]) ** 2, axis=1)) / 2
    c = params["b"]["c"]
    kink = jnp.sqrt(jnp.where(batch["kink"], c[0, 0] - jax.lax.stop_gradient(c[0, 0]), 1.0)) - (1.0 - batch["kink"])
    rest = jnp.sum(c**2) / 2 + kink + batch["lift"]
    metrics = {"drawn": jax.random.uniform(key), "pulled": pulled}
    return Loss(pulled + rest, jnp.sum(batch["w"]), metrics, outputs="handed on to transforms, not out of the step")


def batch_of(seed: int = 0, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    plain = dict(x=rng.standard_normal((4, 3)), w=np.array([1, 0, 2, 0.5]), kink=False, lift=0.0)
    return {name: jnp.asarray(x, bool if name == "kink" else jnp.float32) for name, x in {**plain, **changes}.items()}


BAD = {
    "a loss that is not a number": dict(lift=np.nan),
    "an infinite loss with a finite gradient": dict(lift=np.inf),
    "a finite loss with an infinite gradient": dict(kink=True),
    "a row that is not a number": dict(x=np.full((4, 3), np.nan)),
}
ADAM = optax.with_extra_args_support(optax.adam(0.1))
STEP = jax.jit(make_step(loss, differentiate(loss), ADAM))


def start(optimizer: Any = ADAM, **reference: Any) -> TrainState:
    return init_state(jax.tree.map(jnp.asarray, START), optimizer, jax.random.key(7), reference)


def run(*batches: dict[str, Any]) -> tuple[TrainState, list[dict[str, Any]]]:
    state, told = start(), []
    for batch in batches:
        state, metrics = STEP(state, batch)
        told.append(jax.device_get(metrics))
    return state, told


def same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


def test_the_mean_gradient_of_the_global_batch():
    """SGD by 0.1 on sums over a weight of 3.5, by hand."""
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    batch = batch_of()
    state, metrics = jax.jit(make_step(loss, differentiate(loss), optimizer))(start(optimizer), batch)
    x, w, a, c = (np.asarray(v, np.float64) for v in (batch["x"], batch["w"], START["a"], START["b"]["c"]))
    gradient = {"a": (w[:, None] * (a - x)).sum(0) / 3.5, "b": {"c": c / 3.5}}
    jax.tree.map(lambda p, s, g: np.testing.assert_allclose(p, s - 0.1 * g, rtol=1e-6), state.params, START, gradient)
    pulled = (w * ((a - x) ** 2).sum(1)).sum() / 2
    assert float(metrics["loss"]) == pytest.approx((pulled + (c**2).sum() / 2) / 3.5, rel=1e-6)
    assert float(metrics["pulled"]) == pytest.approx(pulled / 3.5, rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        np.sqrt((gradient["a"] ** 2).sum() + (gradient["b"]["c"] ** 2).sum()), rel=1e-6
    )
    assert float(metrics["weight"]) == 3.5 and int(state.step) == 1


def test_metrics():
    _, (metrics,) = run(batch_of())
    assert set(metrics) == {"loss", "grad_norm", "weight", "skipped", "skipped_in_a_row", "drawn", "pulled"}
    assert all(x.shape == () for x in metrics.values())


def test_a_batch_without_weight_is_no_fault():
    state, (metrics,) = run(batch_of(w=np.zeros(4), x=np.zeros((4, 3))))
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 0


@pytest.mark.parametrize("what", BAD)
def test_an_update_that_is_not_finite_is_skipped(what):
    """Params and moments keep their bits; the step is counted; what follows is as if it had not been."""
    bad = batch_of(1, **BAD[what])
    before, _ = run(batch_of(0))
    state, told = run(batch_of(0), bad)
    same_bits((state.params, state.opt_state), (before.params, before.opt_state))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 1)
    assert (int(told[-1]["skipped"]), int(told[-1]["skipped_in_a_row"])) == (1, 1)
    assert not np.isfinite(told[-1]["loss"]) or not np.isfinite(told[-1]["grad_norm"])
    after, _ = run(batch_of(0), bad, batch_of(2))
    clean, _ = run(batch_of(0), batch_of(2))
    same_bits((after.params, after.opt_state), (clean.params, clean.opt_state))


def test_a_part_of_the_state_that_the_update_guards_itself_is_taken_as_it_is():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Count(Guarded):
        value: Any

    def update(updates, state, params=None, *, finite, **extra):
        return updates, (Count(state[0].value + jnp.where(finite, 1, 10)), state[1] + 1)

    def init(params):
        return Count(jnp.zeros((), jnp.int32)), jnp.zeros((), jnp.int32)

    counting = optax.GradientTransformationExtraArgs(init, update)
    step, state = jax.jit(make_step(loss, differentiate(loss), counting)), start(counting)
    for batch, counts in ((batch_of(), (1, 1)), (batch_of(lift=np.nan), (11, 1)), (batch_of(), (12, 2))):
        state, _ = step(state, batch)
        assert (int(state.opt_state[0].value), int(state.opt_state[1])) == counts


def test_a_weight_that_the_update_places_itself_is_taken_as_it_is():
    def update(updates, state, params=None, *, finite, **extra):
        return {"a": Placed(jnp.where(finite, params["a"] * 3, params["a"])), "b": updates["b"]}, state

    placing = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    step, state = jax.jit(make_step(loss, differentiate(loss), placing)), start(placing)
    for batch, factor in ((batch_of(), 3), (batch_of(lift=np.nan), 3), (batch_of(), 9)):
        before, (state, _) = state.params["b"]["c"], step(state, batch)
        np.testing.assert_array_equal(state.params["a"], START["a"] * factor)
        assert (state.params["b"]["c"] == before).all() == bool(np.isnan(batch["lift"]))


def test_the_counts():
    good, bad = batch_of(0), batch_of(0, lift=np.nan)
    state, told = run(bad, good, bad, bad, good, bad)
    assert [int(m["skipped"]) for m in told] == [1, 1, 2, 3, 3, 4]
    assert [int(m["skipped_in_a_row"]) for m in told] == [1, 0, 1, 2, 0, 1]
    assert int(state.step) == 6


def test_each_step_has_a_key_of_its_own_folded_from_the_runs():
    _, told = run(*[batch_of()] * 3)
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(7), i))) / 3.5 for i in range(3)]
    np.testing.assert_allclose([float(m["drawn"]) for m in told], expected, rtol=1e-6)
    assert len(set(expected)) == 3


def test_a_skipped_step_uses_up_its_key():
    """The key belongs to the step's number: a run that is resumed draws the same."""
    _, told = run(batch_of(), batch_of(lift=np.nan), batch_of())
    assert float(told[2]["drawn"]) == float(run(*[batch_of()] * 3)[1][2]["drawn"])


def test_the_reference_is_read_and_passed_on():
    """Other weights enter the loss as an argument: they are neither trained nor constants of the program."""

    def to_teacher(params, batch, key, reference):
        return Loss(
            sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(reference["teacher"]))),
            jnp.float32(2),
            {},
        )

    optimizer = optax.with_extra_args_support(optax.sgd(0.25))
    step = jax.jit(make_step(to_teacher, differentiate(to_teacher), optimizer))
    for value in (5.0, -1.0):
        teacher = jax.tree.map(lambda x, v=value: jnp.full(x.shape, v), START)
        state, _ = step(start(optimizer, teacher=teacher), {})
        same_bits(state.reference, {"teacher": teacher})
        jax.tree.map(
            lambda p, s, v=value: np.testing.assert_allclose(p, s - 0.25 * (s - v), rtol=1e-6), state.params, START
        )
    assert step._cache_size() == 1, "another teacher is not another program"


def test_frozen_params_are_read_and_not_differentiated():
    live, fixed = {"a": START["a"], "b": {"c": None}}, {"a": None, "b": {"c": START["b"]["c"]}}
    key = jax.random.key(0)
    whole_loss, whole = differentiate(loss)(START, batch_of(), key, {})
    found, gradient = differentiate(loss)(live, batch_of(), key, {"frozen": fixed})
    assert float(found.total) == float(whole_loss.total) and gradient["b"]["c"] is None
    np.testing.assert_array_equal(gradient["a"], whole["a"])
    assert found.outputs is None and found.metrics.keys() == whole_loss.metrics.keys()


def test_the_state_can_be_donated():
    """The update happens in place: the state that came in is gone, what comes out is the same as without."""
    donating = jax.jit(make_step(loss, differentiate(loss), ADAM), donate_argnums=0)
    teacher = jnp.ones(3)
    state = given = start(ADAM, teacher=teacher)
    for seed in range(2):
        state, _ = donating(state, batch_of(seed))
    assert all(x.is_deleted() for x in jax.tree.leaves((given.params, given.opt_state, given.step, given.reference)))
    expected, _ = run(batch_of(0), batch_of(1))
    same_bits((state.params, state.opt_state, state.step), (expected.params, expected.opt_state, expected.step))
    same_bits(state.reference, {"teacher": np.ones(3)})


def test_params_keep_their_dtype():
    params = {"a": jnp.asarray(START["a"], jnp.bfloat16), "b": {"c": jnp.asarray(START["b"]["c"])}}
    state, _ = STEP(init_state(params, ADAM, jax.random.key(0)), batch_of())
    assert state.params["a"].dtype == jnp.bfloat16 and state.params["b"]["c"].dtype == jnp.float32


def test_what_an_optimizer_may_ask_for():
    """The mean loss, its gradient, whether these are finite, and the loss at other params of the same batch and key, a part of them left out
    or not.
    """

    def update(updates, state, params=None, *, value, grad, value_fn, finite, **extra):
        assert not extra
        elsewhere = jax.tree.map(lambda p: p + 1, params)
        return jax.tree.map(jnp.zeros_like, updates), (
            value,
            value_fn(params),
            value_fn(elsewhere),
            value_fn({**elsewhere, "b": {"c": None}}),
            grad,
        )

    zeros = jax.tree.map(jnp.zeros_like, START)
    asking = optax.GradientTransformationExtraArgs(lambda params: (*[jnp.zeros(())] * 4, zeros), update)
    batch = batch_of()
    state, metrics = jax.jit(make_step(loss, differentiate(loss), asking))(start(asking), batch)
    value, here, there, partly, gradient = state.opt_state

    def mean(params):
        return float(loss(params, batch, jax.random.key(0), {}).total) / 3.5

    assert (
        float(value)
        == float(metrics["loss"])
        == pytest.approx(mean(START), rel=1e-6)
        == pytest.approx(float(here), rel=1e-6)
    )
    moved = jax.tree.map(lambda p: p + 1, START)
    assert float(there) == pytest.approx(mean(moved), rel=1e-6)
    assert float(partly) == pytest.approx(mean({**moved, "b": START["b"]}), rel=1e-6)
    expected = jax.grad(lambda params: loss(params, batch, jax.random.key(0), {}).total / 3.5)(START)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradient, expected)


GOLDEN = {"loss": 4.0192857, "grad_norm": 1.4259676, "correct": 0.03703704, "second": 3.7769933}


def test_golden_metrics_of_two_steps():
    """A tiny Llama, AdamW with warmup, from NumPy weights. If a change of the model, the loss or the optimizer is meant
    to change these, put in what the failure shows; if not, it has broken one of them.
    """
    sizes = presets.llama(vocab_size=32, max_length=16, layers=2, dim=16, heads=4, kv_heads=2, mlp_dim=24)
    shapes = transformer.shapes(sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * 0.2 + (len(x.shape) < 3)).astype(np.float32), shapes
    )
    tokens = rng.integers(0, 32, (4, 17)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": rng.integers(0, 2, (4, 16)).astype(np.float32),
    }
    task = NextToken(label_smoothing=0.1, z_loss=1e-3).loss(sizes)
    optimizer = optim.make_optimizer(
        Optimizer(learning_rate=0.01, weight_decay=0.1),
        optim.make_schedule(Schedule(warmup=2, initial=0.5), 10),
        shapes,
        transformer.axes(sizes),
    )
    step = jax.jit(make_step(task, differentiate(task), optimizer))
    state, first = step(init_state(params, optimizer, jax.random.key(0)), batch)
    _, second = step(state, batch)
    found = {
        "loss": float(first["loss"]),
        "grad_norm": float(first["grad_norm"]),
        "correct": float(first["correct"]),
        "second": float(second["loss"]),
    }
    assert found == pytest.approx(GOLDEN, rel=1e-4), f"golden metrics changed, to {found}"
    assert tree.size(state.params) == sum(x.size for x in jax.tree.leaves(params))
