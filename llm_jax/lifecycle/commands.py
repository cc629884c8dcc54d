"""The verbs of a model's life: `python -m llm_jax VERB`. Each reads its arguments, calls one function and prints."""

import dataclasses
from collections.abc import Callable, Sequence

from llm_jax.arguments import config_arguments, parser_of, report

# ---- registry: promote, rollback


def _promote(arguments: Sequence[str]) -> None:
    """Move a name of the registry to a checkpoint that passed the gate against the model the name stands for."""
    parser = parser_of("promote", _promote, "python -m llm_jax promote production runs/sotu")
    parser.add_argument("name", help="e.g. production; read as registry:production wherever a model is named")
    parser.add_argument("checkpoint", help="a checkpoint, a run's folder, or registry:NAME")
    parser.add_argument("--registry", default="", help="folder; by default LLM_JAX_REGISTRY, else registry")
    parser.add_argument("--force", action="store_true", help="whatever the gate said; needs --why")
    parser.add_argument("--why", default="", help="reason, kept in the log")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle.registry import Registry

    registry = Registry(options.registry)
    known = registry.moves()
    made = registry.promote(options.name, options.checkpoint, force=options.force, why=options.why)
    said = f"it stands there already, by {made.told}" if made.entry in known else made.told
    report({**made.entry, "checkpoint": str(made.path)}, said, options.json)


def _rollback(arguments: Sequence[str]) -> None:
    """Move a name of the registry back to the version before; again goes one further back."""
    parser = parser_of("rollback", _rollback, "python -m llm_jax rollback production --why='answers are too long'")
    parser.add_argument("name", help="e.g. production")
    parser.add_argument("--registry", default="", help="folder; by default LLM_JAX_REGISTRY, else registry")
    parser.add_argument("--why", default="", help="reason, kept in the log")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle.registry import Registry

    made = Registry(options.registry).rollback(options.name, options.why)
    report({**made.entry, "checkpoint": str(made.path)}, made.told, options.json)


# ---- lineage: log, show, diff


def _show(arguments: Sequence[str]) -> None:
    """The card of a checkpoint: where it came from, what it is, how good it was; --json gives all of it."""
    parser = parser_of("show", _show, "python -m llm_jax show runs/quickstart")
    parser.add_argument("checkpoint", help="a checkpoint, a run's folder, or registry:NAME")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle import lineage, lineage_text

    card = lineage.read_card(options.checkpoint)
    report(card, lineage_text.card(card), options.json)


def _log(arguments: Sequence[str]) -> None:
    """Draw the tree of the models below some folders: what each was made of, how good it is, where it lies, what is missing."""
    parser = parser_of("log", _log, "python -m llm_jax log runs registry --check")
    parser.add_argument("folders", nargs="*", help="by default runs and the registry, where they exist")
    parser.add_argument("--registry", default="", help="whose names are shown; by default LLM_JAX_REGISTRY or registry")
    parser.add_argument(
        "--check", action="store_true", help="hash all weights; exit status 1 where they are not what their card says"
    )
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle import lineage, lineage_text

    found = lineage.read(options.folders, options.registry)
    edited = lineage.check(found) if options.check else None
    result, text = lineage_text.to_dict(found), lineage_text.draw(found)
    if edited is not None:
        result["edited"] = lineage_text.plain(edited)
        text += f"\n\n{lineage_text.checked(found, edited)}"
    report(result, text, options.json)
    if edited or (options.check and found.damaged):
        raise lineage.UnsoundError(
            f"checkpoints that are not what was written: {len(edited or ()) + len(found.damaged)}"
        )


def _diff(arguments: Sequence[str]) -> None:
    """What two models differ in: configs, sizes, data, parameters by layer and by path (norms, zeros), results, cost."""
    parser = parser_of("diff", _diff, "python -m llm_jax diff runs/eras_base runs/eras_update")
    parser.add_argument(
        "a", help="a checkpoint, a run's folder, registry:NAME, a Hugging Face directory or a GGUF file"
    )
    parser.add_argument("b", help="another")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle import difference, difference_text

    found = difference.diff(options.a, options.b)
    report(difference.to_dict(found), difference_text.told(found), options.json)


# ---- drift


def _drift(arguments: Sequence[str]) -> None:
    """Whether new documents still are what a model was made for: loss by slice, tests of old against new, and leave, update or retrain."""
    example = "python -m llm_jax drift runs/sotu --old='jsonl:2019.jsonl' --new='jsonl:2026.jsonl' --slice=date"
    parser = parser_of("drift", _drift, example)
    parser.add_argument("model", help="a checkpoint, a run's folder, or registry:NAME")
    parser.add_argument("--old", action="append", required=True, help="source of known documents; may be repeated")
    parser.add_argument("--new", action="append", required=True, help="source of what came since; may be repeated")
    parser.add_argument("--slice", default="", help="field to show the loss by, e.g. date, a domain, or source")
    parser.add_argument("--group", default="", help="field whose equal values make pieces one document: of one text")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle.drift import drift

    found = drift(options.model, options.old, options.new, options.slice, options.group)
    report(dataclasses.asdict(found), str(found), options.json)


# ---- gate


