"""Whether new documents still are what a model was made for: loss by slice, tests of old against new, and a verdict that names the decision.

Measuring (`sampled.measure`: the model reads each document once) and judging (`judge`: arrays alone) are apart, so that what was measured can be judged
again. The tests themselves are in `two_samples.py`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats

from llm_jax import model
from llm_jax.errors import CheckpointError, DataError, choose
from llm_jax.evaluate import saved_run
from llm_jax.lifecycle import two_samples
from llm_jax.lifecycle.sampled import Sample, measure, together
from llm_jax.lifecycle.two_samples import Estimate

LEAST = 10
"""Documents of a side"""

SLICES = 25
"""Values of a field that are told apart, at most"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What counts as drift. A change that is significant but smaller than these makes no difference to a model."""

    level: float = 0.01
    """chance of any verdict but "leave" on two samples of one source, at most: p-values are corrected for their number"""
    loss: float = 1.02
    """loss on new, as a multiple of that on old"""
    tail: float = 0.02
    """by how much the share of new documents that are harder than 99% of the old ones is above its due"""
    area: float = 0.6
    """area under the curve by which a classifier tells old from new"""
    vocabulary: float = 0.01
    """bits by which the Jensen-Shannon divergence of tokens is above what chance gives"""
    length: float = 0.25
    """largest difference of the distributions of lengths"""
    fit: float = 1.05
    """tokens a byte on new, as a multiple of those on old"""
    misfit: float = 1.25
    """the same, above which the tokenizer serves no more: retrain"""
    unknown: float = 1.5
    """loss on new, as a multiple of that on old, above which the model knows too little to start from: retrain; not asked of classes"""
    permutations: int = 999
    """random labellings that a statistic without a formula is held against"""
    documents: int = 1000
    """of each side that the classifier sees, at most"""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Test:
    """One comparison of new with old."""

    name: str
    what: str
    """the statistic in words"""
    value: float
    chance: float
    """its value when nothing has changed, or on the old documents"""
    limit: float
    """from which it matters"""
    p: float
    corrected: float = 1.0
    """for the number of tests, by Holm"""
    matters: bool = False
    """significant, and as large as the limit"""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Documents of one side that share the value of a field."""

    side: str
    name: str
    documents: int
    loss: Estimate
    """nats a token, or an example"""
    bits: Estimate | None
    """bits a byte of text, for tasks that predict all of it"""
    accuracy: Estimate | None
    """for tasks of classes"""


@dataclasses.dataclass(frozen=True)
class Drift:
    """What changed from old to new documents, and what to do about it."""

    verdict: str
    """leave, update or retrain"""
    why: str
    difference: Estimate
    """of the loss, new less old, in bits a byte; in nats a token or an example where those are not given"""
    unseen: float
    """share of new's tokens that stand nowhere in old"""
    tests: tuple[Test, ...]
    slices: tuple[Slice, ...]

    def __str__(self) -> str:
        whole, classes = self.slices[0].bits is not None, self.slices[0].accuracy is not None
        titles = ["nats", *(["bits a byte"] if whole else []), *(["accuracy"] if classes else [])]
        lines = [f"{'':4} {'slice':24} documents" + "".join(f"  {title:>22}" for title in titles)]
        for s in self.slices:
            figures = "".join(f"  {each!s:>22}" for each in (s.loss, s.bits, s.accuracy) if each is not None)
            lines.append(f"{s.side:4} {s.name:24.24} {s.documents:9}{figures}")
        lines += ["", f"{'test':11} {'value':>8} {'no change':>9} {'matters':>8} {'p':>8} corrected"]
        for t in self.tests:
            row = f"{t.name:11} {t.value:8.4f} {t.chance:9.4f} {t.limit:8.4f} {t.p:8.2g} {t.corrected:9.2g}"
            lines.append(f"{row} {'*' if t.matters else ' '} {t.what}")
        return "\n".join(
            [
                *lines,
                "",
                f"loss, new less old: {self.difference} {'bits a byte' if whole else 'nats'}",
                f"tokens of new that stand nowhere in old: {self.unseen:.2%}",
                "",
                f"{self.verdict}: {self.why}",
            ]
        )


