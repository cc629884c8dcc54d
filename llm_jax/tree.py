"""Parameters as paths: names of leaves, regex masks over them, splitting and merging a tree. No model and no mesh is known here."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.errors import ConfigError, suggest

Tree = Any
"""A nested dict of arrays. In a part of a tree, None stands for the leaves that are elsewhere."""


def path_name(path: Sequence[Any]) -> str:
    """The path of a leaf as text.

    >>> path_name((jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("tokens")))
    'embed/tokens'
    """
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def names(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The paths of all leaves, in the order of `jax.tree.leaves`.

    >>> names({"b": 1, "a": {"c": 2}})
    ['a/c', 'b']
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def map_with_name(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`function(name, leaf, ...)` at each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def match(tree: Tree, regexes: Sequence[str], what: str = "regex") -> Tree:
    """At each leaf the index of the first regex that matches its whole path, or -1.

    Raises:
        ConfigError: a regex that is none, or matches no parameter.

    >>> match({"a": {"c": 2}, "b": 1}, ["a/.*"])
    {'a': {'c': 0}, 'b': -1}
    """
    every = names(tree)
    for regex in regexes:
        try:
            re.compile(regex)
        except (re.error, TypeError) as e:
            raise ConfigError(f"{what} {regex!r} is no regular expression: {e}") from e
        if not any(re.fullmatch(regex, name) for name in every):
            raise ConfigError(f"{what} {regex!r} matches no parameter{suggest(regex, every)}")
    return map_with_name(lambda name, _: next((i for i, r in enumerate(regexes) if re.fullmatch(r, name)), -1), tree)


def mask(tree: Tree, regexes: Sequence[str], what: str = "regex") -> Tree:
    """True at each leaf whose path one of the regexes matches. Raises as `match`."""
    return jax.tree.map(lambda i: i >= 0, match(tree, regexes, what))


def negate(chosen: Tree) -> Tree:
    """True where `chosen` is false."""
    return jax.tree.map(lambda c: not c, chosen)


def split(tree: Tree, chosen: Tree) -> tuple[Tree, Tree]:
    """The leaves where `chosen` is true and the others, each with None in place of what is in the other.

    >>> split({"a": 1, "b": 2}, {"a": True, "b": False})
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    return (
        jax.tree.map(lambda x, c: x if c else None, tree, chosen),
        jax.tree.map(lambda x, c: None if c else x, tree, chosen),
    )


def merge(*parts: Tree) -> Tree:
    """The tree whose leaves are those of its parts: the inverse of `split`.

    >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda *leaves: next((x for x in leaves if x is not None), None), *parts, is_leaf=lambda x: x is None
    )


def size(tree: Tree) -> int:
    """The number of values in a tree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
