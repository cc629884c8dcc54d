"""The tokenizer inside a GGUF file as a tokenizer.json: byte-level BPE, and BPE by scores as SentencePiece has it.

Reading the file is in `gguf_file.py`. Which tokens open and close a text is decided by who asks, from the config made here.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, DataError, choose
from llm_jax.interop.gguf_file import File, short

KEY = "tokenizer.ggml."
MODELS = ("gpt2", "llama")
_UNKNOWN, _CONTROL, _USER, _NORMAL, _BYTE = 2, 3, 4, 1, 6  # values of `token_type`
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""our roles -> the name of each in a key; the misspelling is the format's"""
_LONGEST = {"gpt2": 1024, "llama": 256}
"""characters of a token, at most; this and the next two keep what is made of a file in proportion to it"""
_SOME_ADDED = 2**11
"""characters, in any file, of all tokens that are found in a text before the others"""
_ADDED_SHARE = 128
"""bytes of a file for each further one of these: the machine that finds them takes a kilobyte a character"""
_MOST_PAIRS = 32
"""pairs for each token; Llama 2 has two"""

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _llama3(digits: str) -> str:
    """The split of GPT-4 and of those that follow it, which differ in how many digits stay together."""
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_llama3(r"\p{N}{1,3}"),),
    "llama3": (_llama3(r"\p{N}{1,3}"),),
    "qwen2": (_llama3(r"\p{N}"),),
    "smollm": (r"\p{N}", _GPT2),
}
"""`tokenizer.ggml.pre` -> the regexes that cut a text into words, each applied to what the ones before it left"""
_LLAMA3 = ("llama-bpe", "llama3")  # they begin a text with a token, and take a whole word that is a token as it is
_NORMAL_FORM = ("qwen2",)  # these read their texts in Unicode's normal form C


def read(file: File) -> Tokenizer | None:
    """The tokenizer of a file; None where it has none.

    Raises:
        CheckpointError: one of another kind, or one that contradicts itself.
    """
    kind = file.get(f"{KEY}model", str, None)
    if kind is None:
        return None
    try:
        choose(f"{KEY}model", kind[:60], MODELS, CheckpointError)
        tokens, types = _tokens(file, _LONGEST[kind])
        definition, begins = (_byte_level if kind == "gpt2" else _by_scores)(file, tokens, types)
        added = np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER))).tolist()
        most = _SOME_ADDED + len(file.content) // _ADDED_SHARE
        if sum(len(tokens[i]) for i in added) > most:
            raise CheckpointError(f"{KEY}token_type: {len(added)} control tokens of over {most} characters in all")
        config = _config(file, tokens, begins)
        definition |= {
            "version": "1.0",
            "added_tokens": [_added(i, tokens[i], special=bool(types[i] != _USER)) for i in added],
            "post_processor": _template(tokens, config),
        }
        return Tokenizer.from_json(json.dumps({"tokenizer": definition, "config": config}))
    except (CheckpointError, DataError) as e:
        where = f"{file.path}: "
        raise CheckpointError(where + str(e).removeprefix(where)) from e


def _tokens(file: File, most: int) -> tuple[list[str], np.ndarray]:
    """The tokens, of at most so many characters, and the type of each."""
    tokens = file.get(f"{KEY}tokens", list, [])
    types = file.get(f"{KEY}token_type", np.ndarray, np.full(len(tokens), _NORMAL))
    if not tokens or len(types) != len(tokens):
        raise CheckpointError(f"{KEY}tokens has {len(tokens)} entries and {KEY}token_type {len(types)}")
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) > most:
        raise CheckpointError(f"{KEY}tokens: token {longest} has {len(tokens[longest])} characters, above {most}")
    if len(set(tokens)) < len(tokens):
        first = {token: i for i, token in reversed(list(enumerate(tokens)))}
        again = next(i for i, token in enumerate(tokens) if first[token] != i)
        raise CheckpointError(f"{KEY}tokens: {short(tokens[again])} is token {first[tokens[again]]} and token {again}")
    return tokens, types


