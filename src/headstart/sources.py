"""What PHOTOS may be: a folder of class folders, a manifest, an archive here or on the web; each becomes a `Layout`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from .archives import ARCHIVE_SUFFIXES, fetch_archive, is_archive, is_url, unpack_archive
from .errors import DataError
from .folders import Layout, read_layout, require_file
from .manifest import MANIFEST_SUFFIXES, is_manifest, manifest_layout, read_manifest

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
        DataError: what the reader of that kind refuses; an option that this kind of source does not have.
        SetupError: no network, or a package that is not installed.
    """
    path = _on_disk(photos)
    if is_manifest(path) and not path.is_dir():
        _refuse_idle(photos, "a manifest", val_folder=val_folder, test_folder=test_folder)
        base = path.parent if root is None else Path(root).expanduser().absolute()
        return manifest_layout(read_manifest(photos, root=root), root=base)
    _refuse_idle(photos, "not a manifest", root=root)
    return read_layout(path, shown=str(photos), val_folder=val_folder, test_folder=test_folder)


def _on_disk(photos: str | Path) -> Path:
    """The folder or manifest that holds the pictures, unpacked into the cache folder where it has to be."""
    if is_url(photos):
        return fetch_archive(str(photos))
    path = Path(photos).expanduser().absolute()
    if is_archive(path) and not path.is_dir():
        require_file(path, str(photos))
        return unpack_archive(photos)
    return path


def source_name(photos: str | Path) -> str:
    """A short name for folders of results: that of the folder, or of the file without its extension."""
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
