"""The laws of section 1 of the design, as checks that the tests of each transform apply to every family."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import losses, program, sharding, tree
from llm_jax import model as models
from llm_jax.config import Mesh, Run
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import Classification
from llm_jax.tasks.next_token import vocabulary_loss
from llm_jax.transforms import Transform
from llm_jax.transforms.prune import TARGETS
from tests.families import Tiny, batch_of

FAST = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _logits(config: ModelConfig, params: Any, batch: Any) -> Any:
    found = transformer.apply(config, params, batch)
    return found.hidden if found.logits is None else found.logits


def logits(config: ModelConfig, params: Any) -> np.ndarray:
    """What a model says of the batch of its family, without dropout; its last hidden state where it has no head."""
    return np.asarray(_logits(config, params, batch_of(config)))


def changed(change: Transform, tiny: Tiny, aux: Any = None, seed: int = 0) -> tuple[ModelConfig, Any]:
    """Config and weights after a change."""
    make = jax.jit(change.params, static_argnums=0, compiler_options=FAST)
    return change.config(tiny.config), jax.device_get(make(tiny.config, tiny.params, jax.random.key(seed), aux))


def with_zeros(tiny: Tiny) -> Tiny:
    """The model with zeros in the matrices of its layers: of seven weights one that is pruned, and one that is fresh, -0."""

    def one(name: str, x: np.ndarray) -> np.ndarray:
        place = np.arange(x.size).reshape(x.shape) % 7
        chosen = any(re.fullmatch(regex, name) for regex in TARGETS)
        return np.select([place == 0, place == 3], [0.0, -0.0], x).astype(x.dtype) if chosen else x

    return tiny._replace(params=tree.map_with_name(one, tiny.params))


def equal(found: Any, expected: Any) -> None:
    """Bit for bit: -0 is not 0."""

    def one(path: Any, x: Any, y: Any) -> None:
        np.testing.assert_array_equal(x, y, err_msg=str(path))
        np.testing.assert_array_equal(np.signbit(x), np.signbit(y), err_msg=f"{path}: sign")

    jax.tree_util.tree_map_with_path(one, found, expected)


def gone(x: Any) -> np.ndarray:
    """Where a weight is pruned."""
    return (np.asarray(x) == 0) & ~np.signbit(x)


def same_tree(change: Transform, tiny: Tiny, aux: Any = None) -> None:
    """Law 1: tree, shapes and dtypes are those of a fresh model of the new config."""
    config, params = changed(change, tiny, aux)
    expected = transformer.shapes(config)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert np.isfinite(logits(config, params)).all()


def identity(change: Transform, tiny: Tiny, aux: Any = None) -> None:
    """Law 2: config and weights stay as they are, bit for bit."""
    config, params = changed(change, tiny, aux)
    assert config == tiny.config
    equal(params, tiny.params)


def keeps_function(change: Transform, tiny: Tiny, aux: Any = None, atol: float = 1e-5) -> None:
    """Law 3: the logits stay as they are."""
    config, params = changed(change, tiny, aux)
    before, after = logits(tiny.config, tiny.params), logits(config, params)
    np.testing.assert_allclose(after, before, atol=atol * max(1, float(np.abs(before).max())))


def same_on_mesh(change: Transform, tiny: Tiny, aux: Any = None, atol: float = 1e-6, **sizes: int) -> None:
    """Law 5: on a mesh of 8 devices each weight is what it is on one, and lies where the rules put its name."""
    config, expected = changed(change, tiny, aux)
    mesh = sharding.make_mesh(Mesh(**(sizes or dict(data=2, fsdp=2, tensor=2))))

    def placed(sizes: ModelConfig) -> Any:
        return sharding.params_shardings(mesh, transformer.axes(sizes), transformer.shapes(sizes))

    with jax.set_mesh(mesh):
        start = jax.device_put(tiny.params, placed(tiny.config))
        make = jax.jit(change.params, static_argnums=0, out_shardings=placed(config), compiler_options=FAST)
        made = make(tiny.config, start, jax.random.key(0), aux)
    for (path, x), y, where in zip(
        jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(expected), jax.tree.leaves(placed(config))
    ):
        assert x.sharding.is_equivalent_to(where, x.ndim), path
        np.testing.assert_allclose(x, y, atol=atol, err_msg=str(path))
        np.testing.assert_array_equal(gone(x), gone(y), err_msg=f"{path}: what is pruned")


def objective(config: ModelConfig, rows: int = 3) -> tuple[Any, Any]:
    """The loss of a family's task, and what its batch holds beside the input."""
    batch = batch_of(config, rows)
    rng = np.random.default_rng(1)
    if config.head in ("lm", "mlm"):
        if config.head == "mlm":
            batch["predict"] = rng.integers(0, 4, (rows, 2)).astype(np.int32)
        shape = (rows, 2) if config.head == "mlm" else batch["tokens"].shape
        targets = rng.integers(0, config.vocab_size, shape).astype(np.int32)
        return vocabulary_loss(config, 0.0, 0.0), {
            **batch,
            "targets": targets,
            "weights": rng.random(shape).astype("f"),
        }
    if config.patch_size:
        batch |= {"targets": np.array([0, 1, 2]), "weights": np.ones(3, np.float32)}

        def images(params, batch, key, reference):
            out = transformer.apply(config, params, batch, key=key)
            return losses.class_cross_entropy(out, batch["targets"], batch["weights"])

        return images, batch
    batch["predict"] = np.array([[0, 4], [0, 5], [0, 0]], np.int32)
    batch |= {"targets": np.array([[0, 1], [2, 0], [1, 1]]), "weights": np.array([[1, 1], [1, 1], [1, 0]], np.float32)}
    return Classification(labels=("a", "b", "c")).loss(config), batch


def trained(run: Run, tiny: Tiny, batch: Any, mesh: Any, steps: int = 2) -> tuple[Any, Any]:
    """The state, and the metrics of the last step, of a run from the model's weights that reads the same batch in each step."""
    made = program.make(run, mesh)
    rows = sharding.put(made.change.rows(batch, {}), mesh)
    with jax.set_mesh(mesh):
        begin = jax.jit(made.init, out_shardings=made.shardings._replace(reference={}), compiler_options=FAST)
        state = begin(jax.random.key(0), tiny.params, None)
        others = {name: x.params for name, x in made.change.reference.items()}
        state = state._replace(reference=jax.device_put(others, made.shardings.reference))
        step = made.step.lower(state, rows).compile(compiler_options=FAST)
        for _ in range(steps):
            state, metrics = step(state, rows)
    return state, metrics


def comes_back(change: Transform, tiny: Tiny, folder: Path, aux: Any = None) -> models.Model:
    """Law 6, the first half: saved and restored, the changed model is the same; the restored model is returned."""
    made = models.transform(models.Model(tiny.config, tiny.params), change, jax.random.key(0), aux)
    models.save(made, folder / "model")
    again = models.load(folder / "model")
    assert again.config == made.config
    equal(again.params, made.params)
    assert again.card["transforms"][-1] == change.label
    return again
