"""The one decoder: file bytes in, an upright RGB picture out, or the reason why not."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

# Imported by name, so that Pillow need not load all its plugins to know these formats.
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from .errors import DataError, SetupError
from .portable import FORMATS, UnfitPicture, to_rgb, upright, why_unidentified

PIXELS_VARIABLE = "HEADSTART_MAX_PIXELS"
DECODER_VARIABLE = "HEADSTART_DECODER"
DECODERS = ("pillow", "simplejpeg", "torchcodec")
PILLOWS_PIXELS = 178_956_970  # above this Pillow itself refuses


def _pixel_cap() -> int:
    """64 Mpx (8192 x 8192), below where Pillow starts to warn; the environment may say otherwise."""
    text = os.environ.get(PIXELS_VARIABLE, "")
    if not text:
        return 64 << 20
    if not text.isdecimal() or not 1 <= int(text) <= PILLOWS_PIXELS:
        raise SetupError(f"{PIXELS_VARIABLE} is {text!r}; it takes a whole number of pixels up to {PILLOWS_PIXELS:,}.")
    return int(text)


def _chosen_decoder() -> str:
    name = os.environ.get(DECODER_VARIABLE, "") or "pillow"
    if name not in DECODERS:
        raise SetupError(f"{DECODER_VARIABLE} is {name!r}; it takes {', '.join(DECODERS[:-1])} or {DECODERS[-1]}.")
    if name != "pillow" and find_spec(name) is None:
        raise SetupError(f"{DECODER_VARIABLE} is {name!r}, which is not installed. Run: pip install {name}")
    return name


MAX_PIXELS = _pixel_cap()
DECODER = _chosen_decoder()  # of colour JPEG files; Pillow reads their headers, and all other files
MAX_BYTES = 512 << 20  # of a file: a picture of `MAX_PIXELS` without compression at 16 bits per channel

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

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
        DataError: missing, no regular file, empty, cut off, damaged, of another format, longer than `MAX_BYTES`, or
            above `MAX_PIXELS` by its header (found before anything is decoded).
    """
    try:
        return _read(source)
    except DataError as error:
        name = f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
        raise DataError(f"Picture {name}: {error}.") from None


def png_picture(image: Image.Image) -> Image.Image:
    """A picture in memory, upright, in a mode of PNG files: read back it is what `open_image` makes of such pixels.

    Raises:
        DataError: pixels that are refused in files, too, in bare words.
    """
    from PIL import ImageOps  # here, where no file is decoded

    turned = ImageOps.exif_transpose(image)  # PNG files keep no orientation; what is upright stays so in a second call
    return turned if turned.mode in _PNG_MODES else as_rgb(turned)


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in 8-bit RGB, by the rules of `open_image`.

    Raises:
        DataError: pixels without an agreed white, in bare words.
    """
    try:
        return to_rgb(image)
    except UnfitPicture as error:
        raise DataError(str(error)) from None


def bad_reason(source: Path | bytes) -> str | None:
    """Why `open_image` refuses this file, in bare words; None when it decodes to the last row."""
    try:
        _read(source)
    except DataError as error:
        return str(error)
    return None


def decoder_version() -> str:
    """What reads the pixels of JPEG files, beside Pillow's own version."""
    return DECODER if DECODER == "pillow" else f"{DECODER} {version(DECODER)}"


def import_decoder() -> None:
    """Import what reads JPEG files now, and not with the first of them: torchcodec brings all of PyTorch.

    Raises:
        SetupError: it cannot be imported, or is too old.
    """
    if DECODER == "pillow":
        return
    try:
        import_module({"torchcodec": "torchcodec.decoders"}.get(DECODER, DECODER)).decode_jpeg  # noqa: B018
    except Exception as error:  # whatever a library raises that misses another one
        words = (str(error) or type(error).__name__).splitlines()[0]
        needed = "torchcodec 0.16 or newer" if DECODER == "torchcodec" else DECODER
        raise SetupError(
            f"{DECODER_VARIABLE} is {DECODER!r}, which does not work here ({words}): {needed} is needed."
        ) from None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings are off while any thread is inside.

    They concern metadata (a broken EXIF entry, which counts as absent) or sizes, for which `MAX_PIXELS` is the stricter
    rule; and a picture must not be good or bad by the caller's warning filters. `warnings.catch_warnings` is not safe
    in threads: it restores a list that another thread has changed meanwhile.
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
        _check_length(len(source))
        return _decode(io.BytesIO(source))
    with _opened(Path(source)) as file:
        return _decode(file)


