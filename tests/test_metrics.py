"""The figures of a classifier are those of scikit-learn and of the formulas, and the pictures show them."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from llm_jax import metrics
from llm_jax.errors import ConfigError, DataError


@st.composite
def answers(draw, most_classes=6):
    """(labels, probabilities): all of them classes of C, some never true or never answered, some with ties."""
    classes, count = draw(st.integers(1, most_classes)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    true, answered = (rng.choice(classes, rng.integers(1, classes + 1), replace=False) for _ in range(2))
    scores = np.full((count, classes), -np.inf)
    scores[:, answered] = rng.normal(0, draw(st.sampled_from([0.1, 1, 5])), (count, len(answered)))
    if draw(st.booleans()):
        scores = np.round(scores)  # ties, and confidences on the edges of bins
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return rng.choice(true, count), powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=150, deadline=None)
@given(answers())
def test_scores_are_those_of_scikit_learn(case):
    reference = pytest.importorskip("sklearn.metrics")
    labels, probabilities = case
    every = list(range(probabilities.shape[1]))
    predicted = probabilities.argmax(axis=1)
    names = [f"c{i}" for i in every]
    matrix = metrics.confusion_matrix(labels, predicted, len(every))
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(labels, predicted, labels=every))
    found = metrics.classification_metrics(labels, probabilities, names)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    options = dict(labels=every, zero_division=0)
    theirs = reference.precision_recall_fscore_support(labels, predicted, average=None, **options)[:3]
    for score, values in zip(("precision", "recall", "f1"), theirs):
        np.testing.assert_allclose([found[f"{score}/{name}"] for name in names], values, atol=1e-12)
    np.testing.assert_allclose(
        [found["macro_precision"], found["macro_recall"], found["macro_f1"]],
        reference.precision_recall_fscore_support(labels, predicted, average="macro", **options)[:3],
        atol=1e-12,
    )
    np.testing.assert_allclose(
        metrics.micro_scores(matrix),
        reference.precision_recall_fscore_support(labels, predicted, average="micro", **options)[:3],
        atol=1e-12,
    )
    assert found["micro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="micro", **options))
    assert len(found) == 7 + 3 * len(every) and all(type(value) is float for value in found.values())


@settings(max_examples=60, deadline=None)
@given(answers())
def test_the_brier_score_is_that_of_scikit_learn(case):
    reference = pytest.importorskip("sklearn.metrics")
    labels, probabilities = case
    classes = probabilities.shape[1]
    if classes == 2:
        theirs = 2 * reference.brier_score_loss(labels, probabilities[:, 1], pos_label=1)
        assert metrics.brier(labels, probabilities) == pytest.approx(theirs, abs=1e-12)
    by_hand = sum(sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for label, row in zip(labels, probabilities))
    assert metrics.brier(labels, probabilities) == pytest.approx(by_hand / len(labels), abs=1e-12)


def calibration_error_by_formula(labels, probabilities, bins):
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, row in enumerate(probabilities) if (m - 1) / bins < max(row) <= m / bins]
        if inside:
            right = sum(int(np.argmax(probabilities[i]) == labels[i]) for i in inside) / len(inside)
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(right - confidence)
    return total


@settings(max_examples=150, deadline=None)
@given(answers(), st.sampled_from([1, 10, 15]))
def test_the_calibration_error_is_that_of_the_formula(case, bins):
    labels, probabilities = case
    if probabilities.max() > 1:
        probabilities = np.minimum(probabilities, 1)
    expected = calibration_error_by_formula(labels, probabilities, bins)
    assert metrics.calibration_error(labels, probabilities, bins) == pytest.approx(expected, abs=1e-12)


def test_bins():
    probabilities = np.array([[1.0, 0], [0.6, 0.4], [0.5, 0.5], [0.41, 0.59], [1 + 1e-7, 0]])
    found = metrics.calibration_bins(np.array([0, 0, 1, 0, 1]), probabilities, 10)
    assert found.answers.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 2]  # 0.5 and 0.6 are the upper ends of their bins
    assert found.accuracy[[4, 5, 9]].tolist() == [0, 0.5, 0.5]
    assert found.confidence[[4, 5]] == pytest.approx([0.5, 0.595])
    assert np.isnan(found.accuracy[0]) and np.isnan(found.confidence[0])
    assert metrics.calibration_bins(np.array([0]), np.zeros((1, 1)), 10).answers.tolist() == [1] + [0] * 9


def test_a_perfect_and_a_useless_classifier():
    labels, names = np.array([0, 1, 2, 0]), ["a", "b", "c"]
    perfect = metrics.classification_metrics(labels, np.eye(3)[labels], names)
    assert {name for name, value in perfect.items() if value == 0} == {"calibration_error", "brier"}
    assert all(value == 1 for name, value in perfect.items() if metrics.rising(name))
    useless = metrics.classification_metrics(labels, np.eye(3)[(labels + 1) % 3], names)
    assert all(value == 0 for name, value in useless.items() if metrics.rising(name))
    assert useless["calibration_error"] == 1 and useless["brier"] == 2


def test_float32_gives_the_same():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), 300)
    labels = rng.integers(0, 5, 300)
    names = list("abcde")
    wide, narrow = (
        metrics.classification_metrics(labels.astype(kind), probabilities.astype(dtype), names)
        for kind, dtype in ((np.int64, np.float64), (np.int32, np.float32))
    )
    assert narrow == pytest.approx(wide, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], np.zeros((0, 2)), "there are no answers to judge"),
        ([0, 2], np.full((2, 2), 0.5), "label 2 is not one of the 2 classes, which are numbered from 0"),
        ([0, -1], np.full((2, 2), 0.5), "label -1 is not one of the 2 classes, which are numbered from 0"),
        ([0], np.full((1, 3), 1 / 3), "probabilities (1, 3) are not of 1 examples and 2 classes"),
        ([0, 1], [[0.5, 0.5], [math.nan, 0.5]], "the probabilities of 1 of 2 examples are not finite"),
    ],
)
def test_bad_input(labels, probabilities, message):
    with pytest.raises(DataError) as error:
        metrics.classification_metrics(np.array(labels, int), probabilities, ["a", "b"])
    assert str(error.value) == message


def test_which_way_is_better():
    up = [
        "accuracy",
        "macro_f1",
        "micro_f1",
        "macro_precision",
        "recall/loss",
        "eval/f1/neutral",
        "exact_match",
        "bleu",
    ]
    down = ["loss", "eval/loss", "perplexity", "bits_per_byte", "calibration_error", "brier", "eval/calibration_error"]
    assert all(map(metrics.rising, up)) and not any(map(metrics.rising, down))
    for name, hint in (("acuracy", "did you mean 'accuracy'?"), ("tokens", "known: accuracy, bits_per_byte, ")):
        with pytest.raises(ConfigError) as error:
            metrics.rising(name)
        assert str(error.value).startswith(f"unknown metric {name!r}; {hint}")


def test_pictures(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    matrix = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), 3)
    path = metrics.draw_confusion(matrix, ("low", "middle", "high"), tmp_path / "confusion.png")
    other = metrics.draw_confusion(matrix.T, ("low", "middle", "high"), str(tmp_path / "other.png"))
    assert path == tmp_path / "confusion.png" and (image.imread(path) != image.imread(other)).any()
    metrics.draw_confusion(np.eye(40, dtype=int), [f"a long name {i}" for i in range(40)], tmp_path / "many.png")
    metrics.draw_confusion(np.array([[3]]), ["only"], tmp_path / "one.png")
    drawn = metrics.draw_calibration(labels, probabilities, tmp_path / "calibration.png")
    alone = metrics.draw_calibration(labels[:1], probabilities[:1], tmp_path / "alone.png")
    assert image.imread(drawn).shape == (720, 720, 4) and (image.imread(drawn) != image.imread(alone)).any()
