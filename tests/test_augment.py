"""Augmented views: pure, true to the fit, one map for all geometry, each change doing what its name says."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from headstart.augment import DRAWS, augmented_batch, augmented_view, view_draws, view_plans, view_rng
from headstart.autoaugment import auto_augment
from headstart.dataspec import FITS, DataSpec
from headstart.errors import RecipeError
from headstart.portable import evaluation_view
from headstart.recipe import POLICIES, AugmentSpec
from headstart.transforms import working_image

SPEC = DataSpec(64, interpolation="bilinear")
EVERYTHING = AugmentSpec(
    rotation=30, translation=0.2, zoom=0.2, crop_scale=(0.4, 1.0), hflip=0.5, vflip=0.5, contrast=0.3,
    brightness=0.3, channel_brightness=0.2, noise=0.05, downsample=0.5, auto="randaugment", erasing=0.5,
)  # fmt: skip
EACH = {
    "rotation": AugmentSpec(rotation=30),
    "translation": AugmentSpec(translation=0.2),
    "zoom": AugmentSpec(zoom=0.3),
    "crop_scale": AugmentSpec(crop_scale=(0.3, 0.9)),
    "hflip": AugmentSpec(hflip=0.5),
    "vflip": AugmentSpec(vflip=0.5),
    "contrast": AugmentSpec(contrast=0.4),
    "brightness": AugmentSpec(brightness=0.4),
    "channel_brightness": AugmentSpec(channel_brightness=0.4),
    "noise": AugmentSpec(noise=0.1),
    "downsample": AugmentSpec(downsample=0.3),
    "randaugment": AugmentSpec(auto="randaugment"),
    "trivial": AugmentSpec(auto="trivial"),
    "erasing": AugmentSpec(erasing=1.0),
}


def view_map(width: int, height: int, spec: DataSpec, augment: AugmentSpec, draws: dict[str, float]) -> np.ndarray:
    """The map of one picture, [2, 3]: view coordinates (u, v, 1) to picture pixels."""
    values = np.array([[draws[name] for name in DRAWS]])
    return view_plans(np.array([[width, height]]), spec, augment, values).maps[0]


MIDDLE = dict.fromkeys(
    (
        *("area", "ratio", "x", "y", "rotation", "shift_x", "shift_y", "zoom", "hflip", "vflip"),
        *("brightness", "contrast", "red", "green", "blue", "downsample"),
    ),
    0.5,
)


def picture(width: int = 120, height: int = 90, seed: int = 0) -> np.ndarray:
    """A made photograph, smooth enough that resampling it twice changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def ramp(width: int, height: int) -> np.ndarray:
    """Red tells the column and green the row, as shares of 200."""
    pixels = np.zeros((height, width, 3), np.float64)
    pixels[..., 0] = (np.arange(width) + 0.5) / width * 200
    pixels[..., 1] = ((np.arange(height) + 0.5) / height * 200)[:, None]
    return pixels.round().astype(np.uint8)


def view(image: np.ndarray, spec: DataSpec, augment: object, number: int, seed: int = 0, index: int = 0) -> np.ndarray:
    drawn = augmented_view(image, spec, augment, seed=seed, index=index, view=number)  # type: ignore[arg-type]
    assert (drawn.shape, drawn.dtype) == ((3, spec.image_size, spec.image_size), torch.uint8)
    return drawn.permute(1, 2, 0).numpy()


def off(view_: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(view_.astype(int) - other.astype(int)).mean())


# ----------------------------------------------------------------------------------------------------- pure functions


def test_a_view_depends_on_seed_index_and_view_alone() -> None:
    image = picture()
    first = view(image, SPEC, EVERYTHING, 3, seed=5, index=7)
    view(image, SPEC, EVERYTHING, 9)  # drawn in between
    assert np.array_equal(view(image, SPEC, EVERYTHING, 3, seed=5, index=7), first)
    for other in ({"seed": 6, "index": 7}, {"seed": 5, "index": 8}):
        assert not np.array_equal(view(image, SPEC, EVERYTHING, 3, **other), first)
    assert not np.array_equal(view(image, SPEC, EVERYTHING, 4, seed=5, index=7), first)


def test_random_numbers_are_known() -> None:
    """Written down when this was built: the same in any process, on any platform."""
    expected = [0.68430498, 0.45467598, 0.33220667]
    assert np.allclose(view_rng(0, 1, 2).random(3), expected, atol=1e-8)
    code = "from headstart.augment import view_rng; print(*view_rng(0, 1, 2).random(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert np.allclose([float(x) for x in done.stdout.split()], expected, atol=1e-8)