def _byte_level(file: File, tokens: list[str], types: np.ndarray) -> tuple[dict[str, Any], bool]:
    """(parts of a tokenizer.json, whether a text begins with a token) of a byte-level BPE (GPT-2, section 2.2)."""
    pre = choose(f"{KEY}pre", file.get(f"{KEY}pre", str, "default")[:60], SPLITS, CheckpointError)
    merges = [merge.split(" ") for merge in file.get(f"{KEY}merges", list, [])]
    wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{KEY}merges: entry {wrong} is not two tokens")
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in SPLITS[pre]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if pre in _NORMAL_FORM else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": level,
        "model": _bpe(tokens, merges, ignore_merges=pre in _LLAMA3),
    }, pre in _LLAMA3


def _by_scores(file: File, tokens: list[str], types: np.ndarray) -> tuple[dict[str, Any], bool]:
    """(parts of a tokenizer.json, whether a text begins with a token) of SentencePiece's BPE (Kudo and Richardson 2018)."""
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        value = file.metadata.get(KEY + key, False)
        if value is not False and np.size(value):
            raise CheckpointError(f"{KEY}{key}: a text that is changed before it is cut is not supported")
    scores = file.get(f"{KEY}scores", np.ndarray, np.zeros(0))
    if len(scores) != len(tokens) or np.isnan(scores).any():
        raise CheckpointError(f"{KEY}scores must be {len(tokens)} numbers, one a token")
    unknown = _id(file, "unknown", tokens)
    prefix = file.get(f"{KEY}add_space_prefix", bool, True)
    model = _bpe(
        tokens,
        [list(pair) for pair in merges_by_scores(tokens, scores, types == _NORMAL)],
        unk_token=tokens[0 if unknown is None else unknown],
        fuse_unk=True,
        byte_fallback=bool((types == _BYTE).any()),
    )
    replaced = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    restored: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        replaced = [{"type": "Prepend", "prepend": "▁"}, *replaced]
        restored.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": replaced},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": restored},
        "model": model,
    }, True


def merges_by_scores(tokens: list[str], scores: np.ndarray, normal: np.ndarray) -> Iterator[tuple[str, str]]:
    """The pairs of normal tokens that make a token, those of the highest score first; of equal ones the first token.

    >>> list(merges_by_scores(["a", "b", "ab", "ba", "aba"], np.array([0, 0, -2, -1, -3]), np.ones(5, bool)))
    [('b', 'a'), ('a', 'b'), ('a', 'ba'), ('ab', 'a')]
    """
    ids = {tokens[i]: i for i in np.flatnonzero(normal).tolist()}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[i]), i, left, right))
        if len(found) > _MOST_PAIRS * len(tokens):
            raise CheckpointError(f"{KEY}tokens: they can be joined in more than {len(found)} ways")
    return ((tokens[left], tokens[right]) for _, _, left, right in sorted(found))


def _bpe(tokens: list[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges, **options}


def _added(i: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is found in a text before anything else is."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **plain, "special": special}


def _id(file: File, name: str, tokens: list[str]) -> int | None:
    """The id that a key names, None where the key is absent."""
    key = f"{KEY}{name}_token_id"
    i = file.get(key, int, None)
    if i is not None and not 0 <= i < len(tokens):
        raise CheckpointError(f"{key} is {i}: there are {len(tokens)} tokens")
    return i


def _config(file: File, tokens: list[str], begins: bool) -> dict[str, Any]:
    """The tokenizer_config.json: the roles of tokens, and the chat template if there is one."""
    ids = {role: _id(file, name, tokens) for role, name in _ROLES.items()}
    template = file.get("tokenizer.chat_template", str, None)
    return {
        **{f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
        "add_bos_token": file.get(f"{KEY}add_bos_token", bool, begins),
        "add_eos_token": file.get(f"{KEY}add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if template is None else {"chat_template": template}),
    }


def _template(tokens: list[str], config: dict[str, Any]) -> dict[str, Any] | None:
    """What others put around a text: the tokens that the config says it begins and ends with."""
    begin, end = (config.get(f"{role}_token") if config[f"add_{role}_token"] else None for role in ("bos", "eos"))
    if begin is None and end is None:
        return None

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        def mark(token: str | None) -> list[dict[str, Any]]:
            return [] if token is None else [{"SpecialToken": {"id": token, "type_id": number}}]

        return [*mark(begin), {"Sequence": {"id": sequence, "type_id": number}}, *mark(end)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
            for token in (begin, end)
            if token is not None
        },
    }
