"""Growth: the laws over every family, each formula in NumPy, what the gradients of the larger model are, and the optimizer's state."""

import json
import re

import jax
import numpy as np
import optax
import pytest
import tokenizers

from llm_jax import sharding, tree
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.models import transformer
from llm_jax.transforms.base import IDENTITY, Transform, chain
from llm_jax.transforms.extend_vocabulary import extend_vocabulary, pieces_of
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.grow_depth import grow_depth
from llm_jax.transforms.grow_width import grow_width
from llm_jax.transforms.lengthen import lengthen
from llm_jax.transforms.merge import merge
from llm_jax.transforms.moments import carry, carry_moments
from llm_jax.transforms.moving_average import moving_average
from llm_jax.transforms.prune import keep_zeros, prune
from llm_jax.transforms.shrink import shrink
from tests.families import FAMILIES, Tiny, batch_of, tiny_model
from tests.transforms import laws

EVERY = pytest.mark.parametrize("family", FAMILIES)
PRE = [name for name, config in FAMILIES.items() if config.norm_place == "pre"]
SINES = [name for name, config in FAMILIES.items() if config.positions.startswith("sinusoidal")]
TEXT = [name for name, config in FAMILIES.items() if not config.patch_size]
WIDER = dict(mlp_dim=40, heads=8)
PIECES = ((3, 5, 9), (7,), ())
KEY = jax.random.key(0)


def headed(family):
    """The family's model; BERT with a classification head, since without one its output has the width of its channels."""
    return tiny_model(family, **(dict(head="classification") if family == "bert" else {}))


def leaves(params):
    return dict(zip(tree.names(params), jax.tree.leaves(params)))


def widest(family):
    return grow_width(**WIDER, dim=0 if family in SINES else 32)


# Depth


@pytest.mark.parametrize(
    "family, how", [("gpt2", "stack"), ("t5", "stack"), *((f, "zero" if f in PRE else "interleave") for f in FAMILIES)]
)
def test_each_layer_is_a_copy(family, how):
    tiny = tiny_model(family)
    config, params = laws.changed(grow_depth(5, how=how), tiny)
    assert (
        config.layers == 5
        and config.decoder_depth == {"encoder": 0, "decoder": 5, "encoder-decoder": 2}[config.architecture]
    )
    for name, x in leaves(tiny.params).items():
        side, _, rest = name.partition("/")
        count = config.encoder_depth if side == "encoder" else config.decoder_depth
        if not rest.startswith("layers/") or count == x.shape[0]:
            expected = x
        elif how == "stack":
            expected = np.concatenate([x] * 5)[:5]
        else:
            expected = np.repeat(x, {1: [5], 2: [3, 2]}[x.shape[0]], axis=0)
            if how == "zero" and name.split("/")[-1] in ("out", "out_bias", "down", "down_bias"):
                first = {1: [0], 2: [0, 3]}[x.shape[0]]
                expected = np.where(np.isin(np.arange(5), first).reshape(-1, *[1] * (x.ndim - 1)), expected, 0)
        np.testing.assert_array_equal(leaves(params)[name], expected, name)


def test_layers_that_add_nothing_keep_the_function_and_can_be_taken_out_again():
    tiny = tiny_model("t5")
    change = grow_depth(3, decoder_layers=5, how="zero")
    laws.keeps_function(change, tiny, atol=1e-6)
    params = laws.changed(change, tiny)[1]
    for side, first in (("encoder", [0]), ("decoder", [0, 3])):
        again = jax.tree.map(lambda x, i=first: x[np.array(i)], params[side]["layers"])
        jax.tree.map(np.testing.assert_array_equal, again, tiny.params[side]["layers"])


def test_depth_of_a_decoder_beside_an_encoder():
    tiny = tiny_model("marian")
    config, params = laws.changed(grow_depth(2, decoder_layers=4), tiny)
    assert (config.encoder_depth, config.decoder_depth) == (2, 4)
    assert params["decoder"]["layers"]["cross"]["query"].shape[0] == 4
    assert laws.changed(grow_depth(4, decoder_layers=4), tiny)[0].decoder_layers == 0  # as many as the encoder


