"""The verbs of `python -m llm_jax VERB`: each reads its arguments, calls one function and prints."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.arguments import config_arguments, parser_of, report
from llm_jax.errors import UserError


def _train(arguments: Sequence[str]) -> None:
    """Carry out the run of a config, or continue it: --config=FILE [--config.KEY=VALUE ...]."""
    from llm_jax import config

    as_json = "--json" in arguments
    if not arguments or {"-h", "--help"} & set(arguments):
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
        ["held out: " + "  ".join(f"{name} {x:.4f}" for name, x in result["eval"].items() if _main(name))]
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
    report(result, "\n".join(lines), as_json)


def _main(name: str) -> bool:
    """Whether a figure is said in a line; those of single classes and counts are in result.json."""
    return "/" not in name and name not in ("tokens", "examples")


def _evaluate(arguments: Sequence[str]) -> None:
    """Held-out loss, perplexity, bits per byte and accuracy of a checkpoint on its run's held-out documents, or on other text."""
    parser = parser_of("eval", _evaluate, "python -m llm_jax eval runs/quickstart --source='text:books/*.txt'")
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument(
        "--source", action="append", default=[], help="source to evaluate on, e.g. text:GLOB; may be repeated"
    )
    parser.add_argument("--length", type=int, default=0, help="tokens of a row; by default that of the run")
    parser.add_argument("--batch", type=int, default=0, help="rows of a batch; by default that of the run")
    options = parser.parse_args(arguments)
    from llm_jax.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(options.checkpoint, tuple(options.source), options.length, options.batch)
    report(found, "\n".join(f"{name:14} {x:.6g}" for name, x in found.items()), options.json)


def _score(arguments: Sequence[str]) -> None:
    """The log-probability, in nats, of each token of a text and of the whole."""
    parser = parser_of(
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
    report(
        {"tokens": [{"token": t, "log_probability": p} for t, p in found], "log_probability": total},
        "\n".join(lines),
        options.json,
    )


def _generate(arguments: Sequence[str]) -> None:
    """Continue prompts, as the text comes."""
    parser = parser_of(
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
    report(result, "" if streaming else "\n\n".join(r["prompt"] + r["text"] for r in result), options.json)


def _sweep(arguments: Sequence[str]) -> None:
    """Carry out a config once for each of several seeds: mean and spread of what is held out."""
    parser = parser_of("sweep", _sweep, "python -m llm_jax sweep --config=configs/snippets_minilm.py --seeds 0 1 2")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, help="seeds of the runs")
    parser.epilog = f"{parser.epilog}\n\n--config=FILE and --config.KEY=VALUE are those of train.py."
    told = [a for a in arguments if a.startswith("--config")]
    options = parser.parse_args([a for a in arguments if not a.startswith("--config")])
    from llm_jax import config
    from llm_jax.sweep import sweep

    found = sweep(config.parse(told), options.seeds)
    lines = [f"{name:24} {x['mean']:.4f} +- {x['spread']:.4f}" for name, x in found["eval"].items() if "/" not in name]
    report(found, "\n".join([f"{len(options.seeds)} seeds, mean and standard deviation", *lines]), options.json)


def _predict(arguments: Sequence[str]) -> None:
    """The class of each text, by a model that was trained to classify, with the probability of each class."""
    parser = parser_of("predict", _predict, "python -m llm_jax predict runs/snippets_minilm 'a quiet triumph'")
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument("texts", nargs="+", help="texts; - reads them from standard input, one a line")
    parser.add_argument("--pair", action="append", default=[], help="the second text of each pair, in the same order")
    options = parser.parse_args(arguments)
    from llm_jax import evaluate, model

    texts = [line for text in options.texts for line in (sys.stdin.read().splitlines() if text == "-" else [text])]
    found = evaluate.predict(model.load(options.checkpoint), texts, options.pair)
    report(found, "\n".join(map(_answer, found)), options.json)


def _answer(found: dict[str, Any]) -> str:
    """A prediction as a line."""
    if found["label"] is None:
        return f"no answer          {found['text']!r} holds no token"
    return f"{found['label']:12} {found['probabilities'][found['label']]:.4f}  {found['text']}"


def _merge(arguments: Sequence[str]) -> None:
    """Make one model of several that share their sizes: mean, moving average, slerp, task vectors, TIES."""
    parser = parser_of("merge", _merge, "python -m llm_jax merge merged runs/a runs/b --method=ties --keep=0.2")
    parser.add_argument("out", help="the checkpoint to write; must not exist")
    parser.add_argument(
        "models", nargs="+", help="checkpoints or runs' folders; for task_vectors and ties the first is the base"
    )
    parser.add_argument("--method", default="mean", help="mean, moving_average, slerp, task_vectors or ties")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], help="of the mean, one a model; by default equal"
    )
    parser.add_argument(
        "--decay", type=float, default=0.9, help="of the moving average, the models in the order of training"
    )
    parser.add_argument("--t", type=float, default=0.5, help="slerp: place between the two models")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="task_vectors and ties: factor of what is added to the base"
    )
    parser.add_argument("--keep", type=float, default=0.2, help="ties: share of each model's change that is kept")
    options = parser.parse_args(arguments)
    from llm_jax import model
    from llm_jax.transforms import merge

    names = ("weights", "decay", "t", "scale", "keep")
    change = merge(options.method, **{name: getattr(options, name) for name in names})
    made = model.merge([model.load(path) for path in options.models], change)
    model.save(made, options.out)
    found = {"checkpoint": options.out, "transform": change.label, "parents": made.card["parents"]}
    report(found, f"{options.out}: {change.label} of {len(options.models)} models", options.json)


