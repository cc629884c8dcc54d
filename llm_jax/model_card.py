"""README.md of an exported model, a model card in Hugging Face's form. It says what the cards say: what they do not know is left out."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from llm_jax import card_text, tree
from llm_jax.card_text import SHORT, Card
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig


def readme(
    title: str,
    card: Card,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    architecture: str = "",
    model_type: str = "",
    ancestors: Sequence[Card] = (),
) -> str:
    """The text of README.md.

    Args:
        title: of the model; the name of its folder.
        config: the sizes that are written.
        architecture, model_type: the class of transformers that reads it, and its family.
        ancestors: cards of what the model was made of, the nearest first, as far as they were found.
    """
    sections = [
        ("", [f"# {title}", *_what(card, config, tokenizer, model_type)]),
        ("How it came to be", _history(card, ancestors)),
        ("Training data", _data(card, ancestors)),
        ("Results", _results(card)),
        ("Compute", _compute(card, ancestors)),
        ("How to load it", _loading(title, config, tokenizer, architecture)),
        ("Limits", _limits(card)),
    ]
    body = "\n\n".join(
        "\n".join([*([f"## {heading}", ""] if heading else []), *lines]) for heading, lines in sections if lines
    )
    return f"---\n{to_yaml(metadata(title, card, config, model_type, ancestors))}---\n\n{body}\n"


def metadata(
    title: str, card: Card, config: ModelConfig, model_type: str = "", ancestors: Sequence[Card] = ()
) -> dict[str, Any]:
    """The header of the card, as the Hub reads it."""
    task = pipeline_tag(config)
    labels = [label for each in (card, *ancestors) for label in each.get("transforms", [])]
    changes = sorted({str(label).partition("(")[0] for label in labels} - {""})
    found: dict[str, Any] = {
        "language": card.get("language"),
        "license": card.get("license"),
        "library_name": "transformers",
        "pipeline_tag": task,
        "base_model": _base_model(card),
        "tags": list(dict.fromkeys(["llm_jax", *filter(None, [model_type]), *changes])),
        "datasets": list(dict.fromkeys(s["spec"] for each in (card, *ancestors) for s in card_text.sources(each))),
    }
    measured = {name: x for name, x in card_text.figures(card).items() if math.isfinite(x)}
    if measured:
        named = card_text.heldout(card) or "held-out documents"
        found["model-index"] = [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": task, "name": card_text.task(card) or task},
                        "dataset": {"type": "held-out", "name": named},
                        "metrics": [{"type": name, "value": x, "name": name} for name, x in measured.items()],
                    }
                ],
            }
        ]
    return {name: x for name, x in found.items() if x}


def pipeline_tag(config: ModelConfig) -> str:
    """What the Hub calls that which a model does."""
    if config.head == "classification":
        return "image-classification" if config.patch_size else "text-classification"
    by_head = {"mlm": "fill-mask", "span": "question-answering"}
    if config.head == "lm":
        return "text-generation" if config.architecture == "decoder" else "text2text-generation"
    return by_head.get(config.head, "feature-extraction")


def _base_model(card: Card) -> str:
    """The repository that the weights came from, where the files that were imported named one."""
    named = str(card.get("huggingface", {}).get("config", {}).get("_name_or_path") or "")
    owner, slash, name = named.partition("/")
    plain = bool(slash) and all(
        part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, name)
    )
    return named if plain else ""


def to_yaml(value: Any, indent: str = "") -> str:
    """Nested dicts and lists as YAML in blocks, texts quoted as in JSON, which YAML reads alike.

    >>> print(to_yaml({"a": [{"b": "x: y", "c": 1e-05}], "d": 2}), end="")
    a:
    - b: "x: y"
      c: 1.0e-05
    d: 2
    """
    lines = []
    for key, x in value.items():
        if isinstance(x, dict):
            lines.append(f"{indent}{key}:\n{to_yaml(x, indent + '  ')}")
        elif isinstance(x, list):
            lines.append(f"{indent}{key}:\n")
            for each in x:
                block = to_yaml(each, indent + "  ") if isinstance(each, dict) else f"{indent}  {_scalar(each)}\n"
                lines.append(f"{indent}- {block[len(indent) + 2 :]}")
        else:
            lines.append(f"{indent}{key}: {_scalar(x)}\n")
    return "".join(lines)


def _scalar(x: Any) -> str:
    """A value in a line. (YAML takes 1e-05, without a point, for a text, and knows more ends of a line than JSON.)"""
    text = json.dumps(x, ensure_ascii=False)
    text = re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("e", ".0e") if isinstance(x, float) and "e" in text and "." not in text else text


def _what(card: Card, config: ModelConfig, tokenizer: Tokenizer | None, model_type: str) -> list[str]:
    shapes = transformer.shapes(config)
    sizes = {
        "layers": config.layers,
        "decoder layers": config.decoder_layers,
        "width": config.dim,
        "heads": config.heads,
        "key-value heads": config.kv_heads,
        "width of the MLP": config.mlp_size,
        "vocabulary": config.vocab_size,
        "longest row": config.max_length,
    }
    form = f" ({model_type} of transformers)" if model_type else ""
    lines = [
        "",
        f"{'An' if config.architecture[0] == 'e' else 'A'} {config.architecture} Transformer{form} with "
        f"{tree.size(shapes):,} parameters, "
        + (f"with the head '{config.head}'" if config.head != "none" else "without a head")
        + f". It was called `{card.get('name', 'without a name')}` where it was made, with llm_jax.",
        "",
        "- " + ", ".join(f"{name} {x:,}" for name, x in sizes.items() if x),
        f"- norm {config.norm} ({config.norm_place}), positions {config.positions}, activation {config.mlp}",
    ]
    if tokenizer is not None:
        lines.append(f"- tokenizer of {tokenizer.vocab_size:,} entries, fingerprint `{tokenizer.fingerprint[:SHORT]}`")
    if h := card.get("hashes", {}).get("params"):
        lines.append(f"- content hash of the weights in llm_jax: `{h}`")
    return lines


def _history(card: Card, ancestors: Sequence[Card]) -> list[str]:
    """The chain of parents, the oldest first; for each what was done."""
    known = {each["hashes"]["params"]: each for each in ancestors}
    lines = []
    for each in [*reversed(ancestors), card]:
        parents = each.get("parents", [])
        first = known.get(parents[0]) if parents else None
        named = [f"`{known[h]['name']}` ({h[:SHORT]})" if h in known else f"`{h[:SHORT]}`" for h in parents]
        own = each.get("hashes", {}).get("params", "")
        text = f"`{each.get('name', 'a model')}`" + (f" ({own[:SHORT]})" if own else "")
        text += f": {card_text.made(each, first)}" + (f"; made of {' and '.join(named)}" if named else "")
        start = card_text.starts_outside(each)
        text += f"; started from `{start}`" if start else ""
        teachers = [f"{name} `{h[:SHORT]}`" for name, h in each.get("references", {}).items()]
        lines.append(f"1. {text}" + (f"; its loss read {', '.join(teachers)}" if teachers else ""))
    absent = {h for each in (card, *ancestors) for h in each.get("parents", [])} - set(known)
    if absent:
        lines += ["", f"No card was found of {', '.join(f'`{h[:SHORT]}`' for h in sorted(absent))}."]
    if not card_text.is_run(card) and len(card.get("transforms", [])) > 1:
        lines += ["", f"All changes that its card names, in order: {', '.join(f'`{x}`' for x in card['transforms'])}."]
    if card_text.origin(card):
        lines += ["", f"The first weights were imported; their files said of themselves: {card_text.origin(card)}."]
    pruned = card.get("pruned") or {}
    if pruned:
        rows = [f"| `{name}` | {share:.2%} |" for name, share in pruned.items()]
        lines += ["", "Pruned weights and their zeros:", "", "| weight | zeros |", "|---|---|", *rows]
    return lines


def _runs(card: Card, ancestors: Sequence[Card]) -> list[Card]:
    """The cards of runs, the oldest first. Where the card is of no run, what it holds of one is that of the run it was made from."""
    return [each for each in [*reversed(ancestors), card] if card_text.is_run(each)] or [card]


def _run_name(card: Card) -> str:
    return card.get("config", {}).get("name", card.get("name", ""))


def _data(card: Card, ancestors: Sequence[Card]) -> list[str]:
    lines = []
    for each in _runs(card, ancestors):
        for s in card_text.sources(each):
            lines.append(f"| `{_run_name(each)}` | `{s['spec']}` | {s['documents']:,} | `{s['fingerprint'][:16]}` |")
    return ["| run | source | documents | fingerprint |", "|---|---|---|---|", *lines] if lines else []


def _results(card: Card) -> list[str]:
    found = card_text.figures(card)
    if not found:
        return ["The card of this model holds no held-out figures."]
    named = card_text.heldout(card)
    lines = [f"Held out: {named}.", ""] if named else []
    return [*lines, "| figure | value |", "|---|---|", *(f"| {name} | {x:.6g} |" for name, x in found.items())]


def _compute(card: Card, ancestors: Sequence[Card]) -> list[str]:
    lines = []
    for each in _runs(card, ancestors):
        if "flops" in each and "tokens" in each:
            device = each.get("device", {})
            on = f"{device['count']} x {device['kind']}" if device else ""
            steps = each.get("step", "")
            lines.append(f"| `{_run_name(each)}` | {steps} | {each['tokens']:,.0f} | {each['flops']:.4g} | {on} |")
    head = ["| run | steps | tokens read | floating-point operations | device |", "|---|---|---|---|---|"]
    said = [f"Code version of the last step: `{card['code']}`."] if "code" in card else []
    return [*(head if lines else []), *lines, *([""] if lines and said else []), *said]


def _loading(title: str, config: ModelConfig, tokenizer: Tokenizer | None, architecture: str) -> list[str]:
    lines = ["```python"]
    if architecture:
        names = f"AutoTokenizer, {architecture}" if tokenizer is not None else architecture
        lines += [f"from transformers import {names}", "", f"model = {architecture}.from_pretrained({title!r})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({title!r})"] if tokenizer is not None else []
        lines += ["```", "", "```python"]
    return [*lines, "import llm_jax", "", f"model = llm_jax.load({title!r})", "```"]


def _limits(card: Card) -> list[str]:
    lines = []
    left = card.get("huggingface", {}).get("left_out") or []
    if left:
        lines.append(f"- Left out when the first weights were imported: {', '.join(f'`{name}`' for name in left)}.")
    stated = card.get("results", {}).get("step")
    if card_text.figures(card) and stated != card.get("step"):
        lines.append(f"- The figures are of step {stated}, the weights of step {card.get('step')}.")
    if card.get("pruned"):
        lines.append("- Pruned weights are stored as zeros: the files are as large as those of a dense model.")
    if str(card.get("code", "")).endswith("-dirty"):
        lines.append("- The code that made it had changes that are in no commit.")
    return lines
