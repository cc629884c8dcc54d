"""Anchors: what each adds is its formula, once however the batch is cut; evaluation is left alone."""

import jax
import numpy as np
import pytest

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.model import Model, load, save
from llm_jax.models import transformer
from llm_jax.optim import optax
from llm_jax.step import differentiate, init_state, make_step
from llm_jax.transforms import IDENTITY, Calibration, chain
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.anchor import anchor, fisher
from llm_jax.transforms.distil import distil
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.lora import lora
from tests.families import FAMILIES, tiny_model
from tests.transforms import laws

STRENGTH = 0.7


@pytest.fixture(scope="module")
def old(problem):
    """An older model: the weights a little elsewhere."""
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), problem.params)
    return Model(problem.config, moved)


@pytest.fixture(scope="module")
def information(problem):
    """Some F."""
    rng = np.random.default_rng(4)
    return Model(problem.config, jax.tree.map(lambda x: rng.random(x.shape, np.float32), problem.params))


def run(problem, change, reference, before=IDENTITY, after=IDENTITY):
    """The loss and the gradient with an anchor."""
    whole = chain(before, change, after)
    grad = whole.grad(differentiate(whole.loss(problem.loss)))
    return jax.device_get(
        jax.jit(lambda p, b, r: grad(p, b, jax.random.key(0), r), compiler_options=laws.FAST)(
            problem.params, problem.batch, reference
        )
    )


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("kind", ["l2", "fisher"])
def test_the_formula(problem, old, information, kind, slices):
    """mean loss + strength/2 sum F (theta - theta_0)^2, also where slices weigh unequally."""
    weighted = kind == "fisher"
    change = anchor(old, kind, strength=STRENGTH, **({"fisher": information} if weighted else {}))
    assert change.reference == {"anchor": old} | ({"fisher": information} if weighted else {})
    reference = {name: x.params for name, x in change.reference.items()}
    found, gradient = run(problem, change, reference, before=accumulate(slices))
    f = information.params if weighted else jax.tree.map(np.ones_like, problem.params)
    moved = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, problem.params, old.params)
    penalty = STRENGTH / 2 * sum((f * d**2).sum() for f, d in zip(jax.tree.leaves(f), jax.tree.leaves(moved)))
    before, whole = problem.whole
    weight = float(before.weight)
    assert penalty > 1 and float(found.weight) == weight
    assert float(found.total) == pytest.approx(float(before.total) + weight * penalty, rel=1e-5)
    assert float(found.metrics["anchor"]) / weight == pytest.approx(penalty, rel=1e-5)
    assert float(found.metrics["nll"]) == pytest.approx(float(before.metrics["nll"]), rel=1e-5)
    expected = jax.tree.map(lambda g, f, d: g + weight * STRENGTH * f * d, whole, f, moved)
    for name, x, y in zip(tree.names(expected), jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3, err_msg=name)


def numpy_kl(problem, old):
    def log_p(params):
        logits = np.asarray(transformer.apply(problem.config, params, problem.batch).logits, np.float64)
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )

    p, q = log_p(old.params), log_p(problem.params)
    return float((problem.batch["weights"] * (np.exp(p) * (p - q)).sum(-1)).sum())


