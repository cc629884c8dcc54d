"""The cross-entropy against its formula in NumPy, its gradient against JAX's, chunks against the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import losses
from llm_jax.models.heads import Outputs

B, S, D, V = 3, 10, 8, 23
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = (RNG.standard_normal(shape).astype(np.float32) for shape in ((B, S, D), (V, D), (V,)))
TARGETS = RNG.integers(0, V, (B, S))
WEIGHTS = np.where(RNG.random((B, S)) < 0.3, 0, RNG.random((B, S))).astype(np.float32)
FOUR = 4 * B * V * 3
"""The size of chunk that cuts rows of ten into four pieces of three tokens, the last of which is filled up."""
BOTH = dict(label_smoothing=0.1, z_loss=0.01)


def reference(hidden, kernel, bias, label_smoothing=0.0, z_loss=0.0, numpy=np):
    """Each token's loss and its negative log-likelihood, by the formula in `cross_entropy`'s first line."""
    logits = hidden @ kernel.T + (0 if bias is None else bias)
    log_z = numpy.log(numpy.sum(numpy.exp(logits), axis=-1))
    log_p = logits - log_z[..., None]
    nll = -numpy.take_along_axis(log_p, TARGETS[..., None], axis=-1)[..., 0]
    return (1 - label_smoothing) * nll - label_smoothing * log_p.mean(axis=-1) + z_loss * log_z**2, nll, logits


def loss(hidden, kernel, bias, weights=WEIGHTS, **kind):
    return losses.cross_entropy(Outputs(hidden, None, kernel, bias), TARGETS, weights, **kind)


@pytest.mark.parametrize(
    "kind, biased, chunk",
    [
        ({}, False, None),
        ({}, True, FOUR),
        (dict(label_smoothing=0.2), False, FOUR),
        (dict(z_loss=0.05), False, None),
        (BOTH, True, None),
        (BOTH, True, FOUR),
    ],
)
def test_values_and_gradients(kind, biased, chunk, monkeypatch):
    bias = BIAS if biased else None
    if chunk:
        monkeypatch.setattr(losses, "CHUNK", chunk)
    assert losses._chunks(B, S, V) == (4 if chunk else 1)
    args = (HIDDEN, KERNEL) if bias is None else (HIDDEN, KERNEL, bias)
    rest = (None,) if bias is None else ()

    def ours(*args):
        found = loss(*args, *rest, **kind)
        return 3 * found.total, found.sums()

    def plain(*args):
        return 3 * jnp.sum(WEIGHTS * reference(*args, *rest, **kind, numpy=jnp)[0])

    every = tuple(range(len(args)))
    (_, found), gradient = jax.jit(jax.value_and_grad(ours, every, has_aux=True))(*args)
    each, nll, logits = reference(*(x.astype(np.float64) for x in args), *rest, **kind)
    np.testing.assert_allclose(found.total, (WEIGHTS * each).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.weight, WEIGHTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(found.metrics["nll"], (WEIGHTS * nll).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["correct"], WEIGHTS[logits.argmax(axis=-1) == TARGETS].sum(), rtol=1e-5)
    expected = jax.jit(jax.grad(plain, every))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5), gradient, expected)
    assert (np.asarray(gradient[0])[WEIGHTS == 0] == 0).all()


def test_large_logits():
    """No overflow, and the gradient of a token that is surely right is zero."""
    hidden = 200 * HIDDEN
    targets = np.argmax(hidden @ KERNEL.T, axis=-1)

    def total(hidden):
        return losses.cross_entropy(Outputs(hidden, None, KERNEL, None), targets, np.ones((B, S), np.float32)).total

    value, gradient = jax.jit(jax.value_and_grad(total))(hidden)
    assert 0 <= float(value) < 1 and float(jnp.abs(gradient).max()) < 1


def test_half_precision():
    """Hidden states in bfloat16: sums and the gradient of the float32 kernel stay in float32."""

    def total(hidden, kernel):
        return loss(hidden, kernel, None, z_loss=0.01).total

    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    value, (d_hidden, d_kernel) = run(jnp.asarray(HIDDEN, jnp.bfloat16), KERNEL)
    assert (value.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact, (_, expected) = run(HIDDEN, KERNEL)
    np.testing.assert_allclose(value, exact, rtol=0.01)
    np.testing.assert_allclose(d_kernel, expected, atol=0.05)
    rounded = d_kernel.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != d_kernel).mean() > 0.5, "the sum over tokens was rounded to bfloat16"


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk", [None, FOUR])
def test_log_probabilities(bias, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(losses, "CHUNK", chunk)
    found = losses.log_probabilities(Outputs(HIDDEN, None, KERNEL, bias), TARGETS)
    np.testing.assert_allclose(found, -reference(HIDDEN, KERNEL, bias)[1], atol=1e-5)


def test_chunks_fit_the_memory_of_a_device(monkeypatch, mesh):
    """Logits of a device at once: its rows, with at most as many tokens of each as fit."""
    monkeypatch.setattr(losses, "CHUNK", 4 * 100)
    assert losses._chunks(2, 10, 10) == 2
    assert losses._chunks(2, 10, 11) == 3
    assert losses._chunks(64, 4, 1000) == 4, "a row cannot be cut into more pieces than it has tokens"
    with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)):
        assert losses._chunks(8, 10, 10) == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert losses._chunks(2, 40, 10) == 2 and losses._unroll(2) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert losses._chunks(2, 40, 10) == 1 and losses._chunks(2, 320, 10) == 2


def test_cut_and_join():
    x = np.arange(2 * 7 * 3).reshape(2, 7, 3)
    for count in (1, 3, 7):
        cut = losses._cut(jnp.array(x), count)
        assert cut.shape == (count, 2, -(-7 // count), 3)
        np.testing.assert_array_equal(losses._join(cut, 7), x)


def test_a_model_without_a_vocabulary():
    with pytest.raises(AssertionError, match="the model has no head over the vocabulary"):
        losses.cross_entropy(Outputs(HIDDEN, None), TARGETS, WEIGHTS)


def test_totals_and_weights_of_slices_add_up():
    whole = loss(HIDDEN, KERNEL, BIAS)
    parts = [
        losses.cross_entropy(Outputs(HIDDEN[i : i + 1], None, KERNEL, BIAS), TARGETS[i : i + 1], WEIGHTS[i : i + 1])
        for i in range(B)
    ]
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), [part.sums() for part in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, whole.sums())
