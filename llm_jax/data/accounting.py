"""What became of the data of a run: documents dropped, tokens lost, slots padded, rows with nothing to predict.

Responsible for the counts of a batch, their sum over a run, and the stop past a threshold. The counts of a document are
made by `documents.py` and the tasks; they travel with the pieces, so that what was read ahead is not counted before it
is used.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.data import pieces
from llm_jax.data.packing import STREAMS
from llm_jax.errors import DataError

FIELDS = (*pieces.ACCOUNT, "slots", "filled", "rows", "rows_without_targets")
"""Entries of the account of a batch: its documents'; slots, slots filled; rows, and rows with nothing to predict."""

ENOUGH = 100
"""documents, or rows, from which on a share of them means something"""


def batch_account(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The account of a batch as the pipeline makes it: (B, S) arrays beside `account` (B, len(pieces.ACCOUNT)).

    A row that only fills up the last batch counts among the slots, not among the rows.
    """
    names = [stream.removesuffix("tokens") + "segment_ids" for stream in STREAMS]
    segments = [arrays[name] for name in names if name in arrays]
    filled = [np.count_nonzero(ids, axis=1) for ids in segments]
    held = np.any(filled, axis=0)
    idle = held & ~np.any(arrays["weights"], axis=1) if "weights" in arrays else np.zeros(1)
    own = (sum(ids.size for ids in segments), sum(count.sum() for count in filled), held.sum(), idle.sum())
    return np.concatenate([arrays["account"].sum(axis=0), np.array(own, np.float64)])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class Accounting:
    """The sum of the accounts of a run. `totals` is plain data: save it with a checkpoint and give it back to count on.

    >>> run = Accounting()
    >>> run.add(np.array([200, 30, 0, 970, 30, 4500, 1280, 970, 5, 0]))
    >>> run.report()["padding"]
    0.2421875
    >>> run.check(0.05)
    Traceback (most recent call last):
    llm_jax.errors.DataError: 15.0% of the documents are dropped (30 of 200): data.max_dropped allows 5.0%
    """

    def __init__(self, totals: Sequence[float] | None = None):
        self.totals: list[float] = [float(x) for x in totals] if totals else [0.0] * len(FIELDS)
        if len(self.totals) != len(FIELDS):
            raise DataError(f"the saved account has {len(self.totals)} entries, not {len(FIELDS)}: {', '.join(FIELDS)}")

    def add(self, account: np.ndarray):
        """Add the account of a batch; of all processes' batches to count a whole run."""
        self.totals = [total + float(x) for total, x in zip(self.totals, account, strict=True)]

    def report(self) -> dict[str, float]:
        """Counts and shares by name; `padding` is the share of the slots that hold nothing."""
        said = {name: int(total) for name, total in zip(FIELDS, self.totals, strict=True)}
        slots, filled = said.pop("slots"), said.pop("filled")
        return {**said, "padding": 1.0 - filled / slots if slots else 0.0}

    def check(self, max_dropped: float, final: bool = False):
        """Stop a run that loses more than it is allowed to.

        Shares are judged from 100 documents or rows on, or at the end (`final`).

        Raises:
            DataError: the share of documents dropped, of tokens lost or of rows without targets exceeds `max_dropped`.
        """
        t = dict(zip(FIELDS, self.totals, strict=True))
        least = 1 if final else ENOUGH
        shares = (
            ("documents are dropped", t["dropped"], t["read"], t["read"] >= least),
            ("tokens are lost", t["lost"], t["tokens"] + t["lost"], t["read"] >= least),
            ("rows have nothing to predict", t["rows_without_targets"], t["rows"], t["rows"] >= least),
        )
        over = [
            f"{_share(part, whole):.1%} of the {what} ({part:.0f} of {whole:.0f})"
            for what, part, whole, judged in shares
            if judged and _share(part, whole) > max_dropped
        ]
        if over:
            raise DataError(f"{'; '.join(over)}: data.max_dropped allows {max_dropped:.1%}")
