"""Interpolated modified Kneser-Ney n-gram language model over integer token ids (numpy only).

Source: S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
TR-10-98, Harvard University, 1998 (modified Kneser-Ney); R. Kneser and H. Ney, "Improved backing-off for m-gram
language modeling", ICASSP 1995 (continuation counts); K. Heafield et al., "Scalable Modified Kneser-Ney Language
Model Estimation", ACL 2013 (KenLM's lmplz, whose conventions on document starts and discounts are followed).

For an n-gram hw (context h of n - 1 tokens, then token w) and h' = h without its first token,

    p_n(w | h) = max(a(hw) - D_n(a(hw)), 0) / a(h.)  +  gamma(h) p_{n-1}(w | h')
    a(h.)      = sum_v a(hv)
    gamma(h)   = (D_n(1) N_1(h) + D_n(2) N_2(h) + D_n(3+) N_3+(h)) / a(h.)
    p_n(w | h) = p_{n-1}(w | h')  when h was never followed by anything;        p_0(w) = 1 / V

where N_k(h) is the number of tokens v with a(hv) = k.  The adjusted count a(hw) is the raw count c(hw) at the highest
order and the continuation count |{v : c(v h w) > 0}| (number of distinct left neighbours) at the lower orders.

Document starts: each document is preceded by the begin-of-document symbol (id V), which is never predicted.  As in
KenLM and SRILM, n-grams of lower order which begin with that symbol have no left neighbour and keep their raw count.
Exactly one symbol is counted per document: contexts do not reach beyond it, so padding a context with more of them
changes nothing (such longer contexts are unseen and pass through to p_{n-1}).  Unlike KenLM, whose unigrams are
interpolated with 1 / (number of seen word types + 1, for <unk>), V is given and there is no unknown token.

Representation: an n-gram is the pair (id of its first n - 1 tokens, last token), packed in one int64 key; its own id
is the rank of that key among the distinct keys of order n.  Everything is then sorting, bincount and searchsorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNSEEN = -1  # id of an n-gram which does not occur in the training documents


def estimate_discounts(adjusted_counts: np.ndarray) -> np.ndarray:
    """Discounts [0, D1, D2, D3+] of one order from its counts-of-counts (Chen & Goodman 1998, eq. 26).

        Y = n_1 / (n_1 + 2 n_2),    D_k = k - (k + 1) Y n_{k+1} / n_k    for k = 1, 2, 3

    n_k is the number of distinct n-grams with adjusted count k.  When n_1, n_2 or n_3 is 0 or some D_k falls outside
    (0, k] (tiny corpora, or unigrams of a subword vocabulary without rare tokens) the formula is undefined or invalid,
    and the order takes 0.5, 1, 1.5 instead, as KenLM does with `--discount_fallback`.  (KenLM lets D_k = 0 pass; it
    is refused here because gamma(h) = 0 would give some tokens probability 0.)
    """
    n = np.bincount(np.minimum(adjusted_counts, 5), minlength=5).astype(float)
    if np.all(n[1:4] > 0):
        k = np.arange(1, 4)
        y = n[1] / (n[1] + 2 * n[2])
        discounts = k - (k + 1) * y * n[2:5] / n[1:4]
        if np.all((discounts > 0) & (discounts <= k)):
            return np.concatenate([[0.0], discounts])
    return np.array([0.0, 0.5, 1.0, 1.5])


def find_sorted(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Index of each query in the sorted array `keys`, UNSEEN where it is absent."""
    if len(keys) == 0:
        return np.full(len(queries), UNSEEN, dtype=np.int64)
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, index, UNSEEN)


@dataclass
class Level:
    """The G distinct n-grams of one order n, by id, and their C possible contexts, by (n-1)-gram id.

    The last entries of `discounted` and `gamma` are there for UNSEEN = -1 to index.
    """

    keys: np.ndarray  # (G,) int64, sorted: id of the first n - 1 tokens * (V + 1) + last token
    discounted: np.ndarray  # (G + 1,) float64: (a(hw) - D_n(a(hw))) / a(h.), then 0
    gamma: np.ndarray  # (C + 1,) float64: weight of p_{n-1} after each context (1 if never followed), then 1
    discounts: np.ndarray  # (4,) float64: 0, D_n(1), D_n(2), D_n(3+)

    @classmethod
    def estimate(cls, keys: np.ndarray, adjusted_counts: np.ndarray, n_contexts: int, base: int) -> Level:
        """Discounted probabilities and interpolation weights of one order (formula in the module's docstring)."""
        discounts = estimate_discounts(adjusted_counts)
        discount = discounts[np.minimum(adjusted_counts, 3)]
        context = keys // base
        total = np.bincount(context, weights=adjusted_counts, minlength=n_contexts)  # a(h.)
        removed = np.bincount(context, weights=discount, minlength=n_contexts)  # sum_k D_n(k) N_k(h)
        gamma = np.divide(removed, total, out=np.ones(n_contexts), where=total > 0)
        discounted = (adjusted_counts - discount) / total[context]  # never negative since D_n(k) <= k
        return cls(keys, np.append(discounted, 0.0), np.append(gamma, 1.0), discounts)


