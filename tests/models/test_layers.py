"""Each layer against its formula written in NumPy in float64, from the papers and not from the code."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import layers
from llm_jax.models.attention import Mask
from llm_jax.models.config import MLPS, ModelConfig

CONFIG = ModelConfig(dim=24, heads=4, mlp_dim=20, vocab_size=31, max_length=16, positions="none")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 7, 24)).astype(np.float32)


def draw(params):
    """Weights of the same shapes, none of them zero or one."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


def shapes_of(module, *args):
    """The shape of each weight of a module."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, layers.Named))


def run(module, params, *args):
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args))(params, *args)


def test_sinusoidal_positions():
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same ('Attention is all you need', section 3.5)."""
    positions = np.array([[0, 1, 2, 77], [5, 5, 511, 3]])
    expected = np.zeros((2, 4, 10))
    for at in np.ndindex(2, 4):
        for i in range(5):
            angle = positions[at] / 10000 ** (2 * i / 10)
            expected[at][2 * i], expected[at][2 * i + 1] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(layers.sinusoidal(jnp.array(positions), 10), expected, atol=5e-5)


def test_rotary_positions():
    """The pair (x_i, x_{i+E/2}) as a complex number, times exp(i p base^(-2i/E)) (RoFormer, eq. 34)."""
    x = RNG.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [9, 0, 130, 1, 1]])
    rates = 500.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * rates)
    found = jax.jit(functools.partial(layers.rotary, base=500.0))(x, positions)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=5e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = (RNG.standard_normal((1, 1, 1, 16)).astype(np.float32) for _ in range(2))
    queries, keys = np.array([[3, 13, 103, 20]]), np.array([[0, 10, 100, 0]])

    @jax.jit
    def scores(queries, keys):
        turned = (layers.rotary(jnp.broadcast_to(x, (1, 4, 1, 16)), at, 10000.0) for x, at in ((q, queries), (k, keys)))
        return jnp.einsum("bshe,bshe->bs", *turned)[0]

    near, shifted, far, other = scores(queries, keys)
    np.testing.assert_allclose([shifted, far], near, atol=1e-4)
    assert abs(other - near) > 1e-2


GOLDEN = {  # (buckets, furthest, bidirectional): distances, and their buckets by T5Attention of transformers
    (32, 128, True): (
        [-500, -128, -64, -20, -8, -7, -1, 0, 1, 7, 8, 20, 200],
        [15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 31],
    ),
    (32, 128, False): ([-500, -128, -100, -64, -17, -16, -15, -1, 0, 1, 50], [31, 31, 30, 26, 16, 16, 15, 1, 0, 0, 0]),
    (8, 12, True): ([-30, -6, -3, -2, -1, 0, 1, 2, 4, 5, 12], [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7]),
}


@pytest.mark.parametrize("buckets, furthest, bidirectional", GOLDEN)
def test_relative_buckets(buckets, furthest, bidirectional):
    distances, expected = GOLDEN[buckets, furthest, bidirectional]
    assert layers.relative_bucket(jnp.array(distances), buckets, furthest, bidirectional).tolist() == expected


@pytest.mark.parametrize("buckets, furthest, bidirectional", [*GOLDEN, (10, 20, False), (64, 1000, True)])
def test_relative_buckets_of_transformers(buckets, furthest, bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-1100, 1101)
    expected = t5.T5Attention._relative_position_bucket(torch.from_numpy(distance), bidirectional, buckets, furthest)
    ours = functools.partial(layers.relative_bucket, buckets=buckets, furthest=furthest, bidirectional=bidirectional)
    np.testing.assert_array_equal(jax.jit(ours)(distance), expected.numpy())


