"""GPT-2 small, 124M, pretrained on plain text by next-token prediction, half a million tokens an update.

    python train.py --config=configs/gpt2_small.py --config.data.sources 'jsonl:corpus/*.jsonl'

Expected: on OpenWebText held-out loss about 3.1 after 20,000 updates (10B tokens), as published for this size; on one host of 8
accelerators. Not run here; the tests build it and take two steps of a shrunk copy.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import gpt2
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="gpt2_small",
        model=gpt2(vocab_size=50304, dropout=0.0),  # a multiple of 128
        task=NextToken(),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="bpe:50257", heldout=0.001, workers=4),
        optimizer=Optimizer(name="adamw", learning_rate=6e-4, weight_decay=0.1, arguments=(("b2", 0.95),)),
        schedule=Schedule(name="cosine", warmup=700, final=0.1),
        steps=20_000,
        batch=Batch(size=512, length=1024),
        mesh=Mesh(data=-1),
        checkpoint=Checkpoint(every=1000),
        eval=Eval(every=1000, batches=40, prompts=("Once upon a time",)),
        log_every=10,
    )
