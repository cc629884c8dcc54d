"""Arms of equal compute: what each of them is, and a whole advice on a small model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from llm_jax import cli, flops, model
from llm_jax.config import Batch, Data, Eval, Optimizer, Run, Schedule
from llm_jax.errors import ConfigError
from llm_jax.lifecycle import advise
from llm_jax.lifecycle.recipes import continued, retrained
from llm_jax.loop import train
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import MaskedToken, NextToken, SpanCorruption


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small decoder, trained for some steps on twelve addresses; its folder is `base.folder`."""
    folder = tmp_path_factory.mktemp("advise")
    for era, numbers in (("old", range(12)), ("new", range(12, 24))):
        (folder / era).mkdir()
        for i in numbers:
            (folder / era / f"{i:02d}.txt").write_text((corpus / f"{i:02d}.txt").read_text()[:1500])
    run = Run(
        name="base",
        workdir=str(folder / "base"),
        model=ModelConfig(vocab_size=400, max_length=64, layers=2, dim=32, heads=2),
        task=NextToken(),
        data=Data(sources=(f"text:{folder}/old/*.txt",), tokenizer="bpe:400", heldout=0.25),
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule(name="linear", warmup=2, final=0.0),
        steps=16,
        batch=Batch(size=8, length=64),
        eval=Eval(every=0),
    )
    train(run)
    return run


def sources(base: Run) -> tuple[str, str]:
    folder = base.folder.parent
    return f"text:{folder}/old/*.txt", f"text:{folder}/new/*.txt"


def test_recipes_put_the_sources_in_their_place(base: Run):
    old, new = sources(base)
    run = continued(base, str(base.folder), old, new, 0.25)
    assert (run.start, run.model, run.data.sources, run.data.weights) == (
        str(base.folder),
        None,
        (new, old),
        (0.75, 0.25),
    )
    assert continued(base, "x", old, new, 0.0).data.weights == (1.0, 0.0)  # the old one is evaluated only
    fresh = retrained(dataclasses.replace(base, start="x", model=None), str(base.folder), "t", old, new)
    assert fresh.start == "fresh" and fresh.model == model.sizes(base.folder) and fresh.data.weights == ()
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"replay is .*: it must lie in \[0, 1\)"):
            continued(base, "x", old, new, share)


def test_every_arm_has_the_operations_of_the_recipe(base: Run):
    made = advise.arms(base, str(base.folder), "tokenizer", *sources(base))
    assert set(made) == set(advise.ARMS)
    shapes = {"tokens": (base.batch.size, base.batch.length)}
    assert base.model is not None
    whole = base.steps * flops.train_flops(base.model, shapes)
    for name, run in made.items():
        sizes = run.model or base.model
        for change in run.transforms:
            sizes = change.config(sizes)
        each = flops.train_flops(sizes, shapes)
        assert run.steps == 0 if name == "nothing" else abs(run.steps * each - whole) <= each / 2, name
    with pytest.raises(ConfigError, match="unknown arm 'replay_7'; did you mean"):
        advise.arms(base, str(base.folder), "tokenizer", *sources(base), wanted=["replay_7"])
    unsplit = dataclasses.replace(base, data=dataclasses.replace(base.data, heldout=0.0))
    with pytest.raises(ConfigError, match="needs held-out documents"):
        advise.arms(unsplit, str(base.folder), "tokenizer", *sources(base))


@pytest.mark.parametrize(
    ("sizes", "task", "kind"),
    [
        (dict(architecture="encoder-decoder"), SpanCorruption(), "an encoder-decoder"),
        (dict(architecture="encoder", head="mlm", norm_place="post"), MaskedToken(), "a post-norm model"),
    ],
)
def test_what_cannot_be_grown_has_the_other_arms(base: Run, tmp_path: Path, sizes: dict, task: Any, kind: str):
    """Of as many operations as the recipe too, on the rows of its task."""
    assert base.model is not None
    other = base.model.replace(vocab_size=600, **sizes)
    tokenizer = model.read_tokenizer(base.folder)
    start = str(tmp_path / "start")
    model.save(model.Model(other, transformer.init(other, jax.random.key(0)), tokenizer), start)
    recipe = dataclasses.replace(base, task=task, model=None)
    made = advise.arms(recipe, start, "tokenizer", *sources(base))
    assert set(made) == set(advise.ARMS) - {"grown"}
    assert {run.steps for name, run in made.items() if name not in ("nothing", "lora")} == {recipe.steps}
    with pytest.raises(ConfigError, match=f"the arm grown cannot be made of {kind}: leave it out of --arms"):
        advise.arms(recipe, start, "tokenizer", *sources(base), wanted=["nothing", "grown"])


def test_an_advice(base: Run, tmp_path: Path):
    """The arms are tried, told, drawn and kept; what is done is not done again."""
    old, new = sources(base)
    recipe = dataclasses.replace(base, model=None, steps=8)
    wanted = ("nothing", "new_only", "union")
    found = advise.advise(recipe, str(base.folder), old, new, tmp_path, [0, 1], wanted)
    assert {x.name for x in found} == set(wanted)
    means = [sum(x.average) / 2 for x in found]
    assert means == sorted(means) and all(len(x.old) == len(x.new) == 2 for x in found)
    nothing = next(x for x in found if x.name == "nothing")
    assert nothing.flops == 0 and nothing.old[0] == nothing.old[1]
    learned = next(x for x in found if x.name == "new_only")
    assert len(learned.curve) == advise.EVALUATIONS and learned.curve[-1][0] == learned.flops
    assert learned.new[0] < nothing.new[0]
    assert json.loads((tmp_path / "advice.json").read_text())[0]["name"] == found[0].name
    assert (tmp_path / "advice.png").stat().st_size > 10_000
    assert f"advice: {found[0].name}" in advise.told(found)
    again = advise.attempt(
        "new_only", advise.arms(recipe, str(base.folder), "", old, new)["new_only"], old, new, tmp_path, [0]
    )
    assert again.new == learned.new[:1]


def test_the_command_tells_what_is_wrong(base: Run, capsys: pytest.CaptureFixture):
    assert cli.main(["advise", "--config=configs/eras_update.py", "--start=x", "--old=a"]) == 2
    assert "--new, --out" in capsys.readouterr().err
    assert cli.main(["advise", "--confg=configs/eras_update.py", "--start=x", "--old=a", "--new=b", "--out=c"]) == 2
    assert "unknown argument '--confg=configs/eras_update.py'; did you mean '--config'?" in capsys.readouterr().err
