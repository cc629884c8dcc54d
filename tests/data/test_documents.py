"""Documents of one group stay on one side of the split, in every run, and a record without a group is named."""

import collections
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.config import Batch, Data
from llm_jax.data.documents import documents, open_sources, split_documents, split_groups
from llm_jax.data.pipeline import Loader, check_fingerprint
from llm_jax.data.sources import open_source
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import DataError
from llm_jax.tasks import NextToken


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a cache of the test's own."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def put(records: list[dict], name: str = "a.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def split(data: Data, spec: str = "jsonl:a.jsonl") -> tuple[list[int], list[int]]:
    source = open_source(spec, data)
    return documents(source, data, "train").tolist(), documents(source, data, "heldout").tolist()


def refused(data: Data, spec: str = "jsonl:a.jsonl") -> str:
    with pytest.raises(DataError) as error:
        documents(open_source(spec, data), data, "train")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_films_of_rotten_tomatoes():
    data = Data(sources=("asset:rotten-tomatoes",), heldout=0.2, group="movie")
    (source,) = open_sources(data)
    train, heldout = (documents(source, data, side) for side in ("train", "heldout"))
    assert (len(train), len(heldout)) == (10_183, 2_625)
    films = sorted({source[i]["movie"] for i in range(len(source))})
    random.Random(0).shuffle(films)
    assert {source[int(i)]["movie"] for i in heldout} == set(films[: len(films) // 5])
    assert sorted([*train, *heldout]) == list(range(len(source)))
    assert (np.diff(train) > 0).all() and (np.diff(heldout) > 0).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.floats(0.001, 1))
def test_groups_are_never_split(values, fraction):
    distinct = sorted(set(values))
    groups = np.array([distinct.index(value) for value in values])
    if len(distinct) == 1:
        with pytest.raises(DataError, match="all documents are of one group"):
            split_groups(groups, fraction)
        return
    train, heldout = split_groups(groups, fraction)
    assert sorted([*train, *heldout]) == list(range(len(values)))
    assert not set(groups[train]) & set(groups[heldout])
    held = len(set(groups[heldout]))
    assert held == min(max(int(len(distinct) * fraction + 1e-9), 1), len(distinct) - 1)


def test_the_number_of_groups_held_out():
    for groups, fraction, held in ((508, 0.2, 101), (100, 0.29, 29), (10, 0.3, 3), (2, 0.01, 1), (2, 0.99, 1)):
        assert len(split_groups(np.arange(groups), fraction)[1]) == held, (groups, fraction)


def test_the_order_of_the_records_does_not_matter(folder):
    data = Data(heldout=0.3, group="who")
    records = [{"text": f"t{i}", "who": name} for i, name in enumerate("abcdefghij" * 3)]
    put(records)
    first = {records[i]["who"] for i in split(data)[1]}
    put(records[::-1], "b.jsonl")
    _, heldout = split(data, "jsonl:b.jsonl")
    assert {records[::-1][i]["who"] for i in heldout} == first and len(first) == 3 and len(heldout) == 9
    assert split(dataclasses.replace(data, group="")) != split(data)


def test_numbers_come_before_strings(folder):
    put([{"text": "x", "who": who} for who in (10, "2", 9, "10", 2.5, True)])
    shuffled = [True, 2.5, 9, 10, "10", "2"]
    random.Random(0).shuffle(shuffled)
    held = [json.loads(line)["who"] for line in Path("a.jsonl").read_text().splitlines()]
    assert {held[i] for i in split(Data(heldout=0.5, group="who"))[1]} == set(shuffled[:3])


def test_groups_of_a_csv_file(folder):
    Path("a.csv").write_text("text,year\n" + "".join(f"t{i},{1990 + i % 4}\n" for i in range(20)))
    train, heldout = split(Data(heldout=0.25, group="year"), "csv:a.csv")
    assert len(heldout) == 5 and len({i % 4 for i in heldout}) == 1 and len(train) == 15


def test_records_that_are_no_text_are_not_held_out(folder):
    lines = [json.dumps({"text": "x", "who": i % 2}).encode() for i in range(6)] + [b'{"text": "\xff", "who": 0}']
    Path("a.jsonl").write_bytes(b"\n".join(lines))
    for _ in range(2):  # read, then kept
        train, heldout = split(Data(heldout=0.5, group="who", invalid="skip"))
        assert 6 in train and len(heldout) == 3
    Path("b.jsonl").write_bytes(b"\n".join(lines + lines))
    assert "b.jsonl:7: not UTF-8" in refused(Data(heldout=0.5, group="who"), "jsonl:b.jsonl")


def test_the_values_are_read_once(folder, monkeypatch):
    put([{"text": "x", "who": i % 5} for i in range(20)])
    data = Data(heldout=0.2, group="who")
    before = split(data)
    reads = collections.Counter()
    source = open_source("jsonl:a.jsonl", data)
    kind = type(source)
    own = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: reads.update([index]) or own(self, index))
    assert (documents(source, data, "train").tolist(), documents(source, data, "heldout").tolist()) == before
    assert not reads
    put([{"text": "x", "who": i % 4} for i in range(20)])
    documents(open_source("jsonl:a.jsonl", data), data, "train")
    assert reads == collections.Counter(range(20)), "another content has groups of its own"


