"""What a card says, in words: how a model was made, where it came from, how good it was. Reads a card alone, and without JAX."""

from collections.abc import Mapping
from typing import Any

Card = Mapping[str, Any]

SHORT = 12
"""Digits of a hash that are shown"""


def is_run(card: Card) -> bool:
    """Whether the card is of a run's checkpoint: its counts and figures are then of these weights, not of those they were made from."""
    return "step" in card


def origin(card: Card) -> str:
    """Where the first of a model's weights came from, as far as it is another project; else empty."""
    if "huggingface" in card:
        stated = card["huggingface"].get("config", {})
        named = stated.get("_name_or_path") or card["huggingface"].get("name") or ""
        kind = stated.get("model_type", "")
        return f"Hugging Face {kind}" + (f" {named}" if named else "")
    if "gguf" in card:
        about = card["gguf"]
        return f"GGUF {about.get('architecture', '')}" + (f" {about['name']}" if about.get("name") else "")
    return ""


def own_transforms(card: Card, parent: Card | None = None) -> list[str]:
    """The changes that made these weights of their parents': a card without a run lists those of all that came before, too."""
    labels = list(map(str, card.get("transforms", [])))
    if is_run(card) or not card.get("parents"):
        return labels
    before = list(map(str, (parent or {}).get("transforms", [])))
    return labels[len(before) :] if parent is not None and labels[: len(before)] == before else labels[-1:]


def task(card: Card) -> str:
    """The kind of task of the run that a card tells of; empty where it tells of none."""
    stated = card.get("config", {}).get("task")
    return stated.get("kind", "") if isinstance(stated, dict) else ""


def shortened(label: str, room: int = 48) -> str:
    """A change as a line has room for it.

    >>> shortened("distil('runs/teacher', temperature=2.0)", 30)
    "distil('runs/teacher', ...)"
    """
    if len(label) <= room:
        return label
    first = label.split(", ")[0]
    return f"{first}, ...)" if len(first) <= room else f"{label.partition('(')[0]}(...)"


def made(card: Card, parent: Card | None = None, short: bool = False) -> str:
    """What was done to the parents, in a line.

    >>> made({"step": 5, "transforms": ["prune(0.5)"], "config": {"task": {"kind": "NextToken"}}})
    'prune(0.5), NextToken, 5 steps'
    """
    done = [shortened(label) if short else label for label in own_transforms(card, parent)]
    if is_run(card):
        return ", ".join([*done, *filter(None, [task(card)]), f"{card['step']} steps"])
    if not card.get("parents") and origin(card):
        return ", ".join([f"imported from {origin(card)}", *done])
    return ", ".join(done) or "saved"


def figures(card: Card) -> dict[str, float]:
    """The held-out figures of a card by name."""
    found = card.get("results") or {}
    return {name: x for name, x in found.items() if name != "step" and isinstance(x, (int, float))}


def main_figures(card: Card) -> str:
    """The held-out figure by which the run kept its best checkpoint, the loss by default, and the accuracy."""
    found = figures(card)
    best = card.get("config", {}).get("checkpoint", {}).get("best") or "loss"
    told = [f"{name} {found[name]:.4g}" for name in dict.fromkeys((best, "accuracy")) if name in found]
    at = card.get("results", {}).get("step")
    late = f" at step {at}" if told and at is not None and is_run(card) and at != card["step"] else ""
    return ", ".join(told) + late


def sources(card: Card) -> list[dict[str, Any]]:
    """The sources that were trained on: spec, fingerprint and documents of each."""
    return list((card.get("sources") or {}).get("sources", []))


def heldout(card: Card) -> str:
    """The documents that the figures are of; empty where the card tells of no run."""
    data = card.get("config", {}).get("data") or {}
    if data.get("heldout_sources"):
        return ", ".join(data["heldout_sources"])
    specs = ", ".join(map(str, data.get("sources", [])))
    return f"{data['heldout']:.3g} of the documents of {specs}" if specs and data.get("heldout") else ""


def starts_outside(card: Card) -> str:
    """The directory or file of another project that a run's weights were read from, as its config names it; else empty."""
    start = str(card.get("config", {}).get("start", "")) if is_run(card) and origin(card) else ""
    return "" if start == "fresh" else start
