"""Training of vocabularies: byte-level BPE and BERT's WordPiece, the same for the same texts each time.

Loading, encoding and special ids belong to `tokenizer.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.errors import DataError

BPE_CONFIG = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_CONFIG = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "tokenizer_class": "PreTrainedTokenizerFast",
}

_MIN_FREQUENCY = 2  # a pair seen once is no pattern
_MAX_ALPHABET = 1000  # as in BERT's trainer: rarer characters become [UNK]

Texts = Iterable[str] | Callable[[], Iterable[str]]


def _replayable(texts: Texts, spec: str) -> Callable[[], Iterator[str]]:
    """A function that gives the texts afresh; complains when there are none."""
    if not callable(texts):
        held = list(texts) if iter(texts) is texts else texts
        return _replayable(lambda: held, spec)
    if next(iter(texts()), None) is None:
        raise DataError(f"tokenizer {spec}: no texts to train on")
    return lambda: iter(texts())


def train_bpe(size: int, texts: Texts) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, its config) of a byte-level BPE: <|endoftext|>, <pad>, the 256 bytes, merges; `size` at most."""
    least = 258
    if size < least:
        raise DataError(f"tokenizer bpe:{size}: too small: the 256 bytes and 2 special tokens need bpe:{least} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_replayable(texts, f"bpe:{size}")(), trainer)
    return tokenizer.to_str(), dict(BPE_CONFIG)


def _alphabet(texts: Iterator[str], normalizer: normalizers.Normalizer, most: int) -> list[str]:
    """The commonest characters, blanks apart; of equally common ones the smaller first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(common[:most])


def train_wordpiece(size: int, texts: Texts) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, its config) of an uncased WordPiece, [PAD] [UNK] [CLS] [SEP] [MASK] first; `size` at most."""
    again = _replayable(texts, f"wordpiece:{size}")
    tokenizer = _bert({"[UNK]": 0}, lowercase=True)
    alphabet = _alphabet(again(), tokenizer.normalizer, min(_MAX_ALPHABET, size // 4))
    # The trainer numbers the continuing characters ("##a") in the order of a randomly seeded hash table, and breaks
    # ties between merges by these numbers: two runs give two vocabularies. Given as special tokens they have fixed
    # numbers. A character that always stands alone, as punctuation does, does not continue a word.
    continuing = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    least = len(BERT_SPECIALS) + len(continuing) + len(alphabet)
    if size < least:
        raise DataError(
            f"tokenizer wordpiece:{size}: too small: its characters and special tokens need wordpiece:{least} or more"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=[*BERT_SPECIALS, *continuing],
        limit_alphabet=len(alphabet),
    )
    tokenizer.train_from_iterator(again(), trainer)
    # Built anew from the vocabulary alone: in the trained one the continuing characters count as special tokens.
    return bert_definition(tokenizer.get_vocab(), lowercase=True), dict(BERT_CONFIG)


def _bert(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def bert_definition(vocab: dict[str, int], lowercase: bool) -> str:
    """The tokenizer.json of BERT's rules over a vocabulary."""
    tokenizer = _bert(vocab, lowercase)
    held = [name for name in BERT_SPECIALS if name in vocab]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in held])
    if "[CLS]" in vocab and "[SEP]" in vocab:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
        )
    return tokenizer.to_str()


TRAINERS = {"bpe": train_bpe, "wordpiece": train_wordpiece}
"""Kinds of `KIND:V`: (V, texts) -> (tokenizer.json, tokenizer_config)"""
