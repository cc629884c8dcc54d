"""Pruning: exactly the asked weights go, by scores written again in NumPy; what is zero stays zero; what a card states."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim, sharding, transforms, tree
from llm_jax.config import Optimizer, Schedule
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.losses import Loss
from llm_jax.models import transformer
from llm_jax.platform import compiler_options
from llm_jax.step import init_state, make_step
from llm_jax.transforms.base import IDENTITY, Calibration, Transform, chain
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.moving_average import moving_average
from llm_jax.transforms.prune import (
    TARGETS,
    check_sparsity,
    densify,
    keep_zeros,
    prune,
    pruned_card,
    sparsities,
)
from llm_jax.transforms.scores import GRADUAL, Rule, matrix, parse_pattern, select, smallest, sparsegpt
from tests.families import FAMILIES, batch_of, tiny_model
from tests.transforms import laws
from tests.transforms.laws import FAST

QUERY, OUT, UP, DOWN = (f"decoder/layers/{name}" for name in ("attention/query", "attention/out", "mlp/up", "mlp/down"))


def named(params):
    return dict(zip(tree.names(params), map(np.asarray, jax.tree.leaves(params))))


def matrices(params):
    """The targets as (L, I, O): by hand, from the axes of each kind of weight."""
    found = {}
    for name, x in named(params).items():
        kind = name.split("/")[-1]
        if "/layers/" not in name or kind not in ("query", "key", "value", "out", "up", "gate", "down"):
            continue
        outputs = x.shape[-1] if kind in ("out", "down") else math.prod(x.shape[2:])
        found[name] = x.reshape(x.shape[0], -1, outputs)
    return found


def least(worth, count):
    """True at the `count` smallest, by a stable sort."""
    removed = np.zeros(worth.size, bool)
    removed[np.argsort(worth, axis=None, kind="stable")[:count]] = True
    return removed.reshape(worth.shape)


def least_of_each(worth, count, axis):
    return np.apply_along_axis(least, axis, worth, count)


def changed(change, problem, aux=None):
    make = jax.jit(change.params, static_argnums=0, compiler_options=FAST)
    return jax.device_get(make(problem.config, problem.params, jax.random.key(0), aux))


def zero_where(made, problem, removed):
    """The removed weights are zero, and all others what they were."""
    for name, before in matrices(problem.params).items():
        np.testing.assert_array_equal(matrices(made)[name], np.where(removed.get(name, False), 0, before), err_msg=name)
    for name, x in named(made).items():
        if name not in matrices(problem.params):
            np.testing.assert_array_equal(x, named(problem.params)[name], err_msg=name)


# What is chosen


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (1, 2), (0, 1, 2)])
def test_the_smallest_are_those_of_a_stable_sort(axes):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, (3, 8, 5)) / 2 for _ in range(2)]
    arrays[0][0, :2] = -np.inf
    arrays[1][1, 3:] = np.inf
    others = [i for i in range(3) if i not in axes]
    joined = [np.moveaxis(x, others, range(len(others))).reshape(*(x.shape[i] for i in others), -1) for x in arrays]
    whole = np.concatenate(joined, axis=-1)
    find = jax.jit(lambda arrays, count: smallest(arrays, count, axes))
    for count in (0, 1, whole.shape[-1] // 2, whole.shape[-1] - 1, whole.shape[-1]):
        made = find([jnp.asarray(x, jnp.float32) for x in arrays], count)
        found = np.concatenate(
            [np.moveaxis(np.asarray(x), others, range(len(others))).reshape(j.shape) for x, j in zip(made, joined)], -1
        )
        expected = least_of_each(whole.reshape(-1, whole.shape[-1]), count, 1).reshape(whole.shape)
        np.testing.assert_array_equal(found, expected, err_msg=f"{count}")


@pytest.mark.parametrize("shape", [(1, 2**16, 2), (2, 2**16 - 1, 3), (4, 8, 8), (1, 1, 2**16)])
@pytest.mark.parametrize("axes", [(1, 2), None])
def test_of_equal_ones_the_first_however_many(shape, axes):
    find = jax.jit(lambda x, count: smallest([x], count, axes)[0], compiler_options=FAST)
    size = math.prod(shape) if axes is None else math.prod(shape[1:])
    for count in (0, 1, size // 2, size - 1, size):
        found = np.asarray(find(jnp.zeros(shape), count)).reshape(-1, size)
        assert (found == (np.arange(size) < count)).all(), count


def test_a_product_is_a_product_of_matrices(problem):
    for name, x in matrices(problem.params).items():
        np.testing.assert_array_equal(matrix(name, named(problem.params)[name]), x)
    assert matrices(problem.params).keys() == {
        name for name, chosen in named(tree.mask(problem.params, TARGETS)).items() if chosen
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.333, 0.9])
def test_each_matrix_of_each_layer(problem, sparsity):
    removed = {
        name: np.stack([least(np.abs(w), round(sparsity * w.size)) for w in x])
        for name, x in matrices(problem.params).items()
    }
    zero_where(changed(prune(sparsity), problem), problem, removed)


def test_all_matrices_together(problem):
    found = matrices(problem.params)
    flat = np.concatenate([x.ravel() for x in found.values()])
    gone = np.split(least(np.abs(flat), round(0.6 * flat.size)), np.cumsum([x.size for x in found.values()])[:-1])
    removed = {name: part.reshape(x.shape) for part, (name, x) in zip(gone, found.items())}
    zero_where(changed(prune(0.6, scope="global"), problem), problem, removed)
    assert len({round(part.mean(), 3) for part in gone}) > 1, "some matrices lose more than others"


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (5, 8)])
def test_n_of_every_m_inputs(problem, keep, of):
    removed = {}
    for name, x in matrices(problem.params).items():
        worth = np.abs(x).reshape(x.shape[0], -1, of, x.shape[2])
        removed[name] = least_of_each(worth, of - keep, 2).reshape(x.shape)
    zero_where(changed(prune(1 - keep / of, pattern=f"{keep}:{of}"), problem), problem, removed)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_blocks(problem, scope):
    rows, columns = 4, 2
    pooled = {
        name: np.abs(x).reshape(x.shape[0], x.shape[1] // rows, rows, x.shape[2] // columns, columns).sum((2, 4))
        for name, x in matrices(problem.params).items()
    }
    if scope == "layer":
        gone = {name: np.stack([least(w, round(0.4 * w.size)) for w in x]) for name, x in pooled.items()}
    else:
        flat = np.concatenate([x.ravel() for x in pooled.values()])
        cuts = np.cumsum([x.size for x in pooled.values()])[:-1]
        gone = {
            name: part.reshape(pooled[name].shape)
            for name, part in zip(pooled, np.split(least(flat, round(0.4 * flat.size)), cuts))
        }
    removed = {name: x.repeat(rows, 1).repeat(columns, 2) for name, x in gone.items()}
    zero_where(changed(prune(0.4, pattern="block:4x2", scope=scope), problem), problem, removed)


def test_of_equal_weights_exactly_so_many_go(problem):
    equal = problem._replace(params=jax.tree.map(np.ones_like, problem.params))
    for change in (prune(0.3), prune(0.3, scope="global"), prune(0.5, pattern="2:4"), prune(0.3, pattern="block:2x2")):
        made = matrices(changed(change, equal))
        total = sum(x.size for x in made.values())
        zeros = sum(int((x == 0).sum()) for x in made.values())
        assert abs(zeros - (0.5 if "2:4" in change.label else 0.3) * total) <= 2 * len(made) * 4, change.label


@pytest.mark.parametrize("pattern", ["unstructured", "block:1x1", "1:2"])
def test_what_is_pruned_counts_before_what_is_fresh(pattern):
    """Of the weights -0, 0, 1 and 2 one goes, or one of each two: that which is pruned already."""
    weights = {"": jnp.array([-0.0, 0.0, 1.0, 2.0]).reshape(1, 4, 1)}
    rule = Rule(0.5 if pattern == "1:2" else 0.25, "magnitude", "layer", parse_pattern(pattern), ())
    kept = select(rule, {"": jnp.abs(weights[""])}, weights)[""]
    assert kept.reshape(-1).tolist() == [True, False, pattern != "1:2", True]


def test_random_ones_go(problem):
    found = {name: x == 0 for name, x in matrices(changed(prune(0.5, score="random"), problem)).items()}
    for name, x in found.items():
        assert x.sum(axis=(1, 2)).tolist() == [round(0.5 * x[0].size)] * len(x), name
    assert (found[UP] != found["decoder/layers/mlp/gate"]).any()
    # nothing to do with magnitude: the mean of what is left is that of the whole
    flat = np.concatenate([np.abs(x).ravel() for x in matrices(problem.params).values()])
    gone = np.concatenate([x.ravel() for x in found.values()])
    assert flat[gone].mean() == pytest.approx(flat.mean(), rel=0.1)


def test_rounds_add_up(problem):
    """What an earlier round removed counts in the later one, whatever the score."""
    for change in (chain(prune(0.3), prune(0.6, score="random")), chain(prune(0.3, score="random"), prune(0.6))):
        made, first = matrices(changed(change, problem)), matrices(changed(prune(0.3), problem))
        for name, x in made.items():
            assert (x == 0).sum(axis=(1, 2)).tolist() == [round(0.6 * x[0].size)] * len(x), name
            if change.label.startswith("prune(0.3),"):
                assert (x[first[name] == 0] == 0).all()


def test_targets(problem):
    made = changed(prune(0.5, targets=[".*/mlp/up"]), problem)
    assert pruned_card(made) == {"pruned": {UP: 0.5}}


# Scores that look at data


def calibration(problem, padded=False):
    """Two batches of four rows."""
    batches = {name: x.reshape(2, 4, *x.shape[1:]) for name, x in problem.batch.items()}
    if padded:
        ends = np.array([12, 7, 1, 9, 12, 3, 5, 10]).reshape(2, 4, 1)
        batches["segment_ids"] = (np.arange(12) < ends).astype(np.int32)
    return Calibration(batches, lambda config: problem.loss)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def read(config, params, batch):
    return transformer.apply(config, params, batch, logits=False, inputs=True).inputs


def inputs(problem, params, aux):
    """Of each product, the tokens that its weight is multiplied with: (L, T, I), padding left out."""
    found = {}
    for i in range(2):
        batch = {name: x[i] for name, x in aux.batches.items()}
        for name, x in named(read(problem.config, params, batch)).items():
            kept = batch.get("segment_ids", np.ones((4, 12))) != 0
            found.setdefault(name, []).append(x.reshape(*x.shape[:3], -1)[:, kept])
    return {name: np.concatenate(x, axis=1).astype(np.float64) for name, x in found.items()}


def test_taylor_is_gradient_times_weight(problem):
    aux = calibration(problem)

    def objective(params):
        return problem.loss(params, problem.batch, None, {}).total

    gradient = matrices(jax.jit(jax.grad(objective), compiler_options=FAST)(problem.params))
    removed = {
        name: np.stack([least(np.abs(g * w), round(0.4 * w.size)) for g, w in zip(gradient[name], x)])
        for name, x in matrices(problem.params).items()
    }
    zero_where(changed(prune(0.4, score="taylor", batches=2), problem, aux), problem, removed)


def test_fisher_is_the_mean_of_squared_gradients_times_squared_weights(problem):
    aux = calibration(problem)

    def objective(params, batch):
        found = problem.loss(params, batch, None, {})
        return found.total / found.weight

    gradient = jax.jit(jax.grad(objective), compiler_options=FAST)
    each = [matrices(gradient(problem.params, {name: x[i] for name, x in aux.batches.items()})) for i in range(2)]
    removed = {
        name: np.stack(
            [least((a**2 + b**2) * w**2, round(0.4 * w.size)) for a, b, w in zip(*(e[name] for e in each), x)]
        )
        for name, x in matrices(problem.params).items()
    }
    change = prune(0.4, score="fisher", batches=2)
    assert change.calibration == 2 and not prune(0.4, score="fisher", schedule=(0, 4, 2)).calibration
    zero_where(changed(change, problem, aux), problem, removed)


def wanda_removes(x, w, pattern):
    worth = np.abs(w) * np.sqrt((x**2).sum(0))[:, None]
    if pattern == "2:4":
        return least_of_each(worth.reshape(-1, 4, w.shape[1]), 2, 1).reshape(w.shape)
    return least_of_each(worth, round(0.5 * len(w)), 0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_at_all_layers_of_the_dense_model(problem, pattern):
    aux = calibration(problem, padded=True)
    seen = inputs(problem, problem.params, aux)
    removed = {
        name: np.stack([wanda_removes(seen[name][i], w, pattern) for i, w in enumerate(x)])
        for name, x in matrices(problem.params).items()
    }
    zero_where(changed(prune(score="wanda", pattern=pattern, sequential=False), problem, aux), problem, removed)


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_layer_after_layer(problem, score):
    """The second layer is judged by what the pruned first one hands on; the first as in the dense model."""
    aux = calibration(problem, padded=True)
    made = changed(prune(score=score), problem, aux)
    half = jax.tree.map(np.copy, problem.params)
    for name, x in named(made).items():
        if name in matrices(problem.params):
            named(half)[name][0] = x[0]
    for layer, params in ((0, problem.params), (1, half)):
        seen = inputs(problem, params, aux)
        for name, w in matrices(problem.params).items():
            found, x = matrices(made)[name][layer], seen[name][layer]
            if score == "wanda":
                expected = np.where(wanda_removes(x, w[layer], "unstructured"), 0, w[layer])
                np.testing.assert_array_equal(found, expected, err_msg=name)
            else:
                expected = reference_sparsegpt(w[layer], x.T @ x, 0.5)
                np.testing.assert_allclose(found, expected, atol=2e-4, err_msg=name)
    at_once = changed(prune(score=score, sequential=False), problem, aux)
    same = [(x[0] == y[0]).mean() for x, y in zip(matrices(at_once).values(), matrices(made).values())]
    assert min(same) > 0.4 and any(
        (x[1] != y[1]).any() for x, y in zip(matrices(at_once).values(), matrices(made).values())
    )


def test_encoder_decoder_padding_is_that_of_the_stream_that_is_read():
    """Wanda of a model whose cross-attention reads another stream; changing padding tokens changes nothing."""
    tiny = tiny_model("marian")
    one = batch_of(tiny.config)
    other = {**one, "encoder_tokens": np.where(one["encoder_segment_ids"] == 0, 5, one["encoder_tokens"])}
    other["tokens"] = np.where(one["segment_ids"] == 0, 5, one["tokens"])
    assert any((other[name] != one[name]).any() for name in one)
    change = prune(score="wanda", sequential=False)
    make = jax.jit(change.params, static_argnums=0, compiler_options=FAST)
    found = [
        jax.device_get(make(tiny.config, tiny.params, jax.random.key(0), aux_of(tiny.config, batch)))
        for batch in (one, other)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


# SparseGPT


def reference_sparsegpt(w, hessian, sparsity, groups=None, damping=0.01, block=128):
    """Optimal brain surgery of one weight after the other, with H^-1 of what remains by elimination: no Cholesky factor, no lazy blocks."""
    w = np.array(w, np.float64)
    count, outputs = w.shape
    gone = (w == 0) & ~np.signbit(w)
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(count))
    pivots, rows = [], []
    for j in range(count):
        pivots.append(inverse[j, j])
        rows.append(inverse[j].copy())
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    kept = np.ones(w.shape, bool)
    width = groups[1] if groups else block
    for j in range(count):
        if j % width == 0:
            end = min(j + width, count)
            cost = np.where(gone[j:end], -1, w[j:end] ** 2 / np.array(pivots[j:end])[:, None])
            if groups:
                kept[j:end] = ~least_of_each(cost, groups[1] - groups[0], 0)
            else:
                kept[j:end] = ~least(cost, max(round(sparsity * outputs * end) - (~kept).sum(), 0))
            kept[j:end] &= ~gone[j:end]
        error = np.where(kept[j], 0, w[j] / pivots[j])
        w[j:] -= np.outer(rows[j][j:], error)
    return np.where(kept, w, 0)


def layer_of(inputs=37, outputs=11, tokens=200):
    """A matrix, and inputs that share four directions, as the channels of a model do."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, inputs)) + 2 * rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, inputs))
    return x, rng.standard_normal((inputs, outputs)).astype(np.float32)


