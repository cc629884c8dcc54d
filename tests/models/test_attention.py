"""Scaled dot-product attention against the formula in NumPy, and its forms for the platforms against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import attention
from llm_jax.models.attention import Mask, attend

SCALE = 0.37


def reference(q, k, v, allowed, scale, bias=None):
    """softmax(Q K^T scale + bias) V of each row and head ('Attention is all you need', eq. 1), and the softmax."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, length, heads, size = q.shape
    out, all_weights = np.zeros((rows, length, heads, size)), np.zeros((rows, heads, length, k.shape[1]))
    for b in range(rows):
        for h in range(heads):
            group = h // (heads // k.shape[2])
            scores = q[b, :, h] @ k[b, :, group].T * scale
            if bias is not None:
                scores = scores + bias[b, h]
            scores = np.where(allowed[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[b, :, h], all_weights[b, h] = weights @ v[b, :, group], weights
    return out, all_weights


def inputs(length, keys=None, heads=4, kv_heads=2, rows=2, size=6, seed=0):
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(rows, length, heads, size), draw(rows, keys, kv_heads, size), draw(rows, keys, kv_heads, size)


def run(q, k, v, mask, *calls):
    """`attend` with the options of each call, compiled as a whole: one operation after the other would take longer."""
    return jax.jit(lambda *qkv: [attend(*qkv, mask, scale=SCALE, **options) for options in calls])(q, k, v)


def packed(length, causal, rows=2):
    """The mask of rows with two examples and padding; the cut differs from row to row."""
    index = np.broadcast_to(np.arange(length), (rows, length))
    cuts = np.arange(rows)[:, None] + length // 3
    segments = np.where(index < cuts, 1, np.where(index < length - 2, 2, 0))
    positions = index - np.where(segments == 2, cuts, 0)
    return Mask(segments, segments, positions, positions, causal)


def test_mask_of_packed_rows():
    ids = lambda *x: np.array([x])  # noqa: E731
    segments, positions = ids(1, 1, 2, 2, 0), ids(0, 1, 0, 1, 0)
    full = Mask(segments, segments, positions, positions, causal=False).allowed()[0].astype(int)
    assert full.tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    causal = Mask(segments, segments, positions, positions, causal=True).allowed()[0].astype(int)
    assert causal.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_mask_of_a_cache_with_empty_slots():
    ids = lambda *x: np.array([x])  # noqa: E731
    mask = Mask(ids(1), ids(1, 1, 0, 1, 0, 0), ids(2), ids(0, 1, 0, 2, 0, 0), causal=True, aligned=False)
    assert mask.allowed()[0].astype(int).tolist() == [[1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_formula(causal, kv_heads):
    """The form of the CPU, the one that also gives the weights, and the one with a bias."""
    q, k, v = inputs(9, kv_heads=kv_heads)
    mask = packed(9, causal)
    bias = np.random.default_rng(1).standard_normal((2, 4, 9, 9)).astype(np.float32)
    expected, weights = reference(q, k, v, mask.allowed(), SCALE)
    (plain, none), (values, found), (biased, _) = run(q, k, v, mask, {}, dict(want_weights=True), dict(bias=bias))
    assert none is None
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(found, weights, atol=1e-6)
    np.testing.assert_allclose(biased, reference(q, k, v, mask.allowed(), SCALE, bias)[0], atol=1e-5)


def test_fewer_queries_than_keys():
    """As decoding does: two new tokens look at a cache of seven slots, some of them empty."""
    q, k, v = inputs(2, keys=7)
    mask = Mask(
        np.ones((2, 2), int),
        np.array([[1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0]]),
        np.array([[3, 4], [1, 2]]),
        np.array([[0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 0, 0]]),
        causal=True,
        offset=3,
        aligned=False,
    )
    ((found, _),) = run(q, k, v, mask, {})
    np.testing.assert_allclose(found, reference(q, k, v, mask.allowed(), SCALE)[0], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_other_platforms(causal, accelerator):
    """What runs on GPU and on TPU, in float32 and on this CPU."""
    q, k, v = inputs(9)
    mask = packed(9, causal)
    bias = np.random.default_rng(1).standard_normal((2, 4, 9, 9)).astype(np.float32)
    for platform in ("gpu", "tpu"):
        accelerator(platform)
        (plain, _), (biased, _) = run(q, k, v, mask, {}, dict(bias=bias))
        np.testing.assert_allclose(plain, reference(q, k, v, mask.allowed(), SCALE)[0], atol=1e-5)
        np.testing.assert_allclose(biased, reference(q, k, v, mask.allowed(), SCALE, bias)[0], atol=1e-5)


def test_grouped_heads_are_repeated_keys():
    q, k, v = inputs(9)
    mask = packed(9, True)
    grouped = run(q, k, v, mask, {}, dict(want_weights=True))
    repeated = run(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2), mask, {}, dict(want_weights=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grouped, repeated)


@pytest.mark.parametrize(
    "length, kv_heads, causal", [(5, 4, False), (8, 1, True), (19, 2, False), (19, 2, True), (24, 4, True)]
)
def test_blocks_equal_the_formula_written_out(length, kv_heads, causal, monkeypatch):
    """Values and gradients, for lengths below, at, above and at a multiple of the block."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    mask = packed(length, causal)
    qkv = inputs(length, kv_heads=kv_heads)
    d_out = np.random.default_rng(2).standard_normal(qkv[0].shape).astype(np.float32)

    @jax.jit
    def both(*qkv):
        blocked, blocked_vjp = jax.vjp(lambda *x: attention._blocked(*x, mask.query_segments, causal, SCALE), *qkv)
        plain, plain_vjp = jax.vjp(
            lambda *x: attention._einsum(*x, mask.allowed(), None, SCALE, 0.0, None, False)[0], *qkv
        )
        return (blocked, blocked_vjp(d_out)), (plain, plain_vjp(d_out))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both(*qkv))


def test_blocks_are_what_the_cpu_takes(monkeypatch):
    """And where they cannot give what was asked for, they are not taken."""
    taken = []
    monkeypatch.setattr(attention, "_blocked", lambda q, *_: taken.append("blocks") or q)
    monkeypatch.setattr(attention, "_einsum", lambda q, *_: taken.append("einsum") or (q, None))
    q, k, v = inputs(9)
    mask = packed(9, True)
    attend(q, k, v, mask, scale=SCALE)
    attend(q, k, v, mask, scale=SCALE, dropout_rate=0.5)
    assert taken == ["blocks"] * 2
    taken.clear()
    attend(q, k, v, mask._replace(aligned=False), scale=SCALE)
    for options in (
        dict(bias=np.zeros((2, 4, 9, 9))),
        dict(want_weights=True),
        dict(dropout_rate=0.5, key=jax.random.key(0)),
    ):
        attend(q, k, v, mask, scale=SCALE, **options)
    assert taken == ["einsum"] * 4


def test_half_precision_takes_the_fast_kernel_where_it_can():
    assert attention._gpu_form(jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.bfloat16)) == "cudnn"
    assert attention._gpu_form(jax.ShapeDtypeStruct((1, 1, 1, 12), jnp.bfloat16)) == "xla"
    assert attention._gpu_form(jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.float32)) == "xla"


def test_dropout_of_the_weights():
    """A weight is 0 or 1/(1 - rate) of what it was, as it was in expectation; the weights told are those before."""
    q, k, _ = inputs(48, kv_heads=4, size=48)
    v = np.broadcast_to(
        np.eye(48, dtype=np.float32)[None, :, None], (2, 48, 4, 48)
    )  # so that the values are the weights
    mask = packed(48, False)
    dropping = dict(dropout_rate=0.25, key=jax.random.key(0), want_weights=True)
    (plain, weights), (dropped, told), (without, _) = run(
        q, k, v, mask, dict(want_weights=True), dropping, dict(dropout_rate=0.25)
    )
    np.testing.assert_array_equal(told, weights)
    np.testing.assert_allclose(without, plain, atol=1e-6)
    allowed = np.broadcast_to(mask.allowed()[:, None], weights.shape)
    share = (np.moveaxis(dropped, 1, 2) / np.asarray(weights))[allowed]
    np.testing.assert_allclose(np.unique(np.round(share, 4)), [0, 1.3333], atol=1e-6)
    assert abs(share.mean() - 1) < 0.03
