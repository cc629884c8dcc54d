"""What the README tells a user to write works as it stands, and what CI calls exists."""

import re
from pathlib import Path

import jax
import pytest

from llm_jax import checkpoint, config, loop, model
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.models import presets, transformer
from llm_jax.transforms import Transform

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def block(having: str) -> str:
    (found,) = [code for code in BLOCKS if having in code]
    return found


@pytest.fixture(scope="module")
def small():
    tokenizer = load_tokenizer("wordpiece:120", ["a fine film with a dull plot and a bright cast"] * 3)
    sizes = presets.bert(vocab_size=128, max_length=256, layers=1, dim=16, heads=2, mlp_dim=32, dropout=0.0)
    return model.Model(sizes, transformer.init(sizes, jax.random.key(0)), tokenizer, {"name": "small"})


def test_it_has_under_200_lines_and_every_path_in_it_exists():
    assert len(TEXT.splitlines()) < 200
    named = re.findall(r"(?:configs|benchmarks|docs|llm_jax)/[\w/]+\.(?:py|md|png|json)", TEXT)
    assert len(named) > 10
    assert [name for name in named if name != "configs/mine.py" and not (ROOT / name).exists()] == []


def test_every_verb_in_it_exists():
    from llm_jax.cli import VERBS

    assert set(re.findall(r"python -m llm_jax (\w+) ", TEXT)) <= set(VERBS)


def test_every_file_of_tests_that_ci_names_exists():
    named = re.findall(r"(?<![\w/])tests(?:/\w+)+(?:\.py)?", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_fine_tuning_on_a_file_of_ones_own(small, tmp_path, monkeypatch):
    """The config as printed, with the start at hand: it trains, judges and leaves its files."""
    rows = [f'"a {word} film",{name}' for word, name in (("fine", "positive"), ("dull", "negative")) * 30]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    model.save(small, tmp_path / "models" / "bert-base-uncased")
    (tmp_path / "mine.py").write_text(block("get_config"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    devices = ["--config.mesh.data=8"]  # as many as the tests have; 8 rows divide over them
    run = config.override(config.load(tmp_path / "mine.py"), ["--config.epochs=0", "--config.steps=2", *devices])
    result = loop.train(run)
    assert result["eval"]["examples"] == 6 and {"accuracy", "macro_f1", "calibration_error"} <= set(result["eval"])
    assert all(Path(result["paths"][name]).exists() for name in ("predictions", "confusion", "calibration"))
    assert checkpoint.read_card(run.folder)["transforms"] == ["new_head('classification', labels=2)"]


def test_the_transform_in_it(small):
    space: dict = {}
    exec(block("def zero_biases"), space)
    change = space["zero_biases"]()
    assert isinstance(change, Transform)
    made = model.transform(small, change, jax.random.key(0))
    assert not made.params["encoder"]["layers"]["mlp"]["up_bias"].any()
