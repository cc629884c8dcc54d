"""T5, T5 1.1 (Flan) and Marian as transformers writes them."""

from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.interop.family import ACTIVATION_WORDS, ACTIVATIONS, Family, Held, labels
from llm_jax.interop.fields import Fields
from llm_jax.interop.names import FLIP, HEADS_IN, HEADS_OUT, ROW, Entry, flat, linear, norm
from llm_jax.models.config import ModelConfig

T5_LENGTH = 512
"""rows it was trained on; its positions are relative, so that transformers keeps no such number"""

MARIAN_EPSILON = 1e-5
"""the default of torch's LayerNorm"""


def _t5_side(side: str, mlp: int) -> tuple[Entry, ...]:
    """A stack of T5. Attention is the first part of a layer there, `mlp` the number of the last; between them lies cross-attention."""
    here, there = f"{side}/layers/", f"{side}.block.{{}}.layer."

    def attention(name: str, part: str) -> tuple[Entry, ...]:
        products = [
            Entry(f"{here}{name}/{ours}", f"{there}{part}.{ours[0]}.weight", HEADS_IN if ours == "out" else HEADS_OUT)
            for ours in ("query", "key", "value", "out")
        ]
        return (*products, Entry(f"{here}{name}_norm/scale", f"{there}{part[0]}.layer_norm.weight"))

    return flat(
        attention("attention", "0.SelfAttention"),
        attention("cross", "1.EncDecAttention") if side == "decoder" else (),
        Entry(f"{here}mlp/down", f"{there}{mlp}.DenseReluDense.wo.weight", FLIP),
        Entry(f"{here}mlp_norm/scale", f"{there}{mlp}.layer_norm.weight"),
        Entry(f"{side}/norm/scale", f"{side}.final_layer_norm.weight"),
        Entry(f"{side}/relative/table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    )


def _t5_up(config: ModelConfig) -> tuple[Entry, ...]:
    """The products into the hidden layer, which with a gate are named otherwise."""
    gated = config.mlp.startswith("gated_")
    table = {"up": "wi_0", "gate": "wi_1"} if gated else {"up": "wi"}
    return tuple(
        Entry(f"{side}/layers/mlp/{ours}", f"{side}.block.{{}}.layer.{part}.DenseReluDense.{theirs}.weight", FLIP)
        for side, part in (("encoder", 1), ("decoder", 2))
        for ours, theirs in table.items()
    )


def _marian_side(side: str) -> tuple[Entry, ...]:
    here, there = f"{side}/layers/", f"{side}.layers.{{}}."

    def attention(name: str, theirs: str) -> tuple[Entry, ...]:
        return flat(
            *(
                linear(f"{here}{name}/{part}", f"{there}{theirs}.{part[0]}_proj", HEADS_OUT)
                for part in ("query", "key", "value")
            ),
            linear(f"{here}{name}/out", f"{there}{theirs}.out_proj", HEADS_IN),
            norm(f"{here}{name}_norm", f"{there}{theirs}_layer_norm"),
        )

    return flat(
        attention("attention", "self_attn"),
        attention("cross", "encoder_attn") if side == "decoder" else (),
        linear(f"{here}mlp/up", f"{there}fc1"),
        linear(f"{here}mlp/down", f"{there}fc2"),
        norm(f"{here}mlp_norm", f"{there}final_layer_norm"),
    )


def _t5_mlp(f: Fields) -> str:
    """The kind of MLP. Its `gated-gelu` is the one with tanh."""
    stated = f.values.get("feed_forward_proj") or "relu"
    word = stated.removeprefix("gated-") if isinstance(stated, str) else ""
    if word not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise CheckpointError(
            f"{f.where}: feed_forward_proj is {stated!r}: not implemented; known, also with gated-: {known}"
        )
    gated = stated.startswith("gated-")
    act = "gelu_tanh" if stated == "gated-gelu" else ACTIVATIONS[word]
    f.only(is_gated_act=gated)
    if f.word("dense_act_fn", ACTIVATIONS, ACTIVATION_WORDS[act]) != act:
        raise CheckpointError(
            f"{f.where}: dense_act_fn is {f.values['dense_act_fn']!r}, but feed_forward_proj {stated!r}"
        )
    return f"gated_{act}" if gated else act


def _read_t5(f: Fields, head: str, held: Held) -> ModelConfig:
    """T5 scales the last hidden state where it ties the unembedding, T5 1.1 does neither.

    transformers 5 states the first as scale_decoder_outputs, and leaves it to the file whether an unembedding of its own is there.
    """
    f.only(is_decoder=False, is_encoder_decoder=True)
    scaled = f.flag("scale_decoder_outputs", f.flag("tie_word_embeddings", True))
    own = not f.flag("tie_word_embeddings", True) if held is None else not scaled and "lm_head.weight" in held
    if scaled and not f.flag("tie_word_embeddings", True):
        raise CheckpointError(
            f"{f.where}: tie_word_embeddings is false and scale_decoder_outputs true: implemented are tied and scaled, or neither"
        )
    layers = f.integer("num_layers")
    buckets = f.integer("relative_attention_num_buckets", 32, least=4)
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=f.integer("vocab_size"),
        max_length=f.integer("n_positions", T5_LENGTH),
        layers=layers,
        decoder_layers=f.integer("num_decoder_layers", layers),
        dim=f.integer("d_model"),
        heads=f.integer("num_heads"),
        head_dim=f.integer("d_kv"),
        mlp_dim=f.integer("d_ff"),
        mlp=_t5_mlp(f),
        norm="rms",
        norm_epsilon=f.number("layer_norm_epsilon", 1e-6),
        positions="relative",
        relative_buckets=buckets,
        relative_distance=f.integer("relative_attention_max_distance", 128, least=buckets // 2 + 1),
        attention_scale=False,
        tie_embeddings=not own,
        logits_scale=scaled,
        head=head,
        pooler="tanh" if head == "classification" else "none",
        labels=labels(f, head),
        dropout=f.rate("dropout_rate", 0.1),
    )


def _write_t5(config: ModelConfig) -> dict[str, Any]:
    gated, act = config.mlp.startswith("gated_"), config.mlp.removeprefix("gated_")
    word = "gelu" if gated and act == "gelu_tanh" else ACTIVATION_WORDS[act]
    scaled = config.logits_scale and config.tie_embeddings
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_depth,
        "d_model": config.dim,
        "num_heads": config.heads,
        "d_kv": config.head_size,
        "d_ff": config.mlp_size,
        "feed_forward_proj": f"gated-{word}" if gated else word,
        "dense_act_fn": ACTIVATION_WORDS[act],
        "is_gated_act": gated,
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": scaled,
        "is_encoder_decoder": True,
    }


def _read_marian(f: Fields, head: str, held: Held) -> ModelConfig:
    f.only(
        is_decoder=False,
        is_encoder_decoder=True,
        share_encoder_decoder_embeddings=True,
        normalize_before=False,
        normalize_embedding=False,
        add_final_layer_norm=False,
        add_bias_logits=False,
        static_position_embeddings=True,
        extra_pos_embeddings=0,
    )
    heads, mlp_dim = f.integer("encoder_attention_heads"), f.integer("encoder_ffn_dim")
    f.only(decoder_attention_heads=heads, decoder_ffn_dim=mlp_dim, decoder_vocab_size=f.integer("vocab_size"))
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=f.integer("vocab_size"),
        max_length=f.integer("max_position_embeddings"),
        layers=f.integer("encoder_layers"),
        decoder_layers=f.integer("decoder_layers"),
        dim=f.integer("d_model"),
        heads=heads,
        mlp_dim=mlp_dim,
        mlp=f.word("activation_function", ACTIVATIONS, "gelu"),
        norm="layer",
        norm_place="post",
        norm_epsilon=MARIAN_EPSILON,
        positions="sinusoidal_split",
        bias="all",
        tie_embeddings=f.flag("tie_word_embeddings", True),
        embedding_scale=f.flag("scale_embedding", False),
        logits_bias=head == "lm" and (held is None or "final_logits_bias" in held),
        head=head,
        dropout=f.rate("dropout", 0.1),
    )


