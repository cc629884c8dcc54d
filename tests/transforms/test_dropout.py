"""Another rate of dropout: what training drops, and that evaluation drops nothing."""

import jax
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.transforms import dropout
from tests.families import tiny_model
from tests.transforms.laws import objective


def test_training_drops_at_this_rate_and_evaluation_nothing():
    tiny = tiny_model("gpt2", dropout=0.1)

    def loss(rate: float, key: jax.Array | None) -> float:
        inner, batch = objective(dropout(rate).config(tiny.config))
        return float(inner(tiny.params, batch, key, None).total)

    key = jax.random.key(0)
    assert loss(0.0, key) == loss(0.0, None) == loss(0.5, None)
    assert len({loss(rate, key) for rate in (0.0, 0.1, 0.5)}) == 3


def test_a_rate_that_is_none():
    with pytest.raises(ConfigError, match="model.dropout is 1.5"):
        dropout(1.5).config(tiny_model("gpt2").config)


def test_weights_stay_as_they_are():
    tiny = tiny_model("gpt2")
    found = dropout(0.5).params(tiny.config, tiny.params, jax.random.key(0), None)
    jax.tree.map(np.testing.assert_array_equal, found, tiny.params)
