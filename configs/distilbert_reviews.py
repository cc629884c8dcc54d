"""A student with half the layers of a fine-tuned MiniLM learns its classes from it, on 12,808 snippets of film reviews.

python train.py --config=configs/snippets_minilm.py
python train.py --config=configs/distilbert_reviews.py

The first run is the teacher. The student is its layers 0, 2 and 4, trained on the three losses of DistilBERT: the teacher's soft classes, the
true ones, and the direction of the last hidden states.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import Classification
from llm_jax.transforms import distil, shrink


def get_config() -> Run:
    return Run(
        name="distilbert_reviews",
        start="runs/snippets_minilm",
        transforms=(
            shrink(layers=(0, 2, 4)),
            distil("runs/snippets_minilm", temperature=2.0, soft=0.5, task=0.5, cosine=0.5),
        ),
        task=Classification(labels=("rotten", "fresh")),
        data=Data(sources=("asset:rotten-tomatoes",), heldout=0.2, group="movie", long="truncate"),
        optimizer=Optimizer(name="adamw", learning_rate=1e-4),
        schedule=Schedule(name="linear", final=0.0),
        epochs=3,
        batch=Batch(size=4, length=64),
        checkpoint=Checkpoint(every=10_000, best="accuracy"),
        eval=Eval(every=0),
    )
