"""`python -m llm_jax VERB` and `train.py`: what a user gets wrong is one line and exit status 2."""

import os
import sys
from collections.abc import Sequence

from llm_jax import commands
from llm_jax.errors import UserError, suggest
from llm_jax.lifecycle import commands as lifecycle

VERBS = {**commands.VERBS, **lifecycle.VERBS}


def _help() -> str:
    verbs = "\n".join(f"  {name:10} {(f.__doc__ or '').splitlines()[0]}" for name, f in VERBS.items())
    return f"usage: python -m llm_jax VERB ...\n\n{verbs}\n\npython -m llm_jax VERB --help explains each."


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help())
            return 0
        if arguments[0] not in VERBS:
            raise UserError(f"unknown verb {arguments[0]!r}{suggest(arguments[0], VERBS)}")
        if arguments[0] != "train":
            _setup()
        VERBS[arguments[0]](arguments[1:])
    except UserError as e:
        print(f"error: {e}" if e.status == 2 else e, file=sys.stderr)
        return _end(e.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _end(status: int) -> int:
    if "jax" not in sys.modules:  # nothing was begun
        return status
    from llm_jax.processes import end

    return end(status)


def _setup() -> None:
    from llm_jax.platform import setup

    setup()
