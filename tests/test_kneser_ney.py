"""Tests of kneser_ney: normalisation, a direct dictionary implementation, worked numbers, and edge cases."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from benchmarks.kneser_ney import KneserNey, estimate_discounts

BEGIN = "<s>"


class SlowKneserNey:
    """Modified Kneser-Ney written directly from the formulas, with tuples, Counters and a recursion."""

    def __init__(self, documents, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        raw, left = Counter(), defaultdict(set)
        for document in documents:
            words = [BEGIN] + [int(w) for w in document]
            for end in range(1, len(words)):
                for start in range(max(0, end - order + 1), end + 1):
                    gram = tuple(words[start : end + 1])
                    raw[gram] += 1
                    if start > 0:
                        left[gram].add(words[start - 1])
        self.a = {g: c if len(g) == order or g[0] == BEGIN else len(left[g]) for g, c in raw.items()}
        self.followers = defaultdict(list)
        for g in self.a:
            self.followers[g[:-1]].append(g)
        self.D = {}
        for n in range(1, order + 1):
            n_k = Counter(c for g, c in self.a.items() if len(g) == n)
            self.D[n] = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
            if all(n_k[k] for k in (1, 2, 3)):
                y = n_k[1] / (n_k[1] + 2 * n_k[2])
                d = {
                    0: 0.0,
                    1: 1 - 2 * y * n_k[2] / n_k[1],
                    2: 2 - 3 * y * n_k[3] / n_k[2],
                    3: 3 - 4 * y * n_k[4] / n_k[3],
                }
                if all(0 < d[k] <= k for k in (1, 2, 3)):
                    self.D[n] = d

    def p(self, w, h):
        """p(w | h); h is a tuple of at most order - 1 symbols, which may start with any number of BEGINs."""
        n = len(h) + 1
        lower = self.p(w, h[1:]) if n > 1 else 1 / self.vocab_size
        grams = self.followers.get(h, [])
        if not grams:
            return lower
        total = sum(self.a[g] for g in grams)
        count = self.a.get(h + (w,), 0)
        number = [sum(1 for g in grams if min(self.a[g], 3) == k) for k in range(4)]
        gamma = sum(self.D[n][k] * number[k] for k in (1, 2, 3)) / total
        return max(count - self.D[n][min(count, 3)], 0) / total + gamma * lower

    def log_prob(self, document):
        words = [BEGIN] * (self.order - 1) + [int(w) for w in document]
        return [
            math.log(self.p(words[i], tuple(words[i - self.order + 1 : i]))) for i in range(self.order - 1, len(words))
        ]


def corpus(seed, vocab_size, n_documents=30, max_length=40, unused=2):
    """Random documents with a skewed unigram distribution and repeats; the last `unused` ids never occur."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, vocab_size - unused + 1)
    documents = [
        rng.choice(len(weight), size=rng.integers(0, max_length), p=weight / weight.sum()) for _ in range(n_documents)
    ]
    return documents + documents[:3] + [np.concatenate([documents[4], documents[5]])]


def distribution(model, context):
    return np.exp([model.log_prob(np.append(context, w).astype(np.int64))[-1] for w in range(model.vocab_size)])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab_size", [7, 25])
def test_sums_to_one(order, vocab_size):
    documents = corpus(0, vocab_size)
    model = KneserNey.fit(documents, vocab_size, order)
    long = max(documents, key=len)
    unused = vocab_size - 1
    contexts = [
        [],
        long[:1],
        long[:3],
        long[3:4],
        long[5:12],
        long,  # seen, at and after the start
        np.append(unused, long[5:8]),
        np.append(long[5:8], long[0]),
        [0, unused, 0],
        [0] * 6,  # partly
        [unused],
        [unused] * 6,
    ]  # unseen
    rng = np.random.default_rng(1)
    contexts += [rng.integers(0, vocab_size, size=rng.integers(0, 8)) for _ in range(40)]
    for context in contexts:
        p = distribution(model, context)
        assert p.min() > 0
        assert abs(p.sum() - 1) < 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_agrees_with_direct_implementation(seed, order):
    vocab_size = [3, 5, 12, 40, 100, 300][seed]
    documents = corpus(seed, vocab_size, unused=1 if seed < 2 else 3)
    fast = KneserNey.fit(documents, vocab_size, order)
    slow = SlowKneserNey(documents, vocab_size, order)
    for n in range(1, order + 1):
        assert np.allclose(fast.levels[n - 1].discounts, [slow.D[n][k] for k in range(4)], rtol=0, atol=1e-12)
    rng = np.random.default_rng(100 + seed)
    unseen = [rng.integers(0, vocab_size, size=30) for _ in range(10)]
    for document in documents[:8] + corpus(1000 + seed, vocab_size, 8) + unseen:
        got = fast.log_prob(document)
        assert got.shape == (len(document),)
        assert np.allclose(got, slow.log_prob(document), rtol=0, atol=1e-10)


