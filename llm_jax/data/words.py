"""Which tokens of a vocabulary continue the word before them, by the rules of the tokenizer that has it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool

BLANKS = ("Ġ", "Ċ", "ĉ", "č")
"""space, newline, tabulator and carriage return as a byte-level vocabulary spells them"""
BLANK_BYTES = ("<0x20>", "<0x0A>", "<0x09>", "<0x0D>")
"""the same as a vocabulary with single bytes to fall back on spells them"""


def _parts(rules: Any) -> Iterator[dict[str, Any]]:
    """The normalizers, pre-tokenizers and decoders of a tokenizer.json, sequences of them taken apart."""
    if isinstance(rules, dict):
        yield rules
        for members in ("normalizers", "pretokenizers", "decoders"):
            for part in rules.get(members) or ():
                yield from _parts(part)


def _marks(definition: dict[str, Any]) -> tuple[str, ...]:
    """What the name of a token begins with that stands after a blank, or is one; empty where blanks leave no mark."""
    if definition["model"].get("end_of_word_suffix"):
        return ()
    decoders = list(_parts(definition.get("decoder")))
    for rule in (*_parts(definition.get("pre_tokenizer")), *_parts(definition.get("normalizer")), *decoders):
        if rule["type"] == "ByteLevel":
            return BLANKS
        if rule["type"] == "Metaspace":
            return (rule.get("replacement", "▁"), *BLANK_BYTES)
    for rule in decoders:
        if rule["type"] == "Replace" and rule["content"] == " " and "String" in rule["pattern"]:
            return (rule["pattern"]["String"], *BLANK_BYTES)  # here a normalizer made the mark
    return ()


def continues(definition: dict[str, Any], vocabulary: dict[str, int], size: int) -> Bool[np.ndarray, " V"]:
    """Whether a token belongs to the word of the token before it.

    It does where its name begins with the prefix that the model gives such tokens (WordPiece's ##), or, where blanks
    are marked (byte-level BPE, SentencePiece), does not begin with the mark. Special and other added tokens never do,
    and nothing does in a vocabulary without either. The first token of a text begins a word whatever this says.

    Args:
        definition: the content of a tokenizer.json.
        vocabulary: ids by name, added tokens included.

    >>> rules = {"model": {"type": "WordPiece", "continuing_subword_prefix": "##"}, "added_tokens": []}
    >>> continues(rules, {"[CLS]": 0, "play": 1, "##ing": 2}, 3).tolist()
    [False, False, True]
    """
    found = np.zeros(size, bool)
    prefix = definition["model"].get("continuing_subword_prefix")
    marks = _marks(definition)
    for name, index in vocabulary.items():
        found[index] = name.startswith(prefix) if prefix else bool(marks) and not name.startswith(marks)
    found[[token["id"] for token in definition.get("added_tokens") or ()]] = False
    found.setflags(write=False)
    return found
