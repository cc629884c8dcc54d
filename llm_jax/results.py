"""What a run leaves in its folder at the end: result.json, card.json, the curves, samples, and the judgement of each held-out example."""

import json
from typing import Any

import jax

from llm_jax import checkpoint, generation
from llm_jax import log as logs
from llm_jax.parts import Parts
from llm_jax.storage import Path
from llm_jax.tasks.base import Judgement

TOKENS = 64
"""Tokens of the continuation of a prompt, where the model has a position for each"""


def write(parts: Parts, params: Any, judgement: Judgement | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Write all of it; returns what result.json holds: the facts, the samples, and where everything lies."""
    folder, stands = parts.run.folder, checkpoint.find(parts.run.folder)
    names = {"metrics": "metrics.jsonl", "tensorboard": "tensorboard", "curves": "curves.png"}
    paths = {
        "folder": str(folder),
        "checkpoint": str(stands),
        **{what: str(folder / name) for what, name in names.items()},
    }
    result = {**facts, "samples": samples(parts, params), "paths": paths}
    if jax.process_index() == 0:
        if judgement is not None:
            paths |= {"predictions": str(_predictions(parts, judgement, folder)), **judgement.draw(folder)}
        logs.draw_curves(folder)
        (folder / "card.json").write_text(json.dumps(checkpoint.read_card(stands), indent=1), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _predictions(parts: Parts, judgement: Judgement, folder: Path) -> Path:
    """predictions.jsonl: a line each held-out document, by its id."""
    path = folder / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for example in judgement.examples:
            named = {"id": parts.heldout[0].record_id(example["document"]), **example}
            named.pop("document")
            file.write(json.dumps(named, ensure_ascii=False) + "\n")
    return path


def samples(parts: Parts, params: Any) -> list[dict[str, str]]:
    """Continuations of the config's prompts."""
    settings, model = parts.run.eval, parts.model
    if not settings.prompts or model.architecture == "encoder":
        return []
    longest = max(len(parts.tokenizer.encode(prompt)) for prompt in settings.prompts) + 1
    room = model.max_length - longest if model.positions == "learned" else TOKENS
    if room < 1:
        return []
    texts = generation.generate(
        model,
        params,
        parts.tokenizer,
        settings.prompts,
        max_new_tokens=min(TOKENS, room),
        temperature=0.8,
        top_p=0.95,
        seed=parts.run.seed,
    )
    return [{"prompt": prompt, "text": text} for prompt, text in zip(settings.prompts, texts)]
