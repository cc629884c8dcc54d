"""Name maps: which array of another project is which parameter here, and how its axes are arranged there.

A map is a table of `Entry`, read from left to right to export and from right to left to import. Nothing here knows a file format.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax import tree
from llm_jax.errors import CheckpointError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig

PAIR = 2
"""size of the axis `r` of a layout: the two halves of a rotary pair"""


def _groups(pattern: str) -> list[str]:
    """The axes of a side of a layout, each the letters that it is made of.

    >>> _groups("(h e) d")
    ['he', 'd']
    """
    made, inside = [], ""
    for word in pattern.replace("(", "( ").replace(")", " )").split():
        if word == "(":
            inside = " "
        elif word == ")":
            made.append(inside.strip())
            inside = ""
        elif inside:
            inside += word
        else:
            made.append(word)
    return made


class Layout(NamedTuple):
    """How the axes of a parameter are arranged here and there: letters in order, those in brackets flattened to one axis.

    `r` has two values, `p` as many as there are parameters in an array there that holds several.

    >>> Layout("d h e", "(h e) d").there_shape((8, 2, 4))
    (8, 8)
    """

    here: str = ""
    there: str = ""
    """both empty: the same axes"""
    parts: int = 1

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """The size of each letter, from the shape here."""
        sizes = {"r": PAIR, "p": self.parts, "1": 1}
        for group, size in zip(_groups(self.here), shape, strict=True):
            unknown = [letter for letter in group if letter not in sizes]
            sizes[unknown[0]] = size // math.prod(sizes[letter] for letter in group if letter in sizes)
        return sizes

    def there_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape there of a parameter of this shape here."""
        if not self.here:
            return tuple(shape)
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[letter] for letter in group) for group in _groups(self.there))

    def read(self, x: np.ndarray, shape: Sequence[int], part: int = 0) -> np.ndarray:
        """The parameter of this shape here in an array from there: a view of it, unless the halves of rotary pairs are put apart."""
        if not self.here:
            return x
        sizes = self._sizes(shape)
        there = "".join(_groups(self.there))
        x = x.reshape([sizes[letter] for letter in there])
        if "p" in there:
            x = x[(slice(None),) * there.index("p") + (part,)]
            there = there.replace("p", "")
        here = "".join(_groups(self.here))
        kept = [i for i, letter in enumerate(there) if letter != "1"]
        x = x.reshape([x.shape[i] for i in kept])
        there = "".join(there[i] for i in kept)
        return x.transpose([there.index(letter) for letter in here]).reshape(shape)

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The array there that holds these parameters: the inverse of `read` for each of them."""
        if not self.here:
            return parts[0]
        sizes = self._sizes(parts[0].shape)
        here = "".join(_groups(self.here))
        x = np.stack([y.reshape([sizes[letter] for letter in here]) for y in parts])
        there = "".join(_groups(self.there))
        letters = "p" + here
        if "p" not in there:
            x, letters = x[0], here
        x = x.transpose([letters.index(letter) for letter in there if letter != "1"])
        return x.reshape(self.there_shape(parts[0].shape))


SAME = Layout()
FLIP = Layout("i o", "o i")
"""a product of torch's Linear"""
HEADS_OUT = Layout("d h e", "(h e) d")
HEADS_IN = Layout("h e d", "d (h e)")
HEADS_BIAS = Layout("h e", "(h e)")
ROW = Layout("v", "1 v")


class Entry(NamedTuple):
    """One parameter here and the array there that holds it. `{}` in `theirs` is the number of the layer."""

    ours: str
    theirs: str
    layout: Layout = SAME
    part: int = 0
    """which of several parameters in one array"""


def linear(ours: str, theirs: str, layout: Layout = FLIP) -> tuple[Entry, Entry]:
    """The weight and the bias of a torch Linear."""
    bias = HEADS_BIAS if layout is HEADS_OUT else SAME
    return Entry(ours, f"{theirs}.weight", layout), Entry(f"{ours}_bias", f"{theirs}.bias", bias)


def norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    """The scale and the bias of a norm."""
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


def flat(*groups: Entry | Iterable[Entry]) -> tuple[Entry, ...]:
    """One table of entries and groups of them."""
    return tuple(e for group in groups for e in ([group] if isinstance(group, Entry) else group))


