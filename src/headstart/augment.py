"""Augmented views: random geometry as one affine map sampled once, then brightness, contrast and noise.

A view is a pure function of (seed, index, view) and the picture: nothing depends on what was drawn before it, on the
batch it stands in, or on the process that draws it.
"""

from __future__ import annotations

import functools
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .autoaugment import auto_augment
from .dataspec import DataSpec, shown_box
from .errors import RecipeError, near_matches
from .memory import sent
from .order import begin_again, random_stream
from .portable import RESAMPLING, evaluation_view
from .recipe import POLICIES, AugmentSpec
from .threads import map_threads
from .transforms import as_tensor

Augment = AugmentSpec | Callable[[Tensor], Tensor]

_Pixels = npt.NDArray[np.uint8]
_Matrix = npt.NDArray[np.float64]

# One number in [0, 1) per change, always drawn in this order: turning one change on leaves the others as they were.
DRAWS = (
    "area", "ratio", "x", "y", "rotation", "shift_x", "shift_y", "zoom", "hflip", "vflip",
    "brightness", "contrast", "red", "green", "blue", "downsample",
)  # fmt: skip
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue
# Picture pixels per view pixel up to which bilinear sampling is left to itself. Against a view sampled five times as
# finely (photographs, rotated by 7 degrees) it is closest, and as sharp, at 1.5; shrinking the picture first to 1.0
# loses 10 dB and a fifth of the sharpness.
MOST_STEP = 1.5
_VIEW_PURPOSE, _AUTO_PURPOSE, _ERASE_PURPOSE = 4, 5, 6
_rng_lock = threading.Lock()


def as_augment(given: str | Augment) -> Augment:
    """What an augmentation is meant by: a policy's name, ranges, or any callable.

    Raises:
        RecipeError: an unknown name, or something else: several transforms are not one.
    """
    if isinstance(given, AugmentSpec) or (callable(given) and not isinstance(given, str)):
        return given
    if isinstance(given, str) and given in POLICIES:
        return POLICIES[given]
    raise RecipeError(
        f"augment is {given!r}; it takes a policy's name ({', '.join(POLICIES)}), an AugmentSpec, or one transform,"
        f" such as torchvision's v2.Compose of several.{near_matches(str(given), tuple(POLICIES))}"
    )


def augmented_view(image: _Pixels, spec: DataSpec, augment: Augment, *, seed: int, index: int, view: int) -> Tensor:
    """One augmented view of a picture, uint8 [3, S, S].

    Args:
        image: the picture as `working_image` makes it, uint8 [h, w, 3].
        augment: ranges; or any callable on uint8 tensors [3, h, w], such as a torchvision v2 transform. It returns a
            picture of any size, which is brought to S x S as in the evaluation view; torch's, numpy's and Python's
            global random numbers are seeded for it and put back afterwards.
        index: the picture's number in its table. view: the number of the copy.
    Raises:
        RecipeError: the callable returns no picture, or one that it has normalised.
    """
    return augmented_batch([image], spec, augment, seed=seed, indices=[index], views=[view])[0]


def augmented_batch(
    images: Sequence[_Pixels],
    spec: DataSpec,
    augment: Augment,
    *,
    seed: int,
    indices: Sequence[int],
    views: Sequence[int],
    workers: int = 1,
) -> Tensor:
    """`augmented_view` of B pictures, uint8 [B, 3, S, S]; each is to the bit what it would be alone.

    Args:
        workers: threads; 0 is one per CPU core, 1 stays in the calling thread.
    """
    out = torch.empty((len(images), 3, spec.image_size, spec.image_size), dtype=torch.uint8)
    if isinstance(augment, AugmentSpec):
        sizes = np.array([image.shape[1::-1] for image in images])
        rngs = [view_rng(seed, index, view) for index, view in zip(indices, views, strict=True)]
        plans = view_plans(sizes, spec, augment, np.array([rng.random(len(DRAWS)) for rng in rngs]))

    def fill(i: int) -> None:
        at = {"seed": seed, "index": indices[i], "view": views[i]}
        if not isinstance(augment, AugmentSpec):
            out[i] = _user_view(images[i], spec, augment, **at)
            return
        drawn = _spec_view(images[i], spec, augment, plans, i, rngs[i])
        if augment.auto != "none":
            rng = np.random.Generator(random_stream(seed, indices[i], _AUTO_PURPOSE, views[i]))
            drawn = auto_augment(
                drawn, augment.auto, ops=augment.auto_ops, magnitude=augment.auto_magnitude, fill=spec.fill, rng=rng
            )
        box = erased_box(augment, spec.image_size, **at)
        out[i] = drawn
        if box is not None:
            left, top, right, bottom = box
            out[i, :, top:bottom, left:right] = torch.tensor(spec.fill, dtype=torch.uint8)[:, None, None]

    map_threads(fill, range(len(images)), workers=workers)
    return out


