"""Labels that do not fit the picture, and pictures unlike all others, from a frozen backbone's features.

Every picture is judged by models trained without it and without its copies; confident learning then says how much each
label is to be trusted. Where these models hardly do better than guessing, their errors hardly tell of single wrong
labels, and none is flagged. References: Northcutt et al. 2021 (confident learning, by the cleanlab package),
Cohen 1960 (kappa).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .audit_files import split_word
from .dataset import ImageTable
from .errors import SetupError
from .findings import DoubtfulLabel, Finding

Floats = npt.NDArray[np.floating]  # in double precision, or single where there are many: see `auditing.for_labels`
Ints = npt.NDArray[np.int64]

FOLDS = 5
STRENGTH = 3e-3  # of scikit-learn's C on standardised features; more fits the wrong labels, too
# Cohen's kappa of out-of-fold predictions and labels, below which no label is called wrong. Measured: 0.29 - 0.42 where
# classes are hard (emotions3), 0.48 - 0.62 where they are easy and a fifth of the labels is flipped (docs/audit.md).
KNOWING = 0.45
SURE = 0.9  # out-of-fold probability from which a flagged label's suggestion is followed unseen
LISTED = 4.0  # most entries of the queue, as a multiple of the flagged ones; at least LEAST
LEAST = 50
MOST_TURNED = 2000
NEIGHBOURS = 5
ODD = 6.0  # robust deviations of the distance to the neighbours from which a picture is an outlier


def judgeable(table: ImageTable) -> tuple[Ints, ImageTable, str | None]:
    """The pictures whose labels can be judged: places in the table, a table of them, and in bare words why not all.

    Each class needs a picture, or group of copies, for every fold. A thinner class would be held for doubtful as a
    whole, and lower what counts as sure of the others; it is left out, of the class map too.
    """
    groups = table.groups or ("",) * len(table)
    units = [
        len({groups[i] or str(i) for i in np.flatnonzero(table.labels == label)})
        for label in range(len(table.class_names))
    ]
    kept = np.flatnonzero(np.array(units) >= FOLDS)
    thin = [f"class {name} has {n}" for name, n in zip(table.class_names, units, strict=True) if n < FOLDS]
    why = f"{', '.join(thin)}, fewer than {FOLDS} pictures that are no copies of each other" if thin else None
    if len(kept) < 2:
        kept = kept[:0]
    rows = np.flatnonzero(np.isin(table.labels, kept))
    part = table.select(rows.tolist())
    names = tuple(table.class_names[i] for i in kept)
    return rows, replace(part, labels=np.searchsorted(kept, part.labels), class_names=names), why


def folds_of(labels: Ints, groups: Sequence[str] = (), *, seed: int = 0) -> list[tuple[Ints, Ints]]:
    """Places (train, held out) of each fold: every picture is held out once, groups and classes are kept together.

    Args:
        groups: per picture, '' for one by itself; () for none.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    together = np.unique(
        [group or str(i) for i, group in enumerate(groups or ("",) * len(labels))], return_inverse=True
    )[1]
    folds, most = min(FOLDS, int(together.max()) + 1), int(np.bincount(labels).max())
    splitter: Any = GroupKFold(folds)  # where no class has two pictures there is nothing to keep together
    if most > 1:
        splitter = StratifiedGroupKFold(min(folds, most), shuffle=True, random_state=seed % 2**32)
    return list(splitter.split(labels, labels, together))


