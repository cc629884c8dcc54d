"""Rows that a model continues itself: each token as the uncached forward pass would have it drawn, and what a loss makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import loop, model, sharding, step
from llm_jax.errors import ConfigError
from llm_jax.generation import Sampling, choose_token
from llm_jax.losses import Loss
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken
from llm_jax.transforms import IDENTITY, anchor, chain, distil, on_policy
from llm_jax.transforms.on_policy import sampled
from tests.families import random_params
from tests.test_parts import losses, run_of

SIZES = presets.llama(vocab_size=23, max_length=12, layers=2, dim=16, heads=4, kv_heads=2, mlp_dim=24)
PARAMS = jax.tree.map(jnp.asarray, random_params(SIZES))
KEY = jax.random.key(3)
P, S = 5, 12
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def batch():
    """Eight rows: of one text, of two with the prompt ending in the second, of one shorter than the prompt, and empty."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES.vocab_size, (8, S)).astype(np.int32)
    segments = np.ones((8, S), np.int32)
    segments[2:5, 3:] = 2
    segments[6, 4:], segments[7] = 0, 0
    positions = np.tile(np.arange(S, dtype=np.int32), (8, 1))
    positions[2:5, 3:] -= 3
    weights = (segments > 0).astype(np.float32)
    targets = np.roll(tokens, -1, axis=1)
    return dict(tokens=tokens, targets=targets, weights=weights, segment_ids=segments, positions=positions)


@pytest.mark.parametrize("temperature, end", [(1.0, -1), (0.7, 4)])
def test_each_token_is_drawn_from_what_the_model_says(batch, temperature, end):
    made = jit(lambda params: sampled(SIZES, params, batch, KEY, P, temperature, end))(PARAMS)
    made = {name: np.asarray(x) for name, x in made.items()}
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {n: (x.shape, x.dtype) for n, x in batch.items()}
    tokens, segments = batch["tokens"].copy(), batch["segment_ids"].copy()
    segments[:, P:] = segments[:, P - 1 : P]
    positions = batch["positions"].copy()
    positions[:, P:] = positions[:, P - 1 : P] + 1 + np.arange(S - P)
    forward = jit(
        lambda tokens: (
            transformer.apply(SIZES, PARAMS, {"tokens": tokens, "segment_ids": segments, "positions": positions}).logits
        )
    )
    said = np.zeros((8, S - P + 1), np.int32)
    for i in range(S - P + 1):
        logits = forward(tokens)[:, P - 1 + i]
        said[:, i] = choose_token(
            logits, jnp.zeros((8, 1), bool), Sampling(temperature=temperature), KEY, jnp.asarray(i)
        )
        if P + i < S:
            tokens[:, P + i] = said[:, i]
    alive = np.ones_like(said, bool)
    for row, text in enumerate(said):
        if end in text:
            alive[row, list(text).index(end) + 1 :] = False
    alive[6:] = False
    assert alive[:6].all() == (end < 0)
    for row in range(6):
        count = alive[row].sum()
        np.testing.assert_array_equal(made["targets"][row, P - 1 :][:count], said[row, :count])
        np.testing.assert_array_equal(made["tokens"][row, P:][: count - 1], said[row, : count - 1])
        inside = np.arange(S - P) < count - (end in said[row])
        np.testing.assert_array_equal(made["segment_ids"][row, P:], np.where(inside, segments[row, P], 0))
    np.testing.assert_array_equal(made["weights"][:, P - 1 :], alive)
    assert not made["weights"][:, : P - 1].any()
    for name in ("tokens", "segment_ids", "positions"):
        np.testing.assert_array_equal(made[name][:, :P], batch[name][:, :P])
    np.testing.assert_array_equal(made["positions"], positions)


def grads(change, batch, reference=None, key=KEY, loss=None):
    loss = change.loss(loss or NextToken().loss(SIZES))
    return jit(lambda params: step.differentiate(loss)(params, batch, key, reference or {}))(PARAMS)


def test_the_loss_is_that_of_the_sampled_rows_held_still(batch):
    got, gradient = grads(on_policy(1.0, prompt=P), batch)
    _, draw, rest = jax.random.split(KEY, 3)
    rows = sampled(SIZES, PARAMS, batch, draw, P)
    expected, same = grads(IDENTITY, jax.tree.map(np.asarray, rows), key=rest)
    np.testing.assert_allclose(got.total, expected.total, rtol=1e-5)
    assert float(got.weight) == float(rows["weights"].sum()) == 6 * (S - P + 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, same)


