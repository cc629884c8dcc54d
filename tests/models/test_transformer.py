"""Every family at tiny size: its tree, its forms (unrolled, scanned, rematerialised), what it gives on request."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding, tree
from llm_jax.losses import cross_entropy
from llm_jax.models import layers, remat, transformer


def key(seed):
    """A key whose numbers come from an operation of XLA: those of the default would be most of what is compiled."""
    return jax.random.key(seed, impl="rbg")


@functools.cache
def compiled(config, **options):
    return jax.jit(lambda params, batch, key: transformer.apply(config, params, batch, key=key, **options))


def run(model, batch, key=None, **options):
    """The outputs of a model; compiled once for a config, its options and shapes."""
    return jax.device_get(compiled(model.config, **options)(model.params, batch, key))


@pytest.fixture(scope="module")
def forward(batch_of):
    """`forward(model)`: its batch of packed rows and the outputs of it, made once."""
    known = {}

    def of(model):
        if model.config not in known:
            batch = batch_of(model.config)
            known[model.config] = batch, run(model, batch)
        return known[model.config]

    return of


def close(found, expected, atol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(np.abs(b).max()))), found, expected
    )


def gradients(model, batch, drop=None):
    """The gradient of the cross-entropy of some targets by the params."""
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    weights = (batch["segment_ids"] > 0).astype(jnp.float32)

    def loss(params, batch):
        return cross_entropy(
            transformer.apply(model.config, params, batch, key=drop, logits=False), targets, weights
        ).total

    return jax.jit(jax.value_and_grad(loss))(model.params, batch)


class Axes:
    """The names of one weight's axes, as a leaf."""

    def __init__(self, names):
        self.names = names


def test_axes(family):
    """Each weight names its axes, all known to the table of shardings; layers are stacked along the first."""
    config, shapes, axes = family.config, transformer.shapes(family.config), transformer.axes(family.config)
    axes = jax.tree.map(Axes, axes, is_leaf=lambda x: isinstance(x, tuple))
    names = {name: leaf.names for name, leaf in zip(tree.names(axes), jax.tree.leaves(axes))}
    assert list(names) == tree.names(shapes)
    for name, x in zip(names, jax.tree.leaves(shapes)):
        assert len(names[name]) == x.ndim and set(names[name]) <= set(sharding.RULES), name
        assert ("layers" in names[name]) == ("/layers/" in name), name
        if "/layers/" in name:
            depth = config.encoder_depth if name.startswith("encoder/") else config.decoder_depth
            assert names[name][0] == "layers" and x.shape[0] == depth, name


@pytest.mark.parametrize("name", ["roberta", "llama", "t5", "vit"])
def test_init(name, tiny):
    """Shapes as told; scales one, biases zero, and every layer drawn for itself."""
    config = tiny(name).config
    params = jax.device_get(jax.jit(functools.partial(transformer.init, config))(key(0)))
    assert type(params) is dict
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), transformer.shapes(config)
    )
    for name, x in zip(tree.names(params), jax.tree.leaves(params)):
        assert x.dtype == np.float32 and isinstance(x, np.ndarray), name
        if name.endswith(("scale", "bias")):
            assert (x == (1 if name.endswith("scale") else 0)).all(), name
        else:
            assert len(np.unique(x)) == x.size, f"{name}: some values are equal"


@pytest.mark.parametrize("name, branches, tokens", [("gpt2", 4, 0.02), ("vaswani", 1, 128**-0.5), ("t5", 2, 1.0)])
def test_deviation_of_fresh_weights(name, branches, tokens, tiny):
    """1/sqrt(fan in); in a pre-norm stack what is added to the stream is less by sqrt(2 L) (GPT-2, section 2.3).

    The embedding is such that, scaled as the family does, it or the logits have deviation 1; T5's scores have it too.
    """
    config = tiny(name, dim=128, mlp_dim=256, vocab_size=500, head_dim=32).config
    params = jax.device_get(jax.jit(functools.partial(transformer.init, config))(key(0)))
    attention, mlp = params["decoder"]["layers"]["attention"], params["decoder"]["layers"]["mlp"]
    expected = [
        (attention["query"], 128 * 32 if name == "t5" else 128),
        (attention["key"], 128),
        (attention["out"], 128 * branches),
        (mlp["up"], 128),
        (mlp["down"], 256 * branches),
        (params["embed"]["tokens"], tokens**-2),
    ]
    for x, fan in expected:
        np.testing.assert_allclose(x.std() * fan**0.5, 1, rtol=0.03)


