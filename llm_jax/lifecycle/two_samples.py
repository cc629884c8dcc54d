"""Whether two samples of documents are of one source: tests whose unit is the document, of arrays alone; what to make of them is `drift.py`'s.

Documents are taken for independent of each other. Pieces of one text are not: where old and new are pieces of different texts, each p-value here is too
small, since a classifier learns to tell the texts; add them up by text first (`sampled.together`).
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats
from jaxtyping import Bool, Float

BUCKETS = 1 << 14
"""Features that runs of characters are hashed to"""

FOLDS = 5
RIDGE = 0.1
"""Penalty of the classifier, of features of unit length"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval; without one where there is a single document."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


def _linearised(total: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """R = sum(total) / sum(weight) and its variance, n / (n - 1) sum (total - R weight)^2 / sum(weight)^2 (Cochran 1977, eq. 6.13)."""
    value, n = total.sum() / weight.sum(), len(total)
    return float(value), float(n / max(n - 1, 1) * np.square(total - value * weight).sum() / weight.sum() ** 2)


def ratio(total: np.ndarray, weight: np.ndarray) -> Estimate:
    """sum(total) / sum(weight) over documents, its interval by Student's t of the linearised residuals.

    >>> ratio(np.array([1.0, 3.0]), np.array([1.0, 1.0])).value
    2.0
    """
    value, variance = _linearised(total, weight)
    if len(total) < 2:
        return Estimate(value)
    margin = float(scipy.stats.t.ppf(0.975, len(total) - 1)) * variance**0.5
    return Estimate(value, value - margin, value + margin)


def difference(
    old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray], scale: float = 1.0
) -> tuple[Estimate, float]:
    """Ratio of (total, weight) in new less that in old, times `scale`, and its two-sided p-value; Welch's t of the linearised residuals."""
    (a, va), (b, vb) = _linearised(*old), _linearised(*new)
    error = (va + vb) ** 0.5
    if error == 0:
        return Estimate((b - a) * scale, (b - a) * scale, (b - a) * scale), float(a == b)
    freedom = (va + vb) ** 2 / (va**2 / (len(old[0]) - 1) + vb**2 / (len(new[0]) - 1))
    margin = float(scipy.stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(scipy.stats.t.sf(abs(b - a) / error, freedom))
    return Estimate(*(float(scale * x) for x in (b - a, b - a - margin, b - a + margin))), p


def beyond(old: np.ndarray, new: np.ndarray, share: float = 0.01) -> tuple[float, float, float]:
    """Share of new above the k-th largest of old, k / n_old, and the exact p-value of so many, k = ceil(share n_old).

    j of new are above it if and only if the k + j - 1 largest of all hold at least j of new, which are hypergeometric in number under the null.
    """
    k = max(1, int(np.ceil(share * len(old))))
    j = int((new > np.sort(old)[-k]).sum())  # a tie counts for the null
    p = scipy.stats.hypergeom.sf(j - 1, len(old) + len(new), len(new), k + j - 1) if j else 1.0
    return j / len(new), k / len(old), float(p)


def permutations(old: int, new: int, count: int, seed: int) -> Bool[np.ndarray, "P N"]:
    """Which documents are new: first as it is, the old ones before the new ones, then `count` times at random."""
    labels = np.tile(np.arange(old + new) >= old, (count + 1, 1))
    return np.concatenate([labels[:1], np.random.default_rng(seed).permuted(labels[1:], axis=1)])


def permutation_p(statistics: Float[np.ndarray, " P"]) -> float:
    """Share of the statistics that are as large as the first, itself among them; exact under the null (Phipson and Smyth 2010)."""
    return float((statistics >= statistics[0] * (1 - 1e-9)).mean())


def divergences(counts: Any, labels: Bool[np.ndarray, "P N"]) -> Float[np.ndarray, " P"]:
    """Jensen-Shannon divergence, in bits, of the unigrams of the documents (N, V) on the two sides, for each labelling."""
    counts = counts[:, np.asarray(counts.sum(0)).ravel() > 0].astype(np.float64)
    whole = np.asarray(counts.sum(0)).ravel()
    found = []
    for rows in np.array_split(labels, max(1, len(labels) // 64)):
        new = rows.astype(np.float64) @ counts
        p, q = (x / np.maximum(x.sum(1, keepdims=True), 1) for x in (whole - new, new))
        found.append(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)
    return np.concatenate(found)


def _entropy(p: Float[np.ndarray, "P V"]) -> Float[np.ndarray, " P"]:
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(1)


def grams(texts: list[str]) -> Any:
    """Counts (N, BUCKETS), sparse, of the runs of 2 to 5 characters of each text, hashed, upper case and lower case alike."""
    indices, values, ends = [], [], [0]
    for text in texts:
        codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        runs, held = [], codes
        for n in range(1, 5):
            held = held[:-1] * np.uint64(0x100000001B3) + codes[n:]
            runs.append((held * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(50))  # the upper 14 bits
        found, times = np.unique(np.concatenate(runs), return_counts=True)
        indices.append(found.astype(np.int32))
        values.append(times.astype(np.float32))
        ends.append(ends[-1] + len(found))
    return scipy.sparse.csr_array((np.concatenate(values), np.concatenate(indices), ends), (len(texts), BUCKETS))


def areas(counts: Any, labels: Bool[np.ndarray, "P N"], seed: int) -> Float[np.ndarray, " P"]:
    """Area under the curve of a classifier of old against new, out of fold, for each labelling (Lopez-Paz and Oquab 2017).

    The classifier is least squares with a ridge on tf-idf: its scores out of fold are a linear map of the labels, so each labelling is refitted for
    the price of a product, and the null of the refitted areas is exact.
    """
    n = counts.shape[0]
    seen = np.asarray((counts > 0).sum(0)).ravel()
    weighted = np.log1p(counts.toarray().astype(np.float32)) * (np.log((1 + n) / (1 + seen)) + 1).astype(np.float32)
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    kernel = (weighted @ weighted.T).astype(np.float64)
    kernel += kernel.mean() - kernel.mean(0) - kernel.mean(1)[:, None]
    maps = np.zeros((n, n))
    for fold in np.array_split(np.random.default_rng(seed).permutation(n), FOLDS):
        rest = np.setdiff1d(np.arange(n), fold)
        inner = kernel[np.ix_(rest, rest)] + RIDGE * np.eye(len(rest))
        maps[np.ix_(fold, rest)] = np.linalg.solve(inner, kernel[np.ix_(rest, fold)]).T
    scores = (labels - labels.mean(1, keepdims=True)) @ maps.T
    new = labels[0].sum()
    ranks = (scipy.stats.rankdata(scores, axis=1) * labels).sum(1)
    return (ranks - new * (new + 1) / 2) / (new * (n - new))


def holm(p: list[float]) -> list[float]:
    """p-values corrected so that under the null one of them is below a with probability a at most (Holm 1979).

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.array(p)[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()
