"""Text to token ids and back: one frozen wrapper around `tokenizers`, the ids of its special tokens, loading and
saving.

Training a vocabulary is in `vocabulary.py`. Chat templates do not belong here, nor which template a task puts around a text.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from llm_jax.data import assets, vocabulary, words
from llm_jax.errors import DataError, choose, suggest
from llm_jax.storage import as_path, is_remote

Texts = Iterable[str] | Callable[[], Iterable[str]]
"""Texts to train on, or a function that gives them afresh, called only when they are needed."""

TEXT, PAIR = "{text}", "{pair}"
"""Places of texts in a template"""

_PLACES = re.compile("({text}|{pair})")
_TEMPLATE = "llm_jax_template"
"""The template's entry in the config of a tokenizer"""

_USUAL_NAMES = {
    "bos": ("<s>", "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<|im_start|>"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
}


def places(template: str) -> list[str]:
    """The places of texts in a template, in turn.

    >>> places("Review: {text} Good?")
    ['{text}']
    """
    return _PLACES.findall(template)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its rules. Equal content is equal; it can be pickled and used from several threads."""

    definition: str
    """the content of a tokenizer.json, without truncation and padding"""
    config: str = "{}"
    """the content of a tokenizer_config.json: names of the special tokens, and the chat template if there is one"""

    def __post_init__(self):
        for name in (
            "definition",
            "config",
        ):  # one spelling, so that equality and the fingerprint do not hang on white space
            object.__setattr__(self, name, json.dumps(json.loads(getattr(self, name)), ensure_ascii=False))

    def __reduce__(self):
        return type(self), (self.definition, self.config)

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self.definition)
        engine.encode_special_tokens = True
        return engine

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.definition)

    def _encoding(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            return (self._marked if special else self._literal).encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as e:
            raise DataError(f"this text cannot be tokenized: {e}") from e

    def encode(self, text: str, special: bool = False) -> Int[np.ndarray, " N"]:
        """int32 ids of the text; no special token is added.

        Args:
            special: whether the name of a special token in the text stands for that token, as in a rendered chat
                template or '[MASK]' in a question to a masked model. By default it is plain text: what a document says
                cannot end it.

        >>> t = load_tokenizer("bpe:300", ["aa aa aa"] * 9)
        >>> t.encode("<|endoftext|>", special=True).tolist() == [t.eos], t.eos in t.encode("<|endoftext|>")
        (True, False)
        """
        engine = self._marked if special else self._literal
        try:  # as a batch of one: only so does the library let other threads run meanwhile
            return np.array(engine.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
        except (UnicodeEncodeError, TypeError) as e:
            raise DataError(f"this text cannot be tokenized: {e}") from e

    def frame(self, pair: bool = False) -> tuple[Int[np.ndarray, " N"], ...]:
        """The ids that go before and after a text; of a pair those before, between and after.

        They are what the tokenizer's post-processor adds, e.g. ([CLS], [SEP]); where it adds none, the end token after each text. A template
        (`templated`) stands inside what is added, in place of that end token.

        Raises:
            DataError: a pair, and the template is one for single texts.
        """
        if pair and self.template and PAIR not in self.template:
            raise DataError(f"the tokenizer's template {self.template!r} has no {PAIR}, and texts come in pairs")
        return self._frames[pair]

    @property
    def template(self) -> str:
        """What stands around a text that is asked about, with {text} in its place; empty for what the tokenizer itself adds."""
        return str(json.loads(self.config).get(_TEMPLATE, ""))

    def templated(self, template: str) -> "Tokenizer":
        """The tokenizer whose `frame` is what the template has around {text}, or around {text} and then {pair}, each part tokenized by itself.

        >>> t = load_tokenizer("bpe:300", ["aa aa aa"] * 9).templated("Review: {text} Good?")
        >>> [t.decode(part) for part in t.frame()]
        ['Review: ', ' Good?']

        Raises:
            DataError: a template in which the places of the texts are not these.
        """
        if places(template) not in ([TEXT], [TEXT, PAIR]):
            raise DataError(f"template {template!r} must have {TEXT} once, and for pairs {PAIR} once, after it")
        return dataclasses.replace(self, config=json.dumps({**json.loads(self.config), _TEMPLATE: template}))

    @property
    def begin(self) -> int | None:
        """The id that a text to be continued begins with: bos where the config says so, else what the post-processor adds; None for none."""
        stated = json.loads(self.config).get("add_bos_token")
        if stated is not None:
            return self.bos if stated else None
        before = self._added[False][0]
        return before[0] if before else None

    @property
    def start(self) -> int | None:
        """The id that the target of an encoder-decoder begins with: pad where there is no bos, as in T5 and Marian, else bos."""
        return next((i for i in (self.bos, self.pad, self.cls, self.eos) if i is not None), None)

    @functools.cached_property
    def _frames(self) -> dict[bool, tuple[np.ndarray, ...]]:
        found: dict[bool, list[list[int]]] = {}
        if self.template:
            before, after = self._added[False]
            parts = [self.encode(part).tolist() for part in re.split(_PLACES, self.template)[::2]]
            parts = [before + parts[0], *parts[1:-1], parts[-1] + after]
            found = {False: [parts[0], parts[-1]], True: parts}
        else:
            end = next((i for i in (self.eos, self.sep) if i is not None), None)
            for pair, parts in self._added.items():
                lacks = end is not None and not any(parts)
                found[pair] = [parts[0], *([[end]] * (len(parts) - 1) if lacks else parts[1:])]
        return {pair: tuple(np.array(part, np.int32) for part in parts) for pair, parts in found.items()}

    @functools.cached_property
    def _added(self) -> dict[bool, list[list[int]]]:
        """What the post-processor adds before, between and after texts."""
        found = {}
        first, second = (self._literal.encode(text, add_special_tokens=False) for text in ("a", "b"))
        for pair in (False, True):
            made = self._literal.post_process(first, second if pair else None, True)
            parts: list[list[int]] = [[] for _ in range(3 if pair else 2)]
            ends, read = [len(first), len(first) + len(second)], 0
            for token, added in zip(made.ids, made.special_tokens_mask, strict=True):
                if added:
                    parts[sum(read >= end for end in ends[: len(parts) - 1])].append(token)
                read += not added
            found[pair] = parts
        return found

    def framed(self) -> "Tokenizer":
        """The tokenizer with a post-processor that adds what `frame` gives, so that other programs put it around a text too.

        >>> t = load_tokenizer("bpe:300", ["aa aa aa"] * 9)
        >>> made = tokenizers.Tokenizer.from_str(t.framed().definition)
        >>> made.encode("aa").ids == [*t.encode("aa").tolist(), t.eos]
        True
        """
        own = self._literal.num_special_tokens_to_add(is_pair=False)
        if not any(map(len, self.frame())) or (own and not self.template):
            return self
        engine = tokenizers.Tokenizer.from_str(self.definition)
        pieces: list[dict[str, Any]] = []

        def around(*texts: str, pair: bool = False) -> list[str]:
            """The texts and, around them, the frame, as the library writes templates; the second text and what follows it are of type 1."""
            made: list[str] = []
            for i, ids in enumerate(self.frame(pair)):
                name, kind = f"part{len(pieces)}", ":1" if i == 2 else ""
                if len(ids):
                    pieces.append({"id": name, "ids": ids.tolist(), "tokens": [engine.id_to_token(i) for i in ids]})
                    made.append(name + kind)
                made += texts[i : i + 1]
            return made

        pairs = {"pair": around("$A", "$B:1", pair=True)} if not self.template or PAIR in self.template else {}
        added = tokenizers.processors.TemplateProcessing(single=around("$A"), **pairs, special_tokens=pieces)
        keeps = engine.post_processor is not None and not own
        engine.post_processor = tokenizers.processors.Sequence([engine.post_processor, added]) if keeps else added
        config = {name: value for name, value in json.loads(self.config).items() if name != _TEMPLATE}
        return dataclasses.replace(self, definition=engine.to_str(), config=json.dumps(config))

    def encode_spans(self, text: str, special: bool = False) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """(ids, ends): the tokens up to and with i cover the first `ends[i]` UTF-8 bytes of the text, the last all.

        The bytes under the tokens [start, stop) are `ends[stop - 1] - (ends[start - 1] if start else 0)`; blanks
        between words count to the token after them, and those after the last word to the last token.
        """
        encoding = self._encoding(text, special)
        ids = np.array(encoding.ids, np.int32)
        stops = np.array([stop for _, stop in encoding.offsets], np.int64)
        if not text.isascii():
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            width = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
            stops = np.concatenate([[0], np.cumsum(width)])[stops]
        if len(stops):
            stops[-1] = len(text.encode())
        return ids, np.maximum.accumulate(stops)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of the ids; special tokens by their names, or left out."""
        values = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).reshape(-1).tolist()
        wrong = [i for i in values if not 0 <= i < self.vocab_size]
        if wrong:
            raise DataError(f"token id {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        return self._marked.decode(values, skip_special_tokens=skip_special)

    def continuation(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that the ids add to a text that ends with the ids `after`: decoded alone, some lose the blank before their first word.

        >>> t = load_tokenizer("bpe:300", ["aa aa aa"] * 9)
        >>> t.continuation(t.encode(" aa"), after=t.encode("aa"))
        ' aa'
        """
        begin, whole = self.decode(after[-1:]), self.decode([*after[-1:], *ids])
        return whole[len(begin) :] if whole.startswith(begin) else self.decode(ids)

    def id(self, token: str) -> int | None:
        """The id of a token by its name, None if there is no such token."""
        return self._marked.token_to_id(token)

    def token(self, index: int) -> str:
        """The text of one id; the name in the vocabulary where the bytes of the id are no whole character."""
        text = self._marked.decode([index], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else str(self._marked.id_to_token(index))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows of an embedding that covers it."""
        return max(self._marked.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special(self) -> dict[str, int | None]:
        """Ids of bos, eos, pad, unk, mask, cls, sep: as the config names them, else by usual names; None for none."""
        config = json.loads(self.config)
        found: dict[str, int | None] = {}
        for role, usual in _USUAL_NAMES.items():
            if f"{role}_token" in config:
                name = config[f"{role}_token"]
                name = name.get("content") if isinstance(name, dict) else name
                found[role] = None if name is None else self._marked.token_to_id(name)
                if name is not None and found[role] is None:
                    raise DataError(
                        f"tokenizer: its config names {name!r} as {role}_token, which is not in the vocabulary"
                    )
            else:
                ids = [self._marked.token_to_id(name) for name in usual]
                found[role] = next((i for i in ids if i is not None), None)
        return found

    bos = property(lambda self: self.special["bos"], doc="id of the token before a text, or None")
    eos = property(lambda self: self.special["eos"], doc="id of the token after a text, or None")
    pad = property(lambda self: self.special["pad"], doc="id of the token that fills rows, or None")
    unk = property(lambda self: self.special["unk"], doc="id of the token for what is not in the vocabulary, or None")
    mask = property(lambda self: self.special["mask"], doc="id of the token to be predicted, or None")
    cls = property(lambda self: self.special["cls"], doc="id of BERT's first token, or None")
    sep = property(lambda self: self.special["sep"], doc="id of BERT's token between texts, or None")

    @functools.cached_property
    def continues(self) -> Bool[np.ndarray, " V"]:
        """Whether each token belongs to the word of the token before it, by its name (`words.continues`)."""
        vocabulary = self._marked.get_vocab(with_added_tokens=True)
        return words.continues(json.loads(self.definition), vocabulary, self.vocab_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the rules, the vocabulary and the roles of the special tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def same_tokens(self, other: "Tokenizer") -> bool:
        """Whether the two are equal but for the template that texts stand in, so that the ids of one mean the same to the other."""
        return self._untemplated.fingerprint == other._untemplated.fingerprint

    def continues_ids(self, other: "Tokenizer") -> bool:
        """Whether each token of the other has the same id here, where more may follow; templates and rules apart.

        >>> small = load_tokenizer("bpe:300", ["aa aa aa"] * 9)
        >>> small.continues_ids(small.templated("{text}!"))
        True
        """
        own, others = (each._marked.get_vocab(with_added_tokens=True) for each in (self, other))
        return others.items() <= own.items()

    @property
    def _untemplated(self) -> "Tokenizer":
        config = {name: x for name, x in json.loads(self.config).items() if name != _TEMPLATE}
        return dataclasses.replace(self, config=json.dumps(config))

    def to_json(self) -> str:
        """All of it as one string; `from_json` gives an equal tokenizer."""
        return json.dumps(
            {"tokenizer": json.loads(self.definition), "config": json.loads(self.config)}, ensure_ascii=False
        )

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote."""
        try:
            parts = json.loads(text)
            return _checked(json.dumps(parts["tokenizer"]), parts["config"], "the tokenizer's JSON")
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"not the JSON of a tokenizer: {e!r}") from e

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as Hugging Face reads them.

        Args:
            path: a folder, or the path of the .json file, beside which the config goes.
        """
        path = as_path(path)
        if path.suffix != ".json":
            path = path / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.definition, encoding="utf-8")
        (path.parent / "tokenizer_config.json").write_text(
            json.dumps(json.loads(self.config), indent=2, ensure_ascii=False), encoding="utf-8"
        )


def load_tokenizer(spec: str, texts: Texts = ()) -> Tokenizer:
    """Train `bpe:V` or `wordpiece:V` on the texts, or load a file, a Hugging Face folder or `asset:NAME`.

    A file is a tokenizer.json, with the tokenizer_config.json beside it if there is one, or BERT's vocab.txt. `bpe`
    loses nothing: `decode(encode(x)) == x` for every string. `wordpiece` is BERT's, uncased: it drops case, accents and
    blanks, and a character that was not seen becomes [UNK]. The same texts always give the same vocabulary; it is
    smaller than V where the texts do not hold that many pieces seen twice.

    Raises:
        DataError: no such file or asset, a file that is not a tokenizer, V too small, no texts to train on.

    >>> load_tokenizer("bpe:9999", ["the cat, the hat"] * 3).vocab_size
    266
    """
    kind, colon, rest = spec.partition(":")
    if kind == "asset" and colon:
        folder = assets.tokenizer_folder(choose("tokenizer asset", rest, assets.TOKENIZERS, DataError))
        return _load_folder(folder)
    if colon and not is_remote(spec) and not Path(spec).exists():
        if kind not in vocabulary.TRAINERS:
            raise DataError(
                f"unknown kind of tokenizer {kind!r} in {spec!r}{suggest(kind, [*vocabulary.TRAINERS, 'asset'])}"
            )
        if not rest.isdecimal():
            raise DataError(f"tokenizer {spec!r}: {rest!r} is not a size; say e.g. {kind}:4096")
        definition, config = vocabulary.TRAINERS[kind](int(rest), texts)
        return _checked(definition, config, spec)
    path = as_path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {spec!r}: no such file; say bpe:V, wordpiece:V, asset:NAME, or the path of a tokenizer.json, "
            "a vocab.txt or a Hugging Face folder"
        )
    return _load_vocab_txt(path, _read_config(path.parent)) if path.suffix == ".txt" else _load_json(path)


def _checked(definition: str, config: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without its truncation and padding: rows are cut and filled elsewhere."""
    try:
        engine = tokenizers.Tokenizer.from_str(definition)
    except Exception as e:  # `tokenizers` raises bare Exception
        raise DataError(f"{where}: not a tokenizer.json: {e}") from e
    engine.no_truncation()
    engine.no_padding()
    tokenizer = Tokenizer(engine.to_str(), json.dumps(config, ensure_ascii=False))
    if not tokenizer.vocab_size:
        raise DataError(f"{where}: the vocabulary is empty")
    assert tokenizer.special  # raises where the config names a token that is not there
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, and chat_template.jinja; what is absent is left out."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                part = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as e:
                raise DataError(f"{path}: not JSON: {e}") from e
            if not isinstance(part, dict):
                raise DataError(f"{path}: not a JSON object")
            config |= part
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _load_json(path: Path) -> Tokenizer:
    try:
        return _checked(path.read_text(encoding="utf-8"), _read_config(path.parent), str(path))
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a tokenizer.json: not UTF-8 at byte {e.start}") from e


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder / "tokenizer.json")
    if (folder / "vocab.txt").is_file():
        return _load_vocab_txt(folder / "vocab.txt", _read_config(folder))
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder}: no tokenizer.json or vocab.txt in it (it holds {held}); "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json"
    )


def _load_vocab_txt(path: Path, config: dict[str, Any]) -> Tokenizer:
    """BERT's vocabulary file, a token a line; uncased unless the config says otherwise or a token has a capital."""
    try:
        tokens = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {e.start}") from e
    if "[UNK]" not in tokens:
        raise DataError(f"{path}: not a BERT vocabulary: it has no [UNK]")
    cased = any(token != token.lower() for token in tokens if not (token.startswith("[") and token.endswith("]")))
    definition = vocabulary.bert_definition(
        {token: i for i, token in enumerate(tokens)}, lowercase=config.get("do_lower_case", not cased)
    )
    usual = {
        role: name for role, name in vocabulary.BERT_CONFIG.items() if not role.endswith("_token") or name in tokens
    }
    return _checked(definition, config or usual, str(path))
