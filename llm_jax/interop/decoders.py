"""GPT-2, Llama and Llama's kin (Mistral, Qwen2, Qwen3) as transformers writes them."""

from collections.abc import Callable
from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.interop.family import ACTIVATION_WORDS, ACTIVATIONS, Family, Held, labels
from llm_jax.interop.fields import Fields
from llm_jax.interop.names import FLIP, HEADS_IN, HEADS_OUT, SAME, Entry, Layout, flat, linear, norm
from llm_jax.models.config import ModelConfig

HERE = "decoder/layers/"

GPT2_EPSILON = 1e-5


def _fused(part: int, name: str) -> tuple[Entry, ...]:
    """Queries, keys and values lie side by side in one product, which is not transposed."""
    return (
        Entry(f"{HERE}attention/{name}", "h.{}.attn.c_attn.weight", Layout("d h e", "d (p h e)", parts=3), part),
        Entry(f"{HERE}attention/{name}_bias", "h.{}.attn.c_attn.bias", Layout("h e", "(p h e)", parts=3), part),
    )


GPT2_BASE = flat(
    Entry("embed/tokens", "wte.weight"),
    Entry("embed/positions", "wpe.weight"),
    *(_fused(part, name) for part, name in enumerate(("query", "key", "value"))),
    linear(f"{HERE}attention/out", "h.{}.attn.c_proj", Layout("h e d", "(h e) d")),
    norm(f"{HERE}attention_norm", "h.{}.ln_1"),
    linear(f"{HERE}mlp/up", "h.{}.mlp.c_fc", SAME),
    linear(f"{HERE}mlp/down", "h.{}.mlp.c_proj", SAME),
    norm(f"{HERE}mlp_norm", "h.{}.ln_2"),
    norm("decoder/norm", "ln_f"),
)

