"""config.json and ModelConfig: what is read, what is refused by name, which family a model belongs to."""

import dataclasses
import json
from typing import Any

import pytest

from llm_jax.errors import CheckpointError, UserError
from llm_jax.interop import families, huggingface
from llm_jax.interop.fields import Fields
from llm_jax.models import presets
from llm_jax.models.config import ModelConfig

SIZES = {
    "bert": dict(vocab_size=99, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, max_position_embeddings=32),
    "distilbert": dict(vocab_size=99, dim=36, n_layers=2, n_heads=3, hidden_dim=50, max_position_embeddings=32),
    "gpt2": dict(vocab_size=99, n_embd=36, n_layer=2, n_head=3, n_positions=32),
    "t5": dict(vocab_size=99, d_model=36, d_kv=12, d_ff=50, num_layers=2, num_heads=3),
    "marian": dict(
        vocab_size=99, d_model=36, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=50, decoder_ffn_dim=50,
        encoder_attention_heads=3, decoder_attention_heads=3, max_position_embeddings=32,
    ),
}  # fmt: skip
SIZES |= dict.fromkeys(("roberta", "llama", "mistral", "qwen2", "qwen3"), SIZES["bert"])
HEAD = {"bert": "mlm", "roberta": "mlm", "distilbert": "mlm"}


def read(family: str, head: str = "", held: Any = None, **values: Any) -> ModelConfig:
    fields = Fields({**SIZES[family], **values}, "config.json")
    return families.FAMILIES[family].read(fields, head or HEAD.get(family, "lm"), held)


SIZE = dict(vocab_size=99, dim=36, layers=2, heads=3, mlp_dim=50, max_length=32)
EXPECTED = {
    "bert": presets.bert(**SIZE, head="mlm", pooler="none"),
    "roberta": presets.roberta(**{**SIZE, "max_length": 30}, head="mlm"),
    "distilbert": presets.distilbert(**SIZE, head="mlm"),
    "gpt2": presets.gpt2(**{**SIZE, "mlp_dim": 144}),
    "llama": presets.llama(**SIZE),
    "mistral": presets.llama(**SIZE),
    "qwen2": presets.llama(**SIZE, bias="qkv"),
    "qwen3": presets.llama(**SIZE, qk_norm=True, head_dim=128),
    "t5": presets.t5(**{**SIZE, "max_length": 512}, head_dim=12),
    "marian": presets.marian(**SIZE, mlp="gelu", embedding_scale=False),
}


@pytest.mark.parametrize("family", SIZES)
def test_a_config_without_more_than_sizes_is_that_of_the_preset(family):
    stated = {
        "bert": {"architectures": ["BertForMaskedLM"]},
        "roberta": {"architectures": ["RobertaForMaskedLM"], "layer_norm_eps": 1e-5, "type_vocab_size": 1},
    }
    llamas = {"rms_norm_eps": 1e-5} if "rms" in EXPECTED[family].norm and family != "t5" else {}
    found = read(family, **stated.get(family, {}), **llamas)
    different = {
        f.name: (getattr(found, f.name), getattr(EXPECTED[family], f.name))
        for f in dataclasses.fields(found)
        if getattr(found, f.name) != getattr(EXPECTED[family], f.name)
    }
    assert set(different) <= {"kv_heads", "decoder_layers", "dropout"}, different
    assert found.kv_size == 3 and found.decoder_depth == EXPECTED[family].decoder_depth


@pytest.mark.parametrize("family", SIZES)
def test_what_is_written_reads_as_it_was(family):
    for head in families.FAMILIES[family].classes:
        config = read(family, head, frozenset({"final_logits_bias", "pooler.dense.weight"}))
        assert families.differences(families.FAMILIES[family], config) == []
        assert json.loads(json.dumps(families.FAMILIES[family].write(config))) == families.FAMILIES[family].write(
            config
        )


