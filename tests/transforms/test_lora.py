"""LoRA: the function stays at the start, the factors alone are trained, and folded in they are W + alpha/r A B."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from llm_jax import flops, optim, tree
from llm_jax.config import Optimizer, Schedule, to_dict
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.interop import families, huggingface
from llm_jax.model import Model, transform
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import multiply, weight
from llm_jax.step import differentiate, init_state, make_step
from llm_jax.tasks import NextToken
from llm_jax.transforms import IDENTITY, chain, densify, keep_zeros
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.lora import lora, merge_lora
from tests.families import FAMILIES, Tiny, batch_of, random_params, tiny_model
from tests.transforms import laws

CHANGE = lora(2, alpha=3.0)
EVERYWHERE = dict(lora_rank=3, lora_alpha=2.0, lora_targets=(".*",))


def leaves(params):
    return dict(zip(tree.names(params), jax.tree.leaves(params)))


def is_factor(name):
    return name.endswith(("_lora_a", "_lora_b"))


def folded(config, params):
    """The weights W + s A B, in NumPy."""
    every, scale = leaves(params), config.lora_alpha / config.lora_rank

    def one(name, w):
        if f"{name}_lora_a" not in every:
            return every[name]
        a, b = every[f"{name}_lora_a"], every[f"{name}_lora_b"]
        return np.stack([w + scale * np.tensordot(a, b, 1) for w, a, b in zip(every[name], a, b)])

    return tree.map_with_name(one, transformer.shapes(config.replace(lora_rank=0)))


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_start_the_function_is_what_it_was(name):
    tiny = tiny_model(name)
    laws.same_tree(CHANGE, tiny)
    laws.keeps_function(CHANGE, tiny, atol=1e-6)
    config, params = laws.changed(CHANGE, tiny)
    old, new = leaves(tiny.params), leaves(params)
    attentions = 3 if config.architecture == "encoder-decoder" else 1
    assert len(new) - len(old) == 2 * 2 * attentions and all(map(is_factor, new.keys() - old.keys()))
    for path, x in new.items():
        if path.endswith("_lora_a"):
            assert 0.5 < x.std() * config.dim**0.5 < 1.5, path
        elif path.endswith("_lora_b"):
            assert not x.any(), path
        else:
            np.testing.assert_array_equal(x, old[path], err_msg=path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_that_of_the_folded_weights(name):
    """Factors beside every product, and weights of no factor at zero."""
    config = FAMILIES[name].replace(**EVERYWHERE)
    tiny = Tiny(name, config, random_params(config))
    assert sum(map(is_factor, leaves(tiny.params))) == 2 * sum(
        any(path.endswith(f"/layers/{product}") for product in config.products) for path in leaves(tiny.params)
    )
    plain, expected = FAMILIES[name], folded(config, tiny.params)
    said = laws.logits(config, tiny.params)
    np.testing.assert_allclose(said, laws.logits(plain, expected), atol=2e-5 * np.abs(said).max())
    laws.same_tree(merge_lora(), tiny)
    made, merged = laws.changed(merge_lora(), tiny)
    assert made == plain
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected)
    without = tiny._replace(params=tree.map_with_name(lambda n, x: 0 * x if n.endswith("_lora_b") else x, tiny.params))
    assert np.abs(laws.logits(config, without.params) - said).max() > 0.01


def test_a_cache_reads_the_factors():
    """Decoding token by token, with the encoder's keys and values made once, says what the whole row says."""
    config = FAMILIES["t5"].replace(**EVERYWHERE)
    params, batch = random_params(config), {n: x[:1] for n, x in batch_of(config).items()}
    batch = {n: x for n, x in batch.items() if n in ("tokens", "encoder_tokens")}

    def decode(params):
        cache = transformer.cross_cache(config, params, batch, transformer.empty_cache(config, 1, 11))
        said = []
        for part in np.split(batch["tokens"], [6], axis=1):
            positions = np.arange(part.shape[1])[None] + (0 if not said else 6)
            out = transformer.apply(config, params, {"tokens": part, "positions": positions}, cache=cache)
            cache = out.cache
            said.append(out.logits)
        return said

    def both(params):
        return decode(params), transformer.apply(config, params, batch).logits

    said, whole = jax.jit(both, compiler_options=laws.FAST)(params)
    np.testing.assert_allclose(np.concatenate(said, axis=1), whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("change", [lora(0), merge_lora(), merge_lora(keep_zeros=False)], ids=lambda c: c.label)
def test_zero_strength_is_the_identity(change):
    laws.identity(change, tiny_model("llama"))


def test_rank_zero_trains_everything():
    assert lora(0) is IDENTITY


def test_there_and_back():
    """Fresh factors folded in leave every bit."""
    for name in ("llama", "t5"):
        laws.identity(chain(lora(2, targets=(".*",)), merge_lora()), laws.with_zeros(tiny_model(name)))


def test_pruned_weights_stay_zero_on_demand():
    config = FAMILIES["bert"].replace(**EVERYWHERE)
    params = tree.map_with_name(
        lambda n, x: np.where(np.abs(x) < 0.1, 0, x).astype(np.float32) if n.endswith("mlp/up") else x,
        random_params(config),
    )
    expected = folded(config, params)
    before = leaves(params)["encoder/layers/mlp/up"]
    pruned, also = {"encoder/layers/mlp/up": 0.5}, {"encoder/layers/mlp/down": 0.1}

    def folded_in(change, card):
        start = Model(config, params, None, {"pruned": card})
        return leaves(transform(start, change, jax.random.key(0)).params)["encoder/layers/mlp/up"]

    kept, free = folded_in(merge_lora(), pruned), folded_in(merge_lora(keep_zeros=False), pruned)
    assert (before == 0).mean() > 0.3 and (free != 0).all()
    # zeros that no card and no change names are weights like any other
    np.testing.assert_array_equal(free, folded_in(merge_lora(), also))
    np.testing.assert_array_equal(free, folded_in(chain(densify(), merge_lora()), pruned))
    np.testing.assert_array_equal(kept, folded_in(chain(keep_zeros(".*mlp/up"), merge_lora()), also))
    np.testing.assert_array_equal(kept == 0, before == 0)
    np.testing.assert_allclose(kept, np.where(before == 0, 0, leaves(expected)["encoder/layers/mlp/up"]), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_on_a_mesh(name):
    laws.same_on_mesh(lora(4, targets=(".*",)), tiny_model(name))
    config = FAMILIES[name].replace(**EVERYWHERE)
    laws.same_on_mesh(merge_lora(), Tiny(name, config, random_params(config)))


def test_it_comes_back(tmp_path):
    again = laws.comes_back(
        lora(2, targets=["mlp/.*", "attention/out"], rank_stabilised=True, dropout=0.1), tiny_model("bert"), tmp_path
    )
    assert isinstance(again.config.lora_targets, tuple)
    assert (
        laws.comes_back(merge_lora(), Tiny("bert", again.config, again.params), tmp_path / "merged").config
        == FAMILIES["bert"]
    )


def test_a_config_from_json_is_the_same():
    config = ModelConfig(lora_rank=4, lora_targets=["mlp/up", "attention/.*"], lora_rank_stabilised=True)
    again = ModelConfig(**json.loads(json.dumps(to_dict(config))))
    assert again == config and hash(again) == hash(config)
    assert ModelConfig(lora_rank=4, lora_targets="mlp/up").lora_targets == ("mlp/up",)


def test_scales():
    config = ModelConfig(lora_rank=16, lora_alpha=8.0)
    assert (config.lora_scale, config.replace(lora_rank_stabilised=True).lora_scale) == (0.5, 2.0)


@pytest.fixture(scope="module")
def adapted(problem):
    """The problem with factors, none of them zero, and its whole gradient."""
    config = CHANGE.config(problem.config)
    drawn = leaves(random_params(config))
    own = leaves(problem.params)
    params = tree.map_with_name(lambda name, _: own.get(name, drawn[name]), transformer.shapes(config))
    loss = NextToken(z_loss=1e-3).loss(config)
    made = problem._replace(config=config, params=params, loss=loss, grad=differentiate(loss))
    return made._replace(whole=jax.device_get(made.run(made.grad)))


@pytest.mark.parametrize("also", [(), ("head/.*", "decoder/norm/.*")])
def test_the_gradient_is_that_of_the_factors_alone(adapted, also):
    found, gradient = adapted.run(lora(2, alpha=3.0, also=also).grad(adapted.grad))
    np.testing.assert_allclose(found.total, adapted.whole[0].total, rtol=1e-6)
    whole, found = leaves(adapted.whole[1]), leaves(gradient)
    assert found.keys() == {
        name for name in whole if is_factor(name) or (also and name.startswith(("head/", "decoder/norm/")))
    }
    for name, x in found.items():
        assert np.abs(x).max() > 1e-3, name
        np.testing.assert_allclose(x, whole[name], rtol=1e-4, atol=1e-5, err_msg=name)


def optimizer_of(config, change, **chosen):
    shapes, axes = transformer.shapes(config), transformer.axes(config)
    schedule = optim.make_schedule(Schedule(name="constant"), 10)
    return change.update(optim.make_optimizer(Optimizer(**chosen), schedule, shapes, axes))


def test_two_steps(problem):
    """From zero B: frozen weights keep their bits and have no moments; both factors move."""
    config, params = laws.changed(CHANGE, Tiny("", problem.config, problem.params))
    loss = NextToken().loss(config)
    optimizer = optimizer_of(config, CHANGE, name="adamw", learning_rate=0.1, weight_decay=0.5)
    state = init_state(params, optimizer, jax.random.key(0))
    factors = {name: x for name, x in leaves(params).items() if is_factor(name)}
    assert tree.size(state.opt_state) - 2 * sum(x.size for x in factors.values()) < 10, "counters apart"
    step = jax.jit(make_step(loss, CHANGE.grad(differentiate(loss)), optimizer), compiler_options=laws.FAST)
    state, first = step(state, problem.batch)
    state, second = step(state, problem.batch)
    assert second["loss"] < first["loss"]
    for (name, old), new in zip(leaves(params).items(), jax.tree.leaves(state.params)):
        assert (np.asarray(new) != old).any() == is_factor(name), name


def test_it_costs_less_than_half_the_backward_pass(adapted):
    def work(grad):
        step = jax.jit(lambda params, batch: grad(params, batch, None, {})[1])
        return step.lower(adapted.params, adapted.batch).compile(laws.FAST).cost_analysis()["flops"]

    assert work(CHANGE.grad(adapted.grad)) < 0.85 * work(adapted.grad)


class Products(nn.Module):
    """Two products whose weights are zero; of factors that are the identity."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        shape, axes = (self.config.dim, self.config.dim), ("embed", "mlp")
        return [multiply(self, n, x, weight(self, n, f"mlp/{n}", shape, axes, self.config.dim)) for n in ("up", "down")]


def test_dropout_is_on_what_the_factors_read():
    """s dropout(x) where W is zero and A and B are the identity: of a share 1 - rate each x / (1 - rate), drawn for each product."""
    config = ModelConfig(dim=24, heads=2, lora_rank=24, lora_alpha=48.0, lora_targets=("mlp/.*",), lora_dropout=0.25)
    params = {f"{n}_lora_{x}": np.eye(24) for n in ("up", "down") for x in "ab"} | dict(
        up=np.zeros((24, 24)), down=np.zeros((24, 24))
    )
    x = np.random.default_rng(0).normal(size=(4, 40, 24)).astype(np.float32)

    def apply(params, **keys):
        return [np.asarray(y) for y in Products(config).apply({"params": params}, x, rngs=keys)]

    for y in apply(params):
        np.testing.assert_allclose(y, 2 * x, rtol=1e-6)
    first, second = apply(params, dropout=jax.random.key(0))
    for y in first, second:
        np.testing.assert_allclose(y, np.where(y == 0, 0, 2 * x / 0.75), rtol=1e-5)
        assert abs((y == 0).mean() - 0.25) < 0.03
    assert 0.3 < ((first == 0) != (second == 0)).mean() < 0.45, "each draws for itself: 2 * 0.25 * 0.75 differ"
    whole = {**params, "up": np.eye(24)}
    np.testing.assert_allclose(apply(whole, dropout=jax.random.key(0))[0], x + first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_training_alone_drops_what_the_factors_read(name, monkeypatch):
    """Evaluation and decoding read all of it; each key draws other places, and in a scan over the layers the same as one after the other."""
    head = dict(head="classification", labels=3) if name == "bert" else {}
    plain = FAMILIES[name].replace(dropout=0.0, dtype="float32", **EVERYWHERE, **head)
    params, keys = random_params(plain), [jax.random.key(seed) for seed in (1, 1, 2)]

    def losses(rate):
        loss, batch = laws.objective(plain.replace(lora_dropout=rate))

        def every(params):
            return [loss(params, batch, key, None).total for key in (None, *keys)]

        return np.asarray(jax.jit(every, compiler_options=laws.FAST)(params))

    without, dropped = losses(0.0), losses(0.3)
    np.testing.assert_allclose([*without, dropped[0]], without[0], rtol=1e-6)
    assert dropped[1] == dropped[2] and len(set(dropped)) == 3
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_allclose(losses(0.3), dropped, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_that_are_not_adapted_keep_their_zeros(problem, name):
    change = lora(2, targets=(".*",), layers=[1])
    config, params = laws.changed(change, Tiny("", problem.config, problem.params))
    loss, optimizer = NextToken().loss(config), optimizer_of(config, change, name=name, weight_decay=0.1)
    state = init_state(params, optimizer, jax.random.key(0))
    step = jax.jit(make_step(loss, change.grad(differentiate(loss)), optimizer), compiler_options=laws.FAST)
    for _ in range(3):
        state, _ = step(state, problem.batch)
    new = leaves(state.params)
    for path, old in leaves(params).items():
        if is_factor(path):
            assert not new[path][0].any() and (new[path][1] != old[1]).any(), path


def test_with_parameters_frozen_besides(adapted):
    change = chain(CHANGE, freeze([".*value_lora_[ab]"]))
    gradient = leaves(
        jax.eval_shape(lambda p: change.grad(adapted.grad)(p, adapted.batch, None, {}), adapted.params)[1]
    )
    assert set(gradient) == {f"decoder/layers/attention/query_lora_{x}" for x in "ab"}


def test_the_share_of_bert_base():
    config = presets.bert()
    shapes = leaves(transformer.shapes(lora(8).config(config)))
    trained = sum(np.prod(x.shape) for name, x in shapes.items() if is_factor(name))
    assert trained == 12 * 2 * 2 * 8 * 768
    assert trained / sum(np.prod(x.shape) for x in shapes.values()) < 0.01


def test_arithmetic():
    for name in ("llama", "t5"):
        config, batch = FAMILIES[name], batch_of(FAMILIES[name])
        asked = {n: x.shape for n, x in batch.items()}
        more = flops.forward_flops(config.replace(lora_rank=2, lora_targets=("attention/query",)), asked)
        d, rows = config.dim + config.heads * config.head_size, asked["tokens"][0]
        tokens = config.decoder_depth * asked["tokens"][1]
        tokens += config.encoder_depth * asked.get("encoder_tokens", (0, 0))[1]
        assert more - flops.forward_flops(config, asked) == 2 * 2 * d * rows * tokens
    both = [flops.forward_flops(c, asked) for c in (config, config.replace(lora_rank=2, lora_targets=("cross/key",)))]
    assert both[1] - both[0] == 2 * 2 * d * rows * config.decoder_depth * asked["encoder_tokens"][1]


def test_a_model_with_factors_trains_on():
    tiny = tiny_model("gpt2", **EVERYWHERE)
    same = lora(3, alpha=2.0, targets=[".*"])
    laws.identity(same, tiny)
    config, params = laws.changed(lora(3, alpha=2.0, targets=[".*"], dropout=0.1), tiny)
    assert config == tiny.config.replace(lora_dropout=0.1)
    laws.equal(params, tiny.params)
    for other in (lora(4, alpha=2.0, targets=[".*"]), lora(3, alpha=2.0)):
        with pytest.raises(ConfigError, match="has factors of rank 3 already, of other settings: fold them in"):
            other.config(tiny.config)


def test_labels_are_code():
    for change in (
        lora(2),
        lora(4, alpha=8.0, targets="mlp/.*", rank_stabilised=True, also="head/.*"),
        lora(4, layers=range(8, 23)),
        lora(4, dropout=0.1),
        merge_lora(),
        merge_lora(keep_zeros=True),
    ):
        assert eval(change.label).label == change.label
    assert lora(2).label == "lora(2, alpha=16.0)"


def test_it_is_not_exported_as_it_is(tmp_path):
    config = FAMILIES["llama"].replace(qk_norm=False, lora_rank=2)
    for family in (None, "llama"):
        with pytest.raises(
            CheckpointError, match=r"fold them in with merge_lora\(\), or write them alone: export --format=peft"
        ):
            huggingface.save(Model(config, random_params(config)), tmp_path / "out", family=family)
    assert not list(tmp_path.iterdir())
    assert families.choose_family(merge_lora().config(config), None).name == "llama"
    assert families.choose_family(config.replace(lora_rank=0, lora_alpha=5.0, lora_targets=()), None).name == "llama"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rank=-1), "model.lora_rank is -1: it must not be negative"),
        (dict(rank=1.5), "lora: rank is 1.5: it must be an int"),
        (dict(rank=2, layers=(0.5,)), "lora: layers is (0.5,): name some of the layers by number, from 0 below"),
        (dict(rank=2, alpha=0.0), "model.lora_alpha is 0.0: it must be above 0 and finite"),
        (dict(rank=2, targets=()), "model.lora_targets is empty: name the weights of the layers that get factors"),
        (dict(rank=2, targets=("attention/quer",)), "model.lora_targets 'attention/quer' matches no weight; did you mean 'attention/query'?"),
        (dict(rank=2, dropout=1.0), "model.lora_dropout is 1.0: it must lie in [0, 1)"),
        (dict(rank=2, layers=()), "lora: layers is (): name some of the layers by number, from 0 below"),
        (dict(rank=2, layers=(1, -1)), "lora: layers is (1, -1): name some of the layers by number, from 0 below"),
        (dict(rank=2, targets="mlp/(up"), "model.lora_targets has 'mlp/(up', which is no regex: missing ), unterminated subpattern at position 4"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        lora(**arguments)
    assert str(error.value) == message


def test_what_is_refused_of_a_model(problem):
    with pytest.raises(ConfigError, match="'cross/query' matches no weight; known: attention/key, "):
        lora(2, targets="cross/query").config(problem.config)
    with pytest.raises(ConfigError, match="lora: layers has 2, and the layers of the model are 0 to 1$"):
        lora(2, layers=(0, 2)).config(problem.config)
    with pytest.raises(ConfigError, match=r"lora: regex .* matches no parameter"):
        CHANGE.grad(problem.grad)(problem.params, problem.batch, None, {})
    _, params = laws.changed(CHANGE, Tiny("", problem.config, problem.params))
    with pytest.raises(ConfigError, match="lora: regex 'haed/.*' matches no parameter"):
        lora(2, alpha=3.0, also="haed/.*").update(optim.optax.sgd(0.1)).init(params)
