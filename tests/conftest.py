"""Fixtures that several test files use. The settings of jax are in the conftest.py above this folder."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from llm_jax import config, sharding
from llm_jax.data import assets
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.families import FAMILIES

CORE = ("bert", "llama")
"""Families that transforms are tried on by default, an encoder and a decoder; on all others in the slow part."""

RUNS = {
    "test_finetuning.py",
    "test_grown_runs.py",
    "test_on_policy.py",
    "test_parts.py",
    "test_pruned_runs.py",
    "test_storage.py",
    "test_teachers.py",
}
"""Files of whole runs, several of them in each test: in the slow part"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole runs, and tests of transforms on further families, as slow."""
    for item in items:
        if item.path.name in RUNS:
            item.add_marker(pytest.mark.slow)
        if item.path.parent.name == "transforms" or item.path.name == "test_peft.py":
            values = (
                item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
            )
            named = {x for x in values if isinstance(x, str) and x in FAMILIES}
            if named and not named & set(CORE):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def mesh() -> Callable[..., jax.sharding.Mesh]:
    """`mesh(fsdp=2, tensor=4)`: a mesh of these sizes over as many devices as they multiply to; `mesh()` is one device."""

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> jax.sharding.Mesh:
        sizes = config.Mesh(data=data, fsdp=fsdp, tensor=tensor, context=context)
        return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor * context])

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 text files, a State of the Union address each, one in ten of those from 1790 to 2026, cut to 4000 characters.

    Read them as `text:{corpus}/*.txt`. They are real and small; do not write to the folder.
    """
    folder = tmp_path_factory.mktemp("corpus")
    records = [json.loads(line) for line in assets.records("sotu").read_text(encoding="utf-8").splitlines()]
    for number, record in enumerate(records[5::10][:24]):
        (folder / f"{number:02d}.txt").write_text(record["text"][:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    """A byte-level BPE of 512 entries, trained on the corpus."""
    return load_tokenizer("bpe:512", [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))])