def surgery(w, hessian, sparsity, **options):
    made = jax.jit(functools.partial(sparsegpt, sparsity=sparsity, **options), compiler_options=FAST)
    return np.asarray(made(jnp.asarray(w), jnp.asarray(hessian, jnp.float32)))


@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_against_the_plain_loop(block):
    x, w = layer_of()
    found = surgery(w, x.T @ x, 0.6, block=block)
    assert (found == 0).sum() == round(0.6 * w.size)
    np.testing.assert_allclose(found, reference_sparsegpt(w, x.T @ x, 0.6, block=block), atol=1e-4)


@pytest.mark.parametrize("groups, block", [((2, 4), 8), ((2, 4), 10), ((1, 4), 128), ((3, 9), 4)])
def test_sparsegpt_in_groups(groups, block):
    x, w = layer_of(inputs=36)
    found = surgery(w, x.T @ x, 1 - groups[0] / groups[1], groups=groups, block=block)
    assert ((found == 0).reshape(-1, groups[1], 11).sum(1) == groups[1] - groups[0]).all()
    np.testing.assert_allclose(found, reference_sparsegpt(w, x.T @ x, 0, groups=groups), atol=1e-4)


@pytest.mark.parametrize("options", [dict(block=8), dict(block=16), dict(groups=(2, 4), block=8)], ids=str)
@pytest.mark.parametrize("already", [0.3, 0.7])
def test_sparsegpt_leaves_what_is_removed_at_zero(options, already):
    """It goes first, wherever a block or a group has more of it than its share."""
    x, w = layer_of(inputs=36)
    gone = np.random.default_rng(2).random(w.shape) < already
    w, wanted = np.where(gone, 0, w), round(0.5 * w.size)
    w[-4:] = np.where(gone[-4:], 0, -0.0)  # a zero, and no mask
    found = surgery(w, x.T @ x, 0.5, **options)
    removed = (found == 0) & ~np.signbit(found)
    assert removed[gone].all()
    if "groups" in options:
        assert (removed.reshape(-1, 4, 11).sum(1) >= 2).all()
    else:
        assert removed.sum() == max(wanted, gone.sum())
    np.testing.assert_allclose(found, reference_sparsegpt(w, x.T @ x, 0.5, **options), atol=1e-4)


