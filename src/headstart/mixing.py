"""Mixup and CutMix: a batch mixed with a shuffled copy of itself, and the loss mixed in the same share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError
from .freezing import FreezeLine
from .memory import sent
from .recipe import Stage


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed: with which of its own pictures, in which share, in which rectangle.

    partners: index in the batch of the picture mixed into each, [B]. share: of the picture itself in what comes out.
    box: (left, top, right, bottom) as fractions of the side that the partner fills (CutMix); None mixes everywhere.
    """

    partners: Tensor
    share: float
    box: tuple[float, float, float, float] | None = None


def draw_mix(n: int, *, mixup: float, cutmix: float, seed: Sequence[int]) -> Mix | None:
    """How a batch of n pictures is mixed; None where the stage mixes nothing.

    The share is drawn from Beta(a, a), where a is `mixup` or `cutmix`; where both are given, each batch takes one of
    them by the toss of a coin. CutMix's rectangle has the picture's own aspect and covers 1 - share of it; what falls
    off the edge does not count. seed: of the draw.
    Reference: Zhang et al. 2018, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899.
    """
    if not mixup and not cutmix:
        return None
    rng = np.random.default_rng(seed)
    cuts = bool(cutmix) and (not mixup or rng.random() < 0.5)
    strength = cutmix if cuts else mixup
    share = rng.beta(strength, strength)
    partners = torch.from_numpy(rng.permutation(n))
    if not cuts:
        return Mix(partners, share)
    (x, y), half = rng.random(2), math.sqrt(1 - share) / 2
    return Mix(partners, share, (max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)))


def mix_inputs(inputs: Tensor, mix: Mix, among: Tensor | None = None) -> tuple[Tensor, float]:
    """The mixed inputs [B, ...] in floating point, and the exact share of each batch member in them.

    CutMix takes pictures [B, C, H, W]; its rectangle is rounded to whole pixels and the share follows.

    Args:
        among: the inputs that the partners are of; None is these inputs themselves.
    """
    inputs = inputs if inputs.is_floating_point() else inputs.float()
    others = (inputs if among is None else among)[sent(mix.partners, inputs.device)].to(inputs.dtype)
    if mix.box is None:
        return torch.lerp(others, inputs, mix.share), mix.share
    height, width = inputs.shape[-2:]
    left, top, right, bottom = (round(v * side) for v, side in zip(mix.box, (width, height) * 2, strict=True))
    mixed = inputs.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def check_mixing(stage: Stage, line: FreezeLine | None) -> None:
    """Refuse to cut pictures that the loop never sees: behind a line it may be fed with stored activations.

    Raises:
        ModelError: CutMix with the line anywhere but in front of the whole backbone.
    """
    if stage.cutmix and line and line.frozen:
        raise ModelError(
            f"stage {stage.name!r}: cutmix is {stage.cutmix:g}, but the freeze line stands at {line.where!r}."
            " Rectangles are cut from pixels, and only what the frozen layers make of them is trained on. Move the line"
            " to the front (freeze_line 'all'), take mixup, which also works on activations, or give stages their own"
            " values (--cutmix 0,1)."
        )
