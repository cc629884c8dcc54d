"""What a classifier of film snippets must keep: no more than 3.5 points of accuracy lost, no more than 7 on the fresh or on the rotten ones alone.

python train.py --config=configs/snippets_minilm.py
python -m llm_jax gate runs/snippets_minilm --suite=configs/suites/snippets.py

The margin is what the documents can tell, by `python -m benchmarks.gate --calibrate`: a head that is trained anew on another draw of the same data
moves accuracy by 0.9 points (one standard deviation), the bound lies 1.2 above it on the 2,600 snippets of 101 films, and 3.5 is past both together.
"""

from llm_jax.config import Batch, Data
from llm_jax.lifecycle.suite import Check, Limits, Suite
from llm_jax.tasks import Classification


def get_suite() -> Suite:
    accuracy = Check(
        "accuracy",
        Classification(labels=("rotten", "fresh")),
        # What configs/snippets_minilm.py holds out.
        Data(sources=("asset:rotten-tomatoes",), heldout=0.2, group="movie", long="truncate"),
        margin=0.035,
        metric="accuracy",
        batch=Batch(size=16, length=64),
        slices=("label",),
        group="movie",
        bound=0.65,
    )
    return Suite(checks=(accuracy,), limits=Limits(size=1.1, latency=1.5, memory=1.2, length=64))