def test_sparsegpt_marks_no_zero_that_stays():
    x, w = layer_of(inputs=36)
    assert np.signbit(surgery(np.full_like(w, -0.0), x.T @ x, 0.5)).sum() == w.size - round(0.5 * w.size)


def test_sparsegpt_keeps_the_product():
    """||X W - X W'|| is far below those of wanda and magnitude; the scale of the data changes nothing."""
    x, w = layer_of(tokens=2000)
    by_wanda = np.where(wanda_removes(x, w, "unstructured"), 0, w)
    by_magnitude = np.where(least(np.abs(w), round(0.5 * w.size)), 0, w)
    found = surgery(w, x.T @ x, 0.5)
    errors = [np.linalg.norm(x @ w - x @ made) for made in (found, by_wanda, by_magnitude)]
    assert errors[0] < 0.6 * errors[1] and errors[0] < 0.6 * errors[2]
    np.testing.assert_allclose(surgery(w, 1e6 * x.T @ x, 0.5), found, atol=1e-4)


def test_sparsegpt_of_inputs_that_are_never_active():
    x, w = layer_of()
    x[:, 5:9] = 0
    found = surgery(w, x.T @ x, 0.5)
    assert np.isfinite(found).all() and (found[5:9] == 0).all(), "what multiplies nothing goes first"
    assert np.isfinite(surgery(w, 0 * x.T @ x, 0.5)).all()


