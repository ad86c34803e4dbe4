"""Files written in one step, or not at all, and what stands in them: JSON of plain values, CSV of any names."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from .errors import CheckpointError

_NUMBERS = frozenset({int, float, type(None)})  # what a list on one line holds
_SIMPLE = frozenset({int, bool, str, type(None)})  # what JSON has as it is; a float may be NaN


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; not every system lets a folder be opened for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def check_target(path: str | Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        CheckpointError: `path` is a folder, or lies in none, or in one that may not be written in.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"Cannot write {path}: it is a folder. Name a file in it.")
    descriptor = _descriptor(path)
    if descriptor is not None:
        import fcntl  # not on Windows, where nothing is called so

        try:
            is_read = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        except (OSError, OverflowError):
            is_read = True
        if is_read:
            raise CheckpointError(f"Cannot write {path}: it is not open for that. Name another.")
        return
    if _is_no_plain_file(path):
        if not os.access(path, os.W_OK):
            raise CheckpointError(f"Cannot write {path}: no permission. Name another.")
        return
    folder = path.parent if not path.is_symlink() else _behind_links(path).parent
    if not folder.is_dir():
        raise CheckpointError(f"Cannot write {path}: there is no folder {folder}. Make it first.")
    check_folder(folder, f"Cannot write {path}")


def check_folder(folder: str | Path, what: str) -> None:
    """Refuse a folder that cannot be written in or, where it is not there, cannot be made; nothing is changed.

    Args:
        what: whose folder it is, as the user wrote it, to begin the message with.
    Raises:
        CheckpointError: a file stands in its way, or this account may not write there.
    """
    folder = Path(folder).absolute()
    nearest = next((one for one in (folder, *folder.parents) if one.exists() or one.is_symlink()), folder)
    if not nearest.is_dir():
        raise CheckpointError(f"{what}: {nearest} is no folder. Choose another with --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(f"{what}: no permission to write in {nearest}. Name another folder.")


def _behind_links(path: Path) -> Path:
    """The file that symbolic links at the end of `path` lead to, whether or not it is there."""
    return Path(os.path.realpath(path))


def _is_no_plain_file(path: Path) -> bool:
    """Whether something is there that is written to as it stands: a device, a pipe."""
    return path.exists() and not (path.is_file() and _behind_links(path).is_file())


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that `/dev/stdout`, `/dev/fd/3` or a link to such a name means."""
    for _ in range(20):  # a chain of links that has no end names none
        name = os.path.normpath(path.absolute())
        found = re.fullmatch(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)|/dev/(stdout|stderr)", name)
        if found:
            number = found[1] or found[2]
            return int(number) if number else {"stdout": 1, "stderr": 2}[found[3]]
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new file's path beside `path`; on leaving without an error it is synced and takes `path`'s place.

    A reader sees the old file or the whole new one, never a part. After an error nothing has changed. Where `path` is
    a symbolic link, that goes for the file it leads to, and the link stays. What is no plain file (a device, a pipe,
    `/dev/stdout`) stays, too: the new content is written to it in the end.

    Raises:
        CheckpointError: see `check_target`.
    """
    path = Path(path)
    check_target(path)
    descriptor = _descriptor(path)
    if descriptor is not None or _is_no_plain_file(path):
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            temporary = Path(folder) / "content"
            yield temporary
            if descriptor is not None and sys.stdout and not sys.stdout.closed:
                sys.stdout.flush()  # what was printed before comes first
            # Where an open file is named, it goes on from where that stands: opened anew it would be another's.
            opened = path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")
            with temporary.open("rb") as file, opened as target:
                shutil.copyfileobj(file, target)
        return
    path = _behind_links(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomic(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data`, whole or piece by piece, to `path` in one step; see `replacing`.

    Raises:
        CheckpointError: see `check_target`; the disk is full, or the like.
    """
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
    except BrokenPipeError:  # whoever reads it has seen enough
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}. Make room, or name another.") from error


def _plain(value: Any) -> Any:
    """Plain JSON values: NaN and infinity become null (JSON has neither), tuples lists, numpy numbers Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        is_plain = _SIMPLE.issuperset(map(type, value))  # a long row of numbers is not gone through one by one
        return list(value) if is_plain else [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form")


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """UTF-8 JSON of plain values, numpy numbers and paths; NaN and infinity are written as null.

    A name that is no valid Unicode (a file name from another encoding) is written as escapes, and reads back equal.

    Args:
        indent: blanks for each level; a list of numbers stands on one line. All stands on one without it.
    """
    plain = _plain(value)
    for ascii_only in (False, True):
        encoder = json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False)
        pieces = [encoder.encode(plain)] if indent is None else _indented(plain, encoder, indent, "\n")
        try:
            return "".join(pieces).encode()
        except UnicodeEncodeError:
            pass
    raise AssertionError("escapes are ASCII")


def _indented(plain: Any, encoder: json.JSONEncoder, indent: int, line: str) -> Iterator[str]:
    """Pieces of the JSON text of plain values whose lines begin with `line`.

    A row of numbers is one piece: a confusion matrix of thousands of classes has millions, of which Python's encoder
    makes a piece each where it indents.
    """
    deeper = line + " " * indent
    if isinstance(plain, dict) and plain:
        for i, (key, item) in enumerate(plain.items()):
            yield f"{',' if i else '{'}{deeper}{encoder.encode(key)}: "
            yield from _indented(item, encoder, indent, deeper)
        yield line + "}"
    elif isinstance(plain, list) and not _NUMBERS.issuperset(map(type, plain)):
        for i, item in enumerate(plain):
            yield f"{',' if i else '['}{deeper}"
            yield from _indented(item, encoder, indent, deeper)
        yield line + "]"
    else:
        yield encoder.encode(plain)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """The lines of a UTF-8 CSV file, made as they are taken: a row may be long, and there may be many.

    Commas, quotes and line breaks in a cell are quoted, and any file name reads back equal.
    """
    text = io.StringIO(newline="")
    # The csv module leaves a lone carriage return bare when lines end in "\n", and then cannot read it back.
    plain, quoting = (
        csv.writer(text, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC)
    )
    for row in chain([header], rows):
        returns = any(isinstance(cell, str) and "\r" in cell for cell in row)
        (quoting if returns else plain).writerow(row)
        yield text.getvalue().encode("utf-8", errors="surrogateescape")
        text.seek(0)
        text.truncate()


def read_csv(path: str | Path, *, columns: Callable[[dict[str, str]], Iterable[str]] = tuple) -> list[dict[str, str]]:
    """Rows of a CSV file written by `to_csv`, as text by column name; none where there is no file.

    Args:
        columns: the names of those of a row to keep, of which it may have no such column; all without it.
    """
    path = Path(path)
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [{name: row[name] for name in columns(row) if name in row} for row in csv.DictReader(file)]
