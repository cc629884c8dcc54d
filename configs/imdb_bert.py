"""BERT-base on IMDb, the common recipe: 3 epochs, 8 rows a device, 512 tokens. Needs a network for the data, or data prepared by TFDS.

Put the files of bert-base-uncased (config.json, model.safetensors, tokenizer.json) into models/bert-base-uncased, then:

python train.py --config=configs/imdb_bert.py
python -m llm_jax export runs/imdb_bert out/bert-imdb --format=hf

Eight rows are for one device: on a TPU v5e-8 add --config.batch.size=64. Not run by its authors for want of the weights; the same path with
other weights is configs/reviews_minilm.py.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import Classification
from llm_jax.transforms import new_head


def get_config() -> Run:
    return Run(
        name="imdb_bert",
        start="models/bert-base-uncased",
        transforms=(new_head("classification", labels=2, pooler="tanh"),),
        task=Classification(labels=("negative", "positive")),
        data=Data(
            sources=("tfds:imdb_reviews:train",),
            heldout_sources=("tfds:imdb_reviews:test",),
            long="truncate",
            max_dropped=0.5,
        ),
        optimizer=Optimizer(name="adamw", learning_rate=2e-5, weight_decay=0.01),
        schedule=Schedule(name="linear", warmup=500, final=0.0),
        epochs=3,
        batch=Batch(size=8, length=512),
        checkpoint=Checkpoint(every=1000, best="accuracy"),
        eval=Eval(every=1000, batches=50),
    )
