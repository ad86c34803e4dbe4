"""What the quick audit finds, on pictures with planted faults, and that it finds nothing where there is nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import headstart
from headstart import auditing, doubtful, duplicates
from headstart.audit_copies import find_copies, leaked
from headstart.audit_files import chance_of_shares
from headstart.audit_quick import shortcut_title
from headstart.audit_sheet import write_audit
from headstart.auditing import look_at_labels
from headstart.clean import clean_rows, counts_of
from headstart.cli import main
from headstart.dataset import ImageTable, Splits, load_images
from headstart.doubtful import doubtful_findings, doubtful_labels, judgeable, out_of_fold, outlier_findings
from headstart.duplicates import Pair, exact_pairs, groups_of, near_pairs
from headstart.errors import DataError
from headstart.files import read_csv
from headstart.findings import AuditResult, DoubtfulLabel, read_audit
from headstart.groundwork import make_bench
from headstart.groups import join_groups
from headstart.inspection import Header, look, look_at, look_of
from headstart.runtime import make_runtime
from headstart.shortcuts import Shortcut, find_shortcuts
from headstart.terminal import closing_table
from tiny import SPEC, TinyNet

CLASSES = ("ash", "elm")


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Blobs at random places: a picture with structure at several scales, unlike any other seed's."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (9, 11, 3)).astype(np.uint8)
    coarse = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(float)
    fine = rng.integers(0, 255, (24, 28, 3)).astype(np.uint8)
    detail = np.asarray(Image.fromarray(fine).resize(size, Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((0.6 * coarse + 0.4 * detail).astype(np.uint8))


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    """Two classes with 24 pictures each, in train and test folders, without a fault."""
    root = tmp_path / "trees"
    for c, name in enumerate(CLASSES):
        for i in range(24):
            folder = root / ("train" if i < 16 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            scene(100 * c + i).save(folder / f"{name}_{i * 7}.jpg", quality=90)
    return root


def test_where_copies_cannot_be_kept_together_the_data_are_not_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(3):
            scene(9 if name == CLASSES[0] else i).save(tmp_path / name / f"{i}.png")  # the first one's are all copies
    make_bench(tmp_path, runtime=make_runtime(device="cpu"), cache=False, progress=True)
    told = capsys.readouterr().err
    assert told.count("in several splits") == 1
    assert re.search(
        r"copies stand in several splits \(ash/\d.png in train and ash/\d.png in val and ash/\d.png in test\)", told
    )
    assert "copies-" not in told
    assert "Leave the split to headstart" not in told  # it made the split itself


def kinds(result: AuditResult) -> dict[str, str]:
    """The findings' kinds and severities, those about few pictures left out."""
    return {one.kind: one.severity for one in result.findings if one.kind != "few-pictures"}


def test_nothing_is_found_where_nothing_is(trees: Path) -> None:
    result = headstart.audit(trees)
    assert kinds(result) == {}
    assert result.pictures == 48
    assert result.counts == {"train": {"ash": 16, "elm": 16}, "test": {"ash": 8, "elm": 8}}
    assert result.traits["format"]["train"]["ash"] == {"JPEG": 16}


