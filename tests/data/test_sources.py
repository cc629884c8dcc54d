"""Records by index from every kind of source, and each message a user sees when a file is wrong."""

import concurrent.futures
import csv
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.config import Data
from llm_jax.data import files, tables
from llm_jax.data.sources import field, open_source
from llm_jax.data.tfds_builder import build_tfds
from llm_jax.errors import DataError

SKIP = Data(invalid="skip")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder, and a cache and a TFDS folder of the test's own."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def put(name: str, content: str | bytes):
    path = os.path.abspath(name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def message(call) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(spec: str, data: Data = SKIP) -> str:
    return message(lambda: open_source(spec, data))


def every(source) -> list[dict]:
    return [source[i] for i in range(len(source))]


# --- specs


def test_scheme():
    assert refused("txt:a") == "unknown scheme 'txt' of source 'txt:a'; did you mean 'text'?"
    assert refused("zip:a").endswith("known: asset, csv, jsonl, parquet, text, tfds")
    assert refused("a/b.jsonl").startswith("source 'a/b.jsonl' has no scheme: say jsonl:a/b.jsonl, or one of text, ")
    for suffix in ("csv", "tsv"):
        assert f"has no scheme: say csv:a/*.{suffix}, or one of text, " in refused(f"a/*.{suffix}")
    assert refused("a/b") == (
        "source 'a/b' has no scheme: say text:a/b, or one of text, jsonl, csv, parquet, tfds, asset"
    )
    assert refused("asset:sotuu") == "unknown asset 'sotuu'; did you mean 'sotu'?"
    assert refused("text:") == "source 'text:' names no file: say text:PATH or text:FOLDER/**"


def test_no_file_matches():
    put("books/hamlet.txt", "x")
    assert refused("text:books/hamlt.txt").endswith("no file matches; did you mean books/hamlet.txt?")
    assert refused("text:bokos/*.txt").endswith("no file matches; did you mean books?")
    assert refused("text:books/*.md").endswith("no file matches; books holds hamlet.txt")
    assert refused("text:books").endswith("no file matches; books is a folder: say books/** for all files below it")
    assert refused(f"text:{os.getcwd()}/boks/x").endswith(f"no file matches; did you mean {os.getcwd()}/books?")
    os.mkdir("none")
    assert refused("jsonl:none/*").endswith("no file matches; none is empty")


# --- text


def test_text_files_are_sorted_and_found_at_any_depth():
    put("b.txt", "two\r\n")
    put("a.txt", "one ü")
    put("c/d/e.txt", files.BOM + b"three")
    put("c/note.md", "no")
    source = open_source("text:**/*.txt", Data(text="body"))
    assert every(source) == [
        {"id": "a.txt", "body": "one ü"},
        {"id": "b.txt", "body": "two\r\n"},
        {"id": "c/d/e.txt", "body": "three"},
    ]
    assert source.spec == "text:**/*.txt"
    with pytest.raises(IndexError):
        source[3]


def test_a_name_with_brackets_is_taken_literally():
    put("a[1].txt", "x")
    assert open_source("text:a[1].txt", Data())[0]["text"] == "x"


def test_empty_file():
    put("a.txt", "x")
    put("b.txt", "")
    assert refused("text:*.txt") == "b.txt: the file is empty: remove it, or narrow 'text:*.txt'"
    put("b.jsonl", "")
    assert refused("jsonl:b.jsonl").startswith("b.jsonl: the file is empty")


@pytest.mark.parametrize("mark", [b"", files.BOM])
def test_text_that_is_not_utf8(mark):
    put("a.txt", mark + b"caf\xe9")
    source = open_source("text:a.txt", Data())
    assert message(lambda: source[0]) == (
        f"a.txt: not UTF-8 at byte {len(mark) + 3} (0xe9): convert it, or set data.invalid to skip"
    )
    assert open_source("text:a.txt", SKIP)[0] == {"id": "a.txt", "invalid": True}


# --- jsonl


def test_jsonl_lines():
    put("b.jsonl", files.BOM + b'{"text": "one"}\r\n\n   \n{"text": "two", "id": 0, "n": 3}\n\n')
    put("c.jsonl", '{"text": "\u2028three\\n", "id": "x"}')
    source = open_source("jsonl:*.jsonl", Data())
    assert every(source) == [
        {"text": "one", "id": "b.jsonl:1"},
        {"text": "two", "id": "0", "n": 3},
        {"text": "\u2028three\n", "id": "x"},
    ]
    assert every(open_source("jsonl:*.jsonl", Data())) == every(source)  # from the kept index


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(), st.integers(0, 2)), min_size=1, max_size=20))
def test_jsonl_gives_what_was_written(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=bool(blanks)) + "\n" * (1 + blanks) for text, blanks in records]
    path.write_text("".join(lines), encoding="utf-8")
    source = open_source(f"jsonl:{path}", Data())
    assert [record["text"] for record in every(source)] == [text for text, _ in records]


