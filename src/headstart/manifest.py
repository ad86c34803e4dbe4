"""A table of labelled pictures, CSV or Parquet: read it row by row with clear errors, write one."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError, SetupError, near_matches
from .files import to_csv, write_atomic
from .folders import SPLIT_FOLDERS, Layout, natural_key, require_file

MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "label", "split", "group", "drop", "reason", "original_label")
_DROP_WORDS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_LABEL_JOINTS = ("|", ";", ",")
_SHOWN = 20


@dataclass(frozen=True)
class ManifestRow:
    """One picture of a manifest.

    split: 'train', 'val', 'test' or '' (to be split). group: pictures of one group stay on one side of a split; ''
    stands alone. drop: the picture is left out, for `reason`. original_label: what `label` replaces, for the reader.
    """

    path: Path
    label: str
    split: str = ""
    group: str = ""
    drop: bool = False
    reason: str = ""
    original_label: str = ""


@dataclass(frozen=True)
class ManifestLayout(Layout):
    """A layout that a manifest spells out.

    noted: its rows that say more than the layout does: dropped ones, and those with a reason or an original label.
    """

    noted: tuple[ManifestRow, ...] = ()


def is_manifest(path: str | Path) -> bool:
    """Whether the name is that of a table this room reads."""
    return Path(path).suffix.lower() in MANIFEST_SUFFIXES


def read_manifest(path: str | Path, *, root: str | Path | None = None) -> list[ManifestRow]:
    """The rows of a CSV (comma, semicolon or tab) or Parquet table, dropped ones too, in the order of the file.

    Columns `path` and `label`, and if wanted `split` (train, val, test, or the words folders are called by), `group`,
    `drop` (1 or true), `reason` and `original_label`; any others are left alone. The letter case of column names does
    not matter. A row that stands twice, with the same label, counts once.

    Args:
        root: the folder that relative paths start from; None is the folder of the manifest.
    Raises:
        DataError: no such file or column, an unknown word, an empty cell, files that are not there, one file with
            two labels, several labels in one cell; rows are counted from 1 below the header.
        SetupError: Parquet without pyarrow installed.
    """
    file = Path(path).expanduser().absolute()
    require_file(file, str(path))
    base = file.parent if root is None else Path(root).expanduser().absolute()
    if not base.is_dir():
        raise DataError(f"{path}: its pictures are looked for in {root}, which is no folder.")
    records = _parquet_records(file) if file.suffix.lower() == ".parquet" else _csv_records(file)
    try:
        rows = _once([(number, _row(number, record, base)) for number, record in records])
        kept = [row for _, row in rows if not row.drop]
        _require_all_splits(rows)
        _refuse_several_labels([row.label for row in kept])
        _require_files(rows, base)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not kept:
        raise DataError(f"{path}: no row to use ({len(rows):,} rows, all dropped).")
    return [row for _, row in rows]


def manifest_layout(rows: Iterable[ManifestRow], *, root: Path) -> ManifestLayout:
    """The kept rows by split and class, sorted as a folder of the same pictures is, whatever their order in the file.

    Args:
        root: the folder that pictures are named from where it holds them all; else the deepest folder that does.
    """
    rows = list(rows)
    kept = [row for row in rows if not row.drop]
    root = root if all(row.path.is_relative_to(root) for row in kept) else _common_folder([row.path for row in kept])
    splits: dict[str, dict[str, list[Path]]] = {}
    words = ("train", "", "val", "test")
    for row in sorted(kept, key=lambda r: (words.index(r.split), natural_key(r.label), natural_key(str(r.path)))):
        splits.setdefault(row.split, {}).setdefault(row.label, []).append(row.path)
    return ManifestLayout(
        splits,
        ignored=Counter(),
        root=root,
        groups={row.path: row.group for row in kept if row.group},
        noted=tuple(row for row in rows if row.drop or row.reason or row.original_label),
    )


def write_manifest(rows: Iterable[ManifestRow], path: str | Path) -> Path:
    """Write a CSV manifest that `load_images` and every command that takes PHOTOS read; the picture files stay.

    Paths below the manifest's folder are written relative to it, others in full. Columns that no row uses are left
    out.

    Raises:
        DataError: no row, or a name that says another format. CheckpointError: nothing can be written there.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{path}: there is no row to write.")
    file = Path(path).absolute()
    if file.suffix.lower() != ".csv":
        raise DataError(f"{path}: a manifest is written as CSV, and read as one by its name. Give it a name in .csv.")
    columns = [name for name in COLUMNS if name in ("path", "label") or any(getattr(row, name) for row in rows)]

    def cell(row: ManifestRow, name: str) -> str:
        if name == "path":
            path = row.path.absolute()  # as it is from here, where the caller named it
            return (path.relative_to(file.parent) if path.is_relative_to(file.parent) else path).as_posix()
        value = getattr(row, name)
        return ("1" if value else "") if name == "drop" else str(value)

    write_atomic(file, to_csv(columns, ([cell(row, name) for name in columns] for row in rows)))
    return file


