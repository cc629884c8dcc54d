"""Eight devices give what one gives, of every architecture on every kind of mesh; and the rules of placing."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import config, optim, sharding, step, tree
from llm_jax.errors import ConfigError
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import MaskedToken, NextToken, SequenceToSequence

SIZE = dict(vocab_size=64, max_length=16, layers=2, dim=16, heads=4, mlp_dim=32, dropout=0.0)
MODELS: dict[str, tuple[ModelConfig, Any]] = {
    "decoder": (presets.llama(**SIZE, kv_heads=2, qk_norm=True), NextToken(z_loss=1e-3)),
    "encoder": (presets.bert(**SIZE, head="mlm", pooler="none"), MaskedToken()),
    "encoder-decoder": (
        presets.t5(**{**SIZE, "layers": 1}, decoder_layers=2, head_dim=4, relative_buckets=8, relative_distance=12),
        SequenceToSequence(label_smoothing=0.1),
    ),
}
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=2),
    dict(tensor=4),
    dict(context=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=4, tensor=2),
    dict(data=2, tensor=2, context=2),
    dict(fsdp=2, context=4),
]
SOME = [MESHES[1], MESHES[5], MESHES[7]]


@pytest.fixture(scope="module", autouse=True)
def unoptimised() -> Iterator[None]:
    """Machine code that is not optimised: these programs are compiled once and run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Case(NamedTuple):
    """A model, its batch, and what one device makes of it."""

    config: ModelConfig
    task: Any
    params: Any
    batch: dict[str, np.ndarray]
    grad: Any
    expected: Any


def packed(rng, rows, length, prefix=""):
    """Rows of two examples and padding, cut at another place in each."""
    index, cuts = np.broadcast_to(np.arange(length), (rows, length)), rng.integers(2, length - 3, (rows, 1))
    segments = np.where(index < cuts, 1, np.where(index < length - 2, 2, 0))
    return {
        f"{prefix}tokens": rng.integers(0, 64, (rows, length)).astype(np.int32),
        f"{prefix}segment_ids": segments.astype(np.int32),
        f"{prefix}positions": (index - np.where(segments == 2, cuts, 0)).astype(np.int32),
    }


def make_batch(name, rows=8, length=16):
    rng = np.random.default_rng(0)
    batch = packed(rng, rows, length)
    shape = (rows, length)
    if name == "encoder":
        batch["predict"] = np.sort(rng.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)[:, :3]).astype(np.int32)
        shape = batch["predict"].shape
    if name == "encoder-decoder":
        batch |= packed(rng, rows, 2 * length, "encoder_")
    return batch | {
        "targets": rng.integers(0, 64, shape).astype(np.int32),
        "weights": rng.random(shape).astype(np.float32),
    }


def random_params(sizes):
    """Weights none of which is zero or one."""
    rng = np.random.default_rng(1)
    return tree.map_with_name(
        lambda name, x: (name.endswith("scale") + 0.2 * rng.standard_normal(x.shape)).astype(np.float32),
        transformer.shapes(sizes),
    )


@functools.cache
def case(name):
    sizes, task = MODELS[name]
    params, batch = random_params(sizes), make_batch(name)
    grad = step.differentiate(task.loss(sizes))
    expected = jax.jit(lambda params, batch: grad(params, batch, jax.random.key(0), {}))(params, batch)
    return Case(sizes, task, params, batch, grad, jax.device_get(expected))


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(found), expected)


