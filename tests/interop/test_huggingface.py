"""Directories of transformers without transformers: what is read, made afresh, left out, refused, and written back."""

import dataclasses
import json
import re
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from llm_jax import cli, tree
from llm_jax import model as models
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import CheckpointError, DataError
from llm_jax.interop import huggingface
from llm_jax.model import Model
from llm_jax.transforms import chain, keep_zeros, prune, shrink
from tests.families import tiny_model
from tests.transforms import laws

POOLERS = {
    "bert": {"none": "tanh", "mlm": "tanh", "classification": "tanh", "span": "none"},
    "roberta": {"none": "none", "mlm": "none", "classification": "tanh"},
    "distilbert": {"none": "none", "mlm": "none", "classification": "relu", "span": "none"},
    "t5": {"none": "none", "lm": "none", "classification": "tanh", "span": "none"},
}
HEADS = [
    *((family, dict(head=head, pooler=pooler)) for family, table in POOLERS.items() for head, pooler in table.items()),
    ("bert", dict(pooler="none")),
    *(("gpt2", dict(head=head)) for head in ("none", "lm", "classification", "span")),
    *(("llama", dict(head=head, kv_heads=1)) for head in ("none", "lm", "classification", "span")),
    ("llama", dict(bias="qkv")),
    ("llama", dict(qk_norm=True, head_dim=8, tie_embeddings=True)),
    ("t5", dict(head_dim=10, mlp="gated_gelu_tanh", tie_embeddings=False, logits_scale=False, decoder_layers=1)),
    *(("marian", dict(head=head, logits_bias=head == "lm")) for head in ("none", "lm")),
    ("marian", dict(logits_bias=False)),
]


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(dict(safetensors.numpy.load_file(path))), path)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family, changes", HEADS)
def test_what_is_written_is_read(family: str, changes: Any, made: Any, tmp_path: Path, equal_trees: Any):
    model = made(family, **changes)
    huggingface.save(model, tmp_path / "model")
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.config.head == model.config.head
    equal_trees(loaded.params, model.params)
    assert huggingface.read_sizes(tmp_path / "model") == loaded.config
    huggingface.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_card_says_where_it_comes_from(directory: Any):
    folder = directory("gpt2")
    card = huggingface.load(folder).card
    assert card["name"] == "model" and card["parents"] == [] and card["transforms"] == []
    assert card["huggingface"]["config"] == json.loads((folder / "config.json").read_text())
    assert card["huggingface"]["dtype"] == "float32" and card["huggingface"]["left_out"] == []
    json.dumps(card)