def view_rng(seed: int, index: int, view: int) -> np.random.Generator:
    """Random numbers of their own for each (seed, index, view): a keyed Philox stream, the same everywhere."""
    return np.random.Generator(random_stream(seed, index, _VIEW_PURPOSE, view))


def view_draws(seed: int, indices: Sequence[int], views: Sequence[int]) -> _Matrix:
    """The first numbers of each of these views' `view_rng`, in the order of `DRAWS`, [B, 16]."""
    stream = random_stream(seed, 0, _VIEW_PURPOSE)
    rng, draws = np.random.Generator(stream), np.empty((len(indices), len(DRAWS)))
    for row, index, view in zip(draws, indices, views, strict=True):
        begin_again(stream, seed, index, _VIEW_PURPOSE, view)
        rng.random(out=row)
    return draws


@dataclass(frozen=True)
class ViewPlans:
    """What is done to each of B pictures, but for noise, operations and rectangles.

    Attributes:
        maps: view coordinates (u, v, 1), from -1 to 1, to picture pixels, float64 [B, 2, 3].
        sides: at how many points along each side the picture is read, [B]; fewer than the view has: down-sampled.
        gain, contrast: what channels are multiplied by, float32 [B, 3], and contrast, float32 [B].
    """

    maps: _Matrix
    sides: npt.NDArray[np.int64]
    gain: Tensor
    contrast: Tensor


def view_plans(sizes: npt.NDArray[np.int64], spec: DataSpec, augment: AugmentSpec, draws: _Matrix) -> ViewPlans:
    """What the random numbers come to.

    Args:
        sizes: (width, height) of each picture, [B, 2]. draws: in [0, 1), in the order of `DRAWS`, [B, 16].
    """
    drawn = dict(zip(DRAWS, draws.T, strict=True))
    sides = np.maximum(1, np.round(spec.image_size * (1 - (1 - augment.downsample) * drawn["downsample"])))
    bright = 1 + augment.brightness * _either_way(drawn["brightness"])
    contrast = 1 + augment.contrast * _either_way(drawn["contrast"])
    channels = 1 + augment.channel_brightness * _either_way(_columns(drawn, "red", "green", "blue"))
    gain = torch.from_numpy(bright[:, None] * channels).float()
    return ViewPlans(
        _maps(sizes, spec, augment, drawn), sides.astype(np.int64), gain, torch.from_numpy(contrast).float()
    )


def _maps(sizes: npt.NDArray[np.int64], spec: DataSpec, augment: AugmentSpec, drawn: dict[str, _Matrix]) -> _Matrix:
    """All geometry as one map a picture.

    A window of the picture is chosen (the random resized crop; without one, what the evaluation view shows); zoom,
    rotation, flips and translation move about within that window. The window keeps the sense of `spec.fit`: for
    `crop` its aspect is the view's, for `squash` the picture's, for `letterbox` it is a part of the padded square.
    """
    centre, extent = _windows(sizes.astype(np.float64), spec, augment, drawn)
    angle = np.radians(augment.rotation * _either_way(drawn["rotation"])).tolist()
    scale = 1 + augment.zoom * _either_way(drawn["zoom"])
    # The functions of `math`: numpy's may differ in the last bit from machine to machine.
    cos, sin = (scale * np.array([function(a) for a in angle]) for function in (math.cos, math.sin))
    flip = np.where(_columns(drawn, "hflip", "vflip") < (augment.hflip, augment.vflip), -1.0, 1.0)
    turned = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)
    linear = (extent / 2 * flip)[:, :, None] * turned
    # The window is 2 wide in view coordinates, so a shift by the whole side is 2.
    shift = 2 * augment.translation * _either_way(_columns(drawn, "shift_x", "shift_y"))
    offset = centre - (linear * shift[:, None, :]).sum(2)
    return np.concatenate([linear, offset[:, :, None]], 2)


def _columns(drawn: dict[str, _Matrix], *names: str) -> _Matrix:
    return np.stack([drawn[name] for name in names], 1)


def _either_way(draw: _Matrix) -> _Matrix:
    """Draws in [0, 1) as ones in [-1, 1)."""
    return 2 * draw - 1


