"""The cache folder: files that spare work and may vanish at any time without harm.

An entry is one file: its bytes, then a description (JSON) with its own checksum and the length of the whole, so that a
torn or foreign file is told at once. Entries are written beside their place and appear complete or not at all. Whoever
reads an entry holds a shared lock on it; the least recently used one that nobody holds goes first when room is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import SetupError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: a file that is open there cannot be removed, and two builders merely do the work twice
    fcntl = None

KINDS = ("pixels", "features", "audits", "files")
DEFAULT_LIMIT_BYTES = 20 * 10**9

_SUFFIX = ".entry"
_MAGIC = b"HSTORE1\n"
_TRAILER = struct.Struct("<QQ32s8s")  # length of the description, of the whole file, the description's hash, _MAGIC
_STALE_SECONDS = 60.0  # what has been left for so long without a lock is no writer's any more
_FRESH_SECONDS = 1.0  # a writer may not have locked it yet
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_Bytes = npt.NDArray[np.uint8]


def cache_folder() -> Path:
    """`HEADSTART_CACHE`, or `headstart` in the user's cache folder of this platform."""
    given = os.environ.get("HEADSTART_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "headstart"


def cache_limit() -> int:
    """`HEADSTART_CACHE_LIMIT` in bytes (500MB, 20GB, or a plain number), or the default of 20 GB.

    Raises:
        SetupError: the variable holds something else.
    """
    text = os.environ.get("HEADSTART_CACHE_LIMIT", "").strip()
    if not text:
        return DEFAULT_LIMIT_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, flags=re.IGNORECASE)
    if match is None:
        raise SetupError(
            f"HEADSTART_CACHE_LIMIT is {text!r}; it takes a size such as 500MB or 20GB, or a number of bytes."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def key_of(parts: Mapping[str, Any]) -> str:
    """A name that is the same for the same parts and for no others: 32 hexadecimal digits.

    Parts are plain JSON values; anything else among them counts as its text.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def code_hash(*modules: str) -> str:
    """Hash of the source text of these rooms, or of all: what they computed is not taken for what they compute now.

    As it was when it was first asked for: a version that is installed under a running program is not what runs there.
    """
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(__file__).parent
    for path in [folder / f"{name}.py" for name in modules] or sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Listed:
    """One entry as `Cache.entries` finds it. used: when it was last used, seconds since 1970."""

    path: Path
    kind: str
    nbytes: int
    used: float


class Entry:
    """A complete entry, held: it stays in its place until it is closed, or nobody has its `data` any more.

    meta: the description. data: the bytes, mapped into memory; writing to them changes this process's copy alone.
    """

    def __init__(self, path: Path, meta: dict[str, Any], fd: int) -> None:
        self.path, self.meta = path, meta
        size = int(meta["nbytes"])
        self.data: _Bytes = (  # not from `fd`: the map would have a copy of it, and with it the lock
            np.memmap(path, np.uint8, mode="c", offset=len(_MAGIC), shape=(size,)) if size else np.zeros(0, np.uint8)
        )
        self.close = weakref.finalize(self.data, os.close, fd)
        with suppress(OSError):
            os.utime(path)  # its last use


class EntryWriter:
    """An entry on its way: append to it or reserve its room, then publish or discard it."""

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.target = target
        self.nbytes = 0
        self._part = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.part")
        self._file: BinaryIO = self._part.open("w+b")
        _try_lock(self._file.fileno())  # tells others that its writer lives
        self._file.write(_MAGIC)

    def append(self, data: bytes | memoryview) -> int:
        """Write the bytes; returns where they begin."""
        offset = self.nbytes
        self._file.write(data)
        self.nbytes += len(data)
        return offset

    def reserve(self, nbytes: int) -> _Bytes:
        """Room for this many bytes, mapped for writing.

        Raises:
            OSError: the disk is full. It is told here, since writing to a map without blocks behind it would end the
                process.
        """
        self._file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, len(_MAGIC) + nbytes)
        else:
            self._file.truncate(len(_MAGIC) + nbytes)
        self.nbytes = nbytes
        return np.memmap(self._part, np.uint8, mode="r+", offset=len(_MAGIC), shape=(nbytes,))

    def publish(self, meta: Mapping[str, Any]) -> None:
        """Let the entry appear, complete; an older one of its name is replaced."""
        text = json.dumps({**meta, "nbytes": self.nbytes}, separators=(",", ":")).encode()
        self._file.seek(len(_MAGIC) + self.nbytes)
        self._file.write(text)
        whole = len(_MAGIC) + self.nbytes + len(text) + _TRAILER.size
        self._file.write(_TRAILER.pack(len(text), whole, _hash(text), _MAGIC))
        self._file.flush()
        if fcntl is None:
            self._file.close()
        self._part.replace(self.target)  # still locked, so that nobody takes it for left over
        self._file.close()

    def discard(self) -> None:
        """Leave nothing behind; after `publish` it does nothing."""
        self._file.close()
        self._part.unlink(missing_ok=True)


class Cache:
    """The cache folder with its size limit.

    Args:
        folder: None is `cache_folder()`.
        limit_bytes: None is `cache_limit()`.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = folder or cache_folder()
        self.limit_bytes = cache_limit() if limit_bytes is None else limit_bytes
        self._begun: set[Path] = set()

    def path(self, kind: str, name: str) -> Path:
        """Where the entry of this name stands, or would."""
        return self.folder / kind / f"{name}{_SUFFIX}"

    def entries(self) -> list[Listed]:
        """Everything that takes room here, the least recently used first."""
        found = []
        for kind in KINDS:
            for path in (self.folder / kind).glob(f"*{_SUFFIX}"):
                with suppress(OSError):  # gone meanwhile
                    status = path.stat()
                    found.append(Listed(path, kind, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def names(self, kind: str, prefix: str = "") -> list[str]:
        """Names of the entries of a kind that begin so, in alphabetic order."""
        return sorted(path.stem for path in (self.folder / kind).glob(f"{prefix}*{_SUFFIX}"))

    def describe(self, kind: str, name: str) -> dict[str, Any] | None:
        """An entry's description; None where there is none, or a torn or foreign file, which is removed."""
        path = self.path(kind, name)
        try:
            with path.open("rb") as file:
                meta = _read_meta(file)
        except OSError:
            return None
        if meta is None:
            drop(path)
        return meta

    def open(self, kind: str, name: str) -> Entry | None:
        """Hold an entry; None where there is none, or a torn or foreign file, which is removed."""
        path = self.path(kind, name)
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError:
            return None
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks, where nothing is ever evicted
                    fcntl.flock(fd, fcntl.LOCK_SH)
            with os.fdopen(fd, "rb", closefd=False) as file:
                meta = _read_meta(file)
            if meta is not None and path.exists():  # not evicted between opening and locking
                return Entry(path, meta, fd)
        except FileNotFoundError:  # removed by who does not ask for locks, before it was mapped
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if meta is None:
            drop(path)
        return None

    def touch(self, kind: str, name: str) -> None:
        """An entry was used that was not held."""
        with suppress(OSError):
            os.utime(self.path(kind, name))

    def write(self, kind: str, name: str) -> EntryWriter:
        """Begin an entry; it appears when it is published."""
        path = self.path(kind, name)
        self._begun.add(path)
        return EntryWriter(path)

    def began(self, kind: str, name: str) -> bool:
        """Whether this entry, if it is there, is from this very object."""
        return self.path(kind, name) in self._begun

    @property
    def is_writable(self) -> bool:
        """Whether this process may write here; the folder is made where there is none."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.W_OK)

    def room(self) -> int:
        """Bytes that could be added if everything that nobody uses went: by the limit, and by the disk's free space.

        Entries on their way count as far as they have got.
        """
        free = [entry.nbytes for entry in self.entries() if not _is_held(entry.path)]
        held = sum(entry.nbytes for entry in self.entries()) - sum(free) + self.on_its_way()
        return max(0, min(self.limit_bytes - held, self._free_disk() + sum(free)))

    def make_room(self, nbytes: int) -> bool:
        """Evict what was used least recently until `nbytes` more fit; evicts nothing, and is False, if they cannot."""
        self._sweep()
        if nbytes > self.room():
            return False
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries) + self.on_its_way()
        for entry in entries:
            if total + nbytes <= self.limit_bytes and nbytes <= self._free_disk():
                break
            if _remove_unheld(entry.path):
                total -= entry.nbytes
        return True

    def clear(self, kinds: tuple[str, ...] = KINDS) -> tuple[int, int]:
        """Remove everything of these kinds that nobody uses; returns bytes removed and entries kept.

        Raises:
            SetupError: the folder cannot be written to.
        """
        removed, kept = self._sweep(_FRESH_SECONDS if fcntl else _STALE_SECONDS), 0
        stuck: list[Path] = []
        for entry in self.entries():
            if entry.kind in kinds:
                try:
                    gone = _remove_unheld(entry.path, strict=True)
                except OSError:
                    stuck.append(entry.path)
                    continue
                removed += entry.nbytes * gone
                kept += not gone
        if stuck:
            more = f", nor can {len(stuck) - 1:,} more" if len(stuck) > 1 else ""
            raise SetupError(f"{stuck[0]} cannot be removed{more}. Make its folder writable, or remove it by hand.")
        return removed, kept

    @contextmanager
    def lock(self, name: str, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """One process at a time; `waiting` is called when another one is inside."""
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if not _try_lock(file.fileno()):
                if waiting:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def on_its_way(self) -> int:
        """Bytes of what is being written, or was when its writer died."""
        total = 0
        for kind in KINDS:
            for path in (self.folder / kind).glob(".*.part"):
                with suppress(OSError):  # published meanwhile
                    total += path.stat().st_size
        return total

    def _free_disk(self) -> int:
        """Free bytes of the disk, less what is left to others: a twentieth of it, at most 2 GB."""
        folder = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        usage = shutil.disk_usage(folder)
        return usage.free - min(usage.total // 20, 2 * 10**9)

    def _sweep(self, older: float = _STALE_SECONDS) -> int:
        """Remove what writers that died have left, so many seconds ago or more; returns bytes removed."""
        removed = 0
        for path in self.folder.glob("*/.*.part"):
            with suppress(OSError):
                status = path.stat()
                if time.time() - status.st_mtime >= older and _remove_unheld(path):
                    removed += status.st_size
        return removed


def _read_meta(file: BinaryIO) -> dict[str, Any] | None:
    """The description, or None where length, marks or checksum are not right."""
    whole = file.seek(0, os.SEEK_END)
    if whole < len(_MAGIC) + _TRAILER.size:
        return None
    file.seek(0)
    start = file.read(len(_MAGIC))
    file.seek(whole - _TRAILER.size)
    size, expected, digest, end = _TRAILER.unpack(file.read(_TRAILER.size))
    if start != _MAGIC or end != _MAGIC or expected != whole or size > whole - len(_MAGIC) - _TRAILER.size:
        return None
    file.seek(whole - _TRAILER.size - size)
    text = file.read(size)
    if _hash(text) != digest:
        return None
    meta: dict[str, Any] = json.loads(text)
    return meta if meta["nbytes"] == whole - len(_MAGIC) - size - _TRAILER.size else None


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _try_lock(fd: int) -> bool:
    """Lock the file for this holder alone, without waiting; always True where there are no such locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def drop(path: Path) -> None:
    """Remove a file that is of no use; where that cannot be done it stays, of no use."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _is_held(path: Path) -> bool:
    """Whether somebody uses it, or may: another account's, which cannot be asked."""
    try:
        with path.open("rb") as file:
            return not _try_lock(file.fileno())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _remove_unheld(path: Path, *, strict: bool = False) -> bool:
    """Remove a file unless somebody uses it; whether it is gone.

    Args:
        strict: remove one that cannot be asked, too; an OSError where that cannot be done.
    """
    try:
        with path.open("rb") as file:
            if not _try_lock(file.fileno()):
                return False
            if fcntl is not None:
                path.unlink(missing_ok=True)
                return True
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:
        if not strict:
            return False
        path.unlink(missing_ok=True)
    return True
