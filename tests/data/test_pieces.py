"""Windows cover each target once and fit the row; accounts add up; a policy does what it says."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.pieces import ACCOUNT, Dropped, account, counts, split_long
from llm_jax.errors import DataError


@given(st.integers(2, 200), st.integers(1, 50))
def test_split_covers_each_target_exactly_once(symbols, length):
    document = np.arange(symbols)
    inputs, targets = document[:-1], document[1:]
    windows = split_long(inputs, length, "split")
    assert all(0 < stop - start <= length for start, stop in windows)
    assert np.concatenate([targets[start:stop] for start, stop in windows]).tolist() == targets.tolist()
    assert all(np.array_equal(inputs[start:stop] + 1, targets[start:stop]) for start, stop in windows)


@given(st.integers(0, 40), st.integers(1, 50), st.sampled_from(["split", "truncate", "drop", "error"]))
def test_a_document_that_fits_is_kept_whole_under_every_policy(count, spare, policy):
    windows = split_long(np.arange(count), count + spare, policy)
    assert windows == ([(0, count)] if count else [])


def test_long_documents():
    assert split_long(np.arange(9), 4, "truncate") == [(0, 4)]
    with pytest.raises(Dropped) as dropped:
        split_long(np.arange(9), 4, "drop")
    assert (dropped.value.tokens, str(dropped.value)) == (9, "9 tokens, a row holds 4")
    with pytest.raises(DataError) as error:
        split_long(np.arange(9), 4, "error", "novel.txt")
    assert str(error.value) == (
        "document novel.txt has 9 tokens, a row holds 4: set data.long to split, truncate or drop"
    )


def test_bad_arguments():
    with pytest.raises(DataError, match=r"unknown data.long 'truncat'; did you mean 'truncate'\?"):
        split_long(np.arange(9), 4, "truncat")
    with pytest.raises(DataError, match="a row holds 0 tokens of a document: raise batch.length"):
        split_long(np.arange(9), 0, "split")


def test_dropped_survives_pickling():
    again = pickle.loads(pickle.dumps(Dropped("too short", 3)))
    assert (again.reason, again.tokens, str(again)) == ("too short", 3, "too short")


def test_account():
    total = account(read=1, tokens=2**52, bytes=7) + account(read=1, dropped=1, lost=5)
    assert total.dtype == np.float64 and total.shape == (len(ACCOUNT),)
    assert counts(total) == {"read": 2, "dropped": 1, "truncated": 0, "tokens": 2**52, "lost": 5, "bytes": 7}
    with pytest.raises(DataError, match=r"unknown count 'token'; did you mean 'tokens'\?"):
        account(token=1)