def test_a_sharded_load_equals_one(made: Any, mesh: Any, tmp_path: Path, equal_trees: Any):
    """Onto a mesh of 2 by 2 from three files: the same bits, laid out as the rules say."""
    model = made("llama", vocab_size=96, heads=4, head_dim=8, kv_heads=2)
    huggingface.save(model, tmp_path / "one")
    huggingface.save(model, tmp_path / "three", shard_size=40_000)
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    spread = huggingface.load(tmp_path / "three", mesh(fsdp=2, tensor=2))
    equal_trees(spread.params, huggingface.load(tmp_path / "one", mesh()).params)
    wanted = models.abstract_params(spread.config, mesh(fsdp=2, tensor=2))
    assert all(x.sharding == a.sharding for x, a in zip(jax.tree.leaves(spread.params), jax.tree.leaves(wanted)))
    query = spread.params["decoder"]["layers"]["attention"]["query"]
    assert query.addressable_shards[0].data.shape == (2, 18, 2, 8)
    huggingface.save(spread, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
    everywhere = huggingface.load(tmp_path / "one")
    assert len(everywhere.params["embed"]["tokens"].sharding.device_set) == len(jax.devices())


def test_loading_and_saving_hold_no_second_copy(made: Any, mesh: Any, tmp_path: Path):
    model = made("gpt2", vocab_size=8000, dim=128, heads=4, mlp_dim=512, layers=3)
    size = tree.nbytes(model.params)
    largest = max(x.nbytes for x in jax.tree.leaves(model.params))
    tracemalloc.start()
    try:
        huggingface.save(model, tmp_path / "model", dtype="bfloat16", shard_size=2 * 10**6)
        assert tracemalloc.get_traced_memory()[1] < 2 * largest + 2**20
        tracemalloc.reset_peak()
        loaded = huggingface.load(tmp_path / "model", mesh())
        assert tracemalloc.get_traced_memory()[1] < size + largest + 2**21
    finally:
        tracemalloc.stop()
    assert tree.nbytes(loaded.params) == size


def test_changing_the_file_later_does_not_change_the_model(directory: Any, mesh: Any):
    folder = directory("gpt2", layers=1)
    loaded = huggingface.load(folder, mesh())
    before = jax.device_get(loaded.params["embed"]["tokens"]).copy()
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 10_000)
    np.testing.assert_array_equal(loaded.params["embed"]["tokens"], before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(dtype: str, directory: Any, tmp_path: Path, equal_trees: Any):
    half = huggingface.load(directory("gpt2"))
    huggingface.save(half, tmp_path / "half", dtype=dtype)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    loaded = huggingface.load(tmp_path / "half")
    assert loaded.card["huggingface"]["dtype"] == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.params)} == {"float32"}
    huggingface.save(loaded, tmp_path / "again")
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    huggingface.save(loaded, tmp_path / "whole", dtype="float32")
    equal_trees(huggingface.load(tmp_path / "whole").params, loaded.params)
    with pytest.raises(CheckpointError, match="unknown dtype 'fp16'; did you mean 'bfloat16'|unknown dtype 'fp16'"):
        huggingface.save(loaded, tmp_path / "no", dtype="fp16")


def test_tensors_of_mixed_dtypes_come_back_as_they_were(directory: Any, tmp_path: Path):
    folder = directory("gpt2")
    edit_tensors(folder, lambda t: {n: x.astype(np.float16) if "ln_" in n else x for n, x in t.items()})
    huggingface.save(huggingface.load(folder), tmp_path / "back")
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert {n: (x.dtype, x.tobytes()) for n, x in before.items()} == {
        n: (x.dtype, x.tobytes()) for n, x in after.items()
    }
    huggingface.save(huggingface.load(folder), tmp_path / "whole", dtype="float32")
    assert {str(x.dtype) for x in tensors(tmp_path / "whole").values()} == {"float32"}


