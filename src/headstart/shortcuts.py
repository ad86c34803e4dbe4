"""Can the class be told without looking at the picture: from its size, format, length, EXIF, border or mean colour?

A small classifier is cross-validated on each of these alone. Colour says something about a flower by nature, so what
is reported must tell one class from the others by a margin, and surely so: the lower end of its 95 % interval counts.
The classifier counts the classes in a grid of 8 x 8 cells for each two columns of a property and adds up the cells'
log-probabilities. It is part of every fit, so it does without scikit-learn, whose import would cost more than all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest

import numpy as np
import numpy.typing as npt

from .findings import EXAMPLES
from .inspection import Look
from .metrics import confusion_matrix, wilson_interval

FOLDS = 5
CELLS = 8  # a side
MOST_PICTURES = 5000  # a share of a larger set answers the question as well
FEWEST_PER_CLASS = 10
_CAMERAS = 5

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shortcut:
    """How well one property alone predicts the class: balanced accuracy out of fold, and what chance reaches.

    told: the class that is told best from all others, found in a share `recall` of its pictures and falsely in a share
    `false_alarms` of the others. strength: how far recall surely lies above false alarms (lower end of the 95 %
    interval), 0 (no better than chance) to 1. suspicious: more than such a property reaches by nature.
    """

    name: str
    accuracy: float
    chance: float
    told: str
    recall: float
    false_alarms: float
    strength: float
    suspicious: bool


@dataclass(frozen=True)
class _Property:
    """What is measured [N, K], the strength from which it is no longer natural, and one picture's value in words."""

    name: str
    measure: Callable[[Sequence[Look]], Floats]
    natural: float
    say: Callable[[Look], str]


def find_shortcuts(looks: Sequence[Look], labels: Ints, class_names: Sequence[str], *, seed: int = 0) -> list[Shortcut]:
    """Every property with what it predicts, strongest first; none without two classes of ten readable pictures.

    Args:
        labels: class ids [N].
    """
    places, ids, names = _judged(looks, labels, class_names, seed)
    if len(names) < 2:
        return []
    chosen = [looks[i] for i in places]
    return sorted((_score(prop, chosen, ids, names, seed) for prop in PROPERTIES), key=lambda one: -one.strength)


def telling_pictures(
    one: Shortcut, looks: Sequence[Look], labels: Ints, class_names: Sequence[str], *, seed: int = 0
) -> tuple[tuple[list[int], list[int]], Callable[[Look], str]]:
    """Pictures that show what a property of `find_shortcuts` tells, and how a picture's value is put in words.

    Places of the pictures that it tells most surely to be of the class `told`, and of those that it tells most surely
    not to be, of each other class in turn.
    """
    prop = next(prop for prop in PROPERTIES if prop.name == one.name)
    places, ids, names = _judged(looks, labels, class_names, seed)
    scores = _out_of_fold(prop.measure([looks[i] for i in places]), ids, len(names), seed)
    told = names.index(one.told)
    margin = scores[:, told] - np.delete(scores, told, axis=1).max(axis=1)

    def surest(label: int) -> list[int]:
        sure = margin if label == told else -margin
        rows = np.flatnonzero((ids == label) & (sure > 0))
        return [int(i) for i in places[rows[np.argsort(-sure[rows], kind="stable")][:EXAMPLES]]]

    others = zip_longest(*(surest(label) for label in range(len(names)) if label != told))
    return (surest(told), [i for row in others for i in row if i is not None][:EXAMPLES]), prop.say


def _judged(looks: Sequence[Look], labels: Ints, class_names: Sequence[str], seed: int) -> tuple[Ints, Ints, list[str]]:
    """Places [n] of the pictures that are judged, their class ids [n], and what these ids are called."""
    good = np.array([i for i, one in enumerate(looks) if one.reason is None], dtype=np.int64)
    if len(good) > MOST_PICTURES:
        good = np.sort(np.random.default_rng(seed).choice(good, MOST_PICTURES, replace=False))
    usable = np.flatnonzero(np.bincount(labels[good], minlength=len(class_names)) >= FEWEST_PER_CLASS)
    good = good[np.isin(labels[good], usable)]
    return good, np.searchsorted(usable, labels[good]), [class_names[int(i)] for i in usable]


def _score(prop: _Property, looks: Sequence[Look], labels: Ints, names: Sequence[str], seed: int) -> Shortcut:
    values = prop.measure(looks)
    chance = 1 / len(names)
    if (values == values[0]).all():
        return Shortcut(prop.name, chance, chance, "", 0.0, 0.0, 0.0, suspicious=False)
    preds = _out_of_fold(values, labels, len(names), seed).argmax(axis=1)
    counts = confusion_matrix(labels, preds, len(names))
    sizes, hits = counts.sum(axis=1), counts.diagonal()
    others, false = len(labels) - sizes, counts.sum(axis=0) - hits
    recall, alarms = hits / sizes, false / others
    # The two shares' own intervals, joined: Newcombe 1998, method 10.
    low = np.array([wilson_interval(int(h), int(n))[0] for h, n in zip(hits, sizes, strict=True)])
    high = np.array([wilson_interval(int(f), int(n))[1] for f, n in zip(false, others, strict=True)])
    strength = (recall - alarms) - np.hypot(recall - low, high - alarms)
    best = int(strength.argmax())
    sure = max(0.0, float(strength[best]))
    return Shortcut(
        prop.name, float(recall.mean()), chance, names[best], float(recall[best]), float(alarms[best]), sure,
        suspicious=sure > prop.natural,
    )  # fmt: skip