def test_the_draws_of_many_views_are_those_of_each() -> None:
    indices, views = [7, 0, 7, 2**40], [1, 2, 3, 2**33]
    for seed in (0, -5, 2**63):
        own = [view_rng(seed, index, view).random(len(DRAWS)) for index, view in zip(indices, views, strict=True)]
        assert np.array_equal(view_draws(seed, indices, views), own)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_is_its_views(fit: str, workers: int) -> None:
    spec = replace(SPEC, fit=fit)
    images = [picture(80 + 9 * i, 100, seed=i) for i in range(9)]
    indices, views = list(range(10, 19)), [1, 2, 3] * 3
    batch = augmented_batch(images, spec, EVERYTHING, seed=4, indices=indices, views=views, workers=workers)
    alone = [
        augmented_view(image, spec, EVERYTHING, seed=4, index=i, view=v)
        for image, i, v in zip(images, indices, views, strict=True)
    ]
    assert torch.equal(batch, torch.stack(alone))


def test_turning_one_change_on_leaves_the_others_as_they_were() -> None:
    image = picture()
    plain = [view(image, SPEC, AugmentSpec(hflip=0.5), n) for n in range(12)]
    both = [view(image, SPEC, AugmentSpec(hflip=0.5, brightness=0.05), n) for n in range(12)]
    assert all(off(a, b) < 8 for a, b in zip(plain, both, strict=True))
    assert any(off(plain[0], p) > 20 for p in plain)  # some are flipped


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_draws_views_that_differ_but_resemble_the_picture(name: str) -> None:
    image = picture()
    views = [view(image, SPEC, POLICIES[name], n) for n in range(6)]
    differ = [not np.array_equal(views[0], v) for v in views[1:]]
    assert not any(differ) if name == "none" else all(differ)
    assert all(np.abs(v.mean((0, 1)) - image.mean((0, 1))).max() < 70 for v in views)


@pytest.mark.parametrize("name", EACH)
def test_each_change_does_something(name: str) -> None:
    image = picture()
    drawn = [view(image, SPEC, EACH[name], n) for n in range(8)]
    assert max(off(drawn[0], v) for v in drawn[1:]) > 1
    unchanged = view(image, SPEC, AugmentSpec(), 0)
    assert max(off(unchanged, v) for v in drawn) > 1


# ----------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(400, 300), (300, 500), (40, 30)])
def test_without_changes_it_is_about_the_evaluation_view(fit: str, size: tuple[int, int]) -> None:
    spec = replace(SPEC, fit=fit)
    image = Image.fromarray(picture(*size))
    assert off(view(working_image(image, spec), spec, AugmentSpec(), 1), evaluation_view(image, spec)) < 2


@pytest.mark.parametrize("fit", FITS)
def test_flips_are_exact(fit: str) -> None:
    spec = replace(SPEC, fit=fit)
    image = picture()
    plain = view(image, spec, AugmentSpec(), 0)
    assert off(view(image, spec, AugmentSpec(hflip=1.0), 0), plain[:, ::-1]) < 0.1
    assert off(view(image, spec, AugmentSpec(vflip=1.0), 0), plain[::-1]) < 0.1


def test_the_map_rotates_about_the_centre_by_the_angle_drawn() -> None:
    draws = {**MIDDLE, "rotation": 1.0}
    matrix = view_map(200, 100, replace(SPEC, crop_pct=1.0), AugmentSpec(rotation=30), draws)
    assert np.allclose(matrix @ [0, 0, 1], [100, 50])
    right = matrix @ [1, 0, 1] - [100, 50]
    assert math.hypot(*right) == pytest.approx(50)
    assert math.degrees(math.atan2(right[1], right[0])) == pytest.approx(30)


def test_the_map_moves_and_zooms_by_shares_of_the_side() -> None:
    spec = replace(SPEC, crop_pct=1.0)
    moved = view_map(100, 100, spec, AugmentSpec(translation=0.2), {**MIDDLE, "shift_x": 1.0, "shift_y": 0.0})
    assert np.allclose(moved @ [0, 0, 1], [50 - 20, 50 + 20])  # the picture goes right and up
    zoomed = view_map(100, 100, spec, AugmentSpec(zoom=0.5), {**MIDDLE, "zoom": 0.0})
    assert np.allclose(zoomed @ [1, 1, 1], [75, 75])  # zoomed in: half of the side is seen


