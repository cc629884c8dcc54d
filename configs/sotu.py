"""A longer run on the State of the Union addresses, against a 5-gram Kneser-Ney model of the same tokens.

python train.py --config=configs/sotu.py
python -m benchmarks.held_out runs/sotu

21 minutes on two idle cores: 1.180 held-out bits a byte, where the 5-gram model has 1.284.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="sotu",
        model=ModelConfig(
            vocab_size=4096,
            max_length=256,
            layers=4,
            dim=192,
            heads=3,
            norm="rms",
            positions="rotary",
            qk_norm=True,
            tie_embeddings=False,
            embedding_scale=True,
        ),
        task=NextToken(),
        data=Data(sources=("asset:sotu",), tokenizer="bpe:4096", heldout=0.05, window=16384),
        optimizer=Optimizer(name="muon", learning_rate=0.03, weight_decay=0.1),
        schedule=Schedule(name="linear", warmup=50, final=0.0),
        steps=3200,
        batch=Batch(size=8, length=256),
        checkpoint=Checkpoint(every=400),
        eval=Eval(
            every=400,
            batches=40,
            task=NextToken(overlap=128),
            prompts=("Fellow citizens of the Senate,", "The state of the Union is"),
        ),
    )
