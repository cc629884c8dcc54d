"""How the verbs read their arguments and print: one line for an error, the nearest name for what is misspelt, one JSON value if asked."""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llm_jax.errors import UserError, suggest


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and the nearest name for an unknown option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [o for action in self._actions for o in action.option_strings]
            known += re.findall(r"--[a-z-]+", self.epilog or "")  # --config, which is read elsewhere, stands there
            raise UserError(f"unknown argument {rest[0]!r}{suggest(rest[0].split('=')[0], known)}")
        return found


def parser_of(verb: str, function: Callable[..., Any], example: str) -> Parser:
    """The parser of a verb, whose help is the function's docstring, with `--json`."""
    parser = Parser(
        prog=f"python -m llm_jax {verb}",
        description=function.__doc__,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def report(result: Any, text: str, as_json: bool) -> None:
    """Print the text, or the result as JSON, which has no NaN and no infinity: null stands for them."""
    print(json.dumps(_finite(result), indent=1, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """Plain data with None for each number that is not finite.

    >>> _finite({"loss": float("nan"), "rows": [(1, 0.5, float("inf"))]})
    {'loss': None, 'rows': [[1, 0.5, None]]}
    """
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are about a config, with the values that follow them, and the others.

    `--config` takes the next word, `--config.KEY` all up to the next option; with `=` they have their value already.

    >>> print(*config_arguments(["--config=a.py", "production", "--config.data.sources", "x", "y", "--json"]))
    ['--config=a.py', '--config.data.sources', 'x', 'y'] ['production', '--json']
    >>> print(*config_arguments(["--config", "a.py", "production"]))
    ['--config', 'a.py'] ['production']
    """
    told: list[str] = []
    rest: list[str] = []
    name, values = "", rest
    for word in arguments:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            into = told if name == "--config" or name.startswith("--config.") else rest
            into.append(word)
            values = rest if equals else into
        else:
            values.append(word)
            if name == "--config":
                values = rest
    return told, rest
