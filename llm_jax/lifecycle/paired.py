"""Two models on the same documents: by how much one is worse, and how sure that is. Arrays alone."""

import dataclasses
import math

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Paired:
    """D = sum_i w_i d_i / sum_i w_i over N documents, d_i being how much worse the candidate is on one; above 0 is worse."""

    documents: int
    groups: int
    """of documents that are not independent of each other"""
    difference: float
    error: float
    """standard error of it"""
    flips: tuple[float, float, float] | None = None
    """of figures that are 0 or 1: documents that were lost, that were gained, and all, each divided by the design effect of the groups"""

    def interval(self, level: float) -> tuple[float, float]:
        """Both one-sided bounds at this level; the upper one is below a margin where a loss of that size is excluded."""
        if not self.error and self.flips is None:
            return self.difference, self.difference
        if self.groups < 2:
            return -math.inf, math.inf
        z = float(scipy.stats.t.ppf(1 - level, self.groups - 1))
        if self.flips is not None:  # an error that is estimated from few flips is too small, and none from none
            lost, gained, count = self.flips
            if not lost + gained:
                most = 1 - level ** (1 / count)  # exactly: the chance of no flip is (1 - most)^count at best
                return -most, most
            return -_most(gained, lost, count, z), _most(lost, gained, count, z)
        return self.difference - z * self.error, self.difference + z * self.error

    def p_worse(self) -> float:
        """Chance of a difference as large as this if the candidate is no worse."""
        if not self.error or self.groups < 2:
            return 0.0 if self.difference > 0 and self.groups > 1 else 1.0
        if self.flips is not None:
            lost, gained, _ = self.flips
            return float(scipy.stats.t.sf((lost - gained - 0.5) / math.sqrt(lost + gained), self.groups - 1))
        return float(scipy.stats.t.sf(self.difference / self.error, self.groups - 1))

    def needed(self, margin: float, level: float) -> int:
        """About how many documents would exclude a loss of the margin, if the difference stays what it is; 0 where none would."""
        if self.difference >= margin or not math.isfinite(self.error):
            return 0
        reach = self.interval(level)[1] - self.difference
        return math.ceil(self.documents * (reach / (margin - self.difference)) ** 2)


def _most(lost: float, gained: float, count: float, z: float) -> float:
    """The largest difference of the shares that were lost and gained which a score test with continuity correction leaves (Tango 1998, eq. 9).

    Unlike Student's interval it holds its level where flips are few: it takes their spread as it is if the difference is the tested one.
    """

    def beyond(delta: float) -> float:
        b = lost + gained + (lost - gained - 2 * count) * delta
        p = (b + math.sqrt(max(b * b + 8 * count * gained * delta * (1 - delta), 0.0))) / (4 * count)
        p = min(max(p, 0.0, -delta), (1 - delta) / 2)  # the likeliest share that is gained, given the difference
        spread = count * (2 * p + delta * (1 - delta))
        return lost - gained + 0.5 - count * delta + z * math.sqrt(max(spread, 0.0))

    low = (lost - gained) / count
    return 1.0 if beyond(1.0) >= 0 else float(scipy.optimize.brentq(beyond, low, 1.0))


def compare(
    incumbent: Float[np.ndarray, " N"],
    candidate: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"] | None = None,
) -> Paired:
    """The weighted mean of candidate - incumbent, with its error by linearisation (Cochran 1977, 6.3), summed over groups first.

    Bounds of means are Student's, approximate for few documents of very unequal weight; those of figures that are 0 or 1 are of the score test, whose
    count is divided by the design effect of the groups as the flips show it: 1 where there are none.

    Args:
        incumbent, candidate: of each document, its figure a unit of weight; greater is worse.
        groups: number of the group of each document; each is a group of its own by default.
    """
    d = candidate - incumbent
    total = weights.sum()
    mean = float((weights * d).sum() / total)
    residuals = weights * (d - mean)
    binary = np.isin([incumbent, candidate], (-1, 0, 1)).all() and np.isin(d, (-1, 0, 1)).all() and np.ptp(weights) == 0
    if groups is not None:
        residuals = np.bincount(np.unique(groups, return_inverse=True)[1], residuals)
    count = len(residuals)
    if count < 2:
        return Paired(len(d), count, mean, 0.0 if not (d.any() or binary) else math.inf)
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(total)
    if not binary:
        return Paired(len(d), count, mean, error)
    alone = d.var(ddof=1) / len(d)  # of the mean, were documents independent
    effect = max(1.0, error**2 / alone) if alone else 1.0
    lost, gained = (float((d == sign).sum()) / effect for sign in (1, -1))
    return Paired(len(d), count, mean, error, (lost, gained, len(d) / effect))
