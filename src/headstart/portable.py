"""From a picture's file to what a model says of it, with Pillow and NumPy alone, and what runs the model beside them.

headstart itself turns, converts and cuts pictures with these lines, and `headstart export` lays a copy of the file
beside every exported model: training, prediction and deployment see the same pixels.

    python predict.py model.onnx PHOTO...

needs `pip install onnxruntime "pillow>=10.1" numpy`; a model.pt2 needs PyTorch in place of ONNX Runtime.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:  # NumPy is imported where it is needed: processes that only decode start the quicker without
    import numpy as np
    from numpy.typing import NDArray

Source = str | Path | bytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_ASPECT = 8  # a strip longer than this is worked on at lower resolution, lest one strip fills the memory
DESCRIPTION = "headstart.json"  # under this name a model file holds what is needed beside its tensors

_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_NO_WHITE = ("F", "LAB", "HSV")  # modes without an agreed white, or without a conversion in Pillow
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<svg")
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


class UnfitPicture(ValueError):
    """Pixels of which nobody knows what they look like; the message says why, in bare words."""


# ---- from a file to an upright RGB picture ---------------------------------------------------------------------


def read_picture(source: Source) -> Image.Image:
    """One picture, upright, 8-bit RGB: as `headstart.open_image` reads it with Pillow, without its limits on size."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(why_unidentified(data[:64])) from None
    image.load()
    return to_rgb(upright(image, like=image))


def why_unidentified(start: bytes) -> str:
    """What a file may be that Pillow knows no format of, by its first 64 bytes, in bare words."""
    if not start:
        return "an empty file (0 bytes)"
    if start.startswith(_MAGIC):
        return "damaged or cut off within its header"
    known = "JPEG, PNG, WebP, BMP, GIF or TIFF"
    if start.lstrip().lower().startswith(_MARKUP):
        return f"a web page or SVG text, not a {known} picture (a failed download?)"
    if start[4:8] == b"ftyp":
        return f"a HEIC, AVIF or video file; convert it to {known}"
    return f"not a {known} picture"


