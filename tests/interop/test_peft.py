"""Adapters in PEFT's form: what is written is the change of transformers' weights, what is read gives it back, and PEFT agrees."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import cli, tree
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import CheckpointError
from llm_jax.interop import huggingface, peft, tensor_files
from llm_jax.model import Model, apply, load, save, transform
from llm_jax.models import transformer
from llm_jax.transforms import chain, dropout
from llm_jax.transforms.lora import lora, merge_lora

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "marian")
CONFIG, WEIGHTS = peft.CONFIG, peft.WEIGHTS


def leaves(params):
    return dict(zip(tree.names(params), jax.tree.leaves(params)))


def adapt(base, seed=1, **options):
    """A model with factors over the base, none of them zero in the layers that are adapted."""
    left_out = sorted(set(range(2)) - set(options.pop("layers", range(2))))
    config, own = lora(2, **{"alpha": 3.0, **options}).config(base.config), leaves(base.params)
    rng = np.random.default_rng(seed)

    def one(name, x):
        if name in own:
            return own[name]
        factor = 0.3 * rng.standard_normal(x.shape).astype(np.float32)
        factor[left_out] = 0
        return factor

    return Model(config, tree.map_with_name(one, transformer.shapes(config)))


def merged(model):
    """The model with its factors folded in."""
    change = merge_lora()
    return Model(change.config(model.config), change.params(model.config, model.params, jax.random.key(0), None))


def changes(base, model, folder):
    """By the name there, how far the weights of transformers' model with the factors folded in are from those of the base."""
    huggingface.save(base, folder / "base")
    huggingface.save(merged(model), folder / "merged")
    before, after = (tensor_files.open_folder(folder / name) for name in ("base", "merged"))
    moved = {name: after[name] - x for name, x in before.items()}
    return {name: x for name, x in moved.items() if x.any()}


def products(folder):
    """By the name there, scale * B A of an adapter, by PEFT's own rules."""
    stated, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    found = {}
    for name in {x.rpartition(".lora_")[0] for x in tensors if ".lora_" in x}:
        a, b = (tensors[f"{name}.lora_{which}.weight"] for which in "AB")
        known = [key for key in stated["rank_pattern"] if name.endswith("." + key.replace("\\", ""))]
        rank, alpha = (
            stated[p][known[0]] if known else stated[x]
            for p, x in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        assert a.shape[0] == b.shape[1] == rank
        delta = alpha / (rank**0.5 if stated["use_rslora"] else rank) * b @ a
        found[name.removeprefix("base_model.model.") + ".weight"] = delta.T if stated["fan_in_fan_out"] else delta
    return found


@pytest.mark.parametrize(
    "family, options",
    [
        *((family, {"targets": ".*", "rank_stabilised": True}) for family in FAMILIES),
        ("gpt2", {}),
        ("llama", {}),
        ("gpt2", {"layers": [1]}),
        ("t5", {"layers": [0]}),
        ("llama", {"dropout": 0.25}),
    ],
)
def test_what_is_written_is_the_change_of_the_weights(made, tmp_path, family, options):
    base = made(family)
    model = adapt(base, **options)
    peft.save(model, tmp_path / "adapter")
    expected, found = changes(base, model, tmp_path), products(tmp_path / "adapter")
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], atol=1e-5, err_msg=name)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["lora_dropout"] == options.get("dropout", 0.0)

    again = peft.load(tmp_path / "adapter", base)
    assert jax.tree.structure(again.params) == jax.tree.structure(transformer.shapes(again.config))
    if family != "gpt2":  # whose queries, keys and values come back with the factors of all three
        assert again.config.replace(lora_targets=model.config.lora_targets) == model.config
        for name, x in leaves(model.params).items():
            np.testing.assert_array_equal(leaves(again.params)[name], x, err_msg=name)
    first, second = merged(model), merged(again)
    assert first.config == second.config == base.config
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), first.params, second.params)


POOLER = {"bert": "tanh", "roberta": "tanh", "distilbert": "relu", "llama": "none"}


