"""Claims: `drift` says "leave" on at least 95% of 200 splits of one source, and otherwise in at least 95% of 200 draws of each kind of change.

    python -m benchmarks.drift [--draws 200] [--seed 1000] [--dry]

The changes: eras 80 years apart, another genre, and foreign text planted in 10% of the documents. A small decoder is trained for 300 steps on half of
the State of the Union addresses of 1790 to 1945 and a third of the press of the Brown corpus. What is judged it did not see: pieces of 2,000 to 3,000
characters of other addresses and texts, 200 old and 200 new a draw (120 of Brown), drawn without replacement from pools that are scored once and whose
scores are kept. A third split of one source is by whole addresses, the pieces of each taken together. Eras are 20 years long, the old one in 1846 to 1925,
with 80 years between them; genres are four of Brown against its press; foreign text is small talk in 22 languages, or in the nine of them in Latin letters,
in place of a tenth of new. The thresholds are the defaults, written before any draw; those of development had seeds below 1000. `--dry` writes no result.
"""

import argparse
import collections
import dataclasses
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms
from benchmarks.common import claim, write
from llm_jax import model
from llm_jax.config import Data
from llm_jax.data import assets
from llm_jax.data.sources import open_source
from llm_jax.evaluate import saved_run
from llm_jax.lifecycle.drift import judge
from llm_jax.lifecycle.sampled import Sample, describe, join, together
from llm_jax.lifecycle.scored import Scored, score_documents
from llm_jax.loop import train

FOLDER = arms.FOLDER / "drift"
SIZE = 2000
"""Characters of a piece, and up to half as many again"""

PRESS = ("news", "editorial", "reviews")
OTHER = ("romance", "learned", "hobbies", "adventure")
ERAS = ((1846, 1865), (1866, 1885), (1886, 1905), (1906, 1925))
LATIN = ("italian", "spanish", "dutch", "portuguese", "indonesian", "german", "turkish", "french", "swedish")
DOCUMENTS, OF_BROWN = 200, 120
GAP = 80
LEAST = 0.95