def _spec_view(
    image: _Pixels, spec: DataSpec, augment: AugmentSpec, plans: ViewPlans, i: int, rng: np.random.Generator
) -> Tensor:
    # Down-sampling is the same map read at fewer points, so the picture is still sampled once before it is enlarged.
    size = int(plans.sides[i])
    view = _sample(image, plans.maps[i], size, spec)[None]
    if size != spec.image_size:
        view = F.interpolate(view, (spec.image_size, spec.image_size), mode="bilinear", align_corners=False)
    if augment.changes_light:
        view = relit(view, plans.gain[i : i + 1], plans.contrast[i : i + 1])
    if augment.noise:
        view = view + _gauss(rng, view.shape).mul_(255 * augment.noise)
    return view[0].round_().clamp_(0, 255).to(torch.uint8)


def _windows(
    pictures: _Matrix, spec: DataSpec, augment: AugmentSpec, drawn: dict[str, _Matrix]
) -> tuple[_Matrix, _Matrix]:
    """Centre (x, y) and extent (width, height), in pixels, of the part of each picture the view shows, [B, 2] both."""
    if augment.crop_scale == (1.0, 1.0):
        boxes = np.array([shown_box(int(width), int(height), spec) for width, height in pictures])
        return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    low, high = augment.crop_scale
    area = low + (high - low) * drawn["area"]
    narrow, broad = augment.crop_ratio
    ratio = np.array([narrow * (broad / narrow) ** draw for draw in drawn["ratio"].tolist()])  # 3:4 as likely as 4:3
    # Area is a share of the whole picture (`letterbox`: of the padded square). For `crop` that is torchvision's rule,
    # but a window that does not fit is shrunk with its ratio kept, where torchvision draws ten times and then gives up.
    limit = pictures.max(1, keepdims=True).repeat(2, 1) if spec.fit == "letterbox" else pictures
    base = np.sqrt(pictures.prod(1, keepdims=True)) if spec.fit == "crop" else limit
    extent = base * np.sqrt(area)[:, None] * np.stack([np.sqrt(ratio), 1 / np.sqrt(ratio)], 1)
    extent = extent * np.minimum(1.0, (limit / extent).min(1))[:, None]
    free = np.maximum(pictures - extent, 0)  # a window wider than the picture (letterbox) stays centred on it
    return pictures / 2 + free * (_columns(drawn, "x", "y") - 0.5), extent


def _sample(image: _Pixels, matrix: _Matrix, size: int, spec: DataSpec) -> Tensor:
    """The picture read through the map at size x size points, float32 [3, size, size] on the 0-255 scale."""
    upright = matrix[0, 1] == 0 and matrix[1, 0] == 0
    half = np.abs(matrix[:, :2]).sum(axis=1)
    low, high = matrix[:, 2] - half, matrix[:, 2] + half
    limit = np.array([image.shape[1], image.shape[0]], dtype=np.float64)
    is_inside = bool((low >= -1e-6).all() and (high <= limit + 1e-6).all())
    if upright and is_inside:
        box = (*np.maximum(low, 0).tolist(), *np.minimum(high, limit).tolist())
        pixels = np.array(Image.fromarray(image).resize((size, size), RESAMPLING[spec.interpolation], box=box))
        flipped = pixels[:: -1 if matrix[1, 1] < 0 else 1, :: -1 if matrix[0, 0] < 0 else 1]
        return as_tensor(np.ascontiguousarray(flipped)).float()
    if is_inside:
        image, matrix = _cut(image, matrix, low, high)
    return _grid_sample(*_shrunk(image, matrix, size), size, spec)


def _cut(image: _Pixels, matrix: _Matrix, low: _Matrix, high: _Matrix) -> tuple[_Pixels, _Matrix]:
    """Only the part the map reads, with two pixels more for the interpolation."""
    left, top = np.maximum(np.floor(low) - 2, 0).astype(int)
    right, bottom = np.ceil(high).astype(int) + 2
    shift = np.array([[0, 0, left], [0, 0, top]])
    return image[top:bottom, left:right], matrix - shift


def _shrunk(image: _Pixels, matrix: _Matrix, size: int) -> tuple[_Pixels, _Matrix]:
    """The picture shrunk with antialiasing where the map would otherwise step over pixels."""
    step = np.sqrt((matrix[:, :2] ** 2).sum(axis=1)) * 2 / size  # picture pixels per view pixel, along x and y
    if step.max() <= MOST_STEP:
        return image, matrix
    height, width = image.shape[:2]
    factor = np.maximum(step / MOST_STEP, 1)
    wide, high = (max(1, round(side)) for side in np.array([width, height]) / factor)
    small = np.array(Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR))
    return small, matrix * np.array([[wide / width], [high / height]])