def test_a_trained_value_too_large_for_the_stored_dtype(directory: Any, tmp_path: Path):
    loaded = huggingface.load(directory("gpt2"))
    loaded.params["embed"]["tokens"] = loaded.params["embed"]["tokens"].at[0, 0].set(1e6)
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight holds values too large for float16"):
        huggingface.save(loaded, tmp_path / "half", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_old_names_are_understood(directory: Any, equal_trees: Any):
    """gamma and beta, no prefix, buffers, a second name of a tied weight, and a tied weight under its second name alone."""
    folder = directory("bert", head="mlm")
    expected = huggingface.load(folder).params
    olds = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def older(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for new, old in olds.items():
            t = {n.replace(new, old): x for n, x in t.items()}
        return t | {
            "bert.embeddings.position_ids": np.arange(32)[None],
            "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": t["cls.predictions.bias"],
            "cls.seq_relationship.weight": np.zeros((2, 36), np.float32),
        }

    edit_tensors(folder, older)
    loaded = huggingface.load(folder)
    equal_trees(loaded.params, expected)
    origin = loaded.card["huggingface"]
    assert origin["copies"] == ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    assert origin["left_out"] == ["bert.embeddings.position_ids", "cls.seq_relationship.weight"]
    huggingface.save(loaded, folder.parent / "back")
    assert set(tensors(folder.parent / "back")) == {
        name for name in huggingface._modern(tensors(folder), folder) if name not in origin["left_out"]
    }

    edit_tensors(folder, lambda t: {n.removeprefix("bert."): x for n, x in t.items() if "word_embeddings" not in n})
    loaded = huggingface.load(folder)
    equal_trees(loaded.params, expected)
    huggingface.save(loaded, folder.parent / "bare")
    assert set(tensors(folder.parent / "bare")) == {n.removeprefix("bert.") for n in tensors(folder.parent / "back")}


def test_two_names_of_one_norm_are_refused(directory: Any):
    folder = directory("bert", head="mlm")
    edit_tensors(folder, lambda t: t | {"bert.embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"]})
    with pytest.raises(CheckpointError, match=r"bert.embeddings.LayerNorm.weight is there under its old name too"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    "family, changes, copy, first, others",
    [
        ("gpt2", {}, "lm_head.weight", "transformer.wte.weight", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("llama", {"tie_embeddings": True}, "lm_head.weight", "model.embed_tokens.weight", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("t5", {"head_dim": 8}, "decoder.embed_tokens.weight", "shared.weight", ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
        ("t5", {"head_dim": 8}, "lm_head.weight", "shared.weight", []),
        ("t5", {"head_dim": 8, "head": "classification", "pooler": "tanh"}, "transformer.encoder.embed_tokens.weight", "transformer.shared.weight", []),
        ("marian", {}, "model.encoder.embed_tokens.weight", "model.shared.weight", ["model.encoder.embed_positions.weight"]),
        ("roberta", {"head": "mlm"}, "lm_head.decoder.bias", "lm_head.bias", ["roberta.embeddings.position_ids"]),
        ("distilbert", {"head": "mlm"}, "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight", []),
    ],
)  # fmt: skip
def test_second_names_of_tied_weights(
    family: str, changes: Any, copy: str, first: str, others: list[str], directory: Any, tmp_path: Path
):
    folder = directory(family, **changes)
    edit_tensors(folder, lambda t: t | {copy: t[first]} | {name: np.zeros((1, 1), np.float32) for name in others})
    loaded = huggingface.load(folder)
    assert loaded.card["huggingface"]["copies"] == [copy] and loaded.card["huggingface"]["left_out"] == others
    huggingface.save(loaded, tmp_path / "back")
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert {n: x.tobytes() for n, x in after.items()} == {n: x.tobytes() for n, x in before.items() if n not in others}
    edit_tensors(folder, lambda t: t | {copy: t[copy] + 1})
    with pytest.raises(CheckpointError, match=f"{copy} differs from {first}, to which config.json ties it"):
        huggingface.load(folder)


def test_the_tensors_of_another_head_are_left_out(directory: Any, equal_trees: Any):
    folder = directory("bert", head="mlm")
    base = huggingface.load(folder, head="none")
    assert base.config.head == "none" and base.config.pooler == "tanh"
    assert len(base.card["huggingface"]["left_out"]) == 5
    assert all(name.startswith("cls.predictions.") for name in base.card["huggingface"]["left_out"])
    whole = huggingface.load(folder)
    equal_trees(base.params["encoder"], whole.params["encoder"])
    assert set(base.params["head"]) == {"pooler", "pooler_bias"}


def test_a_head_that_is_asked_for_is_made_afresh(directory: Any, caplog: pytest.LogCaptureFixture, equal_trees: Any):
    folder = directory("bert", head="mlm")
    new = huggingface.load(folder, head="classification", labels=["no", "maybe", "yes"])
    assert (
        new.config.head == "classification" and new.config.labels == 3 and new.card["labels"] == ["no", "maybe", "yes"]
    )
    assert "classifier.weight is made afresh" in caplog.text and "pooler" not in caplog.text
    kernel = np.asarray(new.params["head"]["classification"])
    assert (
        kernel.shape == (36, 3) and 0.01 < kernel.std() < 0.03 and not new.params["head"]["classification_bias"].any()
    )
    equal_trees(huggingface.load(folder, head="classification", labels=3).params, new.params)
    assert huggingface.read_sizes(folder, head="classification", labels=3) == new.config
    assert huggingface.load(folder, head="classification").config.labels == 2
    with pytest.raises(CheckpointError, match="unknown head of bert 'lm'; did you mean 'mlm'"):
        huggingface.load(folder, head="lm")


def test_scores_of_another_number_of_classes_are_made_afresh(directory: Any, equal_trees: Any):
    folder = directory("roberta", head="classification", pooler="tanh", labels=3)
    new = huggingface.load(folder, head="classification", labels=5)
    old = huggingface.load(folder)
    assert old.config.labels == 3 and new.params["head"]["classification"].shape == (36, 5)
    equal_trees(new.params["head"]["pooler"], old.params["head"]["pooler"])
    assert huggingface.load(folder, head="classification").config.labels == 3
    assert huggingface.load(folder, labels=["a", "b"]).card["labels"] == ["a", "b"]
    edit_config(folder, remove=("id2label",), num_labels=4)
    with pytest.raises(CheckpointError, match=r"classifier.out_proj.weight is \[3, 36\], not \[4, 36\]"):
        huggingface.load(folder, head="classification")
    with pytest.raises(CheckpointError, match="labels are for a classification head, not for span: ask for that head"):
        huggingface.load(folder, head="span", labels=3)


def test_a_fresh_head_is_laid_out_over_the_mesh(directory: Any, mesh: Any):
    loaded = huggingface.load(directory("gpt2"), mesh(fsdp=2), head="classification", labels=3)
    assert loaded.params["head"]["classification"].addressable_shards[0].data.shape == (18, 3)


@pytest.mark.parametrize("family, changes", [("bert", {"head": "mlm"}), ("llama", {}), ("t5", {"head": "span"})])
def test_without_the_tensors_of_its_head_the_base_is_loaded(
    family: str, changes: Any, directory: Any, caplog: pytest.LogCaptureFixture
):
    folder = directory(family, **changes)
    edit_tensors(folder, lambda t: {n: x for n, x in t.items() if not n.startswith(("cls.", "lm_head", "qa_"))})
    assert huggingface.load(folder).config.head == "none"
    assert "the head that its config.json names is not in the files: the base alone is loaded" in caplog.text


def test_part_of_a_head_is_refused(directory: Any):
    folder = directory("bert", head="mlm")
    edit_tensors(folder, lambda t: {n: x for n, x in t.items() if n != "cls.predictions.bias"})
    with pytest.raises(CheckpointError, match=r"1 missing: cls.predictions.bias"):
        huggingface.load(folder)


def test_the_names_of_classes_are_kept(directory: Any, tmp_path: Path):
    folder = directory("bert", head="classification")
    assert "labels" not in huggingface.load(folder).card
    edit_config(folder, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    loaded = huggingface.load(folder)
    assert loaded.card["labels"] == ["bad", "good"]
    huggingface.save(loaded, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["label2id"] == {"bad": 0, "good": 1}


def test_a_sliding_window_cuts_the_rows(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    huggingface.save(made("llama", max_length=64), tmp_path / "model", family="mistral")
    assert huggingface.load(tmp_path / "model").config.max_length == 64 and "rows are cut" not in caplog.text
    edit_config(tmp_path / "model", sliding_window=48)
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.config.max_length == 48
    assert "attention to a sliding window is not implemented: rows are cut to its 48 tokens" in caplog.text
    huggingface.save(loaded, tmp_path / "back")
    kept = json.loads((tmp_path / "back" / "config.json").read_text())
    assert kept["max_position_embeddings"] == 64 and kept["sliding_window"] == 48


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_layer=3), r"the tensors of .* are not those of its config: 12 missing: transformer.h.2.attn.c_attn.bias, .*, \.\.\."),
        (dict(n_layer=1), r"12 not expected: transformer.h.1.attn.c_attn.bias"),
        (dict(n_embd=48), r"of another shape: transformer.h.0.attn.c_attn.bias is \[108\], not \[144\]"),
        (dict(vocab_size=100), r"1 of another shape: transformer.wte.weight is \[99, 36\], not \[100, 36\]"),
        (dict(n_head=5), r"config.json: model.dim 36 is not a multiple of model.heads 5"),
        (dict(n_layer=10**8), r"its sizes ask for over \d+ values in 100000000 layers, the files hold \d+ in 28 tensors"),
        (dict(vocab_size=2**31 - 1, n_embd=2**31 - 2), r"its sizes ask for over \d+ values"),
        (dict(n_positions=2**31 - 1), r"its sizes ask for over \d+ values"),
        (dict(n_embd="wide"), r"n_embd is 'wide': it must be a whole number"),
        (dict(architectures=["GPT2ForTokenClassification"]), r"unknown architecture 'GPT2ForTokenClassification'; did you mean 'GPT2ForSeq"),
        (dict(model_type="gpt3"), r"unknown model_type 'gpt3'; did you mean 'gpt2'"),
        (dict(quantization_config={"bits": 4}), r"quantization_config is set"),
    ],
)  # fmt: skip
def test_a_config_at_odds_with_the_tensors_is_refused(change: Any, message: str, directory: Any):
    folder = directory("gpt2")
    edit_config(folder, **change)
    for read in (huggingface.load, huggingface.read_sizes):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(type_vocab_size=2**31 - 1),
            r"embeddings.token_type_embeddings.weight is \[2, 36\], not \[2147483647, 36\]",
        ),
        (dict(id2label=None, num_labels=2**31 - 1), r"classifier.bias is \[2\], not \[2147483647\]"),
    ],
)
def test_other_sizes_beyond_reason_are_refused_before_anything_is_made(change: Any, message: str, directory: Any):
    folder = directory("bert", head="classification")
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(folder)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    "damage, message",
    [
        (write("config.json", "{"), "config.json: not JSON"),
        (write("config.json", "[" * 100_000), "config.json: not JSON"),
        (write("config.json", "3" * 5000), "config.json: not JSON"),
        (write("config.json", "[]"), "config.json: it holds a list, not a JSON object"),
        (write("config.json", "{}"), "config.json: it has no model_type"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file or directory"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in it"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no pickle is loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "no sound safetensors file"),
        (lambda folder: edit_tensors(folder, lambda t: {n: x.astype(np.int8) for n, x in t.items()}), "is of dtype int8: quantised weights are not read"),
        (lambda folder: edit_tensors(folder, lambda t: t | {"extra.weight": t["transformer.wte.weight"]}), "1 not expected: extra.weight"),
    ],
)  # fmt: skip
def test_a_damaged_directory_is_refused(damage: Any, message: str, directory: Any):
    folder = directory("gpt2")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(directory: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        huggingface.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model.safetensors: a file, not a folder"):
        huggingface.load(directory("gpt2") / "model.safetensors")


def test_the_tokenizer_comes_along(made: Any, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = made("gpt2", vocab_size=tokenizer.vocab_size)
    huggingface.save(Model(model.config, model.params, tokenizer), tmp_path / "model")
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.tokenizer is not None and "tokenizer" not in caplog.text
    text = "The Union, and naïve cats"
    assert loaded.tokenizer.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert loaded.tokenizer.special == tokenizer.special
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos and config["pad_token_id"] == tokenizer.pad
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert huggingface.load(tmp_path / "model").tokenizer is None
    assert "has no tokenizer.json or vocab.txt: the model comes without a tokenizer" in caplog.text
    assert huggingface.read_tokenizer(tmp_path / "model") is None
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        huggingface.load(tmp_path / "model")


def test_a_tokenizer_with_more_ids_than_rows_is_refused(made: Any, tokenizer: Tokenizer, tmp_path: Path):
    model = made("gpt2", vocab_size=tokenizer.vocab_size - 1)
    huggingface.save(Model(model.config, model.params, tokenizer), tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=f"ids up to {tokenizer.vocab_size - 1}, its embeddings {tokenizer.vocab_size - 1} rows"
    ):
        huggingface.load(tmp_path / "model")


def test_a_pad_token_that_moves_the_positions_is_refused(made: Any, tokenizer: Tokenizer, tmp_path: Path):
    config = made("roberta", head="mlm", vocab_size=512).config.replace(position_offset=tokenizer.pad + 2)
    with pytest.raises(
        CheckpointError, match=f"its id must be {tokenizer.pad + 1}, but in this tokenizer it is {tokenizer.pad}"
    ):
        huggingface.save(Model(config, {}, tokenizer), tmp_path / "model")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "marian"])