def test_a_cache_that_cannot_be_written_costs_time_only(folder, monkeypatch, caplog):
    put([{"text": "x", "who": i % 5} for i in range(20)])
    data = Data(heldout=0.2, group="who")
    before = split(data)
    (folder / "no").touch()
    monkeypatch.setenv("LLM_JAX_CACHE", str(folder / "no"))
    assert split(data) == before and "cannot write to the cache folder" in caplog.text


def test_errors(folder):
    put([{"text": "x", "who": "a"}, {"text": "y", "whom": "b"}])
    assert refused(Data(heldout=0.5, group="who")) == (
        "a.jsonl:2: no field 'who'; did you mean 'whom'? It has: id, text, whom. Set data.group"
    )
    for value, said in ((["a"], "a list"), (float("nan"), "empty")):
        put([{"text": "x", "who": "a"}, {"text": "y", "who": value}])
        assert refused(Data(heldout=0.5, group="who")) == (
            f"a.jsonl:2: 'who' is {said}: what data.group names must be a string or a number in each record"
        )
    put([{"text": "x", "who": "a"}] * 3)
    assert refused(Data(heldout=0.5, group="who")) == (
        "jsonl:a.jsonl: all documents are of one group, of which nothing can be held out"
    )


def test_what_is_of_no_group_is_not_held_out(folder):
    put([{"text": "x", "who": f"{i % 4}"} for i in range(8)] + [{"text": "y", "who": None}])
    train, heldout = split(Data(heldout=0.5, group="who"))
    assert 8 in train and len(heldout) == 4
    put([{"text": "y", "who": None}] * 3)
    train, heldout = split(Data(heldout=0.5, group="who"))
    assert list(train) == [0, 1, 2] and not len(heldout)


def test_no_group_is_read_where_nothing_is_split(folder):
    put([{"text": "x"}] * 3)
    for data in (Data(heldout=0.0, group="who"), Data(heldout=0.5, heldout_sources=("b",), group="who")):
        assert len(documents(open_source("jsonl:a.jsonl", data), data, "train")) == 3


def test_a_split_by_document_is_what_it_was():
    assert [part.tolist() for part in split_documents(5, 0.2)] == [[0, 1, 3, 4], [2]]
    assert split_documents(30, 0.25)[1].tolist() == sorted(_shuffled(30)[:8])  # round(7.5), not 7


def _shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


def test_the_loader_reads_whole_groups_and_says_so(folder):
    put([{"text": f"text {i}", "who": f"w{i % 8}"} for i in range(64)])
    tokenizer = load_tokenizer("bpe:300", ["text 0 1 2 3"])

    def read(side: str, group: str) -> tuple[set[int], dict]:
        data = Data(sources=("jsonl:a.jsonl",), heldout=0.25, group=group, pack=False, window=8)
        with Loader(open_sources(data, side), tokenizer, NextToken(), data, Batch(4, 16), 0, side) as loader:
            rows = [next(loader) for _ in range(4 if side == "heldout" else 40)]
            ids = {int(i) for row in rows for i in np.unique(row.ids)} - {-1}
            return ids, json.loads(json.dumps(loader.fingerprint()))

    (heldout, _), (train, saved) = read("heldout", "who"), read("train", "who")
    assert len(heldout) == 16 and len(train) == 48 and not {i % 8 for i in heldout} & {i % 8 for i in train}
    _, now = read("train", "")
    with pytest.raises(DataError, match="data.group was who, now "):
        check_fingerprint(saved, now)
