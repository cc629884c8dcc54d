"""What holds for every task: the contract, the way to the card and back, and an objective that is the one it says."""

import dataclasses
import functools
import json
import zlib

import jax
import numpy as np
import pytest

from llm_jax import config, tasks, tree
from llm_jax.data.documents import open_sources
from llm_jax.data.pipeline import Loader
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import Classification, MaskedToken, NextToken, SequenceToSequence, SpanCorruption

SIZE = dict(vocab_size=37, max_length=24, layers=1, dim=8, heads=2, mlp_dim=12)
MODELS = {
    NextToken: ModelConfig(**SIZE),
    MaskedToken: ModelConfig(**SIZE, architecture="encoder", head="mlm", positions="learned"),
    SequenceToSequence: ModelConfig(**SIZE, architecture="encoder-decoder", positions="sinusoidal"),
    SpanCorruption: ModelConfig(**SIZE, architecture="encoder-decoder", positions="relative"),
}
CHANGED = [
    NextToken(label_smoothing=0.1, z_loss=1e-4, overlap=3),
    MaskedToken(rate=0.3, mask=0.5, random=0.25),
    SpanCorruption(rate=0.2, span=2.5),
    SequenceToSequence(prefix="translate: ", target_length=7),
    Classification(labels=("a", "b", "c"), pair="second", keep="tail", class_weights=(1.0, 2.0, 0.5)),
]
EVERY = (Classification, *MODELS)
"""`test_classification.py` has what is its own."""
SMOOTHING, Z = 0.2, 0.03


@functools.cache
def params_of(kind):
    """Random weights, large enough that the model is sure of some tokens."""
    return tree.map_with_name(
        lambda name, x: np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape).astype(np.float32),
        transformer.shapes(MODELS[kind]),
    )