def pieces(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A text as records of lines that together have `SIZE` characters; what is left over at the end is dropped, a longer line is cut at spaces."""
    made, held = [], ""
    for line in re.split(r"\n+", record["text"]):
        for part in re.findall(rf"\S.{{0,{SIZE // 2}}}(?:\s|$)", line) or []:
            held = f"{held}\n{part.strip()}" if held else part.strip()
            if len(held) >= SIZE:
                made.append({**record, "id": f"{record['id']}/{len(made)}", "text": held})
                held = ""
    return made


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in assets.records(name).read_text(encoding="utf-8").splitlines()]


def corpora() -> dict[str, list[dict[str, Any]]]:
    """Pieces to train on, and the pools: whole texts lie on one side."""
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for record in records("sotu"):
        if record["date"] >= "1946":
            found["after"] += pieces(record)
        else:
            found["train" if rng.random() < 0.5 else "before"] += pieces(record)
    for record in records("brown"):
        if record["genre"] in PRESS:
            found["train" if rng.random() < 0.35 else "press"] += pieces(record)
        elif record["genre"] in OTHER:
            found[record["genre"]] += pieces(record)
    by_language: dict[str, list[str]] = collections.defaultdict(list)
    for record in records("conversations"):
        by_language[record["language"]].append(record["text"])
    for language in sorted(set(by_language) - {"english", "hinglish"}):
        found["foreign"] += pieces({"id": language, "language": language, "text": "\n".join(by_language[language])})
    return dict(found)


def write_lines(path: Path, made: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made), encoding="utf-8")
    return f"jsonl:{path}"


def trained(source: str) -> Path:
    """The folder of the decoder's run, carried out where it is not done yet."""
    base = arms.load("quickstart")
    run = arms.changed(
        base,
        name="drift",
        workdir=str(FOLDER / "run"),
        steps=300,
        data=Data(sources=(source,), tokenizer="bpe:4096", heldout=0.05),
        eval=dataclasses.replace(base.eval, every=0, prompts=()),
    )
    if not (run.folder / "result.json").exists():
        train(run)
    return Path(run.folder)


def scores(run: Path, named: dict[str, str]) -> dict[str, Sample]:
    """The pools as the run's model finds them; what it made of a source is kept beside the source."""
    loaded = model.load(run)
    task, data, batch = saved_run(loaded.card, run)
    found = {}
    for name, source in named.items():
        data = dataclasses.replace(data, heldout_sources=(source,))
        kept = (
            FOLDER / f"{name}.{open_source(source, data).fingerprint[:16]}.{loaded.card['hashes']['params'][:16]}.npz"
        )
        if not kept.exists():
            scored = score_documents(loaded, task, data, dataclasses.replace(batch, size=16))
            np.savez(kept, loss=scored.loss, weight=scored.weight, bytes=scored.bytes)
        opened, figures = open_source(source, data), np.load(kept)
        made = [{**opened[i], "whole": opened[i]["id"].rpartition("/")[0]} for i in range(len(opened))]
        scored = Scored(made, *(figures[x] for x in ("loss", "weight", "bytes")))
        assert len(made) == len(scored)
        print(
            f"{name}: {len(scored)} documents, {scored.loss.sum() / np.log(2) / scored.bytes.sum():.3f} bits a byte",
            flush=True,
        )
        assert loaded.tokenizer is not None
        found[name] = describe(scored, loaded.tokenizer, data, SIZE)
    return found


def where(pool: Sample, test: Callable[[dict[str, Any]], bool]) -> Sample:
    """The documents of a pool whose records pass."""
    return pool[np.array([test(record) for record in pool.scored.records])]


def some(rng: np.random.Generator, pool: Sample, count: int) -> Sample:
    return pool[rng.permutation(len(pool))[:count]]


def halves(rng: np.random.Generator, pool: Sample, count: int) -> tuple[Sample, Sample]:
    order = rng.permutation(len(pool))
    return pool[order[:count]], pool[order[count : 2 * count]]


Draw = Callable[[int, np.random.Generator], tuple[Sample, Sample]]


def conditions(pools: dict[str, Sample]) -> dict[str, Draw]:
    """Ways to draw old and new documents, by name; the first three are of one source."""

    def era(pool: str, first: int, last: int) -> Sample:
        return where(pools[pool], lambda record: first <= int(record["date"][:4]) <= last)

    eras = [(era("before", a, b), era("after", a + GAP + b - a + 1, b + GAP + b - a + 1)) for a, b in ERAS]
    texts = together(pools["before"], "whole")
    latin = where(pools["foreign"], lambda record: record["language"] in LATIN)

    def planted(foreign: Sample) -> Draw:
        def draw(i: int, rng: np.random.Generator) -> tuple[Sample, Sample]:
            old, new = halves(rng, pools["before"], DOCUMENTS)
            return old, join(new[np.arange(DOCUMENTS * 9 // 10)], some(rng, foreign, DOCUMENTS // 10))

        return draw

    return {
        "leave on splits of the addresses of 1790 to 1945": lambda i, rng: halves(rng, pools["before"], DOCUMENTS),
        "leave on splits of Brown's press": lambda i, rng: halves(rng, pools["press"], OF_BROWN),
        "leave on splits by whole addresses": lambda i, rng: halves(rng, texts, len(texts) // 2),
        "no leave on eras 80 years apart": lambda i, rng: (
            some(rng, eras[i % 4][0], DOCUMENTS),
            some(rng, eras[i % 4][1], DOCUMENTS),
        ),
        "no leave on another genre": lambda i, rng: (
            some(rng, pools["press"], OF_BROWN),
            some(rng, pools[OTHER[i % 4]], OF_BROWN),
        ),
        "no leave on 10% of text in 22 languages": planted(pools["foreign"]),
        "no leave on 10% of text in 9 languages in Latin letters": planted(latin),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000, help="of the first draw")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    sources = {name: write_lines(FOLDER / f"{name}.jsonl", made) for name, made in corpora().items()}
    pools = scores(trained(sources.pop("train")), sources)
    claims = []
    for name, draw in conditions(pools).items():
        found = [judge(*draw(i, np.random.default_rng(given.seed + i))) for i in range(given.draws)]
        verdicts = collections.Counter(each.verdict for each in found)
        good = verdicts["leave"] if name.startswith("leave") else given.draws - verdicts["leave"]
        tests = {
            test.name: {
                "matters": sum(each.tests[k].matters for each in found),
                "below_5%": sum(each.tests[k].p < 0.05 for each in found),
                "values": [f(each.tests[k].value for each in found) for f in (min, statistics.median, max)],
            }
            for k, test in enumerate(found[0].tests)
        }
        share = good / given.draws
        print(f"{name}: {good} of {given.draws}; {dict(verdicts)}\n{json.dumps(tests)}", flush=True)
        claims.append(
            claim(
                f"drift: {name}, {good} of {given.draws}",
                share,
                LEAST,
                share >= LEAST,
                verdicts=dict(verdicts),
                tests=tests,
            )
        )
        claims[-1]["seeds"] = given.draws
    if not given.dry:
        write("drift", claims)


if __name__ == "__main__":
    main()