def test_broken_and_odd_files_are_named_with_a_reason(trees: Path) -> None:
    ash = trees / "train" / "ash"
    (ash / "empty.jpg").write_bytes(b"")
    whole = (ash / "ash_0.jpg").read_bytes()
    (ash / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (60, 60), (3, 3, 3)).save(ash / "black.png")
    scene(900, (20, 90)).save(ash / "thin.png")
    scene(901, (600, 90)).save(ash / "long.png")
    scene(902).save(ash / "png_inside.jpg", "PNG")
    scene(903).convert("L").save(ash / "grey.png")
    frames = [scene(904 + i) for i in range(3)]
    frames[0].save(ash / "moving.gif", save_all=True, append_images=frames[1:])
    notice = Image.new("L", (120, 120), 250)
    notice.paste(120, (30, 55, 90, 62))
    notice.save(ash / "notice.png")
    result = headstart.audit(trees)
    found = {one.kind: dict(zip(one.files, one.details or one.files, strict=True)) for one in result.findings}
    assert {name: why.split()[0] for name, why in found["unreadable"].items()} == {
        "train/ash/empty.jpg": "an",
        "train/ash/cut.jpg": "damaged",
    }
    assert list(found["blank"]) == ["train/ash/black.png"]
    assert list(found["tiny"]) == ["train/ash/thin.png"]
    assert list(found["long"]) == ["train/ash/long.png"]
    assert found["extension"] == {"train/ash/png_inside.jpg": "is PNG"}
    assert found["animated"] == {"train/ash/moving.gif": "GIF"}
    assert list(found["placeholder"]) == ["train/ash/notice.png"]
    assert set(found["modes"].values()) == {"L", "P"}
    severities = [one.severity for one in result.findings]
    assert severities == sorted(severities, key=("error", "warning", "note").index)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": lambda im: im,
    "half": lambda im: im.resize((im.width // 2, im.height // 2), Image.Resampling.BICUBIC),
    "double": lambda im: im.resize((im.width * 2, im.height * 2), Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
    "cropped": lambda im: im.crop((0, round(0.1 * im.height), round(0.9 * im.width), im.height)),
    "cropped and mirrored": lambda im: ImageOps.mirror(ImageOps.crop(im, 4)),
    "brighter": lambda im: ImageEnhance.Brightness(im).enhance(1.5),
    "darker": lambda im: ImageEnhance.Brightness(im).enhance(0.5),
    "grey": lambda im: im.convert("L").convert("RGB"),
    "more contrast": lambda im: ImageEnhance.Contrast(im).enhance(1.5),
}


def test_near_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    pictures = [scene(seed) for seed in range(30)]
    pictures += [change(pictures[i]) for i, change in enumerate(CHANGES.values())]
    looks = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.jpg", quality=90 if i < 30 else 40)
        looks.append(look(tmp_path / f"{i}.jpg"))
    pairs = {(pair.a, pair.b): pair for pair in near_pairs([one.thumb for one in looks])}
    assert list(pairs) == [(i, 30 + i) for i in range(len(CHANGES))]
    for pair, name in zip(pairs.values(), CHANGES, strict=True):
        assert not pair.exact
        assert pair.mirrored == ("mirrored" in name)


def test_either_picture_of_a_pair_may_be_the_crop() -> None:
    pictures = [scene(seed, (144, 120)).convert("L") for seed in range(12)]
    crops = [ImageOps.mirror(im.crop((5, 0, 144, 115))) for im in pictures]
    thumbs = np.stack([np.asarray(im.resize((48, 48), Image.Resampling.BOX)) for im in (*pictures, *crops)])
    fine = duplicates._local_contrast(thumbs.astype(np.float32), 0.7, 3.0)
    half = duplicates._sample(thumbs.astype(np.float32), duplicates._BOXES[0], 24)
    coarse = duplicates._local_contrast(half, 0.7, 2.5)
    whole, crop = np.arange(12), np.arange(12, 24)
    mirrored = np.full(12, len(duplicates._BOXES))  # the whole of the mirror image
    for a, b in ((whole, crop), (crop, whole)):
        assert (duplicates._align((coarse.__getitem__, fine.__getitem__), a, b, mirrored) >= duplicates.SAME).all()


def test_pictures_in_one_frame_are_no_copies() -> None:
    framed = []
    for seed in range(6):
        picture = Image.new("L", (96, 96), 0)
        picture.paste(scene(seed, (72, 72)).convert("L").point(lambda v: 100 + v // 2), (12, 12))
        framed.append(np.asarray(picture.resize((48, 48), Image.Resampling.BOX)))
    assert near_pairs(np.stack(framed)) == []


@pytest.mark.parametrize("n", [2, 40, 700])
def test_neighbours_are_those_of_scikit_learn(n: int) -> None:
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(n)
    rows, among = (duplicates._unit(rng.normal(size=(n, 4, 8)).astype(np.float32)) for _ in range(2))
    found, correlation = duplicates._nearest(rows, among)
    twin = NearestNeighbors(n_neighbors=min(duplicates.NEIGHBOURS + 1, n), algorithm="brute").fit(among)
    distance, expected = twin.kneighbors(rows)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(correlation, 1 - distance**2 / 2, atol=1e-6)


def test_smoothing_and_interpolation_are_those_of_scipy() -> None:
    from scipy import ndimage

    pictures = np.random.default_rng(0).normal(0, 60, (3, 24, 24)).astype(np.float32)
    fine = ndimage.gaussian_filter(pictures, (0, 0.7, 0.7))
    expected = fine - ndimage.gaussian_filter(fine, (0, 2.5, 2.5))
    np.testing.assert_allclose(duplicates._local_contrast(pictures, 0.7, 2.5), expected, atol=1e-4)
    at = np.linspace(-0.7, 23.2, 24, dtype=np.float32)
    x, y = np.broadcast_to(at, (3, 1, 24)), np.broadcast_to(at[::-1, None] / 2, (3, 24, 1))
    value, dx, dy = duplicates._bilinear(pictures, x, y)
    for picture, mine in zip(pictures, value, strict=True):
        grid = np.broadcast_arrays(np.clip(y[0], 0, 22.999), np.clip(x[0], 0, 22.999))
        np.testing.assert_allclose(mine, ndimage.map_coordinates(picture, grid, order=1), atol=1e-3)
    step = np.float32(0.01)  # far enough from a pixel's edge for the slope to be one
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(
        (duplicates._bilinear(pictures, x + step, y)[0] - value)[inner] / step, dx[inner], atol=0.1
    )
    np.testing.assert_allclose(
        (duplicates._bilinear(pictures, x, y + step)[0] - value)[inner] / step, dy[inner], atol=0.1
    )


@pytest.mark.parametrize("counts", [[[3, 20], [40, 50]], [[0, 9], [30, 21]], [[1, 2, 30], [20, 30, 40]]])
def test_the_chance_of_uneven_turns_is_that_of_scipy(counts: list[list[int]]) -> None:
    from scipy.stats import chi2_contingency

    assert chance_of_shares(np.array(counts)) == pytest.approx(float(chi2_contingency(counts).pvalue), rel=1e-9)


def test_equal_pixels_are_exact_copies_whatever_the_file() -> None:
    assert exact_pairs([b"x", b"y", b"", b"x", b"", b"x"]) == [Pair(0, 3, 1.0, True), Pair(0, 5, 1.0, True)]
    chain = [Pair(0, 3, 1.0, True), Pair(3, 4, 0.9, False), Pair(1, 2, 0.9, False)]
    assert groups_of(6, chain).tolist() == [0, 1, 1, 0, 0, -1]
    assert groups_of(2, []).tolist() == [-1, -1]


def test_leaks_conflicts_and_copies_are_told_apart(trees: Path) -> None:
    scene(3).save(trees / "train/ash/a.png")
    Image.open(trees / "train/ash/a.png").save(trees / "test/ash/a.bmp")  # the same pixels in another format
    scene(105).resize((140, 120)).save(trees / "train/ash/wrong.png")  # a train/elm picture
    scene(4).save(trees / "train/ash/twice.png")
    result = headstart.audit(trees)
    by_kind = {one.kind: one for one in result.findings}
    assert by_kind["exact-leaks"].groups == (("train/ash/a.png", "test/ash/a.bmp"),)
    assert by_kind["exact-leaks"].severity == "error"
    assert by_kind["near-leaks"].groups == (("train/ash/a.png", "train/ash/ash_21.jpg", "test/ash/a.bmp"),)
    assert by_kind["near-conflicts"].groups == (("train/ash/wrong.png", "train/elm/elm_35.jpg"),)
    assert by_kind["near-conflicts"].details == ("train, ash", "train, elm")
    assert by_kind["near-duplicates"].groups == (("train/ash/ash_28.jpg", "train/ash/twice.png"),)
    table = load_images(trees)
    copies = find_copies(look_at(table))
    assert [table.relative_paths[i] for i in np.flatnonzero(leaked(table, copies))] == ["test/ash/a.bmp"]


def test_blank_pictures_are_exact_copies_but_never_near_ones(tmp_path: Path) -> None:
    for i, grey in enumerate((10, 10, 11)):
        Image.new("RGB", (40, 40), (grey,) * 3).save(tmp_path / f"{i}.png")
    copies = find_copies([look(tmp_path / f"{i}.png") for i in range(3)])
    assert copies.near.tolist() == [0, 0, -1]


PLANTS: dict[str, tuple[Callable[[Image.Image], Image.Image], dict[str, object]]] = {
    "size in pixels": (lambda im: im.resize((120, 100)), {"quality": 90}),
    "border colour": (lambda im: ImageOps.expand(ImageOps.crop(im, 3), 3, (200, 40, 40)), {"quality": 90}),
    "mean colour and contrast": (lambda im: ImageEnhance.Brightness(im).enhance(1.5), {"quality": 90}),
    "file length": (lambda im: im, {"quality": 40}),
    "format and mode": (lambda im: im.convert("L"), {"quality": 90}),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_shortcut_is_found(name: str, tmp_path: Path) -> None:
    change, options = PLANTS[name]
    looks = []
    for i in range(80):
        picture = scene(i) if i < 40 else change(scene(i))
        picture.save(tmp_path / f"{i}.jpg", **({"quality": 90} if i < 40 else options))
        looks.append(look(tmp_path / f"{i}.jpg"))
    labels = np.repeat([0, 1], 40)
    planted = {one.name: one for one in find_shortcuts(looks, labels, CLASSES)}
    assert planted[name].suspicious
    assert planted[name].strength > 0.5
    mixed = find_shortcuts(looks, np.arange(80) % 2, CLASSES)  # the same pictures, classes at random
    assert not any(one.suspicious for one in mixed)


def test_every_finding_names_files_has_a_sheet_and_one_sentence_of_advice(trees: Path, tmp_path: Path) -> None:
    ash, elm = trees / "train/ash", trees / "train/elm"
    for path in sorted(ash.iterdir()):
        with Image.open(path) as image:
            image.resize((120, 100)).save(path, quality=40)
    (ash / "empty.jpg").write_bytes(b"")
    shutil.copytree(trees / "train", trees / "val")
    shutil.rmtree(trees / "val/elm")
    for i in range(60):
        scene(300 + i).save(elm / f"n02115641_{i}.jpeg", quality=90)
    Image.new("RGB", (300, 30)).save(elm / "long.gif")
    shutil.rmtree(trees / "test/ash")
    result = headstart.audit(trees)
    found = [one.kind for one in result.findings]
    assert set(found) >= {"unreadable", "exact-leaks", "absent-class", "imbalance", "few-pictures", "imagenet", "tiny"}
    assert min(found.count("shortcut"), found.count("absent-class")) >= 2
    write_audit(result, tmp_path / "out")
    sheets = {path.name for path in (tmp_path / "out").iterdir()} - {"audit.json"}
    assert sheets >= {one.kind + ".jpg" for one in result.findings} | {"shortcut-2.jpg", "absent-class-2.jpg"}
    assert len(sheets) == len(result.findings)
    for one in result.findings:
        assert one.files, one.kind
        assert set(one.files) <= set(load_images(trees, check=False).relative_paths)
        assert one.advice.endswith(".")
        assert ". " not in one.advice


def test_a_shortcut_shows_what_it_tells_on_both_sides(trees: Path) -> None:
    for i, path in enumerate(sorted((trees / "train/ash").iterdir())):
        with Image.open(path) as image:
            image.resize((120, 100) if i else image.size).save(path, quality=90)  # the first stays as it is
    (size,) = [one for one in headstart.audit(trees).of_kind("shortcut") if "Size in pixels" in one.title]
    mine, others = size.groups
    assert size.examples
    assert len(mine) == len(others) == 7
    assert {name.split("/")[1] for name in mine} == {"ash"}
    assert {name.split("/")[1] for name in others} == {"elm"}
    assert sorted((trees / "train/ash").iterdir())[0].name not in {Path(name).name for name in mine}
    assert set(size.details[:7]) == {"ash: 120 x 100"}
    assert set(size.details[7:]) == {"elm: 96 x 80"}


def test_turned_pictures_of_one_class_are_a_warning(trees: Path) -> None:
    for name in CLASSES:
        for path in sorted((trees / "train" / name).iterdir())[: 12 if name == "ash" else 0]:
            exif = Image.Exif()
            exif[0x0112] = 6
            with Image.open(path) as image:
                image.load()
            image.save(path, exif=exif, quality=90)
    result = headstart.audit(trees)
    (turned,) = result.of_kind("orientation")
    assert (turned.severity, len(turned.files)) == ("warning", 12)
    assert result.traits["orientation"]["train"]["ash"] == {"1": 4, "6": 12}


def test_series_go_by_time_and_else_by_likeness(trees: Path) -> None:
    for i, second in enumerate((10, 12, 40)):
        exif = Image.Exif()
        exif[0x0132] = f"2024:05:01 10:00:{second}"
        scene(700 + i).save(trees / "train/ash" / f"shot{i:02d}.jpg", exif=exif)
    for i in range(2):
        base = np.asarray(scene(800)).astype(int)
        noise = np.random.default_rng(i).integers(-40, 40, base.shape)
        Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(trees / "train/elm" / f"frame{i}.png")
    (series,) = headstart.audit(trees).of_kind("series")
    assert series.groups == (
        ("train/ash/shot00.jpg", "train/ash/shot01.jpg"),
        ("train/elm/frame0.png", "train/elm/frame1.png"),
    )


def test_few_uneven_and_absent_classes(trees: Path) -> None:
    for path in sorted((trees / "train/elm").iterdir())[:12]:
        path.unlink()
    for path in (trees / "test/elm").iterdir():
        path.unlink()
    (trees / "test/elm").rmdir()
    assert kinds(headstart.audit(trees)) == {"imbalance": "note", "absent-class": "warning"}
    assert headstart.audit(trees).of_kind("few-pictures")[0].severity == "warning"


def test_an_audit_is_written_into_no_folder_of_something_else(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for inside in (trees / "look", trees / "train" / "ash" / "look", trees):
        assert main(["audit", str(trees), "--fast", "--quiet", "--out", str(inside)]) == 2
        assert "would be taken for pictures. Choose another with --out" in capsys.readouterr().err
    assert {path.name for path in trees.iterdir()} == {"train", "test"}
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert main(["audit", str(trees), "--fast", "--quiet", "--out", str(run)]) == 0  # its audit.json is a run's, too
    (run / "recipe.json").write_text('{"stages": [{"freeze_line": "head"}]}')
    mine.mkdir()
    (mine / "audit.json").write_text('{"of": "mine"}')
    for folder, held in ((run, "audit.html, audit.json"), (mine, "audit.json")):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        capsys.readouterr()
        assert main(["audit", str(trees), "--fast", "--quiet", "--out", str(folder)]) == 2
        assert f"{folder} holds {held}" in capsys.readouterr().err
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names_of_imagenet_are_a_note(trees: Path) -> None:
    (trees / "train/ash/ash_0.jpg").rename(trees / "train/ash/n02115641_6196.JPEG")
    assert headstart.audit(trees).of_kind("imagenet")[0].files == ("train/ash/n02115641_6196.JPEG",)


def test_the_result_is_written_whole_and_read_back(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene(3).save(trees / "test/ash/again.png")
    (trees / "train/ash/empty.jpg").write_bytes(b"")
    before = {path: path.read_bytes() for path in trees.rglob("*") if path.is_file()}
    out = tmp_path / "report"
    assert main(["audit", str(trees), "--fast", "--out", str(out), "--quiet"]) == 0
    table = capsys.readouterr().out
    assert table.index("unreadable") < table.index("near-leaks") < table.index("few-pictures")
    assert "\n         train/ash/empty.jpg: an empty file (0 bytes)\n\nerror " in table
    assert "\n         train/ash/ash_21.jpg and test/ash/again.png\n" in table
    sheets = {"near-leaks.jpg", "unreadable.jpg", "few-pictures.jpg"}
    assert {path.name for path in out.iterdir()} == {"audit.json", "audit.html", *sheets}
    with Image.open(out / "near-leaks.jpg") as sheet:
        assert sheet.width > 200
    (out / "mine.jpg").write_bytes(b"")
    Path(trees / "test/ash/again.png").unlink()
    assert main(["audit", str(trees), "--fast", "--out", str(out), "--quiet"]) == 0
    assert {path.name for path in out.glob("*.jpg")} == {*sheets, "mine.jpg"} - {"near-leaks.jpg"}  # of an audit before
    scene(3).save(trees / "test/ash/again.png")
    assert main(["audit", str(trees), "--fast", "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    result = read_audit(out / "audit.json")
    assert result.of_kind("near-leaks")[0].groups == (("train/ash/ash_21.jpg", "test/ash/again.png"),)
    assert main(["audit", str(trees), "--fast", "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {**printed, "seconds": 0} == {**json.loads((out / "audit.json").read_bytes()), "seconds": 0}
    assert before == {path: path.read_bytes() for path in trees.rglob("*") if path.is_file()}


def test_a_foreign_audit_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text('{"root": "x"}')
    with pytest.raises(DataError, match="unknown or missing: class_names, counts"):
        read_audit(tmp_path / "audit.json")
    assert main(["audit", str(tmp_path / "nowhere")]) == 2


def test_real_sets_hold_what_is_known_of_them(shared: Path) -> None:
    result = headstart.audit(shared / "data" / "hymenoptera")
    assert result.of_kind("placeholder")[0].files == ("train/ants/imageNotFound.gif",)
    assert kinds(result) == {"placeholder": "warning", "modes": "note", "imagenet": "note"}


# ------------------------------------------------------------------------------------------------------------- in fit


@pytest.mark.parametrize(("name", "words"), [("size", "Size alone tells a"), ("format and mode", "mode alone tell a")])
def test_a_shortcut_is_told_in_a_whole_sentence(name: str, words: str) -> None:
    assert words in shortcut_title(Shortcut(name, 0.9, 0.5, "a", 0.9, 0.1, 0.7, True))


def fit_tiny(data: object, tmp_path: Path, **options: object) -> headstart.FitResult:
    recipe = headstart.Recipe(stages=(headstart.Stage(epochs=2, views=1),), augment="none")
    return headstart.fine_tune(
        data, backbone=TinyNet(), data_spec=SPEC, recipe=recipe, device="cpu", out=tmp_path / "run", **options
    )


def test_fit_keeps_copies_on_one_side(photos: Path, tmp_path: Path) -> None:
    for name in ("red", "green", "blue"):
        for i in range(4):
            with Image.open(photos / name / f"{name}{i}.jpg") as image:
                image.save(photos / name / f"copy{i}.png")
    result = fit_tiny(photos, tmp_path, test=0.25, val=0.25)
    by_path = {path: part for part, table in result.splits.named().items() for path in table.paths}
    for name in ("red", "green", "blue"):
        for i in range(4):
            assert by_path[photos / name / f"copy{i}.png"] == by_path[photos / name / f"{name}{i}.jpg"]
    assert result.metrics["data"]["leaked"] == []
    assert read_audit(tmp_path / "run" / "audit.json").of_kind("exact-duplicates")[0].files[0] == "blue/blue0.jpg"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was found in the data" in page
    assert "blue/copy3.png" in page


def test_fit_scores_with_and_without_leaks_and_tells_them_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    for name in ("red", "green", "blue"):
        for i in range(12):
            target = root / ("test" if i < 4 else "train") / name
            target.mkdir(parents=True, exist_ok=True)
            (photos / name / f"{name}{i}.jpg").rename(target / f"{name}{i}.jpg")
    shutil.copy(root / "train/red/red7.jpg", root / "test/red/again.jpg")
    result = fit_tiny(root, tmp_path, progress=True)
    (told,) = [line for line in capsys.readouterr().err.split("Error: ") if "train/red/red7.jpg" in line]
    assert "copies stand in different splits" in told
    assert "\n    train/red/red7.jpg and test/red/again.jpg\n" in told
    assert "several splits" not in told
    assert "copies-" not in told
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_bytes())
    assert metrics["data"]["leaked"] == ["test/red/again.jpg"]
    assert (metrics["test"]["n"], metrics["test_without_leaks"]["n"]) == (13, 12)
    rows = read_csv(tmp_path / "run" / "predictions.csv")
    clean = [row["label"] == row["pred"] for row in rows if row["split"] == "test" and "again" not in row["path"]]
    assert metrics["test_without_leaks"]["accuracy"] == pytest.approx(np.mean(clean))
    assert "With and without leaks" in (tmp_path / "run" / "report.html").read_text()
    assert "test without leaked pictures" in closing_table(result.metrics)
    assert "test_without_leaks" not in fit_tiny(root, tmp_path, audit=False, overwrite=True).metrics


def test_a_class_of_near_copies_is_fitted_from_its_clean_manifest_as_from_its_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(photos / "red")
    (photos / "red").mkdir()
    for i in range(8):  # one picture in several sizes
        scene(3).resize((140 + 8 * i, 120 + 7 * i)).save(photos / "red" / f"{i}.png")
    table = load_images(photos)
    clean = headstart.write_manifest(clean_rows(table, headstart.audit(table)), tmp_path / "clean.csv")
    for source in (photos, clean):
        fit_tiny(source, tmp_path, overwrite=True, progress=True)
        assert "too few pictures that are no copies of each other" in capsys.readouterr().err


def test_a_second_fit_does_not_look_again(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red/red0.jpg", photos / "red/again.jpg")
    splits = fit_tiny(photos, tmp_path).splits
    first = read_audit(tmp_path / "run" / "audit.json")
    again = fit_tiny(photos, tmp_path, overwrite=True).splits
    second = read_audit(tmp_path / "run" / "audit.json")
    assert second == replace(
        first, seconds={**first.seconds, "labels": second.seconds["labels"]}
    )  # how long it took, too
    assert [table.groups for table in again.named().values()] == [table.groups for table in splits.named().values()]
    assert any(again.train.groups + again.val.groups + again.test.groups)
    (photos / "red/again.jpg").rename(photos / "blue/again.jpg")
    fit_tiny(photos, tmp_path, overwrite=True)
    assert read_audit(tmp_path / "run" / "audit.json").of_kind("exact-conflicts")


def test_splits_made_beforehand_are_looked_at_too(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red/red0.jpg", photos / "red/red00.jpg")
    table = load_images(photos)
    names = ["train"] * len(table)
    for i, path in enumerate(table.relative_paths):
        if path in ("red/red00.jpg", "blue/blue1.jpg", "green/green1.jpg"):
            names[i] = "test"
    splits = headstart.split(replace(table, split_names=tuple(names)), val=0.2)
    result = fit_tiny(splits, tmp_path)
    assert result.metrics["data"]["leaked"] == ["red/red00.jpg"]
    assert result.metrics["test_without_leaks"]["n"] == 2


def test_a_class_made_of_copies_can_still_be_split(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(1, 12):
        shutil.copy(photos / "red/red0.jpg", photos / f"red/red{i}.jpg")
    result = fit_tiny(photos, tmp_path, progress=True)
    assert "too few pictures that are no copies" in capsys.readouterr().err
    assert len(result.metrics["data"]["leaked"]) == result.splits.test.class_counts()[2]


def test_groups_of_both_kinds_are_joined() -> None:
    assert join_groups(("a", "a", "", "b", ""), ("", "x", "x", "", "")) == ("a", "a", "a", "b", "")
    assert join_groups(("a", "b", "", ""), ("y", "y", "z", "z")) == ("a", "a", "z", "z")
    assert join_groups(("x",), ("",)) == ("x",)


def test_fit_tells_doubtful_labels_and_runs_nothing_twice(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("cleanlab")
    (photos / "red/red3.jpg").rename(photos / "blue/stray0.jpg")
    (photos / "green/green5.jpg").rename(photos / "red/stray1.jpg")
    options = {"test": 0.0, "progress": True, "overwrite": True}
    recipe = headstart.Recipe(stages=(headstart.Stage(epochs=1), headstart.Stage(name="again", epochs=1)))

    def run(**more: object) -> tuple[headstart.FitResult, int]:
        plan = {"recipe": recipe, "out": tmp_path / "run", "device": "cpu"} | options | more
        result = headstart.fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, **plan)
        return result, result.model.backbone.pictures

    result, passes = run()
    read = read_audit(tmp_path / "run" / "audit.json")
    assert read.doubtful is not None
    assert {one.split for one in read.doubtful} <= {"train", "val"}
    flagged = [one.file for one in read.doubtful if one.flagged]
    assert {"blue/stray0.jpg", "red/stray1.jpg"} <= set(flagged)
    assert result.metrics["data"]["doubtful_labels"] == flagged
    assert len(read.of_kind("doubtful-labels")) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "may be wrong" in line]
    assert len(told) == 1
    assert "headstart audit PHOTOS --write-clean" in told[0]
    assert "red/stray1.jpg" in (tmp_path / "run" / "report.html").read_text().partition("What was found in the data")[2]
    result, without = run(audit=False)
    assert (without, result.metrics["data"]["doubtful_labels"]) == (passes, None)
    assert passes > 0
    assert "may be wrong" not in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["no cleanlab", "few pictures", "no frozen stage"])
def test_fit_says_why_labels_were_not_looked_at(
    photos: Path, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no cleanlab":
        monkeypatch.setitem(sys.modules, "cleanlab", None)
    elif trouble == "few pictures":
        for i in range(8):
            for name in ("red", "green"):
                (photos / name / f"{name}{i}.jpg").unlink()
    stage = headstart.Stage(epochs=1, views=1, freeze_line="all" if trouble == "no frozen stage" else "head")
    recipe = headstart.Recipe(stages=(stage,), augment="none")
    result = headstart.fine_tune(
        photos, backbone=TinyNet(), data_spec=SPEC, recipe=recipe, device="cpu", out=tmp_path / "run", test=0.0
    )
    read = read_audit(tmp_path / "run" / "audit.json")
    assert read.doubtful is None
    assert result.metrics["data"]["doubtful_labels"] is None
    notes = [f"{one.severity} {one.title}" for one in read.of_kind("labels-unseen")]
    words = {"no cleanlab": "headstart[audit]", "few pictures": "class red has 4", "no frozen stage": ""}[trouble]
    assert len(notes) == (1 if words else 0)
    assert all(note.startswith("note ") and words in note for note in notes)


# ------------------------------------------------------------------------------------------ doubtful labels, clean


def test_a_thin_class_is_left_out_and_the_others_keep_their_labels() -> None:
    paths = tuple(Path(f"/photos/{i}.jpg") for i in range(18))
    table = ImageTable(
        root=Path("/photos"), paths=paths, labels=np.array([1, 0] * 8 + [2, 2]), class_names=("a", "b", "rare"),
        split_names=("",) * 18,
    )  # fmt: skip
    rows, part, why = judgeable(table)
    assert why == "class rare has 2, fewer than 5 pictures that are no copies of each other"
    assert rows.tolist() == list(range(16))
    assert (part.class_names, part.labels.tolist()) == (("a", "b"), [1, 0] * 8)
    first = replace(table, class_names=("rare", "a", "b"), labels=(table.labels + 1) % 3)
    assert (judgeable(first)[1].class_names, judgeable(first)[1].labels.tolist()) == (("a", "b"), [1, 0] * 8)
    copies = replace(table, groups=("", "same") * 8 + ("", ""))
    assert len(judgeable(copies)[0]) == 0  # one class alone cannot be judged


def two_clouds(n: int = 120, flips: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of two classes, their labels with some turned round, and which."""
    rng = np.random.default_rng(0)
    truth = np.arange(n) % 2
    features = rng.normal(size=(n, 12)) + 2.5 * truth[:, None]
    wrong = rng.choice(n, flips, replace=False)
    labels = truth.copy()
    labels[wrong] = 1 - labels[wrong]
    return features, labels, wrong


def named_table(labels: np.ndarray, root: Path, splits: Sequence[str] = ()) -> ImageTable:
    """Pictures that need not be there."""
    paths = tuple(root / f"{i:03d}.jpg" for i in range(len(labels)))
    return ImageTable(root, paths, labels, CLASSES, tuple(splits) or ("",) * len(labels))


def test_turned_labels_head_the_queue(tmp_path: Path) -> None:
    features, labels, wrong = two_clouds()
    table = named_table(labels, tmp_path)
    probs = out_of_fold(features, labels)
    queue = doubtful_labels(table, probs)
    names = {f"{i:03d}.jpg" for i in wrong}
    assert len(names & {one.file for one in queue[: 2 * len(names)]}) >= 7
    assert [one.quality for one in queue] == sorted(one.quality for one in queue)
    assert all(one.suggested != one.label for one in queue)
    flagged = {one.file for one in queue if one.flagged}
    assert {one.file for one in queue if one.relabel} <= flagged
    assert len(flagged & names) >= 6
    assert len(flagged) <= 16
    (finding,) = doubtful_findings(queue, labels, probs)
    assert finding.severity == "warning"
    accuracy = 100 * (probs.argmax(axis=1) == labels).mean()
    assert f"agree with {accuracy:.1f} % of all" in finding.title


@pytest.mark.parametrize("kind", ["noise", "overlapping", "nearly all of one class"])
def test_where_features_cannot_tell_the_classes_no_label_is_called_wrong(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(300) % (8 if kind == "nearly all of one class" else 2) == 0).astype(int)
    features = rng.normal(size=(300, 64))
    if kind == "overlapping":
        features = rng.normal(size=(300, 12)) + 0.15 * labels[:, None]
    table, probs = named_table(labels, tmp_path), out_of_fold(features, labels)
    queue = doubtful_labels(table, probs)
    assert queue
    assert not any(one.flagged or one.relabel for one in queue)
    (finding,) = doubtful_findings(queue, labels, probs)
    assert (finding.kind, finding.severity, finding.files) == ("labels-unjudged", "note", ())
    accuracy = 100 * (probs.argmax(axis=1) == labels).mean()
    assert f"right on {accuracy:.1f} %" in finding.title
    result = AuditResult(str(tmp_path), CLASSES, 300, {}, {}, (finding,), doubtful=queue)
    assert counts_of(clean_rows(table, result)) == {"kept": 300, "dropped": 0, "relabelled": 0}


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("larger", [0.5, 0.8])
def test_many_wrong_labels_of_classes_that_are_told_apart_are_still_flagged(
    tmp_path: Path, share: float, larger: float
) -> None:
    rng = np.random.default_rng(1)
    truth = (np.arange(400) >= larger * 400).astype(int)
    features = rng.normal(size=(400, 300)) + 0.6 * truth[:, None]
    wrong = rng.choice(400, round(share * 400), replace=False)
    labels = truth.copy()
    labels[wrong] = 1 - labels[wrong]
    probs = out_of_fold(features, labels)
    queue = doubtful_labels(named_table(labels, tmp_path), probs)
    flagged = {one.file for one in queue if one.flagged}
    assert len(flagged & {f"{i:03d}.jpg" for i in wrong}) >= 0.7 * len(wrong)
    assert doubtful_findings(queue, labels, probs)[0].kind == "doubtful-labels"


def test_with_many_pictures_neighbours_are_looked_for_in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    among = duplicates._unit(rng.normal(size=(900, 256)).astype(np.float32))
    rows = duplicates._unit(among[:300] + 0.03 * rng.normal(size=(300, 256)).astype(np.float32))
    exact = duplicates._nearest(rows, among)
    monkeypatch.setattr(duplicates, "EXACT_UP_TO", 100)
    monkeypatch.setattr(duplicates, "PROBES", 30)  # all cells
    for one, other in zip(exact, duplicates._nearest(rows, among), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    monkeypatch.setattr(duplicates, "PROBES", 5)
    compared: list[int] = []
    largest = duplicates._largest

    def counted(correlation: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        compared.append(correlation.size)
        return largest(correlation, n)

    monkeypatch.setattr(duplicates, "_largest", counted)
    positions, correlations = duplicates._nearest(rows, among)
    assert sum(compared) < 0.3 * 300 * 900  # a sixth, and cells with more members are asked more often
    assert (positions[:, 0] == np.arange(300)).mean() > 0.93
    assert (np.diff(correlations, axis=1) <= 0).all()


def test_looking_for_copies_takes_little_memory_for_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EXACT_UP_TO", 500), ("COMPARED_AT_ONCE", 64), ("ALIGNED_AT_ONCE", 16)):
        monkeypatch.setattr(duplicates, name, value)  # small, so that what grows with the pictures is what is seen
    thumbs = list(np.random.default_rng(0).integers(0, 256, (3000, 48, 48), dtype=np.uint8))
    tracemalloc.start()
    near_pairs(thumbs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.8 * 3000 * 48 * 48


def test_a_fit_judges_its_features_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = two_clouds()
    table, seen = named_table(labels, tmp_path, ["train"] * 100 + ["val"] * 20), []
    splits = Splits(*(table.select(rows) for rows in (range(100), range(100, 120), [])))

    def watched(features: np.ndarray, *given: Any, **how: Any) -> np.ndarray:
        seen.append(features)
        return out_of_fold(features, *given, **how)

    monkeypatch.setattr("headstart.doubtful.out_of_fold", watched)
    result = AuditResult(str(tmp_path), CLASSES, 120, {}, {}, ())
    assert look_at_labels(result, splits, features).doubtful
    assert seen[0] is features  # with many pictures each copy counts


def test_copies_do_not_vouch_for_each_other(tmp_path: Path) -> None:
    features, labels, wrong = two_clouds()
    i = int(wrong[0])
    features, labels = np.vstack([features, *[features[i]] * 6]), np.append(labels, [labels[i]] * 6)
    groups = ["g" if k == i or k >= 120 else "" for k in range(126)]
    alone, together = out_of_fold(features, labels), out_of_fold(features, labels, groups)
    assert together[i, labels[i]] < alone[i, labels[i]] - 0.02


def test_more_features_than_pictures_are_turned_into_fewer_with_the_same_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 300))
    rows -= rows.mean(axis=0)  # as the regressions get them; one dimension fewer is left
    turned = doubtful._in_their_own_space(rows)
    assert turned.shape == (40, 39)
    np.testing.assert_allclose(turned @ turned.T, rows @ rows.T, atol=1e-9)
    assert doubtful._in_their_own_space(rows[:, :20]).shape == (40, 20)
    features, labels, _ = two_clouds()
    wide = np.hstack([features**power for power in range(1, 13)])
    assert wide.shape[1] > len(labels)
    quick = out_of_fold(wide, labels)
    monkeypatch.setattr(doubtful, "_in_their_own_space", lambda rows: rows)
    np.testing.assert_allclose(quick, out_of_fold(wide, labels), atol=1e-3)  # where L-BFGS stops


def test_many_features_are_looked_at_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = two_clouds()
    parts = [part.astype(np.float32) for part in (features[:50], features[50:])]
    exact = auditing.for_labels(parts)
    assert exact.dtype == np.float64
    monkeypatch.setattr(auditing, "MOST_EXACT", features.size - 1)
    single = auditing.for_labels(parts)
    assert single.dtype == np.float32
    assert np.array_equal(single, exact)
    probs = out_of_fold(single, labels)
    np.testing.assert_allclose(probs, out_of_fold(exact, labels), atol=1e-3)


def test_an_outlier_is_named(tmp_path: Path) -> None:
    features = np.random.default_rng(1).normal(size=(60, 12)) * 0.1 + 1
    features[17] = -features[17]
    (finding,) = outlier_findings(named_table(np.arange(60) % 2, tmp_path), features)
    assert finding.files == ("017.jpg",)


def test_the_clean_manifest_follows_the_findings(trees: Path, tmp_path: Path) -> None:
    (trees / "train/ash/empty.jpg").write_bytes(b"")
    Image.new("RGB", (60, 60)).save(trees / "train/ash/black.png")
    shutil.copy(trees / "train/ash/ash_0.jpg", trees / "test/ash/exact.jpg")
    scene(3).resize((140, 120)).save(trees / "test/ash/near.png")  # a near copy of train/ash/ash_21.jpg
    scene(105).resize((140, 120)).save(trees / "train/ash/wrong.png")  # one of train/elm/elm_35.jpg
    scene(6).resize((140, 120)).save(trees / "train/ash/twice.png")  # one of train/ash/ash_42.jpg
    table = load_images(trees, check=False)

    def doubt(file: str, split: str, relabel: bool) -> DoubtfulLabel:
        return DoubtfulLabel(file, split, "elm", "ash", 0.02, 0.98, 0.01, flagged=True, relabel=relabel)

    doubtful = (
        doubt("train/elm/elm_0.jpg", "train", True), doubt("train/elm/elm_7.jpg", "train", False),
        doubt("test/elm/elm_112.jpg", "test", True),
    )  # fmt: skip
    before = {path: path.read_bytes() for path in trees.rglob("*") if path.is_file()}
    rows = clean_rows(table, replace(headstart.audit(table), doubtful=doubtful))
    by_name = {row.path.relative_to(trees).as_posix(): row for row in rows}
    assert {name for name, row in by_name.items() if row.drop} == {
        "train/ash/empty.jpg", "train/ash/black.png", "train/ash/ash_0.jpg", "train/ash/ash_21.jpg",
        "train/ash/wrong.png", "train/elm/elm_35.jpg", "train/elm/elm_7.jpg",
    }  # fmt: skip
    assert all(row.reason for row in rows if row.drop or row.original_label)
    assert (by_name["train/elm/elm_0.jpg"].label, by_name["train/elm/elm_0.jpg"].original_label) == ("ash", "elm")
    assert by_name["test/elm/elm_112.jpg"].label == "elm"
    assert by_name["train/ash/twice.png"].group == by_name["train/ash/ash_42.jpg"].group != ""
    assert counts_of(rows) == {"kept": 47, "dropped": 7, "relabelled": 1}
    written = load_images(headstart.write_manifest(rows, tmp_path / "clean.csv"))
    assert len(written) == 47
    assert kinds(headstart.audit(written)) == {"near-duplicates": "note"}
    assert before == {path: path.read_bytes() for path in trees.rglob("*") if path.is_file()}


@pytest.mark.skipif(sys.platform == "win32", reason="no such file names there")
def test_line_breaks_in_names_stop_nothing(trees: Path, tmp_path: Path) -> None:
    (trees / "train/ash").rename(trees / "train/a\nsh")
    (trees / "test/ash").rename(trees / "test/a\nsh")
    scene(3).save(trees / "train/elm/near\n \u2028one.png")  # of train/a\nsh/ash_21.jpg
    out, clean = tmp_path / "out", tmp_path / "clean.csv"
    assert main(["audit", str(trees), "--fast", "--quiet", "--out", str(out), "--write-clean", str(clean)]) == 0
    assert {"audit.json", "audit.html", "near-conflicts.jpg"} <= {path.name for path in out.iterdir()}
    assert sum(row.drop for row in headstart.read_manifest(clean)) == 2


def test_write_clean_is_refused_before_the_work(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(trees), "--fast", "--write-clean", "nowhere/clean.csv"]) == 2
    assert "a folder that is there" in capsys.readouterr().err
    assert main(["audit", str(trees), "--fast", "--backbone", "resnet18"]) == 2
    assert "would change nothing" in capsys.readouterr().err


def test_a_real_audit_finds_turned_labels(shared: Path, tmp_path: Path) -> None:
    table = load_images(shared / "data" / "flowers5", check=False).limit(150)
    labels = table.labels.copy()
    labels[::15] = (labels[::15] + 1) % 5
    result = headstart.audit(
        replace(table, labels=labels), backbone="mobilenetv2_100",
        weights=shared / "weights" / "mobilenetv2_100.safetensors",
    )  # fmt: skip
    turned = {table.relative_paths[i] for i in range(0, len(table), 15)}
    assert result.doubtful is not None
    assert len(turned & {one.file for one in result.doubtful[: 2 * len(turned)]}) >= 0.8 * len(turned)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (50, 40), (700, 400)])  # the last one in several bands
def test_the_digest_is_of_all_pixels_and_of_nothing_else(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    one = look_of(Image.fromarray(pixels), Header(), 1).pixels
    assert one == look_of(Image.fromarray(pixels.copy()), Header(format="PNG"), 2).pixels
    for row, column in {(0, 0), (size[1] // 2, size[0] // 2), (size[1] - 1, size[0] - 1)}:
        other = pixels.copy()
        other[row, column, 1] ^= 1
        assert look_of(Image.fromarray(other), Header(), 1).pixels != one
    if size[0] != size[1]:
        assert look_of(Image.fromarray(pixels.reshape(size[0], size[1], 3)), Header(), 1).pixels != one
