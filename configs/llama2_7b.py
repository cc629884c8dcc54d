"""Llama 2 7B on a pod: fully sharded, 4M tokens an update, rows of 4,096.

    python train.py --config=configs/llama2_7b.py --config.data.sources 'jsonl:corpus/*.jsonl' --config.mesh.fsdp=256

Topologies, for `python -m llm_jax plan --config=configs/llama2_7b.py`: `--topology=v5e:16x16` (v5e-256) with `--config.batch.accumulate=4`, and
`--topology=v5p:4x4x4` (v5p-128, 64 chips) with `--config.batch.accumulate=8`. Expected: the sizes and the schedule of the paper (2T tokens in
500,000 updates). Not run here; the tests build it and take two steps of a shrunk copy, `benchmarks/plans.py` compiles it.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import llama
from llm_jax.tasks import NextToken


def get_config() -> Run:
    return Run(
        name="llama2_7b",
        model=llama(remat="full"),
        task=NextToken(z_loss=1e-4),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="bpe:32000", heldout=0.0001, workers=8),
        optimizer=Optimizer(
            name="adamw", learning_rate=3e-4, weight_decay=0.1, arguments=(("b2", 0.95), ("eps", 1e-5))
        ),
        schedule=Schedule(name="cosine", warmup=2000, final=0.1),
        steps=500_000,
        batch=Batch(size=1024, length=4096),
        mesh=Mesh(data=1, fsdp=-1),
        checkpoint=Checkpoint(every=1000),
        eval=Eval(every=5000, batches=20),
        log_every=10,
    )