@pytest.mark.parametrize(
    "name, sizes",
    [
        *(("decoder", sizes) for sizes in MESHES),
        *(("encoder", sizes) for sizes in SOME),
        *(("encoder-decoder", sizes) for sizes in (*SOME, MESHES[3])),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_those_of_one_device(name, sizes, mesh):
    c, devices = case(name), mesh(**sizes)
    loss, gradient = on_mesh(c, devices, c.grad)
    assert len(jax.tree.leaves(gradient)[0].sharding.device_set) == devices.size
    close((loss, gradient), c.expected)
    assert float(loss.total) > 0 and max(np.abs(g).max() for g in jax.tree.leaves(c.expected[1])) > 0.1


def test_scanned_layers_on_a_mesh(mesh, monkeypatch):
    """The form that accelerators take, with layers computed again in the backward pass, gives the same."""
    c, devices = case("decoder"), mesh(data=2, fsdp=2, tensor=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    grad = step.differentiate(c.task.loss(c.config.replace(dtype="float32", remat="full")))
    close(on_mesh(c, devices, grad), c.expected)


def on_mesh(c, devices, grad):
    """The loss and the gradient of a case, its weights and its batch laid out over a mesh."""
    placed = sharding.params_shardings(devices, transformer.axes(c.config), transformer.shapes(c.config))
    with jax.set_mesh(devices):
        params, batch = jax.device_put(c.params, placed), sharding.put(c.batch, devices)
        program = jax.jit(
            lambda params, batch: grad(params, batch, jax.random.key(0), {}), out_shardings=(None, placed)
        )
        return program(params, batch)


@pytest.mark.parametrize(
    "rates", [dict(dropout=0.3), dict(lora_rank=2, lora_targets=(".*",), lora_dropout=0.3)], ids=["all", "factors"]
)
def test_dropout_is_the_same_on_every_mesh(mesh, rates):
    """What is dropped depends on the key and the place in the global batch, not on the device that holds it."""
    sizes, task = MODELS["decoder"]
    sizes, batch, devices = (
        sizes.replace(layers=1, **rates),
        make_batch("decoder"),
        mesh(data=2, tensor=2, context=2),
    )
    loss, params = task.loss(sizes), random_params(sizes)
    program = jax.jit(lambda params, batch, key: loss(params, batch, key, {}).total)
    expected, other = (float(program(params, batch, jax.random.key(seed))) for seed in (3, 4))
    with jax.set_mesh(devices):
        found = float(program(params, sharding.put(batch, devices), jax.random.key(3)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(expected - other) > 1e-2


def test_an_update_equals_that_of_one_device(mesh):
    """AdamW with decay and clipping, through the step that training takes; params and moments keep their places."""
    c, devices = case("decoder"), mesh(data=2, fsdp=2, tensor=2)
    shapes, axes = transformer.shapes(c.config), transformer.axes(c.config)
    settings = config.Optimizer(
        name="adamw", learning_rate=1e-2, weight_decay=0.1, arguments=(("eps", 1e-5),), clip=0.5
    )
    optimizer = optim.make_optimizer(settings, lambda _: jnp.ones(()), shapes, axes)
    update = step.make_step(c.task.loss(c.config), c.grad, optimizer)
    begin = jax.jit(lambda params: step.init_state(params, optimizer, jax.random.key(0)))
    state, metrics = jax.jit(update)(begin(c.params), c.batch)
    expected, metrics = jax.device_get(((state.params, state.opt_state), metrics))
    placed = sharding.state_shardings(
        devices, jax.eval_shape(begin, shapes), shapes, sharding.params_shardings(devices, axes, shapes)
    )
    with jax.set_mesh(devices):
        state = jax.device_put(begin(c.params), placed)
        state, found = jax.jit(update, out_shardings=(placed, None), donate_argnums=0)(
            state, sharding.put(c.batch, devices)
        )
    close((state.params, state.opt_state), expected)
    close(found, metrics)
    moved = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(c.params)))
    assert moved > 0.005 and int(state.step) == 1
    assert jax.tree.map(lambda x: x.sharding.spec, state.params) == jax.tree.map(lambda s: s.spec, placed.params)


def test_layout_of_the_weights(mesh):
    """Width over fsdp; heads, neurons and vocabulary over tensor; each device holds a part of every large weight."""
    sizes = MODELS["decoder"][0]
    placed = sharding.params_shardings(mesh(fsdp=2, tensor=2), transformer.axes(sizes), transformer.shapes(sizes))
    block = placed["decoder"]["layers"]
    assert placed["embed"]["tokens"].spec == P("tensor", "fsdp") == placed["head"]["kernel"].spec
    assert block["attention"]["query"].spec == P(None, "fsdp", "tensor", None)
    assert block["attention"]["out"].spec == P(None, "tensor", None, "fsdp")
    assert block["mlp"]["up"].spec == P(None, "fsdp", "tensor") and block["mlp"]["down"].spec == P(
        None, "tensor", "fsdp"
    )
    assert block["attention_norm"]["scale"].spec == P(None, None)


def test_an_axis_that_does_not_divide_is_whole(mesh):
    """Two key-value heads over four devices: each device has both."""
    devices = mesh(tensor=4)
    assert sharding.fitted(devices, ("layers", "embed", "kv", "head_size"), (2, 16, 2, 4)).spec == P(
        None, "fsdp", None, None
    )
    assert sharding.fitted(devices, ("layers", "embed", "kv", "head_size"), (2, 16, 4, 4)).spec == P(
        None, "fsdp", "tensor", None
    )


def test_a_mesh_axis_is_used_once():
    assert sharding.spec(("heads", "mlp")) == P("tensor", None)
    assert sharding.spec(("batch", "embed")) == P(("data", "fsdp"), None)
    assert sharding.spec(("embed", "batch")) == P("fsdp", "data")


def test_moments_lie_like_their_parameters(mesh):
    """By the end of their path; counters and what has another shape are whole on each device."""
    devices, sizes = mesh(data=2, fsdp=2, tensor=2), MODELS["decoder"][0]
    shapes = transformer.shapes(sizes)
    params = sharding.params_shardings(devices, transformer.axes(sizes), shapes)

    def placed(optimizer):
        begin = functools.partial(step.init_state, optimizer=optimizer, key=jax.random.key(0))
        return sharding.state_shardings(devices, jax.eval_shape(begin, shapes), shapes, params)

    state = placed(optax.chain(optax.clip(1.0), optax.adamw(1e-3)))
    adam = state.opt_state[1][0]
    assert state.params == params == adam.mu == adam.nu
    assert adam.count.spec == state.step.spec == state.key.spec == P()
    factored = placed(optax.adafactor(1e-3)).opt_state[0]
    assert factored.v == params, "moments that are too small to be factored"
    assert {x.spec for x in jax.tree.leaves((factored.v_row, factored.v_col))} == {P()}


def test_make_mesh(mesh):
    assert dict(mesh(data=2, fsdp=2, tensor=2).shape) == dict(data=2, fsdp=2, tensor=2, context=1)
    assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1, context=1)
    assert dict(sharding.make_mesh(config.Mesh(data=2, fsdp=-1, tensor=2)).shape) == dict(
        data=2, fsdp=2, tensor=2, context=1
    )
    assert sharding.make_mesh().axis_types == (jax.sharding.AxisType.Auto,) * 4


class Sliced(NamedTuple):
    """A device of a TPU slice, as far as the order of a mesh goes."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "none that jax knows"
    process_index: int = 0


def test_slices_lie_along_the_axis_data():
    """Devices of two slices, told in any order: data goes over the slices first; each place along it holds devices of one slice alone."""
    devices = [Sliced(i, i % 2, (i // 2 % 2, i // 4, 0)) for i in range(8)]
    found = sharding.over_slices((4, 2, 1, 1), 2, devices)
    assert found.shape == (4, 2, 1, 1) and {x.id for x in found.flat} == set(range(8))
    assert [{x.slice_index for x in part.flat} for part in found] == [{0}, {0}, {1}, {1}]
    assert sharding.mesh_shape(config.Mesh(data=-1, fsdp=2), 8, 2) == (4, 2, 1, 1)
    with pytest.raises(ConfigError, match=r"mesh.data is 1: it must be a multiple of the 2 slices"):
        sharding.make_mesh(config.Mesh(data=1, fsdp=8), devices)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            dict(data=3),
            "mesh (data=3, fsdp=1, tensor=1, context=1) does not divide the 8 devices: its sizes multiply to 3",
        ),
        (
            dict(data=2, tensor=2),
            "mesh (data=2, fsdp=1, tensor=2, context=1) does not divide the 8 devices: its sizes multiply to 4",
        ),
        (
            dict(tensor=3),
            "mesh (data=-1, fsdp=1, tensor=3, context=1) does not divide the 8 devices: its sizes multiply to 3",
        ),
        (
            dict(fsdp=16),
            "mesh (data=-1, fsdp=16, tensor=1, context=1) does not divide the 8 devices: its sizes multiply to 16",
        ),
    ],
)
def test_a_mesh_that_does_not_divide(sizes, message):
    with pytest.raises(ConfigError) as told:
        sharding.make_mesh(config.Mesh(**sizes))
    assert str(told.value) == message


def test_a_batch_that_does_not_divide(mesh):
    devices = mesh(data=2, fsdp=2, context=2)
    sharding.check_batch(devices, 8, 16)
    with pytest.raises(ConfigError) as told:
        sharding.check_batch(devices, 6, 16)
    assert str(told.value) == "6 rows do not divide over the 4 devices of mesh axes data and fsdp"
    with pytest.raises(ConfigError) as told:
        sharding.check_batch(devices, 8, 15)
    assert str(told.value) == "rows of 15 tokens do not divide over the 2 devices of mesh axis context"


def test_put(mesh):
    """Rows over data and fsdp, tokens over context where they divide, the values as they were."""
    devices = mesh(data=2, fsdp=2, context=2)
    batch = {"tokens": np.arange(64).reshape(8, 8), "predict": np.arange(24).reshape(8, 3), "label": np.arange(8)}
    placed = sharding.put(batch, devices)
    assert {name: x.sharding.spec for name, x in placed.items()} == {
        "tokens": P(("data", "fsdp"), "context"),
        "predict": P(("data", "fsdp"), None),
        "label": P(("data", "fsdp")),
    }
    for name, x in batch.items():
        np.testing.assert_array_equal(placed[name], x)


def test_constrain_without_a_mesh_is_the_identity(mesh):
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "length") is x
    with jax.set_mesh(mesh()):
        assert sharding.constrain(x, "batch", "length") is x
    with jax.set_mesh(mesh(data=4, context=2)):
        assert jax.jit(lambda x: sharding.constrain(x, "batch", "length"))(x).sharding.spec == P("data", "context")
