"""Llama 3.2 1B on sixteen chips: fully sharded, 1M tokens an update, rows of 4,096.

    python train.py --config=configs/llama32_1b.py --config.data.sources 'jsonl:corpus/*.jsonl'

Topology: v5e:4x4 (v5e-16), `python -m llm_jax plan --config=configs/llama32_1b.py --topology=v5e:4x4`. Expected: the published sizes (1.236B
parameters) and base of the rotation; without the scaling of its slow pairs, which serves rows beyond 8,192 tokens. 25B tokens, 20 a parameter.
Not run here; the tests build it and take two steps of a shrunk copy, `benchmarks/plans.py` compiles it.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import llama
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="llama32_1b",
        model=llama(
            vocab_size=128256,
            max_length=131072,
            layers=16,
            dim=2048,
            heads=32,
            kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
            rotary_base=500000.0,
            tie_embeddings=True,
            remat="full",
        ),
        task=NextToken(z_loss=1e-4),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="bpe:128000", heldout=0.001, workers=8),
        optimizer=Optimizer(
            name="adamw", learning_rate=3e-4, weight_decay=0.1, arguments=(("b2", 0.95), ("eps", 1e-8))
        ),
        schedule=Schedule(name="cosine", warmup=2000, final=0.1),
        steps=24_000,
        batch=Batch(size=256, length=4096, accumulate=8),
        mesh=Mesh(data=1, fsdp=-1),
        checkpoint=Checkpoint(every=1000),
        eval=Eval(every=2000, batches=20),
        log_every=10,
    )
