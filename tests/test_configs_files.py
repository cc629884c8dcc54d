"""Every file in configs/: it loads, its own sizes fit together, its header says how to run it, and a shrunk copy takes
two steps.
"""

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import config, loop, model, optim, parts, sharding, step, tree
from llm_jax.config import Run, load, override, show
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.models import presets, transformer
from llm_jax.tasks import Classification
from llm_jax.tasks.span_corruption import SENTINELS, SpanCorruption

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
QUICK = ("quickstart", "snippets_minilm")
"""A decoder and an encoder, of which a copy takes its steps by default; of the others in the slow part"""
OWN_TEACHER = ("prune_fisher",)
"""What begins as its own teacher, so that its loss is 0 until a weight is gone"""
LENGTH, VOCABULARY = 24, 512
WORDS = (
    "the state of the union is strong",
    "fellow citizens",
    "commerce with foreign nations",
    "a more perfect peace",
    "we the people",
)


STARTS = {
    "asset:minilm": presets.bert(layers=6, dim=384, heads=12, mlp_dim=1536),
    "asset:smollm2": presets.llama(
        vocab_size=49_152, max_length=8192, layers=30, dim=576, heads=9, kv_heads=3, mlp_dim=1536, tie_embeddings=True
    ),
    "models/bert-base-uncased": presets.bert(),
    "runs/snippets_minilm": presets.bert(
        layers=6, dim=384, heads=12, mlp_dim=1536, head="classification", labels=2, pooler="tanh"
    ),
    "runs/sotu": config.load(ROOT / "configs" / "sotu.py").model,
    "runs/eras_base": config.load(ROOT / "configs" / "eras_base.py").model,
}
"""The sizes that each model has from which a config starts."""


@pytest.fixture(autouse=True)
def earlier_runs(tmp_path, monkeypatch):
    """A folder to be in, with small models in the place of the runs that others start from."""
    monkeypatch.chdir(tmp_path)
    for start, sizes in STARTS.items():
        if start.startswith("runs/"):
            kind = "wordpiece:200" if sizes.architecture == "encoder" else "bpe:300"
            small = sizes.replace(vocab_size=VOCABULARY, dim=24, heads=12 if sizes.layers == 6 else 3, mlp_dim=48)
            made = model.Model(small, transformer.init(small, jax.random.key(0)), load_tokenizer(kind, WORDS * 9))
            model.save(made, tmp_path / start)


def sizes_of(run: Run) -> Any:
    """The sizes of the run before its transforms."""
    return run.model or STARTS[run.start]