def test_apply(family, forward):
    _, outputs = forward(family)
    config = family.config
    rows, length = (3, 11) if not config.patch_size else (3, 10)
    assert outputs.hidden.shape == (rows, length, config.dim) and outputs.hidden.dtype == jnp.float32
    logits = {"none": (rows, config.dim), "classification": (rows, config.labels)}.get(
        config.head, (rows, length, config.vocab_size)
    )
    if config.head == "none" and config.pooler == "none":
        assert outputs.logits is None
    else:
        assert outputs.logits.shape == logits and outputs.logits.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outputs))
    assert outputs.hidden_states is None and outputs.attentions is None and outputs.cache is None


def without_gradient(gradient):
    """The parameters on which nothing depends."""
    return {name for name, g in zip(tree.names(gradient), jax.tree.leaves(gradient)) if float(np.abs(g).max()) < 1e-4}


@pytest.mark.parametrize("name, changes", [("roberta", {}), ("vit", dict(pooler="tanh"))])
def test_every_parameter_is_used(name, changes, tiny, batch_of, accelerator):
    accelerator("tpu")
    model = tiny(name, dtype="float32", **changes)
    batch = batch_of(model.config)

    def reading(params):
        logits = transformer.apply(model.config, params, batch).logits
        return jnp.sum(logits * np.random.default_rng(0).standard_normal(logits.shape))

    gradient = jax.jit(jax.grad(reading))(model.params)
    # A bias of all keys adds the same to all scores of a query, which the softmax takes away again.
    assert without_gradient(gradient) == {name for name in tree.names(gradient) if name.endswith("/key_bias")}


def test_scanned_layers_equal_unrolled_ones(family, forward, accelerator):
    batch, expected = forward(family)
    accelerator("tpu")
    config = family.config.replace(dtype="float32")
    scanned = jax.jit(lambda params: transformer.apply(config, params, batch))
    assert "scan" in str(jax.make_jaxpr(scanned)(family.params))
    close(scanned(family.params), expected)


@pytest.mark.parametrize("name, drop", [("llama", None), ("t5", 3)])
def test_gradients_scanned_and_rematerialised(name, drop, tiny, batch_of, accelerator):
    """Unrolled or scanned, with nothing, all, or all but products computed again: one loss and one gradient."""
    drop = None if drop is None else key(drop)
    batch = batch_of(tiny(name).config)
    expected = gradients(tiny(name), batch, drop)
    assert not without_gradient(expected[1])
    if drop is None:
        close(gradients(tiny(name, remat="full"), batch, drop), expected)
    accelerator("tpu")
    for form in ("none", "dots", "offload") if drop is None else ("full",):
        close(gradients(tiny(name, remat=form, dtype="float32"), batch, drop), expected)


@pytest.mark.parametrize("name", remat.POLICIES)
def test_every_policy_gives_the_same(name, tiny, batch_of):
    """Unrolled, on this CPU, whose host memory holds what is offloaded."""
    model = tiny("llama", remat=name)
    batch = batch_of(model.config)
    close(gradients(model, batch, None), gradients(tiny("llama"), batch, None))


