"""The verbs of a model's life: `python -m llm_jax VERB`. Each reads its arguments, calls one function and prints."""

import json
from collections.abc import Callable, Sequence

from llm_jax.arguments import parser_of

# ---- registry: promote, rollback


# ---- lineage: log, show, diff


def _show(arguments: Sequence[str]) -> None:
    """The card of a checkpoint: where it came from, what it is, how good it was."""
    parser = parser_of("show", _show, "python -m llm_jax show runs/quickstart")
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    options = parser.parse_args(arguments)

    from llm_jax.checkpoint import read_card

    print(json.dumps(read_card(options.checkpoint), indent=1))


# ---- drift


# ---- gate


# ---- update, advise, report


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "show": _show,
}