def test_jsonl_bad_lines():
    put(
        "a.jsonl",
        b'{"text": "ok"}\n{"text": 1\n[1]\n"x"\n{"text": "\xff"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n',
    )
    source, skipping = open_source("jsonl:a.jsonl", Data()), open_source("jsonl:a.jsonl", SKIP)
    for s in (source, skipping):
        assert message(lambda s=s: s[1]).startswith("a.jsonl:2: not JSON: Expecting ',' delimiter: line 1 column 11")
        assert message(lambda s=s: s[2]) == 'a.jsonl:3: a JSON list, not an object such as {"text": "..."}'
        assert message(lambda s=s: s[3]).startswith("a.jsonl:4: a JSON str, not an object")
    assert message(lambda: source[4]).startswith("a.jsonl:5: not UTF-8 at byte 44 (0xff): convert it")
    assert message(lambda: source[5]) == (
        "a.jsonl:6: not text: half of a surrogate pair (\\ud83d): mend the line, or set data.invalid to skip"
    )
    assert [skipping[i] for i in (4, 5)] == [{"id": f"a.jsonl:{n}", "invalid": True} for n in (5, 6)]
    assert source[6]["text"] == "😀"
    with open("a.jsonl", "rb") as file:
        assert file.read()[44] == 0xFF


def test_jsonl_of_blank_lines():
    put("a.jsonl", "\n \n")
    assert refused("jsonl:a.jsonl") == "a.jsonl: no records: every line is blank"


# --- csv


def test_csv_rows():
    put("a.csv", files.BOM + b'\r\ntext,label,id\r\none,1,\r\n\n   \n"two, ""quoted""\nand a\r\nnewline",,7\n\n,0,x')
    put("b.csv", "n,text\n3,drei ü\n")
    source = open_source("csv:*.csv", Data())
    assert every(source) == [
        {"text": "one", "label": "1", "id": "a.csv:3"},
        {"text": 'two, "quoted"\nand a\r\nnewline', "label": "", "id": "7"},
        {"text": "", "label": "0", "id": "x"},
        {"n": "3", "text": "drei ü", "id": "b.csv:2"},
    ]
    assert every(open_source("csv:*.csv", Data())) == every(source)  # from the kept index
    with pytest.raises(IndexError):
        source[4]


def test_csv_numbers_are_those_of_the_first_line_of_a_row():
    put("a.csv", 'text\n"a\n\nb"\n\nc\n""\n')
    assert every(open_source("csv:a.csv", Data())) == [
        {"text": "a\n\nb", "id": "a.csv:2"},
        {"text": "c", "id": "a.csv:6"},
        {"text": "", "id": "a.csv:7"},
    ]


