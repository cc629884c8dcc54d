"""MiniLM adapted to the language of film reviews by masked-token prediction over whole words, before it is fine-tuned on their labels.

python train.py --config=configs/reviews_mlm.py
python train.py --config=configs/snippets_minilm.py --config.start=runs/reviews_mlm
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import MaskedToken
from llm_jax.transforms import new_head


def get_config() -> Run:
    return Run(
        name="reviews_mlm",
        start="asset:minilm",
        transforms=(new_head("mlm"),),
        task=MaskedToken(whole_words=True),
        data=Data(sources=("asset:pang-lee",), heldout=0.05),
        optimizer=Optimizer(name="adamw", learning_rate=2e-4, weight_decay=0.01),
        schedule=Schedule(name="linear", warmup=50, final=0.0),
        steps=1000,
        batch=Batch(size=8, length=128),
        checkpoint=Checkpoint(every=500),
        eval=Eval(every=250, batches=20),
    )
