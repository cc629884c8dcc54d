"""What evaluation leaves as it was, leaves out, and refuses; the figures themselves are held against NumPy in test_model.py."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import evaluate, sharding
from llm_jax.config import Batch, Data, Run, to_dict
from llm_jax.data.documents import open_sources
from llm_jax.data.pipeline import Loader
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import CheckpointError, UserError
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import MaskedToken, NextToken

SIZES = dict(vocab_size=512, max_length=64, layers=1, dim=16, heads=2)
BATCH = Batch(size=8, length=64)


def weights(config: ModelConfig):
    """Normal numbers, without compiling an initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), transformer.shapes(config))


@pytest.fixture(scope="module")
def data(corpus: Path) -> Data:
    return Data(sources=(f"text:{corpus}/*.txt",), heldout=0.3)


@pytest.fixture(scope="module")
def decoder():
    """Sizes, weights and the evaluation step of a decoder."""
    config = ModelConfig(**SIZES)
    return config, weights(config), evaluate.make_eval_step(NextToken().loss(config))


def test_the_first_batches_add_up_and_the_loader_is_where_it_was(decoder, data, tokenizer):
    _, params, step = decoder
    mesh = sharding.make_mesh()
    with Loader(open_sources(data), tokenizer, NextToken(), data, BATCH, 0, "heldout") as loader, jax.set_mesh(mesh):
        begin = loader.get_state()
        batches = list(loader)
        assert len(batches) > 2
        loader.set_state(begin)
        first, second = (evaluate.judge(step, params, [loader], mesh, batches=n)[0] for n in (1, 2))
        again = evaluate.judge(step, params, [loader], mesh, batches=1)[0]
        whole = evaluate.judge(step, params, [loader], mesh)[0]
        assert next(loader).digest == batches[0].digest
    alone = [step(params, sharding.put(rows.batch, mesh), {})[0] for rows in batches]
    totals, weights = np.array([[float(x["total"]), float(x["weight"])] for x in alone]).T
    assert first == again
    assert first["loss"] == pytest.approx(totals[0] / weights[0], rel=1e-6)
    assert second["loss"] == pytest.approx(totals[:2].sum() / weights[:2].sum(), rel=1e-6)
    assert whole["loss"] == pytest.approx(totals.sum() / weights.sum(), rel=1e-6) and whole["tokens"] == weights.sum()
    assert 0 <= whole["accuracy"] <= 1 and whole["bits_per_byte"] > 1


def test_no_bits_a_byte_where_not_every_token_is_predicted(data, corpus):
    """Masked-token prediction judges one token in seven: its sum says nothing of the whole text."""
    tokenizer = load_tokenizer("wordpiece:400", [path.read_text() for path in sorted(corpus.glob("*.txt"))[:8]])
    config = presets.bert(**SIZES, head="mlm", pooler="none")
    mesh, task = sharding.make_mesh(), MaskedToken()
    with Loader(open_sources(data), tokenizer, task, data, BATCH, 0, "heldout") as loader, jax.set_mesh(mesh):
        step = evaluate.make_eval_step(task.loss(config))
        found, _ = evaluate.judge(step, weights(config), [loader], mesh, batches=1)
    assert set(found) == {"loss", "perplexity", "tokens", "accuracy"}


def test_perplexity_is_that_of_the_text(decoder, data, tokenizer):
    """Terms that a transform adds to the loss are no part of it."""
    _, params, _ = decoder
    mesh, config = sharding.make_mesh(), ModelConfig(**SIZES)
    plain = NextToken().loss(config)

    def with_term(params, batch, key, reference):
        found = plain(params, batch, key, reference)
        return found._replace(total=found.total + 2.0 * found.weight)

    with Loader(open_sources(data), tokenizer, NextToken(), data, BATCH, 0, "heldout") as loader, jax.set_mesh(mesh):
        found, _ = evaluate.judge(evaluate.make_eval_step(with_term), params, [loader], mesh, batches=1)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"] - 2), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [presets.bert(**SIZES, head="mlm"), presets.vaswani(**SIZES), ModelConfig(**SIZES, head="classification")],
    ids=["encoder", "encoder-decoder", "classifier"],
)
def test_only_a_decoder_of_text_scores(config, tokenizer):
    with pytest.raises(UserError, match="gives a text no probability: it needs a decoder with head 'lm'"):
        evaluate.score(config, {}, tokenizer, "a text")


def test_an_empty_text_has_the_probability_of_its_end(decoder, tokenizer):
    config, params, _ = decoder
    ((token, p),) = evaluate.score(config, params, tokenizer, "")
    logits = llm_jax.apply(llm_jax.Model(config, params), {"tokens": np.array([[tokenizer.bos]])}).logits[0, 0]
    assert token == "<|endoftext|>" and p == pytest.approx(float(jax.nn.log_softmax(logits)[tokenizer.eos]), rel=1e-5)


def kept(folder: Path, decoder, tokenizer, **card) -> str:
    config, params, _ = decoder
    llm_jax.save(llm_jax.Model(config, params, tokenizer, card), folder)
    return str(folder)


def test_checkpoints_that_cannot_be_evaluated(decoder, data, tokenizer, tmp_path):
    run = to_dict(Run(model=decoder[0], task=NextToken(), data=data, batch=BATCH))
    with pytest.raises(CheckpointError, match="the card of .*/a names no run, so its task is not known"):
        evaluate.evaluate_checkpoint(kept(tmp_path / "a", decoder, tokenizer))
    with pytest.raises(CheckpointError, match="checkpoint .*/b has no tokenizer"):
        evaluate.evaluate_checkpoint(kept(tmp_path / "b", decoder, None, config=run))
    with pytest.raises(CheckpointError, match="the card of .*/c describes no run of this version .*'colour'"):
        evaluate.evaluate_checkpoint(
            kept(tmp_path / "c", decoder, tokenizer, config={**run, "data": {**run["data"], "colour": 1}})
        )
    whole = kept(tmp_path / "d", decoder, tokenizer, config={**run, "data": {**run["data"], "heldout": 0.0}})
    with pytest.raises(UserError, match="no document is held out: set data.heldout above 0, or data.heldout_sources"):
        evaluate.evaluate_checkpoint(whole)
    learned = dataclasses.replace(decoder[0], positions="learned")
    wide = (learned, weights(learned), None)
    with pytest.raises(UserError, match="rows of 128 tokens are longer than the model's table of positions, 64"):
        evaluate.evaluate_checkpoint(kept(tmp_path / "e", wide, tokenizer, config=run), length=128)
