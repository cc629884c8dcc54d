"""Tokenizers of each kind that tasks meet, trained on a few words."""

import json
import string

import numpy as np
import pytest

from llm_jax.data.tokenizer import Tokenizer, load_tokenizer

WORDS = [f"{a}{b}{c}" for a in "bcdfgklmnprst" for b in "aeiou" for c in ("", "n", "rt")]


def texts() -> list[str]:
    """The same few hundred sentences each time."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 12)) + "." for _ in range(300)]


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """Begin and end are one token, <|endoftext|>; there is a <pad>."""
    return load_tokenizer("bpe:400", texts())


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    """[CLS], [SEP], [MASK], [PAD], and no begin or end token."""
    return load_tokenizer("wordpiece:200", [string.ascii_lowercase, *texts()])


@pytest.fixture(scope="session")
def sentinels(bpe: Tokenizer) -> Tokenizer:
    """Of the kind of T5: </s> and <pad>, no begin token, and sentinels <extra_id_0>, <extra_id_1>, ... from the end of
    the vocabulary.
    """
    definition, names = json.loads(bpe.definition), ["</s>", *(f"<extra_id_{i}>" for i in reversed(range(100)))]
    for i, name in enumerate(names):
        definition["added_tokens"].append(
            {
                "id": bpe.vocab_size + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    return Tokenizer(json.dumps(definition), json.dumps({"bos_token": None, "eos_token": "</s>", "pad_token": "<pad>"}))


@pytest.fixture(scope="session")
def endless(bpe: Tokenizer) -> Tokenizer:
    """A vocabulary without any special token."""
    return Tokenizer(
        bpe.definition,
        json.dumps(dict.fromkeys(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"))),
    )
