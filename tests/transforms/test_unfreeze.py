"""Depth below the head: layer-wise rates and gradual unfreezing."""

import functools

import jax
import numpy as np
import optax
import pytest

from llm_jax import config, optim
from llm_jax.errors import ConfigError
from llm_jax.models import presets, transformer
from llm_jax.transforms import chain, prune, unfreeze
from llm_jax.transforms.base import moved

SIZE = dict(vocab_size=11, max_length=8, dim=8, heads=2, mlp_dim=12)
DECODER = presets.llama(**SIZE, layers=3)
BOTH = presets.t5(**SIZE, layers=2, decoder_layers=3, head_dim=4)


def depth_of(sizes):
    shapes = transformer.shapes(sizes)
    found = transformer.depths(shapes)
    return jax.tree.map(lambda x, d: np.broadcast_to(d, x.shape), shapes, found)


def test_depths_count_from_the_head_down():
    found = depth_of(DECODER)
    assert (found["head"]["kernel"] == 0).all() and (found["decoder"]["norm"]["scale"] == 0).all()
    assert [int(x.min()) for x in found["decoder"]["layers"]["mlp"]["up"]] == [3, 2, 1]
    assert (found["embed"]["tokens"] == 4).all()


def test_an_encoder_lies_below_its_decoder():
    found = depth_of(BOTH)
    assert [int(x.max()) for x in found["decoder"]["layers"]["cross"]["key"]] == [3, 2, 1]
    assert [int(x.max()) for x in found["encoder"]["layers"]["mlp"]["down"]] == [5, 4]
    assert (found["encoder"]["norm"]["scale"] == 3).all() and (found["embed"]["tokens"] == 6).all()
    assert (found["decoder"]["relative"]["table"] == 3).all()


def test_layer_decay_scales_the_update_of_each_layer():
    shapes, axes = transformer.shapes(DECODER), transformer.axes(DECODER)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    settings = config.Optimizer(name="sgd", learning_rate=1.0, clip=0.0, layer_decay=0.5)
    rule = optim.make_optimizer(settings, lambda step: 1.0, shapes, axes)
    updates, _ = rule.update(params, rule.init(params), params)
    jax.tree.map(lambda u, d: np.testing.assert_allclose(u, -(0.5 ** d.astype(float))), updates, depth_of(DECODER))


def test_layer_decay_out_of_range():
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay is 1.5: it must lie in \(0, 1\]"):
        config.Optimizer(layer_decay=1.5)


def test_one_layer_more_moves_after_each_stage():
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), transformer.shapes(DECODER))
    rule = unfreeze(every=2).update(optax.adam(0.1))
    state, depth = rule.init(params), depth_of(DECODER)
    for step in range(9):
        updates, state = rule.update(params, state, params)
        expected = jax.tree.map(functools.partial(np.greater_equal, 1 + step // 2), depth)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda u: u != 0, updates), expected)
    with pytest.raises(ConfigError, match="must be at least 1"):
        unfreeze(every=0)


def test_no_layer_waits_for_the_zeros_of_a_schedule():
    """Layers that wait do not move, but lose their weights; the other order a run refuses (tests/test_pruned_runs.py)."""
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), transformer.shapes(DECODER))
    rule = chain(unfreeze(every=9), prune(0.5, schedule=(0, 2, 1))).update(optax.sgd(0.1))
    updates, _ = rule.update(params, rule.init(params), params)
    made = jax.tree.map(moved, params, updates)["decoder"]["layers"]["mlp"]["up"]
    assert [int((x == 0).sum()) for x in made] == [round(0.5 * (1 - 0.5**3) * made[0].size)] * 3
    assert [float(x.max()) for x in made] == pytest.approx([1, 1, 0.9])
