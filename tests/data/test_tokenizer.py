"""Encoding loses nothing, training repeats itself, a saved tokenizer comes back equal, and errors say what to do."""

import concurrent.futures
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.errors import DataError

SENTENCE = "the cat sat on a mat, the café’s naïve dog didn't; ἀρχή und Größe 😀 are 3.14 times stranger"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) for i in range(1, 60)]


@pytest.fixture(scope="session")
def bpe():
    return load_tokenizer("bpe:320", TEXTS)


@pytest.fixture(scope="session")
def wordpiece():
    return load_tokenizer("wordpiece:300", TEXTS)


@pytest.fixture(scope="session")
def bert():
    return load_tokenizer("asset:bert-uncased")


def refused(spec, texts=TEXTS) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(str(spec), texts)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- byte-level BPE

STRINGS = st.text() | st.lists(st.sampled_from(["<|endoftext|>", "<pad>", " the", "\r\n", "é", "😀", "\x00"])).map(
    "".join
)


@settings(max_examples=300, deadline=None)
@given(STRINGS, st.booleans())
def test_bpe_loses_nothing(bpe, text, special):
    ids = bpe.encode(text, special=special)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text
    if not special:
        assert not {bpe.eos, bpe.pad} & set(ids.tolist())


@settings(max_examples=200, deadline=None)
@given(STRINGS)
def test_spans_cover_the_text(bpe, wordpiece, text):
    for tokenizer in (bpe, wordpiece):
        ids, ends = tokenizer.encode_spans(text)
        assert np.array_equal(ids, tokenizer.encode(text)) and len(ids) == len(ends)
        assert (np.diff(ends) >= 0).all()
        assert not len(ends) or (ends[0] >= 0 and ends[-1] == len(text.encode()))
    ids, ends = bpe.encode_spans(text)
    for i in range(
        1, len(ids)
    ):  # where a token ends between characters, the bytes up to it are those of the tokens up to it
        if "\ufffd" not in bpe.decode(ids[:i]) + text:
            assert len(bpe.decode(ids[:i]).encode()) == ends[i - 1]


def test_bpe_special_tokens(bpe):
    assert bpe.vocab_size == 320
    assert bpe.special == {"bos": 0, "eos": 0, "pad": 1, "unk": None, "mask": None, "cls": None, "sep": None}
    assert (bpe.bos, bpe.eos, bpe.pad, bpe.unk) == (0, 0, 1, None)
    ids = bpe.encode("a<|endoftext|>b", special=True)
    assert bpe.eos in ids and bpe.eos not in bpe.encode("a<|endoftext|>b")
    assert (bpe.decode(ids), bpe.decode(ids, skip_special=True)) == ("a<|endoftext|>b", "ab")
    assert bpe.decode([]) == "" and bpe.encode("").shape == (0,)


# --- WordPiece


def test_wordpiece(wordpiece):
    assert wordpiece.special == {"bos": None, "eos": None, "pad": 0, "unk": 1, "mask": 4, "cls": 2, "sep": 3}
    assert wordpiece.decode(wordpiece.encode("The CAFÉ   sat.")) == "the cafe sat."
    assert wordpiece.encode("漢").tolist() == [wordpiece.unk]
    assert wordpiece.mask in wordpiece.encode("the [MASK]", special=True)
    assert wordpiece.mask not in wordpiece.encode("the [MASK]")
    definition = json.loads(wordpiece.definition)
    assert [token["content"] for token in definition["added_tokens"]] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "##." not in definition["model"]["vocab"] and "##a" in definition["model"]["vocab"]


def test_bert(bert):
    assert bert.vocab_size == 30_522
    assert bert.special == {"bos": None, "eos": None, "pad": 0, "unk": 100, "mask": 103, "cls": 101, "sep": 102}
    assert bert.encode("Hello, world").tolist() == [7592, 1010, 2088]
    assert len(bert.encode("a " * 600)) == 600  # its tokenizer.json would cut and pad to 128


