"""A clean manifest from an audit: what to leave out, what to relabel, which copies belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .audit_copies import COPIES
from .dataset import ImageTable
from .findings import AuditResult, DoubtfulLabel
from .groups import join_groups
from .manifest import ManifestRow

_DROPPED = {"unreadable": "unreadable", "blank": "shows nothing", "placeholder": "a notice in place of a picture"}


def clean_rows(table: ImageTable, result: AuditResult) -> list[ManifestRow]:
    """The table's rows as a manifest that follows the audit without a person having looked.

    Dropped: unreadable, blank and placeholder files; exact copies but the first; copies with several labels; in train
    and val, pictures of which a copy stands in a later split (a test picture stays). Flagged labels: relabelled where
    the suggestion is sure, else dropped; those of the test split stay as they are, since whoever cleans the test by the
    model that is tested flatters it. Copies that stay share a group. What the table's own manifest drops stays dropped.
    """
    names = table.relative_paths
    reasons = {name: _DROPPED[one.kind] for one in result.findings if one.kind in _DROPPED for name in one.files}
    for kind in ("exact", "near"):
        for one in result.of_kind(f"{kind}-conflicts"):
            reasons |= dict.fromkeys(one.files, f"{kind} copies with different labels")
    _drop_copies(table, result, reasons)
    doubtful = {one.file: one for one in result.doubtful or () if one.flagged and one.split != "test"}
    rows = table.rows(dropped=True)
    kept = [
        _row(replace(row, group=group), reasons.get(name, ""), doubtful.get(name))
        for row, group, name in zip(rows[: len(table)], _groups(table, result), names, strict=True)
    ]
    return [*kept, *rows[len(table) :]]


def counts_of(rows: list[ManifestRow]) -> Mapping[str, int]:
    """What the manifest does: pictures kept, dropped and relabelled."""
    dropped, relabelled = sum(row.drop for row in rows), sum(bool(row.original_label) and not row.drop for row in rows)
    return {"kept": len(rows) - dropped, "dropped": dropped, "relabelled": relabelled}


def _groups(table: ImageTable, result: AuditResult) -> tuple[str, ...]:
    """The table's own groups, joined with those of copies."""
    groups = table.groups
    for word in ("near", "exact"):
        found = [one for kind in ("conflicts", "leaks", "duplicates") for one in result.of_kind(f"{word}-{kind}")]
        sets = [members for one in found for members in one.groups]
        name_of = {name: f"{COPIES}{members[0]}" for members in sets for name in members}
        groups = join_groups(groups, [name_of.get(name, "") for name in table.relative_paths])
    return groups


def _drop_copies(table: ImageTable, result: AuditResult, reasons: dict[str, str]) -> None:
    split_of = dict(zip(table.relative_paths, table.split_names, strict=True))
    for kind in ("exact-leaks", "exact-duplicates"):
        for one in result.of_kind(kind):
            for members in one.groups:
                last = max(members, key=lambda name: _RANK[split_of[name]])  # the first of those in the latest split
                for name in members:
                    if name != last:
                        reasons.setdefault(name, f"exact copy of {last}")
    for one in result.of_kind("near-leaks"):
        for members in one.groups:
            latest = max(_RANK[split_of[name]] for name in members)
            for name in members:
                if _RANK[split_of[name]] < latest:
                    reasons.setdefault(name, "a near copy stands in a later split")


_RANK = {"": 0, "train": 1, "val": 2, "test": 3}


def _row(row: ManifestRow, reason: str, doubt: DoubtfulLabel | None) -> ManifestRow:
    if reason:
        return replace(row, drop=True, reason=reason)
    if doubt is None:
        return row
    words = f"{doubt.suggested} {100 * doubt.suggested_prob:.0f} %, {doubt.label} {100 * doubt.label_prob:.0f} %"
    if doubt.relabel:
        return replace(
            row,
            label=doubt.suggested,
            original_label=row.original_label or row.label,
            reason=f"doubtful label: {words}",
        )
    return replace(row, drop=True, reason=f"doubtful label: {words}")
