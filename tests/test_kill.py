"""A run killed with SIGKILL and started again by the same command is the uninterrupted one, bit for bit: the benchmark, in short."""

from pathlib import Path

import pytest

from benchmarks import resume
from llm_jax.data.tokenizer import Tokenizer


@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(20, 500, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_uninterrupted(kills: int, steps: int, corpus: Path, tokenizer: Tokenizer):
    claim = resume.measure((f"text:{corpus}/0*.txt", f"text:{corpus}/1*.txt"), tokenizer, kills, steps, seed=kills)
    assert claim["holds"], claim
    assert claim["value"] == kills and any(met != "start" and step for met, step in claim["kills"])


def test_a_difference_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses that differ in the last bit are not equal."""
    monkeypatch.setattr(resume, "read_card", lambda path: {"hashes": {}})
    monkeypatch.setattr(resume, "find", lambda path: path)
    for name, loss in (("a", 0.1), ("b", 0.10000000000000002)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss!r}, "seconds": {loss}}}\n')
    assert resume.compared(tmp_path / "a") == resume.compared(tmp_path / "a") != resume.compared(tmp_path / "b")