def upright(image: Image.Image, *, like: Image.Image) -> Image.Image:
    """The picture as the camera was held, by what `like`, the opened file, says.

    `ImageOps.exif_transpose` would also rewrite the EXIF block, and fails on blocks that hold nonsense beside the
    orientation.
    """
    try:
        orientation = like.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable metadata say nothing about the pixels
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in 8-bit RGB: transparency is laid on white, 16-bit grey scaled by 1/257, not clipped.

    Raises:
        UnfitPicture: pixels without an agreed white.
    """
    if image.mode in _NO_WHITE:
        raise UnfitPicture(f"{image.mode} pixels, which have no agreed white; convert it to 8 or 16 bit")
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    import numpy as np

    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise UnfitPicture("32-bit pixels beyond the 16-bit range; convert it to 8 or 16 bit")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


# ---- from a picture to the pixels that a network sees ----------------------------------------------------------


def evaluation_view(image: Image.Image, spec: Any) -> NDArray[np.uint8]:
    """The one view that validation, test and prediction see: uint8 [S, S, 3], antialiased.

    `crop` is what timm and torchvision do: the short side to floor(S / crop_pct), then the centre S x S.

    Args:
        spec: a `headstart.DataSpec`, or anything with its `image_size`, `mean`, `interpolation`, `crop_pct` and `fit`.
    """
    import numpy as np

    size, resample = spec.image_size, RESAMPLING[spec.interpolation]
    if spec.fit == "squash":
        return np.array(image.resize((size, size), resample))
    if spec.fit == "letterbox":
        return np.array(_letterbox(image, spec))
    image = _centre_strip(image)
    wide, high, left, top = centre_crop(image.width, image.height, spec)
    return np.array(image.resize((wide, high), resample).crop((left, top, left + size, top + size)))


def centre_crop(width: int, height: int, spec: Any) -> tuple[int, int, int, int]:
    """To what size the whole picture is resized, and left and top of the view in it; rounded as in timm."""
    short = math.floor(spec.image_size / spec.crop_pct)
    wide, high = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return wide, high, round((wide - spec.image_size) / 2), round((high - spec.image_size) / 2)


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """The mean colour as 8-bit RGB: what letterbox pads with, about 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def _centre_strip(image: Image.Image) -> Image.Image:
    """A very long strip is cut around its centre before it is resized: the view shows no more of it."""
    most = MAX_ASPECT * min(image.size)
    if max(image.size) <= most:
        return image
    wide, high = min(image.width, most), min(image.height, most)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _letterbox(image: Image.Image, spec: Any) -> Image.Image:
    size = spec.image_size
    scale = size / max(image.size)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (size, size), mean_colour(spec.mean))
    canvas.paste(image.resize(inner, RESAMPLING[spec.interpolation]), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return canvas


# ---- from pixels to labels: an exported model ------------------------------------------------------------------


class Exported:
    """A model that `headstart export` wrote, asked about pictures.

    Attributes:
        class_names: one name per probability. spec: how the model wants its pictures.
        run: pixels uint8 [N, 3, S, S] -> probabilities and logits, both float32 [N, C].
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        """Open model.onnx or model.pt2; options go to ONNX Runtime's `InferenceSession`, such as `providers`."""
        path = Path(path)
        opened = {".onnx": _open_onnx, ".pt2": _open_pt2}.get(path.suffix)
        if opened is None:
            raise ValueError(f"{path}: expected a model.onnx or a model.pt2, as `headstart export` writes them.")
        described, self.run = opened(path, **options)
        told = json.loads(described)
        self.class_names: list[str] = told["class_names"]
        self.spec = SimpleNamespace(**told["preprocessing"])
        self.at_once: int = 1 if told["one_at_a_time"] else 16

    def probs(self, sources: Source | Iterable[Source]) -> NDArray[np.float32]:
        """Probabilities [N, C] of pictures, given as files or as files' bytes; one alone makes one row."""
        return self.answers(sources)[0]

    def answers(self, sources: Source | Iterable[Source]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probabilities and logits, both [N, C]."""
        import numpy as np

        named = [sources] if isinstance(sources, (str, Path, bytes)) else list(sources)
        probs, logits = (np.zeros((len(named), len(self.class_names)), np.float32) for _ in range(2))
        for i in range(0, len(named), self.at_once):
            rows = slice(i, i + self.at_once)
            views = [evaluation_view(read_picture(one), self.spec).transpose(2, 0, 1) for one in named[rows]]
            probs[rows], logits[rows] = self.run(np.stack(views))
        return probs, logits


def _open_onnx(path: Path, **options: Any) -> tuple[str, Callable[..., Any]]:
    import onnxruntime

    path.stat()  # a missing file is told as one
    session = onnxruntime.InferenceSession(path, **{"providers": ["CPUExecutionProvider"], **options})
    described = session.get_modelmeta().custom_metadata_map[DESCRIPTION]
    return described, lambda pixels: session.run(["probs", "logits"], {"pixels": pixels})


def _open_pt2(path: Path) -> tuple[str, Callable[..., Any]]:
    import torch

    told = {DESCRIPTION: ""}
    network = torch.export.load(path, extra_files=told).module()

    def run(pixels: NDArray[np.uint8]) -> Any:
        with torch.inference_mode():
            return [output.numpy() for output in network(torch.from_numpy(pixels.copy()))]

    return told[DESCRIPTION], run


def main(arguments: Sequence[str]) -> int:
    """Print a line for each picture: the file, its label and the label's probability.

    Returns:
        The exit code: 2 where a picture could not be read, or nothing could be asked.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that a terminal lacks letters for
            stream.reconfigure(errors="backslashreplace")
    if len(arguments) < 2:
        is_asked = list(arguments) in (["-h"], ["--help"])
        print(__doc__, file=sys.stdout if is_asked else sys.stderr)
        return 0 if is_asked else 2
    try:
        model = Exported(arguments[0])
    except Exception as error:  # whatever a runtime raises over a file that it does not take
        print(f"{arguments[0]} cannot be opened: {error or type(error).__name__}", file=sys.stderr)
        return 2
    unread = 0
    for name in arguments[1:]:
        try:
            row = model.probs(name)[0]
        except Exception as error:  # a decoder fed with damaged bytes raises nearly anything
            print(f"{name} cannot be read: {error or type(error).__name__}", file=sys.stderr)
            unread += 1
            continue
        print(f"{name}\t{model.class_names[row.argmax()]}\t{row.max():.4f}", flush=True)
    return 2 if unread else 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # whoever reads the lines has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python would write at its end
        code = 0
    sys.exit(code)
