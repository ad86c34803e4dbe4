"""The one decoder: file bytes in, an upright RGB picture out, or the reason why not."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: above every camera's picture, below what fills the memory

_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_NO_WHITE = ("F", "LAB", "HSV")  # modes without an agreed white, or without a conversion in Pillow
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<svg")

_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filter: object = None


def open_image(source: str | Path | bytes) -> Image.Image:
    """Decode one picture to upright 8-bit RGB; the content decides the format, not the file's name.

    Reads the first frame of JPEG, PNG, WebP, BMP, GIF and TIFF. EXIF orientation is applied, transparency is laid
    on white, 16-bit grey is scaled by 1/257 (not clipped), CMYK, palette and greyscale become RGB. Colour profiles
    are ignored, as timm and torchvision do.

    Args:
        source: a file, or a file's bytes.
    Raises:
        DataError: missing, empty, cut off, damaged, of another format, or above `MAX_PIXELS` by its header (found
            before anything is decoded).
    """
    try:
        return _read(source)
    except DataError as error:
        name = f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
        raise DataError(f"Picture {name}: {error}.") from None


def bad_reason(path: Path) -> str | None:
    """Why `open_image` refuses this file, in bare words; None when it decodes to the last row."""
    try:
        _read(path)
    except DataError as error:
        return str(error)
    return None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings are off while any thread is inside.

    They concern metadata (a broken EXIF entry) or sizes that `MAX_PIXELS` governs, and a picture must not be good or
    bad by the caller's warning filters. `warnings.catch_warnings` is not safe in threads: it restores a list that
    another thread has changed meanwhile.
    """
    global _quiet_depth, _quiet_filter
    with _quiet_lock:
        _quiet_depth += 1
        if _quiet_depth == 1:
            warnings.filterwarnings("ignore", module=r"PIL\.(?#headstart)")  # the comment makes the entry ours alone
            _quiet_filter = warnings.filters[0]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_filter in warnings.filters:
                warnings.filters.remove(_quiet_filter)  # type: ignore[attr-defined]


def _read(source: str | Path | bytes) -> Image.Image:
    """`open_image` with bare reasons."""
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source))
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _decode(file)
    except FileNotFoundError:
        raise DataError("a link to nowhere" if path.is_symlink() else "no such file") from None
    except IsADirectoryError:
        raise DataError("a folder, not a file") from None
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None


def _decode(file: BinaryIO) -> Image.Image:
    with quiet_pillow():
        try:
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _to_rgb(_upright(image))
        except Image.DecompressionBombError:
            raise DataError(f"its header promises more than {MAX_PIXELS:,} pixels; shrink it first") from None
        except (DataError, MemoryError):
            raise
        except Exception as error:  # a decoder fed with damaged bytes raises nearly anything
            raise DataError(_why(error, file)) from None


def _why(error: Exception, file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(64)
    if not start:
        return "an empty file (0 bytes)"
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged or cut off ({error or type(error).__name__})"
    if start.startswith(_MAGIC):
        return "damaged or cut off within its header"
    known = "JPEG, PNG, WebP, BMP, GIF or TIFF"
    if start.lstrip().lower().startswith(_MARKUP):
        return f"a web page or SVG text, not a {known} picture (a failed download?)"
    if start[4:8] == b"ftyp":
        return f"a HEIC, AVIF or video file; convert it to {known}"
    return f"not a {known} picture"


def _upright(image: Image.Image) -> Image.Image:
    """The picture as the camera was held. `ImageOps.exif_transpose` would also rewrite the EXIF block, and fails on
    blocks that hold nonsense beside the orientation."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable metadata say nothing about the pixels
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _NO_WHITE:
        raise DataError(f"{image.mode} pixels, which have no agreed white; convert it to 8 or 16 bit")
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise DataError("32-bit pixels beyond the 16-bit range; convert it to 8 or 16 bit")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
