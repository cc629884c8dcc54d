"""`python -m llm_jax VERB`: reads arguments, calls one function, prints. What a user gets wrong is one line and exit status 2."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from llm_jax.errors import UserError


def _train(arguments: Sequence[str]) -> dict[str, Any]:
    from llm_jax import config, loop

    return loop.train(config.parse(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = _train(arguments[1:])
        print(json.dumps(result, indent=1))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0
