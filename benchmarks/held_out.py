"""Claim: a run's held-out bits per byte are below those of a 5-gram Kneser-Ney model of the same tokens, trained on the same documents.

    python train.py --config=configs/sotu.py
    python -m benchmarks.held_out runs/sotu

Fits the n-gram model on the run's training documents, as the run's tokenizer cut them, and scores the documents the run held out.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from benchmarks.common import write
from benchmarks.kneser_ney import KneserNey
from llm_jax import checkpoint, config
from llm_jax.data.documents import documents, open_sources
from llm_jax.data.tokenizer import Tokenizer


def symbols(tokenizer: Tokenizer, sources: list, data: config.Data, split: str) -> tuple[list[np.ndarray], int]:
    """The token ids of each document with its end token, and the UTF-8 bytes of them all."""
    texts = [source[int(i)][data.text] for source in sources for i in documents(source, data, split)]
    return [np.append(tokenizer.encode(text), tokenizer.eos) for text in texts], sum(
        len(text.encode()) for text in texts
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--order", type=int, default=5)
    options = parser.parse_args()
    folder = Path(options.run)
    result = json.loads((folder / "result.json").read_text())
    plain = checkpoint.read_card(folder)["config"]["data"]
    data = config.Data(**{name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()})
    tokenizer = Tokenizer.from_json((checkpoint.find(folder) / "about" / "tokenizer.json").read_text())
    sources = open_sources(data, "train")
    train, _ = symbols(tokenizer, sources, data, "train")
    heldout, size = symbols(tokenizer, sources, data, "heldout")
    baseline = KneserNey.fit(train, tokenizer.vocab_size, options.order)
    bits = -sum(float(np.sum(baseline.log_prob(document))) for document in heldout) / math.log(2) / size
    ours = result["eval"]["bits_per_byte"]
    print(
        f"{options.order}-gram Kneser-Ney: {bits:.4f} bits per byte; {result['name']}: {ours:.4f} after {result['seconds']:.0f} s"
    )
    write(
        f"held_out_{result['name']}",
        [
            {
                "name": f"held-out bits per byte of {result['name']} against {options.order}-gram Kneser-Ney",
                "value": ours,
                "target": bits,
                "holds": ours < bits,
                "seeds": 1,
                "spread": None,
                "seconds": result["seconds"],
                "documents": len(heldout),
            }
        ],
    )


if __name__ == "__main__":
    main()