def file_bytes(path: Path) -> bytes:
    """A picture file's bytes, which may be any.

    Raises:
        DataError: why they cannot be read, in bare words.
    """
    with _opened(path) as file:
        return file.read()


def picture_of(data: bytes) -> Image.Image:
    """The picture that `open_image` makes of a file's bytes.

    Raises:
        DataError: why not, in bare words.
    """
    return _read(data)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A picture's file; what is wrong with it, in bare words, as a `DataError`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise DataError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        _check_length(status.st_size)
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError("a link to nowhere" if path.is_symlink() else "no such file") from None
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None


def _check_length(nbytes: int) -> None:
    if nbytes > MAX_BYTES:
        raise DataError(f"a file of {nbytes:,} bytes; pictures of up to {MAX_BYTES:,} are read")


def _decode(file: BinaryIO) -> Image.Image:
    import_decoder()  # no file is blamed for it
    with quiet_pillow():
        try:
            if _webp_pixels(file) > MAX_PIXELS:  # Pillow sets its memory aside before it tells the size
                raise Image.DecompressionBombError
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return as_rgb(upright(_loaded(image, file), like=image))
        except Image.DecompressionBombError:
            raise DataError(
                f"its header promises more than {MAX_PIXELS:,} pixels; shrink it first (or set {PIXELS_VARIABLE})"
            ) from None
        except (DataError, MemoryError):
            raise
        except Exception as error:  # a decoder fed with damaged bytes raises nearly anything
            raise DataError(_why(error, file)) from None


def _loaded(image: Image.Image, file: BinaryIO) -> Image.Image:
    """The picture with its pixels, which Pillow or another decoder reads to the last row, or raises."""
    if DECODER == "pillow" or (image.format, image.mode) != ("JPEG", "RGB"):
        image.load()
        return image
    file.seek(0)
    if DECODER == "simplejpeg":
        from simplejpeg import decode_jpeg

        return Image.fromarray(decode_jpeg(file.read(), "RGB", fastdct=False, fastupsample=False))
    from torchcodec.decoders import decode_jpeg as decode_upright

    # It turns the picture by its EXIF orientation, which `upright` does for all decoders alike.
    return Image.fromarray(decode_upright(_without_exif(file.read())).permute(1, 2, 0).numpy())


def _without_exif(data: bytes) -> bytes:
    """A JPEG file's bytes without the APP1 blocks (EXIF) in front of its pixels. Source: ITU-T T.81, annex B."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # fill bytes, and what decoders skip between blocks
            at += 1
            continue
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if data[at + 1] != 0xE1:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _webp_pixels(file: BinaryIO) -> int:
    """Pixels of a WebP file's canvas by its header; 0 for any other file. Source: RFC 9649, section 2."""
    start = file.read(30)
    file.seek(0)
    if len(start) < 30 or start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return 0
    kind, body = start[12:16], start[20:]
    if kind == b"VP8X":
        return (1 + int.from_bytes(body[4:7], "little")) * (1 + int.from_bytes(body[7:10], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    return (int.from_bytes(body[6:8], "little") & 0x3FFF) * (int.from_bytes(body[8:10], "little") & 0x3FFF)


def _why(error: Exception, file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(64)
    if start and not isinstance(error, UnidentifiedImageError):
        return f"damaged or cut off ({error or type(error).__name__})"
    return why_unidentified(start)
