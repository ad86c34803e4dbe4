"""The audit as one call: what is wrong with the pictures, before anything is trained on them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .audit_quick import QuickAudit, quick_audit
from .dataset import ImageTable, bad_reasons, load_images
from .findings import AuditResult, by_severity
from .terminal import ProgressBar, say


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
    from .doubtful import doubtful_findings, doubtful_labels, out_of_fold, outlier_findings

    readable = np.array([one.reason is None for one in quick.looks])
    counts = np.bincount(quick.table.labels[readable], minlength=len(quick.table.class_names))
    keep = np.flatnonzero(readable & (counts[quick.table.labels] > 1))
    table = quick.table.select(keep)
    if np.unique(table.labels).size < len(table.class_names):
        say("A class has fewer than two readable pictures: labels are not looked at.", enabled=progress)
        return quick.result
    started = time.perf_counter()
    features = _features(table, backbone, weights, device=device, workers=workers, progress=progress)
    copies = [quick.copies.names[i] for i in keep]
    doubtful = doubtful_labels(table, out_of_fold(features, table.labels, copies))
    found = [*doubtful_findings(doubtful, len(table)), *outlier_findings(table, features)]
    return dataclasses.replace(
        quick.result,
        findings=by_severity([*quick.result.findings, *found]),
        doubtful=doubtful,
        seconds={**quick.result.seconds, "labels": round(time.perf_counter() - started, 3)},
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
