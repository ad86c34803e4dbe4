"""Arrays in, numbers and intervals out: the figures of an evaluation, equal to scikit-learn's on the same arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution
FLIPPED_AT_ONCE = 2**21  # signs, of 8 bytes each


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Probabilities `[N, C]` from logits `[N, C]`, in float64 so that rows sum to 1 within 1e-15."""
    z = np.asarray(logits, dtype=np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), dtype=np.float64)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval for a share of `successes` in `n` independent trials; (0, 1) when `n` is 0.

    Unlike the textbook `p +- 1.96 sd` it stays inside [0, 1] and has width at p = 0 and p = 1.
    Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * float(np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)))
    # Rounding puts the exact ends 0 and 1 a few 1e-17 off.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def paired_difference(right_a: ArrayLike, right_b: ArrayLike) -> dict[str, float]:
    """How much more often `a` is right than `b` on the same N pictures, and whether chance explains it.

    Args:
        right_a, right_b: 1 where right and 0 where wrong, `[N]`, or `[S, N]` for S repeated trainings, of which each
            picture's mean counts: what is told is the sampling of pictures, not that of trainings.
    Returns:
        difference; low, high: its 95 % interval, eased so that it has width where nothing differs (Agresti and Min
        2005, "Simple improved confidence intervals for comparing matched proportions"); p: two-sided, by McNemar's
        exact test for one training, else by turning the signs of the pictures' differences at random (seeded);
        a_only, b_only: pictures (or parts of them) that only one gets right; n.
    Raises:
        DataError: shapes that do not fit, or no picture.
    """
    a, b = (np.atleast_2d(np.asarray(right, dtype=np.float64)) for right in (right_a, right_b))
    if a.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise DataError(f"A paired comparison takes the same pictures twice; got shapes {a.shape} and {b.shape}.")
    d, n = a.mean(axis=0) - b.mean(axis=0), a.shape[1]
    total, eased = float(d.sum()), n + 2
    half = Z95 * math.sqrt(float(d @ d) + 1 - total**2 / eased) / eased
    low, high = max(-1.0, total / eased - half), min(1.0, total / eased + half)
    a_only, b_only = float(d[d > 0].sum()), float(abs(d[d < 0].sum()))
    whole = bool(np.isin(d, (-1.0, 0.0, 1.0)).all())
    p = _mcnemar(round(a_only), round(b_only)) if whole else _sign_flips(d)
    return {"difference": total / n, "low": low, "high": high, "p": p, "a_only": a_only, "b_only": b_only, "n": n}


