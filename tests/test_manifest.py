"""Manifests: what is read, what is refused and how it is told; groups that stay on one side of every split."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import headstart
from headstart.cli import main
from headstart.dataset import ImageTable, load_images
from headstart.errors import DataError
from headstart.groups import make_units, take_units
from headstart.manifest import ManifestRow, read_manifest, write_manifest
from headstart.splitting import split

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write lines as a CSV beside pictures a.png .. h.png."""
    for i, letter in enumerate("abcdefgh"):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / f"{letter}.png")

    def make(*lines: str, name: str = "photos.csv", encoding: str = "utf-8") -> Path:
        (tmp_path / name).write_text("\n".join(lines), encoding=encoding)
        return tmp_path / name

    return make


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_csv_with_every_column(write: Write, tmp_path: Path) -> None:
    file = write(
        "Path,label,split,GROUP,drop,reason,original_label,camera",
        "a.png,cat,train,g1,,,,old",
        "./b.png, dog ,training,,0,,,",
        f"{tmp_path}/c.png,dog,Valid,g2,false,,cat,new",
        "d.png,cat,test,,1,blurred,,",
        "gone.png,cat,test,,TRUE,,,",
    )
    assert read_manifest(file) == [
        ManifestRow(tmp_path / "a.png", "cat", "train", "g1"),
        ManifestRow(tmp_path / "b.png", "dog", "train"),
        ManifestRow(tmp_path / "c.png", "dog", "val", "g2", original_label="cat"),
        ManifestRow(tmp_path / "d.png", "cat", "test", drop=True, reason="blurred"),
        ManifestRow(tmp_path / "gone.png", "cat", "test", drop=True),
    ]
    table = load_images(file)
    assert table.class_names == ("cat", "dog")
    assert table.relative_paths == ("a.png", "b.png", "c.png")
    assert table.split_names == ("train", "train", "val")
    assert table.groups == ("g1", "", "g2")
    assert table.dropped == ((tmp_path / "d.png", "blurred"), (tmp_path / "gone.png", ""))
    assert table.select([2, 0]).groups == ("g2", "g1")


def test_a_folder_and_its_manifest_are_the_same_table(photos: Path, tmp_path: Path) -> None:
    folder = load_images(photos)
    rows = folder.rows()
    file = write_manifest(rows[::-1], tmp_path / "all.csv")  # the order of the file does not matter
    assert file.read_text().splitlines()[:2] == ["path,label", "photos/red/red11.jpg,red"]
    table = load_images(file)
    assert table.paths == folder.paths
    assert table.labels.tolist() == folder.labels.tolist()
    for name, part in split(table, seed=3).named().items():
        assert part.paths == split(folder, seed=3).named()[name].paths


def test_splits_of_a_run_are_a_manifest(photos: Path, tmp_path: Path) -> None:
    lines = ["path,split,label"]
    for name, part in split(load_images(photos)).named().items():
        lines += [f"{path},{name},{path.split('/')[0]}" for path in part.relative_paths]
    (tmp_path / "splits.csv").write_text("\n".join(lines))
    again = split(load_images(tmp_path / "splits.csv", root=photos), seed=9)
    assert again.test.relative_paths == split(load_images(photos)).test.relative_paths


@pytest.mark.parametrize("joint", [",", ";", "\t"])
def test_commas_semicolons_and_tabs(write: Write, joint: str) -> None:
    file = write(f"path{joint}label", f"a.png{joint}cat", "", f"b.png{joint}dog", encoding="utf-8-sig")
    assert [row.label for row in read_manifest(file)] == ["cat", "dog"]


