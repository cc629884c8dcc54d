"""The decoder of configs/eras_base.py is brought to 2026: as many old addresses as new ones among its rows, the learning rate warmed up again.

python train.py --config=configs/eras_base.py
python train.py --config=configs/eras_update.py

It is the recipe of `python -m llm_jax advise` and `update` too, which put the sources they are given in place of these. The held-out loss of
both eras is told at every evaluation: in the end 3.916 nats a token on old (3.907 before) and 4.084 on new (4.557). Three minutes on one core.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="eras_update",
        start="runs/eras_base",
        task=NextToken(),
        data=Data(sources=("asset:sotu#date=1946..", "asset:sotu#date=..1945"), weights=(0.5, 0.5), heldout=0.1),
        optimizer=Optimizer(name="muon", learning_rate=0.005, weight_decay=0.1),
        schedule=Schedule(name="linear", warmup=40, final=0.0),
        steps=500,
        batch=Batch(size=4, length=256),
        checkpoint=Checkpoint(every=250),
        eval=Eval(every=250, batches=20),
    )
