"""DataSpec, the one evaluation view, working images and normalisation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from headstart.dataset import open_image
from headstart.dataspec import FITS, WORKING_MARGIN, DataSpec, working_size
from headstart.errors import DataError, ModelError
from headstart.portable import RESAMPLING, evaluation_view
from headstart.transforms import load_view, load_views, normalise, working_image


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth made picture with structure at several sizes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    for cells, weight in ((5, 1.0), (24, 0.4), (90, 0.2)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), weight)
    return image


def quadrants(width: int, height: int) -> Image.Image:
    """Left red, right green, top half darker: shows what part of a picture stands in a view."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 250
    pixels[:, width // 2 :, 1] = 250
    pixels[: height // 2] //= 2
    return Image.fromarray(pixels)


# ----------------------------------------------------------------------------------------------------------- DataSpec


def test_spec_survives_json() -> None:
    spec = DataSpec(300, (0.5, 0.5, 0.5), (0.2, 0.3, 0.4), "bicubic", 0.904, "letterbox")
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.to_dict().keys() == {"image_size", "mean", "std", "interpolation", "crop_pct", "fit"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 4}, "image_size is 4; it takes a whole number from 8 to 4096"),
        ({"image_size": 224.0}, "image_size is 224.0"),
        ({"image_size": True}, "image_size is True"),
        ({"mean": (0.5, 0.5)}, "mean is .* three numbers from 0 to 1"),
        ({"mean": (123, 116, 103)}, "mean is"),
        ({"mean": "abc"}, "mean is 'abc'"),
        ({"std": (0.2, 0.2, 0.0)}, "std is"),
        ({"std": (0.2, 0.2, float("nan"))}, "std is"),
        ({"crop_pct": 1.15}, "crop_pct is 1.15; it takes a number from 0.01 to 1"),
        ({"interpolation": "bilinar"}, "Did you mean: bilinear"),
        ({"fit": "stretch"}, "fit is 'stretch'; it takes crop, squash, letterbox"),
    ],
)
def test_spec_checks_ranges(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DataSpec(**{"image_size": 224, **change})  # type: ignore[arg-type]


def test_spec_schema_is_closed() -> None:
    data = DataSpec(224).to_dict()
    with pytest.raises(ModelError, match=r"unknown key 'croppct'.*Did you mean: crop_pct"):
        DataSpec.from_dict({**data, "croppct": 1})
    with pytest.raises(ModelError, match="missing mean, std"):
        DataSpec.from_dict({k: v for k, v in data.items() if k not in ("mean", "std")})
    with pytest.raises(ModelError, match="expected an object"):
        DataSpec.from_dict([224])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- evaluation views


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (224, 0.9), (96, 1.0), (75, 0.904)])
def test_crop_is_timms_evaluation_transform(interpolation: str, size: int, crop_pct: float) -> None:
    timm_data = pytest.importorskip("timm.data")
    spec = DataSpec(size, interpolation=interpolation, crop_pct=crop_pct)
    reference = timm_data.create_transform(
        (3, size, size), is_training=False, interpolation=interpolation, crop_pct=crop_pct, mean=spec.mean, std=spec.std
    )
    for width, height in ((320, 240), (233, 411), (50, 61), (1500, 1111)):
        image = photograph(width, height)
        view = torch.from_numpy(evaluation_view(image, spec)).permute(2, 0, 1)[None]
        assert torch.allclose(normalise(view, spec)[0], reference(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("size", [(500, 20), (20, 500), (1, 1), (64, 64), (1, 3000)])
def test_every_view_is_square_uint8(fit: str, interpolation: str, size: tuple[int, int]) -> None:
    spec = DataSpec(64, interpolation=interpolation, fit=fit)
    view = evaluation_view(Image.new("RGB", size, (9, 80, 200)), spec)
    assert (view.shape, view.dtype) == ((64, 64, 3), np.uint8)
    assert view.flags.writeable
    if fit != "letterbox":
        assert (view == (9, 80, 200)).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "mean"), [((50, 40), 0.02), ((100, 75), 0.02), ((300, 225), 0.02), ((1000, 700), 0.5)]
)
def test_a_working_image_is_pillows_within_two_grey_levels(
    size: tuple[int, int], mean: float, interpolation: str
) -> None:
    image, spec = photograph(*size), DataSpec(64, interpolation=interpolation)
    made = working_image(image, spec).astype(int)
    plain = np.asarray(image.resize(working_size(*size, spec), RESAMPLING[interpolation])).astype(int)
    assert made.shape == plain.shape
    assert np.abs(made - plain).max() <= 2
    assert np.abs(made - plain).mean() < mean


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_a_working_image_by_other_rules_is_pillows(interpolation: str) -> None:
    image, spec = photograph(100, 75), DataSpec(64, interpolation=interpolation)
    plain = image.resize(working_size(100, 75, spec), RESAMPLING[interpolation])
    assert np.array_equal(working_image(image, spec), np.asarray(plain))


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 2)])
def test_long_strips_do_not_fill_the_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", size)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def record(self: Image.Image, to: tuple[int, int], *args: object, **options: object) -> Image.Image:
        sizes.append(to)
        return resize(self, (8, 8) if max(to) > 10_000 else to, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", record)
    for fit in FITS:
        spec = DataSpec(64, fit=fit)
        evaluation_view(image, spec)
        working_image(image, spec)
    assert max(max(to) for to in sizes) < 10 * 64


def test_fits_show_what_they_promise() -> None:
    image = quadrants(200, 100)
    squash = evaluation_view(image, DataSpec(64, fit="squash"))
    assert squash[60, 2, 0] == 250
    assert squash[60, 62, 1] == 250
    assert squash[10, 2, 0] == 125
    box = evaluation_view(image, DataSpec(64, fit="letterbox"))
    fill = [round(255 * m) for m in DataSpec(64).mean]
    assert (box[:16] == fill).all()
    assert (box[48:] == fill).all()
    assert box[45, 2, 0] == 250
    assert box[20, 62, 1] == 125
    crop = evaluation_view(image, DataSpec(64, crop_pct=1.0))
    marked = np.zeros((100, 200, 3), np.uint8)
    marked[:, 40:160] = 255  # the centre 100 x 100 and twenty pixels more
    assert (evaluation_view(Image.fromarray(marked), DataSpec(64, crop_pct=1.0)) == 255).all()
    assert crop[60, 31, 0] > 100
    assert crop[60, 33, 1] > 100


def test_shrinking_is_antialiased() -> None:
    fine = np.indices((1024, 1024)).sum(0) % 2 * 255  # a chequered picture is grey from afar
    image = Image.fromarray(np.repeat(fine[..., None], 3, 2).astype(np.uint8))
    for fit in FITS:
        view = evaluation_view(image, DataSpec(64, fit=fit)).astype(int)
        assert np.abs(view - 127).max() <= 2


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1600, 1200), (1080, 1920)])
def test_large_pictures_give_one_view_from_path_or_bytes(fit: str, size: tuple[int, int], tmp_path: Path) -> None:
    spec = DataSpec(96, interpolation="bicubic", fit=fit)
    path = tmp_path / "large.jpg"
    photograph(*size).save(path, quality=90)
    view = load_view(path, spec)
    assert (view.shape, view.dtype, view.is_contiguous()) == ((3, 96, 96), torch.uint8, True)
    assert torch.equal(view, load_view(path.read_bytes(), spec))
    assert torch.equal(view, load_view(str(path), spec))
    assert torch.equal(view, torch.from_numpy(evaluation_view(open_image(path), spec)).permute(2, 0, 1))
    assert torch.equal(load_views([path, path], spec)[1], view)


