"""BERT, RoBERTa and DistilBERT as transformers writes them."""

from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.interop.family import ACTIVATION_WORDS, ACTIVATIONS, Family, Held, labels
from llm_jax.interop.fields import Fields
from llm_jax.interop.names import HEADS_IN, HEADS_OUT, Entry, flat, linear, norm
from llm_jax.models.config import ModelConfig

DISTILBERT_EPSILON = 1e-12
"""fixed in its code"""


def _layer(there: dict[str, str]) -> tuple[Entry, ...]:
    """The table of a layer from the names of its parts there."""
    here = "encoder/layers/"
    return flat(
        linear(f"{here}attention/query", there["query"], HEADS_OUT),
        linear(f"{here}attention/key", there["key"], HEADS_OUT),
        linear(f"{here}attention/value", there["value"], HEADS_OUT),
        linear(f"{here}attention/out", there["out"], HEADS_IN),
        norm(f"{here}attention_norm", there["attention_norm"]),
        linear(f"{here}mlp/up", there["up"]),
        linear(f"{here}mlp/down", there["down"]),
        norm(f"{here}mlp_norm", there["mlp_norm"]),
    )


BASE = flat(
    Entry("embed/tokens", "embeddings.word_embeddings.weight"),
    Entry("embed/positions", "embeddings.position_embeddings.weight"),
    Entry("embed/types", "embeddings.token_type_embeddings.weight"),
    norm("embed/norm", "embeddings.LayerNorm"),
    _layer(
        {
            "query": "encoder.layer.{}.attention.self.query",
            "key": "encoder.layer.{}.attention.self.key",
            "value": "encoder.layer.{}.attention.self.value",
            "out": "encoder.layer.{}.attention.output.dense",
            "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
            "up": "encoder.layer.{}.intermediate.dense",
            "down": "encoder.layer.{}.output.dense",
            "mlp_norm": "encoder.layer.{}.output.LayerNorm",
        }
    ),
    linear("head/pooler", "pooler.dense"),
)

DISTILBERT_BASE = flat(
    Entry("embed/tokens", "embeddings.word_embeddings.weight"),
    Entry("embed/positions", "embeddings.position_embeddings.weight"),
    norm("embed/norm", "embeddings.LayerNorm"),
    _layer(
        {
            "query": "transformer.layer.{}.attention.q_lin",
            "key": "transformer.layer.{}.attention.k_lin",
            "value": "transformer.layer.{}.attention.v_lin",
            "out": "transformer.layer.{}.attention.out_lin",
            "attention_norm": "transformer.layer.{}.sa_layer_norm",
            "up": "transformer.layer.{}.ffn.lin1",
            "down": "transformer.layer.{}.ffn.lin2",
            "mlp_norm": "transformer.layer.{}.output_layer_norm",
        }
    ),
)


def _read(f: Fields, head: str, held: Held, pooler: str) -> ModelConfig:
    """What BERT and RoBERTa have in common."""
    f.only(
        is_decoder=False,
        add_cross_attention=False,
        position_embedding_type="absolute",
        tie_word_embeddings=True,
        pruned_heads={},
    )
    if head == "classification" or (held is not None and "pooler.dense.weight" in held):
        pooler = "tanh"
    return ModelConfig(
        architecture="encoder",
        vocab_size=f.integer("vocab_size"),
        max_length=f.integer("max_position_embeddings"),
        layers=f.integer("num_hidden_layers"),
        dim=f.integer("hidden_size"),
        heads=f.integer("num_attention_heads"),
        mlp_dim=f.integer("intermediate_size"),
        mlp=f.word("hidden_act", ACTIVATIONS, "gelu"),
        norm="layer",
        norm_place="post",
        norm_epsilon=f.number("layer_norm_eps", 1e-12),
        positions="learned",
        bias="all",
        embedding_norm=True,
        token_types=f.integer("type_vocab_size", 2),
        head=head,
        pooler=pooler,
        labels=labels(f, head),
        dropout=f.rate("hidden_dropout_prob", 0.1),
    )


def _pooler(f: Fields, held: Held, without: tuple[str, ...]) -> str:
    """Whether a class has a pooler, as far as its name tells."""
    return "none" if held is not None or (f.words("architectures") or ["?"])[0] in without else "tanh"


def _read_bert(f: Fields, head: str, held: Held) -> ModelConfig:
    return _read(f, head, held, _pooler(f, held, ("BertForMaskedLM", "BertForQuestionAnswering")))


def _read_roberta(f: Fields, head: str, held: Held) -> ModelConfig:
    """Its table of positions begins with those of the padding and before."""
    pooler = _pooler(f, held, ("RobertaForMaskedLM", "RobertaForQuestionAnswering"))
    config = _read(f, head, held, pooler)
    offset = f.integer("pad_token_id", 1, least=0) + 1
    if config.max_length <= offset:
        raise CheckpointError(
            f"{f.where}: max_position_embeddings is {config.max_length}: {offset} of them are set aside"
        )
    if head == "mlm" and config.mlp != "gelu":
        raise CheckpointError(f"{f.where}: hidden_act is {f.values['hidden_act']!r}: RoBERTa's mlm head has gelu")
    return config.replace(position_offset=offset, max_length=config.max_length - offset)


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_size,
        "hidden_act": ACTIVATION_WORDS.get(config.mlp, "gelu"),
        "layer_norm_eps": config.norm_epsilon,
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "tie_word_embeddings": True,
    }


