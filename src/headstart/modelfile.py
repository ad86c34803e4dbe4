"""Model files from strangers: safetensors headers and JSON, read by ourselves before anything is allocated.

What is checked here is the form: sizes, types, offsets. Whether names and shapes are those of the architecture is for
`checkpoint` and `weights`, who know it. Functions raise `CheckpointError` with a bare reason; the caller adds the path.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

MAX_HEADER_BYTES = 4 << 20  # of a safetensors header; 30,000 tensors fit in
MAX_JSON_BYTES = 4 << 20
MAX_DIMENSIONS = 16
MAX_NAME = 500

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}  # fmt: skip
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its type's name there, its shape, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file declares, after checking that they fill the file exactly.

    Raises:
        CheckpointError: no safetensors file (a pickle or an archive is called so), a header that is too long, no
            JSON, of another form, or whose shapes, types and offsets do not add up to the file's length.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        if file.read(1) != b"{":
            _refuse_pickle(start)
        file.seek(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"the file has {size:,} bytes, its header alone should have {length:,}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"its header has {length:,} bytes; up to {MAX_HEADER_BYTES:,} are read")
        header = _parse(file.read(length), "its header")
    header.pop("__metadata__", None)  # nothing in it is used
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    _check_offsets(tensors, size - 8 - length)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, read strictly: no key twice, no NaN, and not without end.

    Raises:
        CheckpointError: too long, not UTF-8, no JSON, or no object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"it has {size:,} bytes; up to {MAX_JSON_BYTES:,} are read")
    return _parse(path.read_bytes(), "it")


def check_archive(path: Path) -> None:
    """Refuse a zip archive (PyTorch's form since 1.6) whose members would unpack to more than the file holds.

    Raises:
        CheckpointError: compressed, overlapping or oversized members, names that lead out of it, a damaged archive.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # the older form is one stream; PyTorch's reader takes from it what is there
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"a damaged archive ({error})") from None
    names = {member.filename for member in members}
    if len(names) != len(members) or any(".." in name.split("/") or name.startswith("/") for name in names):
        raise CheckpointError("an archive with members of the same name, or with names that lead out of it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError("a compressed archive; PyTorch stores tensors as they are")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"an archive of {size:,} bytes whose members claim more than that")


def _refuse_pickle(start: bytes) -> None:
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise CheckpointError("it holds a pickle, which runs code when it is read, under another name")
    if start[:4] == b"PK\x03\x04":
        raise CheckpointError("it holds a zip archive (a .pth or .npz?), which may hold pickles, under another name")


def _parse(data: bytes, what: str) -> dict[str, Any]:
    def refuse(token: str) -> NoReturn:
        raise ValueError(f"{token} is no number of JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=refuse)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise CheckpointError(f"{what} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:MAX_NAME]!r} stands in it twice")
    return found


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"a tensor has the name {name[:MAX_NAME]!r}")
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise CheckpointError(f"tensor {name} is not described by {', '.join(sorted(_ENTRY))} and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor {name} is of type {dtype!r:.100}; known: {', '.join(ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"tensor {name} has the shape {shape!r:.100}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {name} has the offsets {offsets!r:.100}")
    count = 1
    for side in shape:
        count *= side
    if offsets[1] - offsets[0] != count * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"tensor {name} of shape {shape} and type {dtype} takes {count * ITEM_BYTES[dtype]:,} bytes,"
            f" but its offsets are {offsets[0]:,} and {offsets[1]:,}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    """A list of whole numbers from 0 to 2**62; bool is none."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= 1 << 62 for v in values)


def _check_offsets(tensors: dict[str, TensorInfo], available: int) -> None:
    """The tensors lie one behind the other, from the header's end to the file's: no gap, no overlap, nothing beyond."""
    placed = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
    for (before, first), (name, second) in pairwise(placed):
        if first.end != second.start:
            what = "overlap" if second.start < first.end else "leave a gap between them"
            raise CheckpointError(f"tensors {before} and {name} {what}")
    first_byte, last_byte = (placed[0][1].start, placed[-1][1].end) if placed else (0, 0)
    if first_byte != 0 or last_byte != available:
        raise CheckpointError(
            f"its tensors take bytes {first_byte:,} to {last_byte:,}, but behind the header there are {available:,}"
        )
