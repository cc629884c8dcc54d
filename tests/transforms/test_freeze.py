"""What is frozen keeps its bits and costs neither gradient nor moments; the rest is trained as if nothing were."""

import jax
import numpy as np
import pytest

from llm_jax import optim, tree
from llm_jax.config import Optimizer, Schedule
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.step import init_state, make_step
from llm_jax.transforms import IDENTITY, chain
from llm_jax.transforms.freeze import freeze

FAST = {"xla_backend_optimization_level": 0}
FROZEN = ["embed/.*", "decoder/layers/mlp.*", "head/kernel"]


def optimizer_of(problem, change=IDENTITY, **chosen):
    shapes, axes = transformer.shapes(problem.config), transformer.axes(problem.config)
    return change.update(
        optim.make_optimizer(Optimizer(**chosen), optim.make_schedule(Schedule(name="constant"), 10), shapes, axes)
    )


def is_frozen(name):
    return name.startswith(("embed/", "decoder/layers/mlp", "head/"))


def test_the_gradient_of_the_rest_is_what_it_was(problem):
    loss, gradient = problem.run(freeze(FROZEN).grad(problem.grad))
    np.testing.assert_allclose(loss.total, problem.whole[0].total, rtol=1e-6)
    whole = dict(zip(tree.names(problem.whole[1]), jax.tree.leaves(problem.whole[1])))
    found = dict(zip(tree.names(gradient), jax.tree.leaves(gradient)))
    assert found.keys() == {name for name in whole if not is_frozen(name)}
    for name, x in found.items():
        np.testing.assert_allclose(x, whole[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_steps(problem):
    """Bits kept, no moments, and nothing but the trained params decays, is scaled or counts in the norm that is
    clipped.
    """
    change = freeze(FROZEN)
    optimizer = optimizer_of(
        problem, change, name="adamw", learning_rate=0.1, weight_decay=0.5, clip=0.1, multipliers=((".*", 0.5),)
    )
    state = init_state(problem.params, optimizer, jax.random.key(0))
    moments = [name for name in tree.names(state.opt_state) if "/mu/" in name or "/nu/" in name]
    trained = {name for name in tree.names(problem.params) if not is_frozen(name)}
    assert {name.split("mu/")[-1].split("nu/")[-1] for name in moments} == trained and len(moments) == 2 * len(trained)
    trained_size = sum(
        x.size for name, x in zip(tree.names(problem.params), jax.tree.leaves(problem.params)) if name in trained
    )
    assert tree.size(state.opt_state) - 2 * trained_size < 10, "counters apart"

    step = jax.jit(make_step(problem.loss, change.grad(problem.grad), optimizer), compiler_options=FAST)
    state, metrics = step(state, problem.batch)
    state, _ = step(state, problem.batch)
    whole = problem.whole[1]
    weight = float(problem.whole[0].weight)
    norm = (
        np.sqrt(
            sum(
                (np.asarray(x, np.float64) ** 2).sum()
                for name, x in zip(tree.names(whole), jax.tree.leaves(whole))
                if name in trained
            )
        )
        / weight
    )
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, new, old in zip(
        tree.names(problem.params), jax.tree.leaves(state.params), jax.tree.leaves(problem.params)
    ):
        assert (np.asarray(new) == old).all() == is_frozen(name), name


def test_it_costs_no_gradient(problem):
    """With the last norm alone trained, the backward pass stops at the head: the work is little more than that of a
    forward pass.
    """

    def work(function):
        return jax.jit(function).lower(problem.params, problem.batch).compile(FAST).cost_analysis()["flops"]

    forward = work(lambda params, batch: problem.loss(params, batch, None, {}).total)
    everything = work(lambda params, batch: problem.grad(params, batch, None, {}))
    others = [name for name in tree.names(problem.params) if name != "decoder/norm/scale"]
    last = work(lambda params, batch: freeze(others).grad(problem.grad)(params, batch, None, {}))
    assert everything > 2.5 * forward
    assert last < 1.6 * forward


def test_freezing_twice_is_freezing_both(problem):
    both, apart = freeze(["embed/.*", "head/.*"]), chain(freeze(["embed/.*"]), freeze(["head/.*"]))

    def grads(change):
        return jax.eval_shape(lambda: change.grad(problem.grad)(problem.params, problem.batch, None, {}))[1]

    assert jax.tree.structure(grads(both)) == jax.tree.structure(grads(apart))
    states = [optimizer_of(problem, change, name="adam").init(problem.params) for change in (both, apart)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    found = [problem.run(change.grad(problem.grad))[1]["decoder"]["norm"]["scale"] for change in (both, apart)]
    np.testing.assert_array_equal(found[0], found[1])


def test_nothing_frozen_is_the_identity():
    assert freeze([]) is IDENTITY and freeze(()) is IDENTITY


@pytest.mark.parametrize(
    "regexes, message",
    [
        (["embed/token"], "optimizer.freeze 'embed/token' matches no parameter; did you mean 'embed/tokens'?"),
        (["embed/.*", "decodr/.*"], "optimizer.freeze 'decodr/.*' matches no parameter"),
        ([".*"], "optimizer.freeze leaves no parameter to train"),
        (["embed/.*", "decoder/.*", "head/.*"], "optimizer.freeze leaves no parameter to train"),
    ],
)
def test_what_is_refused(problem, regexes, message):
    for function in (
        lambda: freeze(regexes).grad(problem.grad)(problem.params, problem.batch, None, {}),
        lambda: optimizer_of(problem, freeze(regexes), name="sgd").init(problem.params),
    ):
        with pytest.raises(ConfigError) as error:
            function()
        assert str(error.value).startswith(message)
