"""What an audit leaves to look at: the table of findings, `audit.json`, and a sheet of thumbnails per finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .dataset import open_image
from .errors import DataError
from .findings import AuditResult, Finding
from .run import replacing, to_json, write_atomic
from .terminal import format_table

AUDIT_FILE = "audit.json"
THUMBNAIL_PX, COLUMNS, MOST_THUMBNAILS, LINE_PX = 128, 8, 64, 14
MOST_NAMED = 3  # files of a finding in the terminal


def findings_table(result: AuditResult) -> str:
    """Findings by severity with their sentence and advice; a line that says so where there is none."""
    counts = ", ".join(f"{sum(classes.values()):,} {split}" for split, classes in result.counts.items())
    head = f"{result.pictures:,} pictures ({counts}), {len(result.class_names):,} classes"
    if not result.findings:
        return f"{head}: nothing was found."
    rows = [[one.severity, one.kind, one.title] for one in result.findings]
    table = format_table(["severity", "what", "in words"], rows, left=3)
    advice = "\n".join(f"{one.kind}: {one.advice}{_named(one.files)}" for one in result.findings)
    return f"{head}\n\n{table}\n\n{advice}"


def _named(files: Sequence[str]) -> str:
    """A line with the first files; the sheets and audit.json have all of them."""
    more = f" and {len(files) - MOST_NAMED:,} more" if len(files) > MOST_NAMED else ""
    return f"\n    {', '.join(files[:MOST_NAMED])}{more}" if files else ""


def write_audit(result: AuditResult, folder: str | Path) -> Path:
    """Write `audit.json` and `KIND.jpg` for each finding about files; returns the path of audit.json.

    Files of those names in the folder are replaced.
    """
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / AUDIT_FILE, to_json(result.to_dict(), indent=1) + b"\n")
    for finding in result.findings:
        sheet = draw_sheet(finding, Path(result.root))
        if sheet is not None:
            with replacing(folder / f"{finding.kind}.jpg") as temporary, temporary.open("xb") as file:
                sheet.save(file, "JPEG", quality=85)
    return folder / AUDIT_FILE


def draw_sheet(finding: Finding, root: Path) -> Image.Image | None:
    """A sheet of the finding's first pictures, the groups of one row after another; None where none can be shown."""
    if finding.kind == "unreadable":  # what crashed or hung a checking process is not opened in this one
        return None
    cells = _cells(finding)
    shown = [(name, detail, _thumbnail(root / name)) for name, detail in cells]
    if not any(picture is not None for _, _, picture in shown):
        return None
    step_x, step_y = THUMBNAIL_PX + 8, THUMBNAIL_PX + 2 * LINE_PX + 8
    sheet = Image.new("RGB", (min(COLUMNS, len(shown)) * step_x, -(-len(shown) // COLUMNS) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, detail, picture) in enumerate(shown):
        x, y = i % COLUMNS * step_x + 4, i // COLUMNS * step_y + 4
        if picture is not None:
            sheet.paste(picture, (x, y))
        draw.text((x, y + THUMBNAIL_PX), _fit(Path(name).name), fill="black")
        draw.text((x, y + THUMBNAIL_PX + LINE_PX), _fit(detail), fill="dimgrey")
    return sheet


def _cells(finding: Finding) -> Sequence[tuple[str, str]]:
    details = finding.details or ("",) * len(finding.files)
    return list(zip(finding.files, details, strict=True))[:MOST_THUMBNAILS]


def _fit(text: str) -> str:
    """Text as the sheet's plain font can write it, cut to the width of a thumbnail."""
    return text.encode("latin-1", "replace").decode("latin-1")[: THUMBNAIL_PX // 6]


def _thumbnail(path: Path) -> Image.Image | None:
    try:
        image = open_image(path)
    except (DataError, OSError):
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image