def test_a_student_like_its_teacher_has_nothing_to_learn(batch):
    teacher = model.Model(SIZES, PARAMS)
    change = chain(distil(teacher, task=0.0, divergence="reverse_kl"), on_policy(1.0, prompt=P))
    got, gradient = grads(change, batch, {"teacher": PARAMS})
    np.testing.assert_allclose(got.metrics["soft"], 0, atol=1e-4)
    assert float(got.weight) == 6 * (S - P + 1) and all(np.abs(g).max() < 1e-3 for g in jax.tree.leaves(gradient))
    shifted = jax.tree.map(lambda x: x * 1.1, PARAMS)
    assert float(grads(change, batch, {"teacher": shifted})[0].metrics["soft"]) > 0.01


def test_as_often_as_it_says(batch):
    def total(params, batch, key, reference):
        return Loss(
            jnp.sum(jnp.abs(transformer.apply(SIZES, params, batch).logits)) * 0 + batch["weights"].sum(),
            jnp.ones(()),
            {},
        )

    loss = jit(on_policy(0.3, prompt=P).loss(total))
    found = np.array([float(loss(PARAMS, batch, jax.random.key(i), {}).total) for i in range(200)])
    own, data = 6 * (S - P + 1), batch["weights"].sum()
    assert set(found) == {own, data} and 0.2 < (found == own).mean() < 0.4
    assert on_policy(0.0, prompt=P) is IDENTITY
    marker = object()
    assert on_policy(0.5, prompt=P).loss(lambda *arguments: marker)({}, {}, None, {}) is marker


def test_on_a_mesh_it_is_the_same(batch, mesh):
    change = on_policy(1.0, prompt=P)
    expected, gradient = grads(change, batch)
    many = mesh(data=2, fsdp=2, tensor=2)
    places = sharding.params_shardings(many, transformer.axes(SIZES), transformer.shapes(SIZES))
    with jax.set_mesh(many):
        loss = change.loss(NextToken().loss(SIZES))
        got, same = jit(lambda params, batch: step.differentiate(loss)(params, batch, KEY, {}))(
            jax.device_put(PARAMS, places), sharding.put(batch, many)
        )
    np.testing.assert_allclose(got.total, expected.total, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), same, gradient)


def test_what_is_refused(batch):
    for message, arguments in (
        (r"share is 2: it must lie in \[0, 1\]", dict(share=2, prompt=1)),
        ("prompt is 0: it must be at least 1", dict(prompt=0)),
        ("temperature is 0: it must be above 0", dict(prompt=1, temperature=0)),
    ):
        with pytest.raises(ConfigError, match=message):
            on_policy(**arguments)
    with pytest.raises(ConfigError, match="prompt is 12, and a row has 12 tokens: nothing is left to sample"):
        grads(on_policy(1.0, prompt=S), batch)
    with pytest.raises(ConfigError, match="the rows hold teacher_ids, which does not go with text that is sampled"):
        grads(on_policy(1.0, prompt=P), {**batch, "teacher_ids": batch["tokens"]})
    encoder = presets.bert(vocab_size=23, max_length=12, layers=1, dim=16, heads=2, mlp_dim=8, head="mlm")
    with pytest.raises(ConfigError, match="an encoder does not continue a text: it needs a decoder"):
        jax.eval_shape(
            on_policy(1.0, prompt=P).loss(NextToken().loss(encoder)), transformer.shapes(encoder), batch, KEY, {}
        )


def test_a_run_of_it_goes_on_exactly(corpus, tmp_path):
    wide = ModelConfig(vocab_size=512, max_length=16, layers=2, dim=24, heads=2)
    model.save(model.Model(wide, transformer.init(wide, jax.random.key(1))), tmp_path / "teacher")
    change = (distil(str(tmp_path / "teacher"), task=0.0, divergence="reverse_kl"), on_policy(0.5, prompt=4))
    run = run_of(corpus, tmp_path / "run", transforms=change, steps=4)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, every=2))
    loop.train(run)
    whole = losses(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "gone")
    loop.train(run)
    assert losses(tmp_path / "run") == whole and len(whole) == 4


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["itself", "another"])
def test_a_term_reads_the_rows_that_are_sampled_in_whichever_order(batch, scale):
    """A student that is its own teacher has nothing to learn, of its own text either; terms of another teacher are the same."""
    teacher = model.Model(SIZES, jax.tree.map(lambda x: x * scale, PARAMS))
    changes = (on_policy(1.0, prompt=P), distil(teacher, task=0.0), anchor(teacher, "kl"))
    both = [chain(*order).loss(NextToken().loss(SIZES)) for order in (changes, changes[::-1])]
    reference = {"teacher": teacher.params, "anchor": teacher.params}
    found = jit(lambda p: [loss(p, batch, key, reference).metrics for loss, key in zip(both, (KEY, KEY))])(PARAMS)
    terms = [float(each[name]) for each in found for name in ("soft", "anchor")]
    if scale == 1:
        assert max(map(abs, terms)) < 1e-4
    else:
        assert terms == pytest.approx([terms[0]] * 4, rel=1e-5) and terms[0] > 1
