"""The Grain datasets of the pipeline one by one, and the packing."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import pieces
from llm_jax.data.batching import Batches, Pieces, Windows
from llm_jax.data.packing import Bucketed, Document, Packed, Piece, Row, collate, pack
from llm_jax.errors import DataError

INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def piece(length, document=0, encoder=None, **counts):
    features = {"tokens": np.full(length, document + 1, np.int32), "weights": np.ones(length, np.float32)}
    lengths = (length,)
    if encoder is not None:
        features["encoder_tokens"] = np.full(encoder, document + 1, np.int32)
        lengths = (length, encoder)
    return Piece(features, lengths, document, pieces.account(**counts))


def stream(documents):
    """Documents by the number of their pieces; none is a dropped one."""
    made = [
        Document([piece(3, number, tokens=3, read=i == 0) for i in range(count)])
        if count
        else Document((), pieces.account(read=1, dropped=1), "empty")
        for number, count in enumerate(documents)
    ]
    return grain.MapDataset.source(made).to_iter_dataset(INLINE)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12))
def test_pieces_carry_what_yields_none(documents):
    found = list(Pieces(stream(documents), len(documents)))
    assert [p.document for p in found] == [n for n, count in enumerate(documents) for _ in range(count)]
    if found:
        total = sum(p.account for p in found)
        assert total[:2].tolist() == [len(documents), documents.count(0)]


def test_a_document_is_counted_with_the_next_piece_and_at_the_end_with_the_last():
    found = list(Pieces(stream([0, 0, 2, 0, 1, 0, 0, 0]), 8))
    assert [p.account[0] for p in found] == [3, 0, 5]
    found = list(Pieces(stream([1, 0, 0, 2]), 8))
    assert [p.account[0] for p in found] == [1, 3, 0]


def test_pieces_resume_everywhere():
    dataset = Pieces(stream([0, 0, 2, 0, 1, 3, 0, 0]), 8)
    whole = list(dataset)
    iterator = dataset.__iter__()
    states = [iterator.get_state()] + [iterator.get_state() for _ in iterator]
    used = dataset.__iter__()
    list(used)
    for at, state in enumerate(states):
        for fresh in (dataset.__iter__(), used):
            fresh.set_state(state)
            assert fresh.get_state() == state
            rest = list(fresh)
            assert [p.document for p in rest] == [p.document for p in whole[at:]]
            assert [p.account.tolist() for p in rest] == [p.account.tolist() for p in whole[at:]]


def test_too_many_documents_without_a_piece():
    with pytest.raises(DataError, match="none of 3 documents read in a row yields an example; the last one: empty"):
        list(Pieces(stream([1, 0, 0, 0, 0, 1]), 3))
    assert len(list(Pieces(stream([1, 0, 0, 0, 1]), 3))) == 2


def lengths_of(dataset):
    return [tuple(p.lengths[0] for p in row.pieces) for row in dataset]


def source_of(lengths):
    made = [piece(length, number) for number, length in enumerate(lengths)]
    return grain.MapDataset.source(made).to_iter_dataset(INLINE)


def test_windows_hold_their_pieces_and_at_least_their_rows():
    dataset = Windows(source_of([8] * 10), Packed((8,)), (8,), size=4, seed=0)
    documents = [row.pieces[0].document for row in dataset]
    assert [sorted(documents[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert documents != sorted(documents)
    dataset = Windows(source_of([2] * 20), Packed((8,)), (8,), size=1, rows=2.0, seed=None)
    assert lengths_of(dataset) == [(2, 2, 2, 2)] * 5
    documents = [[p.document for p in row.pieces] for row in dataset]
    assert [sorted(sum(documents[i : i + 2], [])) for i in (0, 2)] == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("group", [Packed((8,)), Bucketed(((4,), (8,)), 3)])
def test_windows_resume_everywhere(group):
    lengths = np.random.default_rng(0).integers(1, 9, 40).tolist()
    dataset = Windows(source_of(lengths), group, (8,), size=9, seed=5)
    grain.experimental.assert_equal_output_after_checkpoint(dataset.map(lambda row: [p.document for p in row.pieces]))
    iterator, drawn, states = dataset.__iter__(), [], []
    states.append(iterator.get_state())
    for row in iterator:
        drawn.append([p.document for p in row.pieces])
        states.append(iterator.get_state())
    assert sorted(sum(drawn, [])) == list(range(40))
    for at in (len(states) - 1, 0, 7, 3):
        iterator.set_state(states[at])
        assert [[p.document for p in row.pieces] for row in iterator] == drawn[at:], "a used iterator, set back"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 8)), min_size=1, max_size=60), st.booleans())
def test_packing_holds_each_piece_once_within_its_row(lengths, two):
    table, capacity = (np.array(lengths), (16, 8)) if two else (np.array(lengths)[:, :1], (16,))
    rows = pack(table, capacity)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    sums = np.array([table[row].sum(axis=0) for row in rows])
    assert (sums <= capacity).all()
    if not two:
        # No two rows could be one: best fit never opens a row for what another row still holds.
        smallest = np.sort(sums[:, 0])[:2]
        assert len(rows) == 1 or smallest.sum() > 16
        assert len(rows) <= max(1, 1.5 * -(-table.sum() // 16) + 1)


def test_buckets_hold_their_rows():
    group = Bucketed(((4,), (8,), (16,)), 4)
    lengths = np.random.default_rng(0).integers(1, 17, 32).tolist()
    made = [piece(length, number) for number, length in enumerate(lengths)]
    for rng in (None, np.random.default_rng(0)):
        rows = group(made, rng)
        assert sorted(row.pieces[0].document for row in rows) == list(range(32))
        for i in range(0, 32, 4):
            batch = rows[i : i + 4]
            assert len({row.lengths for row in batch}) == 1
            longest = max(row.pieces[0].lengths[0] for row in batch)
            assert batch[0].lengths[0] == min(b for b in (4, 8, 16) if b >= longest)
    assert [row.lengths for row in group(made, None)] == sorted(row.lengths for row in group(made, None))


def test_collate_gives_each_stream_its_segments():
    row = collate(
        Row([piece(2, 5, encoder=1), piece(3, 6, encoder=0), piece(1, 7, encoder=2)], (8, 4)), {"encoder_tokens": 9}
    )
    said = {name: value.tolist() for name, value in row.items() if name not in ("account", "weights")}
    assert said == {
        "tokens": [6, 6, 7, 7, 7, 8, 0, 0],
        "ids": [5, 5, 6, 6, 6, 7, -1, -1],
        "segment_ids": [1, 1, 2, 2, 2, 3, 0, 0],
        "positions": [0, 1, 0, 1, 2, 0, 0, 0],
        "encoder_tokens": [6, 8, 8, 9],
        "encoder_segment_ids": [1, 3, 3, 0],
        "encoder_positions": [0, 0, 1, 0],
    }
    with pytest.raises(DataError, match="differ in features"):
        collate(Row([piece(2), piece(2, encoder=1)], (8, 4)), {})


def test_batches_fill_up_the_last_one():
    rows = [collate(Row([piece(2, number, tokens=2)], (3,)), {"tokens": 7}) for number in range(5)]
    source = grain.MapDataset.source(rows).to_iter_dataset(INLINE)
    low, high = (list(Batches(source, 4, keep, {"tokens": 7})) for keep in (slice(0, 2), slice(2, 4)))
    assert len(low) == len(high) == 2
    assert [part[1]["ids"][:, 0].tolist() for part in (low, high)] == [[4, -1], [-1, -1]]
    last = high[1]
    assert (last["tokens"] == 7).all() and not any(last[name].any() for name in last if name not in ("tokens", "ids"))
    assert last["account"].shape == (2, len(pieces.ACCOUNT)) and last["account"].dtype == np.float64
    grain.experimental.assert_equal_output_after_checkpoint(Batches(source, 2, slice(0, 2), {}))