def _grid_sample(image: _Pixels, matrix: _Matrix, size: int, spec: DataSpec) -> Tensor:
    height, width = image.shape[:2]
    # grid_sample counts from -1 to 1 over the picture, from edge to edge (align_corners=False).
    scale = np.array([[2 / width], [2 / height]])
    theta = torch.from_numpy(matrix * scale - np.array([[0, 0, 1], [0, 0, 1]])).float()
    axis = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    by_x, by_y, start = theta.unbind(1)
    # x and y in planes of their own, the picture as it lies (channels last): the same bits, a quarter sooner.
    grid = axis * by_x.view(2, 1, 1) + (axis.view(size, 1) * by_y.view(2, 1, 1) + start.view(2, 1, 1))
    grid = grid.permute(1, 2, 0)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    mode = "nearest" if spec.interpolation == "nearest" else "bilinear"
    if spec.fit != "letterbox":
        return F.grid_sample(pixels, grid[None], mode, "reflection", align_corners=False)[0]
    fill = torch.tensor(spec.fill, dtype=torch.float32).view(1, 3, 1, 1)  # beyond the picture lies the padding
    return (F.grid_sample(pixels - fill, grid[None], mode, "zeros", align_corners=False) + fill)[0]


def relit(views: Tensor, gain: Tensor, contrast: Tensor) -> Tensor:
    """Views [B, 3, S, S] in floating point, changed in place: brightness multiplies; contrast moves away from or
    towards the view's mean grey."""
    weights = sent(torch.tensor(_GREY), views.device)
    grey = (views.mean(dim=(2, 3)) * gain * weights).sum(1)
    factor = gain * contrast[:, None]
    return views.mul_(factor[:, :, None, None]).add_((grey * (1 - contrast))[:, None, None, None])


def erased_box(
    augment: AugmentSpec, size: int, *, seed: int, index: int, view: int
) -> tuple[int, int, int, int] | None:
    """With the chance `erasing` the rectangle (left, top, right, bottom) that gets the mean colour, 0 when normalised.

    Area and aspect are torchvision's: 2 to 33 % of the picture, 0.3 to 3.3, cut short where it would not fit.
    Reference: Zhong et al. 2020, arXiv 1708.04896.
    """
    if not augment.erasing:
        return None
    rng = np.random.Generator(random_stream(seed, index, _ERASE_PURPOSE, view))
    chance, area, ratio, x, y = rng.random(5).tolist()
    if chance >= augment.erasing:
        return None
    side, aspect = size * math.sqrt(0.02 + 0.31 * area), 0.3 * 11**ratio
    width, height = (max(1, min(size, round(side * f))) for f in (math.sqrt(aspect), 1 / math.sqrt(aspect)))
    left, top = round((size - width) * x), round((size - height) * y)
    return left, top, left + width, top + height


@functools.cache
def _gauss_table() -> Tensor:
    """The standard normal at 65,536 evenly spaced probabilities."""
    inverse = NormalDist().inv_cdf
    return torch.tensor([inverse((i + 0.5) / 65536) for i in range(65536)])


def _gauss(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Normal numbers from 16 raw bits each: five times as fast as drawing them, and the same on every platform."""
    count = math.prod(shape)
    bits = np.asarray(rng.bit_generator.random_raw(-(-count // 4)), dtype="<u8").view("<u2")[:count]
    return _gauss_table().index_select(0, torch.from_numpy(bits.astype(np.int32))).view(*shape)


def _user_view(
    image: _Pixels, spec: DataSpec, augment: Callable[[Tensor], Tensor], *, seed: int, index: int, view: int
) -> Tensor:
    with _seeded(int(random_stream(seed, index, _VIEW_PURPOSE, view).random_raw() >> 1)):
        result = augment(as_tensor(image))
    name = getattr(augment, "__name__", type(augment).__name__)
    if not isinstance(result, Tensor) or result.ndim != 3 or result.shape[0] not in (1, 3):
        got = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise RecipeError(f"Transform {name} returned {got}; it takes and returns one picture, a tensor [3, h, w].")
    pixels = _to_uint8(result, name).expand(3, -1, -1)
    if pixels.shape[1:] == (spec.image_size, spec.image_size):
        return pixels.contiguous()
    return as_tensor(evaluation_view(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), spec))


def _to_uint8(result: Tensor, name: str) -> Tensor:
    """A floating-point picture is on torchvision's 0-1 scale."""
    result = result.as_subclass(Tensor)  # plain pixels again, where the transform made a tv_tensor of them
    if result.dtype == torch.uint8:
        return result
    if not result.is_floating_point() or not -0.01 <= float(result.min()) <= float(result.max()) <= 1.01:
        raise RecipeError(
            f"Transform {name} returned {result.dtype} from {float(result.min()):g} to {float(result.max()):g}; it "
            "returns uint8, or floats from 0 to 1. Leave Normalize out: the model normalises for itself."
        )
    return result.mul(255).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers of torch (CPU), numpy and Python, seeded for a while; one thread at a time."""
    with _rng_lock:
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
