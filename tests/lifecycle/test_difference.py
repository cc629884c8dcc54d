"""What two models differ in, against NumPy; other shapes, another depth, a mesh, huge values; and the command."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import cli, model, tree
from llm_jax.lifecycle import difference, difference_text
from llm_jax.models import presets, transformer
from tests.families import tiny_model


def make(seed: int = 0, **changes: Any) -> model.Model:
    """A small decoder with random weights, a quarter of one of them zero."""
    sizes = presets.llama(**{**dict(vocab_size=50, max_length=16, layers=3, dim=8, heads=2, mlp_dim=12), **changes})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), transformer.shapes(sizes))
    params["decoder"]["layers"]["mlp"]["up"][0, :, :9] = 0
    return model.Model(sizes, jax.tree.map(jnp.asarray, params), None, {"name": f"m{seed}"})


def leaves(params: Any) -> dict[str, np.ndarray]:
    return {n: np.asarray(x, np.float64) for n, x in zip(tree.names(params), jax.tree.leaves(params))}


def check(row: difference.Norms, a: np.ndarray, b: np.ndarray) -> None:
    norm = np.linalg.norm
    assert row.norm_a == pytest.approx(norm(a), rel=1e-6) and row.norm_b == pytest.approx(norm(b), rel=1e-6)
    assert row.norm_difference == pytest.approx(norm(b - a), rel=1e-6)
    assert row.relative == pytest.approx(norm(b - a) / norm(a), rel=1e-6)
    assert (row.zeros_a, row.zeros_b) == ((a == 0).mean(), (b == 0).mean()) and row.note == ""


def test_norms_by_path_and_by_layer_are_numpys():
    a, b = make(0), make(1)
    paths, layers = difference.norms(a.params, b.params)
    one, two = leaves(a.params), leaves(b.params)
    assert list(paths) == list(one)
    for name in one:
        check(paths[name], one[name], two[name])
    assert list(layers) == ["embed", *(f"decoder/layers/{i}" for i in range(3)), "decoder/norm", "head"]
    for i in range(3):
        stacked = [np.concatenate([x[i].ravel() for n, x in each.items() if "/layers/" in n]) for each in (one, two)]
        check(layers[f"decoder/layers/{i}"], *stacked)
    assert layers["decoder/layers/0"].zeros_a > 0 == layers["decoder/layers/1"].zeros_a


def test_every_family_is_summed_whole():
    """No parameter is left out of the layers, and none counted twice."""
    for name in ("bert", "t5", "vit"):
        params = tiny_model(name).params
        paths, layers = difference.norms(params, params)
        total = math.sqrt(sum(np.square(x).sum() for x in leaves(params).values()))
        for rows in (paths, layers):
            assert math.sqrt(sum(row.norm_a**2 for row in rows.values())) == pytest.approx(total, rel=1e-6)
            assert all(row.norm_difference == row.relative == 0 for row in rows.values())


def test_ten_and_more_layers_are_in_the_order_of_their_numbers():
    params = {"decoder": {"layers": {"up": jnp.ones((12, 2))}}, "zz": jnp.ones(3)}
    assert list(difference.norms(params, params)[1]) == [*(f"decoder/layers/{i}" for i in range(12)), "zz"]


def test_other_shapes_are_said():
    a, b = make(0), make(1, mlp_dim=20, layers=2)
    found = difference.compare(a, b)
    up = found.paths["decoder/layers/mlp/up"]
    assert up.note == "3x8x12 in A, 2x8x20 in B" and up.norm_difference is None and up.relative is None
    assert up.norm_b == pytest.approx(np.linalg.norm(leaves(b.params)["decoder/layers/mlp/up"]), rel=1e-6)
    assert found.paths["embed/tokens"].relative > 0
    last = found.layers["decoder/layers/2"]
    assert last.norm_b is None and last.norm_a > 0 and last.zeros_b is None and last.note
    assert found.sizes == {"layers": (3, 2), "mlp_dim": (12, 20)} and found.parameters[0] > found.parameters[1]
    assert "3x8x12 in A, 2x8x20 in B" in difference_text.told(found)


def test_parameters_that_one_has_not():
    found = difference.compare(make(0), make(1, tie_embeddings=True))
    assert found.paths["head/kernel"].note == "50x8 in A, absent in B" and found.paths["head/kernel"].norm_b is None
    json.dumps(difference.to_dict(found))


def test_other_dtypes_and_what_is_not_finite():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    paths, _ = difference.norms(
        {"a": jnp.asarray(x, jnp.bfloat16), "b": jnp.int8([3, 4])}, {"a": x, "b": jnp.int8([0, 0])}
    )
    assert paths["a"].norm_difference == 0 and paths["b"].norm_a == 5 and paths["b"].zeros_b == 1
    assert paths["b"].relative == 1
    back = difference.norms({"b": jnp.zeros(2)}, {"b": jnp.ones(2)})[0]["b"]
    assert back.relative is None and back.norm_difference == pytest.approx(2**0.5)
    assert math.isnan(difference.norms({"a": jnp.float32([np.nan, 1])}, {"a": jnp.ones(2)})[0]["a"].norm_a)


def test_many_values_lose_no_digits():
    """In float32 one sum of 2^25 ones ends at 2^24 if it is taken one by one."""
    x = jnp.ones((2**13, 2**12))
    row = difference.norms({"a": x}, {"a": 3 * x})[0]["a"]
    assert row.norm_a == 2**12.5 and row.norm_difference == 2**13.5


def test_nothing_as_large_as_the_weights_is_made_of_them():
    x = {name: jax.ShapeDtypeStruct((4, 512, 512), jnp.float32) for name in ("a/layers/b", "c")}
    used = difference._measure.lower(x, x).compile().memory_analysis()
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 0.1 * used.argument_size_in_bytes


def test_on_a_mesh_it_is_the_same(mesh):
    a, b = make(0, vocab_size=64), make(1, vocab_size=64)
    there = mesh(fsdp=2, tensor=2)
    placed = [
        jax.device_put(m.params, jax.tree.map(lambda x: x.sharding, model.abstract_params(m.config, there)))
        for m in (a, b)
    ]
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed[0]))
    for here, spread in zip(difference.norms(a.params, b.params), difference.norms(*placed)):
        for name, row in here.items():
            assert dataclasses.astuple(spread[name])[:6] == pytest.approx(dataclasses.astuple(row)[:6], rel=1e-6)


RUN = {
    "name": "r",
    "step": 10,
    "tokens": 100.0,
    "flops": 5.0,
    "config": {"optimizer": {"learning_rate": 0.1}, "data": {"sources": ["text:a"]}, "model": {"dim": 1}},
    "sources": {"sources": [{"spec": "text:a", "fingerprint": "1", "documents": 3}]},
    "transforms": [],
    "results": {"step": 10, "loss": 2.0, "accuracy": 0.5},
}


def test_configs_data_results_and_cost():
    one = make(0)
    other = {
        **RUN,
        "config": {**RUN["config"], "optimizer": {"learning_rate": 0.2}, "model": {"dim": 2}},
        "sources": {"sources": [{"spec": "text:a", "fingerprint": "2", "documents": 3}]},
        "transforms": ["prune(0.5)"],
        "results": {"step": 20, "loss": 1.5},
        "step": 20,
    }
    found = difference.compare(dataclasses.replace(one, card=RUN), dataclasses.replace(one, card=other))
    assert found.config == {"optimizer.learning_rate": (0.1, 0.2)} and found.sizes == {}
    assert found.data == {"text:a.fingerprint": ("1", "2")} and found.transforms == ((), ("prune(0.5)",))
    assert found.results == {"loss": (2.0, 1.5), "accuracy": (0.5, None)}
    assert found.cost == {"step": (10, 20), "tokens": (100.0, 100.0), "flops": (5.0, 5.0)}
    text = difference_text.told(found)
    for line in ("the same weights", "  optimizer.learning_rate: 0.1 -> 0.2", "  B  prune(0.5)"):
        assert line in text.splitlines()
    (loss,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["loss"]]
    assert loss == ["loss", "2", "1.5", "-0.5"]


def test_the_cost_of_the_run_before_is_not_that_of_what_was_made_of_its_model():
    made = {name: x for name, x in RUN.items() if name not in ("step", "results")}
    one = make(0)
    found = difference.compare(dataclasses.replace(one, card=RUN), dataclasses.replace(one, card=made))
    assert found.cost["flops"] == (5.0, None) and found.results["loss"] == (2.0, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for seed in (0, 1):
        llm_jax.save(make(seed), root / str(seed))
    return root


def run(*arguments: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def test_the_command(saved: Path):
    status, out, err = run("diff", saved / "0", saved / "1")
    assert (status, err) == (0, "") and out.startswith("A  ") and "decoder/layers/2" in out
    assert "results" not in out and "the same weights" not in out
    told = json.loads(run("diff", saved / "0", saved / "1", "--json")[1])
    row = difference.norms(make(0).params, make(1).params)[1]["head"]
    assert told["layers"]["head"] == pytest.approx(dataclasses.asdict(row)) and told["parameters"][0] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a"], "the following arguments are required: b"),
        (["{0}", "{root}/none"], "no such file or folder: {root}/none"),
        (["{0}", "{root}"], "no checkpoint in {root}"),
        (["{0}", "registry:none"], "there is no name in the registry"),
    ],
)
def test_what_a_user_gets_wrong(saved: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_JAX_REGISTRY", raising=False)
    filled = [a.format(saved / "0", root=saved) for a in arguments]
    status, out, err = run("diff", *filled)
    assert (status, out) == (2, "") and err.startswith(f"error: {message.format(root=saved)}") and err.count("\n") == 1
