"""Archives of pictures, unpacked so that nothing in them can do harm: .zip, .tar, .tar.gz, from the disk or a URL.

Python's own extractors were got round more than once (CVE-2007-4559, CVE-2025-4517), so none is used: the members are
read one by one, regular files alone are written, under names that were checked, into a new folder of ours.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NoReturn
from urllib.parse import urlsplit

from .errors import DataError, SetupError
from .folders import IMAGE_EXTENSIONS, SPLIT_FOLDERS
from .manifest import MANIFEST_SUFFIXES
from .prepared import is_ready, prepared_folder, prepared_path

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

MIB = 1 << 20
MAX_ENTRIES = 2_000_000
MAX_MEMBER_BYTES = 1 << 30  # above the largest picture the decoder takes
MAX_TOTAL_BYTES = 500 << 30
MAX_RATIO = 200  # unpacked over packed; pictures are hardly compressible, bombs reach a thousand and more
FREE_BYTES = 64 * MIB  # small archives may unpack to this much whatever their ratio
MAX_NAME_BYTES, MAX_PART_BYTES, MAX_DEPTH = 1024, 255, 16
TIMEOUT_SECONDS = 60

_NAME = "archive-2"  # of folders in the cache; another number where members are named otherwise than before
_WANTED = (*IMAGE_EXTENSIONS, *MANIFEST_SUFFIXES)
_CENTRAL = b"PK\1\2"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, ValueError),
    *(OverflowError, IndexError, NotImplementedError, RuntimeError, RecursionError),
)


def is_archive(path: str | Path) -> bool:
    """Whether the name is that of an archive this room unpacks."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def is_url(text: str | Path) -> bool:
    """Whether this is an address on the web."""
    return str(text).lower().startswith(("http://", "https://"))


def unpack_archive(path: str | Path) -> Path:
    """Unpack the pictures and tables of an archive into the cache, once; returns the folder, of its one top folder.

    Raises:
        DataError: no archive, a damaged one, or one with anything that has no place in an archive of pictures:
            absolute names, `..`, links, devices, encrypted or overlapping members, names that differ by case alone,
            more entries or bytes than fit, a compression ratio no picture reaches. Nothing is left behind.
    """
    file = Path(path).expanduser().absolute()
    return _top(
        prepared_folder(f"{_NAME}-{_digest(file, str(path))[:32]}", lambda folder: _unpack(file, folder, str(path)))
    )


def fetch_archive(url: str) -> Path:
    """Download `URL#sha256=HEX`, check it and unpack it into the cache; nothing is downloaded where it is there.

    Raises:
        DataError: no checksum, or another one than that of what came; what `unpack_archive` raises.
        SetupError: the network, or an answer that is no file.
    """
    address, _, fragment = url.partition("#")
    digest = fragment.removeprefix("sha256=").lower()
    if not fragment.startswith("sha256=") or not re.fullmatch("[0-9a-f]{64}", digest):
        raise DataError(
            f"{url} needs the checksum of the file behind it: {address}#sha256=HEX with the 64 digits that `sha256sum` "
            "prints. It pins the pictures to what you have seen."
        )
    done = prepared_path(f"{_NAME}-{digest[:32]}")
    if is_ready(done):
        return _top(done)
    with _downloaded(address, digest) as file:
        return _top(prepared_folder(done.name, lambda folder: _unpack(file, folder, address)))


def _top(folder: Path) -> Path:
    """The folder itself, or the one folder that everything in it lies in, also several deep."""
    inside = _inside(folder)
    while len(inside) == 1 and inside[0].is_dir() and inside[0].name.casefold() not in SPLIT_FOLDERS:
        within = _inside(inside[0])
        if not any(path.is_dir() or path.suffix.lower() in MANIFEST_SUFFIXES for path in within):
            break  # the pictures of the one class there is
        folder, inside = inside[0], within
    return folder


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]


# ---- what a member may be --------------------------------------------------------------------------------------


