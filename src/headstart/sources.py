"""What PHOTOS may be: a folder of class folders or a manifest; each is read into one `Layout`."""

from __future__ import annotations

from pathlib import Path

from .errors import DataError
from .folders import Layout, read_layout
from .manifest import is_manifest, manifest_layout, read_manifest

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
    """
    path = Path(photos).expanduser().absolute()
    if is_manifest(path) and not path.is_dir():
        _refuse_idle(photos, "a manifest", val_folder=val_folder, test_folder=test_folder)
        base = path.parent if root is None else Path(root).expanduser().absolute()
        return manifest_layout(read_manifest(photos, root=root), root=base)
    _refuse_idle(photos, "not a manifest", root=root)
    return read_layout(path, shown=str(photos), val_folder=val_folder, test_folder=test_folder)


def source_name(photos: str | Path) -> str:
    """A short name for folders of results: that of the folder, or of the file without its extension."""
    path = Path(photos).resolve()
    return (path.name if path.is_dir() or not is_manifest(path) else path.stem) or "photos"


def _refuse_idle(photos: str | Path, what: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise DataError(
                f"{photos} is {what}: --{name.replace('_', '-')} {value} has no meaning there. Leave it out."
            )
