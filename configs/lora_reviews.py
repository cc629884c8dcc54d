"""SmolLM2-135M learns to tell fresh from rotten with its weights frozen: factors of rank 7 beside the products of its MLPs, and a head.

python train.py --config=configs/lora_reviews.py
python -m llm_jax export runs/lora_reviews adapter --format=peft

The language model is asked for the next word: the head begins as its logits of ' negative' and ' positive' after 'Sentiment:'. 0.98% of the
parameters are trained, with a dropout of 0.1 on what the factors read. Accuracy 0.891 (0.889 to 0.891, 3 seeds), 0.27 of a point above full
fine-tuning; 0.882 over one epoch without dropout, 0.864 without the template and the words too. 55 minutes on one core.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.tasks import Classification
from llm_jax.transforms import lora, new_head


def get_config(dropout: float = 0.1) -> Run:
    return Run(
        name="lora_reviews",
        start="asset:smollm2",
        transforms=(
            new_head("classification", words=(" negative", " positive")),
            lora(7, alpha=28.0, targets=("mlp/.*",), dropout=dropout, also=("head/.*",)),
        ),
        task=Classification(labels=("rotten", "fresh"), template="Review:\n{text}\nSentiment:"),
        data=Data(sources=("asset:rotten-tomatoes",), heldout=0.2, group="movie", long="truncate"),
        optimizer=Optimizer(name="adamw", learning_rate=5e-4),
        schedule=Schedule(name="linear", final=0.0),
        epochs=1.5,
        batch=Batch(size=4, length=64),
        checkpoint=Checkpoint(every=10_000, best="accuracy"),
        eval=Eval(every=0),
    )
