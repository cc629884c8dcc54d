"""What two models differ in: configs, sizes, data, changes, parameters, results and cost. As text it is `difference_text.py`'s."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax import card_text, sharding, tree
from llm_jax import model as models
from llm_jax.card import content_hash
from llm_jax.config import to_dict as plain
from llm_jax.lifecycle.lineage import read_card
from llm_jax.model import Model
from llm_jax.storage import Path

ABSENT = "absent"
"""The value of a key that one of two configs has not"""


@dataclasses.dataclass(frozen=True)
class Norms:
    """Some parameters of two models: Frobenius norms, and shares of zeros. None for what one of them has not."""

    norm_a: float | None
    norm_b: float | None
    norm_difference: float | None
    """|| B - A ||; None where shapes differ"""
    relative: float | None
    """|| B - A || / || A ||"""
    zeros_a: float | None
    zeros_b: float | None
    note: str = ""
    """why there is no difference"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """All that two models differ in. Pairs are (of A, of B)."""

    names: tuple[str, str]
    hashes: tuple[str, str]
    config: dict[str, tuple[Any, Any]]
    """keys of the runs' configs with different values"""
    sizes: dict[str, tuple[Any, Any]]
    parameters: tuple[int, int]
    tokenizer: bool
    """whether they have the same"""
    data: dict[str, tuple[Any, Any]]
    """fingerprint and documents of each source that is not the same in both"""
    transforms: tuple[tuple[str, ...], tuple[str, ...]]
    paths: dict[str, Norms]
    layers: dict[str, Norms]
    """all parameters of a layer, of the embeddings, of the head"""
    results: dict[str, tuple[float | None, float | None]]
    cost: dict[str, tuple[float | None, float | None]]


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare the models at two paths: checkpoints, runs' folders, or whatever `model.load` reads. Raises as `load`."""
    mesh = sharding.make_mesh()
    return compare(_load(a, mesh), _load(b, mesh))


def _load(path: str | Path, mesh: jax.sharding.Mesh) -> Model:
    kind, where = models.locate(path)
    if kind == "checkpoint":
        read_card(where)
    return models.load(path, mesh)


def compare(a: Model, b: Model) -> Difference:
    """What two models differ in."""
    paths, layers = norms(a.params, b.params)
    one, two = a.card, b.card
    return Difference(
        names=(one.get("name", "A"), two.get("name", "B")),
        hashes=(_hash(a), _hash(b)),
        config=changed(_run_config(one), _run_config(two)),
        sizes=changed(plain(a.config), plain(b.config)),
        parameters=(tree.size(a.params), tree.size(b.params)),
        tokenizer=a.tokenizer == b.tokenizer,
        data=changed(_sources(one), _sources(two)),
        transforms=(tuple(one.get("transforms", ())), tuple(two.get("transforms", ()))),
        paths=paths,
        layers=layers,
        results=_both(card_text.figures(one), card_text.figures(two)),
        cost=_both(_cost(one), _cost(two)),
    )


def _hash(model: Model) -> str:
    return model.card.get("hashes", {}).get("params") or content_hash(model.params)


def _cost(card: Mapping[str, Any]) -> dict[str, float]:
    """What a run took; a card of what was made without one holds the figures of the run before."""
    return {name: card[name] for name in ("step", "tokens", "flops") if name in card and card_text.is_run(card)}