def test_tsv_is_separated_by_tabulators():
    put("a.tsv", 'text\tlabel\none, two\t1\n"a\tb"\t2\n\t\n')
    source = open_source("csv:a.tsv", Data())
    assert [(r["text"], r["label"]) for r in every(source)] == [("one, two", "1"), ("a\tb", "2"), ("", "")]


def test_csv_fields_longer_than_the_csv_module_takes():
    put("a.csv", "text,n\n" + "long " * 100_000 + ',1\n"' + "l\n" * 100_000 + '",2\n')
    assert [len(record["text"]) for record in every(open_source("csv:a.csv", Data()))] == [500_000, 200_000]


CELLS = st.text(st.characters(codec="utf-8") | st.sampled_from('",\t\r\n \u2028\x00\ufeff'))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=20),
    st.sampled_from([",", "\t"]),
    # Before Python 3.13 the writer leaves a carriage return bare that is no part of its newline.
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.booleans(),
)
def test_csv_gives_what_was_written(tmp_path_factory, rows, delimiter, style, mark):
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if delimiter == "\t" else "a.csv")
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=style[0], quoting=style[1])
        writer.writerows([("text", "label"), *rows])
    source = open_source(f"csv:{path}", Data())
    found = every(source)
    assert [(record["text"], record["label"]) for record in found] == rows
    assert [source[i] for i in reversed(range(len(rows)))] == found[::-1]
    lines = path.read_bytes().split(b"\n")
    for record, (text, _) in zip(found, rows):
        line = lines[int(record["id"].rpartition(":")[2]) - 1]
        first = text.encode().replace(b'"', b'""').split(b"\n")[0]
        assert line.removeprefix(b'"').startswith(first)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n1,2,3\n", "3: 3 fields, but the header has 2: quote a field that holds ',' or a newline"),
        ('a,b\n"1\n2",2\n\n1\n', "5: 1 fields, but the header has 2: quote a field that holds ',' or a newline"),
        ('a,b\n1,2\n1,"2\n3,4\n', "3: a quoted field that begins here is never closed"),
        ('a,b\n"1" x,2\n', "2: text after a closing quote: quote each field that begins with a quote, "),
        ("a,b\r1,2\r", "1: a carriage return without a newline: end lines with \\n or \\r\\n, "),
        ("a,b,a\n1,2,3\n", "1: two columns are named 'a': rename one"),
        ("\n,text\n0,x\n", "2: column 1 of the header has no name: give it one, or leave it out"),
        ("a, \n1,2\n", "1: column 2 of the header has no name: give it one, or leave it out"),
        (b"a,caf\xe9\n1,2\n", "1: the header is not UTF-8 at byte 5: convert it"),
        ("a,b\n\n", " no records: there is no row below a header"),
        ("\n \n", " no records: there is no row below a header"),
        ("", " the file is empty: remove it, or narrow 'csv:a.csv'"),
    ],
)
def test_csv_errors(content, said):
    put("a.csv", content)
    os.utime("a.csv", (1, 1))  # old enough for its index to be kept: it must be refused each time
    for _ in range(2):
        assert refused("csv:a.csv").startswith(f"a.csv:{said}")


def test_csv_that_is_not_utf8():
    put("a.csv", b'text,n\n"caf\xe9\n",1\nok,2\n')
    source = open_source("csv:a.csv", Data())
    assert message(lambda: source[0]) == (
        "a.csv:2: not UTF-8 at byte 11 (0xe9): convert it, or set data.invalid to skip"
    )
    assert every(open_source("csv:a.csv", SKIP)) == [
        {"id": "a.csv:2", "invalid": True},
        {"text": "ok", "n": "2", "id": "a.csv:4"},
    ]


def test_missing_field():
    record = {"id": "a.jsonl:1", "body": "x", "label": 1}
    assert field(record, "body") == "x"
    assert message(lambda: field(record, "bdy", "data.text")) == (
        "a.jsonl:1: no field 'bdy'; did you mean 'body'? It has: body, id, label. Set data.text"
    )
    assert message(lambda: field(record, "text")) == "a.jsonl:1: no field 'text'. It has: body, id, label"


