"""MiniLM fine-tuned on 1,500 whole film reviews of some 750 words, a fifth of them held out; the first 64 and the last 192 tokens are read.

python train.py --config=configs/reviews_minilm.py

To read the reviews whole, in windows whose probabilities are averaged: --config.data.long=split (four times the work).
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import Classification
from llm_jax.transforms import new_head


def get_config() -> Run:
    return Run(
        name="reviews_minilm",
        start="asset:minilm",
        transforms=(new_head("classification", labels=2),),
        task=Classification(labels=("negative", "positive"), keep="head_tail"),
        data=Data(sources=("asset:pang-lee",), heldout=0.2, long="truncate", max_dropped=0.9),
        optimizer=Optimizer(name="adamw", learning_rate=5e-5),
        schedule=Schedule(name="linear", warmup=50, final=0.0),
        epochs=3,
        batch=Batch(size=8, length=256),
        checkpoint=Checkpoint(every=10_000, best="accuracy"),
        eval=Eval(every=0),
    )
