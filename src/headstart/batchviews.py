"""Augmented views of many pictures at once, where their pixels lie: on a GPU one kernel does a whole batch's step.

What is drawn is what `augment` draws from the same random numbers, read by bilinear interpolation throughout. Every
operation treats each picture by itself, so a view does not depend on the batch it stands in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .augment import MOST_STEP, Augment, ViewPlans, erased_box, relit, view_draws, view_plans
from .dataspec import DataSpec
from .memory import sent
from .recipe import AugmentSpec


def is_drawn_together(augment: Augment | None) -> bool:
    """Whether this room can draw such views: no transform of the user's, operations, noise or down-sampling."""
    return isinstance(augment, AugmentSpec) and (augment.auto, augment.noise, augment.downsample) == ("none", 0, 1)


def views_together(
    pictures: Sequence[Tensor],
    spec: DataSpec,
    augment: AugmentSpec,
    *,
    seed: int,
    indices: Sequence[int],
    views: Sequence[int],
) -> Tensor:
    """Augmented views uint8 [B, 3, S, S], on the pictures' device, without waiting for it.

    Args:
        pictures: as `working_image` makes them, uint8 [h, w, 3], all on one device.
        augment: of the kind that `is_drawn_together`.
        indices, views: see `augment.augmented_batch`.
    """
    sizes = np.array([[picture.shape[1], picture.shape[0]] for picture in pictures])
    plans = view_plans(sizes, spec, augment, view_draws(seed, indices, views))
    flat = torch.cat([picture.reshape(-1, 3) for picture in pictures])
    starts = np.concatenate([[0], np.cumsum(sizes.prod(1))[:-1]])
    finer = _finer(plans, spec)
    out = torch.empty((len(pictures), 3, spec.image_size, spec.image_size), device=flat.device)
    for n in np.unique(finer).tolist():
        rows = np.flatnonzero(finer == n)
        read = _read(flat, starts[rows], sizes[rows], plans.maps[rows], spec, n)
        if len(rows) == len(pictures):
            out = read
        else:
            out[_sent(rows, flat.device)] = read
    if augment.changes_light:
        out = relit(out, sent(plans.gain, flat.device), sent(plans.contrast, flat.device))
    result = out.round_().clamp_(0, 255).to(torch.uint8)
    return _erased(result, spec, augment, seed=seed, indices=indices, views=views) if augment.erasing else result


def _sent(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A small array on the device; whole numbers stay whole, the rest is float32."""
    tensor = torch.from_numpy(values)
    return sent(tensor if tensor.dtype == torch.int64 else tensor.float(), device)


def _finer(plans: ViewPlans, spec: DataSpec) -> npt.NDArray[np.int64]:
    """How many times as finely, along each side, each picture is read where the map would step over pixels, [B]."""
    step = np.sqrt((plans.maps[:, :, :2] ** 2).sum(2)).max(1) * 2 / spec.image_size
    return np.asarray(np.maximum(1, np.ceil(step / MOST_STEP)), dtype=np.int64)


def _read(
    flat: Tensor,
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    maps: npt.NDArray[np.float64],
    spec: DataSpec,
    finer: int,
) -> Tensor:
    """Pictures read through their maps, float32 [B, 3, S, S] on the 0-255 scale.

    flat: their pixels one after the other, uint8 [P, 3]; each begins at its start.
    """
    device, points = flat.device, spec.image_size * finer
    start = _sent(starts, device)[:, None, None]
    width, height = _sent(sizes, device).T[:, :, None, None]
    by_x, by_y, offset = _sent(maps, device).permute(2, 1, 0)[..., None, None]
    axis = (torch.arange(points, dtype=torch.float32, device=device) * 2 + 1) / points - 1
    # The picture's edges lie at 0 and at its side, the centres of its pixels at halves.
    x, y = (by_x[i] * axis + (by_y[i] * axis[:, None] + offset[i]) for i in (0, 1))
    beyond = spec.fit == "letterbox"  # beyond the picture lies the padding; else the picture is mirrored at its edges
    if not beyond:
        x, y = _mirrored(x, width), _mirrored(y, height)
    fill = _sent(np.array(spec.fill), device) if beyond else None
    columns, lines = (_read_at(at, side, spec.interpolation) for at, side in ((x, width), (y, height)))
    values = torch.zeros((), device=device)
    for line, line_share, in_line in lines:
        begin = start + line * width
        for column, column_share, in_column in columns:
            read = flat[begin + column].float()
            if fill is not None:
                read = (read - fill) * (in_line & in_column)[..., None]
            values = torch.addcmul(values, read, (column_share * line_share)[..., None])
    if fill is not None:
        values = values + fill
    values = values.permute(0, 3, 1, 2)
    return torch.nn.functional.avg_pool2d(values, finer) if finer > 1 else values.contiguous()


def _mirrored(at: Tensor, side: Tensor) -> Tensor:
    """Coordinates brought into the picture by mirroring them at its edges, and no further out than the last centres."""
    at = torch.remainder(at, 2 * side)
    return torch.minimum(torch.minimum(at, 2 * side - at).clamp_min(0.5), side - 0.5)


def _read_at(at: Tensor, side: Tensor, interpolation: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Where pixels are read along one axis: places within the picture, their shares, and whether they lie there."""
    at = at - 0.5
    if interpolation == "nearest":
        found = [(at.round().long(), torch.ones((), device=at.device))]
    else:
        low = at.floor()
        share, low = at - low, low.long()  # how far towards the next pixel
        found = [(low, 1 - share), (low + 1, share)]
    inside = [(torch.minimum(place.clamp_min(0), side - 1), place, share) for place, share in found]
    return [(place, share, place == wanted) for place, wanted, share in inside]


def _erased(
    result: Tensor, spec: DataSpec, augment: AugmentSpec, *, seed: int, indices: Sequence[int], views: Sequence[int]
) -> Tensor:
    """The views with the rectangles that `erased_box` gives in the mean colour."""
    drawn = zip(indices, views, strict=True)
    found = [erased_box(augment, spec.image_size, seed=seed, index=index, view=view) for index, view in drawn]
    boxes = _sent(np.array([box or (0, 0, 0, 0) for box in found], dtype=np.int64), result.device)
    left, top, right, bottom = boxes.T[:, :, None, None]
    axis = torch.arange(spec.image_size, device=result.device)
    hit = (axis >= left) & (axis < right) & (axis[:, None] >= top) & (axis[:, None] < bottom)
    fill = _sent(np.array(spec.fill), result.device).to(torch.uint8)[:, None, None]
    return torch.where(hit[:, None], fill, result)