def drift(
    path: str, old: Sequence[str], new: Sequence[str], by: str = "", group: str = "", limits: Limits = Limits()
) -> Drift:
    """`measure` and `judge` by the model at a path, whose card tells its task, how it reads and its rows.

    Raises:
        UserError: no model with a run, sources that cannot be read, too few documents, a field that is not there.
    """
    loaded = model.load(path)
    if "config" not in loaded.card:
        raise CheckpointError(f"the card of {path} names no run, so its task is not known")
    return judge(*measure(loaded, *saved_run(loaded.card, path), old, new), by, group, limits)


def judge(old: Sample, new: Sample, by: str = "", group: str = "", limits: Limits = Limits()) -> Drift:
    """The verdict on two samples, their slices by the field `by`, and each test that led to it. Pure: the same samples give the same.

    Documents that share the value of the field `group` count as one: they are not independent.

    Raises:
        DataError: a field that is not there, fewer than 10 documents on a side, or a loss that is no number.
    """
    for name, sample in (("old", old), ("new", new)):
        at = np.flatnonzero(~np.isfinite(sample.scored.loss))
        if len(at):
            raise DataError(
                f"the model gives no number for {len(at)} documents of {name}, {sample.scored.records[at[0]]['id']} first: "
                "it can tell no drift"
            )
    whole = _predicts_all(old) and _predicts_all(new)
    units = [together(sample, group) if group else sample for sample in (old, new)]
    for name, sample in zip(("old", "new"), units):
        if len(sample) < LEAST:
            raise DataError(
                f"{name} has {len(sample)} {f'values of {group!r}' if group else 'documents'}, drift needs {LEAST} of each: "
                "it is these that are compared, however long they are"
            )
    change, found = _compare(units[0], units[1], whole, limits)
    corrected = two_samples.holm([test.p for test in found])
    tests = tuple(
        dataclasses.replace(test, corrected=p, matters=p <= limits.level and test.value >= test.limit)
        for test, p in zip(found, corrected)
    )
    verdict, why = _verdict({test.name: test for test in tests}, old.scored.correct is not None, limits)
    return Drift(verdict, why, change, _unseen(old, new), tests, _slices(old, new, by, group, whole))


def _compare(old: Sample, new: Sample, whole: bool, limits: Limits) -> tuple[Estimate, list[Test]]:
    """The difference of the losses, and all tests, not corrected yet."""
    a, b = (_losses(sample, whole) for sample in (old, new))
    change, loss_p = two_samples.difference(a, b)
    hard, due, hard_p = two_samples.beyond(a[0] / np.maximum(a[1], 1), b[0] / np.maximum(b[1], 1))
    fit, fit_p = _fit(old, new)
    labels = two_samples.permutations(len(old), len(new), limits.permutations, limits.seed)
    shifts = two_samples.divergences(scipy.sparse.vstack([old.tokens, new.tokens], "csr"), labels)
    chance = float(shifts[1:].mean())
    areas = _areas(old, new, limits)
    apart = scipy.stats.ks_2samp(old.scored.bytes, new.scored.bytes)
    before = max(a[0].sum() / a[1].sum(), 1e-12)
    unit = "bits a byte" if whole else "nats"

    def test(name: str, what: str, value: Any, null: float, limit: float, p: Any) -> Test:
        return Test(name, what, float(value), null, limit, float(p))

    return change, [
        test("loss", f"{unit} on new, those on old being 1", 1 + change.value / before, 1.0, limits.loss, loss_p),
        test("tail", "share of new beyond the hardest 1% of old", hard, due, due + limits.tail, hard_p),
        test("text", "a classifier's area under the curve", areas[0], 0.5, limits.area, two_samples.permutation_p(areas)),
        test("vocabulary", "bits of divergence of tokens", shifts[0], chance, chance + limits.vocabulary, two_samples.permutation_p(shifts)),
        test("length", "difference of the distributions", apart.statistic, 0.0, limits.length, apart.pvalue),
        test("tokenizer", "tokens a byte on new, those on old being 1", fit, 1.0, limits.fit, fit_p),
    ]  # fmt: skip


def _predicts_all(sample: Sample) -> bool:
    """Whether the loss is that of the whole text, so that there are bits a byte."""
    return sample.scored.correct is None and sample.scored.weight.sum() >= 0.9 * sample.tokens.sum()


