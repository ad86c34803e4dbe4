"""`DataSpec`: how a backbone wants its pictures; what Pillow makes of them, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ModelError, near_matches
from .portable import MAX_ASPECT, RESAMPLING, centre_crop, mean_colour

FITS = ("crop", "squash", "letterbox")

# A working image has this many times the pixels per side that the evaluation view needs. The mean random resized
# crop of the default policy takes a window of about 0.87 of the side (area 0.5 .. 1), so the views are cut at about
# one pixel to one: neither blurred by enlarging nor aliased by shrinking, and no larger to keep than that takes.
WORKING_MARGIN = 1.15
# A picture that shrinks by twice this or more to its working image is averaged in whole blocks first: within two grey
# levels of shrinking at once, in half to a fifth of the time (`benchmarks/large_pictures.py`).
REDUCING_GAP = 2.0
PixelArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DataSpec:
    """What a backbone expects of its input; it travels with the model.

    image_size: side S of the square view, pixels. mean, std: per RGB channel, on the 0-1 scale. interpolation:
    `nearest`, `bilinear`, `bicubic` or `lanczos`. crop_pct: share of the short side that the view shows, in (0, 1];
    used by fit `crop` alone. fit: `crop` keeps the aspect and cuts the centre square, `squash` maps the whole picture
    to the square, `letterbox` keeps the whole picture and its aspect and pads with the mean colour.

    Raises:
        ModelError: a value out of range.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    fit: str = "crop"

    def __post_init__(self) -> None:
        _require("image_size", self.image_size, _is_whole(self.image_size, 8, 4096), "a whole number from 8 to 4096")
        for name, low in (("mean", 0.0), ("std", 1e-4)):
            value = getattr(self, name)
            is_triple = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
            is_good = is_triple and all(_is_number(v, low, 1.0) for v in value)
            _require(name, value, is_good, f"three numbers from {low:g} to 1, for red, green and blue")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        _require("crop_pct", self.crop_pct, _is_number(self.crop_pct, 0.01, 1.0), "a number from 0.01 to 1")
        for name, allowed in (("interpolation", tuple(RESAMPLING)), ("fit", FITS)):
            value = getattr(self, name)
            _require(name, value, value in allowed, ", ".join(allowed), near_matches(str(value), allowed))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataSpec:
        """Build from plain JSON values; every field is needed, no other is taken.

        Raises:
            ModelError: a missing or unknown key, a value out of range.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise ModelError(f"DataSpec: expected an object with {', '.join(names)}; got {data!r}.")
        for key in data:
            if key not in names:
                raise ModelError(f"DataSpec: unknown key {key!r}. Known: {', '.join(names)}.{near_matches(key, names)}")
        missing = [name for name in names if name not in data]
        if missing:
            raise ModelError(f"DataSpec: missing {', '.join(missing)}. Needed: {', '.join(names)}.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is its inverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour as 8-bit RGB: what letterbox pads with, about 0 after normalisation."""
        return mean_colour(self.mean)


def working_image_by_pillow(image: Image.Image, spec: DataSpec) -> PixelArray | None:
    """The working image (see `transforms.working_image`) where Pillow makes it; None: PyTorch's resizing is quicker."""
    size = working_size(image.width, image.height, spec)
    if size == image.size:
        return np.array(image)
    shrink = max(image.width / size[0], image.height / size[1])
    if spec.interpolation not in ("bilinear", "bicubic") or shrink >= 2 * REDUCING_GAP:
        return np.array(image.resize(size, RESAMPLING[spec.interpolation], reducing_gap=REDUCING_GAP))
    return None


def shown_box(width: int, height: int, spec: DataSpec) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the evaluation view shows of a picture, in its pixels.

    With `letterbox` the box is the padded square and reaches beyond the picture.
    """
    if spec.fit == "squash":
        return 0.0, 0.0, float(width), float(height)
    if spec.fit == "letterbox":
        side = max(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    wide, high, left, top = centre_crop(width, height, spec)
    x, y = width / wide, height / high
    return left * x, top * y, (left + spec.image_size) * x, (top + spec.image_size) * y


def working_size(width: int, height: int, spec: DataSpec) -> tuple[int, int]:
    """Width and height of the `working_image` of a picture of this size."""
    size = spec.image_size
    if spec.fit == "squash":  # the view maps each side to S on its own, so each is shrunk on its own
        most = round(WORKING_MARGIN * size)
        return min(max(width, size), most), min(max(height, size), most)
    needed = math.floor(size / spec.crop_pct) if spec.fit == "crop" else size
    side = min(width, height) if spec.fit == "crop" else max(width, height)
    scale = min(max(side, needed), round(WORKING_MARGIN * needed)) / side
    scale = min(scale, MAX_ASPECT * needed / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def _require(name: str, value: object, is_good: bool, allowed: str, hint: str = "") -> None:
    if not is_good:
        raise ModelError(f"DataSpec: {name} is {value!r}; it takes {allowed}.{hint}")