# ---- reading ---------------------------------------------------------------------------------------------------


def _csv_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # file names may be no text
    if "\0" in text:
        raise DataError(f"{file} is not plain UTF-8 text. Save it as CSV, UTF-8.")
    header = next((line for line in text.splitlines() if line.strip()), "")
    joint = max(",;\t", key=header.count)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=joint, strict=True) if any(line)]
    except csv.Error as error:
        raise DataError(f"{file} is no CSV table: {error}.") from None
    names = _column_names(lines[0] if lines else [], file)
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(names):
            raise DataError(
                f"{file}: row {number} has {len(line)} cells, the header {len(names)} ({joint.join(line)[:80]}). "
                f"Put quotes around a cell that holds {joint!r}."
            )
        row = dict(zip(names, line, strict=True))
        if any("\udc80" <= letter <= "\udcff" for letter in row.get("label", "")):
            raise DataError(f"{file}: the label of row {number} is not UTF-8 text. Save it as CSV, UTF-8.")
        yield number, row


def _parquet_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SetupError(
            f"{file} is a Parquet table; reading it takes pyarrow, which is not installed: "
            "pip install 'headstart[datasets]'. Or save the table as CSV."
        ) from None
    try:
        schema = parquet.read_schema(file)
        names = _column_names(schema.names, file)
        wanted = [own for own, name in zip(schema.names, names, strict=True) if name in COLUMNS]
        table = parquet.read_table(file, columns=wanted)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from None
    columns = {own.strip().casefold(): table[own].to_pylist() for own in wanted}
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        yield number, dict(zip(columns, cells, strict=True))


def _column_names(header: Sequence[str], file: Path) -> list[str]:
    names = [name.strip().casefold() for name in header]
    for needed in ("path", "label"):
        if needed not in names:
            raise DataError(
                f"no column {needed!r}; its columns: {', '.join(header) or 'none'}."
                f"{near_matches(needed, list(header))} A manifest has the columns path and label, and if wanted "
                "split, group and drop. Rename the column. Several labels per picture (multi-label) are not supported."
            )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise DataError(f"two columns called {twice[0]!r}. Rename one.")
    return names