@dataclass
class _Gate:
    """Every member passes here before a byte of it is read; the first that is wrong ends it all."""

    packed_bytes: int
    free_bytes: int
    entries: int = 0
    total: int = 0
    wanted: int = 0
    _spelled: dict[str, tuple[str, bool, str]] = field(default_factory=dict)

    def check(self, raw: str, *, size: int, folder: bool) -> PurePosixPath:
        """The relative path of a member, or a `DataError` that says what is wrong with it.

        Args:
            size: bytes it unpacks to, as its header says.
        """
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise DataError(f"more than {MAX_ENTRIES:,} entries")
        path = _safe_path(raw)
        parts = path.parts
        if not parts and not folder:
            raise DataError("a member without a name")
        for depth in range(1, len(parts) + 1):
            self._place("/".join(parts[:depth]), is_file=depth == len(parts) and not folder, shown=raw)
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise DataError(f"member {raw!r} has {size:,} bytes; allowed: {MAX_MEMBER_BYTES:,}")
        self.total += size
        self._check_total()
        return path

    def _place(self, name: str, *, is_file: bool, shown: str) -> None:
        """Files stand once, folders in one spelling, on any system: letter case, Unicode form, trailing dots."""
        key = "/".join(part.rstrip(". ") for part in unicodedata.normalize("NFC", name).casefold().split("/"))
        if key not in self._spelled:
            self._spelled[key] = (name, is_file, shown)
            return
        spelled, was_file, first = self._spelled[key]
        if spelled != name:
            where = "" if is_file and was_file else f", in {spelled!r} and {name!r}"
            raise DataError(f"members {first!r} and {shown!r} differ by letter case or spelling alone{where}")
        if is_file or was_file:
            raise DataError(f"member {shown!r} is in it twice, or is a file and a folder at once")

    def _check_total(self) -> None:
        if self.total > MAX_TOTAL_BYTES:
            raise DataError(f"it unpacks to more than {MAX_TOTAL_BYTES:,} bytes")
        if self.total > max(FREE_BYTES, MAX_RATIO * self.packed_bytes):
            raise DataError(f"it unpacks to over {MAX_RATIO} times its size ({self.packed_bytes:,} bytes): a bomb")
        if self.total > self.free_bytes:
            raise DataError(f"it unpacks to more than the {self.free_bytes:,} bytes that are free in the cache's place")