def test_transformers_reads_the_tokenizer(family: str, made: Any, tokenizer: Tokenizer, corpus: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    if family == "bert":
        tokenizer = load_tokenizer("wordpiece:400", [path.read_text() for path in sorted(corpus.glob("*.txt"))])
    model = made(family, vocab_size=tokenizer.vocab_size)
    huggingface.save(Model(model.config, model.params, tokenizer), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("The Union, and naïve cats\n\n  42%", " ", "Fellow-Citizens of the Senate"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
    for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        assert getattr(theirs, f"{role}_token_id") == tokenizer.special[role], role
    assert theirs.model_max_length == 32


def test_ids_beyond_the_vocabulary_are_not_written(directory: Any, tmp_path: Path):
    folder = directory("marian")
    edit_config(folder, pad_token_id=98, eos_token_id=0, decoder_start_token_id=98, bad_words_ids=[[98]])
    loaded = huggingface.load(folder)
    config = loaded.config.replace(vocab_size=60)
    params = jax.tree.map(lambda x: x, loaded.params)
    params["embed"]["tokens"], params["head"]["bias"] = params["embed"]["tokens"][:60], params["head"]["bias"][:60]
    huggingface.save(Model(config, params, None, loaded.card), tmp_path / "less")
    written = json.loads((tmp_path / "less" / "config.json").read_text())
    assert written["pad_token_id"] is None and written["decoder_start_token_id"] == 0 and written["eos_token_id"] == 0
    assert written["vocab_size"] == written["decoder_vocab_size"] == 60


def test_the_settings_of_generation_are_kept(directory: Any, tmp_path: Path):
    folder = directory("t5", head_dim=8)
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    huggingface.save(huggingface.load(folder), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"num_beams": 4}


def test_another_head_is_written_as_its_own_class(directory: Any, tmp_path: Path):
    """The prefix is that of the new class, not of the file that was read."""
    folder = directory("llama", head="span")
    assert any(name.startswith("transformer.") for name in tensors(folder))
    loaded = huggingface.load(folder, head="none")
    huggingface.save(loaded, tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert "embed_tokens.weight" in tensors(tmp_path / "base")


def test_saving_into_a_folder_with_something_in_it_is_refused(made: Any, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    huggingface.save(made("gpt2"), tmp_path / "empty")
    with pytest.raises(CheckpointError, match="empty exists already"):
        huggingface.save(made("gpt2"), tmp_path / "empty")


def test_a_model_of_no_family_is_not_written(made: Any, tmp_path: Path):
    with pytest.raises(
        CheckpointError,
        match="no family of transformers has such a model: the nearest, gpt2, has none with mlp='gated_gelu'",
    ):
        huggingface.save(made("gpt2", mlp="gated_gelu"), tmp_path / "model")
    with pytest.raises(
        CheckpointError, match="llama of transformers has no model with bias='qkv' .*; family='qwen2' has"
    ):
        huggingface.save(made("llama", bias="qkv"), tmp_path / "model", family="llama")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk(small_disk: Path, made: Any):
    model = made("gpt2", vocab_size=9000)
    with pytest.raises(CheckpointError, match="no space left on the disk of .*/model: nothing was written"):
        huggingface.save(model, small_disk / "model")
    assert list(small_disk.iterdir()) == []


def test_import_and_export(directory: Any, tmp_path: Path, equal_trees: Any, capsys: pytest.CaptureFixture[str]):
    folder = directory("bert", head="mlm")
    cli.main(["import", str(folder), str(tmp_path / "checkpoint"), "--head=classification", "--labels=3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["head"] == "classification" and len(found["left_out"]) == 5
    kept = models.load(tmp_path / "checkpoint")
    assert found["parameters"] == tree.size(kept.params) and kept.card["huggingface"]["dtype"] == "float32"
    equal_trees(kept.params, huggingface.load(folder, head="classification", labels=3).params)
    written = huggingface.export_model(tmp_path / "checkpoint", tmp_path / "out", dtype="bfloat16")
    assert written["architecture"] == "BertForSequenceClassification" and written["dtype"] == "bfloat16"
    assert huggingface.read_sizes(tmp_path / "out").labels == 3
    with pytest.raises(CheckpointError, match="exists already"):
        huggingface.export_model(tmp_path / "checkpoint", tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_zeros_are_masks_again_when_an_export_is_read(family: str, tmp_path: Path, equal_trees: Any):
    """Pruned, exported, read: the card names the zeros, and they are held; a model that is dense again says nothing of them."""
    tiny = tiny_model(family)
    pruned = models.transform(models.Model(tiny.config, tiny.params), prune(0.5), jax.random.key(0))
    huggingface.save(pruned, tmp_path / "out")
    again = models.load(tmp_path / "out")
    assert again.card["pruned"] == pruned.card["pruned"] and len(again.card["pruned"]) > 5
    equal_trees(again.params, pruned.params)
    assert models.pruned(tmp_path / "out") == tuple(map(re.escape, pruned.card["pruned"]))
    later = models.transform(again, keep_zeros(models.pruned(tmp_path / "out")), jax.random.key(0))
    huggingface.save(later, tmp_path / "later")
    assert huggingface.read_pruned(tmp_path / "later") == pruned.card["pruned"]
    huggingface.save(dataclasses.replace(again, card={**again.card, "pruned": {}}), tmp_path / "dense")
    assert models.pruned(tmp_path / "dense") == ()
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    name = next(iter(stated["llm_jax"]["pruned"]))
    stated["llm_jax"]["pruned"][name] = 0.75
    (tmp_path / "out" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=rf"config.json: the card states that 75.0000% of {name} are zero"):
        models.load(tmp_path / "out")


@pytest.mark.parametrize("family", ["bert", "gpt2", "marian"])
def test_a_model_that_lost_heads_is_filled_up(family: str, tmp_path: Path, caplog: Any):
    """Where the form ties the size of a head to the width; the function is the same, and so are the shares of zeros counted anew."""
    tiny = tiny_model(family)
    change = chain(shrink(heads=2), prune(0.5, targets=[".*attention/query"]))
    small = models.transform(models.Model(tiny.config, tiny.params), change, jax.random.key(0))
    huggingface.save(small, tmp_path / "out")
    assert "2 heads of zeros were added to the 2 of each attention" in caplog.text
    again = models.load(tmp_path / "out")
    assert (again.config.heads, again.config.head_size) == (4, 4)
    assert set(again.card["pruned"].values()) == {0.75}
    np.testing.assert_allclose(
        laws.logits(again.config, again.params), laws.logits(small.config, small.params), atol=1e-5
    )
    odd = models.transform(models.Model(tiny.config, tiny.params), shrink(dim=0.75, heads=2), jax.random.key(0))
    huggingface.save(odd, tmp_path / "odd")  # 12 channels hold three heads of 4
    assert models.load(tmp_path / "odd").config.heads == 3