def test_relative_bias():
    """table[bucket(key - query)] for each head; what is ahead of a decoder's query has bucket 0."""
    config = CONFIG.replace(positions="relative", relative_buckets=8, relative_distance=12)
    queries, keys = np.array([[4, 5]]), np.array([[0, 3, 4, 5, 9]])
    for bidirectional in (True, False):
        module = layers.RelativeBias(config, bidirectional)
        params = draw(shapes_of(module, queries, keys))
        bucket = layers.relative_bucket(jnp.array(keys[:, None] - queries[..., None]), 8, 12, bidirectional)
        found = run(module, params, queries, keys)
        assert found.shape == (1, 4, 2, 5)
        np.testing.assert_allclose(found, np.moveaxis(params["table"][np.asarray(bucket)], -1, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_norm(kind, bias):
    """g (x - mean) / sqrt(var + e) + b (Ba et al. 2016, eq. 4); g x / sqrt(mean(x^2) + e) (Zhang and Sennrich 2019)."""
    module = layers.Norm(CONFIG.replace(norm=kind, bias=bias, norm_epsilon=0.1))
    params = draw(shapes_of(module, X))
    assert set(params) == ({"scale", "bias"} if (kind, bias) == ("layer", "all") else {"scale"})
    x = X.astype(np.float64) + 2
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    expected = params["scale"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) + params.get("bias", 0)
    np.testing.assert_allclose(run(module, params, X + 2), expected, atol=1e-5)


def test_norm_in_half_precision():
    """Computed in float32: a mean much larger than the deviation costs nothing more than the input's own rounding."""
    module = layers.Norm(CONFIG.replace(norm="layer"))
    x = jnp.asarray(X + 30, jnp.bfloat16)
    found = run(module, {"scale": np.ones(24, np.float32)}, x)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.01, atol=1e-3)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("mlp", MLPS)
def test_mlp(mlp):
    """act(x W1 + b1) W2 + b2 ('Attention is all you need', eq. 2); (act(x W + b) * (x V + c)) W2 + d (Shazeer 2020)."""
    bias = "none" if mlp in ("gelu", "gated_silu") else "all"
    module = layers.MLP(CONFIG.replace(mlp=mlp, bias=bias))
    params = draw(shapes_of(module, X))
    p = {"up_bias": 0, "gate_bias": 0, "down_bias": 0, **{name: x.astype(np.float64) for name, x in params.items()}}
    hidden = ACTIVATIONS[mlp.removeprefix("gated_")](X @ p["up"] + p["up_bias"])
    if mlp.startswith("gated_"):
        hidden = hidden * (X @ p["gate"] + p["gate_bias"])
    np.testing.assert_allclose(run(module, params, X), hidden @ p["down"] + p["down_bias"], rtol=1e-4, atol=1e-3)
    assert ("up_bias" in params) == (bias == "all") and ("gate" in params) == mlp.startswith("gated_")


def multi_head(p, x, source, allowed, scale):
    """Concat(head_1, .., head_h) W^O with head_i = softmax(Q_i K_i^T / sqrt(d_k)) V_i.

    Q_i = x W_i^Q, K_i = source W_i^K, V_i = source W_i^V.
    """
    heads = []
    for i in range(p["query"].shape[1]):
        j = i // (p["query"].shape[1] // p["key"].shape[1])
        q, k, v = (
            y @ p[name][:, n] + p.get(f"{name}_bias", np.zeros((9, 1)))[n]
            for name, y, n in (("query", x, i), ("key", source, j), ("value", source, j))
        )
        scores = np.where(allowed, q @ k.swapaxes(1, 2) * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    flat = np.concatenate([p["out"][i] for i in range(len(heads))])
    return np.concatenate(heads, axis=-1) @ flat + p.get("out_bias", 0)


@pytest.mark.parametrize(
    "changes", [dict(bias="all"), dict(bias="qkv", kv_heads=2, attention_scale=False), dict(head_dim=10, kv_heads=1)]
)
def test_multi_head_attention(changes):
    """'Attention is all you need', section 3.2.2, causal over packed rows; heads of any size, grouped, with biases."""
    config = CONFIG.replace(**changes)
    segments, positions = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7]), np.array([[0, 1, 2, 0, 1, 2, 0], range(7)])
    mask = Mask(segments, segments, positions, positions, causal=True)
    module = layers.Attention(config)
    params = jax.tree.map(lambda x: 0.3 * x, draw(shapes_of(module, X, X, mask)))
    found, (k, v), _ = jax.jit(lambda params, x: module.apply({"params": params}, x, x, mask))(params, X)
    assert k.shape == v.shape == (2, 7, config.kv_size, config.head_size)
    p = {name: x.astype(np.float64) for name, x in params.items()}
    scale = config.head_size**-0.5 if config.attention_scale else 1.0
    np.testing.assert_allclose(
        found, multi_head(p, X.astype(np.float64), X.astype(np.float64), mask.allowed(), scale), atol=2e-5
    )


def test_cross_attention():
    """Queries of one stream, keys and values of a longer one; rotary positions have no meaning between the two."""
    module = layers.Attention(CONFIG.replace(positions="rotary"), cross=True)
    source = RNG.standard_normal((2, 5, 24)).astype(np.float32)
    queries, keys = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7]), np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 0]])
    mask = Mask(queries, keys, np.tile(np.arange(7), (2, 1)), np.zeros((2, 5), int), causal=False, aligned=False)
    params = jax.tree.map(lambda x: 0.3 * x, draw(shapes_of(module, X, source, mask)))
    whole = jax.jit(lambda params: module.apply({"params": params}, X, source, mask)[0])(params)
    real = np.asarray(queries)[:, :, None] > 0
    expected = multi_head(
        {n: x.astype(np.float64) for n, x in params.items()}, X, source, mask.allowed() | ~real, CONFIG.head_size**-0.5
    )
    np.testing.assert_allclose(np.where(real, whole, 0), np.where(real, expected, 0), atol=2e-5)


