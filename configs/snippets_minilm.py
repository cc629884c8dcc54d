"""A small BERT learns to tell fresh from rotten: MiniLM fine-tuned on 12,808 snippets of film reviews, split by film.

python train.py --config=configs/snippets_minilm.py
python -m llm_jax predict runs/snippets_minilm 'a quiet triumph' 'two hours of my life'
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import Classification
from llm_jax.transforms import new_head


def get_config() -> Run:
    return Run(
        name="snippets_minilm",
        start="asset:minilm",
        transforms=(new_head("classification", labels=2),),
        task=Classification(labels=("rotten", "fresh")),
        # Rows of 64 tokens hold two or three snippets each; four of them about as many as the batch of 8 of the common recipe.
        data=Data(sources=("asset:rotten-tomatoes",), heldout=0.2, group="movie", long="truncate"),
        optimizer=Optimizer(name="adamw", learning_rate=5e-5),
        schedule=Schedule(name="linear", final=0.0),
        epochs=3,
        batch=Batch(size=4, length=64),
        checkpoint=Checkpoint(every=10_000, best="accuracy"),
        eval=Eval(every=0),
    )