@pytest.mark.parametrize("slices", [1, 4])
def test_the_divergence(problem, old, slices):
    change = anchor(old, "kl", strength=STRENGTH)
    found, gradient = run(problem, change, {"anchor": old.params}, before=accumulate(slices))
    expected = STRENGTH * numpy_kl(problem, old)
    assert expected > 1 and set(found.metrics) == {*problem.whole[0].metrics, "anchor"}
    assert float(found.metrics["anchor"]) == pytest.approx(expected, rel=1e-4)
    assert float(found.total) == pytest.approx(float(problem.whole[0].total) + expected, rel=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    itself, _ = run(problem, change, {"anchor": problem.params})
    assert float(itself.total) == pytest.approx(float(problem.whole[0].total), rel=1e-5)


def test_a_teacher_beside_it(problem, old, information):
    """The anchor's own reference and metric leave those of distillation alone."""
    teach, hold = distil(information), anchor(old, "kl", strength=STRENGTH)
    reference = {"teacher": information.params, "anchor": old.params}
    both, _ = run(problem, chain(teach, hold), reference)
    apart = [run(problem, change, reference)[0] for change in (teach, hold)]
    totals = [float(x.total) - float(problem.whole[0].total) for x in (both, *apart)]
    assert totals[0] == pytest.approx(totals[1] + totals[2], rel=1e-4)
    assert float(both.metrics["soft"]) == pytest.approx(float(apart[0].metrics["soft"]), rel=1e-5)
    assert float(both.metrics["anchor"]) == pytest.approx(float(apart[1].metrics["anchor"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_the_factor_of_the_task_is_of_the_task_alone(problem, old, information, kind):
    """In either order, and beside another anchor, whose metric has a name of its own."""
    hold, more = anchor(old, kind, strength=STRENGTH), anchor(old, "l2", strength=2.0)
    for task in (0.0, 0.3):
        teach = distil(information, task=task)
        reference = {"teacher": information.params, "anchor": old.params}
        orders = (chain(hold, more, teach), chain(teach, hold, more), chain(hold, teach, more))
        found = [run(problem, change, reference)[0] for change in orders]
        own = found[0].metrics
        expected = task * problem.whole[0].total + own["soft"] + own["anchor"] + own["anchor_2"]
        for each in found:
            assert float(each.total) == pytest.approx(float(expected), rel=1e-5)
            assert {name: float(x) for name, x in each.metrics.items()} == pytest.approx(
                {name: float(x) for name, x in own.items()}, rel=1e-6
            )


def test_a_step(problem, old):
    """The step reports the objective and moves the weights towards the older model when nothing else counts."""
    change = anchor(old, strength=1e4)
    loss, optimizer = change.loss(problem.loss), optax.sgd(1e-5)
    state = init_state(problem.params, optimizer, jax.random.key(0), {"anchor": old.params})
    step = jax.jit(make_step(loss, differentiate(loss), optimizer), compiler_options=laws.FAST)
    after, metrics = step(state, problem.batch)
    distance = [
        sum(((x - y) ** 2).sum() for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(old.params)))
        for p in (problem.params, jax.device_get(after.params))
    ]
    assert float(metrics["anchor"]) == pytest.approx(1e4 / 2 * float(distance[0]), rel=1e-4)
    assert distance[1] == pytest.approx(0.9**2 * distance[0], rel=0.01)


@pytest.mark.parametrize("kind", ["l2", "fisher", "kl"])
def test_evaluation_is_left_alone(problem, old, information, kind):
    change = anchor(old, kind, **({"fisher": information} if kind == "fisher" else {}))
    expected = problem.loss(problem.params, problem.batch, None, {})
    found = change.loss(problem.loss)(problem.params, problem.batch, None, {})
    assert set(found.metrics) == set(expected.metrics)
    np.testing.assert_array_equal(found.total, expected.total)


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_with_frozen_parameters(problem, old, kind):
    """They count in the loss and have no gradient."""
    change, reference = anchor(old, kind), {"anchor": old.params}
    whole, by_all = run(problem, change, reference)
    found, gradient = run(problem, change, reference, after=freeze(["embed/.*", "decoder/layers/mlp.*"]))
    assert float(found.total) == pytest.approx(float(whole.total), rel=1e-6)
    by_all = dict(zip(tree.names(by_all), jax.tree.leaves(by_all)))
    assert 0 < len(tree.names(gradient)) < len(by_all)
    for name, x in zip(tree.names(gradient), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(x, by_all[name], rtol=1e-4, atol=1e-3, err_msg=name)


def test_the_information(problem, tmp_path):
    """The mean over rows with targets of their squared gradients; it is saved and loaded as a model is."""
    rows = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), problem.batch)
    found = fisher(problem.config, problem.params, Calibration(rows, lambda config: problem.loss))
    one = jax.jit(jax.grad(lambda p, row: problem.loss(p, row, None, {}).total), compiler_options=laws.FAST)
    each = [
        jax.tree.map(
            lambda g: np.asarray(g, np.float64) ** 2,
            one(problem.params, {n: x[i : i + 1] for n, x in problem.batch.items()}),
        )
        for i in range(8)
        if problem.batch["weights"][i].any()
    ]
    assert len(each) == 6
    expected = jax.tree.map(lambda *x: sum(x) / len(x), *each)
    for name, x, y in zip(tree.names(found), jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6 * y.max(), err_msg=name)
    save(Model(problem.config, found), tmp_path / "fisher")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "fisher").params, found)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_the_model_stays_as_it_is(name, kind):
    """It changes what is minimised; sizes and weights are those of before, in every family."""
    tiny = tiny_model(name)
    change = anchor(Model(tiny.config, tiny.params), kind)
    assert change.config(tiny.config) is tiny.config
    assert change.params(tiny.config, tiny.params, jax.random.key(0), None) is tiny.params


def test_no_strength_is_the_identity(old, information):
    assert anchor(old, strength=0) is anchor(old, "kl", strength=0) is IDENTITY
    assert anchor(old, "fisher", strength=0, fisher=information) is IDENTITY


def test_labels_are_code():
    for change in (
        anchor("a/b"),
        anchor("a", "kl", strength=2.0),
        anchor("a", "fisher", fisher="b", exclude="head/.*"),
    ):
        assert eval(change.label).label == change.label
    assert anchor("a").label == "anchor('a', 'l2', strength=1.0)"
    assert anchor("a", "fisher", fisher="b").reference == {"anchor": "a", "fisher": "b"}


def test_a_model_with_other_parameters(problem, old):
    """New factors and a new head may be left out by name, and nothing else is left out in silence."""
    _, params = laws.changed(lora(2), laws.Tiny("", problem.config, problem.params))
    loss = anchor(old).loss(lambda *_: problem.whole[0])
    arguments = (problem.batch, jax.random.key(0), {"anchor": old.params})
    with pytest.raises(ConfigError) as error:
        loss(params, *arguments)
    assert str(error.value) == (
        "anchor: decoder/layers/attention/query_lora_a is of shape (2, 16, 2), but the older model has it not: exclude it, or shrink both"
    )
    loss = anchor(old, exclude=".*_lora_[ab]").loss(lambda *_: problem.whole[0])
    plain = anchor(old).loss(lambda *_: problem.whole[0])
    np.testing.assert_allclose(loss(params, *arguments).total, plain(problem.params, *arguments).total, rtol=1e-6)
    wider = jax.tree.map(lambda x: np.concatenate([x, x], axis=-1), old.params)
    with pytest.raises(ConfigError, match="the older model has it of shape"):
        plain(problem.params, problem.batch, jax.random.key(0), {"anchor": wider})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="l1"), "unknown anchor 'l1'"),
        (dict(strength=-1.0), "anchor: strength is -1.0: it must not be negative"),
        (dict(strength=float("nan")), "anchor: strength is nan"),
        (dict(kind="fisher"), "anchor: kind='fisher' needs Fisher information"),
        (dict(kind="l2", fisher="a"), "anchor: kind='l2' reads no Fisher information"),
        (dict(kind="kl", exclude="head/.*"), "anchor: exclude is of weights: it does not go with kind='kl'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        anchor("model", **arguments)
    assert str(error.value).startswith(message)
