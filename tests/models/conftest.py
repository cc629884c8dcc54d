"""The tiny models of `tests/families.py` as fixtures."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests import families
from tests.families import FAMILIES, Tiny, tiny_model


@pytest.fixture(scope="module", autouse=True)
def unoptimised() -> Iterator[None]:
    """Machine code that is not optimised, which halves the time of these tests: their programs run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """`tiny(family, **changes)`: a small model of a family."""
    return tiny_model


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Tiny:
    """Each family in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def batch_of() -> Any:
    """`batch_of(config, rows=3, length=11)`: the input that a model reads, in rows of two examples and padding."""
    return families.batch_of


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`accelerator("tpu")`: the package takes the branches of another platform, still on this CPU."""

    def switch(name: str) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: name)

    return switch