def _gate(arguments: Sequence[str]) -> None:
    """Whether a model may take another's place: non-inferior on every check of a suite, no slice that lost, within its limits. Status 0 or 1."""
    example = "python -m llm_jax gate runs/eras_update --against=registry:production --suite=configs/suites/eras.py"
    parser = parser_of("gate", _gate, example)
    parser.add_argument("candidate", help="a model: a run's folder, a checkpoint, registry:NAME")
    parser.add_argument(
        "--against", help="the model that it would replace; without, bounds and limits alone are judged"
    )
    parser.add_argument("--suite", required=True, help="Python file with get_suite()")
    parser.add_argument(
        "--registry",
        default="",
        help="of registry:NAME, and where the verdict is filed; by default LLM_JAX_REGISTRY, else registry",
    )
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle import gate
    from llm_jax.lifecycle.registry import Registry
    from llm_jax.lifecycle.suite import load_suite

    suite, registry = load_suite(options.suite), Registry(options.registry)
    incumbent = None if options.against is None else registry.locate(options.against)
    verdict = gate.gate(registry.locate(options.candidate), incumbent, suite)
    registry.record_gate(verdict)
    report(verdict, gate.told(verdict), options.json)
    if not verdict["passed"]:
        raise gate.RefusedVerdictError(f"gate {verdict['id']} refused {options.candidate}")


# ---- update, advise, report


def _advise(arguments: Sequence[str]) -> None:
    """How to update a model: small arms of equal compute, from nothing to retraining, judged by their held-out loss on old and on new text."""
    example = (
        "python -m llm_jax advise --config=configs/eras_update.py --start=runs/eras_base \\\n"
        "             --old='asset:sotu#date=..1945' --new='asset:sotu#date=1946..' --out=advice"
    )
    parser = parser_of("advise", _advise, example)
    parser.epilog = (
        f"{parser.epilog}\n\n--config=FILE and --config.KEY=VALUE are those of train.py: the recipe of an update."
    )
    parser.add_argument("--start", required=True, help="the model: a run's folder, a checkpoint, registry:NAME")
    parser.add_argument("--old", required=True, help="source that it was trained on")
    parser.add_argument("--new", required=True, help="source of what is new")
    parser.add_argument("--out", required=True, help="folder for the arms' runs, advice.json and advice.png")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=[], help="some of them; by default all that can be made")
    told, rest = config_arguments(arguments)
    options = parser.parse_args(rest)
    from llm_jax import config
    from llm_jax.lifecycle import advise
    from llm_jax.storage import as_path

    found = advise.advise(
        config.parse(told),
        options.start,
        options.old,
        options.new,
        as_path(options.out),
        options.seeds,
        options.arms,
    )
    report(advise.to_dict(found), advise.told(found), options.json)


def _update(arguments: Sequence[str]) -> None:
    """Keep a name current, in one command: drift, training by a recipe, gate, promotion or refusal. Killed anywhere, it goes on; safe from cron."""
    example = (
        "python -m llm_jax update production --config=configs/eras_update.py --suite=configs/suites/eras.py \\\n"
        "             --old='asset:sotu#date=..1945' --new='asset:sotu#date=1946..' --replay=0.5"
    )
    parser = parser_of("update", _update, example)
    parser.epilog = (
        f"{parser.epilog}\n\n--config=FILE and --config.KEY=VALUE are those of train.py: the recipe, whose start and sources are put in their place.\n"
        "Exit status 0: nothing drifted, or the update was promoted; 1: refused, or to be retrained."
    )
    parser.add_argument("name", help="of the registry")
    parser.add_argument("--old", required=True, help="source that the model knows")
    parser.add_argument("--new", required=True, help="source of what came since")
    parser.add_argument("--suite", required=True, help="file of the gate's suite")
    parser.add_argument(
        "--replay", type=float, default=0.25, help="share of the pieces drawn from --old, 0.25 by default"
    )
    parser.add_argument("--registry", default="", help="its folder; by default LLM_JAX_REGISTRY, else registry")
    parser.add_argument("--force", action="store_true", help="train although nothing drifted, or too much")
    told, rest = config_arguments(arguments)
    options = parser.parse_args(rest)
    from llm_jax import config
    from llm_jax.lifecycle.registry import Registry
    from llm_jax.lifecycle.update import NotCurrentError, update

    found = update(
        options.name,
        config.parse(told),
        options.old,
        options.new,
        options.suite,
        options.replay,
        Registry(options.registry),
        options.force,
    )
    report(
        {**dataclasses.asdict(found), "status": found.status},
        f"{found.outcome}: {found.why}\n{found.folder}",
        options.json,
    )
    if found.status:
        raise NotCurrentError(f"{options.name!r} stands where it stood")


def _report(arguments: Sequence[str]) -> None:
    """One HTML file of a name's life: versions, quality, forgetting, size, latency, compute, data, gates and moves."""
    parser = parser_of("report", _report, "python -m llm_jax report production --out=production.html")
    parser.add_argument("name", help="of the registry")
    parser.add_argument("--out", default="", help="the file; by default NAME.html")
    parser.add_argument("--registry", default="", help="its folder; by default LLM_JAX_REGISTRY, else registry")
    parser.add_argument("--runs", action="append", default=[], help="where checkpoints are looked for; may be repeated")
    options = parser.parse_args(arguments)
    from llm_jax.lifecycle.registry import Registry
    from llm_jax.lifecycle.report import report as write

    out = options.out or f"{options.name}.html"
    registry = Registry(options.registry)
    life = write(options.name, out, registry, [*options.runs, registry.folder] if options.runs else ())
    found = {"path": out, "versions": len(life.versions), "current": life.current}
    report(found, f"{out}: {len(life.versions)} versions of {life.name}", options.json)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "advise": _advise,
    "update": _update,
    "report": _report,
    "promote": _promote,
    "rollback": _rollback,
    "log": _log,
    "show": _show,
    "diff": _diff,
    "drift": _drift,
    "gate": _gate,
}
