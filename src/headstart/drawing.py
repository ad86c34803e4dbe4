"""What all that matplotlib draws shares: figures without pyplot, text that can be drawn, files by their ending."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError, near_matches
from .files import check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg")


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches; it goes when nobody holds it any more."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure."""
    return ax if ax is not None else new_figure(width, height).add_subplot()


def drawable(text: object) -> str:
    """Text that matplotlib can draw: bytes of a file name that are no valid Unicode become question marks."""
    return str(text).encode("utf-8", "replace").decode()


def rendered(sheet: Figure, ending: str) -> bytes:
    """The figure in this format."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes, which is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        sheet.savefig(buffer, format=ending, dpi=110)
    return buffer.getvalue()


def picture_path(what: str, out_path: str | Path) -> tuple[Path, str]:
    """The path and its format."""
    path = Path(out_path)
    ending = path.suffix.lower().lstrip(".") or "png"
    if ending not in FORMATS:
        raise DataError(
            f"{what} {path}: the ending is {path.suffix!r}; allowed: {', '.join(FORMATS)}."
            f"{near_matches(ending, FORMATS)}"
        )
    return path, ending


def check_picture(what: str, out_path: str | Path) -> None:
    """Refuse a file that no picture can be written to, before the work that the picture is to show.

    Raises:
        DataError: another ending than those of `FORMATS`. CheckpointError: see `files.check_target`.
    """
    check_target(picture_path(what, out_path)[0])