# Width


@pytest.mark.parametrize("family, how", [("llama", "random"), ("t5", "cycle")])
def test_neurons_and_heads_are_copied_and_their_outgoing_weights_shared(family, how):
    tiny = tiny_model(family)
    config, params = laws.changed(grow_width(**WIDER, how=how), tiny)
    assert (config.mlp_size, config.heads, config.head_size) == (40, 8, tiny.config.head_size)
    assert config.heads // config.kv_size == tiny.config.heads // tiny.config.kv_size
    old, new = tiny.params["decoder"]["layers"], params["decoder"]["layers"]
    np.testing.assert_array_equal(new["mlp"]["up"][..., :24], old["mlp"]["up"])  # what was there is there
    np.testing.assert_array_equal(new["attention"]["query"][:, :, :4], old["attention"]["query"])
    index = np.abs(new["mlp"]["up"][0][:, :, None] - old["mlp"]["up"][0][:, None]).sum(0).argmin(1)
    if how == "cycle":
        np.testing.assert_array_equal(index, np.arange(40) % 24)
    shares = np.bincount(index)[index][:, None]
    np.testing.assert_allclose(new["mlp"]["down"], old["mlp"]["down"][:, index] / shares, rtol=1e-6)
    if how == "cycle":
        np.testing.assert_allclose(new["attention"]["out"][:, 4:], old["attention"]["out"] / 2, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_begins_silent_can_be_taken_away_again(family):
    """shrink(grow(x)) == x, bit for bit and with the zeros that are masks, whatever the noise."""
    tiny = laws.with_zeros(tiny_model(family))
    change = grow_width(**WIDER, how="zero", noise=0.3)
    laws.keeps_function(change, tiny)
    wider, grown = laws.changed(change, tiny)
    back = shrink(mlp=tiny.config.mlp_size, heads=tiny.config.heads)
    config, params = laws.changed(back, tiny._replace(config=wider, params=grown))
    assert transformer.shapes(config) == transformer.shapes(tiny.config)
    laws.equal(params, tiny.params)


@pytest.mark.parametrize("how", ["stack", "interleave", "zero"])
def test_layers_can_be_taken_away_again(how):
    """shrink(grow(x)) == x: those that stay are named."""
    tiny = tiny_model("gpt2")
    config, params = laws.changed(grow_depth(4, how=how), tiny)
    stays = (0, 1) if how == "stack" else (0, 2)
    back, again = laws.changed(shrink(layers=stays), tiny._replace(config=config, params=params))
    assert back == tiny.config
    laws.equal(again, tiny.params)


def test_channels_come_as_often_as_the_factor_says():
    config, params = laws.changed(grow_width(dim=48), tiny_model("t5"))
    assert (config.dim, config.head_size, config.mlp_size) == (48, 6, 24)
    old = tiny_model("t5").params
    np.testing.assert_array_equal(params["embed"]["tokens"], np.tile(old["embed"]["tokens"], 3))
    up = np.tile(old["encoder"]["layers"]["mlp"]["up"], (1, 3, 1)) / 3
    np.testing.assert_allclose(params["encoder"]["layers"]["mlp"]["up"], up, rtol=1e-6)
    np.testing.assert_allclose(
        params["decoder"]["norm"]["scale"], np.tile(old["decoder"]["norm"]["scale"], 3) / 3**0.5, rtol=1e-6
    )


def test_channels_of_a_model_without_a_head_come_repeated():
    tiny = tiny_model("bert")
    before = laws.logits(tiny.config, tiny.params)
    after = laws.logits(*laws.changed(grow_width(dim=32), tiny))
    np.testing.assert_allclose(after, np.tile(before, 2), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm_place="post", embedding_scale=True),
        dict(embedding_scale=True, logits_scale=True, logits_bias=True, lora_rank=2, lora_targets=(".*",)),
    ],
)
def test_tied_logits_stay_whatever_is_scaled(changes):
    laws.keeps_function(grow_width(dim=32, **WIDER), tiny_model("gpt2", **changes))


