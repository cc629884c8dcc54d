"""Every optimizer by name; the common ones against NumPy from their papers; schedules against their formulas; decay,
multipliers, clipping.
"""

import functools
import inspect
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import optim, tree
from llm_jax.config import Optimizer, Schedule
from llm_jax.errors import ConfigError
from llm_jax.losses import Loss
from llm_jax.models import presets, transformer
from llm_jax.step import differentiate, init_state, make_step
from llm_jax.tasks import NextToken
from llm_jax.transforms.freeze import freeze

FAST = {"xla_backend_optimization_level": 0}
"""Compile fast rather than to be fast: these functions run twice."""
CONSTANT = Schedule(name="constant")
SHAPES: dict[str, Any] = {
    "embed": {"tokens": (7, 4)},
    "decoder": {
        "layers": {"attention": {"query": (2, 4, 2, 3)}, "attention_norm": {"scale": (2, 4)}},
        "norm": {"scale": (4,)},
    },
    "head": {"kernel": (7, 4)},
}
AXES: dict[str, Any] = {
    "embed": {"tokens": ("vocab", "embed")},
    "decoder": {
        "layers": {
            "attention": {"query": ("layers", "embed", "heads", "head_size")},
            "attention_norm": {"scale": ("layers", "hidden")},
        },
        "norm": {"scale": ("hidden",)},
    },
    "head": {"kernel": ("vocab", "embed")},
}
MATRICES = {"decoder/layers/attention/query", "head/kernel"}


def drawn(seed: int, shapes: Any = SHAPES) -> Any:
    """Normal values at each leaf."""

    def one(path: Any, shape: Any) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(tree.path_name(path).encode())])
        return rng.standard_normal(shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def named(params: Any) -> dict[str, np.ndarray]:
    """The leaves by path, in float64."""
    return {name: np.asarray(x, np.float64) for name, x in zip(tree.names(params), jax.tree.leaves(params))}


def optimizer_of(
    chosen: Optimizer, schedule: Schedule = CONSTANT, steps: int = 10, axes: Any = AXES, shapes: Any = None
) -> Any:
    shapes = jax.eval_shape(lambda: drawn(0)) if shapes is None else shapes
    return optim.make_optimizer(chosen, optim.make_schedule(schedule, steps), shapes, axes)


def quadratic(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
    """3 |params - batch|^2 / 2 over a weight of 3: the gradient of the mean is params - batch."""
    total = sum(jnp.sum((x - batch[name]) ** 2) for name, x in zip(tree.names(params), jax.tree.leaves(params)))
    return Loss(1.5 * total, jnp.asarray(3.0), {})


def descend(
    chosen: Optimizer, steps: int = 3, schedule: Schedule = CONSTANT, total: int = 10
) -> tuple[list[Any], list[Any]]:
    """(params before and after each step, gradient of each step), by leaf; the target moves at each step."""
    optimizer = optimizer_of(chosen, schedule, total)
    state = init_state(drawn(0), optimizer, jax.random.key(0))
    step = jax.jit(make_step(quadratic, differentiate(quadratic), optimizer), compiler_options=FAST)
    params, gradients = [named(state.params)], []
    for i in range(steps):
        target = dict(zip(tree.names(drawn(0)), jax.tree.leaves(drawn(i + 1))))
        gradients.append({name: x - target[name] for name, x in params[-1].items()})
        state, metrics = step(state, target)
        assert int(metrics["skipped"]) == 0
        params.append(named(state.params))
    return params, gradients


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=rtol, atol=rtol, err_msg=name)


# Every optimizer


def natural_rate(name: str) -> float:
    """The learning rate that the optimizer has by default: 1 for those that find their own."""
    default = next(
        p.default for rate, p in inspect.signature(optim.optimizers()[name]).parameters.items() if rate in optim.RATES
    )
    return default if isinstance(default, float) else 0.01


@pytest.mark.parametrize("name", sorted(optim.optimizers()))
def test_every_optimizer_takes_two_steps(name):
    """Through the run's own step, with clipping, decay and a part frozen; all that is trained changes and stays finite,
    no more.
    """
    settings = Optimizer(name=name, learning_rate=natural_rate(name), weight_decay=0.01)
    frozen = [] if name in optim.WHOLE else ["decoder/norm/.*"]
    change = freeze(frozen)
    optimizer = change.update(optimizer_of(settings))
    before = drawn(0)
    step = jax.jit(make_step(quadratic, change.grad(differentiate(quadratic)), optimizer), compiler_options=FAST)
    state = jax.jit(lambda params: init_state(params, optimizer, jax.random.key(0)), compiler_options=FAST)(before)
    for i in range(2):
        state, metrics = step(state, dict(zip(tree.names(before), jax.tree.leaves(drawn(i + 1)))))
    assert int(metrics["skipped"]) == 0 and int(state.step) == 2
    after = optim.eval_params(state.opt_state, state.params)
    for params in (state.params, after):
        for (path, new), old in zip(named(params).items(), named(before).values()):
            assert np.isfinite(new).all(), path
            assert (new == old).all() == (bool(frozen) and path == "decoder/norm/scale"), path
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail("another shape or dtype"),
        state.params,
        before,
    )


