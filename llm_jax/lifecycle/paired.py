"""Two models on the same documents: by how much one is worse, and how sure that is. Arrays alone."""

import dataclasses
import math

import numpy as np
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

    def interval(self, level: float) -> tuple[float, float]:
        """Both one-sided bounds at this level; the upper one is below a margin where a loss of that size is excluded."""
        if not self.error:
            return self.difference, self.difference
        if self.groups < 2:
            return -math.inf, math.inf
        reach = float(scipy.stats.t.ppf(1 - level, self.groups - 1)) * self.error
        return self.difference - reach, self.difference + reach

    def p_worse(self) -> float:
        """Chance of a difference as large as this if the candidate is no worse."""
        if not self.error or self.groups < 2:
            return 0.0 if self.difference > 0 and self.groups > 1 else 1.0
        return float(scipy.stats.t.sf(self.difference / self.error, self.groups - 1))

    def needed(self, margin: float, level: float) -> int:
        """About how many documents would exclude a loss of the margin, if the difference stays what it is; 0 where none would."""
        if self.difference >= margin or not math.isfinite(self.error):
            return 0
        reach = self.interval(level)[1] - self.difference
        return math.ceil(self.documents * (reach / (margin - self.difference)) ** 2)


def compare(
    incumbent: Float[np.ndarray, " N"],
    candidate: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"] | None = None,
) -> Paired:
    """The weighted mean of candidate - incumbent, with its error by linearisation (Cochran 1977, 6.3), summed over groups first.

    Args:
        incumbent, candidate: of each document, its figure a unit of weight; greater is worse.
        groups: number of the group of each document; each is a group of its own by default.
    """
    d = candidate - incumbent
    total = weights.sum()
    mean = float((weights * d).sum() / total)
    residuals = weights * (d - mean)
    if groups is not None:
        residuals = np.bincount(np.unique(groups, return_inverse=True)[1], residuals)
    count = len(residuals)
    if count < 2:
        return Paired(len(d), count, mean, 0.0 if not d.any() else math.inf)
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(total)
    return Paired(len(d), count, mean, error)
