"""The audit as one call: what is wrong with the pictures, before anything is trained on them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .audit_quick import QuickAudit, quick_audit
from .dataset import ImageTable, Splits, bad_reasons, load_images
from .findings import AuditResult, Finding, by_severity
from .terminal import ProgressBar, say

MOST_IN_FIT = 5 * 10**9  # numbers in the features, times classes: some minutes of one core


def audit(
    photos: str | Path | ImageTable,
    *,
    backbone: str | None = None,
    weights: str | Path = "hub",
    root: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: bool = False,
) -> AuditResult:
    """Look at the pictures and say what is wrong with them; nothing is changed.

    Args:
        photos: pictures as `load_images` takes them, or an `ImageTable`.
        backbone: a timm name, to find doubtful labels and outliers from its features; None leaves these out.
        weights: of the backbone: `hub`, a weights file or a run folder.
        root: the folder that a manifest's relative paths start from.
        device: where the backbone runs; see `make_runtime`.
        workers: threads that decode; 0 is one per CPU core.
        progress: bars on standard error.
    Raises:
        DataError: no pictures, or a layout that `load_images` refuses. What is wrong with single files is a finding.
        SetupError: cleanlab is not installed, which doubtful labels need.
    """
    table = photos if isinstance(photos, ImageTable) else load_images(photos, root=root, check=False)
    with ProgressBar(len(table), "Reading pictures", enabled=progress) as bar:
        reasons = bad_reasons(table.paths, workers=workers, progress=lambda done, _: bar.move_to(done))
    with ProgressBar(len(table), "Looking at pictures", enabled=progress) as bar:
        quick = quick_audit(table, reasons=reasons, workers=workers, progress=lambda done, _: bar.move_to(done))
    if backbone is None:
        return quick.result
    return _with_labels(quick, backbone, str(weights), device=device, workers=workers, progress=progress)


def _with_labels(
    quick: QuickAudit, backbone: str, weights: str, *, device: str, workers: int, progress: bool
) -> AuditResult:
    """The quick result with doubtful labels and outliers, from the readable pictures of classes that have two."""
    readable = np.array([one.reason is None for one in quick.looks])
    counts = np.bincount(quick.table.labels[readable], minlength=len(quick.table.class_names))
    keep = np.flatnonzero(readable & (counts[quick.table.labels] > 1))
    table = quick.table.select(keep)
    if np.unique(table.labels).size < len(table.class_names):
        say("A class has fewer than two readable pictures: labels are not looked at.", enabled=progress)
        return quick.result
    started = time.perf_counter()
    features = _features(table, backbone, weights, device=device, workers=workers, progress=progress)
    copies = tuple(quick.copies.names[i] for i in keep)
    return _judged(quick.result, dataclasses.replace(table, groups=copies), features, started)


def look_at_labels(result: AuditResult, splits: Splits, features: npt.NDArray[np.float64]) -> AuditResult:
    """The quick result with doubtful labels and outliers among training and validation pictures.

    Where labels cannot be judged, a note says why. The test split is left alone, so that nobody cleans it by the model
    that is tested on it.

    Args:
        result: of all pictures of the splits, which lie under one root.
        features: pooled features of the plain views [N, D], those of the training pictures first.
    """
    from .doubtful import why_not

    started = time.perf_counter()
    table = dataclasses.replace(splits, test=splits.test.select([])).joined()
    assert table is not None, "pictures under several roots are not looked at"
    why = why_not(table)
    if features.size * len(table.class_names) > MOST_IN_FIT:
        why = f"{len(table):,} pictures of {len(table.class_names):,} classes take too long beside a fit"
    if why is None:
        return _judged(result, table, features, started)
    note = Finding(
        "labels-unseen", "note", f"Labels were not looked at: {why}.", "`headstart audit` is the other way to them."
    )
    return dataclasses.replace(
        result, findings=by_severity([*result.findings, note]), seconds={**result.seconds, "labels": 0.0}
    )


def _judged(result: AuditResult, table: ImageTable, features: npt.NDArray[np.float64], started: float) -> AuditResult:
    """The result with what the features say of these pictures; the table's groups hold copies together."""
    from .doubtful import doubtful_findings, doubtful_labels, out_of_fold, outlier_findings

    doubtful = doubtful_labels(table, out_of_fold(features, table.labels, table.groups))
    found = [*doubtful_findings(doubtful, len(table)), *outlier_findings(table, features)]
    return dataclasses.replace(
        result,
        findings=by_severity([*result.findings, *found]),
        doubtful=doubtful,
        seconds={**result.seconds, "labels": round(time.perf_counter() - started, 3)},
    )


def _features(
    table: ImageTable, backbone: str, weights: str, *, device: str, workers: int, progress: bool
) -> npt.NDArray[np.float64]:
    """Pooled features [N, D] of the plain views."""
    from .classifier import create_classifier
    from .features import store_features
    from .freezing import set_freeze_line
    from .pixels import Pixels
    from .runtime import make_runtime

    runtime = make_runtime(device=device, workers=workers or None)
    model = create_classifier(backbone, table.class_names, weights=weights).to(runtime.device)
    set_freeze_line(model, "head")
    with ProgressBar(len(table), "Frozen backbone", enabled=progress) as bar:
        stored = store_features(
            model, Pixels(table, model.spec, workers=runtime.workers), runtime=runtime, advance=bar.advance
        )
    return np.asarray(stored[:, 0].numpy(), dtype=np.float64)
