"""Llama 2 7B continued on documents of up to 131,072 tokens: rows split over eight chips, attention around a ring, 4M tokens an update.

    python train.py --config=configs/llama2_7b_long.py --config.start=models/Llama-2-7b-hf --config.data.sources 'jsonl:books/*.jsonl'

Topology: v5p:4x8x8 (v5p-512, 256 chips), `python -m llm_jax plan --config=configs/llama2_7b_long.py --topology=v5p:4x8x8`. The rotation is slowed
to 32 times the length (`lengthen`: NTK-aware, base 338,000). Expected: 1,000 updates, as long-context continuations take (Xiong et al. 2023).
Not run here; the tests build it and take two steps of a shrunk copy, `benchmarks/plans.py` compiles it.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import llama
from llm_jax.tasks import NextToken
from llm_jax.transforms import lengthen


def get_config() -> Run:
    return Run(
        name="llama2_7b_long",
        model=llama(remat="full"),
        transforms=(lengthen(131_072),),
        task=NextToken(z_loss=1e-4),
        data=Data(sources=("jsonl:books/*.jsonl",), tokenizer="bpe:32000", heldout=0.001, workers=8),
        optimizer=Optimizer(
            name="adamw", learning_rate=2e-5, weight_decay=0.1, arguments=(("b2", 0.95), ("eps", 1e-5))
        ),
        schedule=Schedule(name="cosine", warmup=100, final=0.1),
        steps=1_000,
        batch=Batch(size=32, length=131_072),
        mesh=Mesh(data=1, fsdp=-1, context=8),
        checkpoint=Checkpoint(every=100),
        eval=Eval(every=200, batches=2),
        log_every=1,
    )