@pytest.mark.parametrize(
    "sizes, groups",
    [(dict(heads=8), (8, 4)), (dict(heads=6, kv_heads=2), (6, 2)), (dict(heads=12, kv_heads=3), (12, 3))],
)
def test_grouped_queries(sizes, groups):
    tiny = tiny_model("llama")  # 4 query heads over 2 key-value heads
    for how in ("random", "zero"):
        laws.keeps_function(grow_width(**sizes, how=how), tiny)
    config = grow_width(**sizes).config(tiny.config)
    assert (config.heads, config.kv_size) == groups


def test_noise_reaches_the_copies_alone():
    tiny = tiny_model("gpt2")
    exact, noisy = (leaves(laws.changed(grow_width(mlp_dim=32, noise=x), tiny)[1]) for x in (0.0, 0.1))
    differs = {name for name, x in exact.items() if not np.array_equal(x, noisy[name])}
    assert differs == {"decoder/layers/mlp/up"}
    up = "decoder/layers/mlp/up"
    np.testing.assert_array_equal(noisy[up][..., :24], exact[up][..., :24])
    added = (noisy[up] - exact[up])[..., 24:]
    assert 0.07 < added.std() / exact[up].std() < 0.13


BOTH = dict(dim=32, mlp_dim=40, heads=8)


@pytest.mark.parametrize(
    "change, copied",
    [
        (grow_width(**BOTH, noise=0.1), grow_width(**BOTH)),
        (grow_depth(4, how="stack"), grow_depth(4, how="stack")),
        (grow_depth(4, how="zero"), grow_depth(4, how="interleave")),
    ],
    ids=["noise", "stack", "zero"],
)
def test_copies_of_a_pruned_weight_are_pruned(change, copied):
    """And no other weight is, though it begin at zero."""
    tiny = laws.with_zeros(tiny_model("llama"))
    marks = jax.tree.map(lambda x: np.where(laws.gone(x), 0, 1).astype(np.float32), tiny.params)
    _, marks = laws.changed(copied, Tiny("", tiny.config, marks))
    found = leaves(laws.changed(change, tiny)[1])
    assert all(laws.gone(found[f"decoder/layers/{name}"]).mean() > 0.1 for name in ("attention/out", "mlp/down"))
    for name, x in found.items():
        np.testing.assert_array_equal(laws.gone(x), leaves(marks)[name] == 0, err_msg=name)


# Vocabulary and length


@pytest.mark.parametrize("family", ["gpt2", "llama", "marian", "roberta"])
def test_new_rows_are_means(family):
    tiny = tiny_model(family)
    config, params = laws.changed(extend_vocabulary(PIECES), tiny)
    assert config.vocab_size == 100
    grown = 0
    for name, x in leaves(params).items():
        old = leaves(tiny.params)[name]
        if x.shape != old.shape:
            grown += 1
            np.testing.assert_array_equal(x[:97], old)
            rows = [old[[3, 5, 9]].mean(0), old[7], old.mean(0)]
            np.testing.assert_allclose(x[97:], np.array(rows), atol=1e-6, err_msg=name)
    assert grown == {"gpt2": 1}.get(family, 2)  # the table, and an unembedding or a bias of its own


def test_a_new_row_is_pruned_where_all_its_pieces_are():
    """And a weight at zero that is not pruned, -0, stays one: a mean of such would be 0, a mask."""
    tiny = tiny_model("gpt2")
    table = np.array(tiny.params["embed"]["tokens"])
    table[[3, 5, 9], 0], table[3, 1], table[[3, 5, 9], 2], table[7, 3] = 0.0, 0.0, -0.0, 0.0
    params = {**tiny.params, "embed": {**tiny.params["embed"], "tokens": table}}
    _, params = laws.changed(extend_vocabulary(PIECES), Tiny("", tiny.config, params))
    new = np.asarray(params["embed"]["tokens"][97:])
    np.testing.assert_array_equal(np.argwhere(laws.gone(new)), [[0, 0], [1, 3]])
    assert new[0, 2] == 0 and new[0, 1] != 0