@pytest.mark.parametrize("family", POOLER)
def test_a_head_comes_with_it(made, tmp_path, family):
    base = made(family, head="classification", labels=3, pooler=POOLER[family])
    model = adapt(base)
    params = {**model.params, "head": jax.tree.map(lambda x: x + 1, model.params["head"])}
    peft.save(Model(model.config, params), tmp_path / "adapter", base="some/base")
    stated = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (stated["task_type"], stated["base_model_name_or_path"]) == ("SEQ_CLS", "some/base")
    assert (
        stated["modules_to_save"]
        == {
            "bert": ["bert.pooler.dense", "classifier"],
            "roberta": ["classifier"],
            "distilbert": ["classifier", "pre_classifier"],
            "llama": ["score"],
        }[family]
    )
    again = peft.load(tmp_path / "adapter", base)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize("write", [peft.save, huggingface.save], ids=["adapter", "model"])
def test_the_tokenizer_frames_a_text_to_classify(made, tmp_path, write):
    """Where the base's adds nothing, the end token that the class was read at in training, or the template."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("bpe:300", ["a quiet triumph"] * 9)
    model = made("llama", head="classification", labels=2, vocab_size=300)
    model = adapt(model) if write is peft.save else model
    write(Model(model.config, model.params, tokenizer, {}), tmp_path / "written")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    ids = tokenizer.encode("a triumph").tolist()
    assert theirs("a triumph").input_ids == [*ids, tokenizer.eos]
    assert theirs("a triumph", "a").input_ids == [*ids, tokenizer.eos, *tokenizer.encode("a"), tokenizer.eos]
    again = load_tokenizer(str(tmp_path / "written"))
    for pair in (False, True):
        assert [x.tolist() for x in again.frame(pair)] == [x.tolist() for x in tokenizer.frame(pair)]
    asked = tokenizer.templated("a: {text}\n quiet:")
    write(Model(model.config, model.params, asked, {}), tmp_path / "asked")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "asked")
    before, after = (tokenizer.encode(x).tolist() for x in ("a: ", "\n quiet:"))
    assert theirs("a triumph").input_ids == [*before, *ids, *after]
    again = load_tokenizer(str(tmp_path / "asked"))
    assert not again.template and [x.tolist() for x in again.frame()] == [before, after]


def test_the_verbs_write_and_read_an_adapter(made, tmp_path, capsys):
    base = made("llama")
    model = adapt(base)
    save(model, tmp_path / "model")
    huggingface.save(base, tmp_path / "base")
    where, adapter, again = (str(tmp_path / name) for name in ("model", "adapter", "again"))
    assert cli.main(["export", where, adapter, "--format=peft", "--base=some/base"]) == 0
    assert cli.main(["import", str(tmp_path / "base"), again, "--adapter", adapter]) == 0
    jax.tree.map(np.testing.assert_array_equal, load(again).params, model.params)
    assert cli.main(["export", where, str(tmp_path / "hf")]) == 2 and "--format=peft" in capsys.readouterr().err
    assert cli.main(["export", where, str(tmp_path / "x"), "--format=peft", "--dtype=bfloat16"]) == 2
    assert cli.main(["export", where, str(tmp_path / "x"), "--base=some/base"]) == 2


def test_it_lies_where_the_rules_say(made, tmp_path):
    from llm_jax import sharding
    from llm_jax.config import Mesh

    peft.save(adapt(made("t5")), tmp_path / "adapter")
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=4))
    again = peft.load(tmp_path / "adapter", made("t5"), mesh)
    expected = sharding.params_shardings(mesh, transformer.axes(again.config), transformer.shapes(again.config))
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)), again.params, expected
    )
    assert (
        again.card["transforms"][-1] == f"peft.load({str(tmp_path / 'adapter')!r})" and len(again.card["parents"]) == 1
    )


def edit(folder, **changes):
    """Change adapter_config.json."""
    stated = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**stated, **changes}))


def test_ranks_and_scales_of_each_module(made, tmp_path):
    """An adapter with patterns, and without one layer of one module, has the same products here."""
    folder, base = tmp_path / "adapter", made("llama")
    peft.save(adapt(base), folder)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".v_proj." in name]:
        if ".layers.1." in name:
            del tensors[name]
        else:
            tensors[name] = tensors[name][:1] if ".lora_A." in name else np.ascontiguousarray(tensors[name][:, :1])
    save_file(tensors, folder / WEIGHTS)
    edit(folder, rank_pattern={"v_proj": 1}, alpha_pattern={"v_proj": 5.0})
    again = peft.load(folder, base)
    assert (again.config.lora_rank, again.config.lora_alpha) == (2, 3.0)
    found = {}
    for which in ("query", "value"):
        a, b = (leaves(again.params)[f"decoder/layers/attention/{which}_lora_{x}"] for x in "ab")
        for i in range(2):
            delta = 1.5 * np.tensordot(a[i], b[i], 1).reshape(36, 36).T
            found[f"model.layers.{i}.self_attn.{which[0]}_proj.weight"] = delta
    prefix = "base_model.model.model.layers"
    for i in range(2):
        a, b = (tensors[f"{prefix}.{i}.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(found[f"model.layers.{i}.self_attn.q_proj.weight"], 1.5 * b @ a, atol=1e-6)
    a, b = (tensors[f"{prefix}.0.self_attn.v_proj.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(found["model.layers.0.self_attn.v_proj.weight"], 5 * b @ a, rtol=1e-5, atol=1e-6)
    assert not found["model.layers.1.self_attn.v_proj.weight"].any()


def test_what_is_not_written(made, tmp_path):
    with pytest.raises(CheckpointError, match="has no factors of low rank, so that there is no adapter to write"):
        peft.save(made("llama"), tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="full exists already"):
        peft.save(adapt(made("llama")), tmp_path / "full")
    also = transform(made("llama"), lora(2, also=("head/.*", ".*/mlp/up")), jax.random.key(0))
    with pytest.raises(CheckpointError, match="decoder/layers/mlp/up was trained beside the factors and has no place"):
        peft.save(also, tmp_path / "adapter")
    odd = made("llama", norm="layer")
    with pytest.raises(CheckpointError, match="no family of transformers has such a model"):
        peft.save(adapt(odd), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="all factors of the model are zero, so that there is no adapter"):
        peft.save(adapt(made("llama"), layers=()), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3': not implemented; only \"LORA\" is"),
        (dict(use_dora=True), "use_dora is True: not implemented"),
        (dict(bias="all"), "bias is 'all': not implemented"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4', which changes the base"),
        (dict(r="2"), "r is '2': it must be a whole number"),
        (dict(lora_dropout=1), "lora_dropout is 1: it must lie from 0 up to 1"),
        (dict(r=3), r"self_attn.q_proj.lora_A is of shape \[2, 36\], not of shape \[3, 36\]"),
        (dict(rank_pattern={"q_proj": 4}), r"q_proj.lora_A is of shape \[2, 36\], not of shape \[4, 36\]"),
        (dict(rank_pattern={"q_proj": "x"}), "rank_pattern: q_proj is 'x': it must be a number"),
    ],
)
def test_what_is_not_read(made, tmp_path, changed, message):
    peft.save(adapt(made("llama")), tmp_path / "adapter")
    edit(tmp_path / "adapter", **changed)
    with pytest.raises(CheckpointError, match=message):
        peft.load(tmp_path / "adapter", made("llama"))


def test_adapters_of_other_models(made, tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="adapter_config.json: No such file"):
        peft.load(folder, made("llama"))
    model = adapt(made("llama"))
    peft.save(model, folder)
    with pytest.raises(CheckpointError, match="it has factors for no weight of this model"):
        peft.load(folder, made("bert"))
    with pytest.raises(CheckpointError, match="has factors of low rank already"):
        peft.load(folder, model)
    with pytest.raises(
        CheckpointError, match="no place for 4 of its tensors: model.layers.1.self_attn.q_proj.lora_A.weight, "
    ):
        peft.load(folder, made("llama", layers=1))
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.lora_B is missing, not of shape \[36, 2\]"):
        peft.load(folder, made("llama"))
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": np.zeros((2, 36), np.float32)}, folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="no sound safetensors file"):
        peft.load(folder, made("llama"))


PARITY = {
    "llama": ("AutoModelForCausalLM", {}),
    "gpt2": ("AutoModelForCausalLM", {}),
    "t5": ("AutoModelForSeq2SeqLM", {}),
    "bert": ("AutoModelForSequenceClassification", {"head": "classification", "labels": 3, "pooler": "tanh"}),
}


@pytest.mark.parametrize("family", PARITY)
@pytest.mark.parametrize(
    "options",
    [{}, {"targets": ".*", "rank_stabilised": True}, {"layers": [1]}],
    ids=["usual", "everywhere", "one layer"],
)
def test_peft_agrees(made, tmp_path, family, options):
    """The logits of PEFT's model, with the adapter that was written here, are ours; and the adapter that it writes is read as it was."""
    other, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, more = PARITY[family]
    base = made(family, **more)
    # small enough that the attention of T5, which divides no scores, is no matter of rounding
    base = Model(base.config, jax.tree.map(lambda x: 0.3 * x, base.params))
    model = adapt(base, **options)
    if "head" in more:
        moved = jax.tree.map(lambda x: x + 0.1, model.params["head"])
        model = Model(model.config, {**model.params, "head": moved})
    huggingface.save(base, tmp_path / "base")
    peft.save(model, tmp_path / "adapter")
    plain = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    theirs = other.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()

    tokens = np.random.default_rng(0).integers(3, 99, (2, 9))
    batch = {"tokens": tokens.astype(np.int32)}
    asked = {"input_ids": torch.tensor(tokens), "attention_mask": torch.ones(tokens.shape, dtype=torch.long)}
    if family == "t5":
        batch["encoder_tokens"], asked["decoder_input_ids"] = batch["tokens"][:, ::-1].copy(), torch.tensor(tokens)
        asked["input_ids"] = torch.tensor(tokens[:, ::-1].copy())
    with torch.no_grad():
        expected = theirs(**asked).logits.numpy()
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(apply(model, batch).logits, expected, atol=1e-4 * scale)
    assert np.abs(apply(base, batch).logits - expected).max() > 1e-2 * scale

    theirs.save_pretrained(tmp_path / "again")
    again = peft.load(tmp_path / "again", base)
    np.testing.assert_allclose(apply(again, batch).logits, expected, atol=1e-4 * scale)


