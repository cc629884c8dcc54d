"""How good a model is: sums of the loss over held-out rows, and the log-probability of a text token by token."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np

from llm_jax import config, losses, model, sharding, tasks
from llm_jax.data.accounting import FIELDS
from llm_jax.data.documents import open_sources
from llm_jax.data.pipeline import Loader
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.losses import LossFn
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import apply
from llm_jax.platform import gather
from llm_jax.sharding import put
from llm_jax.tasks.next_token import document


def make_eval_step(loss: LossFn):
    """(params, batch, reference) -> sums over the batch's tokens, without dropout or smoothing."""

    def eval_step(params: Any, batch: Any, reference: Any) -> dict[str, Any]:
        found = loss(params, batch, None, reference)
        return {"total": found.total, "weight": found.weight, **found.metrics}

    return jax.jit(eval_step)


def evaluate(
    eval_step: Any, params: Any, loader: Loader, mesh: jax.sharding.Mesh, reference: Any = None, batches: int = 0
) -> dict[str, float]:
    """Loss a token, perplexity, bits a byte of text and accuracy over the loader's rows (the first `batches`, or all).

    Bits a byte are given where each token of the text is predicted once. The loader is put back to where it was.
    """
    begin = loader.get_state()
    sums: dict[str, float] = {}
    account = np.zeros(len(FIELDS))
    for rows in itertools.islice(loader, batches or None):
        account += rows.account
        for name, value in jax.device_get(eval_step(params, put(rows.batch, mesh), reference or {})).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    loader.set_state(begin)
    weight = sums.pop("weight", 0.0)
    if not weight:
        return {}
    nll = sums.get("nll", sums["total"])
    result = {"loss": sums["total"] / weight, "perplexity": math.exp(min(nll / weight, 700)), "tokens": weight}
    read = dict(zip(FIELDS, np.sum(gather(account.tolist()), axis=0).tolist()))
    if read["bytes"] and read["tokens"] == weight:
        result["bits_per_byte"] = nll / math.log(2) / read["bytes"]
    if "correct" in sums:
        result["accuracy"] = sums["correct"] / weight
    return result


def score(sizes: ModelConfig, params: Any, tokenizer: Tokenizer, text: str) -> list[tuple[str, float]]:
    """log p(t_i | t_<i) of each token of the text with its end token, in nats; rows longer than the model are cut in windows.

    A window after the first sees the last half of the one before it.

    Raises:
        UserError: the model is no decoder of text.
    """
    if sizes.architecture != "decoder" or sizes.head != "lm":
        raise UserError(
            f"a model of architecture {sizes.architecture!r} with head {sizes.head!r} gives a text no probability: "
            "it needs a decoder with head 'lm'"
        )
    symbols = document(text, tokenizer)
    inputs, targets = symbols[:-1], symbols[1:]
    length = min(sizes.max_length, max(16, 1 << (len(inputs) - 1).bit_length()))
    found: list[float] = []
    while len(found) < len(targets):
        start = 0 if not found else max(0, min(len(found) - length // 2, len(targets) - length))
        row = np.zeros((2, 1, length), np.int32)
        count = min(length, len(targets) - start)
        row[0, 0, :count], row[1, 0, :count] = inputs[start : start + count], targets[start : start + count]
        logs = np.asarray(_log_probabilities(sizes, params, row[0], row[1]))[0]
        found += [float(x) for x in logs[len(found) - start : count]]
    return [(tokenizer.token(int(t)), p) for t, p in zip(targets, found)]


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(sizes: ModelConfig, params: Any, tokens: Any, targets: Any) -> Any:
    return losses.log_probabilities(apply(sizes, params, {"tokens": tokens}, logits=False), targets)


def evaluate_checkpoint(path: str, sources: tuple[str, ...] = (), length: int = 0, rows: int = 0) -> dict[str, float]:
    """The `evaluate` figures of a checkpoint's task: on the documents its run held out, or on all documents of other sources.

    Raises:
        UserError: no checkpoint, no run's config in its card, nothing held out, or sources that cannot be read.
    """
    loaded = model.load(path)
    if "config" not in loaded.card:
        raise CheckpointError(f"the card of {path} names no run, so its task is not known")
    if loaded.tokenizer is None:
        raise CheckpointError(f"checkpoint {path} has no tokenizer")
    saved = loaded.card["config"]
    try:
        task = tasks.from_dict(saved["eval"]["task"] or saved["task"])
        plain: dict[str, Any] = {
            name: tuple(map(_tuple, x)) if isinstance(x, list) else x for name, x in saved["data"].items()
        }
        data = config.Data(**plain)
        batch = config.Batch(size=rows or saved["batch"]["size"], length=length or saved["batch"]["length"])
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"the card of {path} describes no run of this version ({e})") from e
    if sources:
        data = dataclasses.replace(data, heldout_sources=sources)
    if loaded.config.positions == "learned" and batch.length > loaded.config.max_length:
        raise UserError(
            f"rows of {batch.length} tokens are longer than the model's table of positions, {loaded.config.max_length}"
        )
    mesh = sharding.make_mesh()
    with (
        Loader(open_sources(data, "heldout"), loaded.tokenizer, task, data, batch, 0, "heldout") as loader,
        jax.set_mesh(mesh),
    ):
        return evaluate(make_eval_step(task.loss(loaded.config)), loaded.params, loader, mesh)


def _tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
