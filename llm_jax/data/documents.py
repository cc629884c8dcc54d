"""Which documents a split reads, and a document as the pieces that a task makes of it.

Responsible for the split into documents for training and for evaluation, and for reading, checking and counting:
examples come out with the dtypes of a batch, none longer than a row, each with its share of the document's account.
Cutting is the task's business, order and mixture are the pipeline's.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import random
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from llm_jax.config import Data
from llm_jax.data import files, pieces
from llm_jax.data.packing import Document, Piece, stream_of
from llm_jax.data.sources import Source, field, open_source
from llm_jax.errors import ConfigError, DataError, choose

SPLITS = ("train", "heldout")


def split_documents(count: int, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents for training and documents held out, by number, each in rising order.

    The held-out ones depend on nothing but the arguments, so that they stay held out in every run. Either side has at
    least one document when `fraction` is above 0.

    Raises:
        DataError: no documents, or a single one of which a fraction is to be held out.

    >>> split_documents(5, 0.2)
    (array([0, 1, 3, 4]), array([2]))
    """
    if count < 1:
        raise DataError("there are no documents")
    if fraction <= 0:
        return np.arange(count), np.arange(0)
    if count == 1:
        raise DataError(
            "there is a single document, of which nothing can be held out: set data.heldout to 0, "
            "or data.heldout_sources"
        )
    order = _shuffled(count, seed)
    cut = min(max(round(count * fraction), 1), count - 1)
    return np.sort(order[cut:]), np.sort(order[:cut])


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def split_groups(groups: Int[np.ndarray, " N"], fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents for training and documents held out, by number, none of a group on both sides.

    The fraction is of the groups, rounded down, and at least one on each side.

    Args:
        groups: the group of each document, numbered from 0; -1 for a document of none, which is not held out.

    Raises:
        DataError: all documents are of one group.

    >>> split_groups(np.array([0, 1, 1, 2, 0]), 0.4)
    (array([1, 2, 3]), array([0, 4]))
    """
    count = int(groups.max(initial=-1)) + 1
    if count < 2:
        raise DataError("all documents are of one group, of which nothing can be held out")
    # 0.29 * 100 is a little below 29.
    cut = min(max(math.floor(count * fraction + 1e-9), 1), count - 1)
    out = np.isin(groups, _shuffled(count, seed)[:cut])
    return np.flatnonzero(~out), np.flatnonzero(out)


def _group(record: dict[str, Any], name: str) -> str | int | float | None:
    """The value that names the group of a record; None where it says that it is of none."""
    if name in record and record[name] is None:
        return None
    value = field(record, name, "data.group")
    if not isinstance(value, (str, int, float)) or value != value:
        kind = "empty" if isinstance(value, float) else f"a {type(value).__name__}"
        raise DataError(
            f"{record['id']}: {name!r} is {kind}: what data.group names must be a string or a number in each record"
        )
    return value


def _number_groups(source: Source, name: str) -> np.ndarray:
    """(N,) the place of each document's value among the sorted distinct values; -1 where the record is not text, or of no group."""
    numbers: dict[Any, int] = {}
    found = array("q")
    for index in range(len(source)):
        record = source[index]
        value = None if record.get("invalid") else _group(record, name)
        found.append(-1 if value is None else numbers.setdefault(value, len(numbers)))
    places = np.empty(len(numbers) + 1, np.int64)
    for place, value in enumerate(sorted(numbers, key=lambda value: (isinstance(value, str), value))):
        places[numbers[value]] = place
    places[-1] = -1
    return places[np.array(found, np.int64)]


def _groups(source: Source, name: str) -> np.ndarray:
    """`_number_groups`, which reads every record, kept in the cache folder for a source of this content."""
    content = json.dumps([source.spec.partition(":")[0], source.fingerprint, len(source), name])
    path = files.cache_folder() / "groups" / f"{hashlib.sha256(content.encode()).hexdigest()}.npy"
    if path.is_file():
        return np.load(path)
    groups = _number_groups(source, name)
    try:
        files.write_atomically(path, lambda temporary: np.save(temporary, groups))
    except OSError as e:  # only speed is lost: they are read anew at the next start
        logging.getLogger(__name__).warning("cannot write to the cache folder %s: %s", files.cache_folder(), e)
    return groups


def documents(source: Source, data: Data, split: str) -> np.ndarray:
    """Numbers of the documents of a source that a split may read; with `data.group`, a group is read by one split.

    A document whose group is null is for training, so that a source of such documents has none to hold out.

    Raises:
        DataError: there are none, or a record does not tell its group.
    """
    apart = bool(data.heldout_sources)
    fraction = 0.0 if apart else data.heldout
    groups = _groups(source, data.group) if data.group and fraction > 0 else None
    if groups is not None and len(groups) and groups.max() < 0:
        return np.arange(len(source) if choose("split", split, SPLITS, DataError) == "train" else 0)
    try:
        train, heldout = split_documents(len(source), fraction) if groups is None else split_groups(groups, fraction)
    except DataError as e:
        raise DataError(f"{source.spec}: {e}") from e
    chosen = train if apart or choose("split", split, SPLITS, DataError) == "train" else heldout
    if not len(chosen):
        raise DataError(f"{source.spec}: no document is held out: set data.heldout above 0, or data.heldout_sources")
    return chosen


def open_sources(data: Data, split: str = "train") -> list[Source]:
    """The sources of a split: `data.heldout_sources` for the held-out one where they are given, else `data.sources`.

    Raises:
        ConfigError: no source is named.
    """
    specs = data.heldout_sources if split == "heldout" and data.heldout_sources else data.sources
    if not specs:
        raise ConfigError("data.sources is empty: name one, e.g. text:corpus/*.txt")
    return [open_source(spec, data) for spec in specs]


class _Record(dict):
    """A record whose fields for text and target have these names; to miss a field is the user's error."""

    def __init__(self, record: dict[str, Any], data: Data):
        names = {"text": data.text, "target": data.target}
        super().__init__({name: value for name, value in record.items() if name not in names})
        self.update({name: record[own] for name, own in names.items() if own in record})
        self._missing = {name: own for name, own in names.items() if own not in record}
        self._record = record

    def __missing__(self, name: str):
        return field(self._record, self._missing.get(name, name), f"data.{name}" if name in self._missing else "")


@dataclasses.dataclass(frozen=True)
class Read:
    """(source, record number), rng -> `Document`: reads the record and cuts it by the task.

    Raises:
        DataError: a field that the task needs is missing, or an example does not go into a row; by the name of the
        document.
        ConfigError: an example has a feature without a length, and rows are packed.
    """

    sources: Sequence[Source]
    tokenizer: Any
    task: Any
    data: Data
    length: int
    capacity: dict[str, int]
    """slots of a row in each stream"""

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Number of the first document of each source."""
        return np.cumsum([0, *(len(source) for source in self.sources)]).tolist()

    def __call__(self, where: np.ndarray, rng: np.random.Generator) -> Document:
        which, index = int(where[0]), int(where[1])
        record = self.sources[which][index]
        try:
            if record.get("invalid"):
                raise pieces.Dropped("its bytes are not UTF-8")
            examples = [example for example in self._examples(record, rng) if len(example["tokens"])]
            if not examples:
                raise pieces.Dropped("it has no tokens")
        except pieces.Dropped as e:
            return Document((), pieces.account(read=1, dropped=1, lost=e.tokens), f"{record['id']}: {e}")
        made = [self._piece(example, record["id"], self.offsets[which] + index) for example in examples]
        accounts = self._accounts(examples, made, record)
        return Document([piece._replace(account=account) for piece, account in zip(made, accounts, strict=True)])

    def _examples(self, record: dict[str, Any], rng: np.random.Generator) -> Iterable[dict[str, np.ndarray]]:
        named = _Record(record, self.data)
        return self.task.examples(named, self.tokenizer, self.length, self.data.long, rng)

    def _piece(self, example: dict[str, np.ndarray], name: str, number: int) -> Piece:
        """The example with the dtypes of a batch, checked against the row; still without an account."""
        lengths = {stream: len(example[stream]) for stream in self.capacity}
        for stream, length in lengths.items():
            if length > self.capacity[stream]:
                raise DataError(
                    f"{name}: an example has {length} {stream}, a row holds {self.capacity[stream]}: raise batch.length"
                )
        features = {}
        for feature, value in example.items():
            if feature == "account":
                continue
            value = np.asarray(value)
            features[feature] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32, copy=False)
            if value.ndim == 0 and self.data.pack:
                raise ConfigError(
                    f"{type(self.task).__name__} gives each example a {feature!r}, which a packed row "
                    "has no place for: set data.pack to False"
                )
            stream = stream_of(feature)
            if value.ndim and len(value) != lengths.get(stream):
                raise DataError(f"{name}: {feature!r} has length {len(value)}, {stream!r} {lengths.get(stream)}")
        return Piece(features, tuple(lengths.values()), number, np.zeros(0))

    def _accounts(self, examples: list, made: list[Piece], record: dict[str, Any]) -> list[np.ndarray]:
        """What each piece accounts for: what the task says, else its tokens and its share of the text's bytes."""
        if "account" in examples[0]:
            accounts = [np.array(example["account"], np.float64) for example in examples]
        else:
            fields = (self.data.text, self.data.target)[: len(self.capacity)]
            size = sum(len(record[name].encode()) for name in fields if isinstance(record.get(name), str))
            tokens = [sum(piece.lengths) for piece in made]
            ends = np.cumsum(tokens) * size // sum(tokens)  # whole bytes that add up, as shares would not
            accounts = [
                pieces.account(tokens=n, bytes=b) for n, b in zip(tokens, np.diff(ends, prepend=0), strict=True)
            ]
        accounts[0] = accounts[0] + pieces.account(read=1)
        return accounts