def test_all_of_optax_that_takes_a_learning_rate_alone():
    """What is left out is left out for the reason that the docstring gives."""
    known = optim.optimizers()
    assert {
        "sgd",
        "adam",
        "adagrad",
        "adamw",
        "adafactor",
        "lion",
        "muon",
        "lbfgs",
        "polyak_sgd",
        "prodigy",
        "schedule_free_adamw",
    } <= set(known)
    takes = {
        name
        for module in (optax, optax.contrib)
        for name, f in vars(module).items()
        if inspect.isfunction(f) and set(inspect.signature(f).parameters) & set(optim.RATES)
    }
    left_out = takes - set(known)
    assert {name for name in left_out if not name.startswith(("scale_by_", "_"))} == {"dpsgd", "schedule_free"}
    assert all(name in (optim.optimizers.__doc__ or "") for name in ("dpsgd", "schedule_free", "scale_by_"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(name="adamm"), "unknown optimizer 'adamm'; did you mean 'adam'?"),
        (
            dict(name="galore", freeze=("head/.*",)),
            "optimizer 'galore' cannot leave a part of the params out: optimizer.freeze must be empty",
        ),
        (
            dict(name="dpsgd"),
            "optimizer 'dpsgd' cannot be used by its name: it needs l2_norm_clip, noise_multiplier, seed too",
        ),
        (
            dict(name="schedule_free"),
            "optimizer 'schedule_free' cannot be used by its name: it needs base_optimizer too",
        ),
        (dict(name="sam"), "optimizer 'sam' cannot be used by its name: it needs optimizer, adv_optimizer too"),
        (dict(name="adam", arguments=(("b_1", 0.9),)), "optimizer 'adam' has no argument 'b_1'; did you mean 'b1'?"),
        (
            dict(name="adam", arguments=(("learning_rate", 0.9),)),
            "optimizer.arguments has 'learning_rate': set optimizer.learning_rate instead",
        ),
        (
            dict(name="adamw", arguments=(("weight_decay", 0.9),)),
            "optimizer.arguments has 'weight_decay': set optimizer.weight_decay instead",
        ),
        (
            dict(name="prodigy", arguments=(("betas", 0.9),)),
            "optimizer.arguments has 'betas', which is not a number but (0.9, 0.999) in optimizer 'prodigy'",
        ),
        (
            dict(multipliers=(("embed/token", 0.5),)),
            "optimizer.multipliers 'embed/token' matches no parameter; did you mean 'embed/tokens'?",
        ),
        (
            dict(multipliers=(("embed", 0.5),)),
            "optimizer.multipliers 'embed' matches no parameter; known: decoder/layers/attention/query, "
            "decoder/layers/attention_norm/scale, decoder/norm/scale, embed/tokens, head/kernel",
        ),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        optimizer_of(Optimizer(**settings))
    assert str(error.value) == message


def test_arguments_that_the_optimizer_itself_refuses():
    with pytest.raises(ConfigError, match=r"^optimizer 'adam' does not take these arguments: .*'3'.*type"):
        optimizer_of(Optimizer(name="adam", arguments=(("mu_dtype", 3.0),)))


def test_arguments_have_the_type_that_is_declared():
    made = optim._arguments(
        Optimizer(
            name="adafactor",
            arguments=(("min_dim_size_to_factor", 2.0), ("factored", 0.0), ("decay_rate", 1.0), ("momentum", 0.5)),
        ),
        optax.adafactor,
    )
    assert made == dict(min_dim_size_to_factor=2, factored=False, decay_rate=1.0, momentum=0.5)
    assert [type(x) for x in made.values()] == [int, bool, float, float]


# The common ones, from their papers

RATE = 0.1


def test_sgd():
    params, gradients = descend(Optimizer(name="sgd", learning_rate=RATE, clip=0.0))
    for before, g, after in zip(params, gradients, params[1:]):
        close(after, {name: before[name] - RATE * g[name] for name in g})


def adam_updates(gradients: list[Any], b1: float, b2: float, eps: float = 1e-8) -> list[Any]:
    """m / (sqrt(v) + eps) with both moments corrected for their start at zero (Kingma and Ba 2015, algorithm 1)."""
    m = v = dict.fromkeys(gradients[0], 0.0)
    made = []
    for t, g in enumerate(gradients, 1):
        m = {n: b1 * m[n] + (1 - b1) * g[n] for n in g}
        v = {n: b2 * v[n] + (1 - b2) * g[n] ** 2 for n in g}
        made.append({n: m[n] / (1 - b1**t) / (np.sqrt(v[n] / (1 - b2**t)) + eps) for n in g})
    return made


def test_adam():
    params, gradients = descend(
        Optimizer(name="adam", learning_rate=RATE, clip=0.0, arguments=(("b1", 0.8), ("b2", 0.95)))
    )
    for before, u, after in zip(params, adam_updates(gradients, 0.8, 0.95), params[1:]):
        close(after, {name: before[name] - RATE * u[name] for name in u})


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adamw_decays_the_matrices_alone(name):
    """Loshchilov and Hutter 2019: decay apart from the gradient. A rule without a decay of its own gets the same."""
    params, gradients = descend(Optimizer(name=name, learning_rate=RATE, weight_decay=0.3, clip=0.0))
    for before, u, after in zip(params, adam_updates(gradients, 0.9, 0.999), params[1:]):
        close(
            after,
            {
                path: before[path] - RATE * (x + (0.3 * before[path] if path in MATRICES else 0))
                for path, x in u.items()
            },
        )


def test_decay_follows_the_schedule():
    params, gradients = descend(
        Optimizer(name="sgd", learning_rate=RATE, weight_decay=0.5, clip=0.0),
        schedule=Schedule(name="linear", final=0.0),
        total=4,
    )
    for i, (before, g, after) in enumerate(zip(params, gradients, params[1:])):
        rate = RATE * (1 - i / 4)
        close(
            after,
            {
                path: before[path] - rate * (x + (0.5 * before[path] if path in MATRICES else 0))
                for path, x in g.items()
            },
        )


def test_adagrad():
    """Duchi, Hazan and Singer 2011, with optax's sum of squares that begins at 0.1."""
    params, gradients = descend(Optimizer(name="adagrad", learning_rate=RATE, clip=0.0))
    squares = dict.fromkeys(gradients[0], 0.1)
    for before, g, after in zip(params, gradients, params[1:]):
        squares = {name: squares[name] + x**2 for name, x in g.items()}
        close(after, {name: before[name] - RATE * g[name] / np.sqrt(squares[name] + 1e-7) for name in g})


def test_lion():
    """Chen et al. 2023, algorithm 2: the sign of an interpolation, decoupled decay."""
    params, gradients = descend(Optimizer(name="lion", learning_rate=RATE, weight_decay=0.3, clip=0.0))
    m = dict.fromkeys(gradients[0], 0.0)
    for before, g, after in zip(params, gradients, params[1:]):
        close(
            after,
            {
                n: before[n] - RATE * (np.sign(0.9 * m[n] + 0.1 * g[n]) + (0.3 * before[n] if n in MATRICES else 0))
                for n in g
            },
        )
        m = {n: 0.99 * m[n] + 0.01 * g[n] for n in g}


def test_adafactor():
    """Shazeer and Stern 2018, algorithm 4: a matrix's second moment is the product of those of its rows and columns;
    relative step sizes.
    """
    params, gradients = descend(
        Optimizer(name="adafactor", learning_rate=RATE, clip=0.0, arguments=(("min_dim_size_to_factor", 2),))
    )
    rows, columns, whole = 0.0, 0.0, 0.0

    def apply(before, u):
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        return before - RATE * max(1e-3, np.sqrt(np.mean(before**2))) * u

    for t, (before, g, after) in enumerate(zip(params, gradients, params[1:]), 1):
        decay = 1 - t**-0.8
        square = g["head/kernel"] ** 2 + 1e-30
        rows, columns = decay * rows + (1 - decay) * square.mean(1), decay * columns + (1 - decay) * square.mean(0)
        u = g["head/kernel"] / np.sqrt(np.outer(rows, columns) / rows.mean())
        np.testing.assert_allclose(after["head/kernel"], apply(before["head/kernel"], u), rtol=1e-5, atol=1e-6)
        whole = decay * whole + (1 - decay) * g["decoder/norm/scale"] ** 2
        u = g["decoder/norm/scale"] / np.sqrt(whole)
        np.testing.assert_allclose(
            after["decoder/norm/scale"], apply(before["decoder/norm/scale"], u), rtol=1e-5, atol=1e-6
        )


MUON = presets.llama(
    vocab_size=31,
    max_length=16,
    layers=2,
    dim=16,
    heads=2,
    kv_heads=1,
    head_dim=6,
    mlp_dim=24,
    bias="all",
    qk_norm=True,
)
INPUTS = {
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/out": 2,
    "mlp/gate": 1,
    "mlp/up": 1,
    "mlp/down": 1,
}
"""Axes that a product sums over, after that of the layers, by the formulas of attention and MLP."""


def test_muon_orthogonalises_each_matrix():
    """The first update of a product's kernel, as a matrix from all it sums over to all it makes, is nearly the
    gradient's polar factor (Jordan 2024), in each layer by itself; everything else is left to Adam.
    """
    shapes, axes = transformer.shapes(MUON), transformer.axes(MUON)
    gradient = drawn(1, jax.tree.map(lambda x: x.shape, shapes))
    params = drawn(0, jax.tree.map(lambda x: x.shape, shapes))

    def update(name, arguments=()):
        optimizer = optimizer_of(
            Optimizer(name=name, learning_rate=1.0, clip=0.0, arguments=arguments), axes=axes, shapes=shapes
        )
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0], compiler_options=FAST)(
            gradient, params
        )

    made, adam, left = named(update("muon")), named(update("adam", (("nesterov", 1),))), set()
    for name, g in named(gradient).items():
        short = name.removeprefix("decoder/layers/")
        if short not in INPUTS:
            np.testing.assert_allclose(made[name], adam[name], rtol=1e-6, err_msg=name)
            left.add(short)
            continue
        for layer in range(2):
            fan_in = math.prod(g.shape[1 : 1 + INPUTS[short]])
            u, _, v = np.linalg.svd(g[layer].reshape(fan_in, -1), full_matrices=False)
            step = made[name][layer].reshape(fan_in, -1)
            scale = math.sqrt(max(1.0, step.shape[1] / fan_in))
            inside = -(u.T @ step @ v.T) / scale
            assert np.diag(inside).min() > 0.6 and np.diag(inside).max() < 1.3, (name, np.diag(inside))
            assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4, name
            np.testing.assert_allclose(np.linalg.norm(step), np.linalg.norm(np.diag(inside)) * scale, rtol=1e-5)
    assert {"embed/tokens", "head/kernel", "decoder/norm/scale", "attention/query_bias", "attention_norm/scale"} <= left
    assert not any("bias" not in name and "scale" not in name for name in left - {"embed/tokens", "head/kernel"}), left


