"""What a run tells: metrics.jsonl, TensorBoard, lines without a terminal, the curves."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib import image

from llm_jax import log


def entries(folder: Path) -> list[dict]:
    return log.read(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("content", "step", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2, [1, 2]),
        ('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/loss": 1}\n{"step": 3}\n', 2, [1, 2, 2]),
        ('{"step": 1}\n{"step": 2}\n{"st', 5, [1, 2]),
        ('{"step": 1}\n{"step": 2}\n{"step": 3', 5, [1, 2]),
        ('{"step": 1}\n\0\0\0\0', 5, [1]),
        ('{"step": 1}\n', 0, []),
        ("", 3, []),
    ],
    ids=["beyond", "evaluation", "cut", "cut at a number", "zeros of a lost disk", "all", "empty"],
)
def test_lines_after_the_checkpoint_go(content: str, step: int, kept: list[int], tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    log.keep_until(path, step)
    assert [entry["step"] for entry in log.read(path)] == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.keep_until(tmp_path / "absent", step)


def test_writes_and_goes_on(tmp_path: Path):
    first = log.Metrics(tmp_path, 0, 4)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1 / step, "samples": 7, "huge": float("inf"), "none": float("nan")})
    first.close()
    second = log.Metrics(tmp_path, 2, 4)
    second.write(3, {"loss": 9.0})
    second.close()
    told = entries(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in told] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert told[0]["huge"] is None and told[0]["none"] is None  # no JSON has a word for them
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_silent_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quiet = log.Metrics(tmp_path, 0, 4, silent=True)
    quiet.write(1, {"loss": 1.0})
    quiet.show(1, {"loss": 1.0})
    quiet.say("hello")
    quiet.close()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert capsys.readouterr() == ("", "")


def test_says_a_line_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = log.Metrics(tmp_path, 0, 4)
    metrics.say("[bold] is no markup")
    metrics.show(1, {"loss": 1.23456})
    metrics.show(2, {"loss": 1.0})  # within ten seconds of the line before
    metrics.close()
    said = capsys.readouterr().err
    assert "[bold] is no markup" in said and "step 1  loss 1.235" in said and "step 2" not in said


def test_torch_is_not_loaded_for_tensorboard(monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    assert log._summary_writer().__name__ == "SummaryWriter"
    assert "torch" not in sys.modules and "tensorboardX" in sys.modules


def test_curves(tmp_path: Path):
    lines = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1},
        {"step": 1, "eval/loss": 2.5},
        {"step": 2, "loss": None, "learning_rate": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = image.imread(log.draw_curves(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    empty = image.imread(log.draw_curves(tmp_path))
    assert drawn.shape == empty.shape == (720, 960, 4) and (drawn != empty).any()