def test_zoom_is_undone_by_flips_of_the_map() -> None:
    matrix = view_map(100, 80, SPEC, AugmentSpec(hflip=1.0, vflip=1.0), MIDDLE)
    plain = view_map(100, 80, SPEC, AugmentSpec(), MIDDLE)
    assert np.allclose(matrix @ [0.3, -0.6, 1], plain @ [-0.3, 0.6, 1])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(300, 200), (100, 400), (64, 64)])
def test_random_crops_have_the_area_asked_for_and_stay_inside(fit: str, size: tuple[int, int]) -> None:
    spec = replace(SPEC, fit=fit)
    augment = AugmentSpec(crop_scale=(0.1, 0.4))
    whole = {"crop": size[0] * size[1], "squash": size[0] * size[1], "letterbox": max(size) ** 2}[fit]
    shares, centres = [], []
    for n in range(200):
        draws = dict(zip(MIDDLE, view_rng(0, 0, n).random(len(MIDDLE)), strict=True))
        matrix = view_map(*size, spec, augment, draws)
        extent, centre = matrix[:, :2].sum(axis=1) * 2, matrix[:, 2]
        shares.append(extent.prod() / whole)
        centres.append(centre / size)
        if fit != "letterbox":
            assert (centre - extent / 2 >= -1e-9).all()
            assert (centre + extent / 2 <= np.array(size) + 1e-9).all()
        square = {"crop": extent, "squash": extent / size, "letterbox": extent}[fit]
        assert 3 / 4 - 1e-9 <= square[0] / square[1] <= 4 / 3 + 1e-9
    if not (fit == "crop" and size == (100, 400)):  # a strip has no room for the larger windows
        assert 0.1 <= min(shares) < 0.14
        assert 0.36 < max(shares) <= 0.4 + 1e-9
    assert np.abs(np.mean(centres, axis=0) - 0.5).max() < 0.05
    assert np.std(centres, axis=0).max() > 0.08


def test_geometry_samples_the_right_places() -> None:
    """On a ramp the colour tells the place, so the view can be held against the map."""
    image = ramp(160, 120)
    augment = AugmentSpec(rotation=20, zoom=0.2, crop_scale=(0.2, 0.5), hflip=0.5, vflip=0.5)
    axis = (np.arange(64) * 2 + 1) / 64 - 1
    u, v = np.meshgrid(axis, axis)
    for n in range(20):
        draws = dict(zip(MIDDLE, view_rng(0, 0, n).random(len(MIDDLE)), strict=True))
        x, y = np.einsum("ij,jhw->ihw", view_map(160, 120, SPEC, augment, draws), np.stack([u, v, np.ones_like(u)]))
        inside = (x > 1) & (x < 159) & (y > 1) & (y < 119)
        assert inside.mean() > 0.5
        drawn = view(image, SPEC, augment, n).astype(float)
        assert np.abs(drawn[..., 0] - x / 160 * 200)[inside].max() < 2.5
        assert np.abs(drawn[..., 1] - y / 120 * 200)[inside].max() < 2.5


def test_upright_views_are_resized_as_the_backbone_wants() -> None:
    """Without rotation a view is a plain resize of its window: antialiased, in the backbone's interpolation."""
    image = picture()
    spec = replace(SPEC, interpolation="lanczos")
    for n in range(5):
        draws = dict(zip(MIDDLE, view_rng(0, 0, n).random(len(MIDDLE)), strict=True))
        augment = AugmentSpec(crop_scale=(0.3, 1.0))
        matrix = view_map(120, 90, spec, augment, draws)
        extent, centre = matrix[:, :2].sum(axis=1), matrix[:, 2]
        box = (*np.maximum(centre - extent, 0), *np.minimum(centre + extent, (120, 90)))
        expected = Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS, box=box)
        assert np.array_equal(view(image, spec, augment, n), np.asarray(expected))


def test_borders_are_reflected_and_letterbox_is_padded() -> None:
    image = np.full((90, 120, 3), 200, np.uint8)
    augment = AugmentSpec(rotation=45, translation=0.3, zoom=0.5)
    for fit in ("crop", "squash"):
        assert all((view(image, replace(SPEC, fit=fit), augment, n) == 200).all() for n in range(5))
    spec = replace(SPEC, fit="letterbox")
    for n in range(5):
        drawn = view(image, spec, augment, n).reshape(-1, 3)
        near_fill = np.abs(drawn.astype(int) - spec.fill).max(1) <= 1
        assert 0.05 < near_fill.mean() < 0.95
    plain = view(image, spec, AugmentSpec(), 0)
    assert (plain[:7] == spec.fill).all()
    assert (plain[20:44] == 200).all()


