"""Pairs of texts: what the encoder reads, how the decoder begins, and what becomes of a pair that is too long."""

import json

import numpy as np
import pytest

from llm_jax.config import Batch, Data
from llm_jax.data.documents import open_sources
from llm_jax.data.pieces import ACCOUNT, Dropped
from llm_jax.data.pipeline import Loader
from llm_jax.errors import ConfigError, DataError
from llm_jax.tasks import SequenceToSequence

RECORD = {"id": "pairs.jsonl:3", "text": "ban bart can", "target": "den dert fin firt gon"}


def example(tokenizer, length=100, long="error", record=RECORD, **fields):
    (found,) = SequenceToSequence(**fields).examples(record, tokenizer, length, long, np.random.default_rng(0))
    return found


def test_a_pair(bpe):
    found, source, target = example(bpe), bpe.encode(RECORD["text"]).tolist(), bpe.encode(RECORD["target"]).tolist()
    assert found["encoder_tokens"].tolist() == [*source, bpe.eos]
    assert found["tokens"].tolist() == [bpe.bos, *target]
    assert found["targets"].tolist() == [*target, bpe.eos]
    assert (found["weights"] == 1).all() and found["weights"].shape == found["targets"].shape
    counted = dict(zip(ACCOUNT, found["account"]))
    assert counted["tokens"] == len(source) + len(target) + 2 and counted["lost"] == counted["truncated"] == 0
    assert counted["bytes"] == len(RECORD["target"]), "bits a byte are those of the targets"


def test_the_prefix_is_read_with_the_source(bpe):
    found = example(bpe, prefix="turn: ")
    assert found["encoder_tokens"].tolist() == [*bpe.encode("turn: " + RECORD["text"]), bpe.eos]
    assert found["targets"].tolist() == example(bpe)["targets"].tolist()


def test_how_the_decoder_begins(bpe, sentinels, wordpiece):
    assert example(bpe)["tokens"][0] == bpe.bos
    assert example(sentinels)["tokens"][0] == sentinels.pad and example(sentinels)["targets"][-1] == sentinels.eos
    assert example(wordpiece)["tokens"][0] == wordpiece.pad and example(wordpiece)["targets"][-1] == wordpiece.sep


def test_lengths():
    assert SequenceToSequence().lengths(64) == {"tokens": 64, "encoder_tokens": 64}
    assert SequenceToSequence(target_length=16).lengths(64) == {"tokens": 16, "encoder_tokens": 64}


def test_truncate(bpe):
    whole = example(bpe)
    sides = len(whole["encoder_tokens"]), len(whole["targets"])
    found = example(bpe, 5, "truncate", target_length=4)
    assert found["encoder_tokens"].tolist() == whole["encoder_tokens"][:5].tolist()
    assert (
        found["tokens"].tolist() == whole["tokens"][:4].tolist()
        and found["targets"].tolist() == whole["targets"][:4].tolist()
    )
    counted = dict(zip(ACCOUNT, found["account"]))
    assert (counted["tokens"], counted["lost"], counted["truncated"]) == (9, sum(sides) - 9, 1)
    assert counted["bytes"] == pytest.approx(len(RECORD["target"]) * 4 / sides[1])


@pytest.mark.parametrize("long", ["truncate", "drop", "error", "split"])
def test_what_fits_is_kept_whole(bpe, long):
    sides = len(example(bpe)["encoder_tokens"]), len(example(bpe)["targets"])
    found = example(bpe, max(sides), long, target_length=sides[1])
    assert (len(found["encoder_tokens"]), len(found["targets"])) == sides


def test_drop_and_error(bpe):
    sides = len(example(bpe)["encoder_tokens"]), len(example(bpe)["targets"])
    for length, target_length in ((sides[0] - 1, sides[1]), (100, sides[1] - 1)):
        with pytest.raises(Dropped) as dropped:
            example(bpe, length, "drop", target_length=target_length)
        assert dropped.value.tokens == sum(sides) and str(dropped.value) == "1 tokens over the row"
        for long in ("error", "split"):
            with pytest.raises(DataError) as error:
                example(bpe, length, long, target_length=target_length)
            assert str(error.value) == (
                f"document pairs.jsonl:3 has {sides[0]} and {sides[1]} tokens, "
                f"a row holds {length} and {target_length}: "
                "set data.long to truncate or drop, or raise batch.length"
            )


def test_bad_values(endless):
    with pytest.raises(ConfigError, match=r"^task.target_length is -1: it must be at least 0$"):
        SequenceToSequence(target_length=-1)
    with pytest.raises(ConfigError, match=r"^task.label_smoothing is 2: it must lie in \[0, 1\]$"):
        SequenceToSequence(label_smoothing=2)
    with pytest.raises(DataError, match="^the tokenizer has no token that ends a document"):
        example(endless)


def test_pairs_in_rows(tmp_path, bpe):
    """Through the pipeline: packed on both sides, under the names that the config gives the fields; a missing field is
    told.
    """
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"english": f"ban bart {i}", "german": f"den dert {i}"}) + "\n" for i in range(20)),
        encoding="utf-8",
    )
    data = Data(sources=(f"jsonl:{path}",), heldout=0.0, window=32, text="english", target="german", long="error")
    with Loader(open_sources(data), bpe, SequenceToSequence(target_length=32), data, Batch(2, 48), 0) as loader:
        batch = next(loader).batch
    assert batch["encoder_tokens"].shape == (2, 48) and batch["tokens"].shape == batch["targets"].shape == (2, 32)
    assert batch["segment_ids"].max() == batch["encoder_segment_ids"].max() > 1
    assert (batch["weights"] == (batch["segment_ids"] > 0)).all()
    data = Data(sources=(f"jsonl:{path}",), heldout=0.0, window=32, text="english", target="germane")
    with pytest.raises(DataError) as error:
        with Loader(open_sources(data), bpe, SequenceToSequence(), data, Batch(2, 48), 0) as loader:
            next(loader)
    assert str(error.value).endswith(
        "no field 'germane'; did you mean 'german'? It has: english, german, id. Set data.target"
    )