# --- parquet


def put_parquet(name: str, table: dict, group: int = 1000):
    pyarrow.parquet.write_table(pyarrow.table(table), name, row_group_size=group)


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_parquet_rows_in_any_order(monkeypatch, budget):
    monkeypatch.setattr(tables, "ROW_GROUP_CACHE", budget)
    put_parquet("a.parquet", {"text": [f"t{i}" for i in range(25)], "n": list(range(25))}, group=10)
    put_parquet("b.parquet", {"text": ["ü", None], "n": [25, 26], "tags": [["x", "y"], []]})
    source = open_source("parquet:*.parquet", Data())
    assert len(source) == 27
    for i in np.random.default_rng(0).permutation(25):
        assert source[int(i)] == {"text": f"t{i}", "n": i, "id": f"a.parquet:{i}"}
    assert source[25] == {"text": "ü", "n": 25, "tags": ["x", "y"], "id": "b.parquet:0"}
    assert source[26] == {"text": None, "n": 26, "tags": [], "id": "b.parquet:1"}


def test_parquet_errors():
    put("a.parquet", "text")
    assert refused("parquet:a.parquet").startswith("a.parquet: not a parquet file: ")
    put_parquet("b.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert refused("parquet:b.parquet") == "b.parquet: no records: the table has no rows"
    bad = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())  # writers do not check
    put_parquet("c.parquet", {"text": bad})
    source = open_source("parquet:c.parquet", Data())
    assert source[0]["text"] == "fine"
    assert message(lambda: source[1]).startswith("c.parquet:1, field 'text': not UTF-8 at byte 3 (0xe9): convert it")
    assert open_source("parquet:c.parquet", SKIP)[1] == {"id": "c.parquet:1", "invalid": True}


# --- TFDS


def letters(count: int) -> list[dict]:
    return [{"text": f"ü{i}", "n": i, "score": i / 2, "tags": ["a", "b"]} for i in range(count)]


def test_tfds_keeps_every_record_in_order():
    records = letters(229)
    assert build_tfds("my_letters", {"train": iter(records), "test": records[:7]}) == {"train": 229, "test": 7}
    source = open_source("tfds:my_letters", Data())
    assert every(source) == [{**record, "id": f"my_letters:{i}"} for i, record in enumerate(records)]
    assert [r["n"] for r in every(open_source("tfds:my_letters:train[10:15]", Data()))] == [10, 11, 12, 13, 14]
    assert len(open_source("tfds:my_letters:1.0.0:test", Data())) == 7
    parts = {
        open_source(f"tfds:my_letters:{s}", Data()).fingerprint for s in ("train", "test", "train[:9]", "train[1:9]")
    }
    assert len(parts) == 4
    assert refused("tfds:my_letters:tset") == "source 'tfds:my_letters:tset': no split 'tset'; did you mean 'test'?"
    assert refused("tfds:my_leters").endswith("or in TFDS itself; did you mean 'my_letters'?")
    assert "tensorflow" not in sys.modules


