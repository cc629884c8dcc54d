"""Each head against its formula in NumPy: logits over the vocabulary, masked tokens, classes, spans, and the pooler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import heads, layers, transformer
from llm_jax.models.config import ModelConfig

CONFIG = ModelConfig(dim=12, heads=2, vocab_size=19, layers=1, labels=3, norm_epsilon=1e-6)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 6, 12)).astype(np.float32)
TABLE = RNG.standard_normal((19, 12)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
PREDICT = np.array([[4, 0, 0], [1, 5, 3]])


def run(config, batch=None, **options):
    """The head's random weights and its outputs."""
    head = heads.Head(config)
    boxed = jax.eval_shape(lambda: head.init(jax.random.key(0), X, TABLE, {})).get("params", {})
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda box: rng.standard_normal(box.value.shape).astype(np.float32),
        boxed,
        is_leaf=lambda x: isinstance(x, layers.Named),
    )
    return params, jax.jit(lambda params: head.apply({"params": params}, X, TABLE, batch or {}, **options))(params)


def test_language_modelling():
    """hidden E^T with the embedding table or a kernel of its own; scaled or with a bias where the config says so."""
    head = heads.Head(CONFIG)
    outputs = head.apply({}, X, TABLE, {})
    np.testing.assert_allclose(outputs.logits, X @ TABLE.T, atol=1e-5)
    assert outputs.bias is None
    np.testing.assert_allclose(
        head.apply({}, X, TABLE, {"predict": PREDICT}).logits,
        np.take_along_axis(X @ TABLE.T, PREDICT[..., None], axis=1),
        atol=1e-5,
    )
    params, outputs = run(CONFIG.replace(logits_bias=True, logits_scale=True))
    np.testing.assert_allclose(outputs.logits, X / math.sqrt(12) @ TABLE.T + params["bias"], atol=1e-5)
    params, outputs = run(CONFIG.replace(tie_embeddings=False, logits_scale=True))
    np.testing.assert_allclose(outputs.logits, X @ params["kernel"].T, atol=1e-5)
    assert set(params) == {"kernel"}


@pytest.mark.parametrize("predict", [None, PREDICT])
def test_masked_language_modelling(predict):
    """norm(act(x W + b)) E^T + c (BERT's `cls.predictions`), at all positions or at those to predict."""
    params, outputs = run(
        CONFIG.replace(architecture="encoder", head="mlm", mlp="relu", bias="all"), {"predict": predict}
    )
    y = np.maximum(X @ params["dense"] + params["dense_bias"], 0)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * params["norm"]["scale"] + params[
        "norm"
    ]["bias"]
    if predict is not None:
        y = np.take_along_axis(y, predict[..., None], axis=1)
    np.testing.assert_allclose(outputs.hidden, y, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, y @ TABLE.T + params["bias"], atol=1e-4)


@pytest.mark.parametrize(
    "changes", [dict(logits_bias=True), dict(logits_scale=True), dict(architecture="encoder", head="mlm")]
)
def test_outputs_hold_what_the_losses_need(changes):
    """Without logits: hidden kernel^T + bias are the same ones."""
    batch = {"predict": PREDICT}
    _, outputs = run(CONFIG.replace(**changes), batch)
    _, without = run(CONFIG.replace(**changes), batch, logits=False)
    assert without.logits is None
    found = np.einsum("bmd,vd->bmv", without.hidden, without.kernel) + (0 if without.bias is None else without.bias)
    np.testing.assert_allclose(found, outputs.logits, atol=1e-5)


@pytest.mark.parametrize("architecture, bias", [("encoder", "all"), ("encoder", "none"), ("decoder", "all")])
def test_classification(architecture, bias):
    """x W + b of the first token of an encoder, x W of the last real token of a decoder."""
    params, outputs = run(
        CONFIG.replace(architecture=architecture, head="classification", bias=bias), {"segments": SEGMENTS}
    )
    chosen = X[:, 0] if architecture == "encoder" else X[[0, 1], [3, 5]]
    expected = chosen @ params["classification"] + params.get("classification_bias", 0)
    assert outputs.logits.shape == (2, 3) and ("classification_bias" in params) == (architecture == "encoder")
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-5)


@pytest.mark.parametrize("head", ["none", "classification"])
def test_pooler(head):
    """tanh(x_first W + b) (BERT), which the classifier reads where there is one."""
    params, outputs = run(CONFIG.replace(architecture="encoder", head=head, pooler="tanh", bias="all"))
    pooled = np.tanh(X[:, 0] @ params["pooler"] + params["pooler_bias"])
    if head == "classification":
        pooled = pooled @ params["classification"] + params["classification_bias"]
    np.testing.assert_allclose(outputs.logits, pooled, atol=1e-5)
    np.testing.assert_array_equal(outputs.hidden, X)


def test_classification_drops_out_what_it_reads():
    config = CONFIG.replace(architecture="encoder", head="classification", dropout=0.5)
    _, plain = run(config)
    _, again = run(config, key=None)
    _, dropped = run(config, key=jax.random.key(0))
    np.testing.assert_array_equal(plain.logits, again.logits)
    assert float(jnp.abs(dropped.logits - plain.logits).max()) > 1e-3


def test_span():
    """Two scores for each token: the answer begins here, the answer ends here."""
    params, outputs = run(CONFIG.replace(architecture="encoder", head="span", bias="all"))
    np.testing.assert_allclose(outputs.logits, X @ params["span"] + params["span_bias"], atol=1e-5)
    assert outputs.logits.shape == (2, 6, 2)


def test_no_head():
    config = CONFIG.replace(architecture="encoder", head="none")
    outputs = heads.Head(config).apply({}, X, TABLE, {})
    assert outputs.logits is None and outputs.kernel is None
    assert "head" not in transformer.shapes(config)
