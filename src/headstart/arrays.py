"""Pictures that are in memory, NumPy arrays or PIL pictures, made into files that all else works on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .dataset import ImageTable, load_images
from .decode import png_picture
from .errors import DataError
from .prepared import PictureWriter, prepared_folder

Pictures = npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8] | Image.Image]
Labels = Sequence[int | str] | npt.NDArray[Any]


def images_from_arrays(
    images: Pictures,
    labels: Labels,
    *,
    class_names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> ImageTable:
    """A table of pictures that are in memory, in their order; they are written losslessly as PNG into the cache, once.

    So the one function that prepares pictures from bytes serves here, too, and a run names its pictures.

    Args:
        images: uint8 [N, H, W, 3], [N, H, W] or [N, H, W, 1], values 0 .. 255; or one such array, or PIL picture, per
            picture, of any sizes.
        labels: one per picture: class names or numbers. With `class_names`, numbers are positions in it.
        class_names: the class map; None makes one of the labels, naturally sorted.
        groups: per picture the group that stays on one side of every split, '' or None for a picture by itself.
    Raises:
        DataError: other numbers than uint8, another shape, not one label per picture, a label
            that is missing or has no name; modes of PIL pictures that are refused in files, too.
    """
    words = _words(labels, class_names)
    belong = ["" if _is_missing(one) else str(one) for one in groups] if groups is not None else [""] * len(words)
    if not len(images) == len(words) == len(belong):
        beside = f" and {len(belong):,} groups" if groups is not None else ""
        raise DataError(f"{len(images):,} pictures, {len(words):,} labels{beside}; it takes one of each per picture.")
    if not words:
        raise DataError("There are no pictures: images and labels are empty.")
    digest = hashlib.sha256()
    for picture, word, group in zip(pictures_of(images), words, belong, strict=True):
        digest.update(repr((picture.mode, picture.size, word, group)).encode())
        digest.update(picture.tobytes())

    def fill(folder: Path) -> None:
        writer = PictureWriter(folder)
        for picture, word, group in zip(pictures_of(images), words, belong, strict=True):
            writer.add(picture, word, group=group)
        writer.finish()

    folder = prepared_folder(f"arrays-{digest.hexdigest()[:32]}", fill)
    table = load_images(folder / PictureWriter.MANIFEST, class_names=class_names, check=False)
    return table.select(np.argsort([int(path.stem) for path in table.paths]))  # files are called by their place


def _words(labels: Labels, class_names: Sequence[str] | None) -> list[str]:
    try:
        shape: tuple[int, ...] | str = np.shape(labels)
    except ValueError:  # lists of several lengths
        shape = "of several lengths"
    if len(shape) != 1:
        raise DataError(
            f"labels have shape {shape}; it takes one per picture, [N]. Of one-hot labels take labels.argmax(axis=1); "
            "several labels per picture (multi-label) are not supported."
        )
    return [_word(label, number, class_names) for number, label in enumerate(labels)]


def _word(label: Any, number: int, class_names: Sequence[str] | None) -> str:
    """One label as a class name: 3 and 3.0 are '3', as in a manifest."""
    if hasattr(label, "item"):  # a scalar of NumPy or PyTorch
        label = label.item()
    if _is_missing(label):
        raise DataError(f"label {number} is {label}; it takes one per picture. Leave out the pictures without one.")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str) or class_names is None:
        return str(label)
    if not isinstance(label, int):
        raise DataError(f"label {number} is {label}; with class_names it takes a name, or a whole number from 0.")
    if not 0 <= label < len(class_names):
        raise DataError(f"label {label} has no name: class_names has {len(class_names)}, from 0.")
    return str(class_names[label])


def _is_missing(value: Any) -> bool:
    """None, NaN, or what pandas has in their place."""
    return value is None or str(value) == "<NA>" or bool(value != value)


def pictures_of(images: Pictures) -> Iterator[Image.Image]:
    """Each as a PIL picture whose bytes are its pixels: upright, without a palette."""
    for number, item in enumerate(images):
        if isinstance(item, Image.Image):
            try:
                picture = png_picture(item)
            except DataError as error:
                raise DataError(f"picture {number}: {error}.") from None
            yield (
                picture.convert("RGBA" if picture.has_transparency_data else "RGB") if picture.mode == "P" else picture
            )
            continue
        if isinstance(item, (str, os.PathLike)):
            raise DataError(
                f"picture {number} is a path ({item}), but beside labels pictures are in memory. Of paths and labels"
                " make a manifest, write_manifest([ManifestRow(Path(path), label), ...], 'photos.csv'), and give that."
            )
        array = np.asarray(item)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
            raise DataError(
                f"picture {number} is {array.dtype} {list(array.shape)}; it takes uint8 [H, W, 3] or [H, W], values "
                "0 .. 255. Of floats from 0 to 1 take (images * 255).round().astype('uint8'); of [3, H, W] take "
                "images.transpose(0, 2, 3, 1)."
            )
        if not array.size:
            raise DataError(f"picture {number} is uint8 {list(array.shape)}; it has no pixels. Leave it out.")
        yield Image.fromarray(array)
