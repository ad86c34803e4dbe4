"""What an audit leaves to look at: the findings as text, `audit.json`, and a sheet of thumbnails per finding."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path

from PIL import Image, ImageDraw

from .dataset import open_image
from .errors import DataError
from .files import replacing, to_json, write_atomic
from .findings import UNOPENED, AuditResult, Finding, read_audit

AUDIT_FILE = "audit.json"
THUMBNAIL_PX, COLUMNS, MOST_THUMBNAILS = 128, 8, 64
LINES, LINE_PX, GAP_PX = 3, 14, 6  # of text below a thumbnail: one for its name, two for what is said of it
INDENT, WIDTH = " " * 9, 100  # of the text in the terminal
MOST_NAMED, MOST_GROUPS, MOST_UNREAD = 3, 2, 10  # files of a finding in the terminal, groups, unreadable ones


def findings_text(result: AuditResult) -> str:
    """Findings, most severe first, each with its sentence, advice and first files; a line that says so without any."""
    sizes = ", ".join(f"{n:,} {split}" for split, n in result.split_sizes.items())
    head = f"{result.pictures:,} pictures{f' ({sizes})' if sizes else ''}, {len(result.class_names):,} classes"
    if not result.findings:
        return f"{head}: nothing was found."
    blocks = (
        f"{_filled(f'{one.severity:<{len(INDENT)}}{one.kind}: {one.title}')}\n{_filled(INDENT + one.advice)}"
        f"{_indented(first_files(one), INDENT)}"
        for one in result.findings
    )
    return "\n\n".join((head, *blocks))


def _filled(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _indented(lines: str, by: str) -> str:
    """These lines behind others; nothing where there are none."""
    return "\n" + textwrap.indent(lines, by) if lines else ""


def finding_line(finding: Finding) -> str:
    """A finding as it stands among the lines of a run, the first files below it."""
    said = f"{finding.severity.capitalize()}: {finding.title} {finding.advice}"
    return said + _indented(first_files(finding), " " * 4)


def first_files(finding: Finding) -> str:
    """The first files, or the first groups; empty without any. The sheets and audit.json have all of them.

    What cannot be read has a line for each file, with the reason.
    """
    if not finding.files:
        return ""
    if finding.kind in UNOPENED:
        lines = [f"{file}: {why}" for file, why in zip(finding.files, finding.details, strict=True)]
        left = len(lines) - MOST_UNREAD
        return "\n".join([*lines[:MOST_UNREAD], *([f"and {left:,} more"] if left > 0 else [])])
    if finding.examples:
        return f"such as {', '.join(finding.files[:MOST_NAMED])}"
    groups = finding.groups or (finding.files,)
    left = len(finding.groups) - MOST_GROUPS
    more = f"; and {left:,} more group{'' if left == 1 else 's'}" if left > 0 else ""
    return f"{'; '.join(map(_listed, groups[:MOST_GROUPS]))}{more}"


def _listed(files: Sequence[str]) -> str:
    """`a, b and c`, or `a, b, c and 12 more`."""
    if len(files) > MOST_NAMED:
        return f"{', '.join(files[:MOST_NAMED])} and {len(files) - MOST_NAMED:,} more"
    return " and ".join(part for part in (", ".join(files[:-1]), files[-1]) if part)


def write_audit(result: AuditResult, folder: str | Path) -> Path:
    """Write `audit.json` and a sheet for each finding that names files; returns the path of audit.json.

    A sheet is called `KIND.jpg`, the second of a kind `KIND-2.jpg`. Files of those names in the folder are replaced,
    and sheets of an earlier audit there are removed.
    """
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sheets = _sheets(result.findings)
    for name in _earlier_sheets(folder) - set(sheets):
        (folder / name).unlink(missing_ok=True)
    write_atomic(folder / AUDIT_FILE, to_json(result.to_dict(), indent=1) + b"\n")
    for name, finding in sheets.items():
        sheet = draw_sheet(finding, Path(result.root), result.unopened)
        with replacing(folder / name) as temporary, temporary.open("xb") as file:
            sheet.save(file, "JPEG", quality=85)
    return folder / AUDIT_FILE


def _sheets(findings: Sequence[Finding]) -> dict[str, Finding]:
    """File name -> the finding that it shows."""
    seen: Counter[str] = Counter()
    sheets = {}
    for finding in findings:
        if finding.files:
            seen[finding.kind] += 1
            number = f"-{seen[finding.kind]}" if seen[finding.kind] > 1 else ""
            sheets[f"{finding.kind}{number}.jpg"] = finding
    return sheets


def _earlier_sheets(folder: Path) -> set[str]:
    """Names of the sheets that an earlier audit has written into the folder."""
    try:
        names = _sheets(read_audit(folder / AUDIT_FILE).findings)
    except Exception:  # none there, or whatever somebody has called audit.json
        return set()
    return {name for name in names if Path(name).name == name}


def draw_sheet(finding: Finding, root: Path, unopened: Set[str] = frozenset()) -> Image.Image:
    """A sheet of the finding's first pictures with their names and details; each group begins a row.

    Args:
        unopened: files that are named without a picture, as are those that turn out to be unreadable.
    """
    rows = _rows(finding)
    step_x, step_y = THUMBNAIL_PX + 2 * GAP_PX, THUMBNAIL_PX + LINES * LINE_PX + 2 * GAP_PX
    sheet = Image.new("RGB", (max(map(len, rows)) * step_x, len(rows) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (name, detail) in enumerate(cells):
            x, y = column * step_x + GAP_PX, row * step_y + GAP_PX
            picture = None if name in unopened else _thumbnail(root / name)
            if picture is None:
                draw.rectangle((x, y, x + THUMBNAIL_PX - 1, y + THUMBNAIL_PX - 1), fill="whitesmoke")
                draw.text((x + THUMBNAIL_PX / 2, y + THUMBNAIL_PX / 2), "no picture", fill="dimgrey", anchor="mm")
            else:
                sheet.paste(picture, (x + (THUMBNAIL_PX - picture.width) // 2, y + THUMBNAIL_PX - picture.height))
            lines = [_wrapped(draw, Path(name).name, 1), _wrapped(draw, detail, LINES - 1)]
            draw.text((x, y + THUMBNAIL_PX + 2), lines[0], fill="black")
            draw.text((x, y + THUMBNAIL_PX + 2 + LINE_PX), lines[1], fill="dimgrey", spacing=2)
    return sheet


def _rows(finding: Finding) -> list[list[tuple[str, str]]]:
    """(file, detail) in rows, `MOST_THUMBNAILS` in all."""
    said = dict(zip(finding.files, finding.details or ("",) * len(finding.files), strict=True))
    rows, left = [], MOST_THUMBNAILS
    for group in finding.groups or (finding.files,):
        shown = [(name, said[name]) for name in group[:left]]
        rows += [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
        left -= len(shown)
    return rows


def _wrapped(draw: ImageDraw.ImageDraw, text: str, most: int) -> str:
    """Text as the sheet's plain font can write it, in at most so many lines as wide as a thumbnail.

    Line breaks in a name are blanks: only lines by themselves can be measured.
    """
    text = " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if lines[-1] and draw.textlength(lines[-1] + word.rstrip()) > THUMBNAIL_PX:
            lines.append("")
        lines[-1] += word
    kept = [line.rstrip() for line in lines[:most]]
    kept[-1] += " ..." if len(lines) > most else ""
    return "\n".join(_cut(draw, line) for line in kept)


def _cut(draw: ImageDraw.ImageDraw, line: str) -> str:
    """A line that is too wide loses its middle: a file's name tells by its beginning and its end."""
    if draw.textlength(line) <= THUMBNAIL_PX:
        return line
    n = next(
        n for n in range(len(line), 0, -1) if draw.textlength(f"{line[: n // 2]}...{line[-(n // 2) :]}") <= THUMBNAIL_PX
    )
    return f"{line[: n // 2]}...{line[-(n // 2) :]}"


def _thumbnail(path: Path) -> Image.Image | None:
    try:
        image = open_image(path)
    except (DataError, OSError):
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image
