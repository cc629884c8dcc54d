"""BERT-base pretrained by masked-token prediction, 15% of the tokens, rows of 128.

    python train.py --config=configs/bert_mlm.py --config.data.sources 'jsonl:corpus/*.jsonl'

Expected: with 1M updates of 256 rows the published model; on one host of 8 accelerators. Not run here; the tests build it and
take two steps of a shrunk copy.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Mesh, Optimizer, Run, Schedule
from llm_jax.models.presets import bert
from llm_jax.tasks import MaskedToken


def get_config() -> Run:
    return Run(
        name="bert_mlm",
        model=bert(head="mlm", pooler="none"),
        task=MaskedToken(),
        data=Data(sources=("jsonl:corpus/*.jsonl",), tokenizer="asset:bert-uncased", heldout=0.001, workers=4),
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, weight_decay=0.01),
        schedule=Schedule(name="linear", warmup=10_000, final=0.0),
        steps=1_000_000,
        batch=Batch(size=256, length=128),
        mesh=Mesh(data=-1),
        checkpoint=Checkpoint(every=5000),
        eval=Eval(every=5000, batches=40),
        log_every=10,
    )