def test_vocab_txt_gives_what_tokenizer_json_gives(bert, tmp_path):
    vocabulary = json.loads(bert.definition)["model"]["vocab"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf-8")
    loaded = load_tokenizer(str(path))
    assert loaded.special == bert.special and loaded.vocab_size == bert.vocab_size
    for text in [*TEXTS[:5], "Ünïcode [SEP] 漢字\u2028x", ""]:
        for special in (False, True):
            assert np.array_equal(loaded.encode(text, special), bert.encode(text, special))
    (tmp_path / "cased.txt").write_text("[UNK]\nThe\n##re", encoding="utf-8")
    assert load_tokenizer(str(tmp_path / "cased.txt")).encode("There there").tolist() == [1, 2, 0]


# --- words


def continued(tokenizer, text: str) -> list[bool]:
    return tokenizer.continues[tokenizer.encode(text)].tolist()


def words_of(tokenizer, text: str) -> list[str]:
    """The tokens of a text, joined where one continues the one before it."""
    words: list[list[int]] = []
    for index in tokenizer.encode(text).tolist():
        words = [*words[:-1], [*words[-1], index]] if words and tokenizer.continues[index] else [*words, [index]]
    return [tokenizer.decode(ids) for ids in words]


def named(tokenizer, change) -> Tokenizer:
    definition = json.loads(tokenizer.definition)
    change(definition)
    return Tokenizer(json.dumps(definition), tokenizer.config)


def test_wordpieces_continue_by_their_prefix(bert, wordpiece):
    names = json.loads(bert.definition)["model"]["vocab"]
    assert bert.continues.shape == (30_522,) and bert.continues.dtype == bool
    assert all(bert.continues[index] == name.startswith("##") for name, index in names.items())
    assert not bert.continues.flags.writeable
    text = "Unbelievably, the antidisestablishmentarian's 3.14"
    expected = ["unbelievably", ",", "the", "antidisestablishmentarian", "'", "s", "3", ".", "14"]
    assert words_of(bert, text) == expected and sum(continued(bert, text)) > 3
    assert not wordpiece.continues[list(range(5))].any()
    other = named(wordpiece, lambda d: d["model"].update(continuing_subword_prefix="c"))
    assert other.continues[other.id("cat")] and not other.continues[other.id("##a")]


def test_byte_level_words_begin_with_a_blank(bpe):
    text = "the cat sat,\n on a\n\tmat"
    assert words_of(bpe, text)[:3] == ["the", " cat", " sat,"]
    assert "".join(words_of(bpe, text)) == text
    assert [word[0] for word in words_of(bpe, text)[1:]].count("\n") == 2
    assert not bpe.continues[[bpe.eos, bpe.pad]].any()
    first = bpe.encode("the")[0]
    assert bpe.continues[first] and not bpe.continues[bpe.encode(" the")[0]]


def sentencepiece(how: str) -> Tokenizer:
    """Of the kind of T5 (a Metaspace pre-tokenizer) or of Llama 2 (a normalizer that marks, a decoder that unmarks)."""
    pieces = ["<unk>", "<0x0A>", "<0xC3>", "<0xBC>", "▁the", "▁ca", "t", "s", "▁", ","]
    engine = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], 0, True))
    if how == "Metaspace":
        engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
        )
    else:
        engine.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        engine.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
    engine.add_special_tokens(["</s>"])
    return Tokenizer(engine.to_str(), '{"eos_token": "</s>"}')


@pytest.mark.parametrize("how", ["Metaspace", "Replace"])
def test_sentencepiece_words_begin_with_the_mark(how):
    tokenizer = sentencepiece(how)
    names = {name: bool(tokenizer.continues[tokenizer.id(name)]) for name in ("▁ca", "t", "▁", ",", "<0x0A>", "<0xC3>")}
    assert names == {"▁ca": False, "t": True, "▁": False, ",": True, "<0x0A>": False, "<0xC3>": True}
    assert not tokenizer.continues[tokenizer.eos]
    assert continued(tokenizer, "the cats, the") == [False, False, True, True, True, False]


def test_no_token_continues_where_nothing_is_marked(bpe):
    def last_part(definition):
        definition["model"]["end_of_word_suffix"] = "</w>"

    def whole(definition):
        definition |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "normalizer": None}

    assert not named(bpe, last_part).continues.any() and not named(bpe, whole).continues.any()


# --- training


@pytest.mark.parametrize("spec", ["bpe:400", "wordpiece:300"])
def test_training_is_the_same_in_every_process(spec):
    code = (
        "import json, sys; from llm_jax.data.tokenizer import load_tokenizer; "
        f"print(load_tokenizer({spec!r}, json.load(sys.stdin)).fingerprint)"
    )
    here = load_tokenizer(spec, TEXTS).fingerprint
    root = str(Path(__file__).parents[2])
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root, "RAYON_NUM_THREADS": seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(TEXTS),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == here, done.stderr


@pytest.mark.parametrize("spec", ["bpe:400", "wordpiece:300"])
def test_texts_come_as_a_list_a_generator_or_a_function(spec):
    forms = [TEXTS, tuple(TEXTS), (text for text in TEXTS), lambda: (text for text in TEXTS)]
    assert len({load_tokenizer(spec, form).fingerprint for form in forms}) == 1


def test_texts_are_not_asked_for_when_nothing_is_trained(bpe, tmp_path):
    bpe.save(tmp_path)

    def texts():
        raise AssertionError("asked for")

    assert load_tokenizer(str(tmp_path), texts) == bpe


# --- saving


