"""The paired statistics against the formulas of others, and their errors by simulation."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.lifecycle.paired import _most, compare


def drawn(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(2, 1, count), rng.gamma(2, 1, count)


def test_with_equal_weights_it_is_the_paired_t_test():
    a, b = drawn(0)
    found = compare(a, b, np.ones(60))
    reference = scipy.stats.ttest_rel(b, a, alternative="greater")
    assert found.difference == pytest.approx((b - a).mean())
    assert found.p_worse() == pytest.approx(reference.pvalue)
    low, high = found.interval(0.05)
    interval = scipy.stats.ttest_rel(b, a).confidence_interval(0.9)
    assert (low, high) == pytest.approx((interval.low, interval.high))


def test_weights_are_those_of_a_ratio():
    """Doubling every weight changes nothing; a document of weight 0 counts as none."""
    a, b = drawn(1)
    weights = np.random.default_rng(2).uniform(0.5, 2, 60)
    found = compare(a, b, weights)
    assert found.difference == pytest.approx((weights * (b - a)).sum() / weights.sum())
    assert compare(a, b, 2 * weights).error == pytest.approx(found.error)


def test_groups_count_as_one():
    """Each document four times, in groups of four: the error is that of each once, not half of it."""
    a, b = drawn(3)
    once = compare(a, b, np.ones(60))
    four = compare(np.repeat(a, 4), np.repeat(b, 4), np.ones(240), np.repeat(np.arange(60), 4))
    assert (four.difference, four.error, four.groups) == (pytest.approx(once.difference), pytest.approx(once.error), 60)
    assert compare(np.repeat(a, 4), np.repeat(b, 4), np.ones(240)).error < 0.51 * once.error


def test_the_same_model_is_no_worse():
    a, _ = drawn(4)
    same = compare(a, a, np.ones(60))
    assert same.interval(0.05) == (0, 0) and same.p_worse() == 1.0


def test_one_group_tells_nothing():
    found = compare(np.array([1.0, 2.0]), np.array([1.1, 2.5]), np.ones(2), np.array([7, 7]))
    assert found.interval(0.05) == (-np.inf, np.inf) and found.p_worse() == 1.0 and found.needed(1.0, 0.05) == 0


def test_the_documents_that_are_needed_are_enough():
    """With about as many documents of the same kind, a loss of the margin is excluded."""
    rng = np.random.default_rng(5)
    d = rng.normal(0.0, 1.0, 40)
    found = compare(np.zeros(40), d, np.ones(40))
    margin = found.difference + 0.1
    needed = found.needed(margin, 0.05)
    assert needed > 40
    many = np.resize(d, needed)
    more = compare(np.zeros(needed), many, np.ones(needed))
    assert more.interval(0.05)[1] == pytest.approx(margin, abs=0.02)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.1, 3))
def test_the_bound_moves_with_the_candidate(seed: int, shift: float):
    a, b = drawn(seed)
    low, high = compare(a, b, np.ones(60)).interval(0.05)
    assert compare(a, b + shift, np.ones(60)).interval(0.05) == pytest.approx((low + shift, high + shift))


@pytest.mark.parametrize("count, margin", [(10, 0.05), (10, 0.3), (30, 0.05), (60, 0.035)])
@pytest.mark.parametrize("gained", [0.0, 0.05, 0.3])
def test_flips_of_the_margin_pass_at_the_level_at_most(count: int, margin: float, gained: float):
    """Over all numbers of documents lost and gained, by their exact chances: of candidates that lost the margin 5% pass at most."""
    passing = 0.0
    for n in range(count + 1):
        for lost in range(n + 1):
            chance = scipy.stats.multinomial.pmf(
                [lost, n - lost, count - n], count, [margin + gained, gained, 1 - margin - 2 * gained]
            )
            if chance < 1e-7:
                continue
            d = np.repeat([1.0, -1.0, 0.0], [lost, n - lost, count - n])
            before = (d < 0).astype(float)
            found = compare(before, before + d, np.ones(count))
            passing += chance * (found.interval(0.05)[1] < margin)
    assert passing <= 0.05


def test_the_bounds_of_flips():
    """Of documents that were lost alone, Wilson's with continuity correction; of many documents, Student's."""
    z = float(scipy.stats.norm.ppf(0.95))
    for lost, count in ((0, 30), (1, 10), (7, 60)):
        wilson = scipy.stats.binomtest(lost, count).proportion_ci(0.9, "wilsoncc").high
        assert _most(lost, 0, count, z) == pytest.approx(wilson)
    rng = np.random.default_rng(0)
    d = rng.choice([1.0, -1.0, 0.0], 20_000, p=[0.05, 0.04, 0.91])
    before = (d < 0).astype(float)
    flips, mean = compare(before, before + d, np.ones(20_000)), compare(before + 1e-9, before + d, np.ones(20_000))
    assert flips.flips is not None and mean.flips is None
    assert flips.interval(0.05) == pytest.approx(mean.interval(0.05), abs=5e-5)
    assert flips.p_worse() == pytest.approx(mean.p_worse(), rel=0.1)


def test_flips_in_groups_count_as_their_groups():
    """Each document four times, in groups of four: the bounds of each once, but for the degrees of freedom; of one group nothing is known."""
    rng = np.random.default_rng(1)
    d = rng.choice([1.0, -1.0, 0.0], 200, p=[0.1, 0.05, 0.85])
    before = (d < 0).astype(float)
    once = compare(before, before + d, np.ones(200))
    four, groups = np.repeat(d, 4), np.repeat(np.arange(200), 4)
    start = np.repeat(before, 4)
    assert compare(start, start + four, np.ones(800), groups).interval(0.05) == pytest.approx(
        once.interval(0.05), abs=1e-3
    )
    none = compare(np.ones(100), np.ones(100), np.ones(100), np.arange(100) // 10)
    assert none.interval(0.05) == pytest.approx((-0.0295, 0.0295), abs=1e-4)  # 1 - 0.05^(1/100)
    assert compare(np.ones(9), np.ones(9), np.ones(9), np.zeros(9, int)).interval(0.05) == (-np.inf, np.inf)


def test_a_loss_of_the_margin_passes_at_the_level():
    """Of 2,000 candidates that lost exactly the margin, in groups of unequal size, about 5% pass."""
    rng = np.random.default_rng(6)
    sizes = rng.integers(1, 9, 80)
    groups = np.repeat(np.arange(80), sizes)
    margin, passed = 0.1, 0
    for _ in range(2000):
        d = margin + rng.normal(0, 0.3, 80)[groups] + rng.normal(0, 0.3, len(groups))
        passed += compare(np.zeros(len(d)), d, np.ones(len(d)), groups).interval(0.05)[1] < margin
    assert 0.035 < passed / 2000 < 0.07
