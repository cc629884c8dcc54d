"""Paths in a bucket, over the protocol of S3 to a server on this machine: sources, runs, checkpoints, exports, and what a user gets wrong."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import llm_jax
from llm_jax import checkpoint, cli, config, log, loop, storage
from llm_jax.card import content_hash
from llm_jax.config import Checkpoint, Data
from llm_jax.data.sources import open_source
from llm_jax.data.teacher_cache import Header, TeacherCache, write_cache
from llm_jax.errors import CheckpointError, DataError
from llm_jax.interop import huggingface
from llm_jax.model import Model
from llm_jax.models import presets, transformer

URL = "s3://bucket"
CONFIG = """
import os
import signal
import time
from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.storage import as_path
from llm_jax.tasks import NextToken
from llm_jax.transforms import Transform

seen = [0]


def rows(batch, fingerprint):
    seen[0] += 1
    if seen[0] == int(os.environ.get("TEST_KILLED_AT", "0")):
        while not as_path("{root}/run/checkpoints/4/commit_success.txt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return dict(batch)


def get_config():
    return Run(
        name="run",
        workdir="{root}/run",
        model=ModelConfig(vocab_size=512, max_length=32, layers=1, dim=16, heads=2, dropout=0.1),
        transforms=(Transform(rows=rows, label="rows"),),
        task=NextToken(),
        data=Data(sources=("text:{root}/corpus/**/*.txt", "jsonl:{root}/more.jsonl"), tokenizer="bpe:512", heldout=0.2),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="constant"),
        batch=Batch(size=8, length=32),
        mesh=Mesh(data=2, fsdp=4),
        checkpoint=Checkpoint(every=4, keep=2),
        eval=Eval(every=6, batches=2),
        steps=12,
    )
"""


@pytest.fixture(scope="module")
def bucket(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """An empty bucket of a server of this process; the variables by which it is found are set for processes that tests start too."""
    server = pytest.importorskip("moto.server", reason="needs moto, flask and s3fs of the extra 'dev'")
    pytest.importorskip("s3fs", reason="needs moto, flask and s3fs of the extra 'dev'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "LLM_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        _forget_connections()
        storage.file_system("s3").mkdir("bucket")
        yield storage.as_path(URL)
        running.stop()
        _forget_connections()


@pytest.fixture(scope="module")
def places(bucket, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same data and config in a local folder and in the bucket."""
    local = tmp_path_factory.mktemp("local")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))]
    table = pyarrow.table({"text": texts[:6], "number": list(range(6))})
    for root in (local, bucket / "data"):
        (root / "corpus" / "old").mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            (root / "corpus" / ("old" if number < 9 else "") / f"{number:02d}.txt").write_text(text, encoding="utf-8")
        lines = [json.dumps({"text": text[:600]}) for text in texts]
        (root / "more.jsonl").write_text("\n\n".join(lines) + "\n \n", encoding="utf-8")
        (root / "rows.csv").write_text('text,label\n"one, Ä\ntwo",a\n\nthree,b\n', encoding="utf-8")
        with (root / "rows.parquet").open("wb") as file:
            pyarrow.parquet.write_table(table, file, row_group_size=2)
        (root / "config.py").write_text(CONFIG.format(root=root), encoding="utf-8")
    return str(local), str(bucket / "data")


def test_a_path_is_as_on_a_disk(bucket, tmp_path: Path):
    for root in (tmp_path / "a", bucket / "a"):
        root.mkdir(parents=True, exist_ok=True)
        (root / "b" / "c").mkdir(parents=True, exist_ok=True)
        (root / "b" / "c" / "x.txt").write_text("ä", encoding="utf-8")
        with (root / "y.txt").open("w", encoding="utf-8") as file:
            file.write("zwölf")
        assert root.is_dir() and not root.is_file() and (root / "y.txt").is_file() and not (root / "y.txt").is_dir()
        assert not (root / "n").exists() and (root / "b").exists() and (root / "y.txt").stat().st_size == 6
        assert sorted(path.name for path in root.iterdir()) == ["b", "y.txt"]
        (root / "b").rename(root / "d")
        assert not (root / "b").exists() and (root / "d" / "c" / "x.txt").read_text(encoding="utf-8") == "ä"
        assert [path.name for path in root.glob("*.txt")] == ["y.txt"]
        with pytest.raises(FileNotFoundError):
            (root / "n").read_bytes()
        with storage.at_hand(root / "y.txt") as name:
            assert Path(name).read_bytes() == "zwölf".encode()
        storage.remove_tree(root)
        assert not root.exists()
    assert isinstance(storage.as_path("runs/x"), Path) and storage.as_path(bucket / "a").absolute() == bucket / "a"


@pytest.mark.parametrize(
    "spec", ["text:{}/corpus/**/*.txt", "jsonl:{}/more.jsonl", "csv:{}/rows.csv", "parquet:{}/*.parquet"]
)
def test_sources_hold_what_they_hold_on_a_disk(spec: str, places: tuple[str, str]):
    here, there = (open_source(spec.format(root), Data()) for root in places)
    assert len(here) == len(there) > 1 and here.fingerprint == there.fingerprint
    for index in range(len(here)):
        one, other = here[index], there[index]
        assert other.pop("id") == one.pop("id").replace(places[0], places[1])
        assert one == other