# What decays, multipliers, clipping


def test_what_decays():
    """Products, and nothing else: written out for families with biases and with a table of relative positions."""

    def found(config):
        return {name for name in tree.names(transformer.shapes(config)) if optim.decayed(name)}

    size = dict(vocab_size=31, max_length=16, layers=1, dim=8, heads=2)
    layer = {f"attention/{x}" for x in ("query", "key", "value", "out")} | {"mlp/up", "mlp/down"}
    assert found(presets.bert(**size, head="mlm")) == {f"encoder/layers/{x}" for x in layer} | {
        "head/dense",
        "head/pooler",
    }
    cross = layer | {f"cross/{x}" for x in ("query", "key", "value", "out")}
    assert found(presets.t5(**size)) == {f"encoder/layers/{x}" for x in layer} | {f"decoder/layers/{x}" for x in cross}
    assert found(presets.llama(**size)) == {f"decoder/layers/{x}" for x in layer} | {
        "decoder/layers/mlp/gate",
        "head/kernel",
    }


def updates(chosen: Optimizer, gradient: Any) -> Any:
    optimizer = optimizer_of(chosen)
    return optimizer.update(gradient, optimizer.init(drawn(0)), drawn(0))[0]


def test_multipliers_scale_the_update_exactly_and_the_first_match_counts():
    g = drawn(1)
    multipliers = (("embed/.*", 0.5), (".*/query", 0.0), (".*", 2.0))
    for name in ("sgd", "adamw"):
        plain = named(updates(Optimizer(name=name, weight_decay=0.1), g))
        scaled = named(updates(Optimizer(name=name, weight_decay=0.1, multipliers=multipliers), g))
        for path, x in plain.items():
            factor = {"embed/tokens": 0.5, "decoder/layers/attention/query": 0.0}.get(path, 2.0)
            assert (scaled[path] == factor * x).all() and x.any(), path
    some = named(updates(Optimizer(name="sgd", multipliers=(("embed/.*", 0.5),)), g))
    assert all(
        (some[path] == x * (0.5 if path == "embed/tokens" else 1)).all()
        for path, x in named(updates(Optimizer(name="sgd"), g)).items()
    )


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_clipping_by_the_global_norm(clip):
    g = drawn(1)
    norm = math.sqrt(sum((x**2).sum() for x in named(g).values()))
    factor = min(1.0, clip / norm) if clip else 1.0
    close(
        named(updates(Optimizer(name="sgd", learning_rate=1.0, clip=clip), g)),
        {path: -factor * x for path, x in named(g).items()},
    )


