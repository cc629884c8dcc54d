"""Tiny files written by package `gguf` load as they should, refused ones say why, and no damage crashes, hangs or takes memory."""

import collections
import itertools
import json
import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_jax
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.interop import gguf as interop
from llm_jax.interop import gguf_file, gguf_tokenizer, names
from llm_jax.transforms import keep_zeros
from llm_jax.transforms.prune import TARGETS

V, D, H, K, E, F, L = 352, 32, 4, 2, 8, 64, 2
TOKENS = np.random.default_rng(0).integers(0, V, (2, 11)).astype(np.int32)

SIZES = {
    "block_count": L,
    "context_length": 64,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.head_count_kv": K,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": E,
}
SHAPES = {
    "attn_norm": (D,),
    "attn_q": (H * E, D),
    "attn_k": (K * E, D),
    "attn_v": (K * E, D),
    "attn_output": (D, H * E),
    "ffn_norm": (D,),
    "ffn_gate": (F, D),
    "ffn_up": (F, D),
    "ffn_down": (D, F),
}


def metadata(architecture="llama", **changes):
    """The keys of a tiny model; a change to None leaves a key out. `__` in a name stands for a dot."""
    found = {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in SIZES.items()}}
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def weights(seed=0):
    """Random tensors of a tiny model, unembedding tied."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in SHAPES.items()}
    return {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def write(path, keys, tensors, kinds=None):
    """A GGUF file; `kinds` gives the type of a tensor that is to be quantised."""
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key != "general.architecture":
            adders.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, x if x.dtype == np.uint8 else gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_of(tmp_path, tensors=None, **changes):
    return write(tmp_path / "tiny.gguf", metadata(**changes), weights() if tensors is None else tensors)


def refused(call, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# --- weights


def interleaved(x, heads):
    """Rows of each head in the order in which llama.cpp rotates them: the first of either half, the second of either, and so on."""
    halves = x.reshape(heads, 2, E // 2, -1)
    return np.ascontiguousarray(np.stack([halves[:, 0], halves[:, 1]], axis=2)).reshape(x.shape)


THEIRS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize(("kind", "tied"), [("Llama", True), ("Llama", False), ("Qwen2", True), ("Qwen3", False)])
def test_logits_are_those_of_transformers(tmp_path, mesh, kind, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture = kind.lower()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=K,
        intermediate_size=F,
        head_dim=E,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        **({"attention_bias": True} if kind == "Llama" and not tied else {}),
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tensors = {}
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(tensors))) * 0.3)
            stem, _, ending = name.rpartition(".")
            if "o_proj" in stem and ending == "bias":  # there, a bias of all products or of none
                x.zero_()
                continue
            layer, stem = (stem.split(".")[2], stem.split(".", 3)[3]) if ".layers." in stem else ("", stem)
            array = x.numpy()
            if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
                array = interleaved(array, H if stem.endswith("q_proj") else K)
            tensors[f"blk.{layer}.{THEIRS[stem]}.{ending}" if layer else f"{THEIRS[stem]}.{ending}"] = array.copy()
        logits = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    path = write(
        tmp_path / "tiny.gguf", metadata(architecture, **{f"{architecture}__attention__key_length": E}), tensors
    )
    model = interop.load(path, mesh())
    assert model.config.bias == ("qkv" if "blk.0.attn_q.bias" in tensors else "none")
    assert (model.config.tie_embeddings, model.config.norm_epsilon) == (tied, 1e-5)
    assert interop.read_sizes(path) == model.config and model.tokenizer is None
    np.testing.assert_allclose(llm_jax.apply(model, {"tokens": TOKENS}).logits, logits, atol=2e-4)


def test_on_a_mesh_it_is_the_same(tmp_path, mesh):
    path = file_of(tmp_path)
    one, eight = interop.load(path, mesh()), interop.load(path, mesh(fsdp=2, tensor=4))
    assert len(eight.params["embed"]["tokens"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, one.params, eight.params)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_what_is_pruned_survives_quantising(tmp_path, mesh, kind):
    """Zeros of matrices that were pruned before they were quantised are zeros after; what says so makes masks of them again."""
    tensors = {
        name: np.where(np.abs(x) < np.median(np.abs(x)), 0, x).astype(np.float32)
        if name.startswith("blk") and x.ndim == 2
        else x
        for name, x in weights().items()
    }
    kinds = {name: kind for name, x in tensors.items() if name.startswith("blk") and x.ndim == 2}
    whole, packed = (
        interop.load(write(tmp_path / f"{label}.gguf", metadata(), tensors, chosen), mesh())
        for label, chosen in (("whole", {}), ("packed", kinds))
    )
    known = {**whole.params["decoder"]["layers"]["attention"], **whole.params["decoder"]["layers"]["mlp"]}
    read = {**packed.params["decoder"]["layers"]["attention"], **packed.params["decoder"]["layers"]["mlp"]}
    for name, x in known.items():
        gone, left = np.asarray(x) == 0, np.asarray(read[name])
        assert gone.mean() == 0.5 and np.all(left[gone] == 0) and np.any(left != np.asarray(x)), name
    masked = llm_jax.transform(packed, keep_zeros(TARGETS), jax.random.key(0))
    assert len(masked.card["pruned"]) == len(known) and min(masked.card["pruned"].values()) >= 0.5


def test_it_is_saved_with_its_card(tmp_path, mesh):
    keys = metadata(general__name="A tiny one", general__file_type=7)
    path = write(tmp_path / "tiny-Q8.gguf", keys, weights(), {"token_embd.weight": Kind.Q8_0})
    model = interop.load(path, mesh())
    llm_jax.save(model, tmp_path / "saved")
    loaded = llm_jax.load(tmp_path / "saved", mesh())
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert model.card == {
        "name": "tiny-Q8",
        "parents": [],
        "transforms": [],
        "gguf": {
            "architecture": "llama",
            "name": "A tiny one",
            "types": {"F32": 2 + L * len(SHAPES) - 1, "Q8_0": 1},
            "file_type": "MOSTLY_Q8_0",
        },
    }
    assert loaded.card["gguf"] == model.card["gguf"]


KINDS = [kind for kind in Kind if kind.name not in ("Q8_1", "Q8_K", "Q1_0", "F64") and not kind.name.startswith("I")]
KINDS += [kind for kind in Kind if kind.name.startswith("IQ")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_dequantised(tmp_path, kind):
    """Whatever the axes; random bytes are read where package `gguf` cannot quantise."""
    rng = np.random.default_rng(0)
    for shape in ((512,), (33, 256), (3, 5, 256)):
        x = rng.standard_normal(shape).astype(np.float32)
        try:
            raw = gguf.quantize(x, kind)
        except NotImplementedError:
            values, size = gguf.GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // values * size), dtype=np.uint8)
        path = write(tmp_path / "one.gguf", metadata(), {"x": raw}, {"x": kind} if raw.dtype == np.uint8 else None)
        file = gguf_file.open_file(path)
        file.check_kinds()
        found = file.read("x")
        assert file.tensors["x"].kind == kind and found.shape == shape and found.dtype == np.float32
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(found, gguf.dequantize(raw, kind).reshape(shape))


def test_what_cannot_be_dequantised_is_refused(tmp_path):
    path = file_of(tmp_path, weights() | {"x": np.zeros((2, 32), np.int8)})
    assert refused(lambda: interop.load(path)) == f"{path}: x is of type I8, which cannot be dequantised"


def test_weights_do_not_change_with_the_file(tmp_path, mesh):
    path = file_of(tmp_path)
    model = interop.load(path, mesh())
    before = jax.tree.map(np.array, model.params)
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


# --- what is not supported


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gemma2"}, "unknown general.architecture 'gemma2'; known: llama, qwen2, qwen3"),
        ({"architecture": "qwen2moe"}, "unknown general.architecture 'qwen2moe'; did you mean 'qwen2'?"),
        ({"general__type": "adapter"}, "general.type is 'adapter': only 'model' is supported"),
        ({"split__count": 3}, "split.count is 3: only 0 or 1 is supported"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8: only 0 is supported"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn': only 'none' is supported"),
        ({"llama__rope__scaling__factor": 8.0}, "llama.rope.scaling.factor is 8.0: only 0.0 or 1.0 is supported"),
        (
            {"llama__attention__sliding_window": 32},
            "llama.attention.sliding_window is 32: attention to a window is not supported",
        ),
        (
            {"llama__rope__dimension_count": 4},
            "llama.rope.dimension_count is 4: only the size of a head, 8, is supported",
        ),
        (
            {"llama__attention__value_length": 16},
            "llama.attention.value_length is 16: only the size of a head, 8, is supported",
        ),
        (
            {"llama__attention__head_count": [4, 2]},
            "llama.attention.head_count is [4, 2]: layers that differ are not supported",
        ),
        (
            {"llama__attention__head_count": 0},
            "llama.attention.head_count is 0: it must be a whole number from 1 to 2147483647",
        ),
        (
            {"llama__attention__head_count": 8},
            "llama.rope.dimension_count is 8: only the size of a head, 4, is supported",
        ),
        ({"llama__attention__head_count_kv": 3}, "model.heads 4 is not a multiple of model.kv_heads 3"),
        ({"llama__block_count": 3}, "tensor blk.2.attn_norm.weight is not there, by the metadata it is [32]"),
        ({"llama__block_count": 2**31 - 1}, "2147483647 layers in 20 tensors"),
        ({"llama__block_count": "2"}, "llama.block_count is '2': it must be a whole number from 1 to 2147483647"),
        ({"llama__block_count": None}, "it has no llama.block_count: damaged, or of another kind"),
        (
            {"llama__feed_forward_length": 2**31 - 1},
            "tensor blk.0.ffn_gate.weight is [64, 32], by the metadata it is [2147483647, 32]",
        ),
        ({"llama__vocab_size": 300}, "tensor token_embd.weight is [352, 32], by the metadata it is [300, 32]"),
        (
            {"llama__attention__layer_norm_rms_epsilon": -1.0},
            "llama.attention.layer_norm_rms_epsilon is -1.0: it must be a positive number",
        ),
        ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base is nan: it must be a positive number"),
        ({"tokenizer__ggml__tokens": [str(i) for i in range(353)]}, "353 tokens, but embeddings of 352"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_supported_is_refused(tmp_path, changes, said):
    path = file_of(tmp_path, **changes)
    heard = refused(lambda: interop.load(path))
    assert heard.startswith(f"{path}: ") and heard.endswith(said)


def test_keys_that_change_nothing_are_taken(tmp_path, mesh):
    plain = interop.read_sizes(file_of(tmp_path))
    changes = {
        "general__type": "model",
        "llama__expert_count": 0,
        "llama__rope__scaling__type": "none",
        "llama__rope__scaling__factor": 8.0,
        "llama__attention__sliding_window": 64,
        "llama__attention__head_count": [H] * L,
        "llama__attention__key_length": E,
        "llama__attention__value_length": E,
        "llama__rope__freq_base": None,
        "llama__vocab_size": V,
        "general__alignment": 64,
        "llama__new_key": "x",
    }
    assert interop.read_sizes(file_of(tmp_path, **changes)) == plain


def test_other_tensors_are_refused(tmp_path):
    more = {**weights(), "blk.0.attn_qkv.weight": np.zeros((4, 32), np.float32)}
    del more["blk.1.ffn_up.weight"]
    said = refused(lambda: interop.load(file_of(tmp_path, more)))
    assert said.endswith("1 missing: blk.1.ffn_up.weight; 1 not expected: blk.0.attn_qkv.weight")
    scaled = weights() | {"rope_freqs.weight": np.ones(4, np.float32)}
    said = refused(lambda: interop.load(file_of(tmp_path, scaled)))
    assert said.endswith("tensor rope_freqs.weight: scaled rotary positions are not supported")
    said = refused(lambda: interop.load(file_of(tmp_path, {"x": np.ones(4, np.float32)})))
    assert said.endswith("2 layers in 1 tensors")


# --- tokenizers


def byte_level(bpe: Tokenizer, pre: str = "gpt-2", **changes):
    """The keys of a byte-level BPE."""
    model = json.loads(bpe.definition)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in ("<|endoftext|>", "<pad>") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    keys |= {"tokenizer." + key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


def pieces():
    """(tokens, types, scores) of a small vocabulary as SentencePiece makes them: rarer merges have lower scores."""
    text = "the theatre is there and then they sang the anthem of the other lands on the sand in ten tents ".replace(
        " ", "▁"
    )
    word, merges = list(text), []
    for _ in range(40):
        counts = collections.Counter(itertools.pairwise(word))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(left + right)
        joined = []
        for piece in word:
            if joined and joined[-1] == left and piece == right:
                joined[-1] = left + right
            else:
                joined.append(piece)
        word = joined
    merges = list(dict.fromkeys(merges))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *merges,
        *sorted(set(text) - set(merges)),
        "<user tag>",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return tokens, types, scores


def by_scores(**changes):
    """The keys of a BPE by scores."""
    tokens, types, scores = pieces()
    keys = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def read(tmp_path, keys) -> Tokenizer:
    found = interop.read_tokenizer(write(tmp_path / "tokens.gguf", metadata() | keys, {}))
    assert found is not None
    return found


def test_byte_level(tmp_path, tokenizer, corpus):
    found = read(tmp_path, byte_level(tokenizer))
    assert {role: i for role, i in found.special.items() if i is not None} == {"bos": 0, "eos": 0, "pad": 1}
    assert found.vocab_size == tokenizer.vocab_size
    assert json.loads(found.config)["chat_template"] == "{{ messages }}"
    assert json.loads(found.config)["add_bos_token"] is False
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))] + [
        "a<|endoftext|> b  \n\n  12",
        "",
        "ÿ😀",
    ]
    for text in texts:
        for special in (False, True):
            assert found.encode(text, special).tolist() == tokenizer.encode(text, special).tolist()
        assert found.decode(found.encode(text)) == text
    assert found.decode([0, 40], skip_special=True) == tokenizer.decode([40])


SPLIT = "It's 12345 o'clock,\r\n\n  DON'T  ask\u0301 x+=10; été\u00a0!! 東京 1/2\t"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        (
            "gpt-2",
            "It|'s| 12345| o|'|clock|,|\r\n\n | DON|'|T| | ask|\u0301| x|+=|10|;| été|\u00a0|!!| 東京| 1|/|2|\t",
        ),
        (
            "smollm",
            "It|'s| |1|2|3|4|5| o|'|clock|,|\r\n\n | DON|'|T| | ask|\u0301| x|+=|1|0|;| été|\u00a0|!!| 東京| |1|/|2|\t",
        ),
        (
            "llama-bpe",
            "It|'s| |123|45| o|'clock|,\r\n\n| | DON|'T| | ask|\u0301| x|+=|10|;| été|\u00a0|!!| 東京| |1|/|2|\t",
        ),
        (
            "qwen2",
            "It|'s| |1|2|3|4|5| o|'clock|,\r\n\n| | DON|'T| | ask|\u0301| x|+=|1|0|;| été|\u00a0|!!| 東京| |1|/|2|\t",
        ),
        (
            "default",
            "It|'|s| |123|45| o|'|clock|,|\r\n\n | DON|'|T| | ask|\u0301| x|+=|10|;| été|\u00a0|!!| 東京| |1|/|2|\t",
        ),
    ],
    ids=lambda x: x if len(x) < 10 else "",
)
def test_where_words_end(tmp_path, tokenizer, pre, words):
    found = read(tmp_path, byte_level(tokenizer, pre))
    engine = tokenizers.Tokenizer.from_str(found.definition)
    cut = [SPLIT[start:stop] for _, (start, stop) in engine.pre_tokenizer.pre_tokenize_str(SPLIT)]
    assert cut == words.split("|")
    if pre != "qwen2":
        assert found.decode(found.encode(SPLIT)) == SPLIT
    else:
        assert found.decode(found.encode("e\u0301")) == "\u00e9"


def test_llama3_takes_whole_words_and_begins_with_a_token(tmp_path, tokenizer):
    keys = byte_level(tokenizer, "llama-bpe")
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "zyxw"]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 1]
    found = read(tmp_path, keys)
    assert found.encode("zyxw").tolist() == [found.vocab_size - 1]
    assert json.loads(found.config)["add_bos_token"] is True
    whole = tokenizers.Tokenizer.from_str(found.definition)
    assert whole.encode("zyxw").ids == [0, found.vocab_size - 1]
    assert whole.encode("zyxw", "zyxw").ids == [0, found.vocab_size - 1] * 2


def greedy(text, tokens, types, scores):
    """The ids of a text as SentencePiece finds them: of all neighbours that make a token those of the highest score are joined, the
    leftmost first; what is no token in the end is spelt in bytes.
    """
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == 1}
    if not text:
        return []
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return read(tmp_path_factory.mktemp("pieces"), by_scores())


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["the", " ", "an", "then", "  ", "t", "</s>", "é", "😀", "<0x41>"])).map("".join)
)
def test_by_scores(sentencepiece, text):
    ids = sentencepiece.encode(text)
    assert ids.tolist() == greedy(text, *pieces())
    assert sentencepiece.decode(ids) == text


def test_tokens_found_before_the_others(tmp_path, sentencepiece):
    found = sentencepiece
    tokens = pieces()[0]
    assert (found.bos, found.eos, found.unk) == (1, 2, 0)
    assert json.loads(found.config)["add_bos_token"] is True
    user, the = tokens.index("<user tag>"), found.encode("the").tolist()
    assert found.encode("the<user tag>the").tolist() == [*the, user, *the]
    assert found.encode("the</s>the", special=True).tolist() == [*the, 2, *the]
    assert found.decode([*the, 2], skip_special=True) == "the"
    plain = read(tmp_path, by_scores(add_space_prefix=False, add_bos_token=False))
    assert plain.decode(plain.encode(" the the")) == " the the"
    assert plain.encode("▁the").tolist() == the and json.loads(plain.config)["add_bos_token"] is False


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre": "qwen3"}, "unknown tokenizer.ggml.pre 'qwen3'; did you mean 'qwen2'?"),
        ({"model": "bert"}, "unknown tokenizer.ggml.model 'bert'; known: gpt2, llama"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges: entry 0 is not two tokens"),
        ({"merges": ["zz yy"]}, "not a tokenizer.json: Token `zz` out of vocabulary"),
        ({"token_type": [1]}, "tokenizer.ggml.tokens has 512 entries and tokenizer.ggml.token_type 1"),
        ({"tokens": 3}, "tokenizer.ggml.tokens is 3: it must be an array of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "tokenizer.ggml.tokens: 'a' is token 0 and token 2"),
        (
            {"tokens": ["a", "b" * 2000], "token_type": None},
            "tokenizer.ggml.tokens: token 1 has 2000 characters, above 1024",
        ),
        ({"bos_token_id": 512}, "tokenizer.ggml.bos_token_id is 512: there are 512 tokens"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes': it must be true or false"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_tokenizers_are_refused(tmp_path, tokenizer, changes, said):
    changes = {f"ggml__{key}": value for key, value in changes.items()}
    heard = refused(lambda: read(tmp_path, byte_level(tokenizer, **changes)))
    assert heard.startswith(f"{tmp_path}/tokens.gguf: ") and said in heard


def test_bad_scores_are_refused(tmp_path):
    for scores in ([1.0], None, [float("nan")] * len(pieces()[0])):
        heard = refused(lambda scores=scores: read(tmp_path, by_scores(scores=scores)))
        assert "tokenizer.ggml.scores must be" in heard
    heard = refused(lambda: read(tmp_path, by_scores(remove_extra_whitespaces=True)))
    assert heard.endswith("a text that is changed before it is cut is not supported")


# --- damage


def text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def header(pairs=(), tensors=(), version=3, counts=None, tail=b"") -> bytes:
    """A file by hand: pairs (key, type, bytes of the value), tensors (name, axes, type, place)."""
    made = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    for key, kind, value in pairs:
        made += text(key) + struct.pack("<I", kind) + value
    for name, axes, kind, place in tensors:
        made += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, place)
    return made + bytes(-len(made) % 32) + tail


HUGE = 2**64 - 1
BAD = {
    "nothing": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(99), "not a GGUF file: it does not begin with GGUF"),
    "magic alone": (b"GGUF", "the version of 4 bytes goes past the end"),
    "version 1": (header(version=1), "GGUF version 1 is not supported; known: 2, 3"),
    "other byte order": (header(version=3 << 24), "of a machine with the other byte order is not supported"),
    "too many keys": (header(counts=(0, HUGE)), f"the number of keys is {HUGE}, more than the file can hold,"),
    "too many tensors": (header(counts=(2**40, 0)), "the number of tensors is 1099511627776, more than"),
    "long key": (header([("a" * 70_000, 4, bytes(4))]), "the length of the name of a key is 70000, above 65535,"),
    "unknown type": (header([("a", 13, bytes(16))]), "'a' has the unknown type 13"),
    "half a truth": (header([("a", 7, b"\x02" + bytes(16))]), "'a' is neither true nor false"),
    "long string": (header([("a", 8, struct.pack("<Q", HUGE) + bytes(16))]), f"the length of 'a' is {HUGE}, more than"),
    "not text": (header([("a", 8, struct.pack("<Q", 2) + b"a\xff" + bytes(16))]), "'a' is not UTF-8 at byte"),
    "long array": (header([("a", 9, struct.pack("<IQ", 0, 2**60) + bytes(16))]), f"the number of 'a' is {2**60}, more"),
    "long array of strings": (header([("a", 9, struct.pack("<IQ", 8, 2**40))]), "the number of 'a' is 1099511627776"),
    "array of arrays": (header([("a", 9, struct.pack("<IQ", 9, 2) + bytes(32))]), "is an array of the type 9, which"),
    "key twice": (header([("a", 4, bytes(4))] * 2), "the key 'a' stands there twice, again at byte 41"),
    "tensor twice": (header(tensors=[("t", (1,), 0, 0)] * 2, tail=bytes(64)), "the tensor 't' stands there twice"),
    "no axis": (header(tensors=[("t", (), 0, 0)], tail=bytes(64)), "'t' has 0 axes"),
    "five axes": (header(tensors=[("t", (1,) * 5, 0, 0)], tail=bytes(64)), "'t' has 5 axes"),
    "empty axis": (
        header(tensors=[("t", (0,), 0, 0)], tail=bytes(64)),
        "'t' has the shape [0], which type F32 does not",
    ),
    "huge axes": (header(tensors=[("t", (HUGE,) * 4, 0, 0)], tail=bytes(64)), "the file is cut off"),
    "no such type": (header(tensors=[("t", (32,), 4, 0)], tail=bytes(64)), "'t' has the unknown type 4"),
    "half a block": (header(tensors=[("t", (33,), 2, 0)], tail=bytes(64)), "has the shape [33], which type Q4_0 does"),
    "odd place": (header(tensors=[("t", (1,), 0, 4)], tail=bytes(64)), "'t' begins at 4, which is no multiple of 32,"),
    "far place": (header(tensors=[("t", (1,), 0, 2**63)], tail=bytes(64)), "the file is cut off at byte"),
    "cut off": (
        header(tensors=[("t", (32,), 0, 0)], tail=bytes(127)),
        "'t' goes to byte 192: the file is cut off at byte 64",
    ),
    "overlap": (
        header(tensors=[("t", (32,), 0, 0), ("u", (8,), 0, 96)], tail=bytes(128)),
        "'u' overlaps another tensor",
    ),
    "alignment 24": (
        header([("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment is 24: it must be a power of two",
    ),
    "alignment in words": (header([("general.alignment", 8, text("32"))]), "general.alignment is '32': it must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers_are_refused(tmp_path, name):
    content, said = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    heard = refused(lambda: interop.load(path))
    assert heard.startswith(f"{path}: ") and said in heard


def test_a_file_that_is_none(tmp_path):
    assert refused(lambda: interop.load(tmp_path / "no.gguf")).endswith("no.gguf: no such file")
    assert refused(lambda: interop.load(tmp_path)).endswith(": not a file")


def mutated(base: tuple[bytes, int], rng: random.Random) -> bytes:
    """The file with one to three of: bytes or numbers changed, a piece cut out, repeated or moved, the end cut off; most in the header."""
    made, header_size = bytearray(base[0]), base[1]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(min(4, len(made) - 1), min(header_size if rng.random() < 0.95 else len(made), len(made)))
        match rng.randrange(8):
            case 0 | 1:
                made[at] = rng.randrange(256)
            case 2 | 3:
                number = rng.choice(
                    (0, 1, 2, 7, 8, 9, 13, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, HUGE, len(made))
                )
                made[at : at + 8] = struct.pack("<Q", number)
            case 4:
                made[at : at + 4] = struct.pack("<i", rng.randint(-3, 40))
            case 5:
                del made[at : at + rng.randint(1, 40)]
            case 6:
                made[at:at] = made[at - rng.randint(1, 40) : at] * rng.choice((1, 1, 50))
            case 7:
                if rng.random() < 0.3:
                    del made[max(at, 1) :]
                else:
                    made[at] ^= 1 << rng.randrange(8)
    return bytes(made)


def packed(value) -> bytes:
    """The type and the bytes of a value of the metadata."""
    for kind, code, number in ((bool, 7, "?"), (int, 4, "I"), (float, 6, "f")):
        if isinstance(value, kind):
            return struct.pack(f"<I{number}", code, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind = packed(value[0])[:4] if value else struct.pack("<I", 8)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(packed(item)[4:] for item in value)


VALUES = [
    0,
    1,
    3,
    64,
    2**31,
    2**32 - 1,
    True,
    False,
    0.0,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "gpt2",
    "a" * 2000,
    "\n",
]
OTHERS = ["llama.expert_count", "llama.attention.sliding_window", "llama.attention.key_length", "llama.vocab_size"]
OTHERS += ["general.alignment", "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.add_bos_token"]
VALUES += [[], [0, 1], [1.5] * 9, ["a", "b"], ["a", "a"], [1] * 290, None]


def exchanged(keys: dict, base: tuple[bytes, int], rng: random.Random) -> bytes:
    """The file with the value of one or two keys made another, or left out."""
    keys = dict(keys)
    for _ in range(rng.choice((1, 1, 2))):
        values = [*VALUES, *keys.values()]
        key, value = rng.choice([*keys, *OTHERS]), rng.choice(values)
        if isinstance(value, list) and rng.random() < 0.5:
            value = value[: rng.randint(0, len(value))] + value[: rng.randint(0, 2)]
        keys[key] = value
        if value is None:
            del keys[key]
    content, start = base
    described = content.index(text("token_embd.weight"))
    made = content[:16] + struct.pack("<Q", len(keys)) + b"".join(text(k) + packed(v) for k, v in keys.items())
    made += content[described : described + sum(24 + len(name) + 8 * x.ndim for name, x in weights().items())]
    return made + bytes(-len(made) % 32) + content[start:]


def held(field: str) -> int:
    """Bytes of this process, the tokenizer library's among them: VmRSS now, VmHWM the most since VmRSS was asked for; 0 where it is not told."""
    try:
        if field == "VmRSS":
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_ten_thousand_damaged_files(tmp_path, tokenizer, mesh):
    """Each is refused in one line or loads, in no time and with little memory."""
    kinds = {name: Kind.Q8_0 for name, x in weights().items() if x.ndim == 2}
    path, bases = tmp_path / "damaged.gguf", []
    for more in (byte_level(tokenizer), by_scores()):
        keys = metadata() | shortened(more, lambda token: set(token) <= set("<>|Ġ▁aehnstu") or token == "<pad>")
        file = gguf_file.open_file(write(path, keys, weights(), kinds))
        config = interop.sizes(file)
        bases.append((keys, (path.read_bytes(), min(tensor.start for tensor in file.tensors.values()))))
    wanted = names.places(config, interop.entries("llama"))
    rng, loaded = random.Random(0), 0
    for number in range(10_000):
        keys, base = bases[number % 2]
        content = exchanged(keys, base, rng) if number % 5 == 0 else mutated(base, rng)
        if number % 4 < 2:  # slow
            tracemalloc.start()
        began, before = time.monotonic(), held("VmRSS")
        try:
            file = gguf_file.parse(content, path)
            found = interop.sizes(file)
            gguf_tokenizer.read(file)
            file.check_kinds()
            json.dumps(interop.card(file))
            if found == config:
                names.check({name: tensor.shape for name, tensor in file.tensors.items()}, wanted, (), path)
                loaded += 1
                if loaded % 50 == 0:
                    path.write_bytes(content)
                    interop.load(path, mesh())
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000, number
        finally:
            used, grown = tracemalloc.get_traced_memory()[1], held("VmHWM") - before
            tracemalloc.stop()
        assert time.monotonic() - began < 5 and used < 10 * len(content) + 2**20, number
        assert grown < 10 * len(content) + 2**20 or loaded % 50 == 0, number  # jax's, which loaded it
    assert 400 < loaded < 9000