def _mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: how the pictures that one alone gets right would fall by tossing coins."""
    tosses = only_a + only_b
    term = tail = 1  # ways to get k heads from those to get k - 1: each anew would take seconds for 10,000 pictures
    for k in range(1, min(only_a, only_b) + 1):
        term = term * (tosses - k + 1) // k
        tail += term
    return float(min(1.0, 2 * tail / 2**tosses))


def _sign_flips(d: NDArray[np.float64], draws: int = 9999) -> float:
    """Two-sided p: how often turned signs at random lead as far from 0 as the signs that came."""
    moved, rng, as_far = d[d != 0], np.random.default_rng(0), 0
    reached = abs(float(moved.sum())) - 1e-9
    # In blocks: as float64 all draws of 20,000 pictures take 1.6 GB. One random word serves four signs, and blocks of
    # a multiple of four rows draw the same ones as all at once.
    rows = max(4, FLIPPED_AT_ONCE // len(moved) // 4 * 4)
    for start in range(0, draws, rows):
        signs = rng.integers(0, 2, (min(rows, draws - start), len(moved)), dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs @ moved) >= reached).sum())
    return float((as_far + 1) / (draws + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the same order (Holm 1979): below 0.05 by chance in 5 % of families."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def judge_pairs(pairs: Sequence[dict[str, Any]]) -> None:
    """Say of each pair what `paired_difference` found whether it shows a difference beside the others.

    Adds p_adjusted (Holm's) and shown: below 0.05, and 0 lies outside the interval. The two can disagree where few
    pictures differ, and what lies within the interval is no difference.
    """
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_adjusted"], pair["shown"] = p, p < 0.05 and not pair["low"] <= 0 <= pair["high"]


def sample_losses(probs: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Minus the log of the probability given to the true class, `[N]` in nats.

    A probability of 0 counts as float64's epsilon (2.2e-16, a loss of 36), as in scikit-learn, so one hopeless
    picture cannot make a mean infinite.
    """
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    eps = np.finfo(np.float64).eps
    return np.asarray(-np.log(np.clip(p[np.arange(len(y)), y], eps, 1.0)), dtype=np.float64)


def log_loss(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `sample_losses`: the plain cross-entropy in nats."""
    return float(sample_losses(probs, labels).mean())


def topk_accuracy(probs: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Share of rows whose label is among the `k` largest probabilities; of equal ones the lower class number counts.

    With that rule k = 1 is exactly the accuracy of `argmax`, and the figure never falls as k grows.
    """
    p, y = np.asarray(probs), np.asarray(labels)
    best = np.argsort(-p, axis=1, kind="stable")[:, :k]
    return float((best == y[:, None]).any(axis=1).mean())


def confusion_matrix(labels: ArrayLike, preds: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Counts `[C, C]`: row = true class, column = predicted class; the sum is the number of pictures."""
    y, q = np.asarray(labels, dtype=np.int64), np.asarray(preds, dtype=np.int64)
    counts = np.bincount(y * num_classes + q, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """`above / below`, 0 where nothing is below (scikit-learn's `zero_division=0`)."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _checked(
    probs: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    classes = len(class_names)
    if p.ndim != 2 or p.shape[1] != classes or y.shape != p.shape[:1]:
        raise DataError(
            f"Probabilities of shape {list(p.shape)} with labels of shape {list(y.shape)} for {classes} classes; "
            f"expected [N, {classes}] and [N]."
        )
    if len(y) == 0:
        raise DataError("Nothing to evaluate: 0 pictures. Give at least one labelled picture.")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= classes:
        raise DataError(
            f"Labels run from {y.min()} to {y.max()} ({y.dtype}); expected whole numbers 0 to {classes - 1}."
        )
    off = np.flatnonzero(~(np.isfinite(p).all(axis=1) & (np.abs(p.sum(axis=1) - 1) < 1e-3) & (p >= 0).all(axis=1)))
    if len(off):
        raise DataError(
            f"{len(off)} of {len(p)} rows are not probabilities (row {off[0]} sums to {p[off[0]].sum():g}); "
            "expected values from 0 to 1 that sum to 1. Logits become probabilities by `softmax`."
        )
    return p, y.astype(np.int64)


def evaluate_probs(probs: ArrayLike, labels: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    """All figures of one evaluation as plain JSON values.

    Args:
        probs: `[N, C]`, each row from 0 to 1 and summing to 1.
        labels: `[N]` class numbers.
        class_names: C names; a class without a picture in `labels` is allowed.
    Returns:
        n, accuracy, accuracy_ci95 (Wilson), top5 (None when C <= 5), log_loss (nats), balanced_accuracy (mean recall
        of the classes present), weighted_precision, weighted_recall, weighted_f1, majority_baseline (share of the
        largest class in `labels`), per_class (name, n, precision, recall, f1, recall_ci95) and confusion (row = true
        class). A ratio with nothing below the line is 0, as scikit-learn's `zero_division=0`; a class without a
        picture has the recall interval [0, 1].
    Raises:
        DataError: shapes that do not fit, no picture, a label out of range, rows that are not probabilities.
    """
    p, y = _checked(probs, labels, class_names)
    preds, n, classes = p.argmax(axis=1), len(y), len(class_names)
    confusion = confusion_matrix(y, preds, classes)
    hits = confusion.diagonal().astype(np.float64)
    support, predicted = confusion.sum(axis=1).astype(np.float64), confusion.sum(axis=0).astype(np.float64)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    weights = support / n
    return {
        "n": n,
        "accuracy": float(hits.sum() / n),
        "accuracy_ci95": list(wilson_interval(float(hits.sum()), n)),
        "top5": topk_accuracy(p, y, 5) if classes > 5 else None,
        "log_loss": log_loss(p, y),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "weighted_precision": float(weights @ precision),
        "weighted_recall": float(weights @ recall),
        "weighted_f1": float(weights @ f1),
        "majority_baseline": float(support.max() / n),
        "per_class": [
            {
                "name": name,
                "n": int(support[c]),
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "recall_ci95": list(wilson_interval(float(hits[c]), int(support[c]))),
            }
            for c, name in enumerate(class_names)
        ],
        "confusion": confusion.tolist(),
    }