LLAMA_BASE = flat(
    Entry("embed/tokens", "embed_tokens.weight"),
    *(
        linear(f"{HERE}attention/{name}", f"layers.{{}}.self_attn.{name[0]}_proj", HEADS_OUT)
        for name in ("query", "key", "value")
    ),
    linear(f"{HERE}attention/out", "layers.{}.self_attn.o_proj", HEADS_IN),
    Entry(f"{HERE}attention_norm/scale", "layers.{}.input_layernorm.weight"),
    Entry(f"{HERE}mlp/up", "layers.{}.mlp.gate_proj.weight", FLIP),
    Entry(f"{HERE}mlp/gate", "layers.{}.mlp.up_proj.weight", FLIP),
    Entry(f"{HERE}mlp/down", "layers.{}.mlp.down_proj.weight", FLIP),
    Entry(f"{HERE}mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
    Entry("decoder/norm/scale", "norm.weight"),
)

QK_NORM = (
    Entry(f"{HERE}attention/query_norm/scale", "layers.{}.self_attn.q_norm.weight"),
    Entry(f"{HERE}attention/key_norm/scale", "layers.{}.self_attn.k_norm.weight"),
)

HEADS = {
    "none": (),
    "lm": (Entry("head/kernel", "lm_head.weight"),),
    "classification": (Entry("head/classification", "score.weight", FLIP),),
    "span": linear("head/span", "qa_outputs"),
}
TIED = {"lm": (Entry("embed/tokens", "lm_head.weight"),)}


def _read_gpt2(f: Fields, head: str, held: Held) -> ModelConfig:
    f.only(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, pruned_heads={})
    dim = f.integer("n_embd")
    return ModelConfig(
        architecture="decoder",
        vocab_size=f.integer("vocab_size"),
        max_length=f.integer("n_positions"),
        layers=f.integer("n_layer"),
        dim=dim,
        heads=f.integer("n_head"),
        mlp_dim=f.integer("n_inner", 4 * dim),
        mlp=f.word("activation_function", ACTIVATIONS, "gelu_new"),
        norm="layer",
        norm_epsilon=f.number("layer_norm_epsilon", GPT2_EPSILON),
        positions="learned",
        bias="all",
        attention_scale=f.flag("scale_attn_weights", True),
        tie_embeddings=f.flag("tie_word_embeddings", True),
        head=head,
        labels=labels(f, head),
        dropout=f.rate("resid_pdrop", 0.1),
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_layer": config.layers,
        "n_embd": config.dim,
        "n_head": config.heads,
        "n_inner": config.mlp_size,
        "activation_function": ACTIVATION_WORDS.get(config.mlp, "gelu_new"),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.attention_scale,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def rotary_base(f: Fields) -> float:
    """The base of the wavelengths, at its old place and at its new one.

    Raises:
        CheckpointError: wavelengths scaled in any way, part of a head left unrotated, or two places that disagree.
    """
    f.only(partial_rotary_factor=1.0)
    stated = [f.number("rope_theta")] if f.values.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = f.section(key)
        rope.only(rope_type="default", type="default", partial_rotary_factor=1.0)
        for name in sorted(set(rope.values) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
            raise CheckpointError(
                f"{rope.where}: {name} is {rope.values[name]!r}: scaled rotary positions are not implemented"
            )
        if rope.values.get("rope_theta") is not None:
            stated.append(rope.number("rope_theta"))
    if len(set(stated)) > 1:
        raise CheckpointError(f"{f.where}: rope_theta is stated twice, with {stated[0]} and {stated[1]}")
    base = stated[0] if stated else 10000.0
    if not base > 1:
        raise CheckpointError(f"{f.where}: rope_theta is {base}: it must be above 1")
    return base


def _window_of_mistral(f: Fields, layers: int) -> int:
    return f.integer("sliding_window", 0) if "sliding_window" in f.values else 4096


def _window_of_qwen(f: Fields, layers: int) -> int:
    """Its window, if any layer has one."""
    kinds = f.words("layer_types")
    if kinds and (len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(
            f"{f.where}: layer_types has {len(kinds)} entries ({', '.join(sorted(set(kinds)))}): "
            f"only full_attention and sliding_attention for each of {layers} layers are implemented"
        )
    some = "sliding_attention" in kinds if kinds else f.integer("max_window_layers", 28, least=0) < layers
    return f.integer("sliding_window", 4096) if some and f.flag("use_sliding_window", False) else 0


def _no_window(f: Fields, layers: int) -> int:
    return 0


def _reader(
    bias: str, qk_norm: bool, head_dim: int, window: Callable[[Fields, int], int]
) -> Callable[[Fields, str, Held], ModelConfig]:
    """The reader of a kin of Llama's."""

    def read(f: Fields, head: str, held: Held) -> ModelConfig:
        f.only(attention_bias=False, mlp_bias=False)
        length, layers, heads = (
            f.integer(key) for key in ("max_position_embeddings", "num_hidden_layers", "num_attention_heads")
        )
        return ModelConfig(
            architecture="decoder",
            vocab_size=f.integer("vocab_size"),
            max_length=min(length, window(f, layers) or length),
            layers=layers,
            dim=f.integer("hidden_size"),
            heads=heads,
            kv_heads=f.integer("num_key_value_heads", heads),
            head_dim=f.integer("head_dim", head_dim),
            mlp_dim=f.integer("intermediate_size"),
            mlp="gated_" + f.word("hidden_act", ACTIVATIONS, "silu"),
            norm="rms",
            norm_epsilon=f.number("rms_norm_eps", 1e-6),
            positions="rotary",
            rotary_base=rotary_base(f),
            bias=bias,
            qk_norm=qk_norm,
            tie_embeddings=f.flag("tie_word_embeddings", False),
            head=head,
            labels=labels(f, head),
            dropout=f.rate("attention_dropout", 0.0),
        )

    return read


def _read_llama(f: Fields, head: str, held: Held) -> ModelConfig:
    config = _reader("none", False, 0, _no_window)(f, head, held)
    if config.dim % config.heads:
        raise CheckpointError(
            f"{f.where}: num_attention_heads={config.heads} does not divide hidden_size={config.dim}, as transformers "
            "wants of a llama"
        )
    return config


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_size,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "hidden_act": ACTIVATION_WORDS.get(config.mlp.removeprefix("gated_"), "silu"),
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": None, **_write_llama(config)}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * config.layers}
    return {**windows, **_write_llama(config)}


def _kin(
    name: str,
    title: str,
    read: Callable[[Fields, str, Held], ModelConfig],
    write: Callable[[ModelConfig], dict[str, Any]],
    span: str = "transformer.",
    more: tuple[Entry, ...] = (),
) -> Family:
    """A family with Llama's names."""
    return Family(
        name=name,
        classes={
            "lm": f"{title}ForCausalLM",
            "none": f"{title}Model",
            "classification": f"{title}ForSequenceClassification",
            "span": f"{title}ForQuestionAnswering",
        },
        base=(*LLAMA_BASE, *more),
        heads=HEADS,
        head_copies=TIED,
        prefixes={"lm": "model.", "classification": "model.", "span": span, "none": ""},
        constants=(r"(.*\.)?rotary_emb\.inv_freq",),
        read=read,
        write=write,
    )


GPT2 = Family(
    name="gpt2",
    classes={
        "lm": "GPT2LMHeadModel",
        "none": "GPT2Model",
        "classification": "GPT2ForSequenceClassification",
        "span": "GPT2ForQuestionAnswering",
    },
    also={"GPT2DoubleHeadsModel": "lm"},
    base=GPT2_BASE,
    heads=HEADS,
    head_copies=TIED,
    prefixes={"lm": "transformer.", "classification": "transformer.", "span": "transformer.", "none": ""},
    constants=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"multiple_choice_head\..*"),
    read=_read_gpt2,
    write=_write_gpt2,
)
LLAMA = _kin("llama", "Llama", _read_llama, _write_llama)
MISTRAL = _kin("mistral", "Mistral", _reader("none", False, 0, _window_of_mistral), _write_mistral, span="model.")
QWEN2 = _kin("qwen2", "Qwen2", _reader("qkv", False, 0, _window_of_qwen), _write_qwen)
QWEN3 = _kin("qwen3", "Qwen3", _reader("none", True, 128, _window_of_qwen), _write_qwen, more=QK_NORM)

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
