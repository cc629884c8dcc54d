"""Shrinking: the laws over every family, each importance against NumPy or a gate, what stays and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.interop import huggingface
from llm_jax.losses import Loss
from llm_jax.model import Model, load
from llm_jax.models import transformer
from llm_jax.models.layers import Embedding
from llm_jax.transforms.base import IDENTITY, Calibration, chain
from llm_jax.transforms.importance import activation, importance, magnitude, taylor
from llm_jax.transforms.shrink import shrink, silence
from tests.families import FAMILIES, Tiny, batch_of, tiny_model
from tests.transforms import laws

FAST = functools.partial(jax.jit, compiler_options=laws.FAST)


def objective(config):
    """Something of which every weight has a gradient; its rows weigh 1."""

    def loss(params, batch, key, reference):
        found = transformer.apply(config, params, batch, key=key)
        y = found.hidden if found.logits is None else found.logits
        return Loss(jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), jnp.float32(y.shape[0]), {})

    return loss


def rows(config) -> Calibration:
    """Two batches of the family's input."""
    one = batch_of(config)
    other = {
        name: (x * 7 + 3) % config.vocab_size if "tokens" in name else -x if name == "images" else x
        for name, x in one.items()
    }
    return Calibration({name: np.stack([one[name], other[name]]) for name in one}, objective)


def everything(config, **more):
    """About half of all that a family has."""
    depths = dict(layers=config.layers, decoder_layers=config.decoder_layers)
    return dict(mlp=0.5, heads=2, dim=12) | {name: 0.5 for name, depth in depths.items() if depth > 1} | more


def after(change, tiny: Tiny, aux=None) -> Tiny:
    return Tiny(tiny.name, *laws.changed(change, tiny, aux))


def blocks(params):
    """(path, block, the name of its outgoing weight) of every block of layers."""
    for side in ("encoder", "decoder"):
        for name in ("attention", "cross", "mlp"):
            block = params.get(side, {}).get("layers", {}).get(name)
            if block is not None:
                yield f"{side}/layers/{name}", block, "down" if name == "mlp" else "out"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tree_is_that_of_a_fresh_model(name: str):
    tiny = tiny_model(name)
    change = shrink(**everything(tiny.config))
    laws.same_tree(change, tiny)
    small = change.config(tiny.config)
    assert (small.dim, small.heads, small.mlp_size, small.head_size) == (12, 2, 12, tiny.config.head_size)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_what_is_left_can_be_trained(name: str):
    small = after(shrink(**everything(FAMILIES[name])), tiny_model(name))
    loss = objective(small.config)
    gradient = FAST(jax.grad(lambda p, b: loss(p, b, None, {}).total))(small.params, batch_of(small.config))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient["embed"]["patches" if name == "vit" else "tokens"]).max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_is_the_identity(name: str):
    tiny = tiny_model(name)
    more = dict(decoder_layers=(0, 1)) if tiny.config.architecture == "encoder-decoder" else {}
    whole = dict(mlp=1.0, heads=4, layers=tiny.config.layers, by="activation", **more)
    for change in (shrink(dim=16, **whole), silence(**whole)):
        laws.identity(change, tiny)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        *((name, "random") for name in FAMILIES),
        ("gpt2", "activation"),
        ("t5", "taylor"),
        ("t5", "even"),
        ("llama", "magnitude"),
    ],
)
def test_silenced_first_and_removed_later_is_removed_at_once(name: str, by: str):
    """What contributes nothing is not missed: neurons and heads in every family, layers where norms come before the branches."""
    tiny = tiny_model(name)
    sizes = dict(mlp=10, heads=2)
    if tiny.config.norm_place == "pre":
        sizes |= dict(decoder_layers=1) if name == "t5" else dict(layers=1)
    aux = rows(tiny.config)
    quiet = after(silence(**sizes, by=by), tiny, aux)
    assert quiet.config == tiny.config
    compact = shrink(**sizes, by="magnitude")
    laws.keeps_function(compact, quiet)
    at_once, later = after(shrink(**sizes, by=by), tiny, aux), after(compact, quiet)
    assert at_once.config == later.config
    jax.tree.map(np.testing.assert_array_equal, at_once.params, later.params)


