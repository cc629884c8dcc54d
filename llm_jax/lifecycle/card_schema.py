"""What a card must and may hold, as a JSON Schema (2020-12), and the check. Keys that newer versions or transforms add are let through."""

from typing import Any

import jsonschema

HASH: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TEXT: dict[str, Any] = {"type": "string"}
TEXTS: dict[str, Any] = {"type": "array", "items": TEXT}
COUNT: dict[str, Any] = {"type": "number", "minimum": 0}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
OBJECT: dict[str, Any] = {"type": "object"}

MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["architecture", "vocab_size", "layers", "dim", "heads"],
    "properties": {
        "architecture": {"enum": ["encoder", "decoder", "encoder-decoder"]},
        **dict.fromkeys(("vocab_size", "max_length", "layers", "decoder_layers", "dim", "heads", "kv_heads"), WHOLE),
        **dict.fromkeys(("head_dim", "mlp_dim", "labels", "token_types", "lora_rank"), WHOLE),
        **dict.fromkeys(("mlp", "norm", "norm_place", "positions", "bias", "head"), TEXT),
    },
}

CONFIG: dict[str, Any] = {
    "type": "object",
    "required": ["name", "start", "steps", "task", "data", "optimizer", "batch"],
    "properties": {
        "name": TEXT,
        "start": TEXT,
        "seed": {"type": "integer"},
        "steps": WHOLE,
        "transforms": TEXTS,
        "task": {"type": "object", "required": ["kind"], "properties": {"kind": TEXT}},
        "data": {
            "type": "object",
            "required": ["sources"],
            "properties": {"sources": TEXTS, "heldout_sources": TEXTS, "heldout": COUNT},
        },
        "optimizer": OBJECT,
        "batch": OBJECT,
        "checkpoint": {"type": "object", "properties": {"best": TEXT}},
        "eval": OBJECT,
    },
}

SOURCES: dict[str, Any] = {
    "type": "object",
    "required": ["sources"],
    "properties": {
        "sources": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["spec", "fingerprint", "documents"],
                "properties": {"spec": TEXT, "fingerprint": TEXT, "documents": WHOLE},
            },
        },
        "settings": OBJECT,
    },
}

RUN = ("config", "sources", "seed", "code", "libraries", "device", "mesh", "results", "tokens", "flops")
"""What the card of a run's checkpoint has beside its step"""

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "The card of a checkpoint",
    "type": "object",
    "required": ["name", "parents", "transforms", "model", "hashes"],
    "properties": {
        "name": TEXT,
        "parents": {"type": "array", "items": HASH},
        "transforms": TEXTS,
        "model": MODEL,
        "hashes": {
            "type": "object",
            "required": ["params"],
            "properties": {"params": HASH, "state": HASH},
        },
        "config": CONFIG,
        "sources": SOURCES,
        "seed": {"type": "integer"},
        "code": TEXT,
        "libraries": {"type": "object", "additionalProperties": TEXT},
        "device": {
            "type": "object",
            "required": ["kind", "count"],
            "properties": {"kind": TEXT, "count": WHOLE, "processes": WHOLE},
        },
        "repeatable": {"type": "boolean"},
        "mesh": {"type": "object", "additionalProperties": WHOLE},
        "step": WHOLE,
        "tokens": COUNT,
        "flops": COUNT,
        "results": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
        "best": {"type": "object", "required": ["step"], "properties": {"step": WHOLE}},
        "kept": TEXTS,
        "moments": TEXT,
        "references": {"type": "object", "additionalProperties": HASH},
        "pruned": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1}},
        "labels": TEXTS,
        "huggingface": {
            "type": "object",
            "required": ["config"],
            "properties": {"config": OBJECT, "left_out": TEXTS, "copies": TEXTS},
        },
        "gguf": {
            "type": "object",
            "required": ["architecture"],
            "properties": {"architecture": TEXT, "name": TEXT, "types": OBJECT},
        },
        "license": TEXT,
        "language": {"anyOf": [TEXT, TEXTS]},
    },
    "dependentRequired": {"step": list(RUN)},
}

_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def check_card(card: Any) -> list[str]:
    """What is wrong with a card, each as `key: what`; empty where it is a card.

    >>> check_card({"name": "x", "parents": [], "transforms": [], "model": {}})[0]
    "'hashes' is a required property"
    """
    found = sorted(_VALIDATOR.iter_errors(card), key=lambda error: [str(x) for x in error.absolute_path])
    return [_told(error) for error in found]


def _told(error: Any) -> str:
    where = "/".join(map(str, error.absolute_path))
    message = error.message if len(error.message) < 200 else f"{error.message[:200]}..."
    return f"{where}: {message}" if where else message
