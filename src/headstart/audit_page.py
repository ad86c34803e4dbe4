"""The audit as one HTML file: findings with thumbnails, and the review of doubtful labels that ends in a manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path

from .files import to_json, write_atomic
from .findings import SEVERITIES, UNOPENED, AuditResult, DoubtfulLabel, Finding
from .manifest import ManifestRow
from .report_page import details, esc, facts, page, section, sentence, table
from .report_results import picture_address
from .review_script import SCRIPT, STYLE

PAGE_FILE = "audit.html"
REVIEWED = "doubtful-labels"  # the finding that has the review in place of a sheet
MOST_DOUBTFUL, MOST_SHOWN, MOST_NAMED = 200, 24, 500
SHEET_PX, REVIEW_PX = 128, 320
MOST_PICTURE_BYTES = 12_000_000  # of all thumbnails together, as they stand in the page


def write_page(result: AuditResult, rows: Sequence[ManifestRow], folder: str | Path) -> Path:
    """Write `audit.html` into the folder and return its path; a file of that name is replaced.

    Args:
        rows: all pictures of the data set, as the manifest saved from the page will hold them; see `ImageTable.rows`.
    """
    path = Path(folder).expanduser().absolute() / PAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_page(result, rows).encode("utf-8", errors="replace"))
    return path


def render_page(result: AuditResult, rows: Sequence[ManifestRow]) -> str:
    """The page as HTML text. It loads nothing, and runs no script but its own."""
    pictures = _Pictures(Path(result.root), result.unopened)
    review = _review(result, rows, pictures)  # first, so that the queue has its pictures before the sheets have theirs
    parts = (
        _headline(result),
        _findings(result.findings),
        review,
        _sheets(result.findings, pictures),
        _counts(result),
        _traits(result),
        "<footer>Written by headstart audit. This file loads nothing from anywhere.</footer>",
    )
    name = Path(result.root).name or result.root
    content = "\n".join(part for part in parts if part)
    return page(f"{name}: headstart audit", content, style=STYLE, script=SCRIPT if review else "")


class _Pictures:
    """Thumbnails of pictures below `root` as data addresses, until they fill `MOST_PICTURE_BYTES`."""

    def __init__(self, root: Path, unopened: Set[str]) -> None:
        self.root, self.unopened = root, unopened
        self.left_bytes = MOST_PICTURE_BYTES

    def address(self, file: str, px: int) -> str | None:
        """None for what is unreadable, gone, outside the root, or no longer fits."""
        opened = self.left_bytes > 0 and file not in self.unopened
        data = picture_address(self.root, file, px) if opened else None
        if data is None or len(data) > self.left_bytes:
            return None
        self.left_bytes -= len(data)
        return data


# ---- findings --------------------------------------------------------------------------------------------------


def _headline(result: AuditResult) -> str:
    counts = {severity: sum(one.severity == severity for one in result.findings) for severity in SEVERITIES}
    words = "".join(
        f'<li class="{name if n else "none"}">{n} {name}{"" if n == 1 else "s"}</li>' for name, n in counts.items()
    )
    pairs = [
        ("Pictures", f"{result.pictures:,}"),
        ("Classes", f"{len(result.class_names):,}"),
        ("Splits", ", ".join(f"{n:,} {esc(split)}" for split, n in result.split_sizes.items()) or "none yet"),
    ]
    start = f'<a class="start" href="#review">Review {_counted(_queue(result), "doubtful label")}</a>'
    name = Path(result.root).name or result.root
    return (
        f'<header><h1>headstart audit: {esc(name)}</h1><ul class="counted">{words}</ul>'
        f"{start if _queue(result) else ''}{facts(pairs)}"
        f'<p class="note">Read from <code>{esc(result.root)}</code>.</p></header>'
    )


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return section("What was found", "<p>Nothing.</p>")
    rows = []
    for i, one in enumerate(findings):
        target = "review" if one.kind == REVIEWED else f"finding-{i}"
        title = f'<a href="#{target}">{sentence(one.title)}</a>' if one.files else sentence(one.title)
        rows.append(
            (
                f'<span class="severity {one.severity}">{one.severity}</span>',
                f'<p>{title}</p><p class="soft">{sentence(one.advice)}</p>',
                f"{len(one.files):,}" if one.files and not one.examples else "",
            )
        )
    header = ("Severity", "What was found, and what to do", "Pictures")
    return section(
        "What was found", f'<div class="findings">{table(header, rows, label="findings", numbers=(2,))}</div>'
    )


def _sheets(findings: Sequence[Finding], pictures: _Pictures) -> str:
    sheets = "".join(_sheet(i, one, pictures) for i, one in enumerate(findings) if one.files and one.kind != REVIEWED)
    note = (
        f'<p class="note">At most {MOST_SHOWN} pictures of each finding are shown, and '
        f"{MOST_PICTURE_BYTES // 10**6} MB of pictures on this page; <code>audit.json</code> names every file.</p>"
    )
    return section("The pictures", note, sheets) if sheets else ""


def _sheet(number: int, finding: Finding, pictures: _Pictures) -> str:
    said = dict(zip(finding.files, finding.details or ("",) * len(finding.files), strict=True))
    if finding.groups:
        groups, left = [], MOST_SHOWN
        for group in finding.groups:
            if left > 0:
                cells = "".join(_cell(file, said[file], pictures) for file in group[:left])
                groups.append(f'<li><ul class="sheet">{cells}</ul></li>')
                left -= len(group)
        shown = f'<ul class="groups">{"".join(groups)}</ul>'
    elif finding.kind not in UNOPENED:
        cells = "".join(_cell(file, said[file], pictures) for file in finding.files[:MOST_SHOWN])
        shown = f'<ul class="sheet">{cells}</ul>'
    else:
        shown = ""
    heading = f'<h3><span class="severity {finding.severity}">{finding.severity}</span> {sentence(finding.title)}</h3>'
    opened = " open" if finding.severity != "note" else ""
    names = _names(finding, said)
    if shown and len(finding.files) > 1:
        names = details(f"{'The' if finding.examples else 'All'} {len(finding.files):,} names", names)
    # A link to something inside of a closed part opens it.
    advice = f'<p class="soft sheet-of" id="finding-{number}">{sentence(finding.advice)}</p>'
    return f"<details{opened}><summary>{heading}</summary>{advice}{shown}{names}</details>"


def _cell(file: str, said: str, pictures: _Pictures) -> str:
    data = pictures.address(file, SHEET_PX)
    image = f'<img src="{data}" alt="" loading="lazy">' if data else '<span class="gone">no picture</span>'
    words = f'<span class="said">{sentence(said)}</span>' if said else ""
    return f'<li>{image}{words}<span class="path" title="{esc(file)}">{esc(Path(file).name)}</span></li>'


def _names(finding: Finding, said: dict[str, str]) -> str:
    items = "".join(
        f"<li><code>{esc(file)}</code>{f': {sentence(said[file])}' if said[file] else ''}</li>"
        for file in finding.files[:MOST_NAMED]
    )
    more = len(finding.files) - MOST_NAMED
    return f'<ul class="files">{items}</ul>' + (f"<p>and {more:,} more in audit.json</p>" if more > 0 else "")


# ---- counts ----------------------------------------------------------------------------------------------------


def _counts(result: AuditResult) -> str:
    splits = list(result.counts)
    rows = [(esc(name), *(f"{result.counts[split].get(name, 0):,}" for split in splits)) for name in result.class_names]
    foot = ("all", *(f"{sum(result.counts[split].values()):,}" for split in splits))
    header = ("Class", *map(esc, splits))
    return section(
        "Pictures per class", table(header, rows, label="pictures per class", numbers=range(1, len(header)), foot=foot)
    )


def _traits(result: AuditResult) -> str:
    tables = []
    for what, splits in result.traits.items():
        values = sorted({value for classes in splits.values() for counts in classes.values() for value in counts})
        rows = [
            (esc(f"{split}, {name}"), *(f"{counts.get(value, 0):,}" for value in values))
            for split, classes in splits.items()
            for name, counts in classes.items()
        ]
        header = ("Split, class", *map(esc, values))
        tables.append(
            details(f"By {esc(what)}", table(header, rows, label=f"pictures by {what}", numbers=range(1, len(header))))
        )
    return section("Formats, modes and turns", *tables)


# ---- review ----------------------------------------------------------------------------------------------------


def _queue(result: AuditResult) -> tuple[DoubtfulLabel, ...]:
    """The doubtful labels, most doubtful first, as many as the page takes."""
    return (result.doubtful or ())[:MOST_DOUBTFUL]


def _review(result: AuditResult, rows: Sequence[ManifestRow], pictures: _Pictures) -> str:
    queue = _queue(result)
    if not queue:
        return ""
    root = Path(result.root)
    names = [row.path.relative_to(root).as_posix() if row.path.is_relative_to(root) else "" for row in rows]
    place = {name: i for i, name in enumerate(names) if name}
    unreadable = {file: "unreadable" for one in result.of_kind("unreadable") for file in one.files}
    data = {
        "root": root.as_posix(),
        "classes": result.class_names,
        "outside": [i for i, name in enumerate(names) if not name],
        "rows": [
            [
                name or row.path.as_posix(), row.label, row.split, row.group,
                "1" if row.drop or name in unreadable else "", row.original_label,
                row.reason or unreadable.get(name, ""),
            ]
            for name, row in zip(names, rows, strict=True)
        ],
        "queue": [
            {
                "row": place[one.file], "suggested": one.suggested,
                "label_prob": one.label_prob, "suggested_prob": one.suggested_prob,
                "image": pictures.address(one.file, REVIEW_PX),
                "address": Path(os.path.normpath(root / one.file)).as_uri(),
            }
            for one in queue
            if one.file in place
        ],
    }  # fmt: skip
    total, flagged = len(result.doubtful or ()), sum(one.flagged for one in queue)
    limit = f" The first {len(queue):,} of {total:,} are here; audit again after these." if total > len(queue) else ""
    # Every "<" is written as an escape, so that no name can end the block.
    block = to_json(data).decode().replace("<", "\\u003c")
    judged = (
        f"Confident learning counts {f'{flagged:,}' if flagged else 'none'} of these {len(queue):,} among the wrong "
        "ones; some are right and only hard."
    )
    if result.of_kind("labels-unjudged"):
        judged = "No label was judged (see above), so these are only the least likely ones."
    return section(
        "Doubtful labels",
        "<p>These labels do not fit what models trained without the picture say of it, the most doubtful first. "
        f"{judged} You decide, and may stop where only right ones come.{limit}</p>",
        "<noscript><p>The review needs JavaScript, which this browser has off.</p></noscript>",
        _PANEL,
        f'<script type="application/json" id="review-data">{block}</script>',
    )


def _counted(things: Sequence[object], word: str) -> str:
    return f"{len(things):,} {word}{'' if len(things) == 1 else 's'}"


_PANEL = """
<div id="review-part" hidden>
<p class="banner" id="forgetful" role="note" hidden>This browser keeps nothing for this page: save the manifest before
you close it.</p>
<section class="review" id="review" tabindex="-1" aria-label="Review of doubtful labels">
<div class="top"><p><strong id="where"></strong></p><p class="soft" id="tally"></p></div>
<progress id="bar" value="0" aria-label="Pictures decided"></progress>
<div class="entry" id="entry">
<div><img id="picture" alt=""><div class="gone" id="no-picture" hidden>no picture here</div></div>
<div>
<h3 id="name"></h3><p class="path" id="path"></p>
<p class="says">Labelled <strong id="has"></strong> (<span id="has-prob"></span> likely); more like
<strong id="likely"></strong> (<span id="likely-prob"></span>).</p>
<div class="buttons">
<button type="button" id="keep" aria-keyshortcuts="K">Keep <span id="keep-label"></span><kbd>K</kbd></button></div>
<div class="buttons">
<button type="button" class="main" id="relabel" aria-keyshortcuts="R">Relabel as<kbd>R</kbd></button>
<select id="label" aria-label="New class"></select></div>
<div class="buttons"><button type="button" id="drop" aria-keyshortcuts="D">Drop the picture<kbd>D</kbd></button>
<button type="button" id="skip" aria-keyshortcuts="S Space">Skip<kbd>S</kbd></button></div>
<p class="digits" id="digits"></p>
<p class="state" id="state"></p>
</div>
</div>
<div id="end" hidden><p id="end-words"></p>
<div class="buttons"><button type="button" class="main" id="open-ones">Go to the first open one</button></div></div>
<div class="buttons">
<button type="button" id="back" aria-keyshortcuts="ArrowLeft Backspace">Back<kbd>&larr;</kbd></button>
<button type="button" id="undo" aria-keyshortcuts="U">Undo the last<kbd>U</kbd></button></div>
<p class="note">The keys work anywhere on this page; where the picture is out of sight, the first press brings it back.
Space skips, too. Each decision is kept in this browser at once; you may close the page and go on later.</p>
<div id="spoken" class="unseen" role="status" aria-live="polite"></div>
</section>
<details id="decided-part" hidden><summary>Decisions (<span id="decided-count"></span>)</summary>
<ul class="decided" id="decided"></ul></details>
<div class="save"><h3>Save the manifest</h3>
<p id="save-words"></p>
<label><input type="checkbox" id="relative"><span>Paths relative to the folder of the pictures, for use on another
machine or after a move (then say where they are with <code>--root</code>). Else they are in full, and the manifest
may lie anywhere.</span></label>
<div class="buttons"><button type="button" class="main" id="save">Save manifest.csv</button>
<span id="saved"></span></div>
<p>Your pictures are not touched. Train with:</p><pre id="command"></pre></div>
</div>
"""
