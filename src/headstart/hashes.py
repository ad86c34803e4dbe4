"""Contents of files by hash, remembered in the cache folder, so that a known file is not read again."""

from __future__ import annotations

import hashlib
import stat
import time
from pathlib import Path
from typing import Any

from .store import Cache, key_of


class FileHashes:
    """Content hashes of files, remembered by path, size, times and inode, so that a known file is not read again.

    A file changed within two seconds of being hashed could keep its times: it is not remembered.
    """

    def __init__(self, cache: Cache, root: Path) -> None:
        self._cache = cache
        self._name = key_of({"root": str(root)})
        self._entry = cache.describe("files", self._name) or {}
        cache.touch("files", self._name)
        self._known: dict[str, list[Any]] = self._entry.get("files", {})
        self._new: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        """The hash of the file's bytes, 40 hexadecimal digits.

        Raises:
            OSError: it cannot be read.
        """
        stamp = _stamp(path)
        known = self._known.get(str(path))
        if known is not None and known[0] == stamp:
            return str(known[1])
        with path.open("rb") as file:
            value = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
        if _stamp(path) == stamp and time.time_ns() - max(stamp[1], stamp[2]) > 2 * 10**9:
            self._new[str(path)] = [stamp, value]
        return value

    def save(self) -> None:
        """Keep what was learnt for the next run."""
        if not self._new:
            return
        writer = self._cache.write("files", self._name)
        try:
            writer.publish({"files": self._known | self._new})
        finally:
            writer.discard()


def content_hash(data: bytes) -> str:
    """The hash that `FileHashes.of` gives for a file of these bytes."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # to read a pipe would wait for its writer
        raise OSError(f"{path} is not a regular file")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