def test_spare_rows_are_used_first():
    tiny = tiny_model("llama")
    config, params = laws.changed(extend_vocabulary(2, start=90), tiny)
    assert config == tiny.config
    for new, old in (
        (params["embed"]["tokens"], tiny.params["embed"]["tokens"]),
        (params["head"]["kernel"], tiny.params["head"]["kernel"]),
    ):
        np.testing.assert_array_equal(np.delete(new, [90, 91], 0), np.delete(old, [90, 91], 0))
        np.testing.assert_allclose(new[90:92], np.stack([old[:90].mean(0)] * 2), atol=1e-6)
    assert extend_vocabulary(9, start=90).config(tiny.config).vocab_size == 99


def test_the_pieces_of_byte_level_bpe(tokenizer):
    rules = json.loads(tokenizer.definition)
    first = len(tokenizers.Tokenizer.from_str(tokenizer.definition).get_vocab())
    assert first == tokenizer.vocab_size
    for name in ("ĠConstitutionality", "Ã©tÃ©"):
        rules["model"]["vocab"][name] = len(rules["model"]["vocab"])
    special = {
        "content": "<|user|>",
        "id": first + 2,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    rules["added_tokens"].append(special)
    new = Tokenizer(json.dumps(rules), tokenizer.config)
    found = pieces_of(tokenizer, new)
    assert len(found) == new.vocab_size - first == 3
    assert [tokenizer.decode(ids) for ids in found] == [" Constitutionality", "été", "<|user|>"]
    assert found[0] == tuple(tokenizer.encode(" Constitutionality").tolist())
    model = tiny_model("gpt2", vocab_size=first)
    assert extend_vocabulary(found).config(model.config).vocab_size == new.vocab_size
    with pytest.raises(DataError, match="in the old tokenizer and .* in the new: ids must stay"):
        pieces_of(new, load_tokenizer("bpe:300", ["aa aa aa"] * 9))


def test_the_pieces_of_wordpiece():
    old = load_tokenizer("wordpiece:60", ["playing play saying say king"] * 9)
    rules = json.loads(old.definition)
    for name in ("playings", "##yingking", "a☃"):
        rules["model"]["vocab"][name] = len(rules["model"]["vocab"])
    found = pieces_of(old, Tokenizer(json.dumps(rules), old.config))
    names = {i: name for name, i in tokenizers.Tokenizer.from_str(old.definition).get_vocab().items()}
    spelled = [[names[i] for i in ids] for ids in found]
    assert "".join(spelled[0]).replace("##", "") == "playings" and not spelled[0][0].startswith("##")
    assert "".join(spelled[1]).replace("##", "") == "yingking" and all(x.startswith("##") for x in spelled[1])
    assert spelled[2] == []


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_a_longer_table_of_positions(family):
    tiny = tiny_model(family)
    offset, old = tiny.config.position_offset, tiny.params["embed"]["positions"]
    for how in ("", "interpolate"):
        change = lengthen(80, how)
        laws.same_tree(change, tiny)
        config, params = laws.changed(change, tiny)
        assert config == tiny.config.replace(max_length=80)
        new = params["embed"]["positions"]
        np.testing.assert_array_equal(new[:offset], old[:offset])
        if how:
            at = np.linspace(0, 31, 80)
            expected = np.stack([np.interp(at, np.arange(32), column) for column in old[offset:].T], 1)
            np.testing.assert_allclose(new[offset:], expected, atol=1e-5)
        else:
            np.testing.assert_array_equal(new[offset:], np.concatenate([old[offset:]] * 3)[:80])
            np.testing.assert_array_equal(laws.logits(config, params), laws.logits(tiny.config, tiny.params))


def test_a_slower_rotation():
    sizes = FAMILIES["llama"]
    made = lengthen(128).config(sizes)
    assert made.max_length == 128 and made.rotary_base == pytest.approx(1e4 * 4 ** (4 / 2))  # E = 4
    rates = lambda base: base ** (-np.arange(2) / 2)  # noqa: E731
    np.testing.assert_allclose(
        rates(made.rotary_base) / rates(1e4), [1, 1 / 4]
    )  # the fastest as before, the slowest 4 times slower
    assert lengthen(128, base=5e5).config(sizes).rotary_base == 5e5
    for family in ("t5", "marian", "vaswani"):
        assert lengthen(128).config(FAMILIES[family]) == FAMILIES[family].replace(max_length=128)


# The laws for all of them


@EVERY
def test_the_same_size_is_the_same_model(family):
    tiny = tiny_model(family)
    sizes = tiny.config
    every = [
        grow_depth(sizes.layers, decoder_layers=sizes.decoder_layers),
        grow_width(),
        grow_width(dim=16, mlp_dim=24, heads=4),
    ]
    if not sizes.patch_size:
        every += [extend_vocabulary(0), extend_vocabulary(()), lengthen(32)]
    laws.identity(chain(*every), tiny)
    for change in every:
        assert eval(change.label).label == change.label


@EVERY
def test_all_at_once_keeps_the_function_also_on_a_mesh(family):
    """Law 1, 3 and 5: wider, deeper where that keeps the function, new tokens, and longer rows where those before do not change."""
    tiny = headed(family)
    changes = [widest(family)]
    if family in PRE:
        changes.append(grow_depth(3, how="zero"))
    if family in TEXT:
        changes.append(extend_vocabulary(PIECES))
        changes += [lengthen(40)] if tiny.config.positions != "rotary" else []
    change = chain(*changes)
    laws.same_tree(change, tiny)
    config, params = laws.changed(change, tiny)
    batch = batch_of(tiny.config)
    before, after = (
        np.asarray(laws._logits(*model, batch)) for model in ((tiny.config, tiny.params), (config, params))
    )
    np.testing.assert_allclose(after[..., : before.shape[-1]], before, atol=1e-5 * max(1, np.abs(before).max()))
    if config.head in ("lm", "mlm"):
        np.testing.assert_allclose(
            after[..., 97], np.mean(before[..., [3, 5, 9]], -1), atol=2e-5 * np.abs(before).max()
        )
    laws.same_on_mesh(change, tiny)


@pytest.mark.parametrize("family", ["t5"])
def test_it_comes_back(family, tmp_path):
    laws.comes_back(
        chain(widest(family), grow_depth(3, how="zero"), extend_vocabulary(PIECES), lengthen(40)),
        tiny_model(family),
        tmp_path,
    )


# Gradients and moments


def gradient(config, params):
    """Of a sum of the logits with random signs."""
    batch = batch_of(config)

    def total(params):
        found = transformer.apply(config, params, batch).logits
        return (found * np.sign(np.random.default_rng(1).standard_normal(found.shape))).sum()

    return jax.device_get(jax.jit(jax.grad(total), compiler_options=laws.FAST)(params))


@pytest.mark.parametrize(
    "family, how", [("roberta", "random"), ("llama", "random"), ("t5", "random"), ("llama", "zero"), ("t5", "zero")]
)
def test_the_gradients_of_the_wider_model_are_those_that_growth_says(family, how):
    tiny = tiny_model(family, layers=1, decoder_layers=int(family == "t5"))
    change = grow_width(dim=32, mlp_dim=40, heads=8, how=how)
    config, params = laws.changed(change, tiny)
    before, after = gradient(tiny.config, tiny.params), gradient(config, params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(after))
    for kind, power in (("gradients", 1), ("squares", 2)):
        said = grown(change, tiny.config, jax.tree.map(lambda x, p=power: x**p, before), kind)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(said), jax.tree.leaves(after)):
            atol = 2e-5 * np.abs(y**power).max() + 1e-7 * largest**power  # the bias of the keys has none but rounding
            np.testing.assert_allclose(x, y**power, atol=atol, err_msg=str(path))


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 100)))


