"""Llama 3 70B on a pod: fully sharded, 4M tokens an update, rows of 8,192.

    python train.py --config=configs/llama3_70b.py --config.data.sources 'jsonl:corpus/*.jsonl'

Topology: v5p:4x8x8 (v5p-512, 256 chips), `python -m llm_jax plan --config=configs/llama3_70b.py --topology=v5p:4x8x8`; on two of them
`--config.mesh.data=2 --topology=2xv5p:4x8x8`. Expected: the published sizes (70.55B parameters), 15T tokens in 3.6M updates.
Not run here; the tests build it and take two steps of a shrunk copy, `benchmarks/plans.py` compiles it.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import llama
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="llama3_70b",
        model=llama(
            vocab_size=128256,
            max_length=8192,
            layers=80,
            dim=8192,
            heads=64,
            kv_heads=8,
            mlp_dim=28672,
            rotary_base=500000.0,
            remat="full",
        ),
        task=NextToken(z_loss=1e-4),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="bpe:128000", heldout=0.0001, workers=8),
        optimizer=Optimizer(
            name="adamw", learning_rate=1.5e-4, weight_decay=0.1, arguments=(("b2", 0.95), ("eps", 1e-5))
        ),
        schedule=Schedule(name="cosine", warmup=8000, final=0.01),
        steps=3_600_000,
        batch=Batch(size=512, length=8192),
        mesh=Mesh(data=1, fsdp=-1),
        checkpoint=Checkpoint(every=1000),
        eval=Eval(every=5000, batches=20),
        log_every=10,
    )