# Schedules


def factors(schedule: Schedule, steps: int, at: list[int]) -> list[float]:
    return np.asarray(jax.vmap(optim.make_schedule(schedule, steps))(jnp.array(at, jnp.int32))).tolist()


def half_cosine(t: float) -> float:
    return (1 + math.cos(math.pi * t)) / 2


FORMULAS = [
    (Schedule(name="constant"), {0: 1, 50: 1, 100: 1, 500: 1}),
    (Schedule(name="constant", warmup=10, initial=0.2), {0: 0.2, 5: 0.6, 10: 1, 99: 1}),
    (Schedule(name="cosine", final=0.1), {0: 1, 25: 0.1 + 0.9 * half_cosine(0.25), 50: 0.55, 100: 0.1, 500: 0.1}),
    (
        Schedule(name="cosine", warmup=10, final=0.1),
        {0: 0, 1: 0.1, 9: 0.9, 10: 1, 55: 0.55, 99: 0.1 + 0.9 * half_cosine(89 / 90), 100: 0.1},
    ),
    (Schedule(name="linear", warmup=20, final=0.0), {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0, 101: 0}),
    (Schedule(name="linear", final=0.4), {0: 1, 50: 0.7, 100: 0.4}),
    (Schedule(name="inverse_sqrt", warmup=10), {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3}),
    (Schedule(name="inverse_sqrt"), {0: 1, 1: 1, 4: 0.5, 100: 0.1}),
    (
        Schedule(name="wsd", warmup=10, decay=0.2, final=0.1),
        {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 1 - 0.9 * math.sqrt(0.5), 95: 1 - 0.9 * math.sqrt(0.75), 100: 0.1},
    ),
    (Schedule(name="wsd", decay=1.0, final=0.0), {0: 1, 25: 0.5, 100: 0}),
    (Schedule(name="wsd", decay=0.0), {0: 1, 99: 1, 100: 1}),
    # re-warmed from 0.3, and again at each cycle from the end of the one before
    (
        Schedule(name="cosine", warmup=10, initial=0.3, final=0.1, cycles=2),
        {
            0: 0.3,
            5: 0.65,
            10: 1,
            30: 0.55,
            49: 0.1 + 0.9 * half_cosine(39 / 40),
            50: 0.1,
            55: 0.55,
            60: 1,
            80: 0.55,
            100: 0.1,
            120: 0.1,
        },
    ),
    (Schedule(name="linear", cycles=4, final=0.0), {0: 1, 24: 0.04, 25: 1, 50: 1, 75: 1, 99: 0.04, 100: 0}),
    (
        Schedule(name="wsd", warmup=5, decay=0.5, final=0.0, cycles=2),
        {24: 1, 25: 1, 37: 1 - math.sqrt(0.48), 50: 0, 55: 1, 75: 1, 100: 0},
    ),
    (Schedule(name="inverse_sqrt", warmup=10, cycles=2, final=0.2), {40: 0.5, 50: 0.2, 55: 0.6, 60: 1, 90: 0.5}),
    (Schedule(name="constant", warmup=1000, initial=0.5), {0: 0.5, 50: 0.75, 99: 0.995}),
]


