"""Intake: layouts, the class map, the decoder, bad files, splits and orders."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from headstart import decode
from headstart.crews import bad_reasons
from headstart.dataset import Splits, check_images, list_image_files, load_images, open_image
from headstart.errors import DataError, SetupError
from headstart.manifest import write_manifest
from headstart.order import epoch_order, random_stream
from headstart.splitting import split
from headstart.threads import map_threads

# ---------------------------------------------------------------------------------------------------- made folders


def put(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = {".png": "PNG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
    Image.new("RGB", size, colour).save(path, formats.get(path.suffix.lower(), "JPEG"))
    return path


def fill(root: Path, counts: dict[str, int]) -> Path:
    for folder, n in counts.items():
        for i in range(n):
            put(root / folder / f"{i}.jpg")
    return root


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ layouts that load


def test_one_folder_per_class(tmp_path: Path) -> None:
    table = load_images(fill(tmp_path, {"dog": 3, "cat": 2}))
    assert table.class_names == ("cat", "dog")
    assert table.labels.tolist() == [0, 0, 1, 1, 1]
    assert table.labels.dtype == np.int64
    assert table.relative_paths == ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "dog/2.jpg")
    assert table.split_names == ("",) * 5
    assert table.class_counts().tolist() == [2, 3]
    assert all(path.is_absolute() for path in table.paths)
    assert len(table) == 5


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("TRAIN", "Valid", "Test"), ("Training", "validation", "testing")],
)
def test_split_folders_in_any_case(tmp_path: Path, train: str, val: str, test: str) -> None:
    counts = {f"{name}/{c}": n for name, n in ((train, 3), (val, 2), (test, 1)) for c in ("a", "b")}
    table = load_images(fill(tmp_path, counts))
    assert table.class_names == ("a", "b")
    assert {name: table.split_names.count(name) for name in ("train", "val", "test")} == {
        "train": 6, "val": 4, "test": 2,
    }  # fmt: skip


def test_a_class_missing_from_one_split_shifts_nothing(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "val/b": 1, "val/c": 1, "test/c": 1})
    table = load_images(tmp_path)
    assert table.class_names == ("a", "b", "c")
    for path, label in zip(table.relative_paths, table.labels, strict=True):
        assert path.split("/")[1] == table.class_names[label]
    assert split(table).test.class_counts().tolist() == [0, 0, 1]


def test_a_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dogs": 1})
    with pytest.raises(DataError, match=r"'dogs' in split 'val'.*Did you mean: dog\?"):
        load_images(tmp_path)


def test_numeric_names_sort_naturally(tmp_path: Path) -> None:
    table = load_images(fill(tmp_path, {str(i): 1 for i in (10, 2, 1, 100, 20)}))
    assert table.class_names == ("1", "2", "10", "20", "100")
    fill(tmp_path, {"1": 12})
    assert [p.name for p in load_images(tmp_path).paths[:12]] == [f"{i}.jpg" for i in range(12)]


def test_names_of_which_one_goes_on_with_a_number_sort(tmp_path: Path) -> None:
    folders = {"cat2": 1, "cat": 1, "Cat10": 1, "speed 30": 1, "speed": 1, "v1b2": 1, "v1b": 1, "v1": 1}
    table = load_images(fill(tmp_path, folders))
    assert table.class_names == ("cat", "cat2", "Cat10", "speed", "speed 30", "v1", "v1b", "v1b2")


def test_splits_have_one_class_map(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 6, "dog": 6})
    splits = split(load_images(tmp_path), test=0.0)
    turned = load_images(tmp_path, class_names=["dog", "cat"])
    with pytest.raises(DataError, match=r"classes of test \(dog, cat\) are not those of train \(cat, dog\)"):
        Splits(train=splits.train, val=splits.val, test=turned)


def test_too_few_pictures_without_other_splits_are_told(tmp_path: Path) -> None:
    table = load_images(fill(tmp_path, {"cat": 2, "dog": 2}), class_names=["cat", "dog", "emu"])
    with pytest.raises(DataError, match="'emu' has 0; one each for train makes 1"):
        split(table, val=0, test=0)


def test_hidden_folders_and_files_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 2, "dog": 2, ".ipynb_checkpoints": 1, "__MACOSX": 1, "cat/.ipynb_checkpoints": 1})
    for name in ("._0.jpg", "Thumbs.db", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"\0\0")
    table = load_images(tmp_path)
    assert table.class_names == ("cat", "dog")
    assert len(table) == 4
    assert table.ignored == ()


def test_hidden_folders_inside_split_folders_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, {"train/cat": 2, "train/dog": 2, "train/.ipynb_checkpoints": 1, "__MACOSX/train/cat": 1})
    assert load_images(tmp_path).class_names == ("cat", "dog")


def test_other_files_in_class_folders_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 2, "dog": 2})
    for name in ("cat/a.txt", "cat/b.TXT", "dog/labels.csv"):
        (tmp_path / name).write_text("x")
    assert load_images(tmp_path).ignored == ((".csv", 1), (".txt", 2))


def test_extensions_are_hints_in_any_case(tmp_path: Path) -> None:
    fill(tmp_path, {"b": 1})
    for name in ("1.JPG", "2.JPeG", "3.png", "4.webp", "5.bmp", "6.gif", "7.tif", "8.TIFF"):
        put(tmp_path / "a" / name)
    (tmp_path / "a" / "9.jpg").write_bytes(encoded(Image.new("RGB", (5, 5)), "PNG"))
    assert load_images(tmp_path).class_counts().tolist() == [9, 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    table = load_images(fill(tmp_path, {"train": 2, "car": 2, "plane": 2}))
    assert table.class_names == ("car", "plane", "train")
    assert set(table.split_names) == {""}


def test_a_link_to_itself_is_a_picture_that_cannot_be_read(photos: Path) -> None:
    (photos / "red" / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(DataError, match=r"red/self\.jpg"):
        load_images(photos)
    assert "red/self.jpg" not in [str(p.relative_to(photos)) for p in load_images(photos, bad_files="skip").paths]


def test_named_split_folders(tmp_path: Path) -> None:
    fill(tmp_path, {f"{s}/{c}": n for s, n in (("train", 4), ("val", 2), ("holdout", 1)) for c in "ab"})
    table = load_images(tmp_path, test_folder="holdout")
    assert [table.split_names.count(s) for s in ("train", "val", "test")] == [8, 4, 2]
    shutil.rmtree(tmp_path / "holdout")
    table = load_images(tmp_path, test_folder="VAL")
    assert [table.split_names.count(s) for s in ("train", "val", "test")] == [8, 0, 4]
    parts = split(table, val=0.25)
    assert [len(parts.train), len(parts.val), len(parts.test)] == [6, 2, 4]


def test_a_named_split_folder_leaves_out_the_usual_one(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    fill(tmp_path, {"test": 3})  # unlabelled, as on Kaggle
    assert load_images(tmp_path, test_folder="val").split_names.count("test") == 2
    with pytest.raises(DataError, match="in no class folder"):
        load_images(tmp_path)


def test_same_names_in_two_classes(tmp_path: Path) -> None:
    table = load_images(fill(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1}))
    assert len(set(table.relative_paths)) == len(table) == 8


def test_imposed_class_map(tmp_path: Path) -> None:
    fill(tmp_path, {"dog": 2, "ant": 1})
    table = load_images(tmp_path, class_names=("zebra", "dog", "ant"))
    assert table.class_names == ("zebra", "dog", "ant")
    assert sorted(table.labels.tolist()) == [1, 1, 2]
    with pytest.raises(DataError, match=r"'ant' .* not among the 2 classes of the class names given: dogs, cat"):
        load_images(tmp_path, class_names=("dogs", "cat"))
    test_only = fill(tmp_path / "t", {"test/dog": 2})
    assert load_images(test_only, class_names=("cat", "dog")).labels.tolist() == [1, 1]


# -------------------------------------------------------------------------------------------- layouts that are refused

MULTI_LABEL = "multi-label"


def test_multi_label_table_beside_flat_pictures(tmp_path: Path) -> None:
    fill(tmp_path, {".": 3})
    (tmp_path / "labels.csv").write_text("file,cat,dog\n0.jpg,1,1\n")
    with pytest.raises(DataError, match=r"beside labels.csv.*one folder per class.*multi-label"):
        load_images(tmp_path)


def test_multi_label_table_beside_a_folder_of_pictures(tmp_path: Path) -> None:
    fill(tmp_path, {"images": 3})
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(DataError, match=r"beside train.json.*multi-label"):
        load_images(tmp_path)


def test_flat_folder(tmp_path: Path) -> None:
    fill(tmp_path, {".": 3})
    with pytest.raises(DataError, match=r"in no class folder.*one folder per class"):
        load_images(tmp_path)


def test_flat_split_folders(tmp_path: Path) -> None:
    fill(tmp_path, {"train": 3, "test": 3})
    with pytest.raises(DataError, match=r"no class folders in test, train\. .*one folder per class"):
        load_images(tmp_path)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_nested_class_folders(tmp_path: Path, prefix: str) -> None:
    fill(tmp_path, {f"{prefix}animal/cat": 2, f"{prefix}animal/dog": 2, f"{prefix}plant": 2})
    with pytest.raises(DataError, match=r"nested in class folders \(animal/cat, animal/dog\).*multi-label"):
        load_images(tmp_path)


def test_the_refusal_is_one_line_and_shows_the_layout(tmp_path: Path) -> None:
    fill(tmp_path / "pets", {".": 1})
    with pytest.raises(DataError) as caught:
        load_images(tmp_path / "pets")
    assert "\n" not in str(caught.value)
    assert "pets/cat/1.jpg and pets/dog/2.jpg" in str(caught.value)
    assert "pets/train/cat/1.jpg" in str(caught.value)


def test_wrapper_folder_names_the_real_one(tmp_path: Path) -> None:
    fill(tmp_path, {"flowers/rose": 2, "flowers/tulip": 2})
    with pytest.raises(DataError, match=r"its only folder, 'flowers', holds the folders of pictures\. Pass .*flowers"):
        load_images(tmp_path)


@pytest.mark.parametrize("split_name", ["", "val/"])
def test_empty_class_folder(tmp_path: Path, split_name: str) -> None:
    train = "train/" if split_name else ""
    fill(tmp_path, {f"{train}a": 2, f"{train}b": 2})
    (tmp_path / f"{split_name}c").mkdir(parents=True)
    (tmp_path / f"{split_name}c" / "x.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no picture in class folder c \(it holds 1 x \.heic\)"):
        load_images(tmp_path)


def test_one_class_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"One class only .*'cat'"):
        load_images(fill(tmp_path, {"cat": 4}))


def test_pictures_beside_the_class_folders(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 2, "dog": 2, ".": 1})
    with pytest.raises(DataError, match=r"beside the folders have no label \(0\.jpg\)"):
        load_images(tmp_path)


def test_a_folder_that_belongs_to_no_split(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a": 2, "train/b": 2, "extra/a": 1})
    (tmp_path / "docs").mkdir()  # without pictures: nothing is lost by leaving it out
    with pytest.raises(DataError, match=r"extra beside the split folders train belongs to no split"):
        load_images(tmp_path)


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    fill(tmp_path, {f"{s}/{c}": 1 for s in ("train", "val", "valid") for c in "ab"})
    with pytest.raises(DataError, match=r"'val' and 'valid' both mean split 'val'.*--val-folder"):
        load_images(tmp_path)


def test_wrong_names_of_split_folders(tmp_path: Path) -> None:
    fill(tmp_path, {f"{s}/{c}": 1 for s in ("train", "val") for c in "ab"})
    with pytest.raises(DataError, match=r"no folder 'vla' to use as split 'test'.*Did you mean: val\?"):
        load_images(tmp_path, test_folder="vla")
    with pytest.raises(DataError, match="val and test are the same folder"):
        load_images(tmp_path, val_folder="val", test_folder="val")


def test_no_train_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"val/a": 2, "val/b": 2})
    with pytest.raises(DataError, match=r"no split folder 'train'"):
        load_images(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"photos/a": 1})
    with pytest.raises(DataError, match=r"No folder .*phots\. Did you mean: photos\?"):
        load_images(tmp_path / "phots")
    with pytest.raises(DataError, match="is a file"):
        load_images(tmp_path / "photos" / "a" / "0.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture and no class folder"):
        load_images(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    fill(tmp_path, {"a": 4, "b": 4})
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8))
    (tmp_path / "a" / "cut.jpg").write_bytes(encoded(noise, "JPEG")[:-600])
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "b" / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    return tmp_path


REASONS = {"a/cut.jpg": "cut off", "a/empty.png": "0 bytes", "b/page.jpg": "web page", "b/gone.jpg": "link to nowhere"}


def test_bad_files_are_named_with_their_reasons(damaged: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_images(damaged)
    message = str(caught.value)
    assert "4 of 12 pictures" in message
    assert "--bad-files skip" in message
    for name, reason in REASONS.items():
        (line,) = [line for line in message.splitlines() if line.strip().startswith(name)]
        assert reason in line


def test_bad_files_can_be_skipped(damaged: Path) -> None:
    table = load_images(damaged, bad_files="skip")
    assert table.class_counts().tolist() == [4, 4]
    found = {path.relative_to(damaged).as_posix(): reason for path, reason in table.bad_files}
    assert found.keys() == REASONS.keys()
    assert all(REASONS[name] in reason for name, reason in found.items())
    assert split(table, seed=1).train.bad_files == table.bad_files


def test_the_check_can_be_put_off(damaged: Path) -> None:
    table = load_images(damaged, check=False)
    assert len(table) == 12
    calls: list[tuple[int, int]] = []
    assert len(check_images(table, bad_files="skip", workers=1, progress=lambda *c: calls.append(c))) == 8
    assert calls[-1] == (12, 12)


def test_no_more_than_twenty_bad_files_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1, "b": 1})
    for i in range(25):
        (tmp_path / "a" / f"bad{i}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"25 of 27 [^\0]*and 5 more") as caught:
        load_images(tmp_path)
    assert str(caught.value).count("a/bad") == 20


def test_a_class_lost_to_bad_files_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 2, "b": 0})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"No training picture of b .*0 bytes"):
        load_images(tmp_path, bad_files="skip")


def test_bad_files_takes_two_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="allowed: error, skip"):
        load_images(fill(tmp_path, {"a": 1, "b": 1}), bad_files="drop")


# -------------------------------------------------------------------------------------------------------- the decoder


def pixel(source: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_image(source)
    assert image.mode == "RGB"
    return image.getpixel((x, y))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", decode.FORMATS)
def test_formats_decode_and_stay_usable(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.name"
    path.write_bytes(encoded(Image.new("RGB", (20, 10), (0, 0, 255)), kind))
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.resize((2, 1)).size == (2, 1)  # the file is closed by now
    assert np.abs(np.asarray(image).astype(int) - (0, 0, 255)).max() <= 4
    assert pixel(path.read_bytes()) == image.getpixel((0, 0))


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_off_files_are_refused(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3)).astype(np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(DataError, match="cut off"):
        open_image(data[: int(len(data) * share)])


def test_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match="not a JPEG, PNG, WebP, BMP, GIF or TIFF picture"):
        open_image(encoded(Image.new("RGB", (4, 4)), "PPM"))
    with pytest.raises(DataError, match="HEIC, AVIF"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(40))


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 255, 0, 0), (0, 0, 255, 128)])
    expected = [(255, 0, 0), (255, 255, 255), (127, 127, 255)]
    for kind in ("PNG", "TIFF"):
        assert [pixel(encoded(rgba, kind), x) for x in range(3)] == expected
    grey = Image.new("LA", (2, 1))
    grey.putdata([(50, 255), (50, 0)])
    assert [pixel(encoded(grey, "PNG"), x) for x in range(2)] == [(50,) * 3, (255,) * 3]


def test_palette_transparency_is_laid_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        data = encoded(palette, kind, transparency=1)
        assert [pixel(data, x) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]
    data = encoded(palette, "PNG", transparency=b"\xff\x00")  # one alpha per palette entry
    assert [pixel(data, x) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]
    opaque = Image.new("RGB", (2, 1), (1, 2, 3))
    opaque.putpixel((1, 0), (9, 9, 9))
    data = encoded(opaque, "PNG", transparency=(9, 9, 9))  # one colour stands for nothing
    assert [pixel(data, x) for x in range(2)] == [(1, 2, 3), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), kind)
    assert [pixel(data, x)[0] for x in range(5)] == [0, 1, 4, 128, 255]


def test_wide_pixels_without_a_white_are_refused() -> None:
    with pytest.raises(DataError, match="no agreed white"):
        open_image(encoded(Image.fromarray(np.array([[0.5, 900.0]], dtype=np.float32)), "TIFF"))
    with pytest.raises(DataError, match="beyond the 16-bit range"):
        open_image(encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))
    data = encoded(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)), "TIFF")
    assert pixel(data, 1) == (255, 255, 255)


def test_cmyk_greyscale_and_bilevel() -> None:
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    red, green, blue = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert max(green, blue) < 15
    assert pixel(encoded(Image.new("L", (8, 8), 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (8, 8), 1), "PNG")) == (255, 255, 255)


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert pixel(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    corners = np.zeros((24, 48, 3), np.uint8)  # a picture whose four corners differ
    corners[:12, :24], corners[:12, 24:], corners[12:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    upright = Image.fromarray(corners)
    undo = {  # how a camera held so stores the scene
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, kind, exif=exif))
    assert image.size == (48, 24)
    assert np.abs(np.asarray(image).astype(int)[4::16, 8::32] - corners[4::16, 8::32]).max() < 30


@pytest.mark.parametrize("name", ["simplejpeg", "torchcodec"])
def test_another_decoder_reads_the_same_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed a stand-in shows that it is asked, and what with."""
    asked: list[bytes] = []

    def decode_jpeg(data: bytes, colorspace: str, *, fastdct: bool, fastupsample: bool) -> np.ndarray:
        assert (colorspace, fastdct, fastupsample) == ("RGB", False, False)
        asked.append(data)
        if real:
            return real(data, colorspace, fastdct=fastdct, fastupsample=fastupsample)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def decode_upright(data: bytes) -> torch.Tensor:
        asked.append(data)
        if real:
            return real(data)
        return pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))

    module = {"simplejpeg": "simplejpeg", "torchcodec": "torchcodec.decoders"}[name]
    real = importlib.import_module(module).decode_jpeg if find_spec(name) else None
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {kind: encoded(scene, kind, exif=exif) for kind in ("JPEG", "PNG")}
    files |= {"grey": encoded(scene.convert("L"), "JPEG"), "CMYK": encoded(scene.convert("CMYK"), "JPEG")}
    by_pillow = {kind: np.asarray(open_image(data)).astype(int) for kind, data in files.items()}
    monkeypatch.setattr(decode, "DECODER", name)
    stand_in = SimpleNamespace(decode_jpeg=decode_jpeg if name == "simplejpeg" else decode_upright)
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, module, stand_in)
    for kind, data in files.items():
        picture = np.asarray(open_image(data)).astype(int)
        assert picture.shape == by_pillow[kind].shape
        assert np.abs(picture - by_pillow[kind]).max() <= 2
    assert len(asked) == 1  # colour JPEG alone
    assert asked[0].startswith(b"\xff\xd8")
    assert (b"Exif" in asked[0]) == (name == "simplejpeg")  # the other would turn the picture, and we once more
    with pytest.raises(DataError, match="damaged or cut off"):
        open_image(files["JPEG"][:-200])