def _import(arguments: Sequence[str]) -> None:
    """Make a checkpoint of a Hugging Face directory, a GGUF file or asset:NAME."""
    parser = parser_of("import", _import, "python -m llm_jax import models/bert-base-uncased checkpoints/bert")
    parser.add_argument("source", help="a Hugging Face directory, a GGUF file, or asset:minilm")
    parser.add_argument("checkpoint", help="the checkpoint to write; must not exist")
    parser.add_argument(
        "--head", help="of a directory: none, lm, mlm, classification or span; by default that of its config.json"
    )
    parser.add_argument("--labels", type=int, help="classes of a classification head that is made afresh")
    parser.add_argument("--adapter", help="a folder of PEFT's, whose factors are put beside the weights")
    options = parser.parse_args(arguments)
    from llm_jax import model, tree
    from llm_jax.interop import huggingface, peft

    kind, path = model.locate(options.source)
    if options.head or options.labels:
        if kind != "huggingface":
            raise UserError("--head and --labels are for a Hugging Face directory")
        loaded = huggingface.load(path, head=options.head, labels=options.labels)
    else:
        loaded = model.load(path)
    if options.adapter:
        loaded = peft.load(options.adapter, loaded)
    model.save(loaded, options.checkpoint)
    origin = loaded.card.get("huggingface") or loaded.card.get("gguf") or {}
    found = {
        "checkpoint": options.checkpoint,
        "architecture": loaded.config.architecture,
        "head": loaded.config.head,
        "parameters": tree.size(loaded.params),
        "left_out": origin.get("left_out", []),
    }
    report(found, "\n".join(f"{name:14} {x if x != [] else 'nothing'}" for name, x in found.items()), options.json)


def _export(arguments: Sequence[str]) -> None:
    """Write a checkpoint in another project's form: --format=hf, a Hugging Face directory; --format=peft, its factors of low rank alone."""
    parser = parser_of(
        "export", _export, "python -m llm_jax export runs/snippets_minilm out/minilm-reviews --format=hf"
    )
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder")
    parser.add_argument("out", help="the folder to write; must be absent or empty")
    parser.add_argument("--format", choices=["hf", "peft"], default="hf")
    parser.add_argument("--base", default="", help="of peft: where PEFT finds the base model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default that of the import")
    options = parser.parse_args(arguments)
    if options.format == "peft":
        if options.dtype:
            raise UserError("--dtype is for --format=hf: an adapter is written as it is")
        from llm_jax import model
        from llm_jax.interop import peft

        peft.save(model.load(options.checkpoint), options.out, options.base)
        report({"path": options.out, "format": "peft"}, f"adapter        {options.out}", options.json)
        return
    if options.base:
        raise UserError("--base is for --format=peft")
    from llm_jax.interop.huggingface import export_model

    found = export_model(options.checkpoint, options.out, dtype=options.dtype)
    report(found, "\n".join(f"{name:14} {x}" for name, x in found.items()), options.json)


def _cost(arguments: Sequence[str]) -> None:
    """What a change of sizes saves: parameters, operations and measured time of a forward pass of two models."""
    parser = parser_of("cost", _cost, "python -m llm_jax cost runs/snippets_minilm runs/distilbert_reviews")
    parser.add_argument("before", help="a model: a checkpoint, a run's folder, a Hugging Face directory or a GGUF file")
    parser.add_argument("after", help="another")
    parser.add_argument("--rows", type=int, default=8, help="of the batch, 8 by default")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row, 64 by default")
    options = parser.parse_args(arguments)
    from llm_jax import cost, model

    for name in ("rows", "length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be at least 1")
    a, b = model.load(options.before), model.load(options.after)
    for each in (a, b):
        if each.config.positions == "learned" and options.length > each.config.max_length:
            raise UserError(f"--length is {options.length}, but a row of {each} has at most {each.config.max_length}")
    found = cost.compare(a.config, b.config, (options.rows, options.length), a.params, b.params)
    report({**dataclasses.asdict(found), "speedup": found.speedup}, str(found), options.json)


