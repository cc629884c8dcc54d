"""Packed documents have the loss, the gradient and the probability of each token that they have alone in a row."""

import dataclasses
import functools
import zlib

import jax
import numpy as np
import pytest

from llm_jax import step, tree
from llm_jax.config import Batch, Data
from llm_jax.data.pipeline import Loader
from llm_jax.losses import log_probabilities
from llm_jax.models import presets, transformer
from llm_jax.tasks import NextToken, SequenceToSequence
from llm_jax.tasks.next_token import vocabulary_loss

LENGTH, VOCABULARY = 32, 50
SIZE = dict(vocab_size=VOCABULARY, max_length=LENGTH, layers=2, dim=16, heads=4, mlp_dim=24, dropout=0.0)
MODELS = {
    "rotary": presets.llama(**SIZE, kv_heads=2),
    "learned": presets.gpt2(**SIZE),
    "relative": presets.t5(**SIZE, head_dim=4, relative_buckets=8, relative_distance=12).replace(
        architecture="decoder"
    ),
    "sinusoidal": presets.gpt2(**SIZE, positions="sinusoidal"),
    "encoder": presets.bert(**SIZE, head="mlm", pooler="none"),
    "encoder-decoder": presets.t5(**SIZE, head_dim=4, relative_buckets=8, relative_distance=12),
    "translation": presets.marian(**SIZE),
}


@dataclasses.dataclass
class Numbers:
    """Documents of many lengths, most of them short, whose words are numbers; each with a target of another length."""

    spec: str = "numbers"
    fingerprint: str = "f"

    def __len__(self):
        return 22

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        words, target = (
            rng.integers(3, VOCABULARY, int(1 + most * rng.random() ** 2)).astype(str) for most in (28, 22)
        )
        return {"id": f"numbers:{index}", "text": " ".join(words), "target": " ".join(target)}


class Words:
    """Each word is a number, and its own token."""

    pad, bos, eos, sep, cls, mask, vocab_size, fingerprint = 0, 1, 2, None, None, None, VOCABULARY, "t"
    begin, start = 1, 1

    def encode(self, text):
        return np.array(text.split(), np.int32)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Every fourth token is hidden and predicted, the same ones in whatever row they come."""

    def lengths(self, length):
        return {"tokens": length}

    def examples(self, record, tokenizer, length, long, rng):
        tokens = tokenizer.encode(record["text"])
        hidden = np.arange(len(tokens)) % 4 == 1
        yield {"tokens": np.where(hidden, 2, tokens), "targets": tokens, "weights": hidden.astype(np.float32)}

    def row(self, row, tokenizer, rng):
        return row

    def loss(self, config):
        return vocabulary_loss(config, 0.0, 0.0)


def task_of(config):
    return {"encoder": Hidden(), "decoder": NextToken(), "encoder-decoder": SequenceToSequence()}[config.architecture]


@functools.cache
def rows(task, pack):
    """The batches of all documents, each once."""
    data = Data(sources=("numbers",), heldout_sources=("numbers",), pack=pack, long="split", window=40)
    with Loader([Numbers()], Words(), task, data, Batch(4, LENGTH), 0, "heldout") as loader:
        return list(loader)


def random_params(config):
    def one(name, x):
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape)
        return (name.endswith("scale") + 0.2 * drawn).astype(np.float32)

    return tree.map_with_name(one, transformer.shapes(config))


def totals(config, batches, gradient=False):
    """Sums over all batches: the loss, its weight, and the gradient on request."""
    loss, params = task_of(config).loss(config), random_params(config)
    if gradient:
        found = jax.jit(lambda params, batch: step.differentiate(loss)(params, batch, None, {}))
    else:
        found = jax.jit(lambda params, batch: (loss(params, batch, None, {}).sums(), ()))
    parts = [found(params, r.batch) for r in batches]
    return jax.tree.map(lambda *x: np.sum(np.stack(x), axis=0, dtype=np.float64), *parts)


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_unpacked_documents_have_one_loss(name):
    config = MODELS[name]
    packed, alone = rows(task_of(config), True), rows(task_of(config), False)
    assert len(packed) < len(alone) and max(r.batch["segment_ids"].max() for r in packed) >= 3
    assert max(r.batch["segment_ids"].max() for r in alone) == 1
    gradient = name in ("relative", "encoder-decoder")
    (one, d_one), (other, d_other) = totals(config, packed, gradient), totals(config, alone, gradient)
    assert one.weight == other.weight > 60
    np.testing.assert_allclose(one.total, other.total, rtol=1e-6)
    np.testing.assert_allclose(one.total / one.weight, other.total / other.weight, atol=1e-6)
    assert one.metrics["correct"] == other.metrics["correct"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), d_one, d_other)


def test_each_token_has_the_probability_that_it_has_alone():
    """Not the sum alone: by document, token by token, in the order of the text."""
    config = MODELS["encoder-decoder"]
    params = random_params(config)

    @jax.jit
    def score(params, batch):
        return log_probabilities(transformer.apply(config, params, batch, logits=False), batch["targets"])

    def by_document(batches):
        found = {}
        for r in batches:
            for scores, ids in zip(np.asarray(score(params, r.batch)), r.ids):
                for number in set(ids.tolist()) - {-1}:
                    assert number not in found, "a document came twice"
                    found[number] = scores[ids == number]
        return found

    packed, alone = (by_document(rows(SequenceToSequence(), pack)) for pack in (True, False))
    assert packed.keys() == alone.keys() == set(range(22))
    for number, expected in alone.items():
        np.testing.assert_allclose(packed[number], expected, atol=1e-5)


def test_the_comparison_can_fail():
    """Packed rows read as one text each, as if segments were not masked, have another loss."""
    config = MODELS["rotary"]
    blind = [
        r._replace(batch={**r.batch, "segment_ids": np.minimum(r.batch["segment_ids"], 1)})
        for r in rows(NextToken(), True)
    ]
    (found, _), (expected, _) = totals(config, blind), totals(config, rows(NextToken(), False))
    assert found.weight == expected.weight and abs(found.total / found.weight - expected.total / expected.weight) > 1e-4