def test_shrinking_is_antialiased() -> None:
    fine = np.indices((512, 512)).sum(0) % 2 * 255
    image = np.repeat(fine[..., None], 3, 2).astype(np.uint8)
    for augment in (AugmentSpec(), AugmentSpec(rotation=20, zoom=0.3)):
        assert np.abs(view(image, SPEC, augment, 1).astype(int) - 127).max() < 40  # unfiltered: up to 128


def test_strange_shapes_give_views() -> None:
    for fit in FITS:
        spec = replace(SPEC, fit=fit)
        for size in ((1, 1), (2000, 3), (3, 2000)):
            drawn = view(working_image(Image.new("RGB", size, (7, 99, 200)), spec), spec, EVERYTHING, 1)
            assert drawn.shape == (64, 64, 3)


# -------------------------------------------------------------------------------------------------------- photometric


def test_brightness_multiplies() -> None:
    image = picture() // 2 + 20
    plain = view(image, SPEC, AugmentSpec(), 0).astype(float)
    factors = [(view(image, SPEC, AugmentSpec(brightness=0.3), n) / plain).mean((0, 1)) for n in range(40)]
    assert all(np.ptp(f) < 0.03 for f in factors)  # the same for each channel
    assert 0.69 < np.min(factors) < 0.76
    assert 1.24 < np.max(factors) < 1.31


def test_channel_brightness_multiplies_each_channel() -> None:
    image = picture() // 2 + 20
    plain = view(image, SPEC, AugmentSpec(), 0).astype(float)
    factors = [(view(image, SPEC, AugmentSpec(channel_brightness=0.3), n) / plain).mean((0, 1)) for n in range(40)]
    assert np.mean([np.ptp(f) for f in factors]) > 0.15
    assert 0.69 < np.min(factors) < np.max(factors) < 1.31


def test_contrast_scales_about_the_mean() -> None:
    image = np.repeat(picture()[..., :1], 3, 2) // 2 + 60  # grey, so that every channel has the pivot's mean
    plain = view(image, SPEC, AugmentSpec(), 0).astype(float)
    ratios = []
    for n in range(40):
        drawn = view(image, SPEC, AugmentSpec(contrast=0.3), n).astype(float)
        assert abs(drawn.mean() - plain.mean()) < 1
        ratios.append(drawn.std() / plain.std())
    assert 0.69 < min(ratios) < 0.76
    assert 1.24 < max(ratios) < 1.31


def test_noise_is_gaussian_of_the_deviation_asked_for() -> None:
    flat = np.full((90, 120, 3), 128, np.uint8)
    noise = np.concatenate([view(flat, SPEC, AugmentSpec(noise=0.1), n).ravel() for n in range(8)]) - 128.0
    assert abs(noise.mean()) < 0.5
    assert noise.std() == pytest.approx(25.5, rel=0.02)
    assert (np.abs(noise) < 25.5).mean() == pytest.approx(0.683, abs=0.02)
    assert ((noise / noise.std()) ** 4).mean() == pytest.approx(3, rel=0.08)


def test_downsampling_takes_detail_and_keeps_the_mean() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (73, 73, 3)).astype(np.uint8)
    plain = view(image, SPEC, AugmentSpec(), 0)
    drawn = [view(image, SPEC, AugmentSpec(downsample=0.25), n) for n in range(10)]
    assert all(d.std() <= plain.std() + 1 for d in drawn)
    assert min(d.std() for d in drawn) < plain.std() / 2
    assert all(abs(d.mean() - plain.mean()) < 4 for d in drawn)


# ------------------------------------------------------------------------------------------------- transforms of users


