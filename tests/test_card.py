"""What a card says of the code and the libraries; what it says of a run is in test_loop.py, hashes are in test_checkpoint.py."""

import json
import subprocess
from pathlib import Path

import pytest

from llm_jax import card
from llm_jax.config import Batch, Data, Run
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken
from llm_jax.transforms import Transform


@pytest.fixture
def version():
    """`code_version`, asked anew."""
    yield card.code_version.__wrapped__
    card.code_version.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *settings, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_code_is_the_commit_and_whether_it_was_changed(version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "package" / "card.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr(card, "__file__", str(file))
    monkeypatch.setattr(card, "_version", lambda name: f"installed {name}")
    assert version() == "installed llm-jax"
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "--quiet", "--message=other")
    assert version() == "installed llm-jax"  # the repository around an environment says nothing of the code in it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=code")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit) == 40 and version() == commit
    file.write_text("changed")
    assert version() == f"{commit}-dirty"


def test_versions_of_the_libraries():
    found = card.library_versions()
    assert set(card.LIBRARIES) < set(found) and all(version[0].isdigit() for version in found.values())
    assert card._version("no-such-package") == "not installed"


def test_card_is_plain_data_and_has_the_sizes_after_the_transforms(mesh):
    run = Run(
        model=ModelConfig(dim=12),
        task=NextToken(z_loss=0.1),
        data=Data(sources=("text:a",)),
        batch=Batch(size=2),
        transforms=(Transform(label="grow(2)"),),
    )
    made = card.make_card(
        run, ModelConfig(dim=24), mesh(fsdp=2), {"parents": ["abc"]}, {"split": "train"}, step=3, tokens=5.0
    )
    plain = json.loads(json.dumps(made))
    assert (plain["config"]["model"]["dim"], plain["model"]["dim"]) == (12, 24)
    assert (plain["transforms"], plain["parents"], plain["sources"], plain["step"]) == (
        ["grow(2)"],
        ["abc"],
        {"split": "train"},
        3,
    )
    assert plain["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1, "context": 1}
    assert (plain["config"]["task"]["kind"], plain["config"]["task"]["z_loss"]) == ("NextToken", 0.1)