def test_control_tokens_without_measure_are_refused(tmp_path):
    """What finds them in a text takes a kilobyte of memory a character, so they must not make up the file."""
    many = [f"<|{i:06d}|>" for i in range(20_000)]
    keys = metadata() | by_scores()
    k = "tokenizer.ggml."
    keys[k + "tokens"] = [*keys[k + "tokens"], *many]
    keys[k + "token_type"] = [*keys[k + "token_type"], *[3] * len(many)]
    keys[k + "scores"] = [*keys[k + "scores"], *[0.0] * len(many)]
    path = write(tmp_path / "many.gguf", keys, weights())
    with pytest.raises(UserError, match="control tokens of over .* characters in all"):
        gguf_tokenizer.read(gguf_file.open_file(path))


def shortened(keys: dict, kept) -> dict:
    """The keys with those tokens alone for which `kept` holds, and the merges that make one of them."""
    k = "tokenizer.ggml."
    rows = [i for i, token in enumerate(keys[k + "tokens"]) if kept(token)]
    keys = keys | {
        k + name: [keys[k + name][i] for i in rows] for name in ("tokens", "token_type", "scores") if k + name in keys
    }
    tokens = set(keys[k + "tokens"])
    if k + "merges" in keys:
        keys[k + "merges"] = [m for m in keys[k + "merges"] if {*m.split(" "), m.replace(" ", "")} <= tokens]
    return keys