def _losses(sample: Sample, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each document its bits and bytes where there are bits a byte, else its nats and what they are counted by."""
    scored = sample.scored
    return (scored.loss / np.log(2), scored.bytes) if whole else (scored.loss, scored.weight)


def _fit(old: Sample, new: Sample) -> tuple[float, float]:
    """Tokens a byte on new as a multiple of those on old, and the p-value of their difference."""
    (a, x), (b, y) = ((np.asarray(s.tokens.sum(1)).ravel().astype(np.float64), s.scored.bytes) for s in (old, new))
    return float(b.sum() / y.sum() / (a.sum() / x.sum())), two_samples.difference((a, x), (b, y))[1]


def _areas(old: Sample, new: Sample, limits: Limits) -> np.ndarray:
    """The classifier's area under the curve, then those of random labellings, on no more documents than it can take."""
    rng = np.random.default_rng(limits.seed)
    few = [s.grams[np.sort(rng.permutation(len(s))[: limits.documents])] for s in (old, new)]
    labels = two_samples.permutations(few[0].shape[0], few[1].shape[0], limits.permutations, limits.seed)
    return two_samples.areas(scipy.sparse.vstack(few, "csr"), labels, limits.seed)


def _unseen(old: Sample, new: Sample) -> float:
    """Share of new's tokens that stand nowhere in old."""
    known, counts = (np.asarray(s.tokens.sum(0)).ravel() for s in (old, new))
    return float(counts[known == 0].sum() / counts.sum())


def _verdict(tests: dict[str, Test], classes: bool, limits: Limits) -> tuple[str, str]:
    """The decision, and in a sentence the tests that led to it."""
    changed = [test for test in tests.values() if test.matters]
    if not changed:
        return (
            "leave",
            f"none of {len(tests)} tests finds a change that matters (level {limits.level:g} for all together)",
        )
    said = ", ".join(f"{t.name} ({t.value:.3g}, {t.chance:.3g} being no change)" for t in changed)
    reason = f"old and new differ in {said}"
    loss, fit = tests["loss"], tests["tokenizer"]
    if fit.matters and fit.value > limits.misfit:
        return "retrain", f"{reason}; the tokenizer serves no more, above {limits.misfit:g} times the tokens a byte"
    if loss.matters and not classes and loss.value > limits.unknown:
        return "retrain", f"{reason}; the model knows little of new, above {limits.unknown:g} times the loss"
    return "update", f"{reason}; the tokenizer still serves and the model can start from what it knows"


def _slices(old: Sample, new: Sample, by: str, group: str, whole: bool) -> tuple[Slice, ...]:
    """Both sides whole, and then by the values of the field."""
    found = [_slice("old", "all", old, group, whole), _slice("new", "all", new, group, whole)]
    if by:
        names = _names([*old.scored.records, *new.scored.records], by)
        for side, sample, own in (("old", old, names[: len(old)]), ("new", new, names[len(old) :])):
            found += [_slice(side, name, sample[own == name], group, whole) for name in sorted(set(own))]
    return tuple(found)


def _slice(side: str, name: str, sample: Sample, group: str, whole: bool) -> Slice:
    scored = (together(sample, group) if group else sample).scored
    return Slice(
        side,
        name,
        len(sample),
        two_samples.ratio(scored.loss, scored.weight),
        two_samples.ratio(scored.loss / np.log(2), scored.bytes) if whole else None,
        None if scored.correct is None else two_samples.ratio(scored.correct, scored.weight),
    )


def _names(records: list[dict[str, Any]], by: str) -> np.ndarray:
    """(N,) the value of a field by record: dates cut to months, years or decades until they are few, of other values the most frequent."""
    choose("field of the records", by, set().union(*records) - {"id"}, DataError)
    values = ["" if r.get(by) is None else str(r[by]) for r in records]
    for named in _shorter(values):
        if len(set(named)) <= SLICES:
            return np.array([name or "none" for name in named])
    common = {value for value, _ in collections.Counter(values).most_common(SLICES - 1)}
    return np.array([(value or "none") if value in common else "all others" for value in values])


def _shorter(values: list[str]) -> Iterator[list[str]]:
    yield values
    if all(re.fullmatch(r"(\d{4}(-\d\d(-\d\d.*)?)?)?", value) for value in values):
        for length in (10, 7, 4):
            yield [value[:length] for value in values]
        yield [value and f"{value[:3]}0s" for value in values]
        yield [value and f"{value[:2]}00s" for value in values]
