"""How good the answers of a classifier are: figures from true classes and probabilities, and the two pictures of them.

NumPy on what one process holds. Gathering the answers of a model belongs to `evaluate.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llm_jax.errors import ConfigError, DataError, suggest
from llm_jax.storage import Path, as_path

RISING = ("accuracy", "precision", "recall", "f1", "exact_match", "bleu")
"""metrics of which more is better"""
FALLING = ("loss", "perplexity", "bits_per_byte", "calibration_error", "brier")
"""metrics of which less is better"""


class Scores(NamedTuple):
    """Precision, recall and F1: of each class (C,), or averaged."""

    precision: Any
    recall: Any
    f1: Any


class Bins(NamedTuple):
    """Answers grouped by confidence, that is, by the probability of the class that is answered."""

    edges: Float[np.ndarray, " M+1"]
    answers: Int[np.ndarray, " M"]
    """how many there are in a bin"""
    confidence: Float[np.ndarray, " M"]
    """mean confidence in a bin, NaN in an empty one"""
    accuracy: Float[np.ndarray, " M"]
    """share of right answers in a bin, NaN in an empty one"""


def confusion_matrix(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], classes: int
) -> Int[np.ndarray, "C C"]:
    """How often class i (row) was answered with class j (column).

    Raises:
        DataError: there are no answers, or a class has a number outside [0, C).

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if not len(labels):
        raise DataError("there are no answers to judge")
    for what, numbers in (("label", labels), ("answer", predicted)):
        wrong = numbers[(numbers < 0) | (numbers >= classes)]
        if len(wrong):
            raise DataError(f"{what} {wrong[0]} is not one of the {classes} classes, which are numbered from 0")
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


def accuracy(matrix: Int[np.ndarray, "C C"]) -> float:
    """Share of right answers."""
    return float(np.trace(matrix) / matrix.sum())


def _scores(right: Any, answered: Any, true: Any) -> Scores:
    return Scores(_ratio(right, answered), _ratio(right, true), _ratio(2 * right, answered + true))


def class_scores(matrix: Int[np.ndarray, "C C"]) -> Scores:
    """Of each class: right / answered, right / true, and their harmonic mean; 0 where it is 0 / 0."""
    return _scores(np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1))


def macro_scores(matrix: Int[np.ndarray, "C C"]) -> Scores:
    """The mean over all classes, those that are neither true nor answered included (with 0)."""
    return Scores(*(float(each.mean()) for each in class_scores(matrix)))


def micro_scores(matrix: Int[np.ndarray, "C C"]) -> Scores:
    """The scores of the counts summed over the classes; with one answer an example, each of them is the accuracy."""
    return Scores(*(float(each) for each in _scores(np.trace(matrix), matrix.sum(), matrix.sum())))


def calibration_bins(labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"], bins: int = 15) -> Bins:
    """Answers in M bins of equal width, ((m-1)/M, m/M], by their confidence (Guo et al. 2017, section 2)."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    edges = np.arange(bins + 1) / bins
    # A softmax in float32 may end a little above 1, and a confidence of 0 has no bin of its own.
    of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(of, minlength=bins)
    right = np.bincount(of, weights=probabilities.argmax(axis=1) == labels, minlength=bins)
    total = np.bincount(of, weights=confidence, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Bins(edges, count, total / count, right / count)


def calibration_error(labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"], bins: int = 15) -> float:
    """Expected calibration error: sum_m |B_m| / N |accuracy(B_m) - confidence(B_m)| (Guo et al. 2017, eq. 3).

    >>> calibration_error(np.array([0, 1]), np.array([[0.75, 0.25], [0.75, 0.25]]))
    0.25
    """
    return _calibration_error(calibration_bins(labels, probabilities, bins))


def _calibration_error(found: Bins) -> float:
    return float(np.nansum(found.answers * np.abs(found.accuracy - found.confidence)) / found.answers.sum())


def brier(labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"]) -> float:
    """mean_i sum_c (p_ic - [label_i = c])^2, between 0 and 2 (Brier 1950); of two classes twice the binary score.

    >>> brier(np.array([0, 1]), np.array([[1.0, 0.0], [0.5, 0.5]]))
    0.25
    """
    wanted = np.eye(np.shape(probabilities)[1])[labels]
    return float(np.square(np.asarray(probabilities, np.float64) - wanted).sum(axis=1).mean())


def classification_metrics(
    labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"], names: Sequence[str]
) -> dict[str, float]:
    """All figures by name: accuracy, macro_f1, f1/NAME, calibration_error and so on. The likeliest class is the answer.

    Args:
        names: of the classes, by number.

    Raises:
        DataError: no examples, labels or probabilities of other classes than the names, or not finite.

    >>> found = classification_metrics(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), ("no", "yes"))
    >>> {name: round(found[name], 3) for name in ("accuracy", "macro_f1", "recall/yes")}
    {'accuracy': 0.667, 'macro_f1': 0.667, 'recall/yes': 0.5}
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if probabilities.shape != (len(labels), len(names)):
        raise DataError(
            f"probabilities {probabilities.shape} are not of {len(labels)} examples and {len(names)} classes"
        )
    broken = np.count_nonzero(~np.isfinite(probabilities).all(axis=1))
    if broken:
        raise DataError(f"the probabilities of {broken} of {len(labels)} examples are not finite")
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), len(names))
    macro = macro_scores(matrix)
    found = {
        "accuracy": accuracy(matrix),
        "macro_f1": macro.f1,
        "micro_f1": micro_scores(matrix).f1,
        "macro_precision": macro.precision,
        "macro_recall": macro.recall,
        "calibration_error": calibration_error(labels, probabilities),
        "brier": brier(labels, probabilities),
    }
    for score, values in class_scores(matrix)._asdict().items():
        found |= {f"{score}/{name}": float(value) for name, value in zip(names, values, strict=True)}
    return found


