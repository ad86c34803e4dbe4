"""Folders of pictures that are made once and kept in the cache folder: unpacked archives, exported data sets."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .manifest import ManifestRow, write_manifest

if TYPE_CHECKING:
    from PIL import Image

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a folder with open files cannot be moved
    fcntl = None

_COUNT = ".files"  # in each folder: how many files were put into it
# What has no such file: folders of earlier versions, and the one where torchvision keeps what it has downloaded.
_EARLIER = re.compile("(?:archive|archive-2|arrays)-[0-9a-f]{32}|torchvision")
_STALE_SECONDS = 24 * 3600.0
_held: dict[Path, int] = {}  # folders that this process reads, each with a shared lock until the process ends


def prepared_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """`sets/NAME` in the cache folder, filled by `fill` where it is not there yet.

    `fill` gets an empty folder beside it, which takes its place when complete: what an error, Ctrl-C or another
    process leaves half done is never seen. Nobody clears it away while this process lives. A folder that has lost
    files since is made anew.

    Raises:
        DataError: it has lost files, and another process reads it.
    """
    target = prepared_path(name)
    if is_ready(target):
        return target
    if target.is_dir() and not remove_prepared(target):
        raise DataError(
            f"{target} has lost some of its files, and another process reads it. Start again when that has ended."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.filling")
    part.mkdir()
    try:
        fill(part)
        (part / _COUNT).write_text(f"{_files(part)}\n")
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker; its folder is as good
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    hold(target)
    return target


def is_ready(folder: Path) -> bool:
    """Hold the folder where it is there with as many files as were put into it."""
    if not hold(folder):
        return False
    try:
        is_whole = _files(folder) >= int((folder / _COUNT).read_text())
    except FileNotFoundError:  # made by an earlier version
        return True
    except ValueError:
        is_whole = False
    if not is_whole and folder in _held:  # else it could be made anew by nobody
        os.close(_held.pop(folder))
    return is_whole


def _files(folder: Path) -> int:
    """How many files lie in it, at any depth; hidden ones, which file browsers leave, do not count."""
    return sum(not name.startswith(".") for _, _, files in os.walk(folder) for name in files)


def hold(folder: Path) -> bool:
    """Hold the folder, so that nobody clears it away, until this process ends; False where there is none."""
    if fcntl is None or (folder in _held and folder.is_dir()):
        return folder.is_dir()
    while True:
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return False
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), folder.stat()):
                _held[folder] = lock
                return True
        os.close(lock)  # cleared, and perhaps made anew, between opening and locking


def remove_prepared(folder: Path) -> bool:
    """Remove it, at once for all others; False, and nothing is done, where another process reads it."""
    if folder in _held:
        os.close(_held.pop(folder))
    lock = None
    try:
        lock = None if fcntl is None else os.open(folder, os.O_RDONLY)
        if lock is not None and not _locked(lock):
            hold(folder)
            return False
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.filling")  # swept up if this is killed
        folder.rename(aside)
    except FileNotFoundError:  # another process has just done it
        return True
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _locked(file: int) -> bool:
    """Locked for this process alone; True on a file system without locks, where the user has to know who reads what."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def prepared_path(name: str) -> Path:
    """Where the folder of this name stands, or would."""
    from .store import cache_folder  # numpy comes with it, which `--help` does not wait for

    return cache_folder() / "sets" / name


def prepared_folders(*, ours: bool = True) -> list[Path]:
    """All that are kept, the least recently made first; with `ours` False the folders there that others have made."""
    folder = prepared_path("-").parent
    found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."] if folder.is_dir() else []
    return sorted((path for path in found if _is_ours(path) == ours), key=lambda path: path.stat().st_mtime)


def _is_ours(folder: Path) -> bool:
    """Whether `prepared_folder` has made it, or torchvision for us; a link leads to what is somebody's own."""
    if folder.is_symlink():
        return False
    if (folder / _COUNT).is_file() or _EARLIER.fullmatch(folder.name):
        return True
    return folder.name.startswith(("hf-", "torchvision-")) and (folder / PictureWriter.MANIFEST).is_file()


def folder_bytes(folder: Path) -> int:
    """What the files below a folder take up."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind a day or more ago.

    `store` sweeps `.part` files much sooner; these have another ending, so that it leaves them alone.
    """
    for part in folder.glob(".*.filling"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink()


class PictureWriter:
    """Writes pictures and their manifest into a folder: any source of pictures becomes files that all else works on.

    Encoded pictures are written byte for byte, decoded ones losslessly as PNG.
    """

    MANIFEST = "photos.csv"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[ManifestRow] = []

    def add(self, picture: bytes | Image.Image, label: str, *, split: str = "", group: str = "") -> None:
        """Write one picture to SPLIT/LABEL/NUMBER, with the extension of what it is.

        Raises:
            DataError: pixels that are refused in files, too.
        """
        try:
            data, suffix = (picture, _suffix(picture)) if isinstance(picture, bytes) else (_png(picture), ".png")
        except DataError as error:
            raise DataError(f"Picture {len(self._rows)} ({label}): {error}.") from None
        word = re.sub(r"[^\w-]+", "_", label)[:60] + "_"  # `con` and `nul` are no names for folders
        path = self._folder / split / word / f"{len(self._rows):06d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._rows.append(ManifestRow(path, label, split, group))

    def finish(self) -> None:
        """Write the manifest.

        Raises:
            DataError: no picture was added.
        """
        write_manifest(self._rows, self._folder / self.MANIFEST)


_BEGINNINGS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II": ".tif",
    b"MM": ".tif",
}


def _suffix(data: bytes) -> str:
    return next((suffix for begin, suffix in _BEGINNINGS.items() if data.startswith(begin)), ".img")


def _png(image: Image.Image) -> bytes:
    from .decode import png_picture  # Pillow comes with it, which `--help` does not wait for

    buffer = io.BytesIO()
    png_picture(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