def quick(function, **options):
    return jax.jit(function, compiler_options=laws.FAST, **options)


def grown(change, config, params, kind="weights"):
    """The weights after a growth, or gradients, or their squares."""
    return quick(getattr(change.params, kind), static_argnums=0)(config, params, KEY)


def warm(optimizer, tiny, frozen):
    """The state after two updates of all params but those that the regex matches."""
    state = quick(optimizer.init)(tiny.params)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        drawn = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in leaves(tiny.params).items()}
        gradients = tree.map_with_name(
            lambda name, _, d=drawn: None if re.match(frozen, name) else d[name], tiny.params
        )
        state = quick(lambda *x: optimizer.update(*x)[1])(gradients, state, tiny.params)
    return state


def carried(change, tiny, optimizer, frozen="nothing"):
    """(state before, state that was carried, report, params after)."""
    old = warm(optimizer, tiny, frozen)
    config, params = tiny.config, tiny.params
    for one in (change,) if isinstance(change, Transform) else change:
        params, config = grown(one, config, params), one.config(config)
    fresh = quick(optimizer.init)(params)
    state, report = carry(change, tiny.config, old, fresh, KEY)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(fresh)]
    gradients = tree.map_with_name(lambda name, x: None if re.match(frozen, name) else np.ones_like(x), params)
    quick(optimizer.update)(gradients, state, params)  # goes on
    return old, state, report, params


