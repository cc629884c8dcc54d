"""How a document becomes pieces no longer than a row, and the count of what was kept and what was lost on the way.

Responsible for the cutting policy and the vector of counts. Which features a piece has is the task's business; adding
the vectors up over workers and stopping a run past a threshold is the pipeline's.
"""

import numpy as np

from llm_jax.errors import DataError, choose

ACCOUNT = ("read", "dropped", "truncated", "tokens", "lost", "bytes")
"""Entries of an account: documents read, dropped, truncated; tokens kept, lost; UTF-8 bytes of those kept."""

POLICIES = ("split", "truncate", "drop", "error")


class Dropped(Exception):
    """A document yields no piece; raised by tasks and `split_long`, counted by the pipeline, never shown as an error.

    `tokens` is the number of tokens lost with it, 0 where it was dropped before it was tokenised.
    """

    def __init__(self, reason: str, tokens: int = 0):
        super().__init__(reason, tokens)  # both in `args`, so that it survives pickling between processes
        self.reason, self.tokens = reason, int(tokens)

    def __str__(self) -> str:
        return self.reason


def account(**counts: float) -> np.ndarray:
    """The float64 vector with the named counts, 0 elsewhere. Accounts of documents, workers and hosts add up.

    float64 counts exactly up to 2**53.

    >>> account(read=1, tokens=7) + account(read=1, dropped=1, lost=3)
    array([2., 1., 0., 7., 3., 0.])
    """
    vector = np.zeros(len(ACCOUNT))
    for name, count in counts.items():
        vector[ACCOUNT.index(choose("count", name, ACCOUNT, DataError))] = count
    return vector


def counts(vector: np.ndarray) -> dict[str, int]:
    """The account by name: the inverse of `account`.

    >>> counts(account(read=2, bytes=5))["read"]
    2
    """
    return {name: int(value) for name, value in zip(ACCOUNT, vector, strict=True)}


def split_long(tokens: np.ndarray, length: int, policy: str, name: str = "") -> list[tuple[int, int]]:
    """Windows `(start, stop)` over a document's input tokens, none longer than `length`, in order, without overlap.

    For next-token prediction a document of N+1 symbols has the inputs `symbols[:-1]` and the targets `symbols[1:]`;
    pass the inputs, and take `inputs[start:stop]` with `targets[start:stop]`: under `split` each target is covered
    exactly once, and the symbol at a cut is the last target of one window and the first input of the next. An empty
    document has no window.

    Args:
        tokens: (N,) the inputs of one document.
        length: inputs that a row holds.
        policy: what happens when N > length: `split` into windows of `length` and a rest, `truncate` to the first
            window, `drop` or `error`.
        name: the document's id, for the error.

    Raises:
        Dropped: N > length under `drop`.
        DataError: N > length under `error`, or an unknown policy.

    >>> split_long(np.arange(10), 4, "split"), split_long(np.arange(10), 4, "truncate")
    ([(0, 4), (4, 8), (8, 10)], [(0, 4)])
    >>> split_long(np.arange(10), 4, "error", "a.txt")
    Traceback (most recent call last):
    llm_jax.errors.DataError: document a.txt has 10 tokens, a row holds 4: set data.long to split, truncate or drop
    """
    choose("data.long", policy, POLICIES, DataError)
    if length < 1:
        raise DataError(f"a row holds {length} tokens of a document: raise batch.length")
    count = len(tokens)
    if count <= length or policy == "split":
        return [(start, min(start + length, count)) for start in range(0, count, length)]
    if policy == "truncate":
        return [(0, length)]
    if policy == "drop":
        raise Dropped(f"{count} tokens, a row holds {length}", count)
    raise DataError(
        f"document {name or '(unnamed)'} has {count} tokens, a row holds {length}: "
        "set data.long to split, truncate or drop"
    )
