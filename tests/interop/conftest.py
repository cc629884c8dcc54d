"""Small directories as transformers writes them."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import tree
from llm_jax.interop import huggingface, names
from llm_jax.model import Model
from llm_jax.models import presets
from llm_jax.models.config import ModelConfig

SIZE = dict(vocab_size=99, layers=2, dim=36, heads=3, mlp_dim=50, max_length=32)
PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "bert": presets.bert,
    "roberta": presets.roberta,
    "distilbert": presets.distilbert,
    "gpt2": presets.gpt2,
    "llama": presets.llama,
    "t5": presets.t5,
    "marian": presets.marian,
}


@pytest.fixture(scope="module", autouse=True)
def unoptimised() -> Iterator[None]:
    """Machine code that is not optimised, which halves the time of these tests: their programs run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def make_model(family: str, **changes: Any) -> Model:
    config = PRESETS[family](**{**SIZE, **changes})
    rng = np.random.default_rng(0)
    shapes = names._shapes(config)  # traced once for the model and what is done with it
    return Model(config, jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), shapes))


@pytest.fixture(scope="session")
def made() -> Callable[..., Model]:
    """`made(family, **changes)`: a small model of a preset with random weights."""
    return make_model


@pytest.fixture
def directory(tmp_path: Path) -> Callable[..., Path]:
    """`directory(family, **changes)`: the directory of such a model."""

    def make(family: str, name: str = "model", **changes: Any) -> Path:
        huggingface.save(make_model(family, **changes), tmp_path / name)
        return tmp_path / name

    return make


def same(first: Any, second: Any) -> None:
    """Two trees have the same names and bits."""
    assert tree.names(first) == tree.names(second)
    for name, x, y in zip(tree.names(first), jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.fixture(scope="session")
def equal_trees() -> Callable[[Any, Any], None]:
    """`equal_trees(first, second)` asserts it, bit for bit."""
    return same