@pytest.mark.parametrize(("kind", "magnitude"), [("randaugment", 9), ("randaugment", 30), ("trivial", 0)])
def test_auto_augmentation_draws_what_torchvision_draws(kind: str, magnitude: int) -> None:
    image = torch.from_numpy(picture(12, 12).transpose(2, 0, 1).copy())
    fill, how = (9, 8, 7), v2.InterpolationMode.BILINEAR
    theirs = (
        v2.RandAugment(num_ops=1, magnitude=magnitude, interpolation=how, fill=[9, 8, 7])
        if kind == "randaugment"
        else v2.TrivialAugmentWide(interpolation=how, fill=[9, 8, 7])
    )
    rng = np.random.default_rng(0)
    drawn = [auto_augment(image, kind, ops=1, magnitude=magnitude, fill=fill, rng=rng) for _ in range(250)]
    mine = {bytes(picture_.numpy()) for picture_ in drawn}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        known = {bytes(theirs(image).numpy()) for _ in range(400 if kind == "randaugment" else 6000)}
    if kind == "randaugment":
        assert mine == known  # every operation, with either sign where it has one
        assert len(mine) > 15
    else:
        assert len(mine - known) <= 3  # six thousand draws miss a few of its many outcomes
        assert len(mine) > 100
    before = image.clone()
    twice = auto_augment(image, "randaugment", ops=2, magnitude=9, fill=fill, rng=np.random.default_rng(3))
    assert torch.equal(image, before)
    assert bytes(twice.numpy()) not in mine


def test_auto_augmentation_leaves_global_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name in ("randaugment", "trivial"):
        view(picture(), SPEC, POLICIES[name], 1)
    assert torch.equal(torch.rand(3), expected)


def test_erasing_blanks_one_rectangle_in_the_mean_colour_as_often_as_told() -> None:
    spec = replace(SPEC, mean=(0.1, 0.2, 0.3))
    plain = view(ramp(64, 64), spec, AugmentSpec(), 1)
    blanked, shares = 0, []
    for n in range(300):
        drawn = view(ramp(64, 64), spec, AugmentSpec(erasing=0.4), n)
        changed = (drawn != plain).any(2)
        if not changed.any():
            continue
        blanked += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == spec.fill).all()
        shares.append(box.shape[0] * box.shape[1] / 64**2)
    assert blanked / 300 == pytest.approx(0.4, abs=0.09)
    assert 0.015 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.34


def test_any_torchvision_transform_is_pure_and_leaves_global_numbers() -> None:
    image = picture()
    transform = v2.Compose([v2.RandomResizedCrop(64, antialias=True), v2.ColorJitter(0.4), v2.RandomHorizontalFlip()])
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = torch.rand(3), np.random.random(3), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    first = view(image, SPEC, transform, 1)
    assert np.array_equal(view(image, SPEC, transform, 1), first)
    assert not np.array_equal(view(image, SPEC, transform, 2), first)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.random(3), expected[1])
    assert random.random() == expected[2]


@pytest.mark.parametrize("draw", [np.random.randint, random.randrange])
def test_a_transform_with_numbers_of_numpy_or_python_is_pure_too(draw: Callable[[int], int]) -> None:
    def shift(pixels: Tensor) -> Tensor:
        moved = pixels.roll(draw(60), 2)
        time.sleep(0.002)  # where another thread would come in between
        return moved.roll((draw(60), draw(60)), (1, 2))

    batch = augmented_batch([picture()] * 8, SPEC, shift, seed=0, indices=[0] * 8, views=[1, 2] * 4, workers=3)
    assert torch.equal(batch[0::2], batch[:1].expand(4, -1, -1, -1))
    assert not torch.equal(batch[0], batch[1])
    draw(5)
    assert np.array_equal(view(picture(), SPEC, shift, 1), batch[0].permute(1, 2, 0).numpy())


def test_a_transforms_result_is_brought_to_size() -> None:
    image = picture()
    evaluated = evaluation_view(Image.fromarray(image), SPEC)
    assert np.array_equal(view(image, SPEC, v2.Identity(), 1), evaluated)
    floats = v2.ToDtype(torch.float32, scale=True)
    assert np.array_equal(view(image, SPEC, floats, 1), evaluated)
    grey = view(image, SPEC, v2.Grayscale(), 1)
    assert np.array_equal(grey[..., 0], grey[..., 2])
    exact = torch.arange(3 * 64 * 64).view(3, 64, 64).to(torch.uint8)
    assert np.array_equal(view(image, SPEC, lambda _: exact, 1), exact.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]),
            "Leave Normalize out",
        ),
        (v2.ToDtype(torch.float32), "floats from 0 to 1"),
        (v2.FiveCrop(20), "returned a tuple"),
        (lambda x: x[None], r"a tensor of shape \[1, 3, 90, 120\]"),
    ],
)
def test_a_transform_that_returns_no_picture_is_refused(transform: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        view(picture(), SPEC, transform, 1)