def test_a_changed_file_in_a_bucket_is_another(bucket):
    (bucket / "one.jsonl").write_text('{"text": "a"}\n')
    before = open_source(f"jsonl:{URL}/one.jsonl", Data())
    first = before.fingerprint
    (bucket / "one.jsonl").write_text('{"text": "b"}\n')
    after = open_source(f"jsonl:{URL}/one.jsonl", Data())
    assert after.fingerprint != first and after[0]["text"] == "b"


def _forget_connections() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    storage.file_system.cache_clear()


def _entries(folder: storage.Path) -> list[dict]:
    times = ("seconds", "input_wait", "tokens_per_second", "mfu")
    lines = log.read(folder / "metrics.jsonl")
    # figures by source bear its name, which is a path
    return [{k.replace(str(folder.parent), ""): v for k, v in x.items() if k not in times} for x in lines]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on_as_one_on_a_disk(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Config, data and workdir in the bucket: killed after step 7, when step 4 is saved, and the same losses and weights as the local run's."""
    local, remote = places
    killed = subprocess.run(
        [sys.executable, "-m", "llm_jax", "train", f"--config={remote}/config.py"],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "8",
            "TEST_KILLED_AT": "8",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    folder = storage.as_path(f"{remote}/run")
    assert checkpoint.steps(folder) == [4] and not (folder / "result.json").exists()
    (folder / "checkpoints" / "11" / "params" / "d" / "cut").write_bytes(
        b"short"
    )  # what a save that was cut short leaves
    monkeypatch.chdir(tmp_path)
    result = loop.train(config.load(f"{remote}/config.py"))
    loop.train(config.load(f"{local}/config.py"))
    assert result["steps_this_time"] == 8 and result["paths"]["checkpoint"] == f"{remote}/run/checkpoints/12"
    assert _entries(folder) == _entries(Path(local) / "run")
    assert checkpoint.read_card(folder)["hashes"] == checkpoint.read_card(Path(local) / "run")["hashes"]
    assert checkpoint.steps(folder) == [8, 12]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["12", "8"]
    names = {"card.json", "config.json", "curves.png", "metrics.jsonl", "result.json", "tensorboard", "tokenizer.json"}
    assert names < {path.name for path in folder.iterdir()}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sum(len(path.read_bytes()) for path in (folder / "tensorboard").iterdir()) > 1000
    assert not list(tmp_path.iterdir())
    kept = {path.parent.name for path in Path(os.environ["LLM_JAX_CACHE"]).rglob("*") if path.is_file()}
    assert kept <= {
        "fingerprint",
        "lines",
        "rows",
        "compiled",
    }  # of the data its fingerprints and where its lines begin

    model = llm_jax.load(folder)
    assert content_hash(model.params) == checkpoint.read_card(folder)["hashes"]["params"]
    llm_jax.save(model, f"{URL}/kept")
    assert content_hash(llm_jax.load(f"{URL}/kept").params) == content_hash(model.params)
    with pytest.raises(CheckpointError, match="exists already"):
        llm_jax.save(model, f"{URL}/kept")


def test_checkpoints_are_complete_or_absent(bucket):
    """What lacks its last file is not there and is removed; a damaged one is set aside once an older one was read."""
    saved = checkpoint.Checkpoints(bucket / "saves", Checkpoint(keep=3))
    params = {"w": jnp.arange(8.0)}
    for step in (1, 2, 3):
        saved.save(step, params, {"n": jnp.int32(step)}, [], {"name": "x"}, None)
        saved.wait()
    assert checkpoint.steps(bucket / "saves") == [1, 2, 3]
    (saved.root / "3" / "commit_success.txt").unlink()
    assert checkpoint.steps(bucket / "saves") == [1, 2] and checkpoint.find(bucket / "saves") == saved.root / "2"
    for path in (saved.root / "2" / "params").glob("**"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    again = checkpoint.Checkpoints(bucket / "saves", Checkpoint(keep=3))
    assert sorted(path.name for path in again.root.iterdir()) == ["1", "2"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = [checkpoint.abstract_like(x, jax.tree.map(lambda _: place, x)) for x in (params, {"n": jnp.int32(0)})]
    found = again.restore(*wanted)
    assert found is not None and int(found.state["n"]) == 1
    assert checkpoint.steps(bucket / "saves") == [1]
    assert sorted(path.name for path in again.root.iterdir()) == ["1", "2.damaged"]


def test_models_of_elsewhere(bucket, tokenizer):
    sizes = presets.llama(vocab_size=512, max_length=32, layers=2, dim=16, heads=2, mlp_dim=32)
    model = Model(sizes, transformer.init(sizes, jax.random.key(0)), tokenizer)
    huggingface.save(model, f"{URL}/exported", shard_size=3000)  # several files and their index
    assert len(list((bucket / "exported").glob("*.safetensors"))) > 1
    again = llm_jax.load(f"{URL}/exported")
    assert content_hash(again.params) == content_hash(model.params)
    assert again.tokenizer is not None and again.tokenizer.definition == tokenizer.definition


def test_a_cache_of_a_teacher(bucket):
    batch = {"tokens": np.arange(6).reshape(2, 3), "weights": np.ones((2, 3))}
    rows = np.zeros((2, 3, 1), np.int32), np.full((2, 3, 2), -0.7)
    header = write_cache(bucket / "cache", Header("t", "d", 1, 1.0), [(batch, *rows)])
    assert header.rows == 2 and TeacherCache(f"{URL}/cache").add(batch)["teacher_ids"].shape == (2, 3, 1)


def test_a_growing_file_is_put_seldom_and_whole(bucket, monkeypatch: pytest.MonkeyPatch):
    file = storage.Growing(bucket / "grown", b"a")
    file.write(b"b")
    file.flush()
    assert not (bucket / "grown").exists()
    file.sync()
    assert (bucket / "grown").read_bytes() == b"ab"
    file.write(b"c")
    monkeypatch.setattr(file, "_due", 0.0)
    file.flush()
    assert (bucket / "grown").read_bytes() == b"abc"
    file.write(b"d")
    file.close()
    assert (bucket / "grown").read_bytes() == b"abcd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config={}/cnofig.py"], "error: no config file {}/cnofig.py; did you mean {}/config.py?"),
        (["--config=az://x/config.py"], "az:// is not read: name a local path, or one of gs:// and s3://"),
        (["--config={}/config.py", "--config.workdir=s3://nobody/x"], "there is no bucket s3://nobody: make it first"),
        (["--config={}/config.py", "--config.data.sources", "text:{}/corpsu/*"], "did you mean {}/corpus?"),
        (["--config={}/config.py", "--config.data.sources", "text:s3://nobody/*"], "; there is no s3://nobody"),
    ],
)
def test_one_line_for_what_is_not_there(arguments, message, places, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", *(word.replace("{}", places[1]) for word in arguments)]) == 2
    assert message.replace("{}", places[1]) in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_store_that_does_not_answer_is_no_empty_one(bucket, monkeypatch: pytest.MonkeyPatch):
    """So that no checkpoint is taken for damaged or absent because a connection was lost."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    _forget_connections()
    for asked in (bucket.exists, bucket.is_file, bucket.is_dir, lambda: checkpoint.steps(bucket / "saves")):
        with pytest.raises(storage.StorageError, match="Could not connect"):
            asked()
    with pytest.raises(storage.StorageError, match="Could not connect"):
        open_source(f"text:{URL}/*.txt", Data())
    _forget_connections()


@pytest.mark.parametrize(
    ("url", "said"),
    [("s3://b/x", "s3fs: pip install 'llm_jax[s3]'"), ("gs://b/x", "gcsfs: pip install 'llm_jax[gcs]'")],
)
def test_a_missing_package_is_named(url: str, said: str, monkeypatch: pytest.MonkeyPatch):
    storage.file_system.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(storage.StorageError, match=f"needs the package {said}".replace("[", r"\[")):
        storage.as_path(url).exists()
    with pytest.raises((storage.StorageError, DataError), match="needs the package"):
        open_source(f"text:{url}", Data())


GOOGLE = """
import os, sys
import jax, jax.numpy as jnp
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
from llm_jax import checkpoint, storage
from llm_jax.config import Checkpoint, Data
from llm_jax.data.sources import open_source
root = storage.as_path("gs://bucket/run")
root.mkdir(parents=True, exist_ok=True)
(root / "a" / "x.txt").write_text("hello")
source = open_source("text:gs://bucket/**/*.txt", Data())
assert [source[i]["text"] for i in range(len(source))] == ["hello"] and len(source.fingerprint) == 64
(root / "a").rename(root / "b")
assert [path.name for path in root.iterdir()] == ["b"]
saved = checkpoint.Checkpoints(root, Checkpoint(keep=1))
params, state = {"w": jnp.arange(8.0)}, {"n": jnp.int32(2)}
for step in (1, 2):
    saved.save(step, params, state, [], {"name": "x"}, None)
    saved.wait()
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
wanted = [checkpoint.abstract_like(x, jax.tree.map(lambda _: place, x)) for x in (params, state)]
found = saved.restore(*wanted)
assert int(found.state["n"]) == 2 and checkpoint.steps(root) == [2]
(saved.root / "2" / "commit_success.txt").unlink()
assert checkpoint.steps(root) == []
print("all is well", flush=True)
os._exit(0)  # the server's thread does not end
"""


def test_googles_store(tmp_path: Path):
    """The same over the protocol of Google's store, in a process of its own, since its libraries read their variables when imported."""
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name, reason="needs the extra 'gcs' and the package gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    told = subprocess.run(
        [sys.executable, "-c", GOOGLE, str(port)],
        env={
            **os.environ,
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "FSSPEC_GS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google itself what kind of bucket it is
            "LLM_JAX_CACHE": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "all is well" in told.stdout, told.stderr[-2000:]
