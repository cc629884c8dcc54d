"""`python -m llm_jax VERB`: reads arguments, calls one function, prints. What a user gets wrong is one line and exit status 2."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llm_jax.errors import UserError, suggest


class _Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and the nearest name for an unknown option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [o for action in self._actions for o in action.option_strings]
            raise UserError(f"unknown argument {rest[0]!r}{suggest(rest[0].split('=')[0], known)}")
        return found


def _print(result: Any, text: str, as_json: bool) -> None:
    print(json.dumps(result, indent=1) if as_json else text)


def _train(arguments: Sequence[str]) -> None:
    """Carry out the run of a config, or continue it: --config=FILE [--config.KEY=VALUE ...]."""
    from llm_jax import config

    as_json = "--json" in arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: python train.py --config=configs/NAME.py [--config.KEY=VALUE ...] [--json]\n\n"
            "example: python train.py --config=configs/quickstart.py --config.optimizer.learning_rate=3e-4\n\n"
            "Every key of the config can be overridden; the resolved config is printed first and kept as config.json in the run's folder.\n"
            "The same command continues a run that was stopped."
        )
        return
    run = config.parse([a for a in arguments if a != "--json"])
    from llm_jax import loop

    result = loop.train(run)
    lines = [f"prompt: {s['prompt']}\n{s['prompt']}{s['text']}\n" for s in result["samples"]]
    lines += (
        ["held out: " + "  ".join(f"{name} {x:.4f}" for name, x in result["eval"].items() if name != "tokens")]
        if result["eval"]
        else []
    )
    lines += [
        f"data: {result['data']['read']} documents read, {result['data']['dropped']} dropped, {result['data']['truncated']} truncated; "
        f"{result['data']['tokens']} tokens, {result['data']['lost']} lost; padding {result['data']['padding']:.2%}; "
        f"{result['data']['rows_without_targets']} of {result['data']['rows']} rows with nothing to predict",
        f"{result['steps']} steps, {result['tokens']:.0f} tokens, {result['seconds']:.0f} s",
    ]
    lines += [f"{name}: {path}" for name, path in result["paths"].items()]
    _print(result, "\n".join(lines), as_json)


def _evaluate(arguments: Sequence[str]) -> None:
    """Held-out loss, perplexity, bits per byte and accuracy of a checkpoint on its run's held-out documents, or on other text."""
    parser = _parser("eval", _evaluate, "python -m llm_jax eval runs/quickstart --source='text:books/*.txt'")
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument(
        "--source", action="append", default=[], help="source to evaluate on, e.g. text:GLOB; may be repeated"
    )
    parser.add_argument("--length", type=int, default=0, help="tokens of a row; by default that of the run")
    parser.add_argument("--batch", type=int, default=0, help="rows of a batch; by default that of the run")
    options = parser.parse_args(arguments)
    from llm_jax.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(options.checkpoint, tuple(options.source), options.length, options.batch)
    _print(found, "\n".join(f"{name:14} {x:.6g}" for name, x in found.items()), options.json)


def _score(arguments: Sequence[str]) -> None:
    """The log-probability, in nats, of each token of a text and of the whole."""
    parser = _parser(
        "score", _score, "python -m llm_jax score runs/quickstart 'We hold these truths to be self-evident'"
    )
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument("text", help="the text; - reads it from standard input")
    options = parser.parse_args(arguments)
    from llm_jax import evaluate, model

    loaded = _with_tokenizer(model.load(options.checkpoint))
    text = sys.stdin.read() if options.text == "-" else options.text
    found = evaluate.score(loaded.config, loaded.params, loaded.tokenizer, text)
    total = sum(p for _, p in found)
    lines = [f"{p:10.4f}  {token!r}" for token, p in found] + [
        f"{total:10.4f}  in all, {total / len(found):.4f} a token"
    ]
    _print(
        {"tokens": [{"token": t, "log_probability": p} for t, p in found], "log_probability": total},
        "\n".join(lines),
        options.json,
    )


def _generate(arguments: Sequence[str]) -> None:
    """Continue prompts, as the text comes."""
    parser = _parser(
        "generate",
        _generate,
        "python -m llm_jax generate runs/quickstart 'The state of the Union is' --temperature=0.8 --top-p=0.95",
    )
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument("prompts", nargs="+", help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="text that ends a continuation; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    from llm_jax import model

    loaded = _with_tokenizer(model.load(options.checkpoint))
    streaming = len(options.prompts) == 1 and not options.json
    if streaming:
        print(options.prompts[0], end="", flush=True)
    texts = model.generate(
        loaded,
        options.prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        seed=options.seed,
        on_text=(lambda row, more: print(more, end="", flush=True)) if streaming else None,
    )
    result = [{"prompt": p, "text": t} for p, t in zip(options.prompts, texts)]
    _print(result, "" if streaming else "\n\n".join(r["prompt"] + r["text"] for r in result), options.json)


def _show(arguments: Sequence[str]) -> None:
    """The card of a checkpoint: where it came from, what it is, how good it was."""
    parser = _parser("show", _show, "python -m llm_jax show runs/quickstart")
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    options = parser.parse_args(arguments)
    from pathlib import Path

    from llm_jax.checkpoint import read_card

    print(json.dumps(read_card(Path(options.checkpoint)), indent=1))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _evaluate,
    "score": _score,
    "generate": _generate,
    "show": _show,
}


def _parser(verb: str, function: Callable[..., Any], example: str) -> _Parser:
    parser = _Parser(
        prog=f"python -m llm_jax {verb}",
        description=function.__doc__,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def _with_tokenizer(loaded: Any) -> Any:
    if loaded.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer")
    return loaded


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
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _setup() -> None:
    from llm_jax.platform import setup

    setup()