def rising(metric: str) -> bool:
    """Whether more of a metric is better: of accuracy it is, of loss it is not.

    What stands before the name (`eval/`, `macro_`) and the class after it do not matter.

    Raises:
        ConfigError: no metric of that name is known.

    >>> rising("macro_f1"), rising("eval/f1/loss"), rising("eval/loss")
    (True, True, False)
    """
    for part in metric.split("/"):
        for names, up in ((RISING, True), (FALLING, False)):
            if any(part == name or part.endswith(f"_{name}") for name in names):
                return up
    raise ConfigError(f"unknown metric {metric!r}{suggest(metric, (*RISING, *FALLING))}")


def draw_confusion(matrix: Int[np.ndarray, "C C"], names: Sequence[str], path: str | Path) -> Path:
    """A picture of the confusion matrix: counts, shaded by the share of their row; without counts above 30 classes."""
    from matplotlib.figure import Figure

    classes, longest = len(names), max(map(len, names))
    share = _ratio(matrix, np.broadcast_to(matrix.sum(axis=1, keepdims=True), matrix.shape))
    side = float(np.clip(0.7 * classes, 2.5, 9.0))
    size = float(
        np.clip(62 * side / classes / max(3, len(str(matrix.max()))), 5, 10)
    )  # in a cell, of its widest number
    flat = 0.6 * size * longest < 65 * side / classes  # points that the longest name takes, and a cell has
    # Cells of one size, however long the names: what is outside of the figure is drawn too.
    figure = Figure(figsize=(side + 0.35, side))
    axis = figure.add_axes((0, 0, side / (side + 0.35), 1))
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(classes), names, rotation=0 if flat else 90, fontsize=size)
    axis.set_yticks(range(classes), names, fontsize=size)
    axis.set_xlabel("answer")
    axis.set_ylabel("true class")
    if classes <= 30:
        for i, j in np.ndindex(matrix.shape):
            shade = "white" if share[i, j] > 0.5 else "black" if matrix[i, j] else "0.6"
            axis.text(j, i, str(matrix[i, j]), ha="center", va="center", color=shade, fontsize=size)
    axis.tick_params(length=0)
    bar = figure.colorbar(image, cax=figure.add_axes((1 - 0.15 / (side + 0.35), 0.1, 0.15 / (side + 0.35), 0.8)))
    bar.set_label("share of the true class")
    for spine in (*axis.spines.values(), bar.outline):
        spine.set(color="0.6", linewidth=0.8)
    with as_path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    return as_path(path)


def draw_calibration(
    labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"], path: str | Path, bins: int = 15
) -> Path:
    """A reliability diagram: share of right answers by confidence, and how many answers have that confidence."""
    from matplotlib.figure import Figure

    found = calibration_bins(labels, probabilities, bins)
    figure = Figure(figsize=(6, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    middles, filled = (found.edges[:-1] + found.edges[1:]) / 2, found.answers > 0
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    top.bar(middles[filled], found.accuracy[filled], 0.9 / bins, color="0.85")
    top.plot(found.confidence[filled], found.accuracy[filled], color="C0", marker="o", label="measured")
    top.set_title(f"expected calibration error {_calibration_error(found):.3f}", fontsize=10)
    top.set_ylabel("share of right answers")
    top.set_ylim(0, 1.02)
    top.legend(frameon=False)
    bottom.bar(middles, found.answers, 0.9 / bins, color="0.6")
    bottom.set_ylabel("answers")
    bottom.set_xlabel("confidence")
    bottom.set_xlim(0, 1)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    with as_path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return as_path(path)
