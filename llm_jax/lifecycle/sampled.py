"""Documents as the tests of drift see them: what a model makes of each, its tokens, and its runs of characters."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse

from llm_jax.config import Batch, Data
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import DataError, choose
from llm_jax.lifecycle import two_samples
from llm_jax.lifecycle.scored import Scored, join_scored, score_documents
from llm_jax.model import Model

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sample:
    """N documents as the tests see them."""

    scored: Scored
    tokens: Any
    """(N, V) sparse: times of each token"""
    grams: Any
    """(N, two_samples.BUCKETS) sparse: times of each hashed run of characters of the text's beginning"""

    def __len__(self) -> int:
        return len(self.scored)

    def __getitem__(self, chosen: np.ndarray) -> "Sample":
        """The documents at these places."""
        return Sample(self.scored[chosen], self.tokens[chosen], self.grams[chosen])


def join(*samples: Sample) -> Sample:
    """The documents of several samples, one after the other."""
    tokens, grams = (scipy.sparse.vstack([getattr(s, name) for s in samples], "csr") for name in ("tokens", "grams"))
    return Sample(join_scored(*(sample.scored for sample in samples)), tokens, grams)


def together(sample: Sample, field: str) -> Sample:
    """The documents that share the value of a field as one, their figures added up; those without a value stay alone.

    Raises:
        DataError: no record has the field.
    """
    choose("field of the records", field, set().union(*sample.scored.records) - {"id"}, DataError)
    values = [r.get(field) for r in sample.scored.records]
    keys = [f"of none {i}" if value is None else f"of {value}" for i, value in enumerate(values)]
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    total = scipy.sparse.csr_array((np.ones(len(of)), (of, np.arange(len(of)))))
    s = sample.scored
    return Sample(
        Scored(
            [s.records[i] for i in first],
            total @ s.loss,
            total @ s.weight,
            total @ s.bytes,
            None if s.correct is None else total @ s.correct,
        ),
        total @ sample.tokens,
        total @ sample.grams,
    )


def describe(scored: Scored, tokenizer: Tokenizer, data: Data, characters: int) -> Sample:
    """The documents with their tokens, and the runs of characters of their first so many characters."""
    fields = (data.text, data.target)
    texts = ["\n".join(r[name] for name in fields if isinstance(r.get(name), str)) for r in scored.records]
    counts = [np.unique(tokenizer.encode(text), return_counts=True) for text in texts]
    ends = np.cumsum([0, *(len(found) for found, _ in counts)])
    indices, times = (np.concatenate(each) for each in zip(*counts))
    tokens = scipy.sparse.csr_array((times, indices, ends), (len(texts), tokenizer.vocab_size))
    return Sample(scored, tokens, two_samples.grams([text[:characters] for text in texts]))


def _fresh(data: Data, sources: tuple[str, ...], known: bool) -> Data:
    """The data whose held-out documents are those of these sources that a run on the data was not trained on; of unknown sources, all."""
    if known and data.heldout and not data.heldout_sources:
        return dataclasses.replace(data, sources=sources, weights=())
    if known:
        log.warning(
            "the model's run held out nothing of %s: it may remember what it is measured on", ", ".join(sources)
        )
    return dataclasses.replace(data, heldout_sources=sources, group="")


def _score(loaded: Model, task: Any, data: Data, batch: Batch, sources: Sequence[str]) -> Scored:
    """The fresh documents of the sources, in their order: those that the run knows apart from others, for each kind is read otherwise."""
    parts = itertools.groupby(sources, lambda source: source in data.sources)
    return join_scored(
        *(score_documents(loaded, task, _fresh(data, tuple(some), known), batch) for known, some in parts)
    )


def measure(
    loaded: Model, task: Any, data: Data, batch: Batch, old: Sequence[str], new: Sequence[str]
) -> tuple[Sample, Sample]:
    """The documents of the sources old and of the sources new as a model finds them.

    Of a source that the model was trained on, by the name that its run has for it, those that were held out: of others it remembers something.
    Where none were, all are read, and a warning says so.

    Raises:
        UserError: as `score_documents`.
    """
    sides = [_score(loaded, task, data, batch, sources) for sources in (old, new)]
    assert loaded.tokenizer is not None
    # As many characters of a document on both sides, so that its length is not what the classifier sees.
    lengths = [[len(r[data.text]) for r in scored.records if isinstance(r.get(data.text), str)] for scored in sides]
    characters = int(np.clip(min(np.quantile(each, 0.25) if each else 0 for each in lengths), 100, 2000))
    first, second = (describe(scored, loaded.tokenizer, data, characters) for scored in sides)
    return first, second
