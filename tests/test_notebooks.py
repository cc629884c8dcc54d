"""The notebooks run from top to bottom, with smaller numbers in their first cell, and draw what they promise."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "pruning_ablation": (
        dict(STEPS="30", SPARSITIES="(0.5,)", BATCHES="2", SCORES='("taylor",)', PATTERNS='("2:4",)'),
        2,
    ),
    "distillation_ablation": (
        dict(TEACHER_STEPS="8", STEPS="4", SEEDS="(0,)", BATCHES="2", ARMS='("no teacher", "reverse KL")'),
        1,
    ),
    "three_eras": (dict(STEPS="12", UPDATE="6", BATCHES="1"), 1),
}
"""The numbers of each, and how many pictures it draws"""


def test_these_are_all():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, tmp_path, monkeypatch):
    numbers, pictures = SMALL[name]
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    at = next(i for i, cell in enumerate(book.cells) if cell.cell_type == "code")
    for variable in numbers:
        assert re.search(rf"(?m)^{variable} = ", book.cells[at].source), variable
    smaller = "\n".join(f"{variable} = {value}" for variable, value in numbers.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(smaller))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", SMALL)
def test_it_is_kept_with_its_outputs(name):
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == SMALL[name][1]
    assert not re.search(r"/(home|root|tmp|work)/", str(outputs))
