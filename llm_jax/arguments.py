"""How the verbs read their arguments and print: one line for an error, the nearest name for what is misspelt, one JSON value if asked."""

import argparse
import json
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
    """Print the text, or the result as JSON."""
    print(json.dumps(result, indent=1) if as_json else text)


def config_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are about a config, with the values that follow them, and the others."""
    told: list[str] = []
    rest: list[str] = []
    into = rest
    for word in arguments:
        if word.startswith("-"):
            into = told if word.split("=")[0] == "--config" or word.startswith("--config.") else rest
        into.append(word)
    return told, rest