def test_tfds_from_a_source_with_bad_bytes():
    build_tfds("raw", {"train": [{"text": b"ok", "m": np.arange(3)}, {"text": b"ab\xff", "m": np.arange(1)}]})
    source = open_source("tfds:raw", Data())
    assert source[0]["text"] == "ok" and source[0]["m"].tolist() == [0, 1, 2]
    assert message(lambda: source[1]).startswith("raw:1, field 'text': not UTF-8 at byte 2 (0xff)")
    assert open_source("tfds:raw", SKIP)[1] == {"id": "raw:1", "invalid": True}
    put("a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    build_tfds("from_jsonl", {"train": open_source("jsonl:a.jsonl", Data())})
    assert [r["id"] for r in every(open_source("tfds:from_jsonl", Data()))] == ["a.jsonl:1", "a.jsonl:2"]


def test_tfds_builder_errors():
    def built(name="other", **splits):
        return message(lambda: build_tfds(name, splits))

    assert built("Other", train=[]).startswith("'Other' is no name of a TFDS data set: lower case, digits")
    assert built(train=[]) == "tfds:other: split 'train' has no records"
    assert built() == "tfds:other: no split: give e.g. {'train': records}"
    assert built(train=[{"text": "a"}, {"txt": "b"}]).endswith(
        "record 1 of train has no field 'text'; did you mean 'txt'?"
    )
    assert built(train=[{"a": "x"}, {"a": "x", "b": 1}]).endswith(
        "record 1 of train has a field 'b' that the data set does not have"
    )
    assert "invalid literal for int()" in built(train=[{"n": 1}, {"n": "one"}])
    assert built(train=[{"n": None}]).startswith("field 'n': no feature known for None: give features=")
    build_tfds("other", {"train": letters(3)})
    assert "version 1.0.0 exists already in" in built(train=letters(4))
    build_tfds("other", {"train": letters(4)}, version="1.1.0")
    assert len(open_source("tfds:other", Data())) == 4


def test_tfds_that_cannot_be_prepared():
    import tensorflow_datasets as tfds

    class OutOfReach(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            raise ConnectionError("no route\nto host")

        def _generate_examples(self):
            return iter(())

    said = refused("tfds:out_of_reach")
    assert (
        "is not prepared, and preparing it failed (ConnectionError: no route). Prepare it where there is a network: "
        in said
    )
    assert "tfds.builder('out_of_reach', file_format='array_record').download_and_prepare()" in said
    assert said.endswith("name that folder's parent in TFDS_DATA_DIR")
    assert refused("tfds:").startswith("source 'tfds:': say tfds:NAME, ")


# --- what holds for all


@pytest.fixture(params=["text", "jsonl", "csv", "parquet", "tfds"])
def source(request):
    if request.param == "text":
        for i in range(40):
            put(f"t/{i:02}.txt", f"text {i}")
        return open_source("text:t/*", Data())
    if request.param == "jsonl":
        for part in range(2):
            put(f"{part}.jsonl", "".join(json.dumps({"text": f"text {part} {i}"}) + "\n" for i in range(20)))
        return open_source("jsonl:*.jsonl", Data())
    if request.param == "csv":
        for part in range(2):
            put(f"{part}.csv", "text\n" + "".join(f'"text\n{part} {i}"\n' for i in range(20)))
        return open_source("csv:*.csv", Data())
    if request.param == "parquet":
        put_parquet("a.parquet", {"text": [f"text {i}" for i in range(40)]}, group=7)
        return open_source("parquet:a.parquet", Data())
    build_tfds("many", {"train": letters(40)})
    return open_source("tfds:many", Data())


def test_pickled_used_or_not_it_reads_the_same(source):
    fresh = pickle.loads(pickle.dumps(source))
    records = every(source)
    assert len(records) == 40 and len({record["id"] for record in records}) == 40
    assert every(fresh) == records == every(pickle.loads(pickle.dumps(source)))
    assert fresh.fingerprint == source.fingerprint and fresh.spec == source.spec


def test_threads_read_the_same(source):
    order = [int(i) for i in np.random.default_rng(0).integers(0, 40, 400)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.__getitem__, order))
    records = every(source)
    assert found == [records[i] for i in order]


def test_fingerprint_is_of_names_and_contents_wherever_they_lie(folder):
    put("a/x.txt", "one")
    put("a/y.txt", "two")
    before = open_source("text:a/*", Data()).fingerprint
    assert len(before) == 64
    shutil.copytree("a", folder.parent / "elsewhere")
    assert open_source(f"text:{folder.parent}/elsewhere/*", Data()).fingerprint == before
    put("a/y.txt", "owt")  # same size, at once
    assert open_source("text:a/*", Data()).fingerprint != before
    put("a/y.txt", "two")
    os.rename("a/y.txt", "a/z.txt")
    assert open_source("text:a/*", Data()).fingerprint != before
    os.rename("a/z.txt", "a/y.txt")
    assert open_source("text:a/*", Data()).fingerprint == before


def test_fingerprint_and_index_are_kept_for_files_that_stay(folder):
    put("a.jsonl", '{"text": "one"}\n')
    os.utime("a.jsonl", (1, 1))
    first = open_source("jsonl:a.jsonl", Data()).fingerprint
    kept = list((folder.parent / "cache" / "fingerprint").iterdir())
    assert [path.read_text() for path in kept] == [first]
    assert len(list((folder.parent / "cache" / "lines").iterdir())) == 1
    assert open_source("jsonl:a.jsonl", Data()).fingerprint == first
    put("a.jsonl", '{"text": "two"}\n')
    assert open_source("jsonl:a.jsonl", Data()).fingerprint != first


def test_a_cache_that_cannot_be_written_costs_time_only(folder, monkeypatch, caplog):
    put("no", "a file where the cache folder should be")
    monkeypatch.setenv("LLM_JAX_CACHE", str(folder / "no"))
    put("a.jsonl", '{"text": "one"}\n')
    os.utime("a.jsonl", (1, 1))
    source = open_source("jsonl:a.jsonl", Data())
    assert source[0]["text"] == "one" and len(source.fingerprint) == 64
    assert "cannot write to the cache folder" in caplog.text


# --- conditions


def test_the_records_of_a_field(folder):
    rows = [{"text": f"t{i}", "date": f"{1789 + i}-03-04", "stars": i / 2} for i in range(6)]
    put("a.jsonl", "\n".join(map(json.dumps, rows)))

    def found(condition: str) -> list[str]:
        return [record["text"] for record in every(open_source(f"jsonl:a.jsonl#{condition}", Data()))]

    assert found("date=1790..1791") == ["t1", "t2"]
    assert found("date=..1790-03-03") == ["t0"]
    assert found("date=1793..") == ["t4", "t5"]
    assert found("stars=0.5..1") == ["t1", "t2"]
    assert found("text=t0,t5") == ["t0", "t5"]
    whole, part = open_source("jsonl:a.jsonl", Data()), open_source("jsonl:a.jsonl#stars=1..", Data())
    assert part.spec == "jsonl:a.jsonl#stars=1.." and part.fingerprint != whole.fingerprint
    assert part[-1] == whole[5] and pickle.loads(pickle.dumps(part))[0] == part[0]
    with pytest.raises(IndexError):
        part[4]


def test_what_has_no_value_is_in_no_range(folder):
    rows = [{"text": f"t{i}", "date": date} for i, date in enumerate((None, "", "1790-01-08", "None"))]
    put("a.jsonl", "\n".join(map(json.dumps, rows)))

    def found(condition: str) -> list[str]:
        return [record["text"] for record in every(open_source(f"jsonl:a.jsonl#{condition}", Data()))]

    assert found("date=1946..") == ["t3"]  # as text, N is above 1
    assert found("date=..1945") == ["t2"]
    assert found("date=None") == ["t3"]
    assert found("date=1790-01-08,") == ["t1", "t2"]  # an empty text can be asked for


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("dat=1790..", "has no field 'dat'; did you mean 'date'?"),
        ("date=1999..", "none of the 2 records is such"),
        ("stars=few..many", "'stars' of a.jsonl:1 is a number, the bounds are not"),
    ],
)
def test_conditions_that_cannot_be(folder, condition: str, said: str):
    put("a.jsonl", '{"text": "x", "date": "1790", "stars": 1}\n{"text": "y", "date": "1791", "stars": 2}')
    assert said in refused(f"jsonl:a.jsonl#{condition}")
