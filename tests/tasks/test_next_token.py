"""Next-token prediction: each token of a document is a target once, in order, whatever the row's length; nothing is
lost unsaid.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.pieces import ACCOUNT, Dropped
from llm_jax.errors import ConfigError, DataError
from llm_jax.tasks import NextToken
from llm_jax.tasks.next_token import document


def examples(text, tokenizer, length, long="split", **fields):
    return list(
        NextToken(**fields).examples({"id": "a.txt", "text": text}, tokenizer, length, long, np.random.default_rng(0))
    )


def total(found):
    """The accounts of all examples, by name."""
    return dict(zip(ACCOUNT, sum(example["account"] for example in found)))


@settings(deadline=None)
@given(text=st.text(max_size=80), length=st.integers(1, 40))
def test_each_token_is_a_target_exactly_once(bpe, text, length):
    symbols = [bpe.eos, *bpe.encode(text), bpe.eos]
    found = examples(text, bpe, length)
    assert np.concatenate([e["tokens"] for e in found]).tolist() == symbols[:-1]
    assert np.concatenate([e["targets"] for e in found]).tolist() == symbols[1:]
    assert all(len(e["tokens"]) == length for e in found[:-1]) and 1 <= len(found[-1]["tokens"]) <= length
    assert all(e["tokens"].dtype == e["targets"].dtype == np.int32 for e in found)
    assert all((e["weights"] == 1).all() and len(e["weights"]) == len(e["tokens"]) for e in found)
    counted = total(found)
    assert counted["bytes"] == pytest.approx(len(text.encode()), abs=1e-6)
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (len(symbols) - 1, 0, 0)


@settings(deadline=None)
@given(text=st.text(max_size=80), length=st.integers(2, 40), data=st.data())
def test_an_overlap_gives_context_and_no_second_target(bpe, text, length, data):
    """Each token still has a weight once; every window but the first begins with the last `overlap` tokens before it,
    unweighted.
    """
    overlap = data.draw(st.integers(0, length - 1))
    symbols = [bpe.eos, *bpe.encode(text), bpe.eos]
    found, at = examples(text, bpe, length, overlap=overlap), 0
    for i, e in enumerate(found):
        again = np.count_nonzero(e["weights"] == 0)
        assert len(e["tokens"]) == len(e["targets"]) == len(e["weights"]) <= length and e["weights"].dtype == np.float32
        assert again == (overlap if i else 0) and (e["weights"] == (np.arange(len(e["weights"])) >= again)).all()
        assert e["tokens"].tolist() == symbols[at - again : at - again + len(e["tokens"])]
        assert e["targets"].tolist() == symbols[at - again + 1 : at - again + 1 + len(e["tokens"])]
        at += len(e["tokens"]) - again
    assert at == len(symbols) - 1
    assert all(len(e["tokens"]) == length for e in found[:-1])
    counted = total(found)
    assert (
        counted["bytes"] == pytest.approx(len(text.encode()), abs=1e-6)
        and counted["tokens"] == at
        and counted["lost"] == 0
    )


def test_an_overlap_with_truncation(bpe):
    """What is cut off is not read, overlap or not."""
    text = "banana tartan gort " * 5
    (plain,), (overlapping,) = (examples(text, bpe, 10, "truncate", overlap=n) for n in (0, 4))
    assert all(np.array_equal(plain[name], overlapping[name]) for name in plain)


def test_a_literal_special_token_ends_nothing(bpe):
    (example,) = examples("a <|endoftext|> b", bpe, 100)
    assert np.count_nonzero(example["targets"] == bpe.eos) == 1 == np.count_nonzero(example["tokens"] == bpe.eos)


def test_an_empty_document_has_one_target(bpe):
    (example,) = examples("", bpe, 8)
    assert example["tokens"].tolist() == example["targets"].tolist() == [bpe.eos]
    assert total([example])["bytes"] == 0


def test_truncate_keeps_the_first_row_and_counts_the_rest(bpe):
    text = "banana tartan gort " * 5
    whole = examples(text, bpe, 1000)[0]
    (example,) = examples(text, bpe, 10, "truncate")
    assert example["targets"].tolist() == whole["targets"][:10].tolist()
    counted, count = total([example]), len(whole["tokens"])
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (10, count - 10, 1)
    assert counted["bytes"] == pytest.approx(len(text) * 10 / count)
    assert total(examples(text, bpe, 1000, "truncate"))["truncated"] == 0


def test_drop_and_error(bpe):
    text = "banana " * 9
    count = len(bpe.encode(text)) + 1
    with pytest.raises(Dropped) as dropped:
        examples(text, bpe, 5, "drop")
    assert dropped.value.tokens == count
    with pytest.raises(DataError) as error:
        examples(text, bpe, 5, "error")
    assert (
        str(error.value)
        == f"document a.txt has {count} tokens, a row holds 5: set data.long to split, truncate or drop"
    )
    assert len(examples(text, bpe, count, "error")) == len(examples(text, bpe, count, "drop")) == 1


def test_begin_and_end(bpe, wordpiece, sentinels, endless):
    assert document("", bpe).tolist() == [bpe.bos, bpe.eos]
    assert document("", wordpiece).tolist() == [wordpiece.cls, wordpiece.sep]
    assert document("", sentinels).tolist() == [sentinels.eos, sentinels.eos]
    with pytest.raises(DataError) as error:
        document("a", endless)
    assert (
        str(error.value) == "the tokenizer has no token that ends a document (such as </s> or <|endoftext|>): add one"
    )


def test_rows_stay_as_they_are(bpe):
    row = {"tokens": np.arange(4)}
    assert NextToken().row(row, bpe, np.random.default_rng(0)) is row
    assert NextToken().lengths(64) == {"tokens": 64} and NextToken().extra_tokens(bpe) == 0


def test_bad_values():
    with pytest.raises(ConfigError, match=r"^task.label_smoothing is 1.5: it must lie in \[0, 1\]$"):
        NextToken(label_smoothing=1.5)
    with pytest.raises(ConfigError, match=r"^task.z_loss is -0.1: it must be at least 0$"):
        NextToken(z_loss=-0.1)
    with pytest.raises(ConfigError, match=r"^task.overlap is -1: it must be at least 0$"):
        NextToken(overlap=-1)


def test_an_overlap_as_long_as_the_row(bpe):
    with pytest.raises(ConfigError, match=r"^task.overlap 8 leaves no room in rows of 8 tokens$"):
        examples("banana", bpe, 8, overlap=8)
    assert examples("banana", bpe, 8, overlap=7)