def test_comparison_covers_estimated_and_fallback_discounts():
    """The comparison above is only worth its name if both branches of estimate_discounts occur in it."""
    models = [KneserNey.fit(corpus(seed, v), v, 4) for seed, v in enumerate([5, 12, 40, 100])]
    fallback = [np.array_equal(level.discounts, [0, 0.5, 1, 1.5]) for model in models for level in model.levels]
    assert any(fallback) and not all(fallback)


def test_discounts_by_hand():
    counts = np.repeat([1, 2, 3, 4, 9], [10, 5, 3, 2, 1])  # Y = 10 / 20
    assert np.allclose(estimate_discounts(counts), [0, 1 - 2 * 0.5 * 5 / 10, 2 - 3 * 0.5 * 3 / 5, 3 - 4 * 0.5 * 2 / 3])
    assert np.allclose(
        estimate_discounts(np.repeat([1, 2, 3], [10, 5, 3])), [0, 0.5, 2 - 3 * 0.5 * 3 / 5, 3]
    )  # n_4 = 0
    assert np.array_equal(estimate_discounts(np.array([1, 1, 2])), [0, 0.5, 1, 1.5])
    assert np.array_equal(estimate_discounts(np.repeat([1, 2, 3, 4], [10, 1, 9, 1])), [0, 0.5, 1, 1.5])  # D2 < 0


def test_bigram_by_hand():
    """Documents 'a b' and 'a c', V = 4, order 2, fallback discounts 0.5, 1, 1.5.

    Unigram continuation counts: a 1 (after begin), b 1, c 1; so p1(a) = p1(b) = p1(c) = .5/3 + .5 * 1/4, p1(d) = .5/4.
    Bigrams, raw: (begin a) 2, (a b) 1, (a c) 1.
    """
    model = KneserNey.fit([np.array([0, 1]), np.array([0, 2])], 4, 2)
    seen, unused = 0.5 / 3 + 0.5 / 4, 0.5 / 4
    assert np.allclose(distribution(model, []), [(2 - 1) / 2 + 1 / 2 * seen, seen / 2, seen / 2, unused / 2])
    assert np.allclose(distribution(model, [0]), [0.5 * seen, 0.25 + 0.5 * seen, 0.25 + 0.5 * seen, 0.5 * unused])
    assert np.allclose(distribution(model, [1]), [seen, seen, seen, unused])  # b is never followed


def test_document_starts_keep_raw_counts():
    """Order 3: the bigram (begin a) occurs in 3 documents, (begin b) in 1; neither has a left neighbour."""
    model = KneserNey.fit([np.array([0, 2]), np.array([0, 1]), np.array([0, 0]), np.array([1, 1])], 3, 3)
    begin_context = len(model.levels[0].keys)
    keys = model.levels[1].keys
    rows = keys // 4 == begin_context
    assert np.allclose(model.levels[1].discounted[:-1][rows], [(3 - 1.5) / 4, (1 - 0.5) / 4])


def test_documents_are_independent():
    """Order of documents, empty documents and integer types do not matter; nothing is counted across documents."""
    documents = corpus(3, 20)
    model = KneserNey.fit(documents, 20, 4)
    other = KneserNey.fit([d.astype(np.uint16) for d in documents[::-1]] + [np.zeros(0, dtype=np.int64)], 20, 4)
    for document in documents:
        assert np.allclose(model.log_prob(document), other.log_prob(document), rtol=0, atol=1e-12)
    bigrams = KneserNey.fit([np.array([0]), np.array([1])], 2, 2).levels[1].keys
    assert len(bigrams) == 2  # (begin 0) and (begin 1), not (0 1)


def test_order_beyond_every_document_and_empty_scoring():
    documents = [np.array([0, 1, 2]), np.array([1])]
    model = KneserNey.fit(documents, 3, 9)
    slow = SlowKneserNey(documents, 3, 9)
    assert model.order == 9
    for document in ([0, 1, 2], [2, 1, 0, 1, 2, 0, 0, 1, 2, 1, 1]):
        assert np.allclose(model.log_prob(np.array(document)), slow.log_prob(document), rtol=0, atol=1e-12)
    assert model.log_prob(np.zeros(0, dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("bad", [np.array([0, 5]), np.array([-1]), np.array([0.5]), np.array([[0]])])
def test_refuses_bad_documents(bad):
    with pytest.raises(ValueError):
        KneserNey.fit([bad], 5, 3)
    with pytest.raises(ValueError):
        KneserNey.fit([np.array([0, 1])], 5, 3).log_prob(bad)


def test_refuses_bad_arguments():
    for documents, vocab_size, order in [([], 5, 3), ([np.array([0])], 5, 0), ([np.zeros(0, dtype=np.int64)], 5, 2)]:
        with pytest.raises(ValueError):
            KneserNey.fit(documents, vocab_size, order)
