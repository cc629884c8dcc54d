"""Merging: each rule against NumPy written from its formula, the laws, and the command."""

import json

import jax
import numpy as np
import pytest

from llm_jax import cli, model, sharding
from llm_jax.errors import ConfigError, UserError
from llm_jax.models import presets, transformer
from llm_jax.transforms import lora, merge
from tests.families import Tiny
from tests.transforms import laws

SIZES = presets.llama(vocab_size=16, max_length=8, layers=2, dim=8, heads=2, kv_heads=1, mlp_dim=16)
METHODS = ["mean", "moving_average", "slerp", "task_vectors", "ties"]


def drawn(seed):
    return jax.tree.map(
        lambda x: np.random.default_rng([seed, x.size]).standard_normal(x.shape).astype(np.float32),
        transformer.shapes(SIZES),
    )


def merged(change, *models):
    return jax.jit(change.params, static_argnums=0)(SIZES, models[0], jax.random.key(0), tuple(models[1:]))


A, B, C = (drawn(seed) for seed in range(3))


def tensors(params):
    """Each weight, those of a stack one by one."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        yield from (x if "layers" in str(path) else [x])


def each_equal(found, formula, *models):
    for y, *x in zip(tensors(found), *map(tensors, models), strict=True):
        np.testing.assert_allclose(y, formula(*[z.astype(np.float64) for z in x]), atol=2e-6)


def test_mean_and_its_weights():
    each_equal(merged(merge(), A, B, C), lambda a, b, c: (a + b + c) / 3, A, B, C)
    each_equal(merged(merge(weights=(1, 0, 3)), A, B, C), lambda a, b, c: (a + 3 * c) / 4, A, B, C)


def test_moving_average():
    def formula(a, b, c):
        return 0.8 * (0.8 * a + 0.2 * b) + 0.2 * c

    each_equal(merged(merge("moving_average", decay=0.8), A, B, C), formula, A, B, C)


def test_slerp():
    def formula(a, b):
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        return (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)

    each_equal(merged(merge("slerp", t=0.3), A, B), formula, A, B)
    doubled = jax.tree.map(lambda x: 2 * x, A)
    each_equal(merged(merge("slerp", t=0.25), A, doubled), lambda a: 1.25 * a, A)


def test_task_vectors():
    each_equal(merged(merge("task_vectors", scale=0.4), A, B, C), lambda a, b, c: a + 0.4 * (b + c - 2 * a), A, B, C)


def test_ties():
    def formula(a, b, c):
        changes = []
        for change in (b - a, c - a):
            count = max(1, round(0.3 * change.size))
            least = np.sort(np.abs(change).ravel())[-count]
            changes.append(np.where(np.abs(change) >= least, change, 0))
        sign = np.sign(sum(changes))
        agree = [np.where((np.sign(x) == sign) & (x != 0), x, np.nan) for x in changes]
        counts = sum(~np.isnan(x) for x in agree)
        return a + 0.5 * sum(np.nan_to_num(x) for x in agree) / np.maximum(counts, 1)

    each_equal(merged(merge("ties", scale=0.5, keep=0.3), A, B, C), formula, A, B, C)


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_models_it_is_that_model_bit_for_bit(method):
    first = laws.with_zeros(Tiny("", SIZES, A)).params
    models = [first, first] if method == "slerp" else [first, first, first]
    laws.equal(merged(merge(method), *models), first)


NOTHING = [
    merge(weights=(1, 0)),
    merge("moving_average", decay=1.0),
    merge("slerp", t=0.0),
    merge("task_vectors", scale=0.0),
    merge("ties", scale=0.0),
]


@pytest.mark.parametrize("change", NOTHING, ids=lambda x: x.label)
def test_at_zero_strength_it_is_the_first_model_bit_for_bit(change):
    first = laws.with_zeros(Tiny("", SIZES, A)).params
    laws.equal(merged(change, first, B), first)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_mesh_it_is_the_same(method, mesh):
    many = mesh(fsdp=2, tensor=2, data=2)
    placed = sharding.params_shardings(many, transformer.axes(SIZES), transformer.shapes(SIZES))
    models = [jax.device_put(x, placed) for x in (A, B)]
    found = merged(merge(method), *models)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), found, merged(merge(method), A, B))


def test_what_does_not_go_together():
    for change, models, said in (
        (merge(), [A], "mean of 1 models: it takes two or more"),
        (merge("slerp"), [A, B, C], "slerp of 3 models: it takes two"),
        (merge(weights=(1, 2)), [A, B, C], "2 weights for 3 models"),
    ):
        with pytest.raises(ConfigError, match=said):
            merged(change, *models)
    for arguments, said in (
        (dict(method="mena"), "unknown method 'mena'; did you mean 'mean'"),
        (dict(weights=(-1, 2)), "must not be negative"),
        (dict(t=1.5), r"t is 1.5: it must lie in \[0, 1\]"),
        (dict(method="ties", weights=(1, 2)), "weights are of the mean: they do not go with ties"),
        (dict(method="ties", keep=0.0), "keep is 0: ties would change nothing"),
        (dict(method="ties", scale=float("nan")), "scale is nan: it must be a finite number"),
        (dict(method="slerp", decay=0.1), "decay is of moving_average: it does not go with slerp"),
        (dict(method="mean", scale=2.0), "scale is of task_vectors and ties: it does not go with mean"),
    ):
        with pytest.raises(ConfigError, match=said):
            merge(**arguments)
    with pytest.raises(UserError, match="there are no models"):
        model.merge([], merge())


def test_factors_are_not_averaged():
    """The product of means is not the mean of products."""
    adapted = model.transform(model.Model(SIZES, jax.device_put(A)), lora(2), jax.random.key(0))
    with pytest.raises(UserError, match=r"have factors of low rank beside their weights: fold them in with merge_lora"):
        model.merge([adapted, adapted], merge())


def test_the_command(tmp_path, capsys):
    for name, params in (("a", A), ("b", B)):
        model.save(model.Model(SIZES, jax.device_put(params)), tmp_path / name)
    other = SIZES.replace(layers=1)
    model.save(model.Model(other, transformer.init(other, jax.random.key(0))), tmp_path / "other")
    paths = [str(tmp_path / name) for name in ("out", "a", "b")]
    assert cli.main(["merge", *paths, "--method=slerp", "--t=0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transform"] == "merge('slerp', t=0.3)"
    made = model.load(tmp_path / "out")
    expected = merged(merge("slerp", t=0.3), A, B)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), made.params, expected)
    parents = [model.load(tmp_path / name).card["hashes"]["params"] for name in ("a", "b")]
    assert made.card["parents"] == parents and made.card["transforms"] == ["merge('slerp', t=0.3)"]
    assert cli.main(["merge", str(tmp_path / "new"), paths[1], str(tmp_path / "other")]) == 2
    assert "has other sizes than" in capsys.readouterr().err and not (tmp_path / "new").exists()