class KneserNey:
    """Interpolated modified Kneser-Ney model of order `order` over a closed vocabulary {0, ..., vocab_size - 1}.

    Every token has positive probability in every context as the recursion ends in the uniform distribution.  An end
    token, if wanted, is an ordinary token which the caller appends to each document.
    """

    def __init__(self, vocab_size: int, levels: list[Level]) -> None:
        self.vocab_size = vocab_size
        self.levels = levels  # levels[n - 1] holds the n-grams

    @property
    def order(self) -> int:
        return len(self.levels)

    @property
    def begin(self) -> int:
        """Id of the begin-of-document symbol, which is never predicted."""
        return self.vocab_size

    @classmethod
    def fit(cls, documents: Sequence[np.ndarray], vocab_size: int, order: int = 5) -> KneserNey:
        """Count the n-grams of `documents` (1-d arrays of ids in [0, vocab_size)) and estimate all orders.

        Time O(order * T log T) and memory O(order * T) for T training tokens.
        """
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order and vocab_size must be at least 1, not {order} and {vocab_size}")
        stream = cls._stream(documents, vocab_size)
        base = vocab_size + 1
        predicted = np.flatnonzero(stream != vocab_size)  # positions of tokens, without the begin symbols
        if len(predicted) == 0:
            raise ValueError("no training tokens")

        # Upwards: the distinct n-grams of each order, their raw counts, and the ids of their last n - 1 tokens.
        tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        gram_ids = np.zeros(len(stream), dtype=np.int64)  # entry i: id of the n-gram which ends at position i
        context_ids = gram_ids  # entry i: id of the (n-1)-gram which ends just before position i
        for n in range(1, order + 1):
            here = predicted[context_ids[predicted] != UNSEEN]
            keys, first, inverse, counts = np.unique(
                context_ids[here] * base + stream[here], return_index=True, return_inverse=True, return_counts=True
            )
            tables.append((keys, counts, gram_ids[here[first]]))
            gram_ids = np.full(len(stream), UNSEEN, dtype=np.int64)
            gram_ids[here] = inverse
            if n == 1:
                gram_ids[stream == vocab_size] = len(keys)  # the begin symbol: a context, but never predicted
            context_ids = np.concatenate([[UNSEEN], gram_ids[:-1]])

        # Downwards: the adjusted counts.  An n-gram of lower order without left neighbour begins with `begin`.
        levels: list[Level] = []
        for n in range(order, 0, -1):
            keys, adjusted, _ = tables[n - 1]
            if n < order:
                continuation = np.bincount(tables[n][2], minlength=len(keys))
                adjusted = np.where(continuation > 0, continuation, adjusted)
            n_contexts = 1 if n == 1 else len(tables[n - 2][0]) + (n == 2)  # order 2: + 1 for the begin symbol
            levels.append(Level.estimate(keys, adjusted, n_contexts, base))
        return cls(vocab_size, levels[::-1])

    def log_prob(self, document: np.ndarray) -> np.ndarray:
        """Natural logarithm of p(token_i | the order - 1 tokens before it), shape (S,), for one document of S ids."""
        stream = self._stream([document], self.vocab_size)
        base = self.vocab_size + 1
        prob = np.full(len(stream), 1.0 / self.vocab_size)
        context_ids = np.zeros(len(stream), dtype=np.int64)  # as in fit
        for n, level in enumerate(self.levels, start=1):
            gram_ids = find_sorted(level.keys, np.where(context_ids != UNSEEN, context_ids * base + stream, UNSEEN))
            prob = level.discounted[gram_ids] + level.gamma[context_ids] * prob
            if n == 1:
                gram_ids[0] = len(level.keys)  # the begin symbol
            context_ids = np.concatenate([[UNSEEN], gram_ids[:-1]])
        return np.log(prob[1:])

    @staticmethod
    def _stream(documents: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
        """All documents in one int64 array, each preceded by the begin-of-document symbol (id vocab_size)."""
        parts: list[np.ndarray] = []
        for document in documents:
            ids = np.asarray(document)
            if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size)):
                raise ValueError(f"a document must be a 1-d integer array of ids in [0, {vocab_size})")
            parts += [np.array([vocab_size]), ids.astype(np.int64)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