def test_query_and_key_norm():
    """Queries and keys of each head have the root mean square 1, times a scale of its own, before the scores."""
    module = layers.Attention(CONFIG.replace(qk_norm=True, norm_epsilon=1e-9))
    mask = Mask(*(np.ones((2, 7), int),) * 4, causal=False)
    params = draw(shapes_of(module, X, X, mask))
    _, (k, _), _ = jax.jit(lambda params: module.apply({"params": params}, X, X, mask))(params)
    plain = np.einsum("bsd,dhe->bshe", X, params["key"])
    expected = plain / np.sqrt((plain**2).mean(-1, keepdims=True)) * params["key_norm"]["scale"]
    np.testing.assert_allclose(k, expected, atol=1e-4)
    assert params["query_norm"]["scale"].shape == (6,)


def test_contract_on_every_platform(accelerator):
    x, w = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32), RNG.standard_normal((4, 5, 6)).astype(np.float32)
    expected = np.einsum("bshe,hed->bsd", x, w)
    np.testing.assert_allclose(layers.contract(x, w, over=2), expected, atol=1e-5)
    accelerator("tpu")
    np.testing.assert_allclose(layers.contract(x, w, over=2), expected, atol=1e-5)


def test_unstack_and_its_gradient():
    stacked = {"a": RNG.standard_normal((3, 2)).astype(np.float32), "b": {"c": np.arange(3.0, dtype=np.float32)}}
    each = layers.unstack(stacked, 3)
    assert len(each) == 3 and float(each[2]["b"]["c"]) == 2 and each[1]["a"].tolist() == stacked["a"][1].tolist()

    def value(stacked):
        return sum(
            (i + 1) * jnp.sum(x["a"] ** 2) + x["b"]["c"] for i, x in enumerate(layers.unstack(stacked, 3)) if i != 1
        )

    gradient = jax.grad(value)(stacked)
    np.testing.assert_allclose(gradient["a"], 2 * stacked["a"] * np.array([[1], [0], [3]]), rtol=1e-6)
    assert gradient["b"]["c"].tolist() == [1, 0, 1]


def embed(config, tokens, positions, types=None):
    module = layers.Embedding(config)
    params = draw(shapes_of(module, tokens, positions, types, None))
    return params, run(module, params, tokens, positions, types, None)


def test_embedding_of_tokens():
    """norm(sqrt(D) token + position + type), each where the config says so."""
    tokens, positions, types = np.array([[3, 30, 0]]), np.array([[0, 1, 15]]), np.array([[0, 1, 1]])
    params, found = embed(CONFIG.replace(positions="learned", token_types=2), tokens, positions, types)
    expected = params["tokens"][tokens] + params["positions"][positions] + params["types"][types]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    params, found = embed(CONFIG.replace(positions="learned", token_types=2), tokens, positions)
    np.testing.assert_allclose(
        found, params["tokens"][tokens] + params["positions"][positions] + params["types"][0], atol=1e-5
    )
    params, found = embed(
        CONFIG.replace(positions="sinusoidal", embedding_scale=True, embedding_norm=True), tokens, positions
    )
    x = np.sqrt(24) * params["tokens"][tokens] + np.asarray(layers.sinusoidal(jnp.array(positions), 24))
    np.testing.assert_allclose(
        found, params["norm"]["scale"] * (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), atol=1e-4
    )


def test_embedding_of_an_image():
    """A class token, then x W + b of each patch, row by row; the weight of a pixel stands at its place in the patch."""
    config = CONFIG.replace(architecture="encoder", positions="learned", patch_size=2, image_size=4, head="none")
    images = RNG.standard_normal((2, 4, 4, 3)).astype(np.float32)
    params, found = embed(config, images, np.tile(np.arange(5), (2, 1)))
    assert found.shape == (2, 5, 24)
    np.testing.assert_allclose(found[:, 0], np.tile(params["first"] + params["positions"][0], (2, 1)), atol=1e-5)
    for at, (i, j) in enumerate(np.ndindex(2, 2)):
        patch = images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        expected = (
            np.einsum("bpqc,pqcd->bd", patch, params["patches"]) + params["patches_bias"] + params["positions"][at + 1]
        )
        np.testing.assert_allclose(found[:, at + 1], expected, atol=1e-4)


def test_dropout():
    x = np.ones((400, 50), np.float32)
    assert layers.dropout(x, 0.3, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x
    dropped = np.asarray(layers.dropout(x, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert abs(dropped.mean() - 1) < 0.02
    assert layers.dropout(jnp.ones((2, 2), jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


def test_dtype_of_the_computation(accelerator):
    assert layers.compute_dtype(CONFIG) == jnp.float32
    assert layers.compute_dtype(CONFIG.replace(dtype="bfloat16")) == jnp.bfloat16
    accelerator("gpu")
    assert layers.compute_dtype(CONFIG) == jnp.bfloat16
    assert layers.compute_dtype(CONFIG.replace(dtype="float32")) == jnp.float32
