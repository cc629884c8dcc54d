"""What a user can get wrong. The commands print such an error as one line and exit with status 2; nothing here is a bug."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An input, a file, a configuration or a machine that cannot serve the request; the message says what to do."""

    status = 2
    """of the command that it ends"""


class ConfigError(UserError):
    """A key or a value of a configuration that is not allowed."""


class DataError(UserError):
    """A source, a record or a tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another shape."""


class NonFiniteError(UserError):
    """Too many updates in a row were skipped because the loss or the gradient was not finite."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'X'?"` for the known name nearest to `name`, or the list of names when none is near.

    >>> suggest("lerning_rate", ["learning_rate", "name"])
    "; did you mean 'learning_rate'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def choose(what: str, name: str, known: Iterable[str], error: type[UserError] = ConfigError) -> str:
    """Return `name` if it is among the known names, else raise with the nearest one."""
    names = list(known)
    if name not in names:
        raise error(f"unknown {what} {name!r}{suggest(name, names)}")
    return name