# The update


def optimizer_of(problem, change, **chosen):
    shapes, axes = transformer.shapes(problem.config), transformer.axes(problem.config)
    settings = {"name": "adamw", "learning_rate": 0.05, "weight_decay": 0.3, **chosen}
    schedule = optim.make_schedule(Schedule(name="constant"), 100)
    return change.update(optim.make_optimizer(Optimizer(**settings), schedule, shapes, axes))


def train(problem, change, steps, params=None, **chosen):
    """The states after each step."""
    params = changed(change, problem, calibration(problem)) if params is None else params
    optimizer = optimizer_of(problem, change, **chosen)
    step = jax.jit(make_step(problem.loss, change.grad(problem.grad), optimizer), compiler_options=FAST)
    states = [init_state(params, optimizer, jax.random.key(0))]
    for _ in range(steps):
        states.append(step(states[-1], problem.batch)[0])
    return states


@pytest.mark.parametrize(
    "change, name",
    [
        (prune(0.7), "adamw"),
        (prune(0.5, pattern="2:4"), "muon"),
        (chain(prune(0.5), moving_average(0.5)), "schedule_free_adamw"),
    ],
    ids=["adamw", "muon", "schedule_free"],
)
def test_zeros_stay_zero(problem, change, name):
    first, *_, last = train(problem, change, 10, name=name)
    assert int(last.skipped) == 0
    for params in (last.params, optim.eval_params(last.opt_state, last.params)):
        for path, x in named(first.params).items():
            after = named(params)[path]
            assert (after != x).mean() > 0.25 if path in matrices(first.params) else True, path
            if path in matrices(first.params):
                np.testing.assert_array_equal(after == 0, x == 0, err_msg=path)
                assert not np.signbit(after[x == 0]).any()