def _write_marian(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "encoder_layers": config.layers,
        "decoder_layers": config.decoder_depth,
        "d_model": config.dim,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.mlp_size,
        "decoder_ffn_dim": config.mlp_size,
        "activation_function": ACTIVATION_WORDS.get(config.mlp, "gelu"),
        "scale_embedding": config.embedding_scale,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "share_encoder_decoder_embeddings": True,
        "is_encoder_decoder": True,
    }


SHARED = (Entry("embed/tokens", "shared.weight"),)
SHARED_COPIES = (
    Entry("embed/tokens", "encoder.embed_tokens.weight"),
    Entry("embed/tokens", "decoder.embed_tokens.weight"),
)
UNEMBEDDING = (Entry("head/kernel", "lm_head.weight"),)
TIED = {"lm": (Entry("embed/tokens", "lm_head.weight"),)}

T5 = Family(
    name="t5",
    classes={
        "lm": "T5ForConditionalGeneration",
        "none": "T5Model",
        "classification": "T5ForSequenceClassification",
        "span": "T5ForQuestionAnswering",
    },
    also={"T5WithLMHeadModel": "lm"},
    base=flat(SHARED, _t5_side("encoder", 1), _t5_side("decoder", 2)),
    variant=_t5_up,
    base_copies=SHARED_COPIES,
    heads={
        "none": (),
        "lm": UNEMBEDDING,
        "classification": flat(
            linear("head/pooler", "classification_head.dense"),
            linear("head/classification", "classification_head.out_proj"),
        ),
        "span": linear("head/span", "qa_outputs"),
    },
    head_copies=TIED,
    prefixes={"lm": "", "none": "", "span": "", "classification": "transformer."},
    constants=(r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    read=_read_t5,
    write=_write_t5,
)

MARIAN = Family(
    name="marian",
    classes={"lm": "MarianMTModel", "none": "MarianModel"},
    base=flat(SHARED, _marian_side("encoder"), _marian_side("decoder")),
    base_copies=SHARED_COPIES,
    heads={"none": (), "lm": (*UNEMBEDDING, Entry("head/bias", "final_logits_bias", ROW))},
    head_copies=TIED,
    prefixes={"lm": "model.", "none": ""},
    constants=(r"(model\.)?(encoder|decoder)\.embed_positions\.weights?",),
    read=_read_marian,
    write=_write_marian,
)

FAMILIES = (T5, MARIAN)
