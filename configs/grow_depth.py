"""A decoder trained on the State of the Union addresses is grown from four layers to eight, which change nothing at first, and trained on.

python train.py --config=configs/sotu.py
python train.py --config=configs/grow_depth.py

Each new layer is a copy of the one below it whose last products are zero, so that the first loss is the last of the run before. Held out 1.180 bits
a byte before and 1.170 after, seed 0; 18 minutes on two idle cores. When growing saves operations: benchmarks/grow.py.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import NextToken
from llm_jax.transforms import grow_depth


def get_config() -> Run:
    return Run(
        name="grow_depth",
        start="runs/sotu",
        transforms=(grow_depth(8, how="zero"),),
        task=NextToken(),
        data=Data(sources=("asset:sotu",), heldout=0.05, window=16384),
        optimizer=Optimizer(name="muon", learning_rate=0.02, weight_decay=0.1),
        schedule=Schedule(name="linear", warmup=50, final=0.0),
        steps=1600,
        batch=Batch(size=8, length=256),
        checkpoint=Checkpoint(every=400),
        eval=Eval(every=400, batches=40, task=NextToken(overlap=128)),
    )
