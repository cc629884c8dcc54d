"""Four fifths of the weights of a fine-tuned MiniLM go in three rounds; in each, what is left learns from the whole.

python train.py --config=configs/snippets_minilm.py
python train.py --config=configs/prune_rounds.py         # the first round alone
pip install -e . && python configs/prune_rounds.py       # all three, each from the model of the last; what is done is not done again

Which weights go, and how those that are left make up for them, SparseGPT tells by 64 batches. In each round, longest in the last, the model learns from
the dense one as in configs/distilbert_reviews.py: on 10,183 snippets, and on 45,700 sentences of whole reviews that nobody labelled.
"""

from llm_jax.config import Batch, Checkpoint, Data, Eval, Optimizer, Run, Schedule
from llm_jax.loop import train
from llm_jax.tasks import Classification
from llm_jax.transforms import distil, dropout, prune

ROUNDS = ((0.5, 0.15), (0.65, 0.2), (0.8, 1.25))
"""Of each round the share of zeros that it reaches, and its epochs"""


def get_config(
    start: str = "runs/snippets_minilm",
    teacher: str = "runs/snippets_minilm",
    sparsity: float = ROUNDS[0][0],
    epochs: float = ROUNDS[0][1],
) -> Run:
    return Run(
        name=f"prune_rounds_{sparsity}",
        start=start,
        transforms=(
            dropout(0.0),
            distil(
                teacher,
                temperature=2.0,
                soft=1.0,
                task=0.0,
                cosine=0.5,
                hidden=1.0,
                layers=((1, 1), (3, 3), (5, 5)),
            ),
            prune(sparsity, score="sparsegpt", batches=64),
        ),
        task=Classification(labels=("rotten", "fresh")),
        data=Data(
            sources=("asset:rotten-tomatoes", "asset:pang-lee-sentences"), heldout=0.2, group="movie", long="truncate"
        ),
        optimizer=Optimizer(name="adamw", learning_rate=3e-4),
        schedule=Schedule(name="linear", warmup=100, final=0.0),
        epochs=epochs,
        batch=Batch(size=8, length=64),
        checkpoint=Checkpoint(every=10_000, best="accuracy"),
        eval=Eval(every=0),
    )


def rounds(teacher: str) -> list[Run]:
    """The runs one after another, from a model that is the teacher in each."""
    start, runs = teacher, []
    for sparsity, epochs in ROUNDS:
        runs.append(get_config(start, teacher, sparsity, epochs))
        start = str(runs[-1].folder)
    return runs


if __name__ == "__main__":
    for run in rounds("runs/snippets_minilm"):
        train(run)
