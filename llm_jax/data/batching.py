"""The Grain datasets between documents and batches that Grain itself does not have.

Responsible for the flattening of documents with the counts of those that yield no piece, for windows of pieces, and for
batches of a fixed number of rows. Each can be checkpointed: its state is a few integers beside the state of its parent,
and never holds data. What is done with a window is the business of `packing.py`; which documents there are, and in
which order, that of `pipeline.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from llm_jax.data.packing import NOWHERE, Piece, Row, worth
from llm_jax.errors import DataError


class _PiecesIterator(grain.DatasetIterator):
    """`_start` is the parent's state before what was counted into the first piece of `_pieces`."""

    def __init__(self, parent: grain.DatasetIterator, limit: int):
        super().__init__(parent)
        self._limit = limit
        self._pieces: Sequence[Piece] | None = None
        self._start, self._next = self._parent.get_state(), 0

    def _fetch(self) -> np.ndarray | float:
        """Move to the next document with pieces, which takes the counts of those without; at the end, return these."""
        self._start, carry, reason = self._parent.get_state(), 0.0, ""
        for _ in range(self._limit + 1):
            try:
                document = next(self._parent)
            except StopIteration:
                self._pieces = ()
                return carry
            if document.pieces:
                first = document.pieces[0]
                self._pieces = [first._replace(account=first.account + carry), *document.pieces[1:]]
                return 0.0
            carry, reason = carry + document.account, document.reason
        raise DataError(f"none of {self._limit} documents read in a row yields an example; the last one: {reason}")

    def __next__(self) -> Piece:
        if self._pieces is None:
            self._fetch()
        assert self._pieces is not None
        if self._next >= len(self._pieces):
            raise StopIteration
        piece = self._pieces[self._next]
        self._next += 1
        if self._next == len(self._pieces):
            # Looking ahead to the end: what comes after the last piece is counted with it.
            piece = piece._replace(account=piece.account + self._fetch())
            self._next = 0
        return piece

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._start, "next": self._next}

    def set_state(self, state: dict[str, Any]):
        self._parent.set_state(state["parent"])
        self._start, self._next, self._pieces = state["parent"], state["next"], None


class Pieces(grain.IterDataset):
    """Flattens `Document`s into their `Piece`s; one without any is counted with the next piece (at the end, the last).

    So the sum of the accounts of what has been consumed is exact, whatever was read ahead.

    Raises:
        DataError: more than `limit` documents in a row without a piece.
    """

    def __init__(self, parent: grain.IterDataset, limit: int):
        super().__init__(parent)
        self._limit = limit

    def __iter__(self) -> _PiecesIterator:
        return _PiecesIterator(self._parent.__iter__(), self._limit)


class _WindowsIterator(grain.DatasetIterator):
    """`_start` is the parent's state before the first piece of the window whose rows are handed out."""

    def __init__(self, parent: grain.DatasetIterator, dataset: "Windows"):
        super().__init__(parent)
        self._dataset = dataset
        self._reset(self._parent.get_state(), 0, 0)

    def _reset(self, start: dict[str, Any], number: int, at: int):
        self._start, self._number, self._next = start, number, at
        self._rows: list[Row] | None = None
        self._share = 0
        self._ahead: list[Piece] = []
        self._ahead_start, self._ahead_worth = start, 0.0

    def _pull(self, count: int) -> bool:
        """Move up to `count` pieces to the next window; whether it can take more."""
        for _ in range(count):
            if len(self._ahead) >= self._dataset.size and self._ahead_worth >= self._dataset.rows:
                return False
            try:
                piece = next(self._parent)
            except StopIteration:
                return False
            self._ahead.append(piece)
            self._ahead_worth += worth(piece.lengths, self._dataset.capacity)
        return True

    def _open(self) -> bool:
        """Turn to the next window, filled up; False at the end."""
        while self._pull(self._dataset.size):
            pass
        if not self._ahead:
            return False
        seed = self._dataset.seed
        rng = None if seed is None else np.random.default_rng([seed, self._number])
        self._rows = self._dataset.group(self._ahead, rng)
        self._share = -(-len(self._ahead) // len(self._rows))
        self._start, self._ahead, self._ahead_worth = self._ahead_start, [], 0.0
        self._ahead_start = self._parent.get_state()
        return True

    def __next__(self) -> Row:
        if self._rows is None and not self._open():
            raise StopIteration
        assert self._rows is not None
        while self._next >= len(self._rows):
            self._number += 1
            if not self._open():
                self._number -= 1
                raise StopIteration
            self._next = 0
        row = self._rows[self._next]
        self._next += 1
        # The next window grows while this one is handed out: no step waits for a whole window.
        self._pull(self._share)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._start, "number": self._number, "next": self._next}

    def set_state(self, state: dict[str, Any]):
        self._parent.set_state(state["parent"])
        self._reset(state["parent"], state["number"], state["next"])


class Windows(grain.IterDataset):
    """Cuts a stream of pieces into windows, and each window into rows by `group`.

    A window holds `size` pieces, or more until they are worth `rows` rows. It is made again after a state within it is
    restored, at the first `next`. Without a seed `group` is given no generator.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        group: Callable[..., list[Row]],
        capacity: tuple[int, ...],
        size: int,
        rows: float = 0.0,
        seed: int | None = None,
    ):
        super().__init__(parent)
        self.group, self.capacity, self.size, self.rows, self.seed = group, capacity, size, rows, seed

    def __iter__(self) -> _WindowsIterator:
        return _WindowsIterator(self._parent.__iter__(), self)


class _BatchesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, dataset: "Batches"):
        super().__init__(parent)
        self._dataset = dataset

    def __next__(self) -> dict[str, np.ndarray]:
        rows: list[dict[str, np.ndarray]] = []
        while len(rows) < self._dataset.size:
            try:
                rows.append(next(self._parent))
            except StopIteration:
                break
        if not rows:
            raise StopIteration
        kept = rows[self._dataset.keep]
        if missing := len(range(self._dataset.size)[self._dataset.keep]) - len(kept):
            kept += [self._empty(rows[0])] * missing
        return {name: np.stack([row[name] for row in kept]) for name in rows[0]}

    def _empty(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        padding = {**self._dataset.padding, "ids": NOWHERE}
        return {name: np.full_like(value, padding.get(name, 0)) for name, value in row.items()}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]):
        self._parent.set_state(state)


class Batches(grain.IterDataset):
    """Stacks each `size` rows and keeps the part `keep`; empty rows (weights 0, segments 0) fill up the last batch."""

    def __init__(self, parent: grain.IterDataset, size: int, keep: slice, padding: Mapping[str, int]):
        super().__init__(parent)
        self.size, self.keep, self.padding = size, keep, dict(padding)

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(self._parent.__iter__(), self)