@pytest.mark.parametrize(
    "schedule, expected", FORMULAS, ids=lambda x: f"{x.name}-{x.warmup}-{x.cycles}" if isinstance(x, Schedule) else ""
)
def test_schedules(schedule, expected):
    np.testing.assert_allclose(factors(schedule, 100, list(expected)), list(expected.values()), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["constant", "cosine", "linear", "inverse_sqrt", "wsd"]),
    steps=st.integers(0, 60),
    warmup=st.integers(0, 80),
    decay=st.floats(0, 1),
    initial=st.floats(0, 1),
    final=st.floats(0, 1),
    cycles=st.integers(1, 4),
)
def test_a_schedule_rises_then_falls(name, steps, warmup, decay, initial, final, cycles):
    schedule = Schedule(name=name, warmup=warmup, decay=decay, initial=initial, final=final, cycles=cycles)
    function = optim.make_schedule(schedule, steps)
    length = max(1, steps // cycles)
    found = np.asarray(function(np.arange(64)))[: length * cycles]
    assert found.shape == (length * cycles,) and ((found >= -1e-6) & (found <= 1 + 1e-6)).all()
    for cycle, part in enumerate(found.reshape(cycles, length)):
        rising, falling = part[: min(warmup, length)], part[min(warmup, length) :]
        assert (np.diff(rising) >= -1e-6).all() and (np.diff(falling) <= 1e-6).all()
        if len(rising):
            assert rising[0] == pytest.approx(initial if cycle == 0 else final, abs=1e-6)
        if len(falling):
            assert falling[0] == pytest.approx(1, abs=1e-6) or (name == "wsd" and warmup > length * (1 - decay))


def test_step_k_is_taken_at_the_schedule_of_k():
    params, gradients = descend(
        Optimizer(name="sgd", learning_rate=RATE, clip=0.0),
        schedule=Schedule(name="linear", warmup=2, final=0.0),
        total=6,
    )
    for factor, before, g, after in zip((0, 0.5, 1), params, gradients, params[1:]):
        close(after, {name: before[name] - RATE * factor * g[name] for name in g})


@pytest.mark.parametrize("name", sorted(optim.UNSCHEDULED))
def test_rules_of_a_fixed_rate_follow_the_schedule_too(name):
    def second(schedule: Schedule) -> dict[str, np.ndarray]:
        optimizer = optimizer_of(Optimizer(name=name, learning_rate=RATE), schedule)

        def twice(g: Any, params: Any) -> Any:
            _, state = optimizer.update(g, optimizer.init(params), params, value=2.0)
            return optimizer.update(g, state, params, value=2.0)[0]

        return named(jax.jit(twice, compiler_options=FAST)(drawn(1), drawn(0)))

    plain = second(CONSTANT)
    assert any(x.any() for x in plain.values())
    close(
        second(Schedule(name="linear", warmup=4, initial=0.25)),
        {path: (0.25 + 0.75 / 4) * x for path, x in plain.items()},
    )


# What the objective is asked again for

DECODER = presets.llama(vocab_size=29, max_length=8, layers=1, dim=8, heads=2, mlp_dim=12)


@functools.cache
def decoder_batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 29, (4, 9)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 8), np.float32)}