@pytest.mark.parametrize(
    "family, values, expected",
    [
        ("bert", dict(hidden_act="gelu_new"), dict(mlp="gelu_tanh")),
        ("bert", dict(held=frozenset({"pooler.dense.weight"})), dict(pooler="tanh")),
        ("bert", dict(head="none", architectures=["BertForPreTraining"]), dict(pooler="tanh")),
        ("roberta", dict(pad_token_id=4), dict(position_offset=5, max_length=27)),
        ("roberta", dict(head="classification"), dict(pooler="tanh")),
        ("distilbert", dict(head="classification", id2label={"0": "a", "1": "b", "2": "c"}), dict(pooler="relu", labels=3)),
        ("gpt2", dict(n_inner=70, scale_attn_weights=False, activation_function="swish"), dict(mlp_dim=70, attention_scale=False, mlp="silu")),
        ("llama", dict(num_key_value_heads=1, head_dim=8), dict(kv_heads=1, head_dim=8)),
        ("llama", dict(rope_theta=5e5), dict(rotary_base=5e5)),
        ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), dict(rotary_base=5e5)),
        ("llama", dict(rope_scaling={"type": "default"}, rope_theta=7), dict(rotary_base=7.0)),
        ("llama", dict(num_labels=7, head="classification"), dict(labels=7)),
        ("mistral", dict(max_position_embeddings=9000), dict(max_length=4096)),
        ("mistral", dict(max_position_embeddings=9000, sliding_window=None), dict(max_length=9000)),
        ("mistral", dict(sliding_window=16), dict(max_length=16)),
        ("qwen2", dict(sliding_window=16), dict(max_length=32)),
        ("qwen2", dict(sliding_window=16, use_sliding_window=True), dict(max_length=32)),
        ("qwen2", dict(sliding_window=16, use_sliding_window=True, max_window_layers=1), dict(max_length=16)),
        ("qwen3", dict(sliding_window=16, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]), dict(max_length=16)),
        ("qwen3", dict(sliding_window=16, use_sliding_window=True, layer_types=["full_attention"] * 2), dict(max_length=32)),
        ("t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), dict(mlp="gated_gelu_tanh", tie_embeddings=False, logits_scale=False)),
        ("t5", dict(feed_forward_proj="gated-silu", num_decoder_layers=5), dict(mlp="gated_silu", decoder_layers=5)),
        ("t5", dict(scale_decoder_outputs=False, held=frozenset({"lm_head.weight"})), dict(tie_embeddings=False, logits_scale=False)),
        ("t5", dict(scale_decoder_outputs=False, held=frozenset()), dict(tie_embeddings=True, logits_scale=False)),
        ("t5", dict(held=frozenset({"lm_head.weight"})), dict(tie_embeddings=True, logits_scale=True)),
        ("marian", dict(activation_function="swish", scale_embedding=True), dict(mlp="silu", embedding_scale=True)),
        ("marian", dict(held=frozenset()), dict(logits_bias=False)),
    ],
)  # fmt: skip
def test_values_are_read(family, values, expected):
    found = read(family, **values)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "family, values, message",
    [
        ("bert", dict(is_decoder=True), "is_decoder is True: not implemented; only false is"),
        ("bert", dict(add_cross_attention=True), "add_cross_attention is True"),
        ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key': not implemented; only \"absolute\" is"),
        ("bert", dict(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu': not implemented; known: gelu, "),
        ("bert", dict(hidden_act=3), "hidden_act is 3: not implemented"),
        ("bert", dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        ("bert", dict(pruned_heads={"0": [1]}), "pruned_heads is {'0': \\[1\\]}"),
        ("bert", dict(hidden_size="36"), "hidden_size is '36': it must be a whole number"),
        ("bert", dict(hidden_size=36.0), "hidden_size is 36.0: it must be a whole number"),
        ("bert", dict(hidden_size=True), "hidden_size is True: it must be a whole number"),
        ("bert", dict(hidden_size=None), "it has no hidden_size"),
        ("bert", dict(num_hidden_layers=0), "num_hidden_layers is 0: it must lie from 1 to 2147483647"),
        ("bert", dict(vocab_size=10**30), "vocab_size is 1000000000000000000000000000000: it must lie"),
        ("bert", dict(layer_norm_eps="small"), "layer_norm_eps is 'small': it must be a number"),
        ("bert", dict(layer_norm_eps=float("nan")), "layer_norm_eps is nan: it must be a number"),
        ("bert", dict(layer_norm_eps=10**400), "it must be a number"),
        ("bert", dict(hidden_dropout_prob=1.5), "hidden_dropout_prob is 1.5: it must lie from 0 up to 1"),
        ("bert", dict(head="classification", id2label=[1]), "id2label is \\[1\\]: it must be an object"),
        ("roberta", dict(max_position_embeddings=2), "max_position_embeddings is 2: 2 of them are set aside"),
        ("roberta", dict(hidden_act="relu"), "hidden_act is 'relu': RoBERTa's mlm head has gelu"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", dict(scale_attn_weights="yes"), "scale_attn_weights is 'yes': it must be true or false"),
        ("llama", dict(attention_bias=True), "attention_bias is True"),
        ("llama", dict(mlp_bias=True), "mlp_bias is True"),
        ("llama", dict(num_attention_heads=5, head_dim=8), "num_attention_heads=5 does not divide hidden_size=36"),
        ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling: type is 'linear': not implemented; only \"default\" is"),
        ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_parameters: rope_type is 'llama3'"),
        ("llama", dict(rope_scaling={"factor": 2.0}), "rope_scaling: factor is 2.0: scaled rotary positions are not implemented"),
        ("llama", dict(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "rope_parameters: full_attention is .*: scaled rotary"),
        ("llama", dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta is stated twice, with 10000.0 and 500000.0"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        ("llama", dict(rope_theta=-3), "rope_theta is -3.0: it must be above 1"),
        ("qwen2", dict(layer_types=["full_attention"]), "layer_types has 1 entries"),
        ("qwen2", dict(layer_types=["full_attention", "linear_attention"]), "layer_types has 2 entries \\(full_attention, linear_attention\\)"),
        ("t5", dict(feed_forward_proj="geglu"), "feed_forward_proj is 'geglu': not implemented; known, also with gated-"),
        ("t5", dict(dense_act_fn="gelu"), "dense_act_fn is 'gelu', but feed_forward_proj 'relu'"),
        ("t5", dict(is_gated_act=True), "is_gated_act is True"),
        ("t5", dict(scale_decoder_outputs=True, tie_word_embeddings=False), "tie_word_embeddings is false and scale_decoder_outputs true"),
        ("t5", dict(relative_attention_num_buckets=3), "relative_attention_num_buckets is 3: it must lie from 4 to"),
        ("t5", dict(relative_attention_max_distance=16), "relative_attention_max_distance is 16: it must lie from 17 to"),
        ("marian", dict(decoder_ffn_dim=51), "decoder_ffn_dim is 51: not implemented; only 50 is"),
        ("marian", dict(decoder_attention_heads=4), "decoder_attention_heads is 4"),
        ("marian", dict(normalize_before=True), "normalize_before is True"),
        ("marian", dict(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings is False"),
        ("marian", dict(decoder_vocab_size=98), "decoder_vocab_size is 98"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(family, values, message):
    with pytest.raises(CheckpointError, match=f"config.json.*{message}") as caught:
        read(family, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(model_type="bret"), "unknown model_type 'bret'; did you mean 'bert'?"),
        (dict(model_type="mixtral"), "unknown model_type 'mixtral'; did you mean 'mistral'?"),
        (dict(model_type=["bert"]), "unknown model_type ..bert..;"),
        (dict(), "it has no model_type; known: bert, roberta"),
        (dict(architectures="BertModel"), "architectures is 'BertModel': it must be a list of strings"),
        (dict(model_type="llama", quantization_config={"bits": 4}), "quantization_config is set, and quantised weights are not read"),
    ],
)  # fmt: skip
def test_an_unknown_family_is_refused(values, message):
    with pytest.raises(CheckpointError, match=message):
        families.find(Fields(values, "config.json"))


def test_the_class_names_the_head():
    bert = families.FAMILIES["bert"]
    assert bert.head(Fields({"architectures": ["BertForPreTraining"]}, "c")) == "mlm"
    assert bert.head(Fields({}, "c")) == "none"
    assert families.find(Fields({"architectures": ["GPT2LMHeadModel"]}, "c")).name == "gpt2"
    with pytest.raises(
        CheckpointError,
        match="unknown architecture 'BertForTokenClassification'; did you mean 'BertForSequenceClassification'",
    ):
        bert.head(Fields({"architectures": ["BertForTokenClassification"]}, "c"))


@pytest.mark.parametrize(
    "config, family",
    [
        (presets.bert(), "bert"),
        (presets.roberta(), "roberta"),
        (presets.distilbert(), "distilbert"),
        (presets.gpt2(), "gpt2"),
        (presets.llama(), "llama"),
        (presets.llama(head_dim=100), "llama"),
        (presets.llama(heads=33, kv_heads=11, head_dim=128), "mistral"),
        (presets.llama(bias="qkv", tie_embeddings=True), "qwen2"),
        (presets.llama(qk_norm=True), "qwen3"),
        (presets.t5(), "t5"),
        (presets.t5(mlp="gated_gelu_tanh", tie_embeddings=False), "t5"),
        (presets.marian(), "marian"),
        (presets.bert(head="span", pooler="none", dropout=0.3, dtype="bfloat16", remat="full"), "bert"),
    ],
)  # fmt: skip
def test_a_model_finds_its_family(config, family):
    assert families.choose_family(config, None).name == family
    assert families.choose_family(config, family).name == family


@pytest.mark.parametrize(
    "config, family, message",
    [
        (presets.vaswani(), None, "the nearest, marian, has none with positions='sinusoidal' \\(there it would be 'sinusoidal_split'\\)"),
        (presets.gpt2(mlp="gated_gelu"), None, "the nearest, gpt2, has none with mlp='gated_gelu'"),
        (presets.gpt2(norm="rms"), None, "has none with norm='rms'"),
        (presets.gpt2(bias="none"), None, "has none with bias='none'"),
        (presets.gpt2(head_dim=32), None, "has none with head_dim=32"),
        (presets.gpt2(kv_heads=3), None, "has none with kv_heads=3"),
        (presets.distilbert(head="classification"), None, "has none with pooler='none'"),
        (presets.marian(head="classification"), None, "has none with "),
        (presets.vit(), None, "has none with "),
        (presets.llama(bias="qkv"), "llama", "llama of transformers has no model with bias='qkv' .*; family='qwen2' has"),
        (presets.gpt2(), "bert", "bert of transformers has no model with head='lm'"),
        (presets.gpt2(), "gtp2", "unknown family 'gtp2'; did you mean 'gpt2'"),
        (presets.distilbert(norm_epsilon=1e-6), "distilbert", "no model with norm_epsilon=1e-06"),
    ],
)  # fmt: skip
def test_a_model_of_no_family_is_refused_by_field(config, family, message):
    with pytest.raises(UserError, match=message) as caught:
        families.choose_family(config, family)
    assert "\n" not in str(caught.value)


def test_the_words_of_the_original_stay_where_they_say_the_same():
    mistral = families.FAMILIES["mistral"]
    original = {
        **SIZES["mistral"],
        "max_position_embeddings": 9000,
        "sliding_window": 4096,
        "rope_theta": 10000,
        "hidden_act": "swish",
        "rms_norm_eps": 1e-5,
        "extra": [1],
        "num_key_value_heads": 3,
    }
    config = mistral.read(Fields(original, "c"), "lm", None)
    made = families.describe(mistral, config, original)
    assert {key: made[key] for key in original} == original
    longer = families.describe(mistral, config.replace(max_length=8000, rotary_base=5e5, mlp_dim=40), original)
    assert longer["sliding_window"] is None and longer["max_position_embeddings"] == 8000
    assert longer["rope_theta"] == longer["rope_parameters"]["rope_theta"] == 5e5
    assert longer["intermediate_size"] == 40 and longer["extra"] == [1]
    qwen = families.FAMILIES["qwen2"]
    original = {**SIZES["qwen2"], "layer_types": ["full_attention"] * 2}
    config = qwen.read(Fields(original, "c"), "lm", None)
    assert families.describe(qwen, config.replace(layers=1), original)["layer_types"] == ["full_attention"]


def test_the_names_of_the_classes_are_written():
    bert = families.FAMILIES["bert"]
    config = read("bert", "classification", num_labels=2)
    made = families.describe(bert, config, {"id2label": {"0": "x"}, "num_labels": 1}, ["no", "yes"])
    assert (
        made["id2label"] == {"0": "no", "1": "yes"}
        and made["label2id"] == {"no": 0, "yes": 1}
        and "num_labels" not in made
    )
    assert families.describe(bert, config, {})["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


def test_no_name_is_in_two_tables_of_a_family():
    for family in families.FAMILIES.values():
        for head in family.classes:
            prefix = family.prefixes[head]
            config = read(family.name, head)
            entries = {entry.ours: entry for entry in family.entries(config, prefix)}
            whole = [entry.theirs for entry in entries.values() if entry.layout.parts == 1]
            assert len(set(whole)) == len(whole), family.name
    assert huggingface.load and set(families.FAMILIES) == set(SIZES)
