"""Claims, over 200 trials each: identical and retrained candidates are refused in at most 5%, losses of twice the margin in at least 95%.

    python -m benchmarks.gate [--trials 200] [--whole 10] [--dry] [--calibrate]

Suite and margins are those of configs/suites/snippets.py. Each trial draws its own split of the films, trains an incumbent's head on frozen MiniLM
(frozen.py), and makes a candidate:

- identical: the same weights;
- retrained: another draw of the training snippets, another start, another order;
- flipped: retrained with some labels flipped, as many as cost twice the accuracy's margin in the mean;
- damaged: noise in the last MLP, of the strength that costs twice that margin on films that are neither trained on nor judged;
- withheld: retrained without some of the rotten snippets, as many as cost the rotten slice twice its margin in the mean; the average alone loses
  less than its own.

They are judged by `gate.judge`, as the command judges. Some trials go through the command: checkpoints are written, read and scored, and the verdict
must be the same. FLIPPED and WITHHELD are from `--calibrate`, on other seeds than those that are reported; `--dry` writes no result.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import frozen
from benchmarks.common import claim, write
from llm_jax import cli, model
from llm_jax.card import code_version
from llm_jax.data.documents import documents, open_sources
from llm_jax.lifecycle.gate import judge, paired
from llm_jax.lifecycle.scored import Scored
from llm_jax.lifecycle.suite import Suite, load_suite

SUITE = "configs/suites/snippets.py"
KINDS = ("identical", "retrained", "flipped", "damaged", "withheld")
FLIPPED, WITHHELD = 0.33, 0.3
"""Shares of the labels and of the rotten snippets"""
FIRST, CALIBRATION = 100_000, 0
"""The first of the seeds that are reported, and of those that the shares were found with"""
NAMES = ("rotten", "fresh")

Split = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Snippets to train on, to find the strength of a damage with, and to judge by"""


@functools.cache
def suite() -> Suite:
    return load_suite(SUITE)


@functools.cache
def records() -> list[dict[str, Any]]:
    (source,) = open_sources(suite().checks[0].data)
    return [source[i] for i in range(len(source))]


@functools.cache
def labels() -> np.ndarray:
    return np.array([record["label"] for record in records()])


@functools.cache
def films() -> np.ndarray:
    return np.unique([record["movie"] for record in records()], return_inverse=True)[1]


