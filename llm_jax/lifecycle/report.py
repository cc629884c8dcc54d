"""What is known of a name's life, from cards, verdicts and moves: which versions there were, how good each was, what it cost. Drawn by `page.py`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from llm_jax import card_text, model, tree
from llm_jax.lifecycle import lineage, lineage_text
from llm_jax.lifecycle.lineage import Lineage
from llm_jax.lifecycle.page import Life, Version, render
from llm_jax.lifecycle.registry import Registry
from llm_jax.models import transformer
from llm_jax.storage import Path, as_path, in_one_line, write_whole


def report(name: str, out: str | Path, registry: Registry, folders: Sequence[str | Path] = ()) -> Life:
    """Write the report of a name's life as one HTML file.

    Args:
        folders: where checkpoints are looked for; by default `runs` and the registry.

    Raises:
        UserError: an unknown name, a folder that is not there, a file that cannot be written.
    """
    life = collect(name, registry, folders)
    out = as_path(out)
    with in_one_line(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, render(life).encode())
    return life


def collect(name: str, registry: Registry, folders: Sequence[str | Path] = ()) -> Life:
    """The versions that the name stood for, those that were gated against them, and all that these come from. Raises as `report`."""
    moves = registry.history(name)
    known = lineage.read(folders, registry.folder)
    stood = {move["hash"] for move in moves}
    verdicts = [v for v in registry.gates() if v["candidate"] in stood or v["incumbent"] in stood]
    wanted = {*stood, *(v["candidate"] for v in verdicts)}
    wanted |= {version.hash for version in known.ancestors(wanted)}
    seen = [*(v["candidate"] for v in verdicts), *(move["hash"] for move in moves)]
    order = _ordered(known, wanted, seen)
    qualities, units = _qualities(verdicts)
    return Life(
        name,
        moves[-1]["hash"],
        tuple(_version(known, h, verdicts, moves) for h in order),
        lineage_text.draw(_part(known, order)),
        qualities,
        units,
        tuple(verdicts),
        tuple(moves),
    )


def _part(known: Lineage, chosen: Sequence[str]) -> Lineage:
    """The lineage of some versions alone."""
    return dataclasses.replace(
        known,
        versions={h: known.versions[h] for h in chosen},
        damaged=(),
        names={h: names for h, names in known.names.items() if h in chosen},
    )


def _ordered(known: Lineage, wanted: Iterable[str], seen: Sequence[str]) -> list[str]:
    """Versions in the order of making: none before its parents, else as the registry first met them."""
    first = {h: i for i, h in reversed(list(enumerate(seen)))}
    waiting = sorted((h for h in wanted if h in known.versions), key=lambda h: (first.get(h, -1), h))
    order: list[str] = []
    while waiting:
        ready = next(
            (h for h in waiting if not any(p in waiting for p in known.versions[h].parents)),
            waiting[0],  # a circle: weights that were changed and changed back
        )
        order.append(ready)
        waiting.remove(ready)
    return order


def _own(card: dict[str, Any], what: str) -> float:
    """Tokens or operations of the run that made a version; 0 where no run did, whose card has those of its parent."""
    return float(card.get(what, 0.0)) if card_text.is_run(card) else 0.0


def _version(known: Lineage, h: str, verdicts: Sequence[dict[str, Any]], moves: Sequence[dict[str, Any]]) -> Version:
    """A version as the report shows it."""
    card = known.versions[h].card
    shapes = transformer.shapes(model.model_config(card, h))
    sizes = dict(zip(tree.names(shapes), jax.tree.leaves(shapes)))
    line = [known.versions[h], *known.ancestors(known.versions[h].parents)]
    parent = known.parent(known.versions[h])
    mine = [v for v in verdicts if v["candidate"] == h]
    stood = [move for move in moves if move["hash"] == h and move["action"] == "promote"]
    fate = (
        ("forced" if stood[-1]["forced"] else "promoted")
        if stood
        else "refused"
        if mine and not mine[-1]["passed"]
        else ""
    )
    return Version(
        h,
        card["name"],
        card_text.made(card, parent.card if parent else None),
        known.versions[h].parents,
        sum(x.size for x in sizes.values()),
        round(sum(share * sizes[name].size for name, share in (card.get("pruned") or {}).items() if name in sizes)),
        sum(x.size * x.dtype.itemsize for x in sizes.values()),
        int(card.get("step", 0)),
        _own(card, "tokens"),
        _own(card, "flops"),
        sum(_own(v.card, "flops") for v in line),
        sum(_own(v.card, "tokens") for v in line),
        tuple(card.get("config", {}).get("data", {}).get("sources", ())) if card_text.is_run(card) else (),
        card_text.figures(card),
        next((x for v in reversed(mine) if (x := _latency(v)) is not None), None),
        fate,
    )


def _latency(verdict: dict[str, Any]) -> float | None:
    """Time of a forward pass of the candidate over the incumbent's, where a gate measured it."""
    return next((limit["value"] for limit in verdict.get("limits", ()) if limit["name"] == "latency"), None)


def _qualities(verdicts: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The value of each check by version, as measured last, and what it measures."""
    values: dict[str, dict[str, float]] = {}
    units: dict[str, str] = {}
    for verdict in verdicts:
        for row in verdict.get("rows", ()):
            units[row["check"]] = row["unit"]
            for side in ("incumbent", "candidate"):
                if verdict[side] is not None and row.get(side) is not None:
                    values.setdefault(row["check"], {})[verdict[side]] = row[side]
    return values, units
