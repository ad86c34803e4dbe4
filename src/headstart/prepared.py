"""Folders of pictures that are made once and kept in the cache folder: unpacked archives, exported data sets."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STALE_SECONDS = 24 * 3600.0


def prepared_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """`sets/NAME` in the cache folder, filled by `fill` where it is not there yet.

    `fill` gets an empty folder beside it, which takes its place when complete: what an error, Ctrl-C or another
    process leaves half done is never seen.
    """
    target = prepared_path(name)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        fill(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker; its folder is as good
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def prepared_path(name: str) -> Path:
    """Where the folder of this name stands, or would."""
    from .store import cache_folder  # numpy comes with it, which `--help` does not wait for

    return cache_folder() / "sets" / name


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind a day or more ago."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink()
