"""Sheets of pictures: a batch with its labels, for notebooks, and the preview of augmentations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dataset import ImageTable
from .drawing import axes_or_new, drawable, new_figure, picture_path, rendered
from .errors import DataError
from .files import write_atomic
from .recipe import AugmentSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .dataspec import DataSpec

_SHEET = 9  # pictures, and augmentations of the first of them
_PLAIN_PX = 224


def show_batch(
    images: ImageTable | ArrayLike | Sequence[Any],
    labels: Sequence[Any] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    n: int = _SHEET,
    spec: DataSpec | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw pictures with their class names into one axes.

    Args:
        images: a table, of which `n` pictures spread over the classes are drawn at random; or the pictures
            themselves, of which the first `n` are drawn: uint8 [N, 3, H, W], [N, H, W, 3] or, grey, [N, H, W], an
            array or a tensor, or a list of single ones (PIL images too).
        labels: what to write under each picture that is drawn, or class numbers where `class_names` are given.
        spec: with a table, show the pictures as a network with this preprocessing sees them.
        seed: which pictures of a table are drawn.
    Raises:
        DataError: no picture, a picture that cannot be read, an array that is no picture, too few labels, or one
            that is no class's number.
    """
    if isinstance(images, ImageTable):
        chosen = spread_indices(images, n, seed=seed)
        tiles = [_table_tile(images, i, spec) for i in chosen]
        titles = [images.class_names[images.labels[i]] for i in chosen]
    else:
        shape = list(getattr(images, "shape", ()))
        if len(shape) == 3 and (shape[2] in (1, 3, 4) or (labels is None and shape[0] in (1, 3, 4))):
            raise DataError(
                f"show_batch: one array of shape {shape}, which may be one picture or {shape[0]} grey ones. "
                "Give one picture in a list, grey ones as [N, 1, H, W]."
            )
        tiles = [_tile(image) for image in list(images)[:n]]  # type: ignore[arg-type]
        names = list(labels)[: len(tiles)] if labels is not None else [""] * len(tiles)
        if len(names) < len(tiles):
            raise DataError(f"show_batch: {len(names)} labels for {len(tiles)} pictures; give one for each.")
        titles = [str(k) if class_names is None else _class_name(k, class_names) for k in names]
    if not tiles:
        raise DataError("show_batch: no picture to draw (0 of 0). Give a table or a batch that holds some.")
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    return _mosaic(axes_or_new(ax, 2.2 * columns, 2.4 * rows), tiles, titles, columns)


def _class_name(label: Any, class_names: Sequence[str]) -> str:
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(class_names):
        raise DataError(
            f"show_batch: label {label!r} beside {len(class_names)} class names. Give class numbers from 0 to"
            f" {len(class_names) - 1}, or leave class_names out."
        )
    return class_names[number]


def spread_indices(table: ImageTable, n: int, *, seed: int = 0) -> list[int]:
    """`n` picture numbers of a table, drawn at random but class by class in turn, so that small classes are seen."""
    rng = np.random.default_rng(seed)
    queues = [rng.permutation(np.flatnonzero(table.labels == c)).tolist() for c in range(len(table.class_names))]
    queues = [queues[c] for c in rng.permutation(len(queues)) if queues[c]]
    chosen: list[int] = []
    while queues and len(chosen) < n:
        chosen += [int(queue.pop()) for queue in queues[: n - len(chosen)]]
        queues = [queue for queue in queues if queue]
    return chosen


def _table_tile(table: ImageTable, index: int, spec: DataSpec | None) -> NDArray[np.uint8]:
    from .dataset import open_image

    if spec is not None:
        from .transforms import load_view

        return _tile(load_view(table.paths[index], spec))
    image = open_image(table.paths[index])
    image.thumbnail((_PLAIN_PX, _PLAIN_PX))
    return np.asarray(image)


def _tile(image: Any) -> NDArray[np.uint8]:
    """One picture as uint8 [H, W, 3], from PIL, or an array or tensor with the channels first, last or, grey, none."""
    if hasattr(image, "convert"):  # by the rules for files
        from .decode import as_rgb

        image = as_rgb(image)
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(
            f"show_batch: a picture of shape {list(pixels.shape)} and type {pixels.dtype}; expected uint8 [H, W, 3], "
            "[3, H, W] or [H, W] from 0 to 255, before any normalisation."
        )
    return pixels


def _mosaic(ax: Axes, tiles: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int) -> Axes:
    """Tiles in rows, each in a unit square of the axes, with its title under it."""
    rows, step = math.ceil(len(tiles) / columns), 1.16 if any(titles) else 1.04
    for i, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        x, y = (i % columns) * 1.04, (i // columns) * step
        height, width = (side / max(tile.shape[:2]) for side in tile.shape[:2])
        left, top = x + (1 - width) / 2, y + 1 - height
        ax.imshow(tile, extent=(left, left + width, top + height, top), interpolation="antialiased")
        words = drawable(title) if len(title) <= 24 else drawable(title[:23]) + "\u2026"
        ax.text(x + 0.5, y + 1.03, words, ha="center", va="top", fontsize=9, parse_math=False)
    ax.set(xlim=(0, columns * 1.04 - 0.04), ylim=(rows * step - (0.0 if any(titles) else 0.04), 0), aspect="equal")
    ax.axis("off")
    return ax


def preview_sheet(
    table: ImageTable,
    spec: DataSpec,
    augment: str | AugmentSpec | Callable[[Any], Any],
    out_path: str | Path,
    seed: int = 0,
) -> Path:
    """Write one picture: nine labelled pictures as the network sees them, and nine augmentations of the first.

    Args:
        augment: a policy's name, an `AugmentSpec`, or any torchvision v2 transform.
        out_path: where to write; the ending (png, jpg, pdf, svg) decides the format.
        seed: which pictures, and the augmentations' random numbers.
    Raises:
        DataError: the table is empty, the ending is unknown, or a picture cannot be read.
        RecipeError: `augment` is none of these.
    """
    from .augment import as_augment, augmented_view
    from .dataset import open_image
    from .transforms import working_image

    path, ending = picture_path("Preview", out_path)
    chosen = spread_indices(table, _SHEET, seed=seed)
    if not chosen:
        raise DataError(f"Preview {path}: the table holds no picture (0). Give a folder with pictures.")
    policy = as_augment(augment)
    first = working_image(open_image(table.paths[chosen[0]]), spec)
    copies = [augmented_view(first, spec, policy, seed=seed, index=chosen[0], view=v) for v in range(1, _SHEET + 1)]
    sheet = new_figure(14.0, 7.6)
    left, right = sheet.subplots(1, 2)
    titles = [table.class_names[table.labels[i]] for i in chosen]
    _mosaic(left, [_table_tile(table, i, spec) for i in chosen], titles, 3)
    left.set_title(f"{len(chosen)} pictures as the network sees them ({spec.image_size} px)", fontsize=11)
    _mosaic(right, [_tile(copy) for copy in copies], [f"view {v}" for v in range(1, _SHEET + 1)], 3)
    kind = f"policy {augment!r}" if isinstance(augment, str) else "training only"
    right.set_title(f"{len(copies)} augmentations of the first ({kind})", fontsize=11)
    write_atomic(path, rendered(sheet, ending))
    return path
