"""The difference of two models as text."""

import json
from collections.abc import Mapping
from typing import Any

from llm_jax.card_text import SHORT
from llm_jax.lifecycle.difference import ABSENT, Difference, Norms


def told(found: Difference) -> str:
    """A difference as text: what is the same in both is left out."""
    (name_a, name_b), (hash_a, hash_b) = found.names, found.hashes
    lines = [f"A  {hash_a[:SHORT]} {name_a}", f"B  {hash_b[:SHORT]} {name_b}"]
    lines += ["the same weights"] if hash_a == hash_b else []
    lines += _section("config", found.config) + _section("sizes", found.sizes)
    lines += _section("data", found.data)
    if not found.tokenizer:
        lines += ["", "tokenizer: not the same"]
    if found.transforms[0] != found.transforms[1]:
        made = (", ".join(each) or "none" for each in found.transforms)
        lines += ["", "transforms", *(f"  {which}  {text}" for which, text in zip("AB", made))]
    lines += ["", f"parameters: {found.parameters[0]:,} in A, {found.parameters[1]:,} in B"]
    lines += _table({**found.layers, **found.paths})
    for title, pairs in (("results", found.results), ("cost", found.cost)):
        rows = [f"  {name:28} {_number(a):>12} {_number(b):>12} {_gain(a, b):>12}" for name, (a, b) in pairs.items()]
        lines += ["", f"{title:30} {'A':>12} {'B':>12} {'B - A':>12}", *rows] if rows else []
    return "\n".join(lines)


def _section(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    rows = [f"  {name}: {_value(a)} -> {_value(b)}" for name, (a, b) in pairs.items()]
    return ["", title, *rows] if rows else []


def _value(x: Any) -> str:
    return x if x == ABSENT else json.dumps(x, ensure_ascii=False)


def _table(rows: Mapping[str, Norms]) -> list[str]:
    head = ("|A|", "|B|", "|B - A|", "relative", "zeros A", "zeros B")
    wide = max(map(len, rows), default=0)
    lines = [f"  {'':{wide}}" + "".join(f"{name:>11}" for name in head)]
    for name, x in rows.items():
        shares = [_number(share, ".2%") for share in (x.zeros_a, x.zeros_b)]
        values = [*map(_number, (x.norm_a, x.norm_b, x.norm_difference, x.relative)), *shares]
        lines.append((f"  {name:{wide}}" + "".join(f"{v:>11}" for v in values) + f"  {x.note}").rstrip())
    return lines


def _number(x: float | None, form: str = ".4g") -> str:
    return "-" if x is None else format(x, form)


def _gain(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{b - a:+.4g}"
