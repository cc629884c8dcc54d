"""A small life for the tests of lineage: runs of two steps, changes without a run, a merge, an export that is imported again."""

import dataclasses
import json
from pathlib import Path

import jax

import llm_jax
from llm_jax import loop, model
from llm_jax.config import Batch, Data, Eval, Optimizer, Run
from llm_jax.interop import huggingface
from llm_jax.models import presets
from llm_jax.tasks import NextToken
from llm_jax.transforms import distil, grow_depth, merge, prune

SIZE = dict(vocab_size=280, max_length=32, layers=2, dim=16, heads=2, mlp_dim=24)


def tiny(root: Path, name: str, **changes) -> Run:
    """A run of two steps in `root/runs/name`."""
    corpus = root / "corpus.jsonl"
    if not corpus.exists():
        texts = [f"we the people of the {n} states, in order to form a more perfect union" for n in range(20)]
        corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run = Run(
        name=name,
        workdir=str(root / "runs" / name),
        model=presets.llama(**SIZE),
        task=NextToken(),
        data=Data(sources=(f"jsonl:{corpus}",), tokenizer="bpe:280", heldout=0.2, window=16),
        optimizer=Optimizer(learning_rate=1e-2),
        steps=2,
        batch=Batch(size=2, length=16),
        eval=Eval(batches=1),
    )
    return dataclasses.replace(run, **changes)


def live(root: Path) -> None:
    """base -> update (taught by base); base -> pruned -> grown; update + base -> merged; base, exported and imported, is base."""
    runs = root / "runs"
    loop.train(tiny(root, "base"))
    base = str(runs / "base")
    loop.train(tiny(root, "update", start=base, model=None, transforms=(distil(base),), seed=1))
    first, second = llm_jax.load(base), llm_jax.load(runs / "update")
    key = jax.random.key(0)
    pruned = llm_jax.transform(first, prune(0.5), key)
    llm_jax.save(dataclasses.replace(pruned, card={**pruned.card, "name": "pruned"}), root / "made" / "pruned")
    again = llm_jax.load(root / "made" / "pruned")
    grown = llm_jax.transform(again, grow_depth(3), key)
    llm_jax.save(dataclasses.replace(grown, card={**grown.card, "name": "grown"}), root / "made" / "grown")
    llm_jax.save(model.merge([second, first], merge("mean"), "merged"), root / "made" / "merged")
    directory = root / "directory"
    huggingface.save(model.Model(first.config, first.params, first.tokenizer), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "_name_or_path": "somebody/small-llama"}))
    llm_jax.save(llm_jax.load(directory), root / "made" / "imported")