def test_a_head_that_is_not_written_may_not_be_trained(made, tmp_path):
    base = made("llama", tie_embeddings=False)
    model = transform(base, lora(2, also=("head/.*",)), jax.random.key(0))
    with pytest.raises(CheckpointError, match="head/kernel was trained beside the factors and has no place"):
        peft.save(model, tmp_path / "adapter")


def test_what_runs_before_trained_beside_the_factors_counts(made, tmp_path):
    """A chain's label is read too; what `merge_lora` folded in is of the base."""
    base = made("llama")
    model = transform(base, chain(dropout(0.1), lora(2, also=("embed/.*",))), jax.random.key(0))
    with pytest.raises(CheckpointError, match="embed/tokens was trained beside the factors"):
        peft.save(model, tmp_path / "adapter")
    told = {
        **model.card,
        "transforms": ["lora(2)"],
        "trained_beside_factors": ["embed/tokens"],
    }  # as a run's card has it
    again = transform(Model(model.config, model.params, model.tokenizer, told), dropout(0.0), jax.random.key(0))
    with pytest.raises(CheckpointError, match="embed/tokens was trained beside the factors"):
        peft.save(again, tmp_path / "adapter")
    fresh = transform(again, chain(merge_lora(), lora(2)), jax.random.key(0))
    assert fresh.card["trained_beside_factors"] == []
    assert "trained_beside_factors" not in merged(again).card