@pytest.mark.parametrize("name", [pytest.param("lbfgs", marks=pytest.mark.slow), "sophia"])
def test_rules_that_evaluate_the_objective_themselves(name):
    """A line search, and products with the Hessian, through the model and the chunked loss, with a part of the model
    frozen.
    """
    loss, change = NextToken().loss(DECODER), freeze(["embed/.*"])
    optimizer = change.update(
        optim.make_optimizer(
            Optimizer(name=name, learning_rate=1.0 if name == "lbfgs" else 0.01, clip=0.0),
            optim.make_schedule(CONSTANT, 9),
            transformer.shapes(DECODER),
            transformer.axes(DECODER),
        )
    )
    params = drawn(0, jax.tree.map(lambda x: x.shape, transformer.shapes(DECODER)))
    state = init_state(params, optimizer, jax.random.key(0))
    step = jax.jit(make_step(loss, change.grad(differentiate(loss)), optimizer), compiler_options=FAST)
    losses = []
    for _ in range(3):
        state, metrics = step(state, decoder_batch())
        losses.append(float(metrics["loss"]))
    assert int(state.skipped) == 0 and losses[0] > losses[1] > losses[2]
    assert (np.asarray(state.params["embed"]["tokens"]) == params["embed"]["tokens"]).all()


