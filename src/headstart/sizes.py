"""How large the pictures are beside the backbone's input, from their headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .portable import FORMATS

MEASURED = 2000  # pictures; the share is then known to about 2 percentage points
TOLD_FROM = 0.1  # share of small pictures that is worth a sentence


def picture_sizes(paths: Sequence[Path], *, limit: int = MEASURED) -> npt.NDArray[np.int64]:
    """Width and height in px, as stored, of at most `limit` pictures evenly spaced over `paths`: int64 [n, 2].

    Files whose header cannot be read are left out.
    """
    step = max(1, -(-len(paths) // limit))
    sizes = []
    for path in paths[::step]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sizes.append(image.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def input_sizes(paths: Sequence[Path], image_size: int) -> dict[str, Any]:
    """What `metrics.json` says of sizes: the share of pictures whose shorter side is below the input, and medians."""
    sizes = picture_sizes(paths)
    if not len(sizes):
        return {}
    width, height = np.median(sizes, axis=0)
    return {
        "input_px": image_size,
        "measured": len(sizes),
        "smaller": float((sizes.min(axis=1) < image_size).mean()),
        "median_width_px": int(width),
        "median_height_px": int(height),
    }


def small_pictures_sentence(sizes: dict[str, Any]) -> str:
    """One sentence where many pictures are scaled up to reach the input's size, else ''."""
    if not sizes or sizes["smaller"] < TOLD_FROM:
        return ""
    median = f"{sizes['median_width_px']} x {sizes['median_height_px']} px"
    return (
        f"{100 * sizes['smaller']:.0f} % of the training pictures are smaller than the backbone's input of"
        f" {sizes['input_px']} px and are scaled up (median {median}): they hold less detail than it was trained on."
    )
