"""Span corruption: the source and the target together are the text, no window could be longer, and the noise is drawn
evenly.
"""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.pieces import ACCOUNT, Dropped
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.tasks import SpanCorruption
from llm_jax.tasks.span_corruption import SENTINELS, _parts

TASKS = st.builds(SpanCorruption, rate=st.floats(0.0, 0.95), span=st.floats(1.0, 12.0))


def split(ids, sentinels):
    """The pieces between sentinels, by the number of the sentinel before each; -1 before the first."""
    number, found = -1, {-1: []}
    for token in ids:
        if token in sentinels:
            assert sentinels[token] not in found, "no sentinel comes twice"
            number = sentinels[token]
            found[number] = []
        else:
            found[number].append(int(token))
    return found


def restored(source, target, sentinels, end):
    """The text that a source and a target were made of, and its noise spans."""
    assert source[-1] == end == target[-1]
    kept, hidden = split(source[:-1], sentinels), split(target[:-1], sentinels)
    assert list(kept) == list(hidden) == list(range(-1, len(kept) - 1)) and hidden[-1] == []
    text = list(kept[-1])
    for number in range(len(kept) - 1):
        assert hidden[number], "no span is empty"
        text += hidden[number] + kept[number]
    assert kept[max(kept)] == [], "the text ends in a noise span"
    return text, [hidden[number] for number in range(len(hidden) - 1)]


@settings(deadline=None)
@given(task=TASKS, count=st.integers(2, 700), seed=st.integers(0, 10**6))
def test_the_text_can_be_put_together_again(bpe, task, count, seed):
    ids = np.random.default_rng(seed).integers(2, bpe.vocab_size, count).astype(np.int32)
    source, target = task.corrupt(ids, bpe, np.random.default_rng(seed))
    sentinels = {int(s): i for i, s in enumerate(task.sentinels(bpe))}
    text, noise = restored(source, target, sentinels, bpe.eos)
    assert text == ids.tolist()
    tokens, spans = task.spans(count)
    assert (sum(map(len, noise)), len(noise)) == (tokens, spans)
    assert len(source) == count - tokens + spans + 1 and len(target) == tokens + spans + 1
    assert source.dtype == target.dtype == np.int32


@settings(deadline=None)
@given(task=TASKS, count=st.integers(2, 5000))
def test_noise_and_spans(task, count):
    """The rate and the mean length of the config, where the text is long enough for them and the sentinels reach."""
    noise, spans = task.spans(count)
    assert 1 <= spans <= min(noise, count - noise, SENTINELS) and noise < count
    if 1 <= count * task.rate <= count - 1:
        assert abs(noise - count * task.rate) <= 0.5
    if spans not in (1, noise, count - noise, SENTINELS):
        assert abs(spans - noise / task.span) <= 0.5


@settings(deadline=None)
@given(task=TASKS, length=st.integers(3, 300))
def test_a_window_fills_the_row_and_no_longer_one_would_fit(task, length):
    def size(count):
        noise, spans = task.spans(count)
        return count - noise + spans + 1, noise + spans + 1

    window, room = task.window(length), task.lengths(length)
    assert size(window)[0] <= length < min(size(window + extra)[0] for extra in range(1, 40))
    assert room == {"tokens": size(window)[1], "encoder_tokens": length}
    assert all(size(count)[0] <= length and size(count)[1] <= room["tokens"] for count in range(2, window))


def test_the_published_lengths():
    """Rows of 512, 15% noise in spans of 3: windows of 568 tokens, targets of 114, as in T5's preprocessing."""
    assert SpanCorruption().window(512) == 568
    assert SpanCorruption().lengths(512) == {"tokens": 114, "encoder_tokens": 512}


def test_examples(bpe):
    task, text = SpanCorruption(), "ban bart can cart den dert fin firt gon gort " * 4
    ids, window = bpe.encode(text), SpanCorruption().window(24)
    found = list(task.examples({"id": "a", "text": text}, bpe, 24, "split", np.random.default_rng(0)))
    sentinels = {int(s): i for i, s in enumerate(task.sentinels(bpe))}
    assert sum((restored(e["encoder_tokens"], e["targets"], sentinels, bpe.eos)[0] for e in found), []) == ids.tolist()
    for e in found:
        assert (
            len(e["encoder_tokens"]) <= 24
            and len(e["tokens"]) == len(e["targets"]) == len(e["weights"]) <= task.lengths(24)["tokens"]
        )
        assert e["tokens"].tolist() == [bpe.bos, *e["targets"][:-1]] and (e["weights"] == 1).all()
    counted = dict(zip(ACCOUNT, sum(e["account"] for e in found)))
    assert len(ids) % window != 1, "no token is left over"
    assert (counted["tokens"], counted["lost"], counted["truncated"], counted["bytes"]) == (
        len(ids),
        0,
        0,
        pytest.approx(len(text)),
    )


