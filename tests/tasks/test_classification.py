"""Classification: what is kept of long texts, several texts a row, weights of windows and classes, and the judgement."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config, evaluate, sharding
from llm_jax.data.pipeline import Loader
from llm_jax.data.sources import open_source
from llm_jax.errors import ConfigError, DataError
from llm_jax.losses import class_cross_entropy
from llm_jax.model import Model, transform
from llm_jax.models import presets, transformer
from llm_jax.models.heads import Outputs
from llm_jax.step import differentiate
from llm_jax.tasks import Classification
from llm_jax.transforms import chain, new_head

LENGTH = 12
WORDS = ["bado", "gile", "ko", "ru", "pa"]


def examples(task, tokenizer, text="bado gile ko", long="truncate", length=LENGTH, **fields):
    record = {"id": "a", "text": text, "label": 1, **fields}
    return list(task.examples(record, tokenizer, length, long, np.random.default_rng(0)))


def test_a_text_stands_between_cls_and_sep_and_its_class_at_the_first_token(wordpiece):
    (made,) = examples(Classification(), wordpiece)
    assert made["tokens"].tolist() == [wordpiece.cls, *wordpiece.encode("bado gile ko"), wordpiece.sep]
    assert made["targets"][0] == 1 and made["weights"].tolist() == [1.0, *[0.0] * (len(made["tokens"]) - 1)]


def test_a_pair_is_told_apart_by_types(wordpiece):
    (made,) = examples(Classification(pair="answer"), wordpiece, answer="ru pa", length=40)
    first, second = wordpiece.encode("bado gile ko"), wordpiece.encode("ru pa")
    assert made["tokens"].tolist() == [wordpiece.cls, *first, wordpiece.sep, *second, wordpiece.sep]
    assert made["types"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_a_tokenizer_without_a_frame_ends_a_text_with_its_end_token(bpe):
    (made,) = examples(Classification(), bpe, length=64)
    assert made["tokens"].tolist() == [*bpe.encode("bado gile ko"), bpe.eos]


def test_a_template_stands_around_a_text_that_is_cut(wordpiece, bpe):
    for tokenizer, before, after in ((bpe, [], []), (wordpiece, [wordpiece.cls], [wordpiece.sep])):
        asked = tokenizer.templated("ko: {text} gile")
        before, after = [*before, *tokenizer.encode("ko: ")], [*tokenizer.encode(" gile"), *after]
        length = len(before) + 9 + len(after)
        (made,) = examples(Classification(), asked, " ".join(WORDS * 6), length=length)
        assert made["tokens"].tolist() == before + tokenizer.encode(" ".join(WORDS * 6))[:9].tolist() + after
        assert made["targets"].tolist() == [1] + [0] * (length - 1)
        again = tokenizer.templated("{text}pa").templated("ko: {text} gile")
        assert again == asked and type(asked).from_json(asked.to_json()) == asked != tokenizer
        assert asked.begin == tokenizer.begin, "a prompt is not asked about"


def test_a_template_of_pairs(wordpiece):
    asked = wordpiece.templated("{text} ko {pair} ru")
    (made,) = examples(Classification(pair="b"), asked, "bado", b="pa", length=40)
    first, between, second, after = (wordpiece.encode(x).tolist() for x in ("bado", "ko", "pa", "ru"))
    assert made["tokens"].tolist() == [wordpiece.cls, *first, *between, *second, *after, wordpiece.sep]
    assert made["types"].tolist() == [0] * (1 + len(first + between)) + [1] * (len(second + after) + 1)
    with pytest.raises(DataError, match="has no {pair}, and texts come in pairs"):
        examples(Classification(pair="b"), wordpiece.templated("{text} ko"), "bado", b="pa", length=40)


@pytest.mark.parametrize("template", ["", "text", "{text}{text}", "{pair}{text}", "{pair}"])
def test_a_template_names_the_places_of_its_texts(wordpiece, template):
    with pytest.raises(DataError, match="must have {text} once"):
        wordpiece.templated(template)


@pytest.mark.parametrize(
    "keep, kept",
    [
        ("head", lambda ids, room: ids[:room]),
        ("tail", lambda ids, room: ids[-room:]),
        ("head_tail", lambda ids, room: np.concatenate([ids[: room // 4], ids[-(room - room // 4) :]])),
    ],
)
def test_what_is_kept_of_a_long_text(wordpiece, keep, kept):
    text = " ".join(WORDS * 6)
    ids = wordpiece.encode(text)
    (made,) = examples(Classification(keep=keep), wordpiece, text)
    assert made["tokens"][1:-1].tolist() == kept(ids, LENGTH - 2).tolist()
    read = dict(zip(("read", "dropped", "truncated", "tokens", "lost", "bytes"), made["account"]))
    assert (read["truncated"], read["tokens"], read["lost"]) == (1, LENGTH - 2, len(ids) - LENGTH + 2)


@pytest.mark.parametrize("overlap", [0, 3])
def test_windows_cover_a_long_text_and_weigh_as_one(wordpiece, overlap):
    text = " ".join(WORDS * 6)
    ids, room = wordpiece.encode(text).tolist(), LENGTH - 2
    made = examples(Classification(overlap=overlap), wordpiece, text, "split")
    read = [m["tokens"][1:-1].tolist() for m in made]
    assert read[0] == ids[:room] and sum((part[overlap:] for part in read[1:]), read[0]) == ids
    assert sum(m["weights"].sum() for m in made) == pytest.approx(1)
    assert sum(m["account"] for m in made)[4] == 0, "nothing is lost"


def test_both_texts_of_a_long_pair_are_cut(wordpiece):
    long = " ".join(WORDS * 6)
    (made,) = examples(Classification(pair="b"), wordpiece, long, b=long)
    assert len(made["tokens"]) == LENGTH and 3 <= made["types"].sum() <= 6


@pytest.mark.parametrize("value, number", [(0, 0), ("1", 1), ("positive", 1), (1.0, 1)])
def test_a_class_by_number_or_name(value, number):
    assert Classification().number({"id": "a", "label": value}) == number


@pytest.mark.parametrize("value", [2, -1, "good", 0.5, None, "0.5"])
def test_a_label_out_of_range_is_told(value):
    with pytest.raises(
        DataError, match=r"a: label is .*: it must be a number from 0 to 1 or one of negative, positive"
    ):
        Classification().number({"id": "a", "label": value})


def test_what_a_config_may_not_say():
    for fields, said in (
        (dict(labels=("a",)), "at least two"),
        (dict(labels=("a", "a")), "all different"),
        (dict(keep="middle"), "unknown task.keep 'middle'"),
        (dict(template="good?"), "task.template is 'good.': it must have {text} once, and {pair} with task.pair alone"),
        (dict(template="{text} {pair}"), "and {pair} with task.pair alone"),
        (dict(template="{text}", pair="b"), "it must have {text} once, then {pair} once"),
        (dict(class_weights=(1.0,)), "has 1 values for 2"),
        (dict(class_weights=(1.0, 0.0)), "each must be above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Classification(**fields)


def test_a_row_too_short_for_any_text(wordpiece):
    with pytest.raises(DataError, match="no room for a text"):
        examples(Classification(), wordpiece, length=2)


SIZES = presets.bert(
    vocab_size=256, max_length=48, layers=2, dim=32, heads=4, mlp_dim=64, head="classification", labels=3, dropout=0.0
)
THREE = Classification(labels=("a", "b", "c"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("classes") / "corpus.jsonl"
    lines = [
        json.dumps({"id": f"text {i}", "text": " ".join(rng.choice(WORDS, n)), "label": int(rng.integers(3))})
        for i, n in enumerate(rng.integers(1, 30, 41))
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"jsonl:{path}"


def judged(corpus, tokenizer, task, params, sizes=SIZES, **data):
    settings = config.Data(**{"sources": (corpus,), "heldout_sources": (corpus,), "long": "truncate", **data})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = config.Batch(size=4, length=48)
    with Loader([open_source(corpus, settings)], tokenizer, task, settings, batch, 0, "heldout") as loader:
        step = evaluate.make_eval_step(task.loss(sizes), task)
        return evaluate.judge(step, params, [loader], mesh, task=task)


@pytest.fixture(scope="module")
def params():
    made = transformer.init(SIZES, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), made)


def test_packed_texts_are_judged_as_those_alone_in_their_rows(corpus, wordpiece, params):
    packed, one = (judged(corpus, wordpiece, THREE, params, pack=pack) for pack in (True, False))
    assert len(packed[1].examples) == len(one[1].examples) == 41
    for a, b in zip(packed[1].examples, one[1].examples, strict=True):
        assert (a["document"], a["label"]) == (b["document"], b["label"])
        np.testing.assert_allclose(list(a["probabilities"].values()), list(b["probabilities"].values()), atol=2e-6)
    assert packed[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert {"accuracy", "macro_f1", "micro_f1", "calibration_error", "f1/a"} <= set(packed[0])


def test_the_probabilities_of_windows_are_averaged(corpus, wordpiece, params):
    """Against the model run on each window by hand."""
    task = Classification(labels=("a", "b", "c"), overlap=2)
    settings = dict(sources=(corpus,), heldout_sources=(corpus,), long="split")
    source = open_source(corpus, config.Data(**settings))
    found = judged(corpus, wordpiece, task, params, long="split")[1]
    assert len(found.examples) == 41
    for example in found.examples[:3]:
        record = source[example["document"]]
        windows = [
            m["tokens"]
            for m in task.examples({**record, "text": record["text"]}, wordpiece, 48, "split", np.random.default_rng())
        ]
        each = [jax.nn.softmax(transformer.apply(SIZES, params, {"tokens": w[None]}).logits[0]) for w in windows]
        np.testing.assert_allclose(list(example["probabilities"].values()), np.mean(each, axis=0), atol=2e-6)


def test_class_weights_count_in_training_alone(params):
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(5, 99, (4, 8)).astype(np.int32),
        "predict": np.zeros((4, 1), np.int32),
        "targets": np.array([[0], [1], [2], [1]], np.int32),
        "weights": np.ones((4, 1), np.float32),
    }
    weighed = Classification(labels=("a", "b", "c"), class_weights=(1.0, 2.0, 4.0))
    plain, other = (task.loss(SIZES)(params, batch, None, {}) for task in (THREE, weighed))
    assert plain.total == other.total and plain.weight == 4
    each = [
        float(THREE.loss(SIZES)(params, {k: v[i : i + 1] for k, v in batch.items()}, None, {}).total) for i in range(4)
    ]
    trained = weighed.loss(SIZES)(params, batch, jax.random.key(0), {})
    assert trained.weight == 1 + 2 + 4 + 2
    assert trained.total == pytest.approx(each[0] + 2 * each[1] + 4 * each[2] + 2 * each[3], rel=1e-5)


def test_the_objective_with_smoothing():
    """(1 - a) nll + a uniform, against NumPy in float64; smoothing in training alone."""
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 3, 4)), rng.integers(0, 4, (2, 3))
    weights = np.array([[1, 0.5, 0], [2, 0, 0]])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    outputs = Outputs(jnp.zeros((2, 3, 1)), jnp.asarray(logits, jnp.float32))
    found = class_cross_entropy(outputs, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), label_smoothing=0.1)
    assert found.total == pytest.approx((weights * (0.9 * nll - 0.1 * log_p.mean(-1))).sum(), rel=1e-5)
    assert found.metrics["nll"] == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert found.metrics["correct"] == pytest.approx((weights * (logits.argmax(-1) == targets)).sum())
    assert found.weight == 3.5


def test_a_decoder_reads_each_packed_text_at_its_last_token():
    sizes = presets.llama(
        vocab_size=99, max_length=32, layers=1, dim=16, heads=2, mlp_dim=32, head="classification", labels=3
    )
    weights = transformer.init(sizes, jax.random.key(1))
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 99, 5), rng.integers(1, 99, 7)
    row = np.concatenate([a, b, np.zeros(4)]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 0], [5, 7, 4])[None].astype(np.int32)
    positions = np.concatenate([np.arange(5), np.arange(7), np.zeros(4)])[None].astype(np.int32)
    batch = {"tokens": row, "segment_ids": segments, "positions": positions, "predict": np.array([[0, 5]], np.int32)}
    both = transformer.apply(sizes, weights, batch).logits[0]
    for found, alone in zip(both, (a, b)):
        expected = transformer.apply(sizes, weights, {"tokens": alone[None].astype(np.int32)}).logits[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "classification_bias" not in weights["head"]


def test_a_model_without_the_head_is_told_how_to_get_one():
    with pytest.raises(
        ConfigError, match=r"the model has head 'mlm', the task 3 labels: put new_head\('classification', labels=3\)"
    ):
        THREE.loss(presets.bert(head="mlm"))
    with pytest.raises(ConfigError, match="the model has 2 classes, the task 3 labels"):
        THREE.loss(presets.bert(head="classification"))


def test_the_pooler_and_the_head_get_gradients(params):
    batch = {
        "tokens": np.arange(8, dtype=np.int32)[None],
        "predict": np.zeros((1, 2), np.int32),
        "targets": np.array([[2, 0]], np.int32),
        "weights": np.array([[1, 0]], np.float32),
    }
    _, gradient = differentiate(THREE.loss(SIZES))(params, batch, None, {})
    assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(gradient["head"]))


def test_new_head_keeps_all_but_the_head():
    began = presets.bert(vocab_size=99, max_length=16, layers=1, dim=16, heads=2, mlp_dim=32, head="mlm")
    weights = transformer.init(began, jax.random.key(0))
    change = new_head("classification", labels=5)
    sizes = change.config(began)
    made = jax.jit(change.params, static_argnums=0)(began, weights, jax.random.key(1), None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), transformer.shapes(sizes)
    )
    for part in ("embed", "encoder"):
        jax.tree.map(np.testing.assert_array_equal, made[part], weights[part])
    np.testing.assert_array_equal(made["head"]["pooler"], weights["head"]["pooler"])
    assert "dense" not in made["head"] and made["head"]["classification"].shape == (16, 5)
    none = new_head("none", pooler="none")
    assert "head" not in none.params(began, weights, jax.random.key(1), None)
    assert change.label == "new_head('classification', labels=5)"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_words_scores_as_the_language_model_does(tied, bpe):
    began = presets.llama(
        vocab_size=bpe.vocab_size,
        max_length=16,
        layers=1,
        dim=16,
        heads=2,
        kv_heads=1,
        mlp_dim=32,
        tie_embeddings=tied,
        head="lm",
    )
    weights = transformer.init(began, jax.random.key(0))
    change = chain(new_head("classification", words=(" ko", " gile")))
    (one, two), begin = ([*bpe.encode(word)] for word in (" ko", " gile")), Model(began, weights, bpe, {})
    assert change.label == "new_head('classification', words=(' ko', ' gile'))" and len(one) != len(two)
    changed = transform(begin, change, jax.random.key(1))
    sizes, made = changed.config, changed.params
    rows = {"tokens": jnp.arange(12, dtype=jnp.int32).reshape(2, 6), "segments": jnp.ones((2, 6), jnp.int32)}
    said = transformer.apply(began, weights, rows).logits[:, -1]
    expected = jnp.stack([said[:, ids].mean(axis=1) for ids in map(np.array, (one, two))], axis=1)
    assert sizes.labels == 2
    np.testing.assert_allclose(transformer.apply(sizes, made, rows).logits, expected, rtol=1e-5, atol=1e-6)


def test_words_of_no_use_are_refused(bpe):
    for arguments in (("lm", 0), ("classification", 3)):
        with pytest.raises(ConfigError, match="give one for each class of a classification head"):
            new_head(*arguments, words=("bad", "good"))
    with pytest.raises(ConfigError, match="one of them has no token"):
        new_head("classification", words=("bad", "")).spelled(bpe)
    change = new_head("classification", words=("bad", "good"))
    encoder = presets.bert(vocab_size=99, max_length=16, layers=1, dim=16, heads=2, mlp_dim=32, head="mlm")
    with pytest.raises(
        ConfigError,
        match="words are those of a decoder with head 'lm' and no pooler; this is encoder with head 'mlm'",
    ):
        change.config(encoder)
    decoder = presets.llama(vocab_size=99, max_length=16, layers=1, dim=16, heads=2, mlp_dim=32)
    with pytest.raises(ConfigError, match="names pieces of text, and the model has no tokenizer"):
        transform(Model(decoder, {}), change, jax.random.key(0))
