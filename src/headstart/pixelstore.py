"""Decoded pictures on disk: each is decoded once, to all that is made of it, and found by content."""

from __future__ import annotations

import math
import secrets
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from . import decode, intake
from .dataset import bad_reasons
from .dataspec import DataSpec, PixelArray, working_size
from .decode import decoder_version, file_bytes, open_image, picture_of
from .errors import DataError
from .hashes import FileHashes, content_hash
from .inspection import LOOK_BYTES, Look, unpack
from .intake import FULL, Made
from .store import Cache, Entry, EntryWriter, code_hash, drop, key_of
from .terminal import file_size
from .threads import available_cores, map_threads
from .transforms import working_image_of

SHARD_BYTES = 256 << 20  # an entry of the cache is about this large: what an interrupt loses, what an eviction takes

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

_Key = tuple[str, str]  # a file's hash; "view", "working" or "look"


@dataclass(frozen=True)
class _Record:
    """Where the pixels lie: their shard, the place in it, their shape and their bytes' checksum."""

    shard: str
    offset: int
    shape: tuple[int, ...]
    crc: int


class PixelStore:
    """Evaluation views and working images of one `DataSpec`, and what an audit measures of each picture.

    They are memory-mapped and shared by all runs and processes. What the store gives is to the bit what `load_view`,
    `working_image` and `inspection.look` compute from the file. A picture is found by the
    hash of its file's bytes, so it may move or be copied; a changed file is another picture. Files that do not decode
    are remembered with their reasons, those that are too large only as long as `HEADSTART_MAX_PIXELS` is the same.

    Args:
        spec: size, interpolation, crop and fit decide what is kept; None keeps no pixels.
        say: is told what the store will take, and when the run goes on without it.
    """

    def __init__(self, cache: Cache, spec: DataSpec | None, *, say: Say = lambda text: None) -> None:
        self.cache, self._spec, self.say = cache, spec, say
        self.family = key_of(_determined_by(spec))
        self._looks = key_of(_determined_by(None))  # a look is the same whatever the pictures are made ready for
        self._records: dict[_Key, _Record] = {}
        self._reasons: dict[str, str | None] = {}
        self._digests: dict[Path, str] = {}
        self._read: set[str] = set()
        self._held: dict[str, Entry] = {}
        self._checked: set[_Key] = set()
        self._refused = self._broken = False

    # ---- filling -------------------------------------------------------------------------------------------------

    def fill(
        self,
        paths: Sequence[Path],
        *,
        root: Path,
        working: bool = True,
        look: bool = False,
        check: bool = True,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> list[str | None]:
        """Decode what is not there yet; returns for each file why it does not decode, or None.

        Each file is decoded once, in a process with limits (see `isolate`), where what is kept of it is made, too.

        Args:
            root: what the files have in common; their hashes are remembered under it.
            working: keep working images too, which augmented views are cut from.
            look: keep looks too, which an audit needs (see `inspection`).
            check: where the cache has no room or cannot be written, decode the pictures all the same, to see whether
            they do. Without it the reasons may be incomplete.
        progress: called with (pictures done, pictures in all).
        """
        wanted = {"view": self._spec is not None, "working": self._spec is not None and working, "look": look}
        parts = tuple(part for part, is_wanted in wanted.items() if is_wanted)
        job = _Job(paths, parts, workers, progress)
        reasons: dict[int, str | None] = {}
        try:
            self._hash_files(job, root)
            missing = self._missing(job)
            if missing and not self._broken and self._has_room(job, missing):
                reasons = self._decode(job)
        except OSError as error:
            if not self._refused:
                self.say(f"Pixel store: {self.cache.folder} cannot be used ({error}); the run goes on without it.")
            self._refused = self._broken = True
        unknown = (
            [] if not check else [i for i in range(len(paths)) if i not in reasons and not self._decodes(paths[i])]
        )
        looked = bad_reasons([paths[i] for i in unknown], workers=workers, progress=job.shifted(unknown))
        reasons |= dict(zip(unknown, looked, strict=True))
        return [reasons.get(i, self._reasons.get(self._digests.get(path, ""))) for i, path in enumerate(paths)]

    def _hash_files(self, job: _Job, root: Path) -> None:
        """Files that this store has seen keep what they were then, however often they are asked for."""
        unseen = [path for path in job.paths if path not in self._digests]
        if not unseen:
            return
        hashes = FileHashes(self.cache, root)

        def of(path: Path) -> str | None:
            try:
                return hashes.of(path)
            except OSError:
                return None  # decoding it will say why

        found = map_threads(of, unseen, workers=job.workers)
        self._digests |= {path: digest for path, digest in zip(unseen, found, strict=True) if digest}
        hashes.save()

    def _is_known(self, path: Path, parts: Sequence[str]) -> bool:
        digest = self._digests.get(path, "")
        if parts and not self._lacking(digest, parts):
            return True
        return digest in self._reasons and (not parts or self._reasons[digest] is not None)

    def _lacking(self, digest: str, parts: Sequence[str]) -> list[str]:
        return [part for part in parts if (digest, part) not in self._records]

    def _decodes(self, path: Path) -> bool:
        """Whether something is known of the picture already: that it decodes, or why it does not."""
        digest = self._digests.get(path, "")
        return digest in self._reasons or bool(set(intake.PARTS) - set(self._lacking(digest, intake.PARTS)))

    def _missing(self, job: _Job) -> list[int]:
        """Which pictures are not in the store as it stands now; the shards of those that are in it are held."""
        for name in (name for family in {self.family, self._looks} for name in self.cache.names("pixels", family)):
            if name not in self._read:
                self._read.add(name)
                self._index(name, self.cache.describe("pixels", name))
        for digest in {self._digests[path] for path in job.paths if path in self._digests}:
            for part in job.parts:
                record = self._records.get((digest, part))
                if record is not None and record.shard not in self._held:
                    self._hold(record.shard)
        return [i for i, path in enumerate(job.paths) if not self._is_known(path, job.parts)]

    def _index(self, name: str, meta: dict[str, Any] | None) -> None:
        # Made under a higher cap, it may hold pictures that are refused now.
        if meta is None or meta.get("max_pixels", decode.MAX_PIXELS) > decode.MAX_PIXELS:
            return
        self._reasons |= {digest: why for digest, why in meta["reasons"].items() if not _is_of_another_cap(why)}
        for digest, part, offset, shape, crc in meta["records"]:
            self._records[digest, part] = _Record(name, offset, tuple(shape), crc)

    def _hold(self, name: str) -> None:
        entry = self.cache.open("pixels", name)
        if entry is not None:
            self._held[name] = entry
        else:  # evicted meanwhile
            self._records = {key: record for key, record in self._records.items() if record.shard != name}

    def _has_room(self, job: _Job, missing: Sequence[int]) -> bool:
        if not job.parts:
            return True
        sizes = {"look": LOOK_BYTES}
        if self._spec is not None:
            view = picture_bytes(self._spec, working=False)
            sizes |= {"view": view, "working": picture_bytes(self._spec, working=True) - view}
        digests = (self._digests.get(job.paths[i], "") for i in missing)
        needed = sum(sizes[part] for digest in digests for part in self._lacking(digest, job.parts))
        what = f"Pixel store: {len(missing):,} pictures to decode, about {file_size(needed)}"
        if self.cache.make_room(needed):
            self.say(f"{what} in {self.cache.folder}.")
            return True
        if not self._refused:  # of all pictures; that there is none for those of one split is no news then
            room = file_size(self.cache.room())
            self.say(
                f"{what}, but {self.cache.folder} has room for {room} (HEADSTART_CACHE_LIMIT, free disk): the run goes"
                " on without it and decodes pictures whenever it needs them."
            )
        self._refused = True
        return False

    def _decode(self, job: _Job) -> dict[int, str | None]:
        """Decode and keep what is missing; one process at a time, so that nothing is decoded twice."""

        def waiting() -> None:
            self.say("Pixel store: another process is filling it; waiting for that.")

        with self.cache.lock(self.family, waiting=waiting):
            missing = self._missing(job)
            shards = _Shards(self.cache, self.family, self._hold)
            looks = _Shards(self.cache, self._looks, self._hold, ahead=SHARD_BYTES // 256)
            try:
                reasons = self._make(job, missing, shards, looks)
            finally:  # after an interrupt, too: what has been decoded is kept
                shards.publish()
                looks.publish()
        if shards.is_full or looks.is_full:
            self.say("Pixel store: no more room; the other pictures are decoded whenever they are needed.")
        self._missing(job)
        return reasons

    def _make(self, job: _Job, missing: Sequence[int], shards: _Shards, looks: _Shards) -> dict[int, str | None]:
        """Decode the missing pictures and keep what is not there yet; why each does not decode.

        That is kept, too, where its bytes decide it.
        """
        paths = [job.paths[i] for i in missing]
        lacking = {part for path in paths for part in self._lacking(self._digests.get(path, ""), job.parts)}
        parts = [part for part in job.parts if part in lacking]

        def take(position: int, made: Made) -> None:
            if not made.digest:  # a limit was in the way, or no bytes could be read
                return
            if made.reason or not job.parts:
                shards.add_reason(made.digest, made.reason)
            else:
                finished = self._finished(made.parts)
                new = {part: finished[part] for part in self._lacking(made.digest, list(finished))}
                look = {part: new.pop(part) for part in ("look",) if part in new}
                looks.add(made.digest, look)
                shards.add(made.digest, new)
            self._digests[paths[position]] = made.digest  # of what was decoded, if the file has changed since

        reasons = intake.make(
            paths, parts, self._spec, workers=job.workers or available_cores(), take=take,
            progress=job.shifted(missing),
        )  # fmt: skip
        return dict(zip(missing, reasons, strict=True))

    def _finished(self, parts: dict[str, PixelArray]) -> dict[str, PixelArray]:
        if FULL not in parts or self._spec is None:
            return parts
        rest = {name: pixels for name, pixels in parts.items() if name != FULL}
        return rest | {"working": working_image_of(parts[FULL], self._spec)}

    def contents(self, paths: Sequence[Path]) -> list[str] | None:
        """The hashes of the files as they were when the store was filled; None where one of them is not known."""
        found = [self._digests.get(path) for path in paths]
        return None if None in found else [digest for digest in found if digest]

    # ---- reading -------------------------------------------------------------------------------------------------

    def view(self, path: Path) -> Tensor | None:
        """The evaluation view, uint8 [3, S, S], as the file was when the store was filled; None if it is not here."""
        pixels = self._pixels(path, "view")
        return None if pixels is None else torch.from_numpy(pixels)

    def working(self, path: Path) -> PixelArray | None:
        """The working image, uint8 [h, w, 3], likewise."""
        return self._pixels(path, "working")

    def look(self, path: Path) -> Look | None:
        """What an audit measures of the picture, likewise."""
        data = self._pixels(path, "look")
        return None if data is None else unpack(data)

    def is_unchanged(self, paths: Sequence[Path], *, root: Path) -> bool:
        """Whether the files of which no look is here hold what they held when the store was filled."""
        hashes = FileHashes(self.cache, root)
        try:
            return all(
                hashes.of(path) == self._digests.get(path)
                for path in paths
                if (self._digests.get(path, ""), "look") not in self._records
            )
        except OSError:
            return False

    def picture(self, path: Path) -> Image.Image:
        """The picture decoded from its file, which must hold what it held when the store was filled.

        Raises:
            DataError: the file cannot be read, or has changed; the message names it.
        """
        digest = self._digests.get(path)
        if digest is None:
            return open_image(path)
        try:
            data = file_bytes(path)
            if content_hash(data) == digest:
                return picture_of(data)
        except DataError as error:
            raise DataError(f"Picture {path}: {error}.") from None
        raise DataError(
            f"Picture {path} has changed while this run was reading it: it holds other bytes than at the start. Leave"
            " the pictures alone until the run has ended, and run the command again."
        )

    def _pixels(self, path: Path, part: str) -> PixelArray | None:
        key = (self._digests.get(path, ""), part)
        record = self._records.get(key)
        entry = None if record is None else self._held.get(record.shard)
        if record is None or entry is None:
            return None
        pixels = np.array(entry.data[record.offset : record.offset + math.prod(record.shape)])
        if key not in self._checked:
            if zlib.crc32(pixels.data) != record.crc:  # the disk gives other bytes than were written: decode it again
                self._records.pop(key, None)  # another thread may have found it too
                drop(entry.path)
                return None
            self._checked.add(key)
        return pixels.reshape(record.shape)


@dataclass(frozen=True)
class _Job:
    """One call of `fill`."""

    paths: Sequence[Path]
    parts: Sequence[str]
    workers: int
    progress: Progress | None

    def shifted(self, todo: Sequence[int]) -> Progress | None:
        """Progress of the pictures `todo`, told as progress of all."""
        tell, before, total = self.progress, len(self.paths) - len(todo), len(self.paths)
        return None if tell is None else lambda done, _: tell(before + done, total)


@dataclass
class _Shards:
    """Shards on their way to the disk; any thread may add to them. Room is made as they grow.

    hold: is given the name of each as soon as it has appeared. ahead: bytes that room is made for at once.
    """

    cache: Cache
    family: str
    hold: Callable[[str], None]
    ahead: int = SHARD_BYTES // 16
    is_full: bool = False
    _room: int = 0
    _writer: EntryWriter | None = None
    _records: list[tuple[str, str, int, tuple[int, ...], int]] = field(default_factory=list)
    _reasons: dict[str, str | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, digest: str, parts: dict[str, PixelArray]) -> None:
        if not parts:
            return
        rows = [
            (part, pixels.shape, data := np.ascontiguousarray(pixels).reshape(-1).data, zlib.crc32(data))
            for part, pixels in parts.items()
        ]
        nbytes = sum(len(data) for _, _, data, _ in rows)
        with self._lock:
            try:
                self.is_full = self.is_full or not self._has_room(nbytes)
                if self.is_full:
                    return
                for part, shape, data, crc in rows:
                    self._records.append((digest, part, self._open().append(data), shape, crc))
            except OSError:
                self.is_full = True
                return
            self._room -= nbytes
            if self._open().nbytes >= SHARD_BYTES:
                self._publish()

    def add_reason(self, digest: str, reason: str | None) -> None:
        with self._lock:
            self._reasons[digest] = reason

    def publish(self) -> None:
        """Let what has been added so far appear."""
        with self._lock:
            if self._records or self._reasons:
                self._publish()

    def _has_room(self, nbytes: int) -> bool:
        if nbytes > self._room:  # for more than this picture at once, since it takes a look at the whole cache
            more = (max(nbytes, self.ahead), nbytes)
            self._room = next((size for size in more if self.cache.make_room(size)), 0)
        return nbytes <= self._room

    def _open(self) -> EntryWriter:
        if self._writer is None:
            self._writer = self.cache.write("pixels", f"{self.family}-{secrets.token_hex(8)}")
        return self._writer

    def _publish(self) -> None:
        writer = self._open()
        try:
            facts = {"records": self._records, "reasons": self._reasons, "max_pixels": decode.MAX_PIXELS}
            writer.publish(facts)
        finally:
            writer.discard()
            self._writer, self._records, self._reasons = None, [], {}
        self.hold(writer.target.stem)


def picture_bytes(spec: DataSpec, *, working: bool) -> int:
    """What a picture takes in the store, for one of the usual 4:3 and large enough to be shrunk."""
    view = 3 * spec.image_size**2
    return view + 3 * math.prod(working_size(4000, 3000, spec)) if working else view


def _is_of_another_cap(reason: str | None) -> bool:
    """Whether a picture was refused for its size, by a cap that is not the one of now."""
    return reason is not None and decode.PIXELS_VARIABLE in reason and f" {decode.MAX_PIXELS:,} pixels" not in reason


def _determined_by(spec: DataSpec | None) -> dict[str, Any]:
    """Everything that decides the pixels, besides the file."""
    values = spec.to_dict() if spec else {}
    values.pop("std", None)
    if spec and spec.fit != "letterbox":
        del values["mean"]  # it pads letterboxes and does nothing else
    if spec and spec.fit != "crop":
        del values["crop_pct"]
    libraries = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")}
    libraries |= {"pillow": PIL.__version__, "torch": torch.__version__, "decoder": decoder_version()}
    return values | {
        **libraries,
        "code": code_hash("dataspec", "decode", "inspection", "intake", "portable", "transforms"),
    }