def batch_of(kind, seed=0):
    """Rows of two packed examples with padding, weights of 0 and of more than 1 among them."""
    rng, rows, length = np.random.default_rng(seed), 2, 12
    index = np.broadcast_to(np.arange(length), (rows, length))
    segments = np.where(index < 5, 1, np.where(index < 10, 2, 0)).astype(np.int32)
    stream = {"segment_ids": segments, "positions": np.where(index < 5, index, index - 5).astype(np.int32)}
    batch = {**stream, "tokens": rng.integers(0, 37, (rows, length)).astype(np.int32)}
    asked = length
    if kind is MaskedToken:
        asked, batch["predict"] = 3, np.array([[1, 2, 7], [0, 6, 8]], np.int32)
    if MODELS[kind].architecture == "encoder-decoder":
        batch |= {f"encoder_{name}": x for name, x in stream.items()}
        batch["encoder_tokens"] = rng.integers(0, 37, (rows, length)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 2.5], (rows, asked)).astype(np.float32) * (
        1 if kind is MaskedToken else segments > 0
    )
    return {
        **batch,
        "targets": rng.integers(0, 37, (rows, asked)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def run(function, *arguments):
    """The function's value, compiled fast rather than to be fast."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def reference(logits, batch):
    """(nll, uniform, (log Z)^2, correct), each summed with the weights, in float64."""
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    sums = (log_z - target, log_z - logits.mean(-1), log_z**2, logits.argmax(-1) == batch["targets"])
    return [float((batch["weights"] * x).sum()) for x in sums]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_objective(kind):
    """Without a key the cross-entropy; with one, in training, (1 - a) nll + a uniform + z (log Z)^2. The reported nll
    is that of evaluation.
    """
    batch, loss = batch_of(kind), kind(label_smoothing=SMOOTHING, z_loss=Z).loss(MODELS[kind])

    def every(params, batch, key):
        logits = transformer.apply(MODELS[kind], params, batch).logits
        return logits, [loss(params, batch, k, {}).sums() for k in (None, key)]

    logits, found = run(every, params_of(kind), batch, jax.random.key(1))
    nll, uniform, square, correct = reference(logits, batch)
    for one, expected in zip(found, (nll, (1 - SMOOTHING) * nll + SMOOTHING * uniform + Z * square)):
        np.testing.assert_allclose(
            [one.total, one.metrics["nll"], one.weight], [expected, nll, batch["weights"].sum()], rtol=2e-6
        )
        assert one.metrics["correct"] == pytest.approx(correct)
    assert abs(SMOOTHING * (uniform - nll)) > 1e-3 * nll < Z * square, "neither term is lost in the tolerance"


@pytest.mark.parametrize("kind", [NextToken, SpanCorruption], ids=lambda kind: kind.__name__)
def test_dropout_in_training_only(kind):
    plain, dropped = (kind().loss(MODELS[kind].replace(dropout=rate)) for rate in (0.0, 0.4))

    def every(params, batch, keys):
        cases = [
            (plain, None),
            (plain, keys[0]),
            (dropped, None),
            (dropped, keys[0]),
            (dropped, keys[1]),
            (dropped, keys[2]),
        ]
        return [function(params, batch, key, {}).total for function, key in cases]

    keys = [jax.random.key(seed) for seed in (1, 1, 2)]
    without, keyed, evaluated, first, again, other = (
        float(x) for x in run(every, params_of(kind), batch_of(kind), keys)
    )
    assert without == pytest.approx(keyed, rel=1e-6) == pytest.approx(evaluated, rel=1e-6)
    assert (
        first == pytest.approx(again, rel=1e-6)
        and abs(first - other) > 1e-3 * first
        and abs(first - without) > 1e-3 * first
    )


def test_a_token_without_weight_has_no_gradient():
    batch, loss = batch_of(NextToken), NextToken().loss(MODELS[NextToken])
    other = {**batch, "targets": np.where(batch["weights"] > 0, batch["targets"], 0)}
    assert (other["targets"] != batch["targets"]).any()
    gradient = jax.grad(lambda params, batch: loss(params, batch, None, {}).total)
    first, second = run(lambda *batches: [gradient(params_of(NextToken), batch) for batch in batches], batch, other)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("task", [*CHANGED, *(kind() for kind in EVERY)], ids=repr)
def test_to_the_card_and_back(task):
    assert tasks.from_dict(json.loads(json.dumps(config.to_dict(task)))) == task


def test_what_no_card_should_say():
    for plain, message in (
        ({"kind": "NextTokn"}, "unknown task 'NextTokn'; did you mean 'NextToken'?"),
        ({"kind": "NextToken", "rate": 0.1}, "task NextToken has no 'rate'"),
        ({"kind": "NextToken", "z_loss": -1.0}, "task.z_loss is -1.0: it must be at least 0"),
        (
            {"kind": "dataclasses"},
            "unknown task 'dataclasses'; known: Classification, MaskedToken, NextToken, SequenceToSequence, SpanCorruption",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            tasks.from_dict(plain)
        assert str(error.value) == message
    assert tasks.from_dict({"kind": "MaskedToken"}) == MaskedToken(), "what a card does not say has its default"


def test_every_task_is_listed():
    assert set(tasks.__all__) == {kind.__name__ for kind in EVERY}
    assert all(
        dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and kind.__bases__ == (object,)
        for kind in EVERY
    )


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_rows_of_the_pipeline(tmp_path, kind, pack, bpe, wordpiece):
    """What `lengths` promises holds for real rows, and no id is above those that the model is told of."""
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": " ".join(rng.choice(["ban", "gort", "den", "x"], n)), "target": "den fin"})
        for n in rng.integers(2, 60, 30)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = wordpiece if kind is MaskedToken else bpe
    data = config.Data(
        sources=(f"jsonl:{tmp_path}/a.jsonl",),
        heldout=0.0,
        pack=pack,
        window=32,
        long="truncate" if kind is SequenceToSequence else "split",
    )
    task = kind()
    with Loader(open_sources(data), tokenizer, task, data, config.Batch(4, 32), 0) as loader:
        batches = [next(loader).batch for _ in range(5)]
    most = 0
    for batch in batches:
        for stream, length in task.lengths(32).items():
            prefix = stream.removesuffix("tokens")
            assert all(batch[prefix + name].shape == (4, length) for name in ("tokens", "segment_ids", "positions"))
            assert batch[stream].max() < tokenizer.vocab_size + task.extra_tokens(tokenizer)
            most = max(most, batch[prefix + "segment_ids"].max())
        asked = task.predictions(32) if kind is MaskedToken else task.lengths(32)["tokens"]
        assert batch["targets"].shape == batch["weights"].shape == (4, asked)
        assert batch["weights"].sum(axis=1).min() > 0
        if kind is not MaskedToken:
            assert ((batch["segment_ids"] > 0) == (batch["weights"] > 0)).all()
    assert (most > 1) == pack