@pytest.mark.parametrize(
    "change",
    [
        prune(0.5),
        *(prune(0.8, score=score, schedule=(0, 8, 2)) for score in GRADUAL),
        *(prune(0.8, score=score, schedule=(0, 8, 2), straight_through=True) for score in GRADUAL),
    ],
    ids=lambda change: change.label,
)
def test_the_update_writes_what_it_keeps_and_copies_no_weight(problem, change):
    """Copies of queries, keys and values cost 2% of a step: weights and moments are updated in place,
    each by one loop, without a pass over what they are made of."""
    optimizer = optax.with_extra_args_support(change.update(optax.adamw(1e-3)))

    def given(params, gradient, key, reference):
        return Loss(jnp.float32(0), jnp.float32(1), {}), gradient

    step = make_step(lambda params, *_: Loss(jnp.float32(0), jnp.float32(1), {}), given, optimizer)
    told = init_state(problem.params, optimizer, jax.random.key(0)), problem.params
    text = jax.jit(step, donate_argnums=0).lower(*told).compile(compiler_options()).as_text()
    assert "fusion(" in text, "the text of a program is read"
    shapes = {x.shape for x in named(problem.params).values() if x.ndim > 2}
    made = re.findall(r"= \w+\[([\d,]*)\]\S* (\w+)\(", text[text.index("ENTRY") :])
    made = [op for shape, op in made if tuple(map(int, filter(None, shape.split(",")))) in shapes]
    kept = [x for x in jax.tree.leaves((told[0].params, told[0].opt_state)) if x.shape in shapes and x.dtype != bool]
    assert {op: made.count(op) for op in made if op not in ("parameter", "bitcast")} == {"fusion": len(kept)}
    # and where nothing is due nothing is done
    branches = re.findall(r" conditional\(.*branch_computations=\{%([\w.\-]+),", text[text.index("ENTRY") :])
    assert len(branches) == bool(change.steps)
    for name in branches:
        body = re.search(rf"^%{re.escape(name)} .*?^\}}", text, re.M | re.S)[0]
        assert set(re.findall(r" ([\w-]+)\(", body.split("\n", 1)[1])) <= {"parameter", "get-tuple-element", "tuple"}, (
            body
        )