def _safe_path(raw: str) -> PurePosixPath:
    # What macOS keeps a folder's icon in has such a name; it is not written.
    named = raw.removesuffix("Icon\r")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in named) or "\\" in named:
        raise DataError(f"member {raw!r} has a control character or a backslash in its name")
    if raw.startswith("/") or len(raw.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        raise DataError(f"member {raw[:80]!r} has an absolute name, or one of over {MAX_NAME_BYTES:,} bytes")
    path = PurePosixPath(raw)
    if len(path.parts) > MAX_DEPTH:
        raise DataError(f"member {raw[:80]!r} lies over {MAX_DEPTH} folders deep")
    for part in path.parts:
        if part == ".." or _DRIVE.match(part):
            raise DataError(f"member {raw!r} has {part!r} in its name, which leads out of the archive's folder")
        if _DEVICE.fullmatch(part.rstrip(". ")):
            raise DataError(f"member {raw!r} has {part!r} in its name, which Windows reserves for a device")
        if len(part.encode(errors="surrogateescape")) > MAX_PART_BYTES or not part.strip(". "):
            raise DataError(f"member {raw[:80]!r} has a part that is no file name")
        if os.name == "nt" and set(part) & set('<>:"|?*'):
            raise DataError(f"member {raw!r} has a name that this system cannot write")
    return path


# ---- unpacking -------------------------------------------------------------------------------------------------


def _unpack(file: Path, folder: Path, shown: str) -> None:
    """Write the wanted members below `folder`, or raise and say which member of `shown` is wrong."""
    gate = _Gate(file.stat().st_size, shutil.disk_usage(folder).free)
    kind = _kind(file, shown)
    try:
        members = _zip_members(file, gate) if kind == "zip" else _tar_members(file, gate, gzipped=kind == "gzip")
        for path, source, size in members:
            gate.wanted += path.suffix.lower() in IMAGE_EXTENSIONS
            _write(folder / path, source, size, str(path))
    except DataError as error:
        raise DataError(
            f"{shown} is not unpacked: {error}. Nothing was written; unpack it by hand if you trust it."
        ) from None
    except _DAMAGE as error:
        raise DataError(
            f"{shown} is not unpacked: it is damaged or cut off ({error or type(error).__name__}). Nothing was "
            "written; get it again."
        ) from None
    if not gate.wanted:
        raise DataError(
            f"{shown}: no picture among its {gate.entries:,} members (archives in archives are not unpacked)."
        )


def _kind(file: Path, shown: str) -> str:
    """'zip', 'gzip' or 'tar' by the first bytes, whatever the name says."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head[257:262] == b"ustar" or (len(head) == 512 and _tar_sum(head)):
        return "tar"
    raise DataError(
        f"{shown} is neither a zip nor a tar archive (it begins with {head[:8]!r}). "
        f"Known are {', '.join(ARCHIVE_SUFFIXES)}."
    )


def _tar_sum(head: bytes) -> bool:
    """Whether the checksum of an old tar header without a magic word is right."""
    digits = head[148:156].strip(b"\0 ")
    return digits.isdigit() and int(digits, 8) == sum(head[:148]) + sum(head[156:]) + 8 * ord(" ")


def _write(path: Path, source: IO[bytes], size: int, shown: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("xb") as target:
        while chunk := source.read(MIB):
            written += len(chunk)
            if written > size:
                break
            target.write(chunk)
    if written != size:
        raise DataError(f"member {shown!r} does not have the {size:,} bytes its header says")


def _is_wanted(path: PurePosixPath) -> bool:
    return path.suffix.lower() in _WANTED


def _zip_members(file: Path, gate: _Gate) -> Iterator[tuple[PurePosixPath, IO[bytes], int]]:
    """(path, bytes, size) of the wanted members, after all have been checked."""
    with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        infos = archive.infolist()
        _refuse_overlaps(raw, infos, archive.start_dir)
        paths = [gate.check(_zip_name(info), size=info.file_size, folder=_zip_folder(info)) for info in infos]
        for info, path in zip(infos, paths, strict=True):
            if not info.is_dir() and _is_wanted(path):
                with archive.open(info) as source:
                    yield path, source, info.file_size


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; macOS and others write UTF-8 without the flag that says so, which reads as code page 437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _zip_folder(info: zipfile.ZipInfo) -> bool:
    """Whether the member is a folder; anything but a plain file or a folder is refused."""
    _safe_path(info.orig_filename)  # `filename` ends at the first NUL
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > info.is_dir():
        raise DataError(f"member {info.filename!r} is a link or a device")
    if info.flag_bits & 0x2041:
        raise DataError(f"member {info.filename!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"member {info.filename!r} has compression method {info.compress_type}; allowed: 0 and 8")
    if info.is_dir() and (info.file_size or kind == stat.S_IFREG):
        raise DataError(f"member {info.filename!r} is a folder with bytes of its own")
    return info.is_dir()


def _refuse_overlaps(raw: BinaryIO, infos: list[zipfile.ZipInfo], end: int) -> None:
    """No two members share bytes, and none reaches into the table at the end: how the best zip bombs work."""
    for info in sorted(infos, key=lambda i: i.header_offset, reverse=True):
        if info.header_offset < 0:
            raise DataError(f"member {info.filename!r} lies outside the archive")
        raw.seek(info.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
        size = _LOCAL_HEADER.size + name_bytes + extra_bytes + info.compress_size
        if magic != b"PK\3\4" or info.header_offset + size > end:
            raise DataError(f"member {info.filename!r} overlaps another, or is not where the archive says")
        end = info.header_offset


class _Forward:
    """A file for `tarfile` that only goes forward, in small reads.

    A forged size would else make it read gigabytes as one long name, or go back and forth for ever (CVE-2025-8194).
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""  # what was read last

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MIB:
            raise DataError(f"a header of {size:,} bytes")
        self.last = self._stream.read(size)
        return self.last

    def seek(self, position: int) -> int:
        if position < self._stream.tell():
            raise DataError("a header that points back")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _tar_members(file: Path, gate: _Gate, *, gzipped: bool) -> Iterator[tuple[PurePosixPath, IO[bytes], int]]:
    """(path, bytes, size) of the wanted members, each checked when its turn comes."""
    with file.open("rb") as raw:
        stream = _Forward(_unzipped(raw) if gzipped else raw)
        archive = tarfile.TarFile(fileobj=stream)  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
            if member.issparse() or not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
                raise DataError(f"member {member.name!r} is a link, a device or a file with holes")
            path = gate.check(member.name, size=member.size, folder=member.isdir())
            source = None if member.isdir() or not _is_wanted(path) else archive.extractfile(member)
            if source is not None:
                yield path, source, member.size
        if len(stream.last) != tarfile.BLOCKSIZE or stream.last.strip(b"\0"):
            raise EOFError("no end mark")
        if gzipped:
            _drain(stream)


def _unzipped(raw: BinaryIO) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # all of it that `_Forward` calls is there


def _drain(stream: _Forward) -> None:
    """Read what follows the end mark: padding, and behind it the checksum of the whole."""
    for _ in range(4 * MIB // tarfile.RECORDSIZE):
        if not stream.read(tarfile.RECORDSIZE):
            return
    raise DataError("more data behind its end")


# ---- the file --------------------------------------------------------------------------------------------------


def _digest(file: Path, shown: str) -> str:
    """SHA-256 of the file; a zip with more entries than allowed is told here, before its table fills the memory."""
    digest, entries = hashlib.sha256(), 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(MIB):
                digest.update(chunk)
                entries += chunk.count(_CENTRAL)
    except OSError as error:
        raise DataError(f"Archive {shown} cannot be read: {error.strerror}.") from None
    if entries > MAX_ENTRIES:
        raise DataError(f"{shown} is not unpacked: more than {MAX_ENTRIES:,} entries.")
    return digest.hexdigest()


@contextmanager
def _downloaded(address: str, digest: str) -> Iterator[Path]:
    """The checked file behind the address, in the cache while the block runs."""
    folder = prepared_path(digest).parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{digest[:32]}.{os.getpid()}-{secrets.token_hex(4)}.filling"
    try:
        _download(address, part)
        found = _digest(part, address)
        if found != digest:
            raise DataError(
                f"{address}: what came has SHA-256 {found}, asked for was {digest}. The file has changed, or the "
                "checksum is wrong; nothing was unpacked."
            )
        yield part
    finally:
        part.unlink(missing_ok=True)


def _download(address: str, target: Path) -> None:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    free = shutil.disk_usage(target.parent).free
    try:
        request = Request(address, headers={"User-Agent": "headstart"})
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer, target.open("xb") as file:
            announced = int(answer.headers.get("Content-Length") or 0)
            _require_room(address, announced, free)
            while chunk := answer.read(MIB):
                file.write(chunk)
                _require_room(address, file.tell(), free)
            if announced and file.tell() != announced:
                raise SetupError(f"{address} was cut off after {file.tell():,} of {announced:,} bytes. Try again.")
    except HTTPError as error:
        raise SetupError(f"{address} answers {error.code} ({error.reason}). Check the address.") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        _no_network(address, reason)


def _no_network(address: str, reason: object) -> NoReturn:
    raise SetupError(
        f"{address} cannot be downloaded: {reason}. Without network, copy the archive here on another way and pass "
        f"its path in place of {urlsplit(address).hostname}'s address."
    )


def _require_room(address: str, size: int, free: int) -> None:
    if size > min(MAX_TOTAL_BYTES, free):
        raise SetupError(f"{address} has {size:,} bytes or more; there is room for {min(MAX_TOTAL_BYTES, free):,}.")