def test_rematerialisation_keeps_less(tiny, batch_of):
    """What the backward pass holds of a layer: all, the products, or the input alone."""
    batch, kept = batch_of(tiny("llama").config), {}
    for name in remat.REMAT:
        config = tiny("llama", remat=name).config
        forward = functools.partial(transformer.apply, config, batch=batch)
        found = jax.make_jaxpr(lambda params, forward=forward: jax.vjp(lambda p: forward(p).logits, params)[1])(
            tiny("llama").params
        )
        on_host = [x.size for x in found.out_avals if x.memory_space == jax.memory.Space.Host]
        kept[name] = sum(x.size for x in found.out_avals) - sum(on_host)
        assert bool(on_host) == name.startswith("offload")
    assert kept["full"] < kept["out"] < kept["qkv"] < kept["dots"] < kept["none"], kept
    assert kept["full"] < kept["mlp"] < kept["dots"] and kept["offload_dots"] == kept["offload"] < kept["full"], kept


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_hidden_states_and_attentions_on_request(name, tiny, forward):
    model = tiny(name)
    batch, plain = forward(model)
    outputs = run(model, batch, hidden_states=True, attentions=True)
    config, depth = model.config, len(outputs.hidden_states)
    assert depth == (config.decoder_depth or config.encoder_depth)
    assert outputs.hidden_states.shape == (depth, 3, 11, config.dim) and outputs.attentions.shape == (
        depth,
        3,
        config.heads,
        11,
        11,
    )
    close((outputs.hidden, outputs.logits), (plain.hidden, plain.logits))
    np.testing.assert_allclose(outputs.attentions.sum(axis=-1), 1, atol=1e-5)
    segments, index = batch["segment_ids"], np.arange(11)
    hidden = segments[:, :, None] != segments[:, None, :]
    if config.architecture != "encoder":
        hidden |= index[:, None] < index[None, :]
    assert (np.moveaxis(outputs.attentions, 2, 0)[:, :, hidden] == 0).all(), (
        "a query looks at a key that is hidden from it"
    )
    last = outputs.hidden_states[-1]
    if config.norm_place == "pre":
        norm = layers.Norm(config)
        last = norm.apply({"params": model.params["decoder"]["norm"]}, last)
    close(last * (config.dim**-0.5 if config.logits_scale else 1), outputs.hidden)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_requests_are_answered_by_scanned_layers_too(name, tiny, forward, accelerator):
    model = tiny(name)
    batch, _ = forward(model)
    expected = run(model, batch, hidden_states=True, attentions=True)
    accelerator("tpu")
    close(run(tiny(name, dtype="float32"), batch, hidden_states=True, attentions=True), expected)


def test_dropout_only_with_a_key(tiny, forward):
    model = tiny("bert")
    batch, plain = forward(model)
    one, again, other = (run(model, batch, key(seed)).hidden for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain.hidden).max() > 0.01 and np.abs(one - other).max() > 0.01
    text = str(jax.make_jaxpr(compiled(tiny("bert", dropout=0.0).config))(model.params, batch, key(0)))
    assert "random_bits" not in text and "random_bits" in str(
        jax.make_jaxpr(compiled(model.config))(model.params, batch, key(0))
    )
    assert "random" not in str(jax.make_jaxpr(compiled(model.config))(model.params, batch, None))


def test_each_dropout_draws_for_itself(tiny, batch_of):
    """Where branches add nothing, the dropouts of the embedding and of the output are left: zero where either is."""
    model = tiny("t5", dropout=0.5, decoder_layers=1)
    silent = tree.map_with_name(lambda name, x: 0 * x if name.endswith(("/out", "/down")) else x, model.params)
    batch = batch_of(model.config, length=40)
    outputs = run(model._replace(params=silent), batch, key(0))
    assert abs((outputs.hidden == 0).mean() - 0.75) < 0.05


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_positions_and_segments_by_default(name, tiny, forward):
    """A row without them is one example that begins at position 0."""
    model = tiny(name)
    batch, _ = forward(model)
    bare = {name: x for name, x in batch.items() if name.endswith("tokens")}
    close(run(model, bare).logits, run(model, bare | one_example(bare)).logits)