def test_other_zeros_are_weights_like_any_other(problem):
    params = jax.tree.map(np.copy, problem.params)
    named(params)["decoder/layers/mlp_norm/scale"][0, :3] = 0
    named(params)[UP][0, :3] = 0
    named(params)[DOWN][0, :3] = 0
    # SGD without momentum, so that what has no gradient does not move
    *_, last = train(problem, keep_zeros([UP]), 2, params, name="sgd", weight_decay=0.0)
    found = named(last.params)
    assert (found[UP][0, :3] == 0).all() and (found[UP][1] != named(params)[UP][1]).any()
    assert (found[DOWN][0, :3] != 0).any() and (found["decoder/layers/mlp_norm/scale"] != 0).any()


def test_what_is_left_moves_as_the_rule_says(problem):
    """An update is that of the same weights in a run that holds none, where they are not held."""
    change = prune(0.5)
    first, after = train(problem, change, 1)
    *_, free = train(problem, change._replace(update=IDENTITY.update), 1)
    for name, x in named(first.params).items():
        held, other = named(after.params)[name], named(free.params)[name]
        gone = (x == 0) & (name in matrices(first.params))
        np.testing.assert_array_equal(held, np.where(gone, 0, other), err_msg=name)
        assert (other != 0)[gone].any() == gone.any()


def test_beside_frozen_parameters(problem):
    """Parameters that are frozen outside or inside of the chain, targets among them, are left alone."""
    frozen = freeze(["embed/.*", ".*/mlp/.*"])
    for change in (chain(prune(0.5), frozen), chain(frozen, prune(0.5)), chain(prune(0.5, schedule=(0, 2, 1)), frozen)):
        first, *_, last = train(problem, change, 2)
        for name, x in named(first.params).items():
            after = named(last.params)[name]
            if name.startswith("embed") or "/mlp/" in name:
                np.testing.assert_array_equal(after, x)
            elif name in matrices(first.params):
                assert (after == 0).mean() == 0.5 and (after != x).any()


# On a mesh