def _row(number: int, record: Mapping[str, Any], base: Path) -> ManifestRow:
    cells = {name: _text(record[name], number, name) for name in COLUMNS if name in record}
    for needed in ("path", "label"):
        if not cells[needed]:
            raise DataError(f"row {number} has an empty {needed}. Fill it in, or take the row out.")
    split, drop = cells.get("split", "").casefold(), cells.get("drop", "").casefold()
    if split and split not in SPLIT_FOLDERS:
        raise DataError(
            f"row {number} has split {cells['split']!r}; allowed: {', '.join(SPLIT_FOLDERS)}, or empty in all rows."
            f"{near_matches(split, list(SPLIT_FOLDERS))}"
        )
    if drop not in _DROP_WORDS:
        raise DataError(f"row {number} has drop {cells['drop']!r}; it takes 1 or true, 0 or false, or stays empty.")
    return ManifestRow(
        path=Path(os.path.normpath(base / cells["path"])),
        label=unicodedata.normalize("NFC", cells["label"]),
        split=SPLIT_FOLDERS[split] if split else "",
        group=cells.get("group", ""),
        drop=_DROP_WORDS[drop],
        reason=cells.get("reason", ""),
        original_label=cells.get("original_label", ""),
    )


def _text(value: Any, number: int, name: str) -> str:
    """One cell as text: 3 and 3.0 are '3' (a column of numbers with gaps is one of floats), nothing is ''."""
    if value is None or value != value:
        return ""
    if isinstance(value, (list, tuple, dict, bytes)):
        raise DataError(
            f"row {number} has a {type(value).__name__} in column {name!r}; it takes one "
            f"{'file path' if name == 'path' else 'word'} per picture. Several labels per picture (multi-label), and "
            "pictures inside the table, are not supported."
        )
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if name == "path" else str(value).strip()


# ---- checks over all rows --------------------------------------------------------------------------------------


def _once(rows: list[tuple[int, ManifestRow]]) -> list[tuple[int, ManifestRow]]:
    """Each file once; the same file with another label, split, group or fate is a contradiction."""
    found: dict[Path, tuple[int, ManifestRow]] = {}
    for number, row in rows:
        first_number, first = found.setdefault(row.path, (number, row))
        for name in ("label", "split", "group", "drop"):
            one, other = getattr(first, name), getattr(row, name)
            if one != other:
                raise DataError(
                    f"rows {first_number} and {number} are the same file, {row.path}, with {name} {one!r} and "
                    f"{other!r}. Each picture has one {name}; several labels per picture (multi-label) are not "
                    "supported. Correct one row, or take it out."
                )
    return list(found.values())


def _require_all_splits(rows: list[tuple[int, ManifestRow]]) -> None:
    empty = [number for number, row in rows if not row.split and not row.drop]
    named = [number for number, row in rows if row.split and not row.drop]
    if empty and named:
        raise DataError(
            f"row {named[0]} names a split and row {empty[0]} does not ({len(empty):,} of {len(rows):,} rows have "
            "none). Name it in every row, or in none."
        )


def _refuse_several_labels(labels: list[str]) -> None:
    """A cell such as 'cat|dog' whose parts are labels of their own elsewhere holds several labels, not one."""
    counts = Counter(labels)
    for joint in _LABEL_JOINTS:
        parts = {label: [part.strip() for part in label.split(joint)] for label in counts}
        seen = Counter(part for many in parts.values() for part in many)
        for label, many in parts.items():
            if len(many) > 1 and all(seen[part] > 1 for part in many):
                raise DataError(
                    f"label {label!r} looks like several labels in one cell: {' and '.join(map(repr, many))} are found "
                    "in other rows, too. Several labels per picture (multi-label) are not supported; give each one."
                )


def _require_files(rows: list[tuple[int, ManifestRow]], base: Path) -> None:
    gone = [(number, row.path) for number, row in rows if not row.drop and not os.path.lexists(row.path)]
    if gone:
        lines = "".join(f"\n  row {number}: {path}" for number, path in gone[:_SHOWN])
        more = f"\n  ... and {len(gone) - _SHOWN:,} more" if len(gone) > _SHOWN else ""
        raise DataError(
            f"{len(gone):,} of {len(rows):,} files are not there:{lines}{more}\n"
            f"Relative paths start at {base}; say where else with --root FOLDER."
        )


def _common_folder(paths: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # Windows: on two drives
        raise DataError("The pictures of the manifest lie on several drives; bring them together on one.") from None