def test_moments_follow_their_weights():
    tiny = tiny_model("llama")
    change = grow_width(**WIDER)
    old, new, report, _ = carried(change, tiny, OPTIMIZER)
    for kind, name in (("gradients", "mu"), ("squares", "nu")):
        expected = grown(change, tiny.config, getattr(old[1][0], name), kind)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), getattr(new[1][0], name), expected)
    counts = [int(x) for name, x in leaves(new).items() if name.endswith("count")]
    assert counts == [2, 0]  # that of the moments, and that of the schedule, which begins anew
    count = len(jax.tree.leaves(tiny.params))
    kept, reset = report.split("\n")
    assert (
        f"1/0/mu ({count} arrays)" in kept
        and f"1/0/nu ({count} arrays)" in kept
        and reset == "reset: 1/2/count (1 array)"
    )


def test_moments_of_new_layers():
    tiny = tiny_model("gpt2")
    old, new, _, _ = carried(grow_depth(4, how="zero"), tiny, OPTIMIZER)
    before, after = old[1][0], new[1][0]
    for name, x in leaves(before.nu["decoder"]["layers"]).items():
        np.testing.assert_array_equal(leaves(after.nu["decoder"]["layers"])[name], np.asarray(x)[[0, 0, 1, 1]])
    for name, x in leaves(before.mu["decoder"]["layers"]).items():
        expected = np.array(x)[[0, 0, 1, 1]]
        expected[[1, 3]] = 0
        np.testing.assert_array_equal(leaves(after.mu["decoder"]["layers"])[name], expected)


def test_moments_go_through_a_chain_and_lie_on_a_mesh_as_on_one_device(mesh):
    tiny = tiny_model("llama")
    changes = (grow_depth(4, how="interleave"), grow_width(**BOTH, how="cycle"), extend_vocabulary(PIECES))
    old, expected, told, params = carried(changes, tiny, OPTIMIZER)
    config = chain(*changes).config(tiny.config)
    many = mesh(data=2, fsdp=2, tensor=2)

    def placed(sizes, state):
        shapes = transformer.shapes(sizes)
        own = sharding.params_shardings(many, transformer.axes(sizes), shapes)
        return jax.device_put(state, sharding.state_shardings(many, state, shapes, own))

    with jax.set_mesh(many):
        fresh = placed(config, quick(OPTIMIZER.init)(params))
        for change in (changes, chain(chain(*changes[:2], IDENTITY), carry_moments(), changes[2])):
            found, report = carry(change, tiny.config, placed(tiny.config, old), fresh, KEY)
            assert report == told and jax.tree.structure(found) == jax.tree.structure(expected)
            for (name, x), y, z in zip(leaves(found).items(), jax.tree.leaves(expected), jax.tree.leaves(fresh)):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9, err_msg=name)
                assert x.sharding.is_equivalent_to(z.sharding, x.ndim), name
    with pytest.raises(ConfigError, match=r"prune\(0.5\), grow_depth\(.*\) does not say what becomes of"):
        carry(chain(prune(0.5), changes[0]), tiny.config, old, old, KEY)


