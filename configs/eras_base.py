"""A small decoder learns the State of the Union addresses of 1790 to 1945: what configs/eras_update.py keeps current.

python train.py --config=configs/eras_base.py

Seven minutes on one core.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="eras_base",
        model=ModelConfig(
            vocab_size=4096,
            max_length=256,
            layers=4,
            dim=160,
            heads=4,
            norm="rms",
            positions="rotary",
            qk_norm=True,
            tie_embeddings=False,
            embedding_scale=True,
        ),
        task=NextToken(),
        data=Data(sources=("asset:sotu#date=..1945",), tokenizer="bpe:4096", heldout=0.1),
        optimizer=Optimizer(name="muon", learning_rate=0.03, weight_decay=0.1),
        schedule=Schedule(name="linear", warmup=40, final=0.0),
        steps=1500,
        batch=Batch(size=4, length=256),
        checkpoint=Checkpoint(every=500),
        eval=Eval(every=500, batches=20),
    )