def split(rng: np.random.Generator, held: np.ndarray | None = None) -> Split:
    """Three fifths of the films, a fifth, and a fifth, or what the suite holds out; no film on two sides."""
    order = rng.permutation(films().max() + 1)
    if held is None:
        held = np.flatnonzero(np.isin(films(), order[: len(order) // 5]))
    order = order[~np.isin(order, films()[held])]
    apart = np.isin(films(), order[: len(order) // 4])
    return np.flatnonzero(np.isin(films(), order) & ~apart), np.flatnonzero(apart), held


def fitted(rng: np.random.Generator, chosen: np.ndarray, y: np.ndarray) -> frozen.Head:
    """A head trained on a draw with replacement of these snippets, in an order and from a start of its own."""
    drawn = rng.choice(chosen, len(chosen))
    rows = drawn[rng.integers(len(drawn), size=(frozen.STEPS, frozen.ROWS))]
    return frozen.train(_vectors(), jnp.asarray(y), jnp.asarray(rows), jax.random.key(int(rng.integers(2**31))))


@functools.cache
def _vectors() -> np.ndarray:
    return frozen.vectors()


def scored(head: frozen.Head, x: np.ndarray, chosen: np.ndarray) -> Scored:
    """What `score_documents` gives of the whole model."""
    chances = frozen.probabilities(head, x)
    truth, found = labels()[chosen], chances.argmax(axis=1)
    loss = -np.log(np.maximum(chances[np.arange(len(chosen)), truth], 1e-6))
    ones = np.ones(len(chosen))
    told = [records()[i] for i in chosen]
    return Scored(told, loss, ones, ones, (truth == found).astype(float), tuple(NAMES[i] for i in found))


def damaged(rng: np.random.Generator, head: frozen.Head, chosen: np.ndarray, loss: float) -> Any:
    """The last MLP with noise in one direction, as far along it as accuracy on these snippets falls by `loss`."""
    whole = frozen.layer(frozen.encoder().params)
    noise = jax.tree.map(lambda x: np.float32(x.std()) * rng.standard_normal(x.shape, np.float32), whole["mlp"])

    def at(strength: float) -> Any:
        return {**whole, "mlp": jax.tree.map(lambda x, y: x + np.float32(strength) * y, whole["mlp"], noise)}

    def lost(strength: float) -> float:
        found = scored(head, frozen.vectors(at(strength), chosen), chosen)
        return float(np.mean(before.correct) - np.mean(found.correct))  # type: ignore[arg-type]

    before = scored(head, _vectors()[chosen], chosen)
    low, high = 0.0, 0.1
    while lost(high) < loss:
        low, high = high, high * 1.25
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if lost(middle) >= loss else (middle, high)
    return at(high)


def candidate(kind: str, rng: np.random.Generator, head: frozen.Head, parts: Split) -> tuple[frozen.Head, Any]:
    """A candidate's head, and its last MLP where that is another one."""
    train, apart, _ = parts
    if kind == "identical":
        return head, None
    if kind == "damaged":
        return head, damaged(rng, head, apart, 2 * suite().checks[0].margin)
    y, chosen = labels(), train
    if kind == "flipped":
        y = np.where(rng.random(len(y)) < FLIPPED, 1 - y, y)
    if kind == "withheld":
        chosen = train[(labels()[train] == 1) | (rng.random(len(train)) >= WITHHELD)]
    return fitted(rng, chosen, y), None


def pair(kind: str, seed: int, held: np.ndarray | None = None) -> tuple[frozen.Head, frozen.Head, Any, np.ndarray]:
    """Heads of incumbent and candidate, the candidate's last MLP where that is another one, and the snippets that both are judged by."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    parts = split(rng, held)
    incumbent = fitted(rng, parts[0], labels())
    return incumbent, *candidate(kind, rng, incumbent, parts), parts[2]


def judged(incumbent: frozen.Head, head: frozen.Head, weights: Any, chosen: np.ndarray) -> dict[str, Any]:
    """Whether a candidate passed, why not, and what it lost on the judged snippets."""
    before = scored(incumbent, _vectors()[chosen], chosen)
    after = scored(head, _vectors()[chosen] if weights is None else frozen.vectors(weights, chosen), chosen)
    rows, slices, _ = judge(suite(), [(before, after)])
    rotten = labels()[chosen] == 0
    check = suite().checks[0]
    return {
        "passed": all(x["passed"] for x in (*rows, *slices)),
        "refused by": [x.get("slice", "average") for x in (*rows, *slices) if not x["passed"]],
        "accuracy": rows[0]["incumbent"],
        "lost": rows[0]["difference"],
        "error": paired(check, before, after).error,
        "rotten": paired(check, before[rotten], after[rotten]).difference,
    }


def trials(kind: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What became of these trials. Each is written down as it ends; those that are there are not done again."""
    path = frozen.FOLDER / "trials.jsonl"
    setting = {
        "kind": kind,
        "flipped": FLIPPED,
        "withheld": WITHHELD,
        "suite": suite().fingerprint(),
        "code": code_version(),
    }
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {x["seed"]: x["found"] for x in lines if x["setting"] == setting}
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if seed not in known:
            known[seed] = judged(*pair(kind, seed))
            with path.open("a") as file:
                file.write(json.dumps({"setting": setting, "seed": seed, "found": known[seed]}) + "\n")
    return [known[seed] for seed in seeds]


def summary(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and means of a kind's trials."""
    why = collections.Counter("+".join(x["refused by"]) for x in found if not x["passed"])
    means = {name: float(np.mean([x[name] for x in found])) for name in ("accuracy", "lost", "error", "rotten")}
    told = {"refused": sum(not x["passed"] for x in found), "why": dict(why), **means}
    told["spread of lost"] = float(np.std([x["lost"] for x in found]))
    print(kind, json.dumps(told), flush=True)
    return told


def through_the_command(kind: str, seed: int, held: np.ndarray) -> dict[str, Any]:
    """A trial whose models are written, and gated by the command: both verdicts, and by how much their differences differ."""
    incumbent, head, weights, chosen = pair(kind, seed, held)
    here = judged(incumbent, head, weights, chosen)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("incumbent", "candidate")]
        for made, path in zip((frozen.whole(incumbent), frozen.whole(head, weights)), paths):
            model.save(made, path)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            arguments = [f"--against={paths[0]}", f"--suite={SUITE}", f"--registry={folder}/registry", "--json"]
            status = cli.main(["gate", paths[1], *arguments])
    verdict = json.loads(printed.getvalue())
    found = {
        "kind": kind,
        "status": status,
        "same": (status == 0) == here["passed"] == verdict["passed"],
        "apart": abs(verdict["rows"][0]["difference"] - here["lost"]),
        "reasons": verdict["reasons"],
    }
    print(json.dumps(found), flush=True)
    return found


def calibrate(count: int) -> None:
    """Print what candidates lose in the mean, on other seeds than those that are reported."""
    for kind in KINDS[1:]:
        summary(kind, trials(kind, range(CALIBRATION, CALIBRATION + count)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--whole", type=int, default=10)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    if given.calibrate:
        calibrate(given.trials)
        return
    claims = []
    for kind in KINDS:
        told = summary(kind, trials(kind, range(FIRST, FIRST + given.trials)))
        share, harmless = told["refused"] / given.trials, kind in KINDS[:2]
        target = 0.05 if harmless else 0.95
        name = f"{told['refused']} of {given.trials} {kind} candidates are refused"
        claims.append(claim(name, share, target, share <= target if harmless else share >= target, **told))
        claims[-1]["seeds"] = given.trials
    (source,) = open_sources(suite().checks[0].data)
    held = documents(source, suite().checks[0].data, "heldout")
    whole = [through_the_command(KINDS[i % len(KINDS)], FIRST + 1000 + i, held) for i in range(given.whole)]
    same = sum(x["same"] for x in whole)
    claims.append(
        claim(
            f"{same} of {len(whole)} verdicts are those of the command",
            same,
            len(whole),
            same == len(whole),
            each=whole,
        )
    )
    apart = [x["apart"] for x in whole]
    what = "accuracy lost by the command's figures, less by the trial's: the most they differ"
    claims.append(claim(what, max(apart), 0.001, max(apart) <= 0.001, apart))
    if not given.dry:
        write("gate", claims)


if __name__ == "__main__":
    main()
