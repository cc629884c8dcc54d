"""Masked-token prediction: which tokens are hidden, how, and what the row asks for."""

import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config, tasks
from llm_jax.data.pieces import ACCOUNT
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.tasks import MaskedToken

LENGTH = 128
RECORDED = 59798662


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


# --- whole words


def text_row(tokenizer, seed=0, length=LENGTH, padding=20):
    """A row of two examples of words of the fixtures, some cut at the edges of the examples."""
    rng = np.random.default_rng(seed)
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in ("a", "ixo", "uzyq") for c in ("", "rt", "vwx")]
    row = make_row(tokenizer, seed, length, padding)
    for segment in (1, 2):
        where = np.flatnonzero(row["segment_ids"] == segment)
        if len(where) > 2:
            ids = tokenizer.encode(" ".join(rng.choice(words, length)))
            skipped = int(rng.integers(0, 3))
            row["tokens"][where[1:-1]] = ids[skipped : skipped + len(where) - 2]
    return row


def words_of(row, tokenizer):
    """The places of each word, by the definition: a run of an example that only its first token may not continue."""
    words, open_word = [], False
    for at, (token, segment) in enumerate(zip(row["tokens"].tolist(), row["segment_ids"].tolist())):
        if segment == 0 or token in (tokenizer.cls, tokenizer.sep, tokenizer.pad):
            open_word = False
            continue
        if open_word and row["segment_ids"][at - 1] == segment and tokenizer.continues[token]:
            words[-1].append(at)
        else:
            words.append([at])
        open_word = True
    return words


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(8, 200), padding=st.integers(0, 4), rate=st.floats(0.01, 0.9))
def test_words_are_chosen_whole(wordpiece, seed, length, padding, rate):
    task, row = MaskedToken(rate=rate, whole_words=True), text_row(wordpiece, seed, length, padding)
    after = task.row(dict(row), wordpiece, np.random.default_rng(seed))
    count = int(after["weights"].sum())
    where = after["predict"][:count]
    assert (np.diff(where) > 0).all() and (after["weights"] == (np.arange(task.predictions(length)) < count)).all()
    words = words_of(row, wordpiece)
    candidates = sum(map(len, words))
    budget = min(task.predictions(length), candidates, max(1, round(rate * candidates)))
    chosen = [word for word in words if set(word) <= set(where.tolist())]
    assert sum(map(len, chosen)) == count <= budget, "a word is chosen in part, or too much is"
    left = [len(word) for word in words if word not in chosen]
    assert not left or min(left) > budget - count, "a word that fits was passed over"
    assert (after["targets"][:count] == row["tokens"][where]).all()
    untouched = np.setdiff1d(np.arange(length), where)
    assert (after["tokens"][untouched] == row["tokens"][untouched]).all()


def test_the_rates_of_whole_words(wordpiece):
    """About 15% of the tokens; each token of a word is hidden, changed or kept by itself.

    In a long row long words are chosen nearly as often as short ones, which find room at the end of the budget.
    """
    task, rows = MaskedToken(whole_words=True), 80
    counts, chosen_by_size, seen_by_size, mixed, candidates = np.zeros(3), np.zeros(9), np.zeros(9), 0, 0
    for seed in range(rows):
        row = text_row(wordpiece, seed, length=1024)
        after = task.row(dict(row), wordpiece, np.random.default_rng(seed))
        where = after["predict"][after["weights"] > 0]
        hidden = after["tokens"][where] == wordpiece.mask
        kept = after["tokens"][where] == row["tokens"][where]
        counts += [len(where), hidden.sum(), (kept & ~hidden).sum()]
        words = words_of(row, wordpiece)
        candidates += sum(map(len, words))
        for word in words:
            seen_by_size[len(word)] += 1
            if set(word) <= set(where.tolist()):
                chosen_by_size[len(word)] += 1
                mixed += len(set(hidden[np.isin(where, word)].tolist())) > 1
    assert counts[0] / candidates == pytest.approx(0.15, abs=0.002)
    other = 1 / wordpiece.vocab_size
    for count, share in ((counts[1], 0.8 + 0.1 * other), (counts[2], 0.1 + 0.1 * other)):
        assert abs(count - counts[0] * share) < 4.5 * math.sqrt(counts[0] * share * (1 - share))
    assert mixed > 0.2 * chosen_by_size[2:].sum() > 100
    shares = chosen_by_size[1:] / seen_by_size[1:]
    assert seen_by_size[1:].min() > 1000 and shares.min() > 0.12 and shares.max() < 0.2


def test_whole_words_depend_on_the_generator_alone(wordpiece):
    task, row = MaskedToken(whole_words=True), text_row(wordpiece)
    original = row["tokens"].copy()
    first, again, other = (task.row(dict(row), wordpiece, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["predict"] != other["predict"]).any() and (row["tokens"] == original).all()


def test_words_end_with_their_example(wordpiece):
    """Also where no special token stands between two examples, and where the second begins within a word."""
    more = int(np.flatnonzero(wordpiece.continues)[0])
    row = {"tokens": np.full(12, more, np.int32), "segment_ids": np.repeat([1, 2, 0], 4).astype(np.int32)}
    seen = set()
    for seed in range(20):
        after = MaskedToken(rate=0.5, whole_words=True).row(dict(row), wordpiece, np.random.default_rng(seed))
        seen.add(tuple(after["predict"][after["weights"] > 0].tolist()))
    assert seen == {(0, 1, 2, 3), (4, 5, 6, 7)}
    after = MaskedToken(rate=0.15, whole_words=True).row(dict(row), wordpiece, np.random.default_rng(0))
    assert not after["weights"].any(), "no word is as small as the budget"


def test_without_whole_words_rows_are_what_they_were(wordpiece):
    """Recorded before whole words could be asked for: a run of then goes on with the same rows."""
    total = 0
    for seed in range(5):
        _, after = masked(MaskedToken(), wordpiece, seed)
        for name in ("tokens", "predict", "targets", "weights"):
            total = zlib.crc32(after[name].tobytes(), total)
    assert total == RECORDED


def test_single_tokens_are_words_of_one(wordpiece):
    """Where no token continues a word, both rules draw the same."""
    single = np.flatnonzero(~wordpiece.continues)[5:]
    row = make_row(wordpiece)
    inside = ~np.isin(row["tokens"], [wordpiece.cls, wordpiece.sep, wordpiece.pad])
    row["tokens"][inside] = np.random.default_rng(0).choice(single, inside.sum())
    first, second = (
        MaskedToken(whole_words=whole).row(dict(row), wordpiece, np.random.default_rng(0)) for whole in (False, True)
    )
    assert all((first[name] == second[name]).all() for name in first)


def test_a_tokenizer_without_words_is_refused(wordpiece):
    definition = json.loads(wordpiece.definition)
    definition["model"]["continuing_subword_prefix"] = "@@@"
    other = Tokenizer(json.dumps(definition), wordpiece.config)
    task = MaskedToken(whole_words=True)
    with pytest.raises(DataError, match="is marked as the continuation of a word: set task.whole_words to False"):
        next(task.examples({"id": "a", "text": "a"}, other, 10, "split", np.random.default_rng(0)))
    assert tasks.from_dict(json.loads(json.dumps(config.to_dict(task)))) == task


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
