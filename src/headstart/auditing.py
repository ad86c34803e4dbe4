"""The audit as one call: what is wrong with the pictures, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path

from .audit_quick import quick_audit
from .dataset import ImageTable, bad_reasons, load_images
from .findings import AuditResult
from .terminal import ProgressBar


def audit(
    photos: str | Path | ImageTable,
    *,
    root: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> AuditResult:
    """Look at the pictures and say what is wrong with them; nothing is changed.

    Args:
        photos: pictures as `load_images` takes them, or an `ImageTable`.
        root: the folder that a manifest's relative paths start from.
        workers: threads that decode; 0 is one per CPU core.
        progress: a bar on standard error.
    Raises:
        DataError: no pictures, or a layout that `load_images` refuses. What is wrong with single files is a finding.
    """
    table = photos if isinstance(photos, ImageTable) else load_images(photos, root=root, check=False)
    with ProgressBar(len(table), "Reading pictures", enabled=progress) as bar:
        reasons = bad_reasons(table.paths, workers=workers, progress=lambda done, _: bar.move_to(done))
    with ProgressBar(len(table), "Looking at pictures", enabled=progress) as bar:
        return quick_audit(table, reasons=reasons, workers=workers, progress=lambda done, _: bar.move_to(done)).result
