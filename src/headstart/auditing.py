"""The audit as one call: what is wrong with the pictures, before anything is trained on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .audit_quick import QuickAudit, quick_audit
from .dataset import ImageTable, Splits, bad_reasons, load_images
from .findings import AuditResult, Finding, by_severity
from .store import Cache
from .terminal import ProgressBar, say

if TYPE_CHECKING:
    from .classifier import Classifier
    from .pixelstore import PixelStore
    from .runtime import Runtime

# Numbers in the features: of more, doubtful labels are looked for in single precision, with half the memory.
MOST_EXACT = 10**7
MOST_IN_FIT = 5 * 10**9  # numbers in the features, times classes: some minutes of one core


def audit(
    photos: str | Path | ImageTable,
    *,
    backbone: str | None = None,
    weights: str | Path = "hub",
    spec_overrides: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int = 0,
    cache: bool = True,
    progress: bool = False,
) -> AuditResult:
    """Look at the pictures and say what is wrong with them; nothing is changed.

    Args:
        photos: pictures as `load_images` takes them, or an `ImageTable`.
        backbone: a timm name, to find doubtful labels and outliers from its features; None leaves these out.
        weights: of the backbone: `hub`, a weights file or a run folder.
        spec_overrides: of the backbone's preprocessing, as in `fine_tune`.
        root: the folder that a manifest's relative paths start from.
        device, precision: where and in what number format the backbone runs; see `make_runtime`.
        workers: threads that decode; 0 is one per CPU core.
        cache: keep decoded pictures and features in the cache folder and use those kept before; without a backbone
            nothing is kept.
        progress: bars and lines on standard error.
    Raises:
        DataError: no pictures, or a layout that `load_images` refuses. What is wrong with single files is a finding.
        SetupError: cleanlab is not installed, which doubtful labels need; or the weights cannot be had.
    """
    table = photos if isinstance(photos, ImageTable) else load_images(photos, root=root, check=False)
    if backbone is None:
        return _quick(table, None, workers=workers, progress=progress).result
    from .classifier import create_classifier
    from .pixelstore import PixelStore
    from .runtime import make_runtime

    runtime = make_runtime(device=device, precision=precision, workers=workers or None)
    model = create_classifier(backbone, table.class_names, weights=weights, **(spec_overrides or {}))
    store = PixelStore(Cache(), model.spec, say=partial(say, enabled=progress)) if cache else None
    quick = _quick(table, store, workers=workers, progress=progress)
    readable = np.flatnonzero([one.reason is None for one in quick.looks])
    copies = tuple(quick.copies.names[i] for i in readable)
    table = dataclasses.replace(table.select(readable), groups=copies)
    started = time.perf_counter()
    return _judged(quick.result, table, lambda _, part: _features(part, model, runtime, store, progress), started)


def _quick(table: ImageTable, store: PixelStore | None, *, workers: int, progress: bool) -> QuickAudit:
    """The part without a network. Where there is a store, the pictures are decoded once, for all that comes."""
    with ProgressBar(len(table), "Reading pictures", enabled=progress) as bar:
        check = partial(store.fill, root=table.root, look=True) if store else bad_reasons
        reasons = check(table.paths, workers=workers, progress=lambda done, _: bar.move_to(done))
    with ProgressBar(len(table), "Looking at pictures", enabled=progress) as bar:
        return quick_audit(
            table, known=store.look if store else None, reasons=reasons, workers=workers,
            progress=lambda done, _: bar.move_to(done),
        )  # fmt: skip


def for_labels(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.floating]:
    """Features [n, D] of several parts one after the other [N, D], in the precision in which labels are looked at.

    At once in the format it takes: with many pictures each copy counts.
    """
    is_exact = sum(part.size for part in parts) <= MOST_EXACT
    return np.concatenate(parts, dtype=np.float64 if is_exact else np.float32)


def look_at_labels(result: AuditResult, splits: Splits, features: npt.NDArray[np.floating]) -> AuditResult:
    """The quick result with doubtful labels and outliers among training and validation pictures.

    Where labels cannot be judged, a note says why. The test split is left alone, so that nobody cleans it by the model
    that is tested on it.

    Args:
        result: of all pictures of the splits, which lie under one root.
        features: pooled features of the plain views [N, D], those of the training pictures first; see `for_labels`.
    """
    started = time.perf_counter()
    table = dataclasses.replace(splits, test=splits.test.select([])).joined()
    assert table is not None, "pictures under several roots are not looked at"
    if find_spec("cleanlab") is None:
        return _with_note(result, "cleanlab is not installed (pip install 'headstart[audit]')", "Install it.")
    if features.size * len(table.class_names) > MOST_IN_FIT:
        why = f"{len(table):,} pictures of {len(table.class_names):,} classes take too long beside a fit"
        return _with_note(result, why, "`headstart audit` is the other way to them.")
    return _judged(
        result, table, lambda rows, part: features if len(rows) == len(features) else features[rows], started
    )


def _judged(
    result: AuditResult,
    table: ImageTable,
    features_of: Callable[[npt.NDArray[np.int64], ImageTable], npt.NDArray[np.floating]],
    started: float,
) -> AuditResult:
    """The result with what the features say of these pictures; the table's groups hold copies together.

    Args:
        features_of: features [n, D] of the pictures at these places, which the table beside them holds.
    """
    from .doubtful import doubtful_findings, doubtful_labels, judgeable, out_of_fold, outlier_findings

    rows, part, why = judgeable(table)
    if why is not None:
        advice = "Add pictures to a class as small as that, or take it out."
        unseen = np.setdiff1d(np.arange(len(table)), rows)
        result = _with_note(result, why, advice, some=len(rows) > 0, files=[table.relative_paths[i] for i in unseen])
    if not len(rows):
        return result
    features = features_of(rows, part)
    probs = out_of_fold(features, part.labels, part.groups)
    doubtful = doubtful_labels(part, probs)
    found = [*doubtful_findings(doubtful, part.labels, probs), *outlier_findings(part, features)]
    return dataclasses.replace(
        result,
        findings=by_severity([*result.findings, *found]),
        doubtful=doubtful,
        seconds={**result.seconds, "labels": round(time.perf_counter() - started, 3)},
    )


def _with_note(
    result: AuditResult, why: str, advice: str, *, some: bool = False, files: Sequence[str] = ()
) -> AuditResult:
    """Labels, or `some` of them, were not looked at; `labels` among the seconds says that they have been asked for."""
    title = f"{'Some labels' if some else 'Labels'} were not looked at: {why}."
    note = Finding("labels-unseen", "note", title, advice, tuple(files))
    return dataclasses.replace(
        result, findings=by_severity([*result.findings, note]), seconds={**result.seconds, "labels": 0.0}
    )


def _features(
    table: ImageTable, model: Classifier, runtime: Runtime, store: PixelStore | None, progress: bool
) -> npt.NDArray[np.floating]:
    """Pooled features [N, D] of the plain views."""
    from .freezing import set_freeze_line
    from .once import store_features
    from .pixels import Pixels

    model.to(runtime.device)
    set_freeze_line(model, "head")
    pixels = Pixels(table, model.spec, workers=runtime.workers, store=store)
    with ProgressBar(len(table), "Frozen backbone", enabled=progress) as bar:
        stored = store_features(model, pixels, runtime=runtime, advance=bar.advance)
    return for_labels([stored[:, 0].numpy()])
