"""Suites: what may not be asked, files that hold none, and that a fingerprint is that of what is asked."""

import dataclasses
import json
from pathlib import Path

import pytest

from llm_jax.config import Data
from llm_jax.errors import ConfigError
from llm_jax.lifecycle.harness import Harness
from llm_jax.lifecycle.suite import Check, Limits, Suite, load_suite
from llm_jax.tasks import NextToken

FILES = sorted((Path(__file__).parents[2] / "configs" / "suites").glob("*.py"))


def check(**changes) -> Check:
    return dataclasses.replace(Check("a", NextToken(), Data(), 1.0), **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check(margin=0.0), "check.margin of 'a' is 0.0: it must be above 0"),
        (lambda: check(margin=float("nan")), "check.margin of 'a' is nan: it must be above 0"),
        (lambda: check(metric="acuracy"), "unknown check.metric 'acuracy'; did you mean 'accuracy'?"),
        (lambda: check(metric="bits", data=Data(long="truncate")), "bits a byte of text are of all of it: 'split'"),
        (lambda: check(least=0), "check.least is 0"),
        (lambda: check(slice_margin=-1.0), "check.slice_margin is -1.0"),
        (lambda: check(slices=("date:x",)), "check.slices of 'a' has 'date:x': it must be FIELD, or FIELD:N"),
        (lambda: Suite(()), "there must be one"),
        (lambda: Suite((check(),) * 2), "a name of its own"),
        (lambda: Suite((check(),), level=2.0), "suite.level is 2.0"),
        (lambda: Suite((check(),), level=0.0), "suite.level is 0.0: it must lie between 0 and 0.5"),
        (lambda: Limits(latency=-1.0), "limits.latency is -1.0"),
        (lambda: Limits(rows=0), "limits.rows is 0"),
        (lambda: Harness("b", "b", ".", -1.0), "check.margin of 'b' is -1.0: it must be above 0"),
    ],
)
def test_suites_that_cannot_be(make, message: str):
    with pytest.raises(ConfigError) as found:
        make()
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_suit(): return 1", "a.py has no function get_suite()"),
        ("def get_suite(): return 1", "returned a int, not a llm_jax.lifecycle.suite.Suite"),
        ("x = 1\n\nraise ValueError('no')", "a.py:3: ValueError: no"),
        ("def get_suite():\n    return nothing", "a.py:2: NameError: name 'nothing' is not defined"),
        (
            "from llm_jax.lifecycle.suite import Suite\ndef get_suite():\n    return Suite(check=())",
            "a.py:3: TypeError: Suite.__init__() got an unexpected keyword argument 'check'",
        ),
        ("from llm_jax.lifecycle.suite import Suite\ndef get_suite():\n    return Suite(checks=('a',))", "a.py"),
    ],
)
def test_files_that_hold_no_suite(tmp_path: Path, content: str, message: str):
    (tmp_path / "a.py").write_text(content)
    with pytest.raises(ConfigError) as found:
        load_suite(tmp_path / "a.py")
    assert message in str(found.value)


def test_a_file_that_is_missing(tmp_path: Path):
    (tmp_path / "eras.py").write_text("")
    with pytest.raises(ConfigError, match=r"no config file .*era.py; did you mean .*eras.py\?"):
        load_suite(tmp_path / "era.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_suites_of_the_repository(path: Path):
    suite = load_suite(path)
    assert suite.fingerprint() == load_suite(path).fingerprint()
    assert f"--suite=configs/suites/{path.name}" in path.read_text()  # the header says how to run it


def test_a_fingerprint_is_that_of_what_is_asked(tmp_path: Path):
    """It changes with a margin, a limit and a document, and with nothing else."""
    path = tmp_path / "texts.jsonl"

    def fingerprint(limits: Limits | None = None, **changes) -> str:
        data = Data(sources=(f"jsonl:{path}",), heldout=0.5)
        return Suite((check(data=data, **changes),), limits or Limits()).fingerprint()

    texts = [{"text": f"text {i}"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, texts)))
    first = fingerprint()
    assert first == fingerprint() and len(first) == 64
    assert len({first, fingerprint(margin=2.0), fingerprint(Limits(size=1.0)), fingerprint(group="film")}) == 4
    path.write_text("\n".join(map(json.dumps, [*texts[:3], {"text": "another"}])))
    assert fingerprint() != first
