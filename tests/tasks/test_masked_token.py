"""Masked-token prediction: which tokens are hidden, how, and what the row asks for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.pieces import ACCOUNT
from llm_jax.errors import ConfigError, DataError
from llm_jax.tasks import MaskedToken

LENGTH = 128


def make_row(tokenizer, seed=0, length=LENGTH, padding=20):
    """A packed row of two examples between their special tokens, and padding."""
    rng = np.random.default_rng(seed)
    filled = length - padding
    tokens = rng.integers(5, tokenizer.vocab_size, length).astype(np.int32)
    segments = np.where(np.arange(length) < filled // 2, 1, np.where(np.arange(length) < filled, 2, 0)).astype(np.int32)
    for start, stop in ((0, filled // 2), (filled // 2, filled)):
        tokens[start], tokens[stop - 1] = tokenizer.cls, tokenizer.sep
    tokens[filled:] = tokenizer.pad
    return {"tokens": tokens, "segment_ids": segments}


def masked(task, tokenizer, seed=0, **options):
    row = make_row(tokenizer, seed, **options)
    return row, task.row(dict(row), tokenizer, np.random.default_rng(1000 + seed))


def test_the_rates_over_many_rows(wordpiece):
    """15% of the tokens are chosen; of these 80% become [MASK], 10% another token, 10% stay."""
    task, chosen, hidden, kept, rows = MaskedToken(), 0, 0, 0, 600
    positions = np.zeros(LENGTH)
    for seed in range(rows):
        before, after = masked(task, wordpiece, seed)
        where = after["predict"][after["weights"] > 0]
        positions[where] += 1
        chosen += len(where)
        hidden += np.count_nonzero(after["tokens"][where] == wordpiece.mask)
        kept += np.count_nonzero(after["tokens"][where] == before["tokens"][where])
    candidates = LENGTH - 20 - 4
    assert chosen == rows * round(0.15 * candidates)

    def within(count, share, spread=4.5):
        return abs(count - chosen * share) < spread * math.sqrt(chosen * share * (1 - share))

    other = 1 / wordpiece.vocab_size  # a random token may be [MASK], or the one that stood there
    assert within(hidden, 0.8 + 0.1 * other) and within(kept, 0.1 + 0.1 * other)
    free = positions[(positions > 0)]
    assert len(free) == candidates, "every token of an example can be chosen, special tokens and padding never"
    share = chosen / rows / candidates
    assert np.abs(free - rows * share).max() < 4.5 * math.sqrt(rows * share * (1 - share))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(8, 200), padding=st.integers(0, 4), rate=st.floats(0.01, 0.9))
def test_a_row(wordpiece, seed, length, padding, rate):
    task = MaskedToken(rate=rate)
    before, after = masked(task, wordpiece, seed, length=length, padding=padding)
    slots = task.predictions(length)
    assert slots == max(1, math.ceil(rate * length))
    assert after["predict"].shape == after["targets"].shape == after["weights"].shape == (slots,)
    count = int(after["weights"].sum())
    candidates = (before["segment_ids"] > 0) & ~np.isin(before["tokens"], [wordpiece.cls, wordpiece.sep, wordpiece.pad])
    assert count == min(slots, candidates.sum(), max(1, round(rate * candidates.sum())))
    where = after["predict"][:count]
    assert (np.diff(where) > 0).all() and candidates[where].all()
    assert (after["targets"][:count] == before["tokens"][where]).all()
    assert (after["weights"] == (np.arange(slots) < count)).all()
    untouched = np.setdiff1d(np.arange(length), where)
    assert (after["tokens"][untouched] == before["tokens"][untouched]).all()
    assert (after["tokens"] < wordpiece.vocab_size).all() and (after["segment_ids"] == before["segment_ids"]).all()
    assert (
        after["tokens"].dtype == after["predict"].dtype == after["targets"].dtype == np.int32
        and after["weights"].dtype == np.float32
    )


def test_the_choice_depends_on_the_generator_alone(wordpiece):
    task, row = MaskedToken(), make_row(wordpiece)
    original = row["tokens"].copy()
    first, again, other = (task.row(dict(row), wordpiece, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["predict"] != other["predict"]).any()
    assert (row["tokens"] == original).all(), "the row that came in is not written to"


@pytest.mark.parametrize("mask, random, outcome", [(1.0, 0.0, "mask"), (0.0, 0.0, "same")])
def test_extreme_shares(wordpiece, mask, random, outcome):
    before, after = masked(MaskedToken(mask=mask, random=random), wordpiece)
    where = after["predict"][after["weights"] > 0]
    assert (after["tokens"][where] == (wordpiece.mask if outcome == "mask" else before["tokens"][where])).all()


def test_all_random(wordpiece):
    """Replacements are spread over the whole vocabulary."""
    drawn = []
    for seed in range(60):
        _, after = masked(MaskedToken(mask=0.0, random=1.0), wordpiece, seed)
        drawn += after["tokens"][after["predict"][after["weights"] > 0]].tolist()
    assert len(set(drawn)) > 0.95 * wordpiece.vocab_size


def test_a_row_without_tokens_asks_for_nothing(wordpiece):
    for padding in (4, 8):  # special tokens alone, and padding alone
        row = make_row(wordpiece, length=8, padding=4)
        row["segment_ids"][8 - padding :] = 0
        after = MaskedToken().row(dict(row), wordpiece, np.random.default_rng(0))
        assert not after["weights"].any() and (after["tokens"] == row["tokens"]).all()


def test_examples_are_windows_between_class_and_separator(wordpiece):
    text = "ban bart can cart den dert fin firt gon gort lun lurt man mart nen nert"
    ids = wordpiece.encode(text)
    found = list(MaskedToken().examples({"id": "a", "text": text}, wordpiece, 10, "split", np.random.default_rng(0)))
    assert len(found) == math.ceil(len(ids) / 8) > 1
    assert all(
        e["tokens"][0] == wordpiece.cls and e["tokens"][-1] == wordpiece.sep and len(e["tokens"]) <= 10 for e in found
    )
    assert np.concatenate([e["tokens"][1:-1] for e in found]).tolist() == ids.tolist()
    counted = dict(zip(ACCOUNT, sum(e["account"] for e in found)))
    assert (counted["tokens"], counted["lost"], counted["bytes"]) == (len(ids), 0, pytest.approx(len(text)))
    (first,) = MaskedToken().examples({"id": "a", "text": text}, wordpiece, 10, "truncate", np.random.default_rng(0))
    counted = dict(zip(ACCOUNT, first["account"]))
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (8, len(ids) - 8, 1)
    assert list(MaskedToken().examples({"id": "a", "text": ""}, wordpiece, 10, "split", np.random.default_rng(0))) == []


def test_bad_input(bpe):
    with pytest.raises(DataError) as error:
        next(MaskedToken().examples({"id": "a", "text": "a"}, bpe, 10, "split", np.random.default_rng(0)))
    assert str(error.value) == "masked-token prediction needs a tokenizer with [CLS], [SEP] and [MASK]"
    for fields, message in (
        (dict(rate=1.5), "task.rate is 1.5: it must lie in [0, 1]"),
        (dict(mask=-0.1), "task.mask is -0.1: it must lie in [0, 1]"),
        (dict(random=2.0), "task.random is 2.0: it must lie in [0, 1]"),
        (dict(z_loss=-1.0), "task.z_loss is -1.0: it must be at least 0"),
        (
            dict(mask=0.8, random=0.3),
            "task.mask 0.8 and task.random 0.3 are shares of the same tokens: together at most 1",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            MaskedToken(**fields)
        assert str(error.value) == message
