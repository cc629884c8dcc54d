"""A lineage and a card as text and as plain data: the tree in the terminal, one card in a screen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax import card_text
from llm_jax.card_text import SHORT
from llm_jax.lifecycle.lineage import Damaged, Lineage, Version


def draw(lineage: Lineage) -> str:
    """The tree, a line each version: an only child stands under its parent, several branch off; below it, what is missing and damaged."""
    children: dict[str, list[str]] = {}
    for version in lineage.versions.values():
        if version.parents:
            children.setdefault(version.parents[0], []).append(version.hash)
    claimed = [each.hash for each in lineage.damaged if each.hash and each.hash not in lineage.versions]
    elsewhere = dict.fromkeys([*lineage.origins, *claimed, *lineage.missing])
    roots = [h for h in lineage.versions if not lineage.versions[h].parents]
    lines, drawn = list[str](), set[str]()
    # What is left over after the roots goes round in a circle: weights that were changed and changed back.
    for root in (*roots, *elsewhere, *lineage.versions):
        lines += _branch(root, children, drawn, lambda h: _line(lineage, h))
    return "\n".join([*lines, *_troubles(lineage)]) or "no checkpoint"


def _branch(root: str, children: Mapping[str, Sequence[str]], drawn: set[str], line: Callable[[str], str]) -> list[str]:
    """The lines of what stems from a root; without recursion, since a life can be long."""
    lines = []
    waiting = [(root, "", "", False)]
    while waiting:
        node, first, rest, joined = waiting.pop()
        if node in drawn:
            continue
        drawn.add(node)
        lines += ([f"{rest}│"] if joined else []) + [f"{first}● {line(node)}"]
        below = [child for child in children.get(node, ()) if child not in drawn]
        if len(below) == 1:
            waiting.append((below[0], rest, rest, True))
            continue
        for i, child in reversed(list(enumerate(below))):
            last = i == len(below) - 1
            waiting.append((child, rest + ("└─" if last else "├─"), rest + ("  " if last else "│ "), False))
    return lines


def _line(lineage: Lineage, h: str) -> str:
    """A version, or what is known of weights that no checkpoint holds."""
    named = f" [{', '.join(lineage.names[h])}]" if h in lineage.names else ""
    if h in lineage.versions:
        return _version_line(lineage, lineage.versions[h], named)
    damaged = next((each for each in lineage.damaged if each.hash == h), None)
    if damaged is not None:
        return f"{h[:SHORT]}{named}  damaged: {damaged.place}: {damaged.reason}"
    if h in lineage.origins:
        return f"{h[:SHORT]}{named}  {lineage.origins[h]}"
    return f"{h[:SHORT]}{named}  missing"


def _version_line(lineage: Lineage, version: Version, named: str) -> str:
    card = version.card
    others = ", ".join(_reference(lineage, h) for h in version.parents[1:])
    read = [f"{name}: {_reference(lineage, h)}" for name, h in version.references.items()]
    more = f" and {len(version.places) - 1} more" if len(version.places) > 1 else ""
    parts = [
        f"{version.hash[:SHORT]} {card['name']}{named}",
        card_text.made(card, _card(lineage.parent(version)), short=True),
        f"also from {others}" if others else "",
        *read,
        card_text.main_figures(card),
        version.places[0] + more,
    ]
    return "  ".join(filter(None, parts))


def _card(version: Version | None) -> dict[str, Any] | None:
    return None if version is None else version.card


def _reference(lineage: Lineage, h: str) -> str:
    """A version that a line names beside its parent."""
    if h in lineage.versions:
        return f"{h[:SHORT]} {lineage.versions[h].card['name']}"
    return f"{h[:SHORT]} (not found)"


def _troubles(lineage: Lineage) -> list[str]:
    lines = [f"damaged: {each.place}: {each.reason}" for each in lineage.damaged]
    if lineage.missing:
        one = len(lineage.missing) == 1
        lines.append(
            f"{len(lineage.missing)} missing: no checkpoint here holds {'it' if one else 'them'}, because "
            f"{'it was' if one else 'they were'} not saved, or {'is' if one else 'are'} removed or elsewhere"
        )
    return ["", *lines] if lines else []


def to_dict(lineage: Lineage) -> dict[str, Any]:
    """A lineage as plain data."""
    return {
        "versions": [
            {
                "hash": v.hash,
                "name": v.card["name"],
                "names": list(lineage.names.get(v.hash, ())),
                "parents": list(v.parents),
                "references": v.references,
                "made": card_text.made(v.card, _card(lineage.parent(v))),
                "origin": card_text.origin(v.card),
                "step": v.card.get("step"),
                "results": card_text.figures(v.card),
                "places": list(v.places),
            }
            for v in lineage.versions.values()
        ],
        "origins": lineage.origins,
        "missing": list(lineage.missing),
        "damaged": plain(lineage.damaged),
    }


def plain(damaged: Sequence[Damaged]) -> list[dict[str, str]]:
    """Damaged checkpoints as plain data."""
    return [{"place": each.place, "reason": each.reason, "hash": each.hash} for each in damaged]


def checked(lineage: Lineage, edited: Sequence[Damaged]) -> str:
    """What came of hashing all weights."""
    count = sum(len(version.places) for version in lineage.versions.values())
    lines = [f"edited: {each.place}: {each.reason}" for each in edited]
    return "\n".join([*lines, f"weights of {count} checkpoints hashed, {len(edited)} of them not what their cards say"])


def card(stated: dict[str, Any]) -> str:
    """One card, readable."""
    rows = [("name", stated["name"]), ("hash", stated["hashes"]["params"]), ("made by", card_text.made(stated))]
    rows += [("parent", h) for h in stated["parents"]] or [("parent", "none")]
    rows += [(name, h) for name, h in stated.get("references", {}).items()]
    rows += [("comes from", card_text.origin(stated))] if card_text.origin(stated) else []
    if not card_text.is_run(stated):
        rows += [("all changes", label) for label in stated["transforms"]]
    rows += [("model", _model(stated["model"]))]
    rows += [("pruned", f"{name}: {share:.2%} zeros") for name, share in (stated.get("pruned") or {}).items()]
    rows += _training(stated)
    return "\n".join(f"{what:12} {text}" for what, text in rows)


def _model(model: Mapping[str, Any]) -> str:
    names = ("layers", "dim", "heads", "vocab_size", "max_length")
    sizes = ", ".join(f"{name} {model[name]}" for name in names if name in model)
    return f"{model['architecture']}, head {model.get('head', 'lm')}: {sizes}"


def _training(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Data, counts, results and machine of a run; where the card is of what was made of a run's model, that is said."""
    if "config" not in stated:
        return [("code", stated["code"])] if "code" in stated else []
    rows = [
        ("source", f"{s['spec']}: {s['documents']} documents, {s['fingerprint'][:SHORT]}")
        for s in card_text.sources(stated)
    ]
    rows += [("held out", card_text.heldout(stated))] if card_text.heldout(stated) else []
    at = stated.get("results", {}).get("step")
    rows += [
        (f"{name}", f"{x:.6g}" + (f" at step {at}" if at != stated.get("step") else ""))
        for name, x in card_text.figures(stated).items()
    ]
    run = "" if card_text.is_run(stated) else " in the last run before"
    if "tokens" in stated and "flops" in stated:
        rows.append(("compute", f"{stated['tokens']:.4g} tokens, {stated['flops']:.4g} operations{run}"))
    if "device" in stated:
        device = stated["device"]
        rows.append(("device", f"{device['count']} x {device['kind']}"))
    rows += [(name, str(stated[name])) for name in ("seed", "moments", "code") if stated.get(name) is not None]
    if "libraries" in stated:
        rows.append(("libraries", ", ".join(f"{name} {v}" for name, v in stated["libraries"].items())))
    return rows