def _write_roberta(config: ModelConfig) -> dict[str, Any]:
    return _write_bert(config) | {
        "max_position_embeddings": config.max_length + config.position_offset,
        "pad_token_id": config.position_offset - 1,
    }


def _read_distilbert(f: Fields, head: str, held: Held) -> ModelConfig:
    f.only(tie_word_embeddings=True, pruned_heads={})
    return ModelConfig(
        architecture="encoder",
        vocab_size=f.integer("vocab_size"),
        max_length=f.integer("max_position_embeddings"),
        layers=f.integer("n_layers"),
        dim=f.integer("dim"),
        heads=f.integer("n_heads"),
        mlp_dim=f.integer("hidden_dim"),
        mlp=f.word("activation", ACTIVATIONS, "gelu"),
        norm="layer",
        norm_place="post",
        norm_epsilon=DISTILBERT_EPSILON,
        positions="learned",
        bias="all",
        embedding_norm=True,
        head=head,
        pooler="relu" if head == "classification" else "none",
        labels=labels(f, head),
        dropout=f.rate("dropout", 0.1),
    )


def _write_distilbert(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "n_layers": config.layers,
        "dim": config.dim,
        "n_heads": config.heads,
        "hidden_dim": config.mlp_size,
        "activation": ACTIVATION_WORDS.get(config.mlp, "gelu"),
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": True,
    }


def _prefixes(prefix: str) -> dict[str, str]:
    return {"mlm": prefix, "classification": prefix, "span": prefix, "none": ""}


SPAN = linear("head/span", "qa_outputs")
POSITIONS = r"(.*\.)?embeddings\.position_ids"
"""a buffer that counts from 0, which old files hold"""

BERT = Family(
    name="bert",
    classes={
        "none": "BertModel",
        "mlm": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "span": "BertForQuestionAnswering",
    },
    also={"BertForPreTraining": "mlm", "BertForNextSentencePrediction": "none"},
    base=BASE,
    heads={
        "none": (),
        "mlm": flat(
            linear("head/dense", "cls.predictions.transform.dense"),
            norm("head/norm", "cls.predictions.transform.LayerNorm"),
            Entry("head/bias", "cls.predictions.bias"),
        ),
        "classification": linear("head/classification", "classifier"),
        "span": SPAN,
    },
    head_copies={
        "mlm": (
            Entry("embed/tokens", "cls.predictions.decoder.weight"),
            Entry("head/bias", "cls.predictions.decoder.bias"),
        )
    },
    prefixes=_prefixes("bert."),
    constants=(POSITIONS, r"cls\.seq_relationship\.(weight|bias)"),
    read=_read_bert,
    write=_write_bert,
)

ROBERTA = Family(
    name="roberta",
    classes={
        "none": "RobertaModel",
        "mlm": "RobertaForMaskedLM",
        "classification": "RobertaForSequenceClassification",
        "span": "RobertaForQuestionAnswering",
    },
    base=BASE,
    heads={
        "none": (),
        "mlm": flat(
            linear("head/dense", "lm_head.dense"),
            norm("head/norm", "lm_head.layer_norm"),
            Entry("head/bias", "lm_head.bias"),
        ),
        "classification": flat(
            linear("head/pooler", "classifier.dense"), linear("head/classification", "classifier.out_proj")
        ),
        "span": SPAN,
    },
    head_copies={"mlm": (Entry("embed/tokens", "lm_head.decoder.weight"), Entry("head/bias", "lm_head.decoder.bias"))},
    prefixes=_prefixes("roberta."),
    constants=(POSITIONS,),
    read=_read_roberta,
    write=_write_roberta,
)

DISTILBERT = Family(
    name="distilbert",
    classes={
        "none": "DistilBertModel",
        "mlm": "DistilBertForMaskedLM",
        "classification": "DistilBertForSequenceClassification",
        "span": "DistilBertForQuestionAnswering",
    },
    base=DISTILBERT_BASE,
    heads={
        "none": (),
        "mlm": flat(
            linear("head/dense", "vocab_transform"),
            norm("head/norm", "vocab_layer_norm"),
            Entry("head/bias", "vocab_projector.bias"),
        ),
        "classification": flat(linear("head/pooler", "pre_classifier"), linear("head/classification", "classifier")),
        "span": SPAN,
    },
    head_copies={"mlm": (Entry("embed/tokens", "vocab_projector.weight"),)},
    prefixes=_prefixes("distilbert."),
    constants=(POSITIONS,),
    read=_read_distilbert,
    write=_write_distilbert,
)

FAMILIES = (BERT, ROBERTA, DISTILBERT)