def test_moments_under_freezing_and_averages_of_several_growths():
    tiny = tiny_model("gpt2")
    changes = (grow_width(mlp_dim=30), extend_vocabulary(PIECES), lengthen(40), grow_depth(3))
    optimizer = chain(moving_average(0.9), freeze(["embed/.*"])).update(OPTIMIZER)
    old, new, report, _ = carried(changes, tiny, optimizer, "embed/")
    assert old.average["embed"]["tokens"] is None is new.average["embed"]["tokens"]
    config, average = tiny.config, tree.merge(old.average, tiny.params)
    for change in changes:
        average, config = grown(change, config, average), change.config(config)
    for name, x in leaves(new.average).items():
        np.testing.assert_allclose(x, leaves(average)[name], rtol=1e-5, atol=1e-7)
    assert report.endswith("reset: 1/2/count (1 array)") and "average" in report  # of the schedule, which begins anew


@pytest.mark.parametrize("outside", [True, False])
def test_the_average_of_what_a_mask_removed_is_zero(outside):
    """It is kept of the weights behind the mask too, and no mask goes on into another run."""
    tiny, name, average = tiny_model("gpt2"), "decoder/layers/mlp/up", moving_average(0.9)
    pruned = prune(0.5, schedule=(0, 4, 1), straight_through=True)
    change = chain(pruned, average) if outside else chain(average, pruned)
    old, fresh = (quick(each.update(OPTIMIZER).init)(tiny.params) for each in (change, average))
    gone = np.arange(leaves(tiny.params)[name].shape[1])[:, None] % 2 == 0
    old = tree.map_with_name(lambda path, x: x & ~gone if path.endswith(f"mask/kept/{name}") else x, old)
    found, _ = carry((), tiny.config, old, fresh, KEY)
    for path, x in leaves(found.average).items():
        before = leaves(tiny.params)[path]
        np.testing.assert_array_equal(x, np.where(gone, 0, before) if path == name else before, path)


@pytest.mark.parametrize(
    "before, after",
    [
        (IDENTITY, prune(0.5, schedule=(0, 4, 1))),
        (prune(0.5, schedule=(0, 4, 1)), moving_average(0.9)),
        (chain(prune(0.5, schedule=(0, 4, 1), straight_through=True), moving_average(0.9)), prune(0.5, schedule=(0, 4, 1))),
    ],
    ids=["unpruned to pruned", "pruned to averaged", "averaged to pruned"],
)  # fmt: skip
def test_moments_go_from_one_update_to_another(before, after):
    """What changes of the update keep around the optimizer's state hides it not, and begins anew."""
    tiny, changes = tiny_model("gpt2"), (grow_depth(4), keep_zeros(".*/mlp/up"), after)
    config = chain(*changes).config(tiny.config)
    plain, _, _, _ = carried(grow_depth(4), tiny, OPTIMIZER)
    old = quick(before.update(OPTIMIZER).init)(tiny.params)
    state = old
    while hasattr(state, "inner"):
        state = state.inner
    # the moments that a step would have left, in the place where the update before kept them
    held = jax.tree.unflatten(jax.tree.structure(old), [
        leaves(plain).get(name.replace("inner/", ""), x) for name, x in leaves(old).items()
    ])  # fmt: skip
    fresh = quick(after.update(OPTIMIZER).init)(quick(lambda: transformer.init(config, KEY))())
    found, report = carry(changes, tiny.config, held, fresh, KEY)
    expected, _ = carry(grow_depth(4), tiny.config, plain, quick(OPTIMIZER.init)(transformer.init(config, KEY)), KEY)
    for name, x in leaves(expected).items():
        np.testing.assert_array_equal(leaves(found)[f"inner/{name}"], x, name)
    kept, reset = report.split("\n")
    assert "1/0/mu" in kept and "1/0/nu" in kept and "mu" not in reset
    if hasattr(found, "step"):
        assert int(found.step) == 0 and "step" in reset


