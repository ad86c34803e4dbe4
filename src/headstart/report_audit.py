"""The report's section about the data: what was found in it, with pictures, and what copies in two splits are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .findings import UNOPENED
from .report_page import details, esc, percent, section, sentence, span, table
from .report_results import THUMBNAIL_PX, picture_address
from .run_record import RunRecord

THUMBNAILS, NAMES = 8, 200
TITLES = {"imagenet": "ImageNet", "modes": "Colour modes", "placeholder": "Notices in place of pictures"}


def audit_section(run: RunRecord) -> str:
    """Findings most severe first, each with its advice and files; empty where the pictures were not looked at."""
    if not run.audit:
        return ""
    findings = run.audit.get("findings") or []
    items = "".join(_finding(one, Path(run.audit["root"])) for one in findings)
    found = f'<ul class="verdicts">{items}</ul>' if findings else "<p>Nothing: no file, copy or giveaway to report.</p>"
    return section("What was found in the data", found, _leaks(run), _shortcuts(run.audit))


def _finding(one: Mapping[str, Any], root: Path) -> str:
    kind = {"error": "bad", "warning": "open"}.get(one["severity"], "good")
    n = len(one["files"])
    said = dict(zip(one["files"], one["details"] or ("",) * n, strict=True))
    shown = [(name, picture_address(root, name, THUMBNAIL_PX)) for name in _shown(one)]
    images = "".join(
        f'<li><img src="{data}" alt="{esc(name)}" loading="lazy">{sentence(said[name])}</li>'
        for name, data in shown
        if data
    )
    title = TITLES.get(one["kind"]) or one["kind"].replace("-", " ").capitalize()
    return (
        f'<li class="{kind}"><h3>{esc(title)}</h3><p><span class="answer">'
        f"{esc(one['severity'].capitalize())}.</span>{sentence(one['title'])} {sentence(one['advice'])}</p>"
        + (f'<ul class="mistakes">{images}</ul>' if images else "")
        + (details(f"{n:,} file{'' if n == 1 else 's'}", f"<ul>{_names(one)}</ul>") if one["files"] else "")
        + "</li>"
    )


def _shown(one: Mapping[str, Any]) -> Sequence[str]:
    """Files whose pictures stand in the report: none of notes and of what cannot be read, of examples a few a group."""
    if one["severity"] == "note" or one["kind"] in UNOPENED:
        return ()
    if one.get("examples") and one["groups"]:
        each = max(1, THUMBNAILS // len(one["groups"]))
        return [name for group in one["groups"] for name in group[:each]][:THUMBNAILS]
    return list(one["files"][:THUMBNAILS])


def _names(one: Mapping[str, Any]) -> str:
    words = one["details"] or [""] * len(one["files"])
    rows = [
        f"<li><code>{esc(name)}</code>{f': {sentence(word)}' if word else ''}</li>"
        for name, word in zip(one["files"][:NAMES], words, strict=False)
    ]
    more = len(one["files"]) - NAMES
    return "".join(rows) + (f"<li>and {more:,} more, in audit.json</li>" if more > 0 else "")


def _leaks(run: RunRecord) -> str:
    """The test score with and without the pictures of which a copy was trained on or chose the model."""
    leaked = (run.metrics.get("data") or {}).get("leaked") or []
    scored, clean = run.metrics.get("test"), run.metrics.get("test_without_leaks")
    if not leaked or not scored:
        return ""
    rows = [("all test pictures", scored)] + ([("without the leaked ones", clean)] if clean else [])
    cells = [
        (name, f"{score['n']:,}", percent(score["accuracy"]), span(score["accuracy_ci95"])) for name, score in rows
    ]
    return (
        f"<h3>With and without leaks</h3><p>Of {len(leaked):,} test pictures a copy, or a picture of the same group, "
        "is in the training or validation split, of this run or of one it goes on from: the network need not have "
        "learned anything to know them.</p>"
        + table(("Scored on", "Pictures", "Accuracy", "95 % interval"), cells, label="leaks", numbers=(1, 2))
    )


def _shortcuts(audit: Mapping[str, Any]) -> str:
    rows = [
        (
            esc(one["name"]),
            percent(one["accuracy"]),
            percent(one["chance"]),
            sentence(f"{one['told']}: found in {percent(one['recall'])}, false alarms {percent(one['false_alarms'])}")
            if one["told"]
            else "",
        )
        for one in audit.get("shortcuts") or []
    ]
    if not rows:
        return ""
    header = ("Property alone", "Balanced accuracy", "Chance", "Class told best")
    return details(
        "What the class could be told by, without looking", table(header, rows, label="shortcuts", numbers=(1, 2))
    )
