"""What PHOTOS may be: a folder, a manifest, an archive here or on the web, a data set's name; each is a `Layout`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from .archives import ARCHIVE_SUFFIXES, fetch_archive, is_archive, is_url, unpack_archive
from .errors import DataError
from .folders import Layout, read_layout, require_file
from .manifest import MANIFEST_SUFFIXES, is_manifest, manifest_layout, read_manifest
from .named_sets import export_named, is_named

__all__ = ["read_source", "source_name"]


def read_source(
    photos: str | Path,
    *,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
) -> Layout:
    """The pictures of a source by split and class.

    Args:
        photos: as the user wrote it.
        val_folder, test_folder: of a folder; see `read_layout`.
        root: of a manifest; see `read_manifest`.
    Raises:
        DataError: no place at all, but a table, a list or a data set of another library; what the reader of that kind
            refuses; an option that this kind of source does not have.
        SetupError: no network, or a package that is not installed.
    """
    _require_place(photos)
    given = _absolute(photos)
    if is_manifest(given) and not given.is_dir():
        _refuse_idle(photos, "a manifest", val_folder=val_folder, test_folder=test_folder)
        return manifest_layout(read_manifest(photos, root=root), root=given.parent if root is None else _absolute(root))
    _refuse_idle(photos, "not a manifest", root=root)
    if is_named(photos):
        _refuse_idle(photos, "a data set with splits of its own", val_folder=val_folder, test_folder=test_folder)
        manifest = export_named(str(photos))
        return manifest_layout(read_manifest(manifest), root=manifest.parent)
    return read_layout(_folder(photos), shown=str(photos), val_folder=val_folder, test_folder=test_folder)


def _require_place(photos: object) -> None:
    if isinstance(photos, (str, os.PathLike)):
        return
    root = getattr(getattr(photos, "dataset", photos), "root", None)  # of torchvision's data sets, and loaders of them
    if isinstance(root, (str, os.PathLike)):
        advice = f"Give the folder that it reads: {str(root)!r}"
    elif type(photos).__name__ == "DataFrame":
        advice = "Write it to a CSV file with columns path and label, and give that"
    else:
        advice = (
            "Of paths and labels make a manifest, write_manifest([ManifestRow(Path(path), label), ...], 'photos.csv'),"
            " and give that"
        )
    raise DataError(
        f"Pictures are given as a {type(photos).__name__}; it takes a folder, a manifest (CSV or Parquet), an archive"
        " or a data set's name; fine_tune also an ImageTable, Splits, or a pair (pictures, labels) in memory, arrays or"
        f" PIL pictures. {advice}."
    )


def _folder(photos: str | Path) -> Path:
    """The folder that holds the pictures; an archive's is in the cache folder, unpacked where it has to be."""
    if is_url(photos):
        return fetch_archive(str(photos))
    path = _absolute(photos)
    if is_archive(path) and not path.is_dir():
        require_file(path, str(photos))
        return unpack_archive(photos)
    return path


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def source_name(photos: str | Path) -> str:
    """A short name for folders of results: that of the folder or data set, or of the file without its extension."""
    if is_named(photos):
        return re.sub(r"[^\w.-]+", "-", str(photos))
    path = Path(urlsplit(str(photos)).path) if is_url(photos) else Path(photos).resolve()
    name = path.name
    for suffix in () if path.is_dir() else (*ARCHIVE_SUFFIXES, *MANIFEST_SUFFIXES):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return name or "photos"


def _refuse_idle(photos: str | Path, what: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise DataError(
                f"{photos} is {what}: --{name.replace('_', '-')} {value} has no meaning there. Leave it out."
            )