def test_parquet(write: Write, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write()
    columns = {
        "path": ["a.png", "b.png", "c.png"],
        "label": [3, 10, None],
        "group": ["x", None, None],
        "drop": [False, None, True],
        "embedding": [[0.5], [0.5], [0.5]],
    }
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 3 has an empty label"):
        read_manifest(tmp_path / "p.parquet")
    parquet.write_table(pa.table(columns | {"label": [3.0, 10.0, 3.0]}), tmp_path / "p.parquet")
    table = load_images(tmp_path / "p.parquet")
    assert table.class_names == ("3", "10")
    assert table.groups == ("x", "")
    parquet.write_table(pa.table(columns | {"label": [["a"], ["a", "b"], ["b"]]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"row 1 has a list in column 'label'.*multi-label"):
        read_manifest(tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_manifest(tmp_path / "p.parquet")


def test_pictures_far_from_the_manifest_are_named_from_their_common_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    file = write_manifest(load_images(photos).rows(), tmp_path / "tables" / "all.csv")
    table = load_images(file)
    assert table.root == photos
    assert table.relative_paths == load_images(photos).relative_paths


def test_a_file_twice_with_one_label_counts_once(write: Write, tmp_path: Path) -> None:
    file = write("path,label", "a.png,cat", f"{tmp_path}/x/../a.png,cat", "b.png,dog")
    assert len(load_images(file)) == 2


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image_path,label", "a.png,cat"], r"no column 'path'.*Did you mean: image_path\?"),
        (["path,labels", "a.png,cat"], r"no column 'label'.*Did you mean: labels\?"),
        (["path,label,Label", "a.png,cat,cat"], r"two columns called 'label'"),
        ([], r"no column 'path'; its columns: none"),
        (["path,label", "a.png,cat", "b.png,"], r"row 2 has an empty label"),
        (["path,label", ",cat"], r"row 1 has an empty path"),
        (["path,label", "a.png,cat", "b.png,dog,x"], r"row 2 has 3 cells, the header 2"),
        (["path,label,split", "a.png,cat,trian"], r"row 1 has split 'trian'.*Did you mean: train"),
        (["path,label,split", "a.png,cat,train", "b.png,dog,"], r"row 1 names a split and row 2 does not \(1 of 2"),
        (["path,label,drop", "a.png,cat,maybe"], r"row 1 has drop 'maybe'"),
        (["path,label,drop", "a.png,cat,1"], r"no row to use \(1 rows, all dropped\)"),
        (["path,label", "a.png,cat", "b.png,dog", "./a.png,dog"], r"rows 1 and 3 are the same file.*multi-label"),
        (["path,label", "a.png,cat|dog", "b.png,cat", "c.png,dog"], r"'cat\|dog' looks like several labels"),
        (["path,label", 'a.png,"a, b"', 'b.png,"b, c"', 'c.png,"a, c"'], r"looks like several labels"),
        (["path,label", 'a.png,"cat'], r"is no CSV table"),
        (["path,label", "a.png,c\0at"], r"not plain UTF-8"),
        (["path,label", "a.png,cat", "b.png,cat"], r"One class only"),
    ],
)
def test_what_is_refused_and_how_it_is_told(write: Write, lines: Sequence[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_images(write(*lines))
    assert "photos.csv" in str(caught.value)


def test_a_label_with_a_comma_may_be_one_label(write: Write) -> None:
    table = load_images(write("path,label", 'a.png,"black, white"', "b.png,red"))
    assert table.class_names == ("black, white", "red")


def test_twenty_missing_files_are_named_and_the_rest_counted(write: Write, tmp_path: Path) -> None:
    file = write("path,label", "a.png,cat", *(f"no{i}.png,dog" for i in range(25)))
    with pytest.raises(
        DataError, match=r"25 of 26 files are not there[^\0]*row 2:[^\0]*and 5 more[^\0]*--root"
    ) as caught:
        load_images(file)
    assert str(caught.value).count("no") >= 20
    with pytest.raises(DataError, match="is no folder"):
        load_images(file, root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"No file .*photo\.csv\. Did you mean: photos\.csv\?"):
        load_images(tmp_path / "photo.csv")


def test_options_of_another_kind_of_source_are_refused(write: Write, photos: Path) -> None:
    file = write("path,label", "a.png,cat", "b.png,dog")
    with pytest.raises(DataError, match="--val-folder x has no meaning there"):
        load_images(file, val_folder="x")
    with pytest.raises(DataError, match="not a manifest: --root"):
        load_images(photos, root=photos)


def test_an_imposed_class_map_and_a_class_that_training_lacks(write: Write) -> None:
    file = write("path,label,split", "a.png,cat,train", "b.png,dog,train", "c.png,dogs,val")
    with pytest.raises(DataError, match=r"'dogs' in split 'val'.*Did you mean: dog\?"):
        load_images(file)
    file = write("path,label", "a.png,dog")
    assert load_images(file, class_names=("cat", "dog")).labels.tolist() == [1]


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_blank_first_line_hides_no_separator(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "set.csv").write_text("\npath;label\na.png;cat, black\nb.png;dog\n")
    assert len(load_images(tmp_path / "set.csv")) == 2


def test_labels_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_bytes("path,label\na.png,Bär\nb.png,Hund\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"label of row 1 is not UTF-8.*Save it as CSV, UTF-8"):
        load_images(tmp_path / "set.csv")


def test_relative_paths_are_written_as_they_are_from_here(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    names = [path.relative_to(tmp_path) for path in sorted(photos.rglob("*.jpg"))]
    write_manifest([ManifestRow(name, name.parent.name) for name in names], "lists/set.csv")
    assert len(load_images("lists/set.csv")) == len(names)


def test_an_audit_does_not_overwrite_the_manifest_it_reads(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ManifestRow(path, path.parent.name) for path in sorted(photos.rglob("*.jpg"))]
    file = write_manifest(rows, tmp_path / "set.csv")
    before = file.read_bytes()
    assert main(["audit", str(file), "--fast", "--write-clean", str(file)]) == 2
    assert "the manifest that is read" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_what_is_written_reads_back(write: Write, tmp_path: Path) -> None:
    write()
    rows = [
        ManifestRow(tmp_path / "a.png", 'a "quoted", label', group="1", original_label="b"),
        ManifestRow(tmp_path / "b.png", "é", drop=True, reason="two\nlines"),
        ManifestRow(tmp_path / "c.png", "c", group="1"),
    ]
    (tmp_path / "deep").mkdir()
    for place in (tmp_path / "m.csv", tmp_path / "deep" / "m.csv"):
        assert read_manifest(write_manifest(rows, place)) == rows
    assert "split" not in (tmp_path / "m.csv").read_text()
    with pytest.raises(DataError, match="no row to write"):
        write_manifest([], tmp_path / "none.csv")
    for name in ("all.parquet", "all.tsv", "all"):  # CSV under such a name could not be read back
        with pytest.raises(DataError, match=r"Give it a name in \.csv"):
            write_manifest([ManifestRow(tmp_path / "a.jpg", "x")], tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- groups


def made_table(
    n: int = 60, names: tuple[str, ...] = ("cat", "dog", "é"), *, brought: bool = False, groups: tuple[str, ...] = ()
) -> ImageTable:
    """A table of pictures that need not be there: splits do not open them."""
    labels = np.array([i % 7 % 3 for i in range(n)])
    prime = 61 if n == 60 else 307  # scatters the names over the rows, each once
    paths = tuple(Path(f"/r/{names[label]}/{i * 37 % prime}.jpg") for i, label in enumerate(labels))
    given = tuple(("test" if i % 5 == 0 else "train") if brought else "" for i in range(n))
    return ImageTable(Path("/r"), paths, labels, names, given, groups=groups)


KNOWN_SPLITS = {  # written down before there were groups
    (False, 0): "0b4970329b6d456a",
    (False, 7): "18694f13358ce218",
    (True, 0): "e1044a21c95d56dc",
    (True, 7): "74041acd8c9e58c4",
}


@pytest.mark.parametrize(("brought", "seed"), KNOWN_SPLITS)
def test_without_groups_splits_are_what_they_always_were(brought: bool, seed: int) -> None:
    parts = split(made_table(brought=brought), val=0.2, test=0.1, seed=seed)
    text = "\n".join(f"{name} {path}" for name, part in parts.named().items() for path in part.relative_paths)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == KNOWN_SPLITS[brought, seed]


@pytest.mark.parametrize("seed", range(6))
def test_a_group_stays_on_one_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = tuple("" if g < 20 else str(g) for g in rng.integers(0, 60, 300))
    table = made_table(300, groups=groups)
    parts = split(table, val=0.2, test=0.2, seed=seed)
    assert parts.shared_groups() == {}
    assert sorted(p for part in parts.named().values() for p in part.paths) == sorted(table.paths)
    assert all(abs(len(part) - 60) <= 6 for part in (parts.val, parts.test))
    assert all(part.class_counts().min() > 0 for part in parts.named().values())
    mixed = table.select(rng.permutation(300))
    assert set(split(mixed, val=0.2, test=0.2, seed=seed).test.paths) == set(parts.test.paths)
    assert set(split(table, val=0.1, test=0.2, seed=seed).test.paths) == set(parts.test.paths)


@pytest.mark.parametrize("seed", range(6))
def test_groups_with_several_classes_are_shared_out_whole_and_near_the_shares(seed: int) -> None:
    # Patients of eight pictures each, of which 'c' is never the commonest: no group is its own by any majority.
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.choice(3, 8, p=chances) for chances in [(0.7, 0.1, 0.2), (0.1, 0.7, 0.2)] * 20])
    table = ImageTable(
        Path("/r"), tuple(Path(f"/r/{i:03}.jpg") for i in range(320)), labels, ("a", "b", "c"), ("",) * 320,
        groups=tuple(f"patient {i // 8}" for i in range(320)),
    )  # fmt: skip
    parts = split(table, val=0.2, test=0.2, seed=seed)
    assert parts.shared_groups() == {}
    assert sorted(p for part in parts.named().values() for p in part.paths) == sorted(table.paths)
    for part in (parts.val, parts.test):
        assert np.abs(part.class_counts() / table.class_counts() - 0.2).max() < 0.09
    mixed = table.select(rng.permutation(320))
    assert set(split(mixed, val=0.2, test=0.2, seed=seed).test.paths) == set(parts.test.paths)
    assert set(split(table, val=0.1, test=0.2, seed=seed).test.paths) == set(parts.test.paths)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_very_unequal_sizes_leave_each_class_most_of_its_pictures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, rng.lognormal(2.0, 1.0, 60)).astype(int)
    mixes = rng.dirichlet([0.4] * 6, 60)
    labels = np.concatenate([rng.choice(6, size, p=mix) for size, mix in zip(sizes, mixes, strict=True)])
    groups = tuple(f"g{i}" for i, size in enumerate(sizes) for _ in range(size))
    n = len(labels)
    table = ImageTable(
        Path("/r"), tuple(Path(f"/r/{i:05}.jpg") for i in range(n)), labels, tuple("abcdef"), ("",) * n, groups=groups
    )
    parts = split(table, seed=seed)
    assert (parts.train.class_counts() / table.class_counts()).min() > 0.4
    assert all(0.08 < len(part) / n < 0.22 for part in (parts.val, parts.test))


def test_a_class_in_too_few_groups_is_refused_with_their_true_number() -> None:
    labels, groups = np.array([0, 0, 1] * 2 + [0] * 6), ("g", "g", "g", "h", "h", "h", *"uvwxyz")
    table = ImageTable(
        Path("/r"), tuple(Path(f"/r/{i}.jpg") for i in range(12)), labels, ("a", "b"), ("",) * 12, groups=groups
    )
    with pytest.raises(DataError, match=r"class 'b' has 2; one each for train, val and test makes 3"):
        split(table)
    parts = split(table, test=0)  # two groups are enough for two splits
    assert [part.class_counts()[1] for part in parts.named().values()] == [1, 1, 0]


@pytest.mark.parametrize(
    ("names", "each", "hint"),
    [
        ([f"{i}.5" for i in range(12)], 2, True),  # numbers with fractions
        ([str(20 + i) for i in range(40)], 1, True),  # an age for each picture
        ([str(i) for i in range(40)], 7, False),  # classes that are called by numbers, one of which is small
        ([str(i) for i in range(5)], 1, False),
        ([f"class {i}" for i in range(40)], 1, False),
    ],
)
def test_labels_that_look_like_measured_values_are_told(names: list[str], each: int, hint: bool) -> None:
    labels = np.array([0, *(i for i in range(1, len(names)) for _ in range(each))])
    n = len(labels)
    table = ImageTable(Path("/r"), tuple(Path(f"/r/{i}.jpg") for i in range(n)), labels, tuple(names), ("",) * n)
    with pytest.raises(DataError, match=r"Too few training pictures") as error:
        split(table)
    told = f"All {len(names)} labels are numbers, each a class of its own; where they are measured values (regression"
    assert (told in str(error.value)) == hint


def test_groups_that_no_split_can_share_are_refused_by_name() -> None:
    # Groups 1, 2 and 3 hold 'b', 1, 2 and 4 'c', 1, 3 and 4 'd': with 'b' and 'c' on all three sides, 3 is where 4 is.
    held = {"1": (1, 2, 3), "2": (1, 2), "3": (1, 3), "4": (2, 3)}
    found = [(group, label) for group, labels in held.items() for label in labels] + [("", 0)] * 3
    n = len(found)
    table = ImageTable(
        Path("/r"), tuple(Path(f"/r/{i}.jpg") for i in range(n)), np.array([label for _, label in found]),
        ("a", "b", "c", "d"), ("",) * n, groups=tuple(group for group, _ in found),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no way was found to give (test|val) a picture of '[bcd]'"):
        split(table)


def test_one_large_group_leaves_train_something() -> None:
    table = ImageTable(
        Path("/r"), tuple(Path(f"/r/{i}.jpg") for i in range(24)), np.arange(24) % 2, ("a", "b"), ("",) * 24,
        groups=tuple("big" if i % 2 == 0 and i < 20 else "" for i in range(24)),
    )  # fmt: skip
    parts = split(table)
    assert [part.class_counts().min() for part in parts.named().values()] == [8, 1, 1]
    few = table.select(range(20))
    with pytest.raises(DataError, match=r"class 'a' has 1; .* \(pictures of one group count as one\)"):
        split(few)


def test_a_group_on_both_sides_of_brought_splits_is_found_and_told(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_images(photos)
    sides = ("train", "train", "val", "test")
    rows = [
        ManifestRow(row.path, row.label, sides[i % 4], "burst" if i in (0, 1, 3) else "")
        for i, row in enumerate(table.rows())
    ]
    file = write_manifest(rows, tmp_path / "all.csv")
    assert split(load_images(file)).shared_groups() == {"burst": ("train", "test")}
    tiny = ["--backbone", "test_resnet", "--weights", "none", "--image-size", "32", "--recipe", "head", "--epochs", "1"]
    out = tmp_path / "run"
    assert main(["fit", str(file), "--out", str(out), "--device", "cpu", "--workers", "1", *tiny]) == 0
    assert "1 group of pictures stands in several splits" in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["data"]["shared_groups"] == {"burst": ["train", "test"]}
    assert "stand in several splits" in (out / "report.html").read_text()


def test_units_and_what_is_taken_of_them() -> None:
    assert make_units([4, 0, 1, 2, 3, 5], ["", "g", "g", "g", "", "h"]) == [[4], [0], [1, 2, 3], [5]]
    free = [[1, 2, 3], [4], [5, 6], [7]]
    assert take_units(free, 3, leave=2) == [[1, 2, 3]]
    assert take_units(free, 2, leave=1) == [[4], [7]]  # the pair does not fit any more
    assert free == [[5, 6]]
    assert take_units(free, 1, leave=1) == []
    assert take_units(free, 1, leave=0) == [[5, 6]]  # none fits: the smallest


def test_a_manifest_made_of_a_manifest_keeps_what_was_noted(photos: Path, tmp_path: Path) -> None:
    first, second, *others = load_images(photos).rows()
    first = replace(first, drop=True, reason="blurred", original_label="green")
    second = replace(second, label="red", reason="looked at", original_label=second.label)
    table = load_images(write_manifest([first, second, *others], tmp_path / "one.csv"))
    assert table.dropped == ((first.path, "blurred"),)
    again = read_manifest(write_manifest(table.rows(dropped=True), tmp_path / "two.csv"))
    assert sorted(again, key=lambda row: row.path) == sorted([first, second, *others], key=lambda row: row.path)
    assert len(table.rows()) == len(table) == len(others) + 1
    wrong = replace(table, labels=(table.labels + 1) % 3)  # relabelled since: what was noted is of another label
    assert not any(row.reason for row in wrong.rows())


def test_splits_under_several_roots_are_written_so_that_they_are_read_again(photos: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos, elsewhere)
    parts = split(load_images(photos), test=0)
    splits = replace(parts, test=load_images(elsewhere, class_names=parts.class_names).select(range(0, 30, 5)))
    tiny = {"backbone": "test_resnet", "weights": "none", "spec_overrides": {"image_size": 32}, "device": "cpu"}
    run = headstart.fine_tune(splits, out=tmp_path / "run", recipe="head", **tiny).run_path
    assert run is not None
    again = split(load_images(run / "splits.csv", root=photos))
    for name, table in splits.named().items():
        assert sorted(again.named()[name].paths) == sorted(table.paths)
    predicted = headstart.read_run(run).predictions
    assert {row["path"] for row in predicted if row["split"] == "test"} == {str(path) for path in splits.test.paths}


# ----------------------------------------------------------------------------------------------- the commands take one


def test_fit_evaluate_and_preview_take_a_manifest(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_images(photos).rows()
    rows[0] = ManifestRow(rows[0].path, rows[0].label, drop=True, reason="blurred")
    lines = [f"{row.path.relative_to(photos)},{row.label},{int(row.drop)},{row.reason}" for row in rows]
    (tmp_path / "tables").mkdir()
    file = tmp_path / "tables" / "all.csv"
    file.write_text("\n".join(["path,label,drop,reason", *lines]))
    tiny = ["--backbone", "test_resnet", "--image-size", "32"]
    out, root = tmp_path / "run", ["--root", str(photos)]
    quick = [*tiny, "--weights", "none", "--recipe", "head", "--epochs", "1", "--device", "cpu", "--workers", "1"]
    assert main(["fit", str(file), *root, "--out", str(out), *quick]) == 0
    assert "1 pictures are dropped by the manifest" in capsys.readouterr().err
    with (out / "splits.csv").open(newline="") as text:
        used = [row["path"] for row in csv.DictReader(text)]
    assert len(used) == 35
    assert "blue/blue0.jpg" not in used
    assert "blurred" in (out / "report.html").read_text()
    assert main(["evaluate", str(out), str(file), *root, "--device", "cpu", "--workers", "1"]) == 0
    assert main(["preview", str(file), *root, *tiny, "--out", str(tmp_path / "sheet.png")]) == 0
    capsys.readouterr()
    assert main(["fit", str(file), "--out", str(tmp_path / "other"), *quick]) == 2
    assert "files are not there" in capsys.readouterr().err


def test_the_default_run_folder_is_named_after_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.cli_options import default_run_path

    monkeypatch.chdir(tmp_path)
    assert default_run_path("some/photos.csv", "resnet18") == Path("runs/photos-resnet18")


def test_the_library_exports_reading_and_writing() -> None:
    assert headstart.read_manifest is read_manifest
    assert headstart.write_manifest is write_manifest