def test_training_leaves_what_is_silenced_silent():
    """Neurons, heads and a layer with its biases; biases of other layers that are zero at the start are trained."""
    tiny = tiny_model("gpt2")
    params = tree.map_with_name(lambda name, x: x * 0 if name.endswith("_bias") else x, tiny.params)
    sizes = dict(mlp=10, heads=2, layers=1)
    change = silence(**sizes)
    quiet = after(change, tiny._replace(params=params))
    rule = change.update(optax.adamw(1e-2, weight_decay=0.1))
    trained, state = quiet.params, rule.init(quiet.params)
    for i in range(3):
        gradient = jax.tree.map(lambda x, i=i: jnp.cos(i + jnp.arange(x.size)).reshape(x.shape), trained)
        updates, state = rule.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
    bias = trained["decoder"]["layers"]["mlp"]["down_bias"]
    assert sorted(np.mean(np.asarray(bias) == 0, axis=1)) == [0, 1]
    assert np.any(trained["decoder"]["layers"]["mlp"]["up"] != quiet.params["decoder"]["layers"]["mlp"]["up"])
    laws.keeps_function(shrink(**sizes), quiet._replace(params=jax.device_get(trained)))
    stated = change.card(trained)["pruned"]
    assert stated["decoder/layers/mlp/down_bias"] == 0.5 and len(stated) == 4
    assert silence(mlp=1.0).masks == () and silence(mlp=1.0).update is IDENTITY.update


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_on_a_mesh_it_is_the_same(name: str):
    tiny = tiny_model(name)
    laws.same_on_mesh(shrink(**everything(tiny.config), by="activation"), tiny, rows(tiny.config))


def test_chain_is_associative():
    tiny = tiny_model("gpt2")
    a, b, c = shrink(layers=1, by="even"), shrink(mlp=0.5), shrink(heads=2, dim=0.5)
    left, right = (after(x, tiny) for x in (chain(chain(a, b), c), chain(a, chain(b, c))))
    assert left.config == right.config
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)


def test_it_is_saved_and_exported(tmp_path):
    tiny = tiny_model("llama")
    change = shrink(**everything(tiny.config, by="taylor", batches=2))
    made = laws.comes_back(change, tiny, tmp_path, rows(tiny.config))
    huggingface.save(made, tmp_path / "hf")
    again = load(tmp_path / "hf")
    np.testing.assert_array_equal(
        laws.logits(again.config, again.params), laws.logits(made.config, jax.device_get(made.params))
    )
    assert isinstance(again, Model) and again.config.head_size == 4 and again.config.dim == 12


def test_magnitude_is_the_norm_of_outgoing_weights():
    for name in ("gpt2", "t5"):
        params = tiny_model(name).params
        scores = FAST(magnitude)(params)
        for path, block, out in blocks(params):
            w = block[out].reshape(*block[out].shape[:2], -1)
            np.testing.assert_allclose(scores[path], np.linalg.norm(w, axis=-1), rtol=1e-5)
        for side in ("encoder", "decoder"):
            if side in params:
                own = [(b, o) for path, b, o in blocks(params) if path.startswith(side)]
                arrays = [x for b, o in own for x in (b[o], b.get(f"{o}_bias")) if x is not None]
                total = sum((x.reshape(len(x), -1) ** 2).sum(1) for x in arrays)
                np.testing.assert_allclose(scores[f"{side}/layers"], np.sqrt(total), rtol=1e-5)
        read = [b[r] for _, b, _ in blocks(params) for r in ("query", "key", "value", "up", "gate") if r in b]
        total = sum((np.moveaxis(x, 1, 0).reshape(16, -1) ** 2).sum(1) for x in read)
        np.testing.assert_allclose(scores["dim"], np.sqrt(total), rtol=1e-5)