def test_schedule_free_is_evaluated_at_its_average():
    """Defazio et al. 2024: with a constant rate the weights to evaluate are the mean of the z sequence (eq. 4), beside
    what is frozen.
    """
    change, rate = freeze(["head/.*"]), 0.3
    optimizer = change.update(optimizer_of(Optimizer(name="schedule_free_sgd", learning_rate=rate, clip=0.0)))
    state = init_state(drawn(0), optimizer, jax.random.key(0))
    step = jax.jit(make_step(quadratic, change.grad(differentiate(quadratic)), optimizer), compiler_options=FAST)
    y = z = x = named(drawn(0))
    for i in range(3):
        target = named(drawn(i + 1))
        z = {n: z[n] - rate * (y[n] - target[n]) for n in z}
        x = {n: x[n] + (z[n] - x[n]) / (i + 1) for n in z}
        y = {n: 0.9 * x[n] + 0.1 * z[n] for n in z}
        state, _ = step(state, dict(zip(tree.names(drawn(0)), jax.tree.leaves(drawn(i + 1)))))
    frozen = {"head/kernel": named(drawn(0))["head/kernel"]}
    close(named(state.params), {**y, **frozen}, rtol=1e-5)
    close(named(optim.eval_params(state.opt_state, state.params)), {**x, **frozen}, rtol=1e-5)


def test_without_an_average_the_params_themselves_are_evaluated():
    optimizer = optimizer_of(Optimizer(name="adam"))
    params = drawn(0)
    assert optim.eval_params(optimizer.init(params), params) is params