def one_example(tokens):
    """The segments and positions of unpacked rows."""
    made = {}
    for name, x in tokens.items():
        made[name.replace("tokens", "segment_ids")] = np.ones_like(x)
        made[name.replace("tokens", "positions")] = np.arange(x.shape[1], dtype=np.int32) * np.ones_like(x)
    return made


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "marian"])
def test_packed_examples_do_not_see_one_another(name, tiny, forward):
    """Each example of a packed row has the outputs that it has alone, at the start of a row that is padded."""
    model = tiny(name)
    batch, whole = forward(model)
    for segment in (1, 2):
        alone = {}
        for feature, x in batch.items():
            segments = batch["encoder_segment_ids" if feature.startswith("encoder_") else "segment_ids"]
            alone[feature] = np.zeros_like(x)
            for to, row, where in zip(alone[feature], x, segments == segment):
                to[: where.sum()] = row[where]
        found = run(model, alone)
        for row, where in enumerate(batch["segment_ids"] == segment):
            close(found.hidden[row, : where.sum()], whole.hidden[row, where])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_causality(name, tiny, forward):
    """A later token of a decoder changes nothing before it; in an encoder it does."""
    model = tiny(name)
    batch, _ = forward(model)
    batch = batch | one_example({"tokens": batch["tokens"]})
    changed = {**batch, "tokens": batch["tokens"].copy()}
    changed["tokens"][:, 6] = (batch["tokens"][:, 6] + 1) % 97
    same = np.abs(run(model, batch).hidden - run(model, changed).hidden).max(axis=(0, 2)) < 1e-5
    assert same[:6].all() == (name == "llama") and not same[6:].any()


@pytest.mark.parametrize("name, cut", [("gpt2", False), ("llama", False), ("t5", True), ("marian", False)])
def test_cached_decoding_gives_the_logits_of_the_uncached_forward(name, cut, tiny, forward):
    """Prompts of different lengths in one chunk, whose empty slots stay in the cache as holes; then other chunks.

    The weights of the cached form are cut into layers beforehand (as generation on CPU does) or not.
    """
    model = tiny(name)
    config, rows = model.config, 3
    batch, _ = forward(model)
    batch = batch | one_example({"tokens": batch["tokens"]})
    expected = run(model, batch).logits
    params = transformer.unstacked(config, model.params) if cut else model.params
    prompts, width = np.array([3, 2, 1]), 3

    @jax.jit
    def step(params, batch, cache):
        outputs = transformer.apply(config, params, batch, cache=cache)
        return outputs.logits, outputs.cache

    cache = transformer.empty_cache(config, rows, 14)
    if config.architecture == "encoder-decoder":
        cache = jax.jit(lambda params, batch: transformer.cross_cache(config, params, batch, cache))(params, batch)
    at = np.zeros(rows, int)
    for chunk in (width, 1, 3, 1, 3):
        index = at[:, None] + np.arange(chunk)
        real = index < prompts[:, None] if not at.any() else np.ones_like(index, bool)
        tokens = np.where(real, np.take_along_axis(batch["tokens"], index, axis=1), 0)
        new = {"tokens": tokens, "positions": index.astype(np.int32)}
        if chunk > 1:  # a new token without a segment belongs to the row's one example
            new["segment_ids"] = real.astype(np.int32)
        found, cache = step(params, new, cache)
        wanted = np.take_along_axis(expected, index[..., None], axis=1)
        error = np.abs(found - wanted)[real]
        assert error.max() < 1e-5 * np.abs(expected).max()
        at = at + real.sum(axis=1)
    assert int(cache.offset) == width + 8 and at.tolist() == (prompts + 8).tolist()


def test_half_precision(tiny, forward):
    """Computed in bfloat16 from float32 weights, the logits in float32 again: near those in float32."""
    batch, expected = forward(tiny("llama"))
    outputs = run(tiny("llama", dtype="bfloat16"), batch)
    assert outputs.hidden.dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    error = np.abs(outputs.logits - expected.logits)[batch["segment_ids"] > 0]
    assert (
        1e-4 < error.max() < 0.3 * np.abs(expected.logits).max() and error.mean() < 0.02 * np.abs(expected.logits).max()
    )


def test_every_policy_is_documented():
    """A row of the table in docs/scale.md for each."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert [name for name in remat.REMAT if f"\n| `{name}` | " not in page] == []