def _cache(arguments: Sequence[str]) -> None:
    """Write what a teacher finds most probable in every row that a config's run will train on, for `cached(...)`."""
    example = "python -m llm_jax cache --config=configs/quickstart.py --teacher=runs/sotu --out=caches/sotu --k=32"
    parser = parser_of("cache", _cache, example)
    parser.add_argument("--teacher", required=True, help="a model with a head over the run's vocabulary")
    parser.add_argument("--out", required=True, help="the folder to write; must hold no cache yet")
    parser.add_argument("--k", type=int, default=32, help="tokens kept at each place, 32 by default")
    parser.add_argument("--temperature", type=float, default=1.0, help="by which logits are divided, 1 by default")
    parser.epilog = f"{parser.epilog}\n\n--config=FILE and --config.KEY=VALUE are those of train.py."
    told, rest = config_arguments(arguments)
    options = parser.parse_args(rest)
    from llm_jax import config, teachers

    header = teachers.cache(config.parse(told), options.teacher, options.out, options.k, options.temperature)
    found = teachers.describe(header, options.out)
    text = (
        f"{found['rows']} rows, {found['k']} tokens at each place, {found['mass']:.2%} of the teacher's probability, "
        f"{found['bytes'] / 1e6:.1f} MB\ncache: {found['path']}"
    )
    report(found, text, options.json)


def _plan(arguments: Sequence[str]) -> None:
    """What a run would take of chips that are not at hand: memory, operations, collectives, time; or which model fits a budget."""
    parser = parser_of("plan", _plan, "python -m llm_jax plan --config=configs/llama2_7b.py --topology=v5e:16x16")
    parser.epilog = (
        f"{parser.epilog}\n         python -m llm_jax plan --budget --topology=v5e:16x16 --days=7\n\n"
        "--config=FILE and --config.KEY=VALUE are those of train.py. For TPUs the run's step is compiled, which needs\n"
        "`pip install 'llm_jax[plan]'` and no TPU; GPUs are estimated."
    )
    parser.add_argument("--topology", required=True, help="chips and their network: v5e:16x16, v5p:4x4x4, h100:8")
    parser.add_argument("--search", action="store_true", help="try batches, remat and meshes; rank what fits")
    parser.add_argument("--compile", type=int, default=3, help="plans of a search that are compiled, 3 by default")
    parser.add_argument("--estimate", action="store_true", help="by formulas alone, compile nothing")
    parser.add_argument("--budget", action="store_true", help="which model to train with these chips in --days")
    parser.add_argument("--days", type=float, help="of a budget")
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed in a budget, 0.4 by default")
    told, rest = config_arguments(arguments)
    options = parser.parse_args(rest)
    days = options.days or 0.0
    if options.budget and (options.days is None or told):
        raise UserError("--budget goes with --topology and --days=N, and without a config")
    if options.budget and not (0 < days < float("inf") and 0 < options.utilisation <= 1):
        raise UserError("--days must be above 0, --utilisation in (0, 1]")
    if options.days is not None and not options.budget:
        raise UserError("--days goes with --budget")
    if options.compile < 0:
        raise UserError(f"--compile is {options.compile}: it must not be negative")
    from llm_jax import budget, config, plan, reports
    from llm_jax.chips import read_topology

    plan.prepare()
    topology = read_topology(options.topology)
    if options.budget:
        found = budget.choices(topology, days, options.utilisation)
        result = budget.to_dict(found, topology, days, options.utilisation)
        report(result, reports.budget(found, topology, days, options.utilisation), options.json)
        return
    run = config.parse(told)
    if options.search:
        from llm_jax.search import search

        plans = search(run, topology, 0 if options.estimate else options.compile)
        report([plan.to_dict(p) for p in plans], reports.ranking(plans), options.json)
        return
    made = plan.make(run, topology, compiled=not options.estimate)
    report(plan.to_dict(made), reports.plan(made), options.json)


def _with_tokenizer(loaded: Any) -> Any:
    if loaded.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer")
    return loaded


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "sweep": _sweep,
    "eval": _evaluate,
    "score": _score,
    "generate": _generate,
    "predict": _predict,
    "merge": _merge,
    "import": _import,
    "export": _export,
    "cost": _cost,
    "cache": _cache,
    "plan": _plan,
}
