"""RandAugment and TrivialAugment: torchvision's operations, drawn from a view's own random numbers."""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor
from torchvision.transforms import v2

BINS = 31  # strengths from 0 to 30, as in both papers
_KINDS = {"randaugment": v2.RandAugment, "trivial": v2.TrivialAugmentWide}


def auto_augment(
    view: Tensor, kind: str, *, ops: int, magnitude: int, fill: tuple[int, int, int], rng: np.random.Generator
) -> Tensor:
    """A picture uint8 [3, S, S] after operations drawn at random; it is not changed in place.

    `randaugment` applies `ops` operations of strength `magnitude` (0 to 30); `trivial` one of a strength drawn anew.
    torchvision's own transforms draw from torch's global generator, which threads share; here each picture and view
    has its stream, so a view is the same whatever is drawn beside it.

    Args:
        fill: colour (red, green, blue) of what lies beyond the picture.
    Reference: Cubuk et al. 2020, arXiv 1909.13719; Müller and Hutter 2021, arXiv 2103.10158.
    """
    transform = _transform(kind, fill)
    space = transform._AUGMENTATION_SPACE
    for _ in range(ops if kind == "randaugment" else 1):
        name = tuple(space)[rng.integers(len(space))]
        strengths, has_sign = space[name]
        steps = strengths(BINS, *view.shape[-2:])
        step = magnitude if kind == "randaugment" else int(rng.integers(BINS))
        sign = -1 if has_sign and rng.random() < 0.5 else 1
        strength = 0.0 if steps is None else sign * float(steps[step])
        view = transform._apply_image_or_video_transform(
            view, name, strength, interpolation=transform.interpolation, fill=transform._fill
        )
    return view


@functools.cache
def _transform(kind: str, fill: tuple[int, int, int]) -> v2.RandAugment | v2.TrivialAugmentWide:
    return _KINDS[kind](interpolation=v2.InterpolationMode.BILINEAR, fill=list(fill))