def short(task: Any) -> Any:
    """The task with what takes tokens cut to rows of `LENGTH`."""
    small = dict(overlap=LENGTH // 2, target_length=LENGTH, template="{text}:")
    return dataclasses.replace(task, **{name: x for name, x in small.items() if getattr(task, name, 0)})


def shrunk(run: Run, folder: Path) -> Run:
    """The run at a size for a test: the same task, family, optimizer, schedule and transforms on a few sentences."""
    rng = np.random.default_rng(0)
    lines = [
        json.dumps(
            {
                run.data.text: " ".join(rng.choice(WORDS, n)),
                run.data.target: str(rng.choice(WORDS)),
                "label": int(n % 2),
                run.data.group or "group": f"film {n}",
            }
        )
        for n in rng.integers(1, 9, 64)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = sizes_of(run)
    again = run.start.startswith("runs/")
    small = dict(vocab_size=VOCABULARY, max_length=LENGTH, layers=1, dim=32, heads=4)
    small |= {
        name: n
        for name, n in dict(decoder_layers=1, kv_heads=2, head_dim=8, mlp_dim=48).items()
        if getattr(model, name)
    }
    return dataclasses.replace(
        run,
        workdir=str(folder / "run"),
        start=run.start if again else "fresh",
        transforms=tuple(change._replace(steps=0) for change in run.transforms),
        steps=2,
        epochs=0.0,
        log_every=1,
        mesh=config.Mesh(),
        model=None if again else model.replace(**small),
        data=dataclasses.replace(
            run.data,
            sources=(f"jsonl:{folder}/corpus.jsonl",),
            weights=(),
            heldout=0.2,
            heldout_sources=(),
            window=32,
            workers=0,
            max_dropped=0.5,
            buckets=(16, LENGTH) if run.data.buckets else (),
            tokenizer="wordpiece:200" if model.architecture == "encoder" else "bpe:300",
        ),
        batch=dataclasses.replace(run.batch, size=4 * run.batch.accumulate, length=LENGTH),
        checkpoint=dataclasses.replace(run.checkpoint, every=1000),
        task=short(run.task),
        eval=dataclasses.replace(
            run.eval,
            every=0,
            batches=1,
            prompts=run.eval.prompts[:1],
            task=run.eval.task and short(run.eval.task),
        ),
    )


def test_there_are_configs():
    assert {"quickstart", "gpt2_small", "bert_mlm", "t5_spans", "llama2_7b"} <= {path.stem for path in FILES}


@EACH
def test_it_loads(path):
    run = load(path)
    assert run.name == path.stem, "runs/NAME is named after the file"
    assert override(run, ["--config.seed=5"]) == dataclasses.replace(run, seed=5)
    assert show(run)


@EACH
def test_its_header_gives_the_command(path):
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"python train.py --config=configs/{path.name}" in header
    assert header.splitlines()[0].endswith("."), "the first line says what is trained on what"


@EACH
def test_its_own_sizes_fit_together(path):
    """By `eval_shape`, without memory: params and moments of the real model and where they lie on 8 devices; the
    tokenizer fits its vocabulary, the rows its mesh and positions.
    """
    run = load(path)
    change = parts.transform_of(run)
    began = sizes_of(run)
    sizes = change.config(began)
    shapes, axes = transformer.shapes(sizes), transformer.axes(sizes)
    optimizer = change.update(
        optim.make_optimizer(run.optimizer, optim.make_schedule(run.schedule, run.steps), shapes, axes)
    )

    def init(key):
        # what looks at data is tried in the shrunk copies
        params = transformer.init(began, key)
        params = transformer.init(sizes, key) if change.calibration else change.params(began, params, key, None)
        return step.init_state(params, optimizer, key)

    state = jax.eval_shape(init, jax.random.key(0))
    assert jax.tree.structure(state.params) == jax.tree.structure(shapes)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state.params))
    wanted = {axis: -1 if n == -1 else min(n, 2) for axis, n in dataclasses.asdict(run.mesh).items()}
    mesh = sharding.make_mesh(config.Mesh(**wanted))
    placed = sharding.state_shardings(mesh, state, shapes, sharding.params_shardings(mesh, axes, shapes))
    held = sum(
        math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed.params))
    )
    assert held <= 1.01 * tree.size(state.params) / mesh.shape["fsdp"] / mesh.shape["tensor"], (
        "what the mesh is to split is split"
    )
    _, _, entries = run.data.tokenizer.partition(":")
    if entries.isdecimal():
        assert int(entries) + (SENTINELS if isinstance(run.task, SpanCorruption) else 0) <= sizes.vocab_size
    assert run.batch.length <= sizes.max_length
    over = math.prod(max(1, n) for n in (run.mesh.data, run.mesh.fsdp))
    assert (run.batch.size // run.batch.accumulate) % over == 0
    assert 0 <= run.schedule.warmup < (run.steps if not run.epochs else math.inf)


@pytest.fixture
def quick(monkeypatch):
    """One device, and steps that are compiled fast rather than to be fast: four times sooner ready."""
    make_mesh, jit = sharding.make_mesh, jax.jit

    def compile_fast(*function, **options):
        if function and getattr(function[0], "__name__", "") in ("step", "eval_step"):
            options["compiler_options"] = {"xla_backend_optimization_level": 0}
        return jit(*function, **options)

    monkeypatch.setattr(
        sharding,
        "make_mesh",
        lambda sizes=config.Mesh(), devices=None: make_mesh(sizes, devices or jax.devices()[:1]),
    )
    monkeypatch.setattr(jax, "jit", compile_fast)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in FILES],
    ids=lambda path: path.stem,
)
def test_a_shrunk_copy_takes_two_steps(path, tmp_path, capsys, quick):
    run = shrunk(load(path), tmp_path)
    result = loop.train(run)
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if path.stem in OWN_TEACHER:
        np.testing.assert_allclose(losses, 0, atol=1e-6)
        losses = [line["nll"] for line in lines if "nll" in line]
        assert len(losses) == 2
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    choices = len(run.task.labels) if isinstance(run.task, Classification) else VOCABULARY
    assert all(0.3 * math.log(choices) < x < 3 * math.log(choices) for x in losses)
    assert result["steps"] == 2 and result["skipped"] == 0 and math.isfinite(result["eval"]["loss"])
    assert len(result["samples"]) == (min(1, len(run.eval.prompts)) if sizes_of(run).architecture != "encoder" else 0)
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == result
    whole = dataclasses.replace(run, model=run.model or model.sizes(run.start))
    assert json.loads((folder / "card.json").read_text(encoding="utf-8"))["config"] == json.loads(
        json.dumps(config.to_dict(whole))
    )
    assert all(Path(where).exists() for where in result["paths"].values())
    told = capsys.readouterr()
    assert all(line in told.out + told.err for line in show(whole).splitlines()), "the resolved config is printed"