def test_saved_and_loaded_it_is_equal(bpe, wordpiece, bert, tmp_path):
    for number, tokenizer in enumerate((bpe, wordpiece, bert)):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        again = [
            load_tokenizer(str(folder)),
            load_tokenizer(str(folder / "tokenizer.json")),
            Tokenizer.from_json(tokenizer.to_json()),
            pickle.loads(pickle.dumps(tokenizer)),
        ]
        assert all(other == tokenizer and other.fingerprint == tokenizer.fingerprint for other in again)
        assert all(
            other.encode("<|endoftext|>[SEP]").tolist() == tokenizer.encode("<|endoftext|>[SEP]").tolist()
            for other in again
        )
    assert len({t.fingerprint for t in (bpe, wordpiece, bert)}) == 3
    bpe.save(tmp_path / "run" / "mine.json")
    assert load_tokenizer(str(tmp_path / "run" / "mine.json")) == bpe


def test_hugging_face_reads_what_is_saved(bpe, wordpiece, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, tokenizer in {"bpe": bpe, "wordpiece": wordpiece}.items():
        tokenizer.save(tmp_path / name)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert theirs(TEXTS[0], add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS[0]).tolist()
        for role, theirs_id in {
            "bos": theirs.bos_token_id,
            "pad": theirs.pad_token_id,
            "mask": theirs.mask_token_id,
        }.items():
            assert theirs_id == tokenizer.special[role]


def test_roles_of_special_tokens_come_from_the_config(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": {"content": "<pad>"}}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "a", "sep_token": "b"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.bos, loaded.eos, loaded.pad) == (None, bpe.pad, bpe.pad)  # pad by its usual name
    assert loaded.sep == bpe.encode("b").item()
    assert json.loads(loaded.config)["chat_template"] == "{{ messages }}"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eot>"}')
    assert refused(tmp_path).endswith("its config names '<eot>' as eos_token, which is not in the vocabulary")
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer_config.json: not JSON: ")


def test_threads_encode_the_same(bpe):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: bpe.encode(text).tolist(), TEXTS * 10))
    assert found == [bpe.encode(text).tolist() for text in TEXTS] * 10


# --- errors


def test_errors(tmp_path):
    assert refused("bpe:100") == (
        "tokenizer bpe:100: too small: the 256 bytes and 2 special tokens need bpe:258 or more"
    )
    assert refused("wordpiece:8").startswith(
        "tokenizer wordpiece:8: too small: its characters and special tokens need "
    )
    assert refused("bpe:4k") == "tokenizer 'bpe:4k': '4k' is not a size; say e.g. bpe:4096"
    assert refused("bpee:400") == "unknown kind of tokenizer 'bpee' in 'bpee:400'; did you mean 'bpe'?"
    assert refused("asset:bert").startswith("unknown tokenizer asset 'bert'; ")
    assert refused("none.json").startswith(
        "tokenizer 'none.json': no such file; say bpe:V, wordpiece:V, asset:NAME, or "
    )
    for empty in ([], iter([]), lambda: iter([])):
        assert refused("bpe:400", empty) == "tokenizer bpe:400: no texts to train on"
    (tmp_path / "tokenizer.model").touch()
    assert f"{tmp_path}: no tokenizer.json or vocab.txt in it (it holds tokenizer.model); " in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer.json: not a tokenizer.json: ")
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff')
    assert refused(tmp_path).endswith("not a tokenizer.json: not UTF-8 at byte 2")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert refused(tmp_path / "vocab.txt") == f"{tmp_path}/vocab.txt: not a BERT vocabulary: it has no [UNK]"


def test_errors_in_use(bpe):
    for call, said in {
        lambda: bpe.decode([3, 400]): "token id 400 is not in the vocabulary of 320",
        lambda: bpe.encode("\ud83d"): "this text cannot be tokenized: ",
        lambda: bpe.encode(3): "this text cannot be tokenized: ",
        lambda: Tokenizer.from_json("{}"): "not the JSON of a tokenizer: KeyError('tokenizer')",
    }.items():
        with pytest.raises(DataError) as error:
            call()
        assert str(error.value).startswith(said)


def test_a_continuation_keeps_the_blank_before_its_first_word():
    """A tokenizer of the kind of Llama's strips the first blank of what it decodes."""
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"\u2581a": 0, "\u2581b": 1, "c": 2}, "merges": []},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    }
    tokenizer = Tokenizer(json.dumps(definition))
    assert tokenizer.decode([1, 2]) == "bc"
    assert tokenizer.continuation([1, 2], after=[0]) == " bc" and tokenizer.continuation([2], after=[0]) == "c"
    assert tokenizer.continuation([1, 2]) == "bc"


def test_what_a_text_begins_with():
    for config, expected in (
        ({"bos_token": "<s>", "add_bos_token": True}, 0),
        ({"bos_token": "<s>", "add_bos_token": False}, None),
        ({"bos_token": "<s>"}, None),
    ):
        model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3}, "merges": []}
        tokenizer = Tokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}), json.dumps(config))
        assert tokenizer.begin == expected and tokenizer.start == 0
        assert [x.tolist() for x in tokenizer.frame()] == [[], [1]]