def _out_of_fold(values: Floats, labels: Ints, classes: int, seed: int) -> Floats:
    """Log-likelihood [N, C] of each row of values [N, K], from the rows of the other folds; each class counts alike."""
    columns = [_cells(column) for column in values.T]
    fold = _folds(labels, seed)
    scores = np.zeros((len(labels), classes))
    for one, other in list(combinations(columns, 2)) or [(columns[0], columns[0])]:
        cell = one * CELLS + other
        counts = np.bincount((fold * CELLS**2 + cell) * classes + labels, minlength=FOLDS * CELLS**2 * classes)
        counts = counts.reshape(FOLDS, CELLS**2, classes)
        others = counts.sum(axis=0) - counts
        scores += np.log((others + 1) / (others.sum(axis=1, keepdims=True) + CELLS**2))[fold, cell]
    return scores


def _cells(values: Floats) -> Ints:
    """Each value's place [N] on a scale of `CELLS` steps with as many values each, or one for each different value."""
    known = np.unique(values)
    if len(known) > CELLS:
        known = np.append(known[0], np.unique(np.quantile(values, np.arange(1, CELLS) / CELLS)))
    return np.asarray(np.searchsorted(known[1:], values, side="right"), dtype=np.int64)


def _folds(labels: Ints, seed: int) -> Ints:
    """The fold [N] of each picture, drawn so that the classes' pictures are spread evenly."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold


def _sizes(looks: Sequence[Look]) -> Floats:
    sides = np.array([(one.header.width, one.header.height) for one in looks], dtype=np.float64)
    return np.column_stack([sides, sides[:, 0] * sides[:, 1], sides[:, 0] / np.maximum(sides[:, 1], 1)])


def _formats(looks: Sequence[Look]) -> Floats:
    return _one_hot([f"{one.header.format} {one.header.mode}" for one in looks])


def _lengths(looks: Sequence[Look]) -> Floats:
    area = np.array([max(1, one.header.width * one.header.height) for one in looks])
    size = np.array([one.file_bytes for one in looks], dtype=np.float64)
    return np.column_stack([size, size / area])


def _exif(looks: Sequence[Look]) -> Floats:
    cameras = _one_hot([one.header.camera for one in looks])[:, :_CAMERAS]
    orientations = _one_hot([str(one.header.orientation) for one in looks])
    return np.column_stack([[float(one.header.has_exif) for one in looks], orientations, cameras])


def _borders(looks: Sequence[Look]) -> Floats:
    return np.array([(*one.border, one.border_spread) for one in looks])


def _colours(looks: Sequence[Look]) -> Floats:
    """Mean colour, chroma, and of grey the spread, the median and the highlights, which clipping keeps from rising."""
    grey = np.stack([one.thumb for one in looks]).reshape(len(looks), -1)
    levels = np.percentile(grey, (50, 98), axis=1).T
    return np.column_stack([[(*one.mean, one.chroma) for one in looks], grey.std(axis=1), levels])


def _one_hot(words: Sequence[str]) -> Floats:
    """A column for each word, the most frequent first."""
    known, counts = np.unique(words, return_counts=True)
    known = known[np.argsort(-counts, kind="stable")]
    return np.asarray(np.array(words)[:, None] == known[None], dtype=np.float64)


def _exif_words(one: Look) -> str:
    if not one.header.has_exif:
        return "no EXIF"
    return f"{one.header.camera or 'EXIF'}, orientation {one.header.orientation}"


def _length_words(one: Look) -> str:
    return f"{one.file_bytes / 1000:,.0f} kB, {one.file_bytes / (one.header.width * one.header.height):.2f} bytes/px"


def _rgb_words(colour: Sequence[float]) -> str:
    return "RGB " + ",".join(f"{value:.0f}" for value in colour)


# Strengths by nature: no real set measured reaches them (see benchmarks/audit_faults.py).
PROPERTIES = (
    _Property("size in pixels", _sizes, 0.35, lambda one: f"{one.header.width} x {one.header.height}"),
    _Property("format and mode", _formats, 0.15, lambda one: f"{one.header.format} {one.header.mode}"),
    _Property("file length", _lengths, 0.45, _length_words),
    _Property("EXIF", _exif, 0.15, _exif_words),
    _Property("border colour", _borders, 0.45, lambda one: _rgb_words(one.border)),
    _Property(
        "mean colour and contrast", _colours, 0.4, lambda one: f"{_rgb_words(one.mean)}, spread {one.thumb.std():.0f}"
    ),
)
