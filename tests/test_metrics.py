"""The figures of an evaluation: equal to scikit-learn's, and defined where classes or predictions are absent."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as reference

from headstart.errors import DataError
from headstart.metrics import (
    confusion_matrix,
    evaluate_probs,
    log_loss,
    sample_losses,
    softmax,
    topk_accuracy,
    wilson_interval,
)


def made(n: int, classes: int, seed: int = 0, absent: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that favour the true class a little; labels without the `absent` classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c not in absent], size=n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.2
    return softmax(logits), labels


def names(classes: int) -> tuple[str, ...]:
    return tuple(f"class {c}" for c in range(classes))


@pytest.mark.parametrize(
    ("n", "classes", "absent"), [(200, 2, ()), (301, 5, ()), (400, 7, (2, 6)), (500, 120, (0, 5)), (1, 3, ())]
)
def test_equal_to_scikit_learn(n: int, classes: int, absent: tuple[int, ...]) -> None:
    probs, labels = made(n, classes, absent=absent)
    result, preds, every = evaluate_probs(probs, labels, names(classes)), probs.argmax(1), list(range(classes))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, preds, labels=every, zero_division=0
    )
    weighted = reference.precision_recall_fscore_support(
        labels, preds, labels=every, average="weighted", zero_division=0
    )
    present = np.unique(labels)
    expected = {
        "accuracy": reference.accuracy_score(labels, preds),
        "log_loss": reference.log_loss(labels, probs, labels=every),
        "balanced_accuracy": reference.recall_score(labels, preds, labels=present, average="macro", zero_division=0),
        "weighted_precision": weighted[0],
        "weighted_recall": weighted[1],
        "weighted_f1": weighted[2],
        "majority_baseline": np.bincount(labels).max() / n,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    for c, row in enumerate(result["per_class"]):
        assert (row["name"], row["n"]) == (names(classes)[c], support[c])
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision[c], recall[c], f1[c]])
    assert result["confusion"] == reference.confusion_matrix(labels, preds, labels=every).tolist()
    assert np.sum(result["confusion"]) == result["n"] == n
    if classes > 5:
        assert result["top5"] == pytest.approx(reference.top_k_accuracy_score(labels, probs, k=5, labels=every))
    else:
        assert result["top5"] is None
    json.dumps(result, allow_nan=False)


def test_balanced_accuracy_equal_to_scikit_learn_with_all_classes_predicted() -> None:
    probs, labels = made(300, 4)
    result = evaluate_probs(probs, labels, names(4))
    assert result["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, probs.argmax(1)))


def test_absent_class_and_never_predicted_class() -> None:
    probs = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05]])
    result = evaluate_probs(probs, np.array([0, 1, 0]), ("a", "b", "c"))
    never_predicted, absent = result["per_class"][1:]
    assert (never_predicted["precision"], never_predicted["recall"], never_predicted["f1"]) == (0.0, 0.0, 0.0)
    assert (absent["n"], absent["recall"], absent["recall_ci95"]) == (0, 0.0, [0.0, 1.0])
    assert result["balanced_accuracy"] == 0.5  # (1 + 0) / 2: the absent class does not count
    assert result["confusion"] == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_wilson_interval_against_known_values() -> None:
    # Brown, Cai, DasGupta 2001 / statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson").
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = [low <= 0.9 <= high for low, high in (wilson_interval(k, 80) for k in rng.binomial(80, 0.9, 4000))]
    assert 0.93 < np.mean(inside) < 0.98


def test_log_loss_with_a_probability_of_zero_is_finite() -> None:
    probs = np.array([[1.0, 0.0], [0.5, 0.5]])
    losses = sample_losses(probs, np.array([1, 0]))
    assert losses == pytest.approx([36.0437, 0.6931], abs=1e-4)
    assert log_loss(probs, np.array([1, 0])) == pytest.approx(reference.log_loss([1, 0], probs))


def test_float32_probabilities_are_good_enough() -> None:
    probs, labels = made(50, 7)
    assert evaluate_probs(probs.astype(np.float32), labels, names(7))["log_loss"] == pytest.approx(
        log_loss(probs, labels), abs=1e-6
    )


def test_softmax_of_extreme_logits() -> None:
    probs = softmax(np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=np.float32))
    assert probs.tolist() == pytest.approx(np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    assert probs.sum(axis=1) == pytest.approx(1, abs=1e-15)


def test_topk_breaks_ties_as_argmax_and_never_falls() -> None:
    probs, labels = np.full((6, 6), 1 / 6), np.arange(6)
    assert [topk_accuracy(probs[:1], [label], 1) for label in range(6)] == [1, 0, 0, 0, 0, 0]
    rising = [topk_accuracy(probs, labels, k) for k in range(1, 7)]
    assert rising == pytest.approx([k / 6 for k in range(1, 7)])


def test_confusion_rows_are_true_classes() -> None:
    assert confusion_matrix([0, 0, 1], [1, 1, 1], 3).tolist() == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=int), "0 pictures"),
        (np.full((3, 3), 1 / 3), np.zeros(3, dtype=int), r"\[N, 2\]"),
        (np.full((3, 2), 0.5), np.zeros(2, dtype=int), r"shape \[2\]"),
        (np.full((2, 2), 0.5), np.array([0, 2]), "0 to 1"),
        (np.full((2, 2), 0.5), np.array([0, -1]), "-1"),
        (np.full((2, 2), 0.5), np.array([0.0, 1.0]), "whole numbers"),
        (np.array([[0.5, 0.5], [3.0, -2.0]]), np.array([0, 1]), "row 1"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), np.array([0, 1]), "1 of 2 rows"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(probs: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_probs(probs, labels, ("a", "b"))


def test_metrics_and_run_import_without_torch() -> None:
    code = "import sys, headstart.metrics, headstart.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
