"""The one evaluation view, from file bytes to uint8 pixels; working images; normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .dataset import open_image
from .dataspec import DataSpec, PixelArray, working_image_by_pillow, working_size
from .memory import sent
from .portable import evaluation_view
from .threads import map_threads


def load_view(source: str | Path | bytes, spec: DataSpec) -> Tensor:
    """File or file bytes -> evaluation view, uint8 [3, S, S]: the one function that fit, evaluate and predict call.

    Raises:
        DataError: the picture does not decode.
    """
    return as_tensor(evaluation_view(open_image(source), spec))


def load_views(sources: Sequence[str | Path | bytes], spec: DataSpec, *, workers: int = 0) -> Tensor:
    """`load_view` of N pictures, uint8 [N, 3, S, S].

    Args:
        workers: threads; 0 is one per CPU core, 1 stays in the calling thread.
    Raises:
        DataError: a picture does not decode; the message names it.
    """
    views = torch.empty((len(sources), 3, spec.image_size, spec.image_size), dtype=torch.uint8)

    def fill(position: int) -> None:
        views[position] = load_view(sources[position], spec)

    map_threads(fill, range(len(sources)), workers=workers)
    return views


def working_image(image: Image.Image, spec: DataSpec) -> PixelArray:
    """The whole picture at the resolution augmented views are cut from, uint8 [h, w, 3].

    Shrunk (antialiased) to `WORKING_MARGIN` times what the evaluation view needs. A picture too small for the
    evaluation view is enlarged to just that, with the backbone's own interpolation, so that training sees the same
    kind of blur as evaluation. What lies between is left as it is. PyTorch's resizing takes a fraction of the time of
    Pillow's and gives the same within two grey levels; so do block means where a picture shrinks by four or more.
    The evaluation view, which weights were made for, is Pillow's, and made at once.
    """
    made = working_image_by_pillow(image, spec)
    return working_image_of(np.array(image), spec) if made is None else made


def working_image_of(pixels: PixelArray, spec: DataSpec) -> PixelArray:
    """The working image of a picture, uint8 [H, W, 3], for which `working_image_by_pillow` has none."""
    wide, high = working_size(pixels.shape[1], pixels.shape[0], spec)
    tensor = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels-last, as it lies, and so the result
    resized = F.interpolate(tensor, (high, wide), mode=spec.interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def normalise(pixels: Tensor, spec: DataSpec) -> Tensor:
    """Pixels [N, 3, S, S] on the 0-255 scale -> (x / 255 - mean) / std; integers become float32."""
    values = pixels.div(255) if pixels.is_floating_point() else pixels.float().div_(255)
    # Sent without waiting for a GPU, which `new_tensor` would do.
    mean, std = (
        sent(torch.tensor(numbers, dtype=values.dtype), values.device).view(1, 3, 1, 1)
        for numbers in (spec.mean, spec.std)
    )
    return values.sub_(mean).div_(std)


def as_tensor(pixels: PixelArray) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, h, w], contiguous."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
