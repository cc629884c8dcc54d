"""Paths of parameters, masks by regex, and cutting a tree in two and putting it together again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tree
from llm_jax.errors import ConfigError

PARAMS = {
    "embed": {"tokens": np.zeros((5, 2))},
    "decoder": {
        "layers": {"mlp": {"up": np.ones((3, 2, 4)), "up_bias": np.ones((3, 4))}},
        "norm": {"scale": np.ones(2)},
    },
}
NAMES = ["decoder/layers/mlp/up", "decoder/layers/mlp/up_bias", "decoder/norm/scale", "embed/tokens"]
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3), max_leaves=8
)


class Moments(NamedTuple):
    mu: dict
    rest: list


def test_names_of_dicts_records_and_lists():
    assert tree.names(PARAMS) == NAMES
    assert tree.names(Moments({"a": 1}, [2, {"b": 3}])) == ["mu/a", "rest/0", "rest/1/b"]
    assert tree.names({"a": (1, 2)}, is_leaf=lambda x: isinstance(x, tuple)) == ["a"]


def test_map_with_name():
    assert tree.map_with_name(lambda name, x, y: f"{name}:{x + y}", {"a": {"b": 1}}, {"a": {"b": 2}}) == {
        "a": {"b": "a/b:3"}
    }


def test_match_takes_the_first_regex_for_the_whole_path():
    found = tree.match(PARAMS, ["decoder/.*bias", "decoder/.*", "embed/tokens"])
    assert dict(zip(tree.names(found), jax.tree.leaves(found))) == dict(zip(NAMES, [1, 0, 1, 2]))
    assert jax.tree.leaves(tree.match(PARAMS, [".*up"])) == [0, -1, -1, -1], "part of a path was taken for the whole"
    assert jax.tree.leaves(tree.match(PARAMS, [])) == [-1] * 4


def test_match_refuses_a_regex_without_a_parameter():
    with pytest.raises(ConfigError) as told:
        tree.match(PARAMS, [".*", "decoder/norm/scales"], "optimizer.freeze")
    assert (
        str(told.value)
        == "optimizer.freeze 'decoder/norm/scales' matches no parameter; did you mean 'decoder/norm/scale'?"
    )
    with pytest.raises(ConfigError, match="regex 'embed' matches no parameter"):
        tree.match(PARAMS, ["embed"])  # the beginning of a path is not a path
    with pytest.raises(ConfigError) as told:
        tree.mask(PARAMS, ["xyz"])
    assert str(told.value) == f"regex 'xyz' matches no parameter; known: {', '.join(NAMES)}"


def test_mask_and_its_opposite():
    found = tree.mask(PARAMS, ["embed/.*", ".*bias"])
    assert jax.tree.leaves(found) == [False, True, False, True]
    assert jax.tree.leaves(tree.negate(found)) == [True, False, True, False]


@given(TREES.filter(lambda x: isinstance(x, dict)), st.data())
def test_split_and_merge(whole, data):
    chosen = jax.tree.map(lambda _: data.draw(st.booleans()), whole)
    one, other = tree.split(whole, chosen)
    assert jax.tree.leaves(one) == [x for x, c in zip(jax.tree.leaves(whole), jax.tree.leaves(chosen)) if c]
    assert len(jax.tree.leaves(one)) + len(jax.tree.leaves(other)) == len(jax.tree.leaves(whole))
    assert tree.merge(one, other) == whole == tree.merge(other, one)


def test_merge_takes_the_first_part_that_has_a_leaf():
    assert tree.merge({"a": None, "b": 2, "c": None}, {"a": 1, "b": 3, "c": None}) == {"a": 1, "b": 2, "c": None}


def test_split_parts_differentiate_apart():
    """None is no leaf: the gradient of one part has nothing of the other."""
    one, other = tree.split({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": True, "b": False})
    gradient = jax.grad(lambda part: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree.merge(part, other))))(one)
    assert tree.names(gradient) == ["a"] and gradient["b"] is None


def test_size_and_bytes():
    assert tree.size(PARAMS) == 5 * 2 + 24 + 12 + 2
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    assert tree.nbytes(half) == 2 * tree.size(PARAMS) and tree.nbytes({}) == 0
