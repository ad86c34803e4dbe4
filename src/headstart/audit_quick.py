"""The quick part of an audit: everything that needs no network. Cheap enough for every fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .audit_copies import Copies, copy_findings, find_copies, series_findings
from .audit_files import (
    class_findings,
    count_pictures,
    count_traits,
    file_findings,
    grouped_finding,
    imagenet_findings,
    left_out_findings,
)
from .dataset import ImageTable
from .findings import AuditResult, Finding, by_severity
from .inspection import Known, Look, look_at
from .shortcuts import Shortcut, find_shortcuts, telling_pictures


@dataclass(frozen=True, eq=False)
class QuickAudit:
    """The result, and what it was drawn from, for those who go on from there. looks: one per picture of the table."""

    table: ImageTable
    looks: list[Look]
    copies: Copies
    result: AuditResult


def quick_audit(
    table: ImageTable,
    *,
    known: Known | None = None,
    reasons: Sequence[str | None] = (),
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> QuickAudit:
    """Look at every file once; find broken and odd ones, copies, shortcuts and uneven classes.

    Args:
        known: gives the look that somebody has kept of a picture, or None; the file is then not opened.
        reasons: per picture why it does not decode, None where it does; without it all do.
        workers: threads that decode; 0 is one per CPU core.
        progress: called with (pictures looked at, pictures in all).
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "files"):
        looks = look_at(table, known=known, reasons=reasons, workers=workers, progress=progress)
    with _timed(seconds, "copies"):
        copies = find_copies(looks)
    with _timed(seconds, "shortcuts"):
        shortcuts = find_shortcuts(looks, table.labels, table.class_names)
    findings = [
        *left_out_findings(table),
        *file_findings(table, looks),
        *copy_findings(table, copies),
        *shortcut_findings(table, looks, shortcuts),
        *class_findings(table),
        *series_findings(table, looks),
        *imagenet_findings(table),
    ]
    result = AuditResult(
        root=str(table.root),
        class_names=table.class_names,
        pictures=len(table),
        counts=count_pictures(table),
        traits=count_traits(table, looks),
        findings=by_severity(findings),
        shortcuts=tuple(dataclasses.asdict(one) for one in shortcuts),
        seconds=seconds,
    )
    return QuickAudit(table, looks, copies, result)


def shortcut_findings(table: ImageTable, looks: Sequence[Look], shortcuts: Sequence[Shortcut]) -> list[Finding]:
    """A warning for each property that predicts the class better than such a property does by nature."""
    found = []
    for one in shortcuts:
        if one.suspicious:
            groups, words = telling_pictures(one, looks, table.labels, table.class_names)
            found.append(
                grouped_finding(
                    table, groups, "shortcut", "warning", shortcut_title(one),
                    "A network may learn this instead of what is shown: make the classes alike in it, or test on "
                    "pictures from elsewhere.",
                    words=_valued(table, looks, words), examples=True,
                )
            )  # fmt: skip
    return found


def _valued(table: ImageTable, looks: Sequence[Look], words: Callable[[Look], str]) -> Callable[[int], str]:
    return lambda i: f"{table.class_names[table.labels[i]]}: {words(looks[i])}"


def shortcut_title(one: Shortcut) -> str:
    """What a property tells, in a sentence."""
    return (
        f"{one.name[0].upper()}{one.name[1:]} alone {'tell' if ' and ' in one.name else 'tells'} {one.told} in "
        f"{100 * one.recall:.0f} % of its pictures, with {100 * one.false_alarms:.0f} % false alarms."
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - started, 3)