@functools.cache
def forward(name: str):
    """(inputs of the products, streams before and after each layer, real tokens) by side, of both batches one after the other."""
    config, params = tiny_model(name)[1:]
    batches = rows(config).batches
    batch = {key: x.reshape(-1, *x.shape[2:]) for key, x in batches.items()}
    two = config.architecture == "encoder-decoder"

    @FAST
    def run(params, batch):
        found = transformer.apply(config, params, batch, inputs=True, hidden_states=True)
        streams = {"encoder" if config.architecture == "encoder" else "decoder": found.hidden_states}
        if two:
            streams["encoder"] = transformer.encode(config, params, batch, keep_hidden=True)[2].hidden
        for side, after in streams.items():
            prefix = "encoder_" if two and side == "encoder" else ""
            places = batch.get(f"{prefix}positions", jnp.arange(config.patches + 1)[None])
            tokens = batch.get(f"{prefix}tokens", batch.get("images"))
            first = Embedding(config).apply({"params": params["embed"]}, tokens, places, batch.get("types"), None)
            streams[side] = jnp.concatenate([first[None], after])
        return found.inputs, streams

    inputs, streams = jax.device_get(run(params, batch))
    sides = {}
    for side, stream in streams.items():
        segments = batch.get("encoder_segment_ids" if two and side == "encoder" else "segment_ids")
        sides[side] = (
            inputs[side]["layers"],
            stream,
            np.ones(stream.shape[1:3], bool) if segments is None else segments > 0,
        )
    return sides


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_activation_is_what_is_added_to_the_stream(name: str):
    tiny = tiny_model(name)
    scores = FAST(activation, static_argnums=0)(tiny.config, tiny.params, rows(tiny.config))
    width = 0
    for side, (inputs, stream, real) in forward(name).items():
        before, now = stream[:-1, real], stream[1:, real]
        cosine = (before * now).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(now, axis=-1)
        np.testing.assert_allclose(scores[f"{side}/layers"], 1 - cosine.mean(-1), atol=1e-5)
        for path, block, out in blocks({side: tiny.params[side]}):
            x = np.asarray(inputs[path.split("/")[-1]][out])[:, real]
            added = np.einsum("lnf,lfd->lnfd" if out == "down" else "lnhe,lhed->lnhd", x, block[out])
            rms = np.sqrt((added**2).sum(-1).mean(1))
            np.testing.assert_allclose(scores[path], rms, rtol=1e-4)
            reads = np.asarray(inputs[path.split("/")[-1]]["up" if out == "down" else "query"])[:, real]
            width = width + (reads**2).mean(1).sum(0)
    np.testing.assert_allclose(scores["dim"], np.sqrt(width), rtol=1e-4)


def test_padding_does_not_count():
    tiny = tiny_model("t5")
    aux = rows(tiny.config)
    other = dict(aux.batches)
    for prefix in ("", "encoder_"):
        padding = other[f"{prefix}segment_ids"] == 0
        assert padding.any()
        other[f"{prefix}tokens"] = np.where(padding, 5, other[f"{prefix}tokens"])
    one, two = (
        FAST(activation, static_argnums=0)(tiny.config, tiny.params, Calibration(x, objective))
        for x in (aux.batches, other)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, two)