@pytest.mark.parametrize(
    "change",
    [prune(0.5), prune(0.5, scope="global", schedule=(0, 2, 1), straight_through=True, score="movement")],
    ids=["at once", "schedule"],
)
def test_masks_lie_with_their_weights(problem, mesh, change):
    here = mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.params_shardings(here, transformer.axes(problem.config), transformer.shapes(problem.config))
    optimizer = optimizer_of(problem, change)

    def init(params, key):
        return init_state(change.params(problem.config, params, key, None), optimizer, key)

    with jax.set_mesh(here):
        params, key = jax.device_put(problem.params, placed), jax.random.key(0)
        where = sharding.state_shardings(here, jax.eval_shape(init, params, key), params, placed)
        state = jax.jit(init, out_shardings=where, compiler_options=FAST)(params, key)
        step = jax.jit(
            make_step(problem.loss, change.grad(problem.grad), optimizer),
            out_shardings=(where, None),
            compiler_options=FAST,
        )
        batch = sharding.put(problem.batch, here)
        for _ in range(3):
            state, _ = step(state, batch)
    own = dict(zip(tree.names(state.params), jax.tree.leaves(state.params)))
    beside = [state.opt_state.mask.kept, state.opt_state.sums] if change.steps else []
    for part in beside:
        assert len(tree.names(part)) == len(matrices(state.params))
        for name, x in zip(tree.names(part), jax.tree.leaves(part)):
            assert x.sharding.is_equivalent_to(own[name].sharding, x.ndim) and not x.is_fully_replicated, name
    alone = train(problem, change, 3)[-1]
    found, expected = (matrices(optim.eval_params(each.opt_state, each.params)) for each in (state, alone))
    for name, x in found.items():
        np.testing.assert_array_equal(x == 0, expected[name] == 0, err_msg=name)
        np.testing.assert_allclose(x, expected[name], atol=1e-3, err_msg=name)


# The laws


def aux_of(config, batch=None):
    """Calibration of any family, two batches, with an objective that every model has."""
    batch = batch_of(config) if batch is None else batch

    def loss(sizes):
        def total(params, batch, key, reference):
            found = transformer.apply(sizes, params, batch)
            x = found.hidden if found.logits is None else found.logits
            return Loss(jnp.mean(jnp.square(x)), jnp.float32(1), {}, found)

        return total

    return Calibration({name: np.stack([x, x[::-1]]) for name, x in batch.items()}, loss)