class Place(NamedTuple):
    """Where the parameter of one leaf lies there: one array, or one a layer."""

    entry: Entry
    shape: tuple[int, ...]
    """of the leaf here"""
    names: tuple[str, ...]
    stacked: bool

    @property
    def own(self) -> tuple[int, ...]:
        """The shape here of what one array there holds."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def there(self) -> tuple[int, ...]:
        """The shape of each array there."""
        return self.entry.layout.there_shape(self.own)


_shapes = functools.lru_cache(16)(transformer.shapes)


def places(config: ModelConfig, entries: Sequence[Entry]) -> dict[str, Place]:
    """Where each parameter of a model lies there, by its path here; entries for parameters that the model has not are left out.

    Raises:
        CheckpointError: a parameter that the map has no name for, so that the model cannot be written in this form.
    """
    table = {entry.ours: entry for entry in entries}
    shapes = _shapes(config)
    found = {}
    for path, leaf in zip(tree.names(shapes), jax.tree.leaves(shapes)):
        if path not in table:
            raise CheckpointError(f"a model of this family has no place for {path!r}: a config of another family?")
        entry, stacked = table[path], "/layers/" in path
        names = tuple(entry.theirs.format(i) for i in range(leaf.shape[0])) if stacked else (entry.theirs,)
        found[path] = Place(entry, leaf.shape, names, stacked)
    return found


def check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Place], known: Iterable[str], where: Any) -> None:
    """Raise unless the arrays there are those that the model needs, all of them and of these shapes; `known` may be there too.

    Raises:
        CheckpointError: lists what is missing, what is not expected and what has another shape.
    """
    needed = {name: place.there for place in wanted.values() for name in place.names}
    missing = sorted(set(needed) - set(found))
    unexpected = sorted(set(found) - set(needed) - set(known))
    misshapen = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in sorted(needed.items())
        if name in found and tuple(found[name]) != shape
    ]
    wrong = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not expected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if wrong:
        raise CheckpointError(f"the tensors of {where} are not those of its config: {'; '.join(wrong)}")


def assemble(
    config: ModelConfig,
    wanted: Mapping[str, Place],
    read: Callable[[str], np.ndarray],
    abstract: Any,
    fresh: Mapping[str, jax.Array] | None = None,
) -> Any:
    """The params laid out as `abstract` says, made shard by shard: beside them no copy of the model is held.

    Args:
        read: the array there of a name, best a view of a mapped file.
        abstract: shapes, dtypes and shardings, see `model.abstract_params`.
        fresh: parameters by their paths that are taken as they are.
    """

    def one(path: str, leaf: Any) -> jax.Array:
        if fresh and path in fresh:
            return fresh[path]
        place = wanted[path]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None

            def part(name: str, inside: tuple[slice, ...]) -> np.ndarray:
                return place.entry.layout.read(read(name), place.own, place.entry.part)[inside]

            if not place.stacked:
                return np.array(
                    part(place.names[0], index), leaf.dtype, order="C"
                )  # a copy: jax may keep what it is given
            names = place.names[index[0]]
            made = np.empty(
                (len(names), *(len(range(*s.indices(n))) for s, n in zip(index[1:], place.own))), leaf.dtype
            )
            for to, name in zip(made, names):
                to[...] = part(name, index[1:])
            return made

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

    return tree.map_with_name(one, abstract)


def arrays(params: Any, wanted: Mapping[str, Place]) -> Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, function that fetches it) of each array there that a model's params make."""
    leaves = dict(zip(tree.names(params), jax.tree.leaves(params)))
    holders: dict[str, list[tuple[int, str, int]]] = {}
    for path, place in wanted.items():
        for i, name in enumerate(place.names):
            holders.setdefault(name, []).append((place.entry.part, path, i))

    def fetch(name: str) -> np.ndarray:
        parts = []
        for _, path, i in sorted(holders[name]):
            parts.append(jax.device_get(_layer(leaves[path], i) if wanted[path].stacked else leaves[path]))
        return np.ascontiguousarray(wanted[holders[name][0][1]].entry.layout.write(parts))

    for name, held in holders.items():
        yield name, wanted[held[0][1]].there, functools.partial(fetch, name)


@jax.jit
def _layer(stacked: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
