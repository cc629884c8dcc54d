"""Which pieces share a row, and the arrays of that row.

Responsible for packing, for sorting into buckets of like length, and for segments, positions and padding. Pure
functions of the pieces of one window; how windows are filled, shuffled and checkpointed is the business of
`batching.py`.

Why not Grain's own packing: on rows of 256 and documents of some 750 tokens, its first fit with 1024 bins filled 0.984
of the slots at about 100 microseconds a piece; `pack` over windows of 1024 pieces fills 0.992 at 1 microsecond.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.errors import DataError

STREAMS = ("tokens", "encoder_tokens")
NOWHERE = -1
"""what `ids` says where a slot holds no document"""


class Piece(NamedTuple):
    """One example on its way into a row."""

    features: dict[str, np.ndarray]
    lengths: tuple[int, ...]
    """slots it takes in each stream"""
    document: int
    """number of its document over all sources"""
    account: np.ndarray
    """what it accounts for, by `pieces.ACCOUNT`"""


class Document(NamedTuple):
    """A document as read: its pieces, or, where there is none, what it accounts for and why."""

    pieces: Sequence[Piece]
    account: np.ndarray | float = 0.0
    reason: str = ""


class Row(NamedTuple):
    """The pieces of a row and its lengths, before any array is made."""

    pieces: Sequence[Piece]
    lengths: tuple[int, ...]


def stream_of(feature: str) -> str:
    """The stream that a feature is aligned with.

    >>> stream_of("weights"), stream_of("encoder_type_ids")
    ('tokens', 'encoder_tokens')
    """
    return "encoder_tokens" if feature.startswith("encoder_") else "tokens"


def worth(lengths: Sequence[int], capacity: Sequence[int]) -> float:
    """The share of a row that a piece takes: in the stream in which it takes most."""
    return max(length / most for length, most in zip(lengths, capacity, strict=True))


def pack(lengths: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Best fit, longest first: which pieces share a row.

    Each piece, in order of falling length, goes to the row that it leaves the fewest free slots; a row holds it in each
    of its streams.

    Args:
        lengths: (pieces, streams) slots that each piece takes.
        capacity: (streams,) slots of a row.

    >>> pack(np.array([[3], [5], [2], [8], [6]]), [8])
    [[3], [4, 2], [1, 0]]
    """
    room = np.asarray(capacity)
    free = np.zeros((len(lengths), len(room)), np.int64)
    slack = np.zeros(len(lengths), np.int64)
    rows: list[list[int]] = []
    alone = (lengths == room).any(axis=1)
    for index in np.argsort(-(lengths / room).max(axis=1), kind="stable"):
        length, used = lengths[index], len(rows)
        if used and not alone[index]:
            fits = (free[:used] >= length).all(axis=1)
            best = int(np.where(fits, slack[:used], np.iinfo(np.int64).max).argmin())
            if fits[best]:
                rows[best].append(int(index))
                free[best] -= length
                slack[best] -= length.sum()
                continue
        rows.append([int(index)])
        free[used] = room - length
        slack[used] = free[used].sum()
    return rows


@dataclasses.dataclass(frozen=True)
class Packed:
    """Groups the pieces of a window into packed rows, in random order where `rng` is given."""

    capacity: tuple[int, ...]

    def __call__(self, pieces: Sequence[Piece], rng: np.random.Generator | None) -> list[Row]:
        rows = pack(np.array([piece.lengths for piece in pieces]), self.capacity)
        order = range(len(rows)) if rng is None else rng.permutation(len(rows))
        return [Row([pieces[i] for i in rows[k]], self.capacity) for k in order]


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """One piece a row, `size` rows of like length one after another, padded to the smallest bucket that holds them.

    Within a bucket the order of the pieces is random, and so is the order of the batches, where `rng` is given.
    Without, a batch with fewer than `size` rows comes last.
    """

    buckets: tuple[tuple[int, ...], ...]
    """lengths of a row by stream, rising"""
    size: int

    def __call__(self, pieces: Sequence[Piece], rng: np.random.Generator | None) -> list[Row]:
        buckets = np.array(self.buckets)
        fits = (np.array([piece.lengths for piece in pieces])[:, None] <= buckets).all(axis=2)
        smallest = fits.argmax(axis=1)
        order = np.arange(len(pieces)) if rng is None else rng.permutation(len(pieces))
        order = order[np.argsort(smallest[order], kind="stable")]
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        turns = range(len(batches)) if rng is None else rng.permutation(len(batches))
        return [Row([pieces[i]], self.buckets[smallest[batches[k]].max()]) for k in turns for i in batches[k]]


def collate(row: Row, padding: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The arrays of a row: the features of its pieces end to end, and where each piece lies.

    `segment_ids` is k for the k-th piece (in each of its streams) and 0 for padding, `positions` counts from 0 in each
    piece, `ids` holds the number of the document, `account` the sum over the pieces. A feature without a length (a
    label) is that of the only piece.

    Raises:
        DataError: pieces with different features.

    >>> piece = Piece({"tokens": np.array([7, 8], np.int32)}, (2,), 3, np.zeros(6))
    >>> row = collate(Row([piece, piece], (5,)), {"tokens": 9})
    >>> [row[name].tolist() for name in ("tokens", "segment_ids", "positions", "ids")]
    [[7, 8, 7, 8, 9], [1, 1, 2, 2, 0], [0, 1, 0, 1, 0], [3, 3, 3, 3, -1]]
    """
    first = row.pieces[0].features
    for piece in row.pieces:
        if piece.features.keys() != first.keys():
            raise DataError(f"examples of one row differ in features: {sorted(first)} and {sorted(piece.features)}")
    arrays: dict[str, np.ndarray] = {"account": np.sum([piece.account for piece in row.pieces], axis=0)}
    sizes = dict(zip(STREAMS, row.lengths, strict=False))
    for name, value in first.items():
        if value.ndim == 0:
            arrays[name] = value
            continue
        array = np.full((sizes[stream_of(name)], *value.shape[1:]), padding.get(name, 0), value.dtype)
        start = 0
        for piece in row.pieces:
            stop = start + len(piece.features[name])
            array[start:stop] = piece.features[name]
            start = stop
        arrays[name] = array
    for k, (stream, size) in enumerate(sizes.items()):
        prefix = stream.removesuffix("tokens")
        counts = np.array([piece.lengths[k] for piece in row.pieces])
        filled, starts = counts.sum(), np.cumsum(counts) - counts
        segments, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        segments[:filled] = np.repeat(np.arange(1, len(counts) + 1), counts)
        positions[:filled] = np.arange(filled) - np.repeat(starts, counts)
        arrays[f"{prefix}segment_ids"], arrays[f"{prefix}positions"] = segments, positions
        if stream == "tokens":
            arrays["ids"] = np.full(size, NOWHERE, np.int32)
            arrays["ids"][:filled] = np.repeat([piece.document for piece in row.pieces], counts)
    return arrays