def test_a_last_token_alone_is_lost_and_counted(bpe):
    window = SpanCorruption().window(8)
    text = next(
        t
        for t in ("ban " * n for n in range(2, 99))
        if len(bpe.encode(t)) > window and len(bpe.encode(t)) % window == 1
    )
    found = list(SpanCorruption().examples({"id": "a", "text": text}, bpe, 8, "split", np.random.default_rng(0)))
    counted = dict(zip(ACCOUNT, sum(e["account"] for e in found)))
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (len(bpe.encode(text)) - 1, 1, 0)


def test_policies_for_long_documents(bpe):
    record, count, window = (
        {"id": "a.txt", "text": "ban bart " * 30},
        len(bpe.encode("ban bart " * 30)),
        SpanCorruption().window(16),
    )
    (first,) = SpanCorruption().examples(record, bpe, 16, "truncate", np.random.default_rng(0))
    counted = dict(zip(ACCOUNT, first["account"]))
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (window, count - window, 1)
    with pytest.raises(Dropped):
        list(SpanCorruption().examples(record, bpe, 16, "drop", np.random.default_rng(0)))
    with pytest.raises(
        DataError,
        match=rf"^document a.txt has {count} tokens, a row holds {window}: set data.long to split, truncate or drop$",
    ):
        list(SpanCorruption().examples(record, bpe, 16, "error", np.random.default_rng(0)))


@pytest.mark.parametrize("text", ["", "b"])
def test_a_text_of_less_than_two_tokens_has_no_example(bpe, text):
    assert len(bpe.encode(text)) < 2
    assert list(SpanCorruption().examples({"id": "a", "text": text}, bpe, 16, "split", np.random.default_rng(0))) == []


def test_the_noise_depends_on_the_generator_alone(bpe):
    record = {"id": "a", "text": "ban bart can cart den dert fin firt gon gort " * 9}

    def drawn(seed):
        found = SpanCorruption().examples(record, bpe, 32, "split", np.random.default_rng(seed))
        return np.concatenate([e["encoder_tokens"] for e in found]).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


@settings(deadline=None)
@given(total=st.integers(1, 60), data=st.data())
def test_parts_are_positive_and_add_up(total, data):
    count = data.draw(st.integers(1, total))
    parts = _parts(total, count, np.random.default_rng(0))
    assert len(parts) == count and parts.sum() == total and (parts > 0).all()


def test_all_divisions_are_equally_likely():
    rng, draws = np.random.default_rng(0), 6000
    seen = Counter(tuple(_parts(5, 3, rng).tolist()) for _ in range(draws))
    assert len(seen) == 6  # of 5 in 3 positive parts
    assert all(abs(n - draws / 6) < 5 * (draws / 6 * 5 / 6) ** 0.5 for n in seen.values())


def test_sentinels(bpe, sentinels):
    task = SpanCorruption()
    assert (
        task.sentinels(bpe).tolist() == list(range(bpe.vocab_size, bpe.vocab_size + 100))
        and task.extra_tokens(bpe) == 100
    )
    assert (
        task.sentinels(sentinels).tolist() == [sentinels.id(f"<extra_id_{i}>") for i in range(100)]
        and task.extra_tokens(sentinels) == 0
    )
    assert task.sentinels(sentinels)[0] == sentinels.vocab_size - 1, "as in T5 the first is the last of the vocabulary"
    source, target = task.corrupt(np.arange(2, 60, dtype=np.int32), sentinels, np.random.default_rng(0))
    assert source[-1] == target[-1] == sentinels.eos and target[0] == sentinels.vocab_size - 1


def test_a_tokenizer_with_too_few_sentinels(sentinels):
    definition = json.loads(sentinels.definition)
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != "<extra_id_57>"]
    with pytest.raises(DataError) as error:
        SpanCorruption().sentinels(Tokenizer(json.dumps(definition), sentinels.config))
    assert (
        str(error.value)
        == "the tokenizer has <extra_id_0>, but no <extra_id_57>: span corruption needs all 100 sentinels, or none"
    )


def test_bad_values():
    for fields, message in (
        (dict(rate=1.5), "task.rate is 1.5: it must lie in [0, 1]"),
        (dict(rate=1.0), "task.rate is 1: some of the text must be left to read"),
        (dict(span=0.5), "task.span is 0.5: it must be at least 1"),
        (dict(z_loss=-1.0), "task.z_loss is -1.0: it must be at least 0"),
        (dict(label_smoothing=-1.0), "task.label_smoothing is -1.0: it must lie in [0, 1]"),
    ):
        with pytest.raises(ConfigError) as error:
            SpanCorruption(**fields)
        assert str(error.value) == message
