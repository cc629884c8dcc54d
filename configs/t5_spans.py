"""T5-small pretrained by span corruption: 15% of the tokens in spans of 3, rows of 512.

    python train.py --config=configs/t5_spans.py --config.data.sources 'jsonl:corpus/*.jsonl'

Expected: the schedule and the objective of the paper's baseline (2^19 updates of 128 rows); on one host of 8 accelerators. Not run here;
the tests build it and take two steps of a shrunk copy.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import t5
from llm_jax.tasks import SpanCorruption


def get_config() -> Run:
    return Run(
        name="t5_spans",
        model=t5(dropout=0.0),
        task=SpanCorruption(),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="bpe:32000", heldout=0.001, workers=4),
        optimizer=Optimizer(name="adafactor", learning_rate=1e-2, clip=1.0),
        schedule=Schedule(name="inverse_sqrt", warmup=10_000),
        steps=524_288,
        batch=Batch(size=128, length=512),
        mesh=Mesh(data=-1),
        checkpoint=Checkpoint(every=5000),
        eval=Eval(every=5000, batches=40),
        log_every=10,
    )