def _run_config(card: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run without what stands elsewhere: its sizes, after its changes, are the model's."""
    return {name: x for name, x in card.get("config", {}).items() if name not in ("model", "transforms")}


def _sources(card: Mapping[str, Any]) -> dict[str, Any]:
    return {s["spec"]: {"fingerprint": s["fingerprint"], "documents": s["documents"]} for s in card_text.sources(card)}


def changed(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two nested dicts differ, with both values.

    >>> changed({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}, "w": 4})
    {'w': ('absent', 4), 'x.z': (2, 3)}
    """
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        same = a == b or (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and list(a) == list(b))
        return {} if same else {prefix: (a, b)}
    found = dict[str, tuple[Any, Any]]()
    for name in sorted({*a, *b}):
        path = f"{prefix}.{name}" if prefix else name
        found |= changed(a.get(name, ABSENT), b.get(name, ABSENT), path)
    return found


def _both(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}


def norms(a: Any, b: Any) -> tuple[dict[str, Norms], dict[str, Norms]]:
    """Of two trees of parameters: by the path of each, and summed by layer."""
    one, two = (dict(zip(tree.names(x), jax.tree.leaves(x))) for x in (a, b))
    sums = jax.device_get(_measure(one, two))
    paths, layers = dict[str, Norms](), dict[str, list[_Sums]]()
    for name in dict.fromkeys([*one, *two]):
        shapes = [tuple(each[name].shape) if name in each else None for each in (one, two)]
        rows = _rows(name, sums, shapes)
        note = "" if shapes[0] == shapes[1] else f"{_shape(shapes[0])} in A, {_shape(shapes[1])} in B"
        paths[name] = _norms(rows, note)
        for layer, row in zip(_layers(name, len(rows)), rows):
            layers.setdefault(layer, []).append(row)
    other = "parameters of other shapes"
    return paths, {
        name: _norms(rows, other if any(row.change is None for row in rows) else "")
        for name, rows in sorted(layers.items(), key=lambda item: _order(item[0]))
    }


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Of (a part of) a parameter: in A and in B its values, zeros and sum of squares; the sum of squares of the difference."""

    a: tuple[int, int, float] | None
    b: tuple[int, int, float] | None
    change: float | None


@jax.jit
def _measure(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, Any]:
    """Sums over the last axis alone, so that what is left is little and is summed on the host in float64."""

    def rows(name: str, x: Array) -> Float[Array, "..."]:
        x = x.astype(jnp.float32)
        return x[:, None] if _stacked(name) and x.ndim == 1 else x

    sums: dict[str, Any] = {"a": {}, "b": {}, "change": {}}
    for name in {**a, **b}:
        x, y = (rows(name, each[name]) if name in each else None for each in (a, b))
        if x is not None and y is not None and x.shape == y.shape:
            *found, sums["change"][name] = _sum(x * x, x == 0, y * y, y == 0, jnp.square(y - x))
            sums["a"][name], sums["b"][name] = found[:2], found[2:]
            continue
        for which, z in (("a", x), ("b", y)):
            if z is not None:
                sums[which][name] = _sum(z * z, z == 0)
    return sums


def _sum(*terms: Array) -> list[Array]:
    """The sum of each over the last axis, in one reduction: of several, XLA on CPU keeps what they share, as large as the weights, meanwhile."""
    terms = tuple(x.astype(jnp.int32) if x.dtype == jnp.bool_ else x for x in terms)
    zeros = tuple(x.dtype.type(0) for x in terms)
    axes = (terms[0].ndim - 1,) if terms[0].ndim else ()
    return list(jax.lax.reduce(terms, zeros, lambda x, y: tuple(p + q for p, q in zip(x, y)), axes))


def _stacked(name: str) -> bool:
    return "/layers/" in name


def _rows(name: str, sums: Mapping[str, Any], shapes: list[tuple[int, ...] | None]) -> list[_Sums]:
    """The sums of a parameter, one for each layer where it is stacked."""

    def parts(x: np.ndarray) -> list[float]:
        x = np.asarray(x, np.float64)
        return [float(part.sum()) for part in x] if _stacked(name) else [float(x.sum())]

    found: list[list[tuple[int, int, float]]] = []
    for which, shape in zip("ab", shapes):
        if shape is None:
            found.append([])
            continue
        squares, zeros = map(parts, sums[which][name])
        size = math.prod(shape) // len(squares)
        found.append([(size, int(z), square) for z, square in zip(zeros, squares)])
    change = parts(sums["change"][name]) if name in sums["change"] else []
    return [_Sums(x, y, z) for x, y, z in itertools.zip_longest(found[0], found[1], change)]


def _layers(name: str, count: int) -> list[str]:
    """What the rows of a parameter belong to.

    >>> _layers("decoder/layers/mlp/up", 2), _layers("decoder/norm/scale", 1), _layers("embed/tokens", 1)
    (['decoder/layers/0', 'decoder/layers/1'], ['decoder/norm'], ['embed'])
    """
    if _stacked(name):
        return [f"{name.split('/layers/')[0]}/layers/{i}" for i in range(count)]
    first, second = (*name.split("/"), "")[:2]
    return [f"{first}/{second}" if first in ("encoder", "decoder") else first]


def _order(layer: str) -> list[Any]:
    """Embeddings, encoder, decoder, heads; layers by number."""
    first, *rest = layer.split("/")
    known = ("embed", "encoder", "decoder", "head")
    at = known.index(first) if first in known else len(known)
    return [at, first, "layers" not in rest, [int(x) if x.isdigit() else 0 for x in rest], rest]


def _norms(rows: list[_Sums], note: str) -> Norms:
    a, b = ([x for row in rows if (x := getattr(row, which)) is not None] for which in "ab")
    norm_a, norm_b = (math.sqrt(sum(x[2] for x in each)) if each else None for each in (a, b))
    zeros_a, zeros_b = (sum(x[1] for x in each) / sum(x[0] for x in each) if each else None for each in (a, b))
    changes = [row.change for row in rows if row.change is not None]
    if note or len(changes) < len(rows):
        return Norms(norm_a, norm_b, None, None, zeros_a, zeros_b, note)
    change = math.sqrt(sum(changes))
    relative = change / norm_a if norm_a else (None if change else 0.0)
    return Norms(norm_a, norm_b, change, relative, zeros_a, zeros_b)


def _shape(shape: tuple[int, ...] | None) -> str:
    return ABSENT if shape is None else "x".join(map(str, shape)) or "a scalar"


def to_dict(found: Difference) -> dict[str, Any]:
    """A difference as plain data."""
    return dataclasses.asdict(found)
