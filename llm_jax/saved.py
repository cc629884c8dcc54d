"""Which checkpoints there are, and what their text files say, verified. Nothing of arrays (`checkpoint.py`), so that it is read without JAX."""

import hashlib
import json
from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.storage import Path, as_path, is_remote

SUMS = "SHA256SUMS"
"""The file with the checksums of the text files, as `sha256sum --check` reads it."""

COMMIT = "commit_success.txt"
"""What Orbax writes when all else of a checkpoint is written, in a bucket as on a disk"""


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a run's folder, ascending."""
    root = as_path(folder) / "checkpoints"
    if is_remote(root):
        whole = [p.parent.name for p in root.glob(f"*/{COMMIT}")]
    else:
        whole = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    return sorted(int(name) for name in whole if name.isdigit())


def _is_complete(path: Path) -> bool:
    return (path / "about").is_dir() and (not is_remote(path) or (path / COMMIT).is_file())


def find(path: Path) -> Path:
    """The checkpoint that `path` stands for: itself, or of a run's folder the newest, in a run with eval.patience the best.

    Raises:
        CheckpointError: there is none.
    """
    path = as_path(path).absolute()
    if _is_complete(path):
        return path
    for step in reversed(steps(path)):
        newest = path / "checkpoints" / str(step)
        if _is_complete(newest):
            return _best(newest) or newest
    raise CheckpointError(f"no checkpoint in {path}" if path.exists() else f"no such file or folder: {path}")


def _best(newest: Path) -> Path | None:
    """The checkpoint that a run with patience ends with, as its newest one knows it; None for other runs."""
    try:
        card = json.loads(texts(newest)["card.json"])
        best = newest.with_name(str(card["best"]["step"]))
        return best if card["config"]["eval"]["patience"] and _is_complete(best) else None
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of a model that no run made: told when it is read
        return None


def texts(path: Path) -> dict[str, str]:
    """The text files of a checkpoint. Raises OSError or ValueError when one is missing or not what was written."""
    folder = path / "about"
    found = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"about/{name} is not what was written")
        found[name] = content.decode()
    if "card.json" not in found:
        raise ValueError("it has no card")
    return found


def root_cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_texts(path: Path) -> dict[str, str]:
    """The text files of a checkpoint by name, verified: card.json, tokenizer.json, data.json.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = find(path)
    try:
        return texts(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {path} is damaged: {root_cause(e)}") from e


def read_card(path: Path) -> dict[str, Any]:
    """The card of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    return json.loads(read_texts(path)["card.json"])


def params_hash(path: Path) -> str:
    """The content hash of a checkpoint's weights, by its card. Raises CheckpointError when that is missing or damaged."""
    try:
        return read_card(path)["hashes"]["params"]
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"the card of {path} has no hash of its weights: no checkpoint of this version") from e