def test_no_picture_is_blamed_for_a_decoder_that_is_too_old(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DECODER", "torchcodec")
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    path = next(photos.rglob("*.jpg"))
    for read in (lambda: open_image(path), lambda: bad_reasons([path], workers=1)):
        with pytest.raises(SetupError, match=r"does not work here.*torchcodec 0\.16 or newer is needed"):
            read()


def test_only_exif_is_taken_out_of_a_jpeg_file() -> None:
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    plain = encoded(scene, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode._without_exif(encoded(scene, "JPEG", exif=exif)) == plain
    turned = encoded(scene, "JPEG", exif=exif)
    for between in (b"\xff", b"\0", b"\xff\xe1\0\0"):  # a fill byte, and what decoders skip
        assert b"Exif" not in decode._without_exif(turned[:2] + between + turned[2:])
    for cut in (0, 1, 2, 3, 20, len(plain) // 2):
        assert decode._without_exif(plain[:cut]) == plain[:cut]


def test_a_decoder_that_is_not_there_is_named() -> None:
    for name, words in (("turbo", "takes pillow, simplejpeg or torchcodec"), ("simplejpeg", "pip install simplejpeg")):
        code = "import importlib.util as u; u.find_spec = lambda *_: None; import headstart.decode"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"HEADSTART_DECODER": name}, capture_output=True, text=True
        )
        assert done.returncode
        assert words in done.stderr


def test_broken_exif_does_not_condemn_a_picture() -> None:
    turned, wild = bytes.fromhex("120103000100000006000000"), bytes.fromhex("1a010500ffff0000ffff")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + wild
    data = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    with pytest.raises(UserWarning):  # Pillow warns of it ...
        Image.open(io.BytesIO(data)).getexif()
    assert open_image(data).size == (20, 30)  # ... and what is readable of it counts


def test_pillow_warnings_come_back_afterwards() -> None:
    before = list(warnings.filters)
    map_threads(open_image, [encoded(Image.new("RGB", (9, 9)), "JPEG")] * 200, workers=4)
    assert list(warnings.filters) == before


def test_the_pixel_cap_acts_on_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (8_193, 8_192)), "PNG")  # one column above the cap, in 8 kB

    def decoded(*_: object) -> None:
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr(Image.Image, "convert", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for pillows_own in (89_478_485, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_own)
        with pytest.raises(DataError, match="more than 67,108,864 pixels"):
            open_image(data)


def test_pictures_below_the_cap_decode_where_pillow_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_image(encoded(Image.new("RGB", (15, 10)), "JPEG")).size == (15, 10)


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Picture .*none\.jpg: no such file\."):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="a folder, not a file"):
        open_image(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- splits


@pytest.fixture
def table(tmp_path: Path):  # type: ignore[no-untyped-def]
    return load_images(fill(tmp_path / "pictures", {"a": 40, "b": 20, "c": 3}))


def test_each_picture_stands_in_exactly_one_split(table) -> None:  # type: ignore[no-untyped-def]
    parts = split(table, val=0.2, test=0.1, seed=3)
    everything = [path for part in parts.named().values() for path in part.paths]
    assert sorted(everything) == sorted(table.paths)
    assert parts.train.class_counts().tolist() == [28, 14, 1]
    assert parts.val.class_counts().tolist() == [8, 4, 1]
    assert parts.test.class_counts().tolist() == [4, 2, 1]
    assert parts.class_names == ("a", "b", "c")


def test_the_split_depends_on_the_seed_alone(table, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def members(source, **options):  # type: ignore[no-untyped-def]
        return {name: set(part.relative_paths) for name, part in split(source, **options).named().items()}

    first = members(table, seed=0)
    assert members(table, seed=1) != first
    assert members(table.select(epoch_order(len(table), seed=5, epoch=0)), seed=0) == first
    shutil.move(tmp_path / "pictures", tmp_path / "elsewhere")
    assert members(load_images(tmp_path / "elsewhere"), seed=0) == first
    assert members(table, seed=0, val=0.3)["test"] == first["test"]


def test_the_split_is_known(table) -> None:  # type: ignore[no-untyped-def]
    """Numbers written down when this was built: another process, machine or numpy gives the same."""
    assert split(table, seed=0).test.relative_paths == KNOWN_TEST_SPLIT
    code = (
        "import sys; from headstart.dataset import load_images; from headstart.splitting import split;"
        "print(*split(load_images(sys.argv[1], check=False), seed=0).test.relative_paths)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code, table.root], capture_output=True, text=True, check=True, env=env)
    assert tuple(done.stdout.split()) == KNOWN_TEST_SPLIT


KNOWN_TEST_SPLIT = (
    *("a/6.jpg", "a/7.jpg", "a/11.jpg", "a/21.jpg", "a/37.jpg", "a/38.jpg"),
    *("b/1.jpg", "b/2.jpg", "b/8.jpg", "c/0.jpg"),
)


def test_given_splits_are_kept_and_missing_ones_held_out(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a": 10, "train/b": 10, "val/a": 3, "val/b": 4})
    parts = split(load_images(tmp_path), test=0.2)
    assert parts.val.class_counts().tolist() == [3, 4]
    assert parts.test.class_counts().tolist() == [2, 2]
    assert parts.train.class_counts().tolist() == [8, 8]
    assert all(path.startswith("train/") for path in parts.test.relative_paths)


def test_a_share_of_nothing_leaves_a_split_empty(table) -> None:  # type: ignore[no-untyped-def]
    parts = split(table, val=0.2, test=0.0)
    assert len(parts.test) == 0
    assert len(parts.train) + len(parts.val) == len(table)


@pytest.mark.parametrize(("n", "needed"), [(1, 3), (2, 3)])
def test_too_few_pictures(tmp_path: Path, n: int, needed: int) -> None:
    table = load_images(fill(tmp_path, {"many": 9, "few": n}))
    with pytest.raises(DataError, match=rf"class 'few' has {n}; one each for train, val and test makes {needed}"):
        split(table)


@pytest.mark.parametrize("shares", [(1.0, 0.1), (-0.1, 0.1), (0.5, 0.5)])
def test_shares_out_of_range(table, shares: tuple[float, float]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="below 1"):
        split(table, val=shares[0], test=shares[1])


def test_train_keeps_a_picture_whatever_the_shares(tmp_path: Path) -> None:
    parts = split(load_images(fill(tmp_path, {"a": 3, "b": 20})), val=0.6, test=0.35)
    assert [part.class_counts().tolist() for part in parts.named().values()] == [[1, 1], [1, 12], [1, 7]]


@pytest.mark.parametrize("check", [True, False])
def test_unknown_words_are_refused_before_anything_is_read(tmp_path: Path, check: bool) -> None:
    with pytest.raises(DataError, match="bad_files is 'skp'; allowed: error, skip"):
        load_images(tmp_path, bad_files="skp", check=check)


@pytest.mark.parametrize("names", [[10, 11], "cat"])
def test_class_names_that_are_no_names_are_refused(names: object, photos: Path) -> None:
    with pytest.raises(DataError, match="it takes a list of names, as text"):
        load_images(photos, class_names=names, check=False)  # type: ignore[arg-type]


def test_a_class_of_trains_may_hold_an_empty_folder(tmp_path: Path) -> None:
    for name in ("train", "plane"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "train" / "thumbnails").mkdir()
    assert load_images(tmp_path, check=False).class_names == ("plane", "train")


@pytest.mark.parametrize("seed", [0.5, -1, "1"])
def test_a_seed_that_is_none_is_refused(seed: object, photos: Path) -> None:
    with pytest.raises(DataError, match="it takes a whole number from 0"):
        split(load_images(photos, check=False), seed=seed)  # type: ignore[arg-type]


def test_shares_count_only_for_splits_that_are_missing(photos: Path) -> None:
    table = load_images(photos, check=False)
    parts = split(table, val=0.3, test=0.2)
    given = parts.joined()
    assert given is not None
    given = replace(given, split_names=tuple("test" if name == "test" else "train" for name in given.split_names))
    assert len(split(given, val=0.7, test=0.5).test) == len(parts.test)


def test_limit_is_stratified_and_can_be_split(table) -> None:  # type: ignore[no-untyped-def]
    small = table.limit(21, seed=0)
    assert small.class_counts().tolist() == [12, 6, 3]
    assert len(split(small).val) >= 3
    assert small.limit(21) is small
    assert set(table.limit(21, seed=1).paths) != set(small.paths)
    with pytest.raises(DataError, match=r"limit is 2; .* 3 or more"):
        table.limit(2)


def test_limit_keeps_every_split(tmp_path: Path) -> None:
    fill(tmp_path, {f"{s}/{c}": n for s, n in (("train", 20), ("val", 10), ("test", 10)) for c in "ab"})
    small = load_images(tmp_path).limit(24)
    counts = [small.split_names.count(s) for s in ("train", "val", "test")]
    assert counts == [12, 6, 6]


def test_select_and_read_only_labels(table) -> None:  # type: ignore[no-untyped-def]
    part = table.select([50, 0])
    assert part.relative_paths == (table.relative_paths[50], table.relative_paths[0])
    assert part.labels.tolist() == [table.labels[50], table.labels[0]]
    assert len(table.select([])) == 0
    assert table.select(table.labels == 2).class_counts().tolist() == [0, 0, 3]
    with pytest.raises(ValueError, match="read-only"):
        table.labels[0] = 1


def test_class_folders_may_have_names_that_are_no_text(tmp_path: Path) -> None:
    try:
        fill(tmp_path, {os.fsdecode(b"caf\xe9"): 3, "bar": 3})
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(split(load_images(tmp_path)).test) == 2


# ------------------------------------------------------------------------------------------------------------- orders


def test_epoch_order_is_a_pure_function() -> None:
    assert epoch_order(10, seed=0, epoch=0).tolist() == KNOWN_ORDER
    assert sorted(epoch_order(1000, seed=3, epoch=9).tolist()) == list(range(1000))
    assert epoch_order(50, seed=3, epoch=9).tolist() == epoch_order(50, seed=3, epoch=9).tolist()
    assert epoch_order(50, seed=3, epoch=9).tolist() != epoch_order(50, seed=3, epoch=8).tolist()
    assert epoch_order(50, seed=3, epoch=9).tolist() != epoch_order(50, seed=9, epoch=3).tolist()
    assert epoch_order(0, seed=0, epoch=0).tolist() == []


KNOWN_ORDER = [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]  # written down when this was built


def test_epoch_order_is_uniform() -> None:
    first = np.array([epoch_order(4, seed=0, epoch=e) for e in range(2000)])
    counts = np.stack([np.bincount(first[:, i], minlength=4) for i in range(4)])
    assert np.abs(counts - 500).max() < 100  # five standard deviations


def test_streams_of_different_words_are_apart() -> None:
    keys = [(s, w, p, v) for s in (0, 1, 2**40) for w in (0, 1) for p in (1, 2) for v in (0, 1)]
    drawn = {int(random_stream(*key).random_raw()) for key in keys}
    assert len(drawn) == len(keys)


# ------------------------------------------------------------------------------------------------------ lists of files


def test_list_image_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 11, "a/deep": 1, ".hidden": 1})
    odd = tmp_path / "picture.dat"
    put(odd)
    (tmp_path / "a" / "notes.txt").write_text("x")
    files = list_image_files([odd, tmp_path / "a", tmp_path / "a" / "3.jpg"])
    assert files[0] == odd
    assert [p.name for p in files[1:12]] == [f"{i}.jpg" for i in range(11)]
    assert files[12:] == [tmp_path / "a" / "deep" / "0.jpg"]
    assert len(list_image_files([str(tmp_path)])) == 12


def test_linked_folders_are_read_each_once_and_links_that_lead_back_end_nothing(tmp_path: Path) -> None:
    for name in ("here/b", "here/c", "elsewhere/deep", "beside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"")
    for link, target in (
        ("here/a", "here/c"),  # which has its place here
        ("here/b/up", "here"),
        ("here/d", "elsewhere"),
        ("here/e", "elsewhere/deep"),
        ("elsewhere/deep/back", "elsewhere"),
        ("here/f", "here/f"),
        ("here/c/out", "."),  # what all of this lies in
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    found = [path.relative_to(tmp_path).as_posix() for path in list_image_files([tmp_path / "here"])]
    assert found == ["here/b/1.jpg", "here/c/1.jpg", "here/d/deep/1.jpg"]


def test_links_inside_the_folders_of_a_layout_stay_unread(photos: Path, tmp_path: Path) -> None:
    before = load_images(photos, check=False).relative_paths
    inside = next(path for path in photos.iterdir() if path.is_dir())
    put(tmp_path / "elsewhere" / "0.jpg")
    (inside / "notes").mkdir()
    (inside / "notes" / "link").symlink_to(tmp_path / "elsewhere")
    assert load_images(photos, check=False).relative_paths == before


def test_list_image_files_refuses_what_selects_nothing(tmp_path: Path) -> None:
    put(tmp_path / "cat.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"No file or folder .*cta\.jpg\. Did you mean: cat\.jpg\?"):
        list_image_files([tmp_path / "cta.jpg"])
    with pytest.raises(DataError, match="No picture in"):
        list_image_files([tmp_path / "empty"])
    with pytest.raises(DataError, match="No picture asked for"):
        list_image_files([])


def test_map_threads_keeps_order_and_raises() -> None:
    assert map_threads(lambda x: x * x, range(300), workers=4) == [x * x for x in range(300)]
    assert map_threads(str, [], workers=4) == []
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda x: 1 // (x - 150), range(300), workers=4)


def test_intake_needs_no_torch() -> None:
    code = "import sys, headstart.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------- real sets

REAL_SETS = {  # classes, pictures per split, as the sets' own README says
    "hotdog": (2, {"train": 1000, "test": 400}),
    "cats_dogs": (2, {"train": 1000, "val": 250, "test": 400}),
    "cats_dogs_128": (2, {"train": 2000, "val": 300, "test": 800}),
    "dogs10": (10, {"train": 1000, "test": 400}),
    "emotions3": (3, {"train": 2100, "test": 900}),
    "hymenoptera": (2, {"train": 245, "val": 153}),
    "flowers5": (5, {"train": 450, "test": 200}),
}


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets_load_with_their_known_counts(name: str, shared: Path) -> None:
    classes, counts = REAL_SETS[name]
    table = load_images(shared / "data" / name, check=name in ("hymenoptera", "flowers5"))
    assert len(table.class_names) == classes
    assert {s: table.split_names.count(s) for s in counts} == counts
    assert len(table) == sum(counts.values())


def test_hymenoptera_with_its_validation_folder_as_test(shared: Path) -> None:
    table = load_images(shared / "data" / "hymenoptera", test_folder="val", check=False)
    gif = next(path for path in table.paths if path.name == "imageNotFound.gif")
    assert open_image(gif).mode == "RGB"
    parts = split(table, seed=0)
    assert [len(part) for part in parts.named().values()] == KNOWN_HYMENOPTERA_COUNTS
    assert parts.val.relative_paths[:3] == KNOWN_HYMENOPTERA_VAL


KNOWN_HYMENOPTERA_COUNTS = [208, 37, 153]  # 15 % of 124 ants and 121 bees make 19 + 18
KNOWN_HYMENOPTERA_VAL = (
    "train/ants/67270775_e9fdf77e9d.jpg",
    "train/ants/162603798_40b51f1654.jpg",
    "train/ants/175998972.jpg",
)


def test_one_class_spelled_in_two_unicode_forms_is_told_not_dropped(tmp_path: Path) -> None:
    for name in ("\u00e9", "e\u0301", "z"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    with pytest.raises(DataError, match="two class folders are both called"):
        load_images(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no name ends in a blank there")
def test_blanks_around_a_folder_s_name_are_no_part_of_the_class_as_in_a_manifest(tmp_path: Path) -> None:
    for name in ("cat ", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    table = load_images(tmp_path)
    assert table.class_names == ("cat", "dog")
    manifest = write_manifest(table.rows(), tmp_path / "all.csv")
    assert load_images(manifest, class_names=table.class_names).paths == table.paths
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match=r"two class folders are both called 'cat', spelled with other .* or blanks"):
        load_images(tmp_path)
