"""Claims: a student of half the layers keeps 98% of its teacher's accuracy at 1.6 times its speed, and is better than without a teacher.

    pip install -e .
    python -m benchmarks.distil train [--seeds 0 1 2]
    python -m benchmarks.distil speed

The teacher is configs/snippets_minilm.py of the same seed, the student configs/distilbert_reviews.py, on 12,808 snippets of reviews split by film and, with the
teacher, on 45,700 sentences without labels; without a teacher the same student is fine-tuned on the snippets' labels. `speed` wants an idle machine.
"""

import argparse
import statistics

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import config, cost, model
from llm_jax.transforms import shrink

STUDENT = (0, 2, 4)


def train(seeds: list[int]) -> None:
    """The student with and without its teacher, each seed with a teacher of its own."""
    teachers = arms.arm("full", arms.load("snippets_minilm"), seeds)
    taught = arms.following("distil", lambda teacher: arms.on("distilbert_reviews", teacher), teachers)["eval"]

    def alone(teacher: str) -> config.Run:
        run = arms.load("snippets_minilm", start=teacher, transforms=(shrink(layers=STUDENT),))
        return arms.changed(run, optimizer={"learning_rate": 1e-4})

    untaught = arms.following("distil_alone", alone, teachers)["eval"]
    dense, values = teachers["eval"]["accuracy"]["values"], taught["accuracy"]["values"]
    kept = [a / b for a, b in zip(values, dense)]
    gain = [a - b for a, b in zip(values, untaught["accuracy"]["values"])]
    detail = {"teacher": teachers["eval"], "with": taught, "without": untaught}
    share, better = statistics.fmean(kept), statistics.fmean(gain)
    write(
        "distil",
        [
            claim("share of the teacher's accuracy, half the layers", share, 0.98, share >= 0.98, kept, **detail),
            claim("accuracy gained over the same student without a teacher", better, 0.0, better > 0, gain),
        ],
    )


def speed() -> None:
    """A forward pass of teacher and student, five times."""
    teacher = model.sizes("runs/snippets_minilm")
    student = shrink(layers=STUDENT).config(teacher)
    found = [cost.compare(teacher, student, (32, 64)) for _ in range(5)]
    print(found[-1])
    values = [x.speedup for x in found]
    times = statistics.median(values)
    write("distil_speed", [claim("times faster than the teacher", times, 1.6, times >= 1.6, values)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["train", "speed"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.part == "train":
        train(options.seeds)
    else:
        speed()


if __name__ == "__main__":
    main()