def out_of_fold(features: Floats, labels: Ints, groups: Sequence[str] = (), *, seed: int = 0) -> Floats:
    """Class probabilities [N, C] of each picture by logistic regressions that saw neither it nor its group.

    Args:
        features: [N, D]. labels: ids 0 .. C - 1 [N], each at least twice.
        groups: per picture, '' for one by itself; () for none.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    scaled = _in_their_own_space(StandardScaler(copy=False).fit_transform(unit))
    probs = np.zeros((len(labels), int(labels.max()) + 1))
    for train, held in folds_of(labels, groups, seed=seed):
        model = LogisticRegression(C=STRENGTH, max_iter=500).fit(scaled[train], labels[train])
        probs[np.ix_(held, model.classes_)] = model.predict_proba(scaled[held])
    return probs


def _in_their_own_space(rows: Floats) -> Floats:
    """The rows [N, D] in the N dimensions that they span, where those are far fewer: same products, so the same fit.

    A regression with a ridge penalty sees nothing else of its inputs. Beyond MOST_TURNED rows turning would cost more.
    """
    n, width = rows.shape
    if 2 * n > width or n > MOST_TURNED:
        return rows
    size, axes = np.linalg.eigh(rows @ rows.T)
    spanned = size > n * np.finfo(size.dtype).eps * size[-1]
    spanned[-1] = True
    turned: Floats = axes[:, spanned] * np.sqrt(size[spanned])
    return turned


def agreement(labels: Ints, probs: Floats) -> tuple[float, float]:
    """How well out-of-fold predictions agree with the labels [N]: the accuracy, and Cohen's kappa.

    Kappa is 0 for guesses with the same shares of the classes (such as the largest one every time), 1 for no error.

    Args:
        probs: out-of-fold probabilities [N, C].
    """
    preds, classes = probs.argmax(axis=1), probs.shape[1]
    accuracy = float((preds == labels).mean())
    shares = (np.bincount(one, minlength=classes) / len(labels) for one in (labels, preds))
    chance = float(np.dot(*shares))
    return accuracy, (accuracy - chance) / (1 - chance) if chance < 1 else 0.0


def doubtful_labels(table: ImageTable, probs: Floats) -> tuple[DoubtfulLabel, ...]:
    """The queue, most doubtful first: what confident learning flags, and what comes next behind it.

    None is flagged where kappa lies below KNOWING: there confident learning flags a third of the right labels.

    Args:
        probs: out-of-fold probabilities [N, C].
    Raises:
        SetupError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise SetupError(
            "Doubtful labels are found with cleanlab, which is not installed: pip install 'headstart[audit]'. "
            "Or leave them out with --fast."
        ) from None
    labels = table.labels
    quality = get_label_quality_scores(labels, probs, method="normalized_margin")
    flagged = np.zeros(len(labels), dtype=bool)
    if agreement(labels, probs)[1] >= KNOWING:
        flagged = find_label_issues(labels, probs, filter_by="both", n_jobs=1) & (probs.argmax(axis=1) != labels)
    order = np.argsort(quality, kind="stable")
    order = order[probs[order].argmax(axis=1) != labels[order]]
    order = order[: max(LEAST, int(LISTED * flagged.sum()))]
    return tuple(
        DoubtfulLabel(
            file=table.relative_paths[i],
            split=split_word(table.split_names[i]),
            label=table.class_names[labels[i]],
            suggested=table.class_names[int(probs[i].argmax())],
            label_prob=float(probs[i, labels[i]]),
            suggested_prob=float(probs[i].max()),
            quality=float(quality[i]),
            flagged=bool(flagged[i]),
            relabel=bool(flagged[i] and probs[i].max() >= SURE),
        )
        for i in order
    )


def doubtful_findings(doubtful: Sequence[DoubtfulLabel], labels: Ints, probs: Floats) -> list[Finding]:
    """A warning about the flagged labels, a note where they are fewer than one in a hundred pictures.

    Where the models know too little to judge a label, a note that says so.

    Args:
        doubtful: of `doubtful_labels`, from the labels [N] and out-of-fold probabilities [N, C] given here.
    """
    accuracy, kappa = agreement(labels, probs)
    if kappa < KNOWING:
        largest = np.bincount(labels).max() / len(labels)
        return [
            Finding(
                "labels-unjudged", "note",
                f"Labels cannot be judged: models trained without each picture are right on "
                f"{100 * accuracy:.1f} % (always the largest class: {100 * largest:.1f} %).",
                "Either these features cannot tell the classes apart, or very many labels are wrong: none is called "
                "wrong, relabelled or left out for it. Look at the least likely ones, or take another backbone.",
            )
        ]  # fmt: skip
    flagged = [one for one in doubtful if one.flagged]
    if not flagged:
        return []
    return [
        Finding(
            "doubtful-labels", "warning" if len(flagged) >= 0.01 * len(labels) else "note",
            f"{len(flagged):,} label{'' if len(flagged) == 1 else 's'} of {len(labels):,} may be wrong; models trained "
            f"without each picture agree with {100 * accuracy:.1f} % of all.",
            f"{'Look at it' if len(flagged) == 1 else 'Go through them, most doubtful first'}; "
            "`headstart audit PHOTOS --write-clean FILE` writes a manifest that "
            "relabels the sure ones and leaves the others out; labels of a test split are left alone.",
            files=tuple(one.file for one in flagged),
            details=tuple(f"{one.label}, rather {one.suggested} ({100 * one.suggested_prob:.0f} %)" for one in flagged),
        )
    ]  # fmt: skip


def outlier_findings(table: ImageTable, features: Floats) -> list[Finding]:
    """Pictures whose nearest neighbours are far away, measured against how far they are in general."""
    from sklearn.neighbors import NearestNeighbors

    if len(table) <= 2 * NEIGHBOURS:
        return []
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    distance, _ = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(unit).kneighbors(unit)
    mean = distance[:, 1:].mean(axis=1)
    middle = np.median(mean)
    spread = 1.4826 * np.median(np.abs(mean - middle))
    odd = np.flatnonzero(mean > middle + ODD * max(float(spread), 1e-9))
    if not len(odd):
        return []
    odd = odd[np.argsort(-mean[odd], kind="stable")]
    return [
        Finding(
            "outliers", "note",
            f"{len(odd):,} picture{' is' if len(odd) == 1 else 's are'} unlike all others.",
            f"See whether {'it belongs' if len(odd) == 1 else 'they belong'} here at all.",
            files=tuple(table.relative_paths[i] for i in odd),
            details=tuple(table.class_names[table.labels[i]] for i in odd),
        )
    ]  # fmt: skip
