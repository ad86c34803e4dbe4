"""Pictures in memory, and pictures smaller than the network's input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import headstart
from headstart import DataError, images_from_arrays, open_image
from headstart.prepared import PictureWriter
from headstart.sizes import input_sizes, picture_sizes, small_pictures_sentence


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_arrays_are_files_with_the_same_pixels() -> None:
    pixels = noise(6, 9, 7, 3)
    table = images_from_arrays(pixels, [10, 2, 10, 2, 2, 10])
    assert table.class_names == ("2", "10")
    assert table.labels.tolist() == [1, 0, 1, 0, 0, 1], "in the order they were given"
    assert all(np.array_equal(np.asarray(open_image(p)), one) for p, one in zip(table.paths, pixels, strict=True))
    stamps = [path.stat().st_mtime_ns for path in table.paths]
    again = images_from_arrays(pixels.copy(), np.array([10, 2, 10, 2, 2, 10]))
    assert again.paths == table.paths
    assert [path.stat().st_mtime_ns for path in again.paths] == stamps
    pixels[0, 0, 0, 0] ^= 1
    assert images_from_arrays(pixels, [10, 2, 10, 2, 2, 10]).root != table.root


def test_class_names_and_groups() -> None:
    table = images_from_arrays(noise(4, 8, 8), [1, 0, 1, 1], class_names=("dog", "cat"), groups=["", "a", "a", ""])
    assert table.class_names == ("dog", "cat")
    assert table.labels.tolist() == [1, 0, 1, 1]
    assert table.groups == ("", "a", "a", "")
    words = images_from_arrays(noise(2, 8, 8, 1), ["cat", "dog"], class_names=("dog", "cat"))
    assert words.labels.tolist() == [1, 0]


@pytest.mark.parametrize("images", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 0, 3), np.uint8), []])
def test_no_pictures_are_told(images: object) -> None:
    with pytest.raises(DataError, match="There are no pictures"):
        images_from_arrays(images, [])  # type: ignore[arg-type]


def test_a_picture_without_pixels_is_told() -> None:
    with pytest.raises(DataError, match=r"picture 0 is uint8 \[0, 8, 3\]; it has no pixels"):
        images_from_arrays(np.zeros((2, 0, 8, 3), np.uint8), ["a", "b"])


def test_pil_pictures_of_any_mode_and_size_look_as_their_files_do(tmp_path: Path) -> None:
    base = Image.fromarray(noise(10, 12, 3))
    clear = base.copy()
    clear.putalpha(Image.fromarray(noise(10, 12)))
    turned = Image.Exif()
    turned[0x0112] = 6
    base.save(tmp_path / "turned.jpg", exif=turned)
    base.convert("CMYK").save(tmp_path / "cmyk.jpg")
    base.quantize(16).save(tmp_path / "palette.png")
    clear.save(tmp_path / "clear.png")
    files = [tmp_path / name for name in ("turned.jpg", "cmyk.jpg", "palette.png", "clear.png")]
    opened = [Image.open(path) for path in files]
    table = images_from_arrays([*opened, base], ["a", "b", "c", "d", "e"])
    for path, made in zip(files, table.paths, strict=False):
        assert np.array_equal(np.asarray(open_image(made)), np.asarray(open_image(path))), path.name
    for image in opened:
        image.close()


@pytest.mark.parametrize("mode", ["F", "LAB", "HSV"])
def test_pictures_without_an_agreed_white_are_refused_as_their_files_are(mode: str, cache: Path) -> None:
    good = Image.fromarray(noise(8, 8, 3))
    with pytest.raises(DataError, match=f"picture 1: {mode} pixels, which have no agreed white"):
        images_from_arrays([good, Image.new(mode, (8, 8))], ["a", "b"])
    with pytest.raises(DataError, match=rf"Picture 0 \(a\): {mode} pixels"):
        PictureWriter(cache).add(Image.new(mode, (8, 8)), "a")


def test_sixteen_bit_pictures_are_scaled_in_memory_as_in_files(tmp_path: Path) -> None:
    wide = np.arange(80, dtype=np.int32).reshape(8, 10) * 800
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "wide.png")
    table = images_from_arrays([Image.fromarray(wide), Image.new("RGB", (8, 8))], ["a", "b"])
    assert np.array_equal(np.asarray(open_image(table.paths[0])), np.asarray(open_image(tmp_path / "wide.png")))


def test_labels_of_any_kind_are_named_as_in_a_manifest() -> None:
    pixels = noise(4, 8, 8)
    for labels in (list(torch.tensor([3, 1, 3, 1])), list(np.array([3.0, 1.0, 3.0, 1.0])), torch.tensor([3, 1, 3, 1])):
        assert images_from_arrays(pixels, labels).class_names == ("1", "3")
    assert images_from_arrays(pixels, [1.0, 0, 1, 1], class_names=("a", "b")).labels.tolist() == [1, 0, 1, 1]
    for missing in (float("nan"), None, np.float32("nan")):
        with pytest.raises(DataError, match=r"label 2 is (nan|None)"):
            images_from_arrays(pixels, [0, 1, missing, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (noise(2, 8, 8, 3) / 255.0, [0, 1], r"picture 0 is float64 \[8, 8, 3\].*\* 255"),
        (noise(2, 3, 8, 8), [0, 1], r"uint8 \[3, 8, 8\].*transpose"),
        (noise(2, 8, 8, 3), [0, 1, 1], r"2 pictures, 3 labels"),
        (noise(2, 8, 8, 3), np.eye(2), r"labels have shape \(2, 2\).*argmax"),
        (noise(2, 8, 8, 3), [[0], [0, 1]], r"labels have shape of several lengths; .*multi-label"),
        (noise(2, 8, 8, 3), [0, 0.2], r"label 1 is 0.2; with class_names"),
        (noise(2, 8, 8, 3), [0, 5], r"label 5 has no name: class_names has 2"),
    ],
)
def test_what_is_refused(images: np.ndarray, labels: list[int], message: str, cache: Path) -> None:
    with pytest.raises(DataError, match=message):
        images_from_arrays(images, labels, class_names=("a", "b"))
    assert not list(cache.rglob("*.png"))


def test_fine_tune_takes_a_pair_and_tells_that_pictures_are_scaled_up(tmp_path: Path) -> None:
    labels = np.arange(24) % 2
    pixels = noise(24, 20, 24, 3) // 2 + 100 * labels[:, None, None, None].astype(np.uint8)
    result = headstart.fine_tune(
        (pixels, labels), backbone="test_resnet", weights="none", spec_overrides={"image_size": 32}, device="cpu",
        recipe=headstart.Recipe(stages=(headstart.Stage(epochs=1, views=1),)), out=tmp_path / "run", workers=1,
    )  # fmt: skip
    assert result.splits.class_names == ("0", "1")
    sizes = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["sizes"]
    measured = len(result.splits.train)
    assert sizes == {
        "input_px": 32, "measured": measured, "smaller": 1.0, "median_width_px": 24, "median_height_px": 20,
    }  # fmt: skip
    text = (tmp_path / "run" / "report.html").read_text()
    assert "100 % of the training pictures are smaller than the backbone&#x27;s input of 32 px" in text
    assert "(median 24 x 20 px)" in text
    with pytest.raises(headstart.RecipeError, match="root: without effect on a tuple"):
        headstart.fine_tune((pixels, labels), root=tmp_path)


def test_pictures_without_a_group_stand_by_themselves() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    table = images_from_arrays(pixels, ["a", "b"] * 4, groups=[None, float("nan")] * 3 + ["x", "x"])
    assert sorted(table.groups) == [""] * 6 + ["x", "x"]


def test_sizes_come_from_headers_of_some_pictures(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.new("RGB", (100, 10 + i)).save(path)
    assert picture_sizes(paths, limit=3).tolist() == [[100, 10], [100, 14], [100, 18]]
    paths[0].write_bytes(b"x")
    assert len(picture_sizes(paths)) == 9
    large = input_sizes(paths, 11)
    assert large["smaller"] == 0.0
    assert small_pictures_sentence(large) == ""
    assert small_pictures_sentence(input_sizes(paths, 15)).startswith("44 % of the training pictures are smaller")
    assert input_sizes([], 15) == {}
    assert small_pictures_sentence({}) == ""
