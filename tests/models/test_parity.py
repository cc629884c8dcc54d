"""The same tiny random model here and in transformers: BERT, GPT-2, Llama and T5 differ by their names alone."""

import jax
import numpy as np
import pytest

from llm_jax.models import presets, transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, H, E, F, L, S = 99, 32, 4, 8, 48, 2, 13
SIZE = dict(vocab_size=V, layers=L, dim=D, heads=H, mlp_dim=F, max_length=32)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, V, (2, S)).astype(np.int32)
REAL = (np.arange(S) < np.array([[S], [9]])).astype(np.int32)


def heads_out(x):
    """(H E, D) of torch's Linear -> (D, H, E)."""
    return x.T.reshape(x.shape[1], -1, E)


def heads_bias(x):
    return x.reshape(-1, E)


def heads_in(x):
    """(D, H E) of torch's Linear -> (H, E, D)."""
    return x.T.reshape(-1, E, x.shape[0])


def flip(x):
    return x.T


def same(x):
    return x


class Weights:
    """A torch model's weights by name, random: fresh biases are zero and fresh norms one, which would hide much."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, x in model.named_parameters():
                drawn = torch.randn(x.shape, generator=generator)
                norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
                x.copy_(1 + 0.2 * drawn if norm else drawn * 0.25)
        self.named = {name: x.numpy() for name, x in model.eval().state_dict().items()}
        self.read = set()

    def __call__(self, name, change=same):
        self.read.add(name)
        return change(self.named[name])

    def stack(self, pattern, change=same):
        """The weight of each layer, one above the other."""
        return np.stack([self(pattern.format(i), change) for i in range(L)])

    def layers(self, table, biased=False):
        """{path here: (name there, change)}, each also with its bias."""
        made = {}
        for path, (name, change) in table.items():
            for suffix, ending in (("", ".weight"), ("_bias", ".bias")) if biased else (("", ".weight"),):
                *parents, last = path.split("/")
                into = made
                for part in parents:
                    into = into.setdefault(part, {})
                leaf = {"scale_bias": "bias"}.get(last + suffix, last + suffix)
                how = heads_bias if suffix and change is heads_out else same if suffix else change
                into[leaf] = self.stack(name + ending, how)
        return made


def apply(config, params, batch, **options):
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, transformer.shapes(config))
    return jax.device_get(
        jax.jit(lambda params, batch: transformer.apply(config, params, batch, **options))(params, batch)
    )


def equal(found, expected, where=REAL):
    """At the real tokens: what stands at padding means nothing."""
    expected, where = expected.detach().numpy(), where.astype(bool)
    assert np.abs(expected[where]).max() > 0.3
    np.testing.assert_allclose(found[where], expected[where], atol=1e-4)


def long(x):
    return torch.from_numpy(x).long()


def test_bert():
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=L,
            num_attention_heads=H,
            intermediate_size=F,
            max_position_embeddings=32,
        )
    )
    w = Weights(theirs)
    block = "encoder.layer.{}."
    params = {
        "embed": {
            "tokens": w("embeddings.word_embeddings.weight"),
            "positions": w("embeddings.position_embeddings.weight"),
            "types": w("embeddings.token_type_embeddings.weight"),
            "norm": {"scale": w("embeddings.LayerNorm.weight"), "bias": w("embeddings.LayerNorm.bias")},
        },
        "encoder": {
            "layers": w.layers(
                {
                    "attention/query": (block + "attention.self.query", heads_out),
                    "attention/key": (block + "attention.self.key", heads_out),
                    "attention/value": (block + "attention.self.value", heads_out),
                    "attention/out": (block + "attention.output.dense", heads_in),
                    "attention_norm/scale": (block + "attention.output.LayerNorm", same),
                    "mlp/up": (block + "intermediate.dense", flip),
                    "mlp/down": (block + "output.dense", flip),
                    "mlp_norm/scale": (block + "output.LayerNorm", same),
                },
                biased=True,
            )
        },
        "head": {"pooler": w("pooler.dense.weight", flip), "pooler_bias": w("pooler.dense.bias")},
    }
    assert w.read == set(w.named)
    types = RNG.integers(0, 2, TOKENS.shape).astype(np.int32)
    expected = theirs(long(TOKENS), attention_mask=long(REAL), token_type_ids=long(types), output_hidden_states=True)
    found = apply(
        presets.bert(**SIZE), params, {"tokens": TOKENS, "segment_ids": REAL, "types": types}, hidden_states=True
    )
    equal(found.hidden, expected.last_hidden_state)
    equal(found.hidden_states[0], expected.hidden_states[1])
    equal(found.logits, expected.pooler_output, np.ones(2))


def test_gpt2():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=D, n_layer=L, n_head=H, n_inner=F)
    )
    w = Weights(theirs)
    block = "transformer.h.{}."

    def part(i, change):
        """Queries, keys or values out of the (D, 3 D) weight; GPT-2's is not transposed."""
        return lambda x: change(np.split(x, 3, axis=-1)[i].T if x.ndim > 1 else np.split(x, 3)[i])

    attention = {
        name: w.stack(block + "attn.c_attn.weight", part(i, heads_out))
        for i, name in enumerate(("query", "key", "value"))
    }
    attention |= {
        f"{name}_bias": w.stack(block + "attn.c_attn.bias", part(i, heads_bias))
        for i, name in enumerate(("query", "key", "value"))
    }
    layers = w.layers(
        {
            "attention/out": (block + "attn.c_proj", lambda x: heads_in(x.T)),
            "attention_norm/scale": (block + "ln_1", same),
            "mlp/up": (block + "mlp.c_fc", same),
            "mlp/down": (block + "mlp.c_proj", same),
            "mlp_norm/scale": (block + "ln_2", same),
        },
        biased=True,
    )
    layers["attention"] |= attention
    params = {
        "embed": {"tokens": w("transformer.wte.weight"), "positions": w("transformer.wpe.weight")},
        "decoder": {
            "layers": layers,
            "norm": {"scale": w("transformer.ln_f.weight"), "bias": w("transformer.ln_f.bias")},
        },
    }
    assert w.read == set(w.named) - {"lm_head.weight"}
    expected = theirs(long(TOKENS), attention_mask=long(REAL)).logits
    equal(apply(presets.gpt2(**SIZE), params, {"tokens": TOKENS, "segment_ids": REAL}).logits, expected)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_llama_and_its_kin(kind):
    """Grouped heads in all; biases of queries, keys and values in Qwen2, their norms in Qwen3."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=2,
        intermediate_size=F,
        head_dim=E,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    w = Weights(theirs)
    block = "model.layers.{}."
    layers = w.layers(
        {
            "attention/query": (block + "self_attn.q_proj", heads_out),
            "attention/key": (block + "self_attn.k_proj", heads_out),
            "attention/value": (block + "self_attn.v_proj", heads_out),
            "attention/out": (block + "self_attn.o_proj", heads_in),
            "attention_norm/scale": (block + "input_layernorm", same),
            "mlp/gate": (block + "mlp.up_proj", flip),
            "mlp/up": (block + "mlp.gate_proj", flip),
            "mlp/down": (block + "mlp.down_proj", flip),
            "mlp_norm/scale": (block + "post_attention_layernorm", same),
        }
    )
    if kind == "Qwen2":
        layers["attention"] |= {
            f"{name}_bias": w.stack(f"{block}self_attn.{name[0]}_proj.bias", heads_bias)
            for name in ("query", "key", "value")
        }
    if kind == "Qwen3":
        layers["attention"] |= {
            f"{name}_norm": {"scale": w.stack(f"{block}self_attn.{name[0]}_norm.weight")} for name in ("query", "key")
        }
    params = {
        "embed": {"tokens": w("model.embed_tokens.weight")},
        "decoder": {"layers": layers, "norm": {"scale": w("model.norm.weight")}},
        "head": {"kernel": w("lm_head.weight")},
    }
    assert w.read == set(w.named)
    ours = presets.llama(**SIZE, kv_heads=2, bias="qkv" if kind == "Qwen2" else "none", qk_norm=kind == "Qwen3")
    expected = theirs(long(TOKENS), attention_mask=long(REAL)).logits
    equal(apply(ours, params, {"tokens": TOKENS, "segment_ids": REAL}).logits, expected)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_t5(version):
    """The first T5 with ReLU and a tied unembedding, and T5 1.1 with a gate and an unembedding of its own."""
    gated = version == "1.1"
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=D,
            d_kv=E,
            d_ff=F,
            num_layers=L,
            num_decoder_layers=L,
            num_heads=H,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            decoder_start_token_id=0,
        )
    )
    w = Weights(theirs)

    def side(name, mlp, cross):
        block = name + ".block.{}.layer."
        there = [("attention", "0.SelfAttention")] + ([("cross", "1.EncDecAttention")] if cross else [])
        table = {
            f"{here}/{part}": (f"{block}{other}.{part[0]}", heads_in if part == "out" else heads_out)
            for here, other in there
            for part in ("query", "key", "value", "out")
        }
        table |= {
            f"{here}_norm/scale": (f"{block}{other[0]}.layer_norm", same) for here, other in (*there, ("mlp", str(mlp)))
        }
        inner = f"{block}{mlp}.DenseReluDense."
        table |= {
            "mlp/down": (inner + "wo", flip),
            **(
                {"mlp/up": (inner + "wi_0", flip), "mlp/gate": (inner + "wi_1", flip)}
                if gated
                else {"mlp/up": (inner + "wi", flip)}
            ),
        }
        return {
            "layers": w.layers(table),
            "norm": {"scale": w(f"{name}.final_layer_norm.weight")},
            "relative": {"table": w(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")},
        }

    params = {
        "embed": {"tokens": w("shared.weight")},
        "encoder": side("encoder", 1, False),
        "decoder": side("decoder", 2, True),
    }
    if gated:
        params["head"] = {"kernel": w("lm_head.weight")}
    assert set(w.named) - w.read <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    ours = presets.t5(
        **SIZE,
        head_dim=E,
        relative_buckets=8,
        relative_distance=12,
        mlp="gated_gelu_tanh" if gated else "relu",
        tie_embeddings=not gated,
        logits_scale=not gated,
    )
    targets = RNG.integers(3, V, (2, 10)).astype(np.int32)
    expected = theirs(input_ids=long(TOKENS), attention_mask=long(REAL), decoder_input_ids=long(targets)).logits
    found = apply(ours, params, {"encoder_tokens": TOKENS, "encoder_segment_ids": REAL, "tokens": targets})
    equal(found.logits, expected, np.ones((2, 10)))
