"""The values of a config.json, each read with its type. What a value means is said by the family that reads it."""

import json
from collections.abc import Mapping
from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.storage import Path

LARGEST = 2**31 - 1
"""a size beyond this is no size"""

GREATEST = 1e30
"""nor is this a rate, a base or an epsilon"""

_MISSING: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, not JSON, or another value than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: it holds a {type(found).__name__}, not a JSON object")
    return found


class Fields:
    """A config.json whose values are asked for one by one.

    >>> Fields({"hidden_size": 8}, "config.json").integer("hidden_size")
    8
    """

    def __init__(self, values: Mapping[str, Any], where: Any):
        self.values = values
        self.where = where

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        shown = repr(self.values.get(key))
        return CheckpointError(f"{self.where}: {key} is {shown[:80]}: {wanted}")

    def _get(self, key: str, default: Any) -> Any:
        """The value of a key; a null, like an absent key, stands for the default."""
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.where}: it has no {key}")
            return default
        return value

    def integer(self, key: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number. Raises CheckpointError for what is none, and for one beyond all reason."""
        value = self._get(key, default)
        if self.values.get(key) is None:
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "it must be a whole number")
        if not least <= value <= LARGEST:
            raise self._wrong(key, f"it must lie from {least} to {LARGEST}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number that a float holds. Raises CheckpointError for what is none."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < GREATEST:
            raise self._wrong(key, "it must be a number")
        return float(value)

    def rate(self, key: str, default: float) -> float:
        """A number from 0 up to 1. Raises CheckpointError for what is none."""
        value = self.number(key, default)
        if not 0 <= value < 1:
            raise self._wrong(key, "it must lie from 0 up to 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises CheckpointError for what is neither."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "it must be true or false")
        return value

    def word(self, key: str, table: Mapping[str, str], default: str) -> str:
        """What the table says for a word. Raises CheckpointError for a word that it has not."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in table:
            raise self._wrong(key, f"not implemented; known: {', '.join(sorted(table))}")
        return table[value]

    def only(self, **wanted: Any) -> None:
        """Raise unless each key is absent, null or has the one value that is implemented."""
        for key, value in wanted.items():
            found = self.values.get(key)
            if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
                raise self._wrong(key, f"not implemented; only {json.dumps(value)} is")

    def section(self, key: str) -> "Fields":
        """The object under a key; an empty one where there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "it must be an object")
        return Fields(value, f"{self.where}: {key}")

    def words(self, key: str) -> list[str]:
        """A list of strings; an empty one where there is none."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._wrong(key, "it must be a list of strings")
        return value