FEW = (".*/layers/attention/out", ".*/layers/mlp/up")
"""enough to see that paths and axes are understood, and few, so that this compiles fast"""
PLAIN = prune(0.5, pattern="2:4", score="random", targets=FEW)
DATA = chain(
    prune(0.2, score="taylor", targets=FEW[:1]),
    prune(0.4, score="wanda", sequential=False, targets=FEW[:1]),
    prune(0.5, score="sparsegpt", targets=FEW),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_and_2(family):
    """By way of the score that asks most of a family: its inputs, layer after layer."""
    tiny = tiny_model(family)
    laws.same_tree(prune(0.5, score="sparsegpt", targets=FEW), tiny, aux_of(tiny.config))
    laws.identity(prune(0.0, score="taylor"), tiny)
    assert prune(0) is IDENTITY and prune(0, pattern="2:4") is IDENTITY


@pytest.mark.parametrize("family", FAMILIES)
def test_law_5_and_6(family, tmp_path):
    tiny = tiny_model(family)
    laws.same_on_mesh(PLAIN, tiny)
    again = laws.comes_back(PLAIN, tiny, tmp_path)
    card = pruned_card(again.params)
    assert set(card["pruned"].values()) == {0.5}
    assert card["pruned"].keys() == {name for name, chosen in named(tree.mask(tiny.params, FEW)).items() if chosen}
    check_sparsity(again.params, {**again.card, **card})


def test_law_5_with_data():
    tiny = tiny_model("llama")
    laws.same_on_mesh(DATA, tiny, aux_of(tiny.config), atol=2e-4)


def test_law_4(problem):
    a, b, c = prune(0.3), prune(0.4, score="random"), prune(0.5, pattern="2:4")
    found = [changed(chain(chain(a, b), c), problem), changed(chain(a, chain(b, c)), problem)]
    jax.tree.map(np.testing.assert_array_equal, *found)


# Cards, labels, and what is refused


def test_what_a_card_states(problem):
    made = changed(prune(0.5, targets=[UP, OUT]), problem)
    assert sparsities(made, [".*/mlp/(up|down)"]) == {UP: 0.5, DOWN: 0.0}
    card = pruned_card(made)
    assert card == {"pruned": {UP: 0.5, OUT: 0.5}} and pruned_card(made, [DOWN]) == {"pruned": {}}
    check_sparsity(made, card)
    check_sparsity(made, {})
    made = jax.tree.map(np.array, made)
    made["decoder"]["layers"]["mlp"]["up"][tuple(np.argwhere(made["decoder"]["layers"]["mlp"]["up"] == 0)[0])] = 1
    with pytest.raises(CheckpointError, match=rf"the card states that 50.0000% of {UP} are zero; 49.8698% are"):
        check_sparsity(made, card)
    with pytest.raises(CheckpointError, match="states that nothing/here is pruned, and the model has no such weight"):
        check_sparsity(made, {"pruned": {"nothing/here": 0.5}})


@pytest.mark.parametrize(
    "change",
    [
        prune(),
        prune(0.9, score="movement", schedule=(0, 10, 5), straight_through=True),
        prune(0.9, score="fisher", schedule=(0, 10, 5)),
        prune(0.75, pattern="1:4", score="sparsegpt", batches=2, sequential=False, targets=[UP]),
        keep_zeros([UP]),
        densify(),
    ],
    ids=lambda change: change.label,
)
def test_the_label_makes_it_again(change):
    assert isinstance(change, Transform) and eval(change.label).label == change.label
    assert change.calibration == (2 if "sparsegpt" in change.label else 0)


def test_one_regex_is_a_string():
    assert prune(0.5, targets=UP).label == prune(0.5, targets=[UP]).label and keep_zeros(UP).masks == (UP,)


def test_more_weights_than_can_be_told_apart(problem):
    wide = problem.config.replace(layers=2**10, dim=2**10, mlp_dim=2**12)
    change = prune(0.5, scope="global", targets=UP)
    with pytest.raises(
        ConfigError, match=r"fewer than 2\^32 weights, and the targets have 4294967296: take scope='layer'"
    ):
        jax.eval_shape(lambda p: change.params(wide, p, jax.random.key(0), None), transformer.shapes(wide))


def test_nothing_to_keep_is_the_identity():
    assert keep_zeros([]) is IDENTITY and densify().update is IDENTITY.update
    assert transforms.chain(densify()).label == "densify()"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.0), "prune: sparsity is 1.0: it must lie in [0, 1)"),
        (dict(sparsity=float("nan")), "prune: sparsity is nan: it must lie in [0, 1)"),
        (dict(score="magnitud"), "unknown score 'magnitud'; did you mean 'magnitude'?"),
        (dict(scope="row"), "unknown scope 'row'"),
        (dict(pattern="4:2"), "prune: pattern is '4:2': it must be 'unstructured', 'N:M'"),
        (dict(pattern="block:0x2"), "prune: pattern is 'block:0x2'"),
        (dict(pattern="1:4"), "prune: pattern '1:4' has sparsity 0.75, not 0.5"),
        (dict(pattern="2:4", scope="global"), "prune: pattern '2:4' compares within a layer: scope must be 'layer'"),
        (dict(score="wanda", scope="global"), "prune: score 'wanda' compares within a layer: scope must be 'layer'"),
        (
            dict(score="sparsegpt", pattern="block:2x2"),
            "prune: score 'sparsegpt' compares within each output, not blocks",
        ),
        (dict(score="movement"), "prune: score 'movement' needs a schedule=(begin, end, every)"),
        (dict(straight_through=True), "prune: straight_through needs a schedule=(begin, end, every)"),
        (dict(schedule=(0, 10, 3)), "prune: schedule is (0, 10, 3): (begin, end, every) must have 0 <= begin < end"),
        (dict(schedule=(5, 5, 1)), "prune: schedule is (5, 5, 1)"),
        (dict(schedule=(5, 10)), "prune: schedule is (5, 10)"),
        (dict(schedule=100), "prune: schedule is 100: (begin, end, every) must have 0 <= begin < end"),
        (
            dict(schedule=(0, 4, 1), score="wanda"),
            "prune: score 'wanda' does not go with a schedule: take magnitude, fisher, movement",
        ),
        (dict(batches=0), "prune: batches is 0: it must be at least 1"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        prune(**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            prune(targets=["decoder/layers/mlp/upp"]),
            "prune: target 'decoder/layers/mlp/upp' matches no parameter; did you",
        ),
        (prune(targets=["embed/tokens"]), "prune: embed/tokens is not the matrix of a product in the layers"),
        (prune(3 / 5, pattern="2:5"), "prune: decoder/layers/attention/key has 16 inputs and 8 outputs, which do not"),
        (
            prune(pattern="block:4x3"),
            "prune: decoder/layers/attention/key has 16 inputs and 8 outputs, which do not divide",
        ),
        (prune(score="wanda"), "prune: score 'wanda' looks at rows of data: it needs aux=Calibration(batches, loss)"),
        (keep_zeros(["decoder/layers/mlp/upp"]), "keep_zeros 'decoder/layers/mlp/upp' matches no parameter"),
    ],
    ids=lambda x: x.label if isinstance(x, Transform) else x,
)
def test_what_is_refused_of_a_model(problem, change, message):
    with pytest.raises(ConfigError) as error:
        change.params(problem.config, problem.params, jax.random.key(0), None)
    assert str(error.value).startswith(message)
