"""The stream of batches: deterministic, complete, resumable at any batch, and counted."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.config import Batch, Data
from llm_jax.data import pieces
from llm_jax.data.accounting import FIELDS, Accounting
from llm_jax.data.documents import documents, split_documents
from llm_jax.data.pipeline import Loader, check_fingerprint
from llm_jax.errors import ConfigError, DataError

LENGTH = 32


@dataclasses.dataclass
class Memory:
    """Documents of given lengths whose words are numbers, each once in the whole source."""

    spec: str
    lengths: list
    first: int = 1
    invalid: frozenset = frozenset()
    fingerprint: str = "f"

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        name = f"{self.spec}:{index}"
        if index in self.invalid:
            return {"id": name, "invalid": True}
        start = self.first + sum(self.lengths[:index])
        return {"id": name, "text": " ".join(map(str, range(start, start + self.lengths[index])))}


class Words:
    """Each word is a number, and its own token."""

    pad, vocab_size, fingerprint = 0, 10**6, "t"

    def encode(self, text):
        return np.array(text.split(), np.int32)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Each token is its own target."""

    noise: bool = False
    empty: int = 0
    """targets below this are not predicted"""

    def lengths(self, length):
        return {"tokens": length}

    def examples(self, record, tokenizer, length, long, rng):
        tokens = tokenizer.encode(record["text"])
        for start, stop in pieces.split_long(tokens, length, long, record["id"]):
            part = tokens[start:stop]
            yield {"tokens": part, "targets": part, "weights": (part >= self.empty).astype(np.float64)}

    def row(self, row, tokenizer, rng):
        return {**row, "noise": rng.random(len(row["tokens"])).astype(np.float32)} if self.noise else row


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The encoder reads the document backwards, and every other token of it."""

    def lengths(self, length):
        return {"encoder_tokens": length // 2, "tokens": length}

    def examples(self, record, tokenizer, length, long, rng):
        tokens = tokenizer.encode(record["text"])
        for start, stop in pieces.split_long(tokens, length, long, rng):
            part = tokens[start:stop]
            yield {
                "tokens": part,
                "targets": part,
                "weights": np.ones(len(part), np.float32),
                "encoder_tokens": part[1::2][::-1],
            }

    def row(self, row, tokenizer, rng):
        return row


@dataclasses.dataclass(frozen=True)
class Labels:
    def lengths(self, length):
        return {"tokens": length}

    def examples(self, record, tokenizer, length, long, rng):
        tokens = tokenizer.encode(record["text"])[:length]
        yield {"tokens": tokens, "label": np.int64(tokens[0] % 7)}

    def row(self, row, tokenizer, rng):
        return row


def loader(sources, task=None, batch=None, seed=0, split="train", index=0, count=1, **data):
    data = {"sources": tuple(source.spec for source in sources), "heldout": 0.0, "window": 40, **data}
    return Loader(sources, Words(), task or Copy(), Data(**data), batch or Batch(4, LENGTH), seed, split, index, count)


def held(sources, **arguments):
    """All batches of an evaluation that reads every document."""
    arguments = {"heldout_sources": ("all",), "split": "heldout", **arguments}
    with loader(sources, **arguments) as rows:
        return list(rows)


def tokens_of(rows):
    return np.concatenate([r.batch["tokens"][r.batch["segment_ids"] > 0] for r in rows])


def documents_of(rows):
    return {number for r in rows for number in r.ids.ravel().tolist()} - {-1}


def equal(one, other):
    assert one.digest == other.digest
    assert one.batch.keys() == other.batch.keys()
    for name in one.batch:
        np.testing.assert_array_equal(one.batch[name], other.batch[name])
    np.testing.assert_array_equal(one.account, other.account)
    np.testing.assert_array_equal(one.ids, other.ids)


def take(rows, count):
    return [next(rows) for _ in range(count)]


def mixed(seed=0):
    rng = np.random.default_rng(seed)
    return [Memory("a", rng.integers(1, 150, 60).tolist()), Memory("b", rng.integers(0, 20, 150).tolist(), first=10**5)]


def test_arrays_of_a_packed_batch():
    rows = held([Memory("a", [5, 7, 40])])
    batch = rows[0].batch
    assert set(batch) == {"tokens", "targets", "weights", "segment_ids", "positions"}
    assert {name: (value.shape, str(value.dtype)) for name, value in batch.items()} == {
        name: ((4, LENGTH), "float32" if name == "weights" else "int32") for name in batch
    }
    for tokens, segments, positions, ids in zip(
        batch["tokens"], batch["segment_ids"], batch["positions"], rows[0].ids, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            np.testing.assert_array_equal(positions[where], np.arange(where.sum()))
            assert (np.diff(tokens[where]) == 1).all()
            assert len(set(ids[where])) == 1
        assert (tokens[segments == 0] == 0).all() and (ids[segments == 0] == -1).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=12), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([(), (4, 16)]),
    st.integers(1, 50),
)
def test_each_token_once_in_an_evaluation(corpus, pack, buckets, window):
    if not any(map(sum, corpus)):
        return
    sources = [Memory(str(i), lengths, first=1 + 10**4 * i) for i, lengths in enumerate(corpus)]
    rows = held(sources, pack=pack, buckets=() if pack else buckets, window=window)
    expected = [n for s in sources for n in range(s.first, s.first + sum(s.lengths))]
    assert sorted(tokens_of(rows).tolist()) == expected
    total = dict(zip(FIELDS, sum(r.account for r in rows), strict=True))
    assert total["read"] == sum(map(len, corpus)) and total["tokens"] == len(expected) == total["filled"]
    assert total["dropped"] == sum(n == 0 for lengths in corpus for n in lengths)
    assert total["slots"] == sum(r.batch["tokens"].size for r in rows)
    assert total["bytes"] == sum(len(s[i]["text"]) for s in sources for i in range(len(s)))
    offsets = np.cumsum([0, *map(len, corpus)])
    for r in rows:
        for token, document in zip(r.batch["tokens"][r.ids >= 0], r.ids[r.ids >= 0], strict=True):
            which = np.searchsorted(offsets, document, side="right") - 1
            assert str(token) in sources[which][document - offsets[which]]["text"].split()


def test_each_token_once_an_epoch_in_training():
    source = Memory("a", np.random.default_rng(0).integers(0, 90, 50).tolist())
    count = sum(source.lengths)
    with loader([source], pack=False, batch=Batch(1, LENGTH), window=1) as rows:
        seen = []
        for r in rows:
            seen.append(tokens_of([r]))
            if sum(map(len, seen)) >= 2 * count:
                break
    seen = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(seen[:count]), np.arange(1, count + 1))
    np.testing.assert_array_equal(np.sort(seen[count:]), np.arange(1, count + 1))
    assert (seen[:count] != seen[count:]).any(), "the second epoch has the order of the first"


def test_the_seed_decides():
    with loader(mixed(), seed=1) as a, loader(mixed(), seed=1) as b, loader(mixed(), seed=2) as c:
        one, two, three = take(a, 8), take(b, 8), take(c, 8)
    for x, y in zip(one, two, strict=True):
        equal(x, y)
    assert {r.digest for r in one}.isdisjoint(r.digest for r in three)


def test_an_evaluation_does_not_depend_on_seed_or_workers():
    one, two = (held(mixed(), seed=seed, task=Copy(noise=True), workers=workers) for seed, workers in ((1, 0), (2, 2)))
    for x, y in zip(one, two, strict=True):
        equal(x, y)


@pytest.mark.parametrize("kind, low, high", [("split", 100, 3000), ("short", 5, 256)])
def test_packing_fills_the_rows(kind, low, high):
    source = Memory(kind, np.random.default_rng(0).integers(low, high, 12000 * 128 // (low + high)).tolist())
    total = np.zeros(len(FIELDS))
    with loader([source], batch=Batch(16, 256), window=1024) as rows:
        for r in take(rows, 40):
            total += r.account
    assert total[FIELDS.index("filled")] / total[FIELDS.index("slots")] >= 0.97


@pytest.mark.parametrize("data", [{}, {"pack": False, "buckets": (8, 16)}, {"pack": False}])
def test_resumes_at_every_batch(data):
    def make():
        return loader(mixed(), task=Copy(noise=True), weights=(1.0, 2.5), **data)

    states, rows = [], []
    with make() as stream:
        for _ in range(30):
            states.append(json.dumps(stream.get_state()))
            rows.append(next(stream))
        for at in (29, 3, 17):
            stream.set_state(json.loads(states[at]))
            equal(next(stream), rows[at])
    for at, state in enumerate(states):
        with make() as fresh:
            fresh.set_state(json.loads(state))
            assert json.dumps(fresh.get_state()) == state
            for row in rows[at : at + 3]:
                equal(next(fresh), row)
    with make() as fresh:
        fresh.set_state(json.loads(states[0]))
        for row in rows:
            equal(next(fresh), row)


def test_resumes_an_evaluation_at_every_batch():
    arguments = {"split": "heldout", "heldout_sources": ("all",)}
    rows = held(mixed())
    with loader(mixed(), **arguments) as stream:
        for at in range(len(rows)):
            state = stream.get_state()
            next(stream)
            with loader(mixed(), **arguments) as fresh:
                fresh.set_state(state)
                rest = list(fresh)
            assert len(rest) == len(rows) - at
            for one, two in zip(rest, rows[at:], strict=True):
                equal(one, two)
        state = stream.get_state()
    with loader(mixed(), **arguments) as fresh:
        fresh.set_state(state)
        assert list(fresh) == []


def test_resumes_with_worker_processes():
    def make():
        return loader(mixed(), task=Copy(noise=True), workers=2)

    with make() as stream:
        rows, states = [], []
        for _ in range(12):
            states.append(json.dumps(stream.get_state()))
            rows.append(next(stream))
        stream.set_state(json.loads(states[0]))
        equal(next(stream), rows[0])
    with make() as fresh:
        for at in (1, 6):
            fresh.set_state(json.loads(states[at]))
            for row in rows[at : at + 5]:
                equal(next(fresh), row)
    with loader([Memory("a", [10] * 3000)], workers=2) as stream:
        rows = take(stream, 8)
    tokens = tokens_of(rows)
    assert len(set(tokens.tolist())) == len(tokens), "both workers read the same documents"
    assert len({noise.tobytes() for r in rows for noise in r.batch["tokens"]}) == 32


def test_a_state_of_another_layout_starts_a_new_stream():
    with loader(mixed()) as stream:
        seen = {r.digest for r in take(stream, 5)}
        state = stream.get_state()
    with loader(mixed()[:1]) as stream:
        stream.set_state(state)
        first = take(stream, 3)
        again = stream.get_state()
        following = next(stream)
    assert seen.isdisjoint(r.digest for r in first)
    with loader(mixed()[:1]) as stream:
        assert next(stream).digest != first[0].digest
        stream.set_state(again)
        equal(next(stream), following)


def test_weights_are_shares_of_pieces():
    sources = [Memory("a", [10] * 50), Memory("b", [10] * 50, first=10**5)]
    with loader(sources, weights=(3.0, 1.0), pack=False) as rows:
        ids = np.concatenate([r.ids[:, 0] for r in take(rows, 100)])
    assert abs((ids < 50).mean() - 0.75) < 0.01
    with loader([Memory("a", [10] * 90), Memory("b", [10] * 30)], pack=False) as rows:
        ids = np.concatenate([r.ids[:, 0] for r in take(rows, 100)])
    assert abs((ids < 90).mean() - 0.75) < 0.01


def test_a_small_window_keeps_pieces_near_their_place():
    with loader([Memory("a", [LENGTH] * 400)], pack=False, window=8) as rows:
        near = [r.ids[:, 0].tolist() for r in take(rows, 10)]
    with loader([Memory("a", [LENGTH * 20] * 40)], pack=False, window=8) as rows:
        together = [len(set(r.ids[:, 0].tolist())) for r in take(rows, 10)]
    with loader([Memory("a", [LENGTH * 20] * 40)], pack=False, window=400) as rows:
        apart = [len(set(r.ids[:, 0].tolist())) for r in take(rows, 10)]
    assert len({i for ids in near for i in ids}) == 40
    assert np.mean(together) < 2 < np.mean(apart)


def test_a_worker_that_imports_its_own_script_says_so(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ConfigError, match="under if __name__ == '__main__':"):
        loader(mixed(), workers=1)


def test_accounts_are_exact_with_dropped_documents():
    lengths = [0, 5, 90, 0, 0, 12, 33, 7, 200, 0]
    source = Memory("a", lengths, invalid=frozenset({5}))
    rows = held([source], long="drop", invalid="skip", batch=Batch(2, LENGTH))
    total = dict(zip(FIELDS, sum(r.account for r in rows), strict=True))
    assert (total["read"], total["dropped"], total["tokens"], total["lost"]) == (10, 8, 12, 323)
    with loader([source], long="drop", invalid="skip", batch=Batch(1, LENGTH), pack=False, window=1) as train:
        counts = np.cumsum([r.account for r in take(train, 20)], axis=0)
    # An epoch of ten documents holds two pieces: what is counted stays within an epoch of what is used.
    assert all(0 <= count[0] - 10 * (i // 2) <= 10 for i, count in enumerate(counts))
    assert (counts[:, 1] == counts[:, 0] - np.arange(1, 21)).all()


def test_nothing_to_use_is_an_error():
    message = "none of 6 documents read in a row yields an example; the last one: a:[012]: it has no tokens"
    with pytest.raises(DataError, match=message):
        with loader([Memory("a", [0, 0, 0])]) as rows:
            next(rows)
    with pytest.raises(DataError, match="none of the documents of a yields an example"):
        held([Memory("a", [0, 0, 0])])
    with pytest.raises(DataError, match="document a:[01] has 99 tokens, a row holds 32"):
        with loader([Memory("a", [99, 99])], long="error") as rows:
            next(rows)
    with pytest.raises(DataError, match="a:[01]: no field 'body'.*It has: id, text. Set data.text"):
        with loader([Memory("a", [9, 9])], text="body") as rows:
            next(rows)
    with pytest.raises(DataError, match="1 documents for data.shards 2: shard 1 has none"):
        loader([Memory("a", [9])], shards=2)


def test_buckets():
    source = Memory("a", np.random.default_rng(0).integers(1, 30, 300).tolist())
    with loader([source], pack=False, buckets=(8, 16)) as stream:
        rows = take(stream, 100)
    shapes = {r.batch["tokens"].shape for r in rows}
    assert shapes == {(4, 8), (4, 16), (4, 32)}
    for r in rows:
        longest = (r.batch["segment_ids"] > 0).sum(axis=1).max()
        assert r.batch["tokens"].shape[1] == min(b for b in (8, 16, 32) if b >= longest)
    assert len({r.batch["tokens"].shape for r in rows[:10]}) > 1, "the batches of a window come by length"
    rows = held([source], pack=False, buckets=(8, 16))
    assert all(len(r.batch["tokens"]) == 4 for r in rows)
    assert sum(r.account[FIELDS.index("rows")] for r in rows) == 300
    for message, data in (
        ("different lengths", {"shards": 2, "buckets": (8,), "pack": False}),
        ("set data.pack to False", {"buckets": (8,)}),
        ("batch.length is 32", {"buckets": (64,), "pack": False}),
    ):
        with pytest.raises(ConfigError, match=message):
            loader([source], **data)


def test_two_streams_agree():
    rows = held([Memory("a", [5, 1, 9, 40, 0, 3, 31, 7])], task=Pairs())
    for r in rows:
        b = r.batch
        assert b["encoder_tokens"].shape == (4, LENGTH // 2) == b["encoder_positions"].shape
        for row in range(4):
            for segment in range(1, b["segment_ids"][row].max() + 1):
                own = b["tokens"][row][b["segment_ids"][row] == segment]
                encoded = b["encoder_tokens"][row][b["encoder_segment_ids"][row] == segment]
                np.testing.assert_array_equal(encoded, own[1::2][::-1])
    assert sorted(tokens_of(rows)) == list(range(1, 97))


def test_labels_need_unpacked_rows():
    source = Memory("a", [5, 40, 9, 3, 2])
    rows = held([source], task=Labels(), pack=False)
    assert rows[0].batch["label"].shape == (4,) and rows[0].batch["label"].dtype == np.int32
    np.testing.assert_array_equal(rows[0].batch["label"], rows[0].batch["tokens"][:, 0] % 7)
    assert rows[1].batch["label"].tolist()[1:] == [0, 0, 0]
    with pytest.raises(ConfigError, match="Labels gives each example a 'label'"):
        held([source], task=Labels())


def test_shards_share_the_documents():
    sources = mixed()
    parts = []
    for index in range(2):
        with loader(sources, index=index, count=2, shards=2, pack=False, window=1) as rows:
            parts.append(take(rows, 250))
    ids = [documents_of(part) for part in parts]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(np.flatnonzero(sources[0].lengths + sources[1].lengths))
    assert all(r.batch["tokens"].shape == (2, LENGTH) for part in parts for r in part)
    whole, *halves = (held(sources, task=Copy(noise=True), index=i, count=n) for i, n in ((0, 1), (0, 2), (1, 2)))
    same_batches(whole, halves)
    with pytest.raises(ConfigError, match="not a multiple of the 3 processes"):
        loader(sources, count=3)
    with pytest.raises(ConfigError, match=r"not a multiple of data.shards 3"):
        loader(sources, shards=3)
    with pytest.raises(ConfigError, match="data.shards 6 and the 4 processes: one must be a multiple of the other"):
        loader(sources, shards=6, count=4, batch=Batch(12, LENGTH))


def same_batches(whole, parts):
    for one, *each in zip(whole, *parts, strict=True):
        for name in one.batch:
            np.testing.assert_array_equal(one.batch[name], np.concatenate([x.batch[name] for x in each]))
        np.testing.assert_array_equal(one.account, sum(x.account for x in each))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(shards):
    """Nor does a state: what some processes saved, others go on from."""
    sources, count = mixed(), 8
    options = dict(shards=shards, task=Copy(noise=True), batch=Batch(8, LENGTH), window=20)
    with loader(sources, **options) as stream:
        whole = take(stream, count)
        place = json.loads(json.dumps(stream.get_state()))
        after = take(stream, 3)
    for processes in (2, 4, 8):
        if shards % processes and processes % shards:
            continue
        parts, places, more, back = [], [], [], []
        for index in range(processes):
            with loader(sources, index=index, count=processes, **options) as stream:
                parts.append(take(stream, count))
                places.append(json.loads(json.dumps(stream.get_state())))
            with loader(sources, index=index, count=processes, **options) as stream:
                stream.set_state(place)
                more.append(take(stream, 3))
        same_batches(whole, parts)
        same_batches(after, more)
        with loader(sources, **options) as stream:
            stream.set_state(*places)
            back = take(stream, 3)
        same_batches(after, [back])


def test_split_documents():
    train, heldout = split_documents(1000, 0.05)
    assert len(heldout) == 50 and sorted([*train, *heldout]) == list(range(1000))
    np.testing.assert_array_equal(heldout, split_documents(1000, 0.05)[1])
    for fraction in (0.01, 0.99):
        assert [len(part) for part in split_documents(2, fraction)] == [1, 1]
    with pytest.raises(DataError, match="a: there is a single document"):
        documents(Memory("a", [3]), Data(heldout=0.1), "train")
    with pytest.raises(DataError, match="a: no document is held out"):
        documents(Memory("a", [3, 3]), Data(heldout=0.0), "heldout")
    with pytest.raises(DataError, match="a: there are no documents"):
        documents(Memory("a", []), Data(), "train")
    assert len(documents(Memory("a", [3]), Data(heldout_sources=("b",)), "train")) == 1
    source = Memory("a", [9] * 40)
    with loader([source], heldout=0.2) as rows:
        trained = documents_of(take(rows, 30))
    judged = documents_of(held([source], heldout=0.2, heldout_sources=()))
    assert len(judged) == 8 and not trained & judged and trained | judged == set(range(40))


def test_fingerprints_say_what_changed():
    def fingerprint(sources=None, **data):
        with loader(sources or mixed(), **data) as rows:
            return json.loads(json.dumps(rows.fingerprint()))

    saved = fingerprint()
    check_fingerprint(saved, fingerprint())
    changed = mixed()
    changed[1] = dataclasses.replace(changed[1], fingerprint="g")
    for message, now in (
        ("source b has other content", fingerprint(changed)),
        (r"the sources were \['a', 'b'\], now \['a'\]", fingerprint(mixed()[:1])),
        ("data.workers was 0, now 2", fingerprint(workers=2)),
        ("data.shards was 1, now 2", fingerprint(shards=2)),
        ("data.window was 40, now 41", fingerprint(window=41)),
        ("task was Copy.*noise=True", fingerprint(task=Copy(True))),
        ("batch.size was 4, now 8", fingerprint(batch=Batch(8, LENGTH))),
    ):
        with pytest.raises(DataError, match=message + ".*allow_changed_data=True"):
            check_fingerprint(saved, now)


def test_accounting_stops_a_run_that_loses_too_much():
    lengths = [10, 0] * 60
    run = Accounting()
    rows = held([Memory("a", lengths)], task=Copy(empty=300), batch=Batch(2, LENGTH))
    message = r"50.0% of the documents are dropped \(60 of 120\).*rows have nothing to predict"
    with pytest.raises(DataError, match=message):
        for r in rows:
            run.add(r.account)
        run.check(0.05, final=True)
    run.check(0.6)
    said = Accounting(json.loads(json.dumps(run.totals))).report()
    assert said["read"] == 120 and said["dropped"] == 60 and said["tokens"] == 600 and 0 < said["padding"] < 0.2
    early = Accounting()
    early.add(rows[0].account)
    early.check(0.0)
    with pytest.raises(DataError):
        early.check(0.0, final=True)