def gated(params, gates):
    """The model with a gate on each neuron, head and layer, and on each channel that layers read."""
    made = jax.tree.map(lambda x: x, params)
    for path, _, out in blocks(params):
        side, _, name = path.split("/")
        block, whole = made[side]["layers"][name], gates[f"{side}/layers"]
        units = (gates[path] * whole[:, None])[(..., *(None,) * (block[out].ndim - 2))]
        made[side]["layers"][name] = block = {**block, out: block[out] * units}
        if f"{out}_bias" in block:
            block[f"{out}_bias"] = block[f"{out}_bias"] * whole[:, None]
        for reader in ("query", "key", "value", "up", "gate"):
            if reader in block:
                block[reader] = block[reader] * gates["dim"].reshape(-1, *(1,) * (block[reader].ndim - 2))
    return made


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_taylor_is_the_derivative_by_a_gate(name: str):
    tiny = tiny_model(name)
    aux = rows(tiny.config)
    scores = FAST(taylor, static_argnums=0)(tiny.config, tiny.params, aux)
    ones, params = {path: jnp.ones(x.shape) for path, x in scores.items()}, jax.device_put(tiny.params)

    @FAST
    def slope(batch):
        def mean(gates):
            found = objective(tiny.config)(gated(params, gates), batch, None, {})
            return found.total / found.weight

        return jax.grad(mean)(ones)

    each = [slope({key: x[i] for key, x in aux.batches.items()}) for i in range(2)]
    for path, found in scores.items():
        expected = np.mean([np.abs(x[path]) for x in each], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_each_layer_keeps_its_own_best_neurons():
    tiny = tiny_model("llama")
    old, new = tiny.params["decoder"]["layers"]["mlp"], after(shrink(mlp=7), tiny).params["decoder"]["layers"]["mlp"]
    for i in range(2):
        best = np.sort(np.argsort(-np.linalg.norm(old["down"][i], axis=-1))[:7])
        np.testing.assert_array_equal(new["down"][i], old["down"][i][best])
        np.testing.assert_array_equal(new["up"][i], old["up"][i][:, best])
        np.testing.assert_array_equal(new["gate"][i], old["gate"][i][:, best])


def test_shared_key_value_heads():
    """Whole groups where the number allows, else as many query heads of each."""
    tiny = tiny_model("llama")
    norms = np.linalg.norm(tiny.params["decoder"]["layers"]["attention"]["out"].reshape(2, 4, -1), axis=-1)
    small = after(shrink(heads=0.6), tiny)
    assert (small.config.heads, small.config.kv_heads, small.config.head_dim) == (2, 1, 4)
    old, new = (x.params["decoder"]["layers"]["attention"] for x in (tiny, small))
    for i in range(2):
        group = norms[i].reshape(2, 2).sum(-1).argmax()
        np.testing.assert_array_equal(new["key"][i], old["key"][i][:, [group]])
        np.testing.assert_array_equal(new["query"][i], old["query"][i][:, [2 * group, 2 * group + 1]])

    tiny = tiny_model("llama", kv_heads=1)
    small = after(shrink(heads=3), tiny)
    assert (small.config.heads, small.config.kv_heads) == (3, 1)
    old, new = (x.params["decoder"]["layers"]["attention"] for x in (tiny, small))
    np.testing.assert_array_equal(new["value"], old["value"])
    for i in range(2):
        norms = np.linalg.norm(old["out"][i].reshape(4, -1), axis=-1)
        np.testing.assert_array_equal(new["out"][i], old["out"][i][np.sort(np.argsort(-norms)[:3])])
    assert shrink(heads=0.3).config(FAMILIES["llama"]).heads == 2
    assert shrink(heads=0.3).config(FAMILIES["gpt2"].replace(kv_heads=4)).kv_heads == 1


def test_a_stack_with_relative_positions_keeps_the_same_heads_everywhere():
    tiny = tiny_model("t5")
    small = after(shrink(heads=2), tiny)
    for side in ("encoder", "decoder"):
        old, new = tiny.params[side], small.params[side]
        out = old["layers"]["attention"]["out"]
        norms = np.linalg.norm(out.reshape(*out.shape[:2], -1), axis=-1).sum(0)
        best = np.sort(np.argsort(-norms)[:2])
        np.testing.assert_array_equal(new["relative"]["table"], old["relative"]["table"][:, best])
        np.testing.assert_array_equal(new["layers"]["attention"]["out"], out[:, best])
    cross = tiny.params["decoder"]["layers"]["cross"]["out"]
    best = [np.sort(np.argsort(-np.linalg.norm(w.reshape(4, -1), axis=-1))[:2]) for w in cross]
    for i in range(2):
        np.testing.assert_array_equal(small.params["decoder"]["layers"]["cross"]["out"][i], cross[i][best[i]])


def test_layers_by_index_evenly_and_of_both_sides():
    tiny = tiny_model("gpt2", layers=5)
    for change, kept in (
        (shrink(layers=(0, 2, 3), by="activation"), [0, 2, 3]),
        (shrink(layers=3, by="even"), [0, 2, 4]),
    ):
        small = after(change, tiny)
        assert small.config == tiny.config.replace(layers=3)
        jax.tree.map(
            lambda x, y, kept=kept: np.testing.assert_array_equal(x, y[np.array(kept)]),
            small.params["decoder"]["layers"],
            tiny.params["decoder"]["layers"],
        )
    sides = FAMILIES["marian"].replace(layers=4, decoder_layers=0)
    made = [shrink(**x).config(sides) for x in (dict(layers=2), dict(decoder_layers=0.25), dict(layers=(1,)))]
    assert [(c.encoder_depth, c.decoder_depth) for c in made] == [(2, 4), (4, 1), (1, 4)]


def test_the_scale_of_embeddings_is_kept():
    tiny = tiny_model("marian")
    small = after(shrink(dim=8, by="even"), tiny)
    best = np.round(np.linspace(0, 15, 8)).astype(int)
    np.testing.assert_allclose(
        small.params["embed"]["tokens"] * 8**0.5, tiny.params["embed"]["tokens"][:, best] * 16**0.5, rtol=1e-6
    )
    np.testing.assert_array_equal(
        small.params["encoder"]["layers"]["mlp_norm"]["scale"],
        tiny.params["encoder"]["layers"]["mlp_norm"]["scale"][:, best],
    )


def test_sizes_that_shares_come_to():
    sizes = FAMILIES["gpt2"].replace(dim=96, mlp_dim=0)
    made = shrink(mlp=0.3, dim=0.7, multiple=16).config(sizes)
    assert (made.mlp_dim, made.dim, made.head_dim) == (112, 64, 24)
    assert shrink(dim=0.5).config(sizes).mlp_dim == 384  # no longer 4 * dim
    assert shrink(mlp=1).config(sizes).mlp_dim == 1 and shrink(mlp=0.001).config(sizes).mlp_dim == 1
    assert shrink(dim=0.55).config(FAMILIES["vaswani"].replace(dim=20)).dim == 12  # even, for its sines and cosines
    assert shrink(mlp=0.5).config(sizes).heads == sizes.heads and not shrink(mlp=0.5).config(sizes).head_dim


def test_random_is_drawn_from_the_key():
    tiny = tiny_model("gpt2")
    one, same, other = (
        importance(tiny.config, tiny.params, jax.random.key(seed), None, "random")["decoder/layers/mlp"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


def test_the_label_makes_it_again():
    for change in (
        shrink(mlp=0.5, heads=2, layers=[0, 2], by="taylor", batches=3),
        shrink(dim=0.5, multiple=8),
        silence(layers=(1,), by="activation"),
    ):
        again = eval(change.label)
        assert again.label == change.label and again.calibration == change.calibration
    assert shrink(mlp=0.5, heads=2, by="even").label == "shrink(mlp=0.5, heads=2, by='even')"
    assert shrink(mlp=0.5, by="taylor").calibration == 8
    assert shrink(layers=(0,), by="activation").calibration == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(), "nothing is asked for: give mlp, heads"),
        (dict(mlp=1.5), r"mlp is 1.5: it must be a share to keep, a float in \(0, 1\], or a number"),
        (dict(heads=0), "heads is 0: it must be"),
        (dict(dim=True), "dim is True: it must be"),
        (dict(mlp=(0, 1)), r"mlp is \(0, 1\): it must be"),
        (dict(layers=(2, 1)), "indices to keep are ascending, from 0"),
        (dict(layers=()), "indices to keep are ascending"),
        (dict(mlp=0.5, by="magnitud"), "unknown importance 'magnitud'; did you mean 'magnitude'"),
        (dict(mlp=0.5, multiple=0), "multiple is 0: it must be at least 1"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ConfigError, match=said):
        shrink(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("gpt2", dict(mlp=25), "mlp is 25, but the model has 24"),
        ("gpt2", dict(mlp=0.99), "mlp is 0.99, which keeps all 24: give a smaller share"),
        ("llama", dict(heads=0.8), "heads is 0.8, which keeps all 4: give a smaller share"),
        ("gpt2", dict(layers=(0, 2)), r"layers is \(0, 2\), but the last of 2 layers is 1"),
        ("gpt2", dict(decoder_layers=1), "decoder_layers is for an encoder-decoder; layers are those of this decoder"),
        ("t5", dict(decoder_layers=3), "decoder_layers is 3, but the model has 2"),
        ("llama", dict(heads=3), "heads is 3, but 4 query heads share 2 key-value heads: of them 2 can be kept"),
        ("vaswani", dict(dim=7), "sinusoidal positions need an even model.dim, not 7"),
    ],
)
def test_what_does_not_go_with_the_model(name, arguments, said):
    with pytest.raises(ConfigError, match=said):
        shrink(**arguments).config(FAMILIES[name])


def test_factors_of_low_rank_are_merged_first():
    with pytest.raises(ConfigError, match=r"factors of low rank beside them: chain\(merge_lora\(\), silence"):
        silence(mlp=0.5).config(FAMILIES["llama"].replace(lora_rank=2))


def test_rows_are_needed():
    tiny = tiny_model("gpt2")
    with pytest.raises(
        ConfigError, match=r"by='taylor' looks at rows of text: it needs aux=Calibration\(batches, loss\)"
    ):
        laws.changed(shrink(mlp=0.5, by="taylor"), tiny)