def test_moments_beside_two_averages():
    change = chain(moving_average(0.9), moving_average(0.99))
    _, _, report, _ = carried(grow_depth(3), tiny_model("gpt2"), change.update(OPTIMIZER))
    assert "1/0/mu" in report.split("\n")[0] and "average" in report.split("\n")[0]


def test_what_cannot_be_carried_starts_afresh():
    tiny = tiny_model("gpt2")
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    old, new, report, _ = carried(grow_width(mlp_dim=48), tiny, optimizer)
    found = {name: leaves(new)[name] for name in leaves(new) if "v_row/" in name}
    for name, x in found.items():
        larger = "/mlp/" in name and not name.endswith("down_bias")
        np.testing.assert_array_equal(x, np.zeros(x.shape) if larger else leaves(old)[name], name)
    assert "v_row (3 arrays)" in report.split("reset: ")[1]
    assert [int(x) for name, x in leaves(new).items() if name.endswith("0/count")] == [0]
    with pytest.raises(ConfigError, match=r"merge\(.*\) does not say what becomes of an optimizer's moments"):
        carry(merge(), tiny.config, old, old, KEY)


# What is refused


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("gpt2", lambda: grow_depth(1), "1 layers are fewer than the 2 of the decoder: shrink takes away"),
        ("gpt2", lambda: grow_depth(0), "layers must be at least 1"),
        ("gpt2", lambda: grow_depth(3, how="stak"), "unknown how 'stak'; did you mean 'stack'"),
        (
            "gpt2",
            lambda: grow_depth(3, decoder_layers=3),
            "decoder_layers is for an encoder-decoder, not for a decoder",
        ),
        ("bert", lambda: grow_depth(3, how="zero"), "does not keep the function of a post-norm model"),
        (
            "marian",
            lambda: grow_depth(2, decoder_layers=3, how="zero"),
            "does not keep the function of a post-norm model",
        ),
        ("gpt2", lambda: grow_width(dim=24), "dim 24 is not a multiple of the model's 16: norms keep"),
        ("marian", lambda: grow_width(dim=32), "dim cannot grow where positions are sinusoidal_split"),
        ("vaswani", lambda: grow_width(dim=32), "dim cannot grow where positions are sinusoidal"),
        ("gpt2", lambda: grow_width(mlp_dim=23), "mlp_dim=23 is less than the model's 24: shrink takes away"),
        ("gpt2", lambda: grow_width(mlp_dim=-1), "must not be negative"),
        ("gpt2", lambda: grow_width(how="rndom"), "unknown how 'rndom'; did you mean 'random'"),
        ("llama", lambda: grow_width(heads=5), "5 heads are no whole groups of the model's 2: or state kv_heads"),
        (
            "llama",
            lambda: grow_width(heads=7, kv_heads=3),
            "each must serve a whole number of them, 2 or more as before",
        ),
        ("llama", lambda: grow_width(kv_heads=4), "each must serve a whole number of them, 2 or more as before"),
        ("vit", lambda: extend_vocabulary(1), "the model reads images, it has no vocabulary"),
        ("gpt2", lambda: extend_vocabulary(-1), "the number of new tokens must not be negative"),
        ("gpt2", lambda: extend_vocabulary([(97,)]), "piece 97 is no id of the 97 old tokens"),
        ("gpt2", lambda: extend_vocabulary(1, start=98), "start is 98, the table has 97 rows"),
        ("gpt2", lambda: lengthen(31), "31 tokens are fewer than model.max_length 32"),
        ("gpt2", lambda: lengthen(0), "it must be at least 1"),
        ("gpt2", lambda: lengthen(40, "rotary"), "positions are learned, not rotary"),
        ("llama", lambda: lengthen(40, "tile"), "positions are rotary, not learned"),
        ("llama", lambda: lengthen(40, "interpolate"), "cannot say that rotary positions are divided"),
        ("llama", lambda: lengthen(40, base=-1), "it must be above 0"),
        ("vit", lambda: lengthen(400), "the rows of an image model are its patches"),
    ],
)
def test_refusals(family, change, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        change().config(FAMILIES[family])