def test_large_pictures_are_decoded_in_full_before_they_are_shrunk(tmp_path: Path) -> None:
    """A JPEG may be decoded at an eighth of its size (draft mode); the view would then depend on who asks."""
    path = tmp_path / "large.jpg"
    photograph(2400, 1800, seed=3).save(path, quality=90)
    spec = DataSpec(64, crop_pct=1.0)
    reference = tv.Compose([tv.Resize(64), tv.CenterCrop(64)])(Image.open(path).convert("RGB"))
    assert np.array_equal(load_view(path, spec).permute(1, 2, 0).numpy(), np.asarray(reference))
    drafted = Image.open(path)
    drafted.draft("RGB", (64, 64))
    assert not np.array_equal(np.asarray(tv.Compose([tv.Resize(64), tv.CenterCrop(64)])(drafted)), reference)


def test_exif_orientation_reaches_the_view(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants(100, 100).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    quadrants(100, 100).save(tmp_path / "upright.png")
    spec = DataSpec(32)
    assert torch.equal(load_view(tmp_path / "turned.png", spec), load_view(tmp_path / "upright.png", spec))


def test_load_views_is_a_plain_loop_whatever_the_workers(photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    spec = DataSpec(32)
    expected = torch.stack([load_view(path, spec) for path in paths])
    for workers in (0, 1, 3):
        assert torch.equal(load_views(paths, spec, workers=workers), expected)
    assert load_views([], spec).shape == (0, 3, 32, 32)


def test_load_views_names_a_bad_picture(photos: Path) -> None:
    bad = photos / "red" / "red3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"red3\.jpg: damaged or cut off"):
        load_views(sorted(photos.rglob("*.jpg")), DataSpec(32))


# ----------------------------------------------------------------------------------------------------- working images


@pytest.mark.parametrize(
    ("fit", "size", "expected"),
    [
        ("crop", (1000, 800), (368, 294)),  # 224 / 0.875 = 256; 1.15 * 256 = 294
        ("crop", (300, 280), (300, 280)),  # between 256 and 294: as it is
        ("crop", (96, 48), (512, 256)),  # too small: enlarged to what the view needs
        ("letterbox", (1000, 800), (258, 206)),
        ("letterbox", (48, 24), (224, 112)),
        ("squash", (1000, 240), (258, 240)),
        ("squash", (100, 1000), (224, 258)),
        ("crop", (10_000, 10), (2048, 2)),  # a strip does not fill the memory
    ],
)
def test_working_sizes(fit: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = working_image(Image.new("RGB", size), DataSpec(224, fit=fit))
    assert (pixels.shape[1], pixels.shape[0]) == expected
    assert pixels.dtype == np.uint8


def test_the_working_margin_covers_the_evaluation_view() -> None:
    """The evaluation view cut from a working image is nearly the one from the file."""
    image = photograph(900, 700)
    spec = DataSpec(96)
    again = evaluation_view(Image.fromarray(working_image(image, spec)), spec).astype(int)
    assert np.abs(again - evaluation_view(image, spec)).mean() < 2
    assert WORKING_MARGIN > 1


# ------------------------------------------------------------------------------------------------------ normalisation


def test_normalise_is_torchvisions() -> None:
    spec = DataSpec(32, (0.1, 0.5, 0.9), (0.2, 0.3, 0.5))
    image = photograph(32, 32)
    reference = tv.Compose([tv.ToTensor(), tv.Normalize(spec.mean, spec.std)])(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = load_view(buffer.getvalue(), DataSpec(32, spec.mean, spec.std, crop_pct=1.0))[None]
    assert torch.equal(normalise(pixels, spec)[0], reference)
    assert torch.equal(normalise(pixels.float(), spec)[0], reference)
    assert normalise(pixels, spec).dtype == torch.float32


def test_normalise_leaves_its_input_and_keeps_gradients() -> None:
    pixels = torch.full((1, 3, 8, 8), 255.0, requires_grad=True)
    normalise(pixels, DataSpec(8, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))).sum().backward()
    assert pixels.min() == 255
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad, torch.full_like(pixels, 2 / 255))


def test_mean_colour_normalises_to_about_zero() -> None:
    spec = DataSpec(16, fit="letterbox")
    view = evaluation_view(Image.new("RGB", (100, 1)), spec)
    values = normalise(torch.from_numpy(view).permute(2, 0, 1)[None], spec)
    assert values[0, :, 0].abs().max() < 0.01
