"""Throw mutated files at what reads files of strangers, and say what became of them.

    python tools/soak.py pictures --n 10000      # make soak
    python tools/soak.py models --n 20000

Pictures go through the check that runs before every training (`headstart.isolate`), and those it lets pass through the
decoder of this process, as in training. Model files go through the readers of weights and run folders. File i is a pure
function of (seed, i); the digest at the end is that of all verdicts, so two runs can be compared. Exit code 1 when a
reader raised anything but its own error, let a file pass that it must refuse, or refused one that it must not.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

BATCH = 500  # files on the disk at a time
MUST, MUST_NOT, MAY = "must be refused", "must pass", "may do either"
MAGIC = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x24\0\0\0WEBPVP8 ", b"BM", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass
class Outcome:
    """What a soak found. failures: one line for each file that was not treated as it must be."""

    files: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    by_kind: Counter[tuple[str, bool]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    digest: str = ""

    def take(self, kind: str, expected: str, name: str, reason: str | None) -> None:
        """Count one verdict and compare it with what is expected."""
        self.files += 1
        self.refused += reason is not None
        self.by_kind[kind, reason is not None] += 1
        if reason is not None:
            self.reasons[reason.partition("(")[0].partition(":")[0].strip()[:60]] += 1
        if (expected == MUST and reason is None) or (expected == MUST_NOT and reason is not None):
            self.failures.append(f"{name}: {kind}: {expected}, but: {reason or 'it passed'}")


# ---- pictures --------------------------------------------------------------------------------------------------


def seed_pictures() -> list[tuple[str, bytes]]:
    """(extension, bytes) of small pictures of every format, mode and container that the decoder takes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = np.clip(np.cumsum(rng.normal(0, 12, (60, 80, 3)), axis=1) + 128, 0, 255).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    grey16 = Image.fromarray(rng.integers(0, 65535, (30, 40)).astype(np.uint16))
    frames = [Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)) for _ in range(6)]
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = {"save_all": True, "append_images": frames[1:]}
    plans: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("jpg", rgb, "JPEG", {"exif": exif}),
        ("jpg", rgb, "JPEG", {"progressive": True, "quality": 95}),
        ("jpg", rgb.convert("CMYK"), "JPEG", {}),
        ("jpg", rgb.convert("L"), "JPEG", {"restart_marker_blocks": 4}),
        ("png", rgb, "PNG", {}),
        ("png", rgb.convert("RGBA"), "PNG", {"exif": exif}),
        ("png", rgb.convert("P"), "PNG", {"transparency": 3}),
        ("png", grey16, "PNG", {}),
        ("png", frames[0], "PNG", animated),
        ("webp", rgb, "WEBP", {"quality": 60}),
        ("webp", rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        ("webp", frames[0], "WEBP", animated),
        ("gif", frames[0], "GIF", animated),
        ("bmp", rgb.resize((20, 15)), "BMP", {}),
        ("tif", rgb, "TIFF", {}),
        *(("tif", rgb, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        ("tif", grey16, "TIFF", {"compression": "tiff_lzw"}),
        ("tif", frames[0], "TIFF", animated),
    ]
    made = []
    for extension, image, form, options in plans:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made.append((extension, buffer.getvalue()))
    return made + real_pictures()


def real_pictures() -> list[tuple[str, bytes]]:
    """A few small real JPEGs, where they are present."""
    folder = Path(os.environ.get("HEADSTART_SHARED", "nowhere")) / "data"
    found = [path for path in sorted(folder.glob("*/train/*/*.jpg"))[::400] if path.stat().st_size < 40_000]
    return [("jpg", path.read_bytes()) for path in found[:10]]


def many_frames(draw: random.Random) -> bytes:
    """An animation of 2,000 to 10,000 frames, its first one whole."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "GIF")
    data = buffer.getvalue()
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    head, frame = data[:at], data[at:-1]
    return head + frame * draw.randint(2_000, 10_000) + b";"


def giant(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The picture with a header that promises far more pixels than the cap allows."""
    from PIL import Image

    side = draw.choice((60_000, 65_000))
    if data[:4] == b"\x89PNG":
        import zlib

        header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:], MUST
    if data[:2] == b"\xff\xd8":
        at = next((i for i in range(2, len(data) - 9) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2)), -1)
        if at > 0:
            return data[: at + 5] + struct.pack(">HH", side, side) + data[at + 9 :], MUST
    if data[:3] == b"GIF":
        return data[:6] + struct.pack("<HH", side, side) + data[10:], MUST
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", side, side) + data[26:], MUST
    if data[8:16] == b"WEBPVP8X":
        return data[:24] + (16_000_000).to_bytes(3, "little") + (255).to_bytes(3, "little") + data[30:], MUST
    buffer = io.BytesIO()
    Image.new("1", (8193 + draw.randint(0, 500), 8192)).save(buffer, "PNG")  # whole, and still above the cap
    return buffer.getvalue(), MUST


def flipped(data: bytes, draw: random.Random) -> bytes:
    """1 to 64 bits turned over, half of the times within the first 200 bytes."""
    changed = bytearray(data)
    reach = min(len(data), 200) if draw.random() < 0.5 else len(data)
    for _ in range(draw.choice((1, 2, 4, 16, 64))):
        changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def spliced(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: draw.randrange(1, len(data))] + other[draw.randrange(len(other)) :]


def foreign(draw: random.Random) -> bytes:
    """No picture at all under a picture's name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    page, program = b"<!DOCTYPE html><html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"
    others = (b"P6 2 2 255 " + bytes(12), b"8BPS\0\1" + bytes(100), b"%PDF-1.7\n", b"SIMPLE  =                    T")
    return draw.choice((b"", page, program, *others, bytes(500), buffer.getvalue(), draw.randbytes(300)))


def mutated_picture(seeds: list[tuple[str, bytes]], seed: int, index: int) -> tuple[str, str, str, bytes]:
    """Kind, what is expected, extension and bytes of picture `index`."""
    draw = random.Random(f"{seed} {index}")
    extension, data = draw.choice(seeds)
    kind = draw.choice(
        ("bits", "bits", "cut", "splice", "giant header", "frames", "name", "foreign", "page", "magic", "exif", "tail")
    )
    if kind == "bits":
        return kind, MAY, extension, flipped(data, draw)
    if kind == "cut":
        return kind, MAY, extension, data[: draw.randrange(len(data))]
    if kind == "splice":
        return kind, MAY, extension, spliced(data, draw.choice(seeds)[1], draw)
    if kind == "giant header":
        changed, expected = giant(data, draw)
        return kind, expected, extension, changed
    if kind == "frames":
        return kind, MUST_NOT, "gif", many_frames(draw)
    if kind == "name":
        return kind, MUST_NOT, draw.choice(("jpg", "png", "gif", "bmp", "tif", "webp")), data
    if kind == "foreign":
        return kind, MUST, extension, foreign(draw)
    if kind == "page":
        at = draw.randrange(len(data))
        return kind, MAY, extension, data[:at] + b"\0" * min(512, len(data) - at) + data[at + 512 :]
    if kind == "magic":
        return kind, MAY, extension, draw.choice(MAGIC) + draw.randbytes(draw.randrange(2000))
    if kind == "exif" and data[:2] == b"\xff\xd8":
        block = b"Exif\0\0" + draw.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"")) + draw.randbytes(200)
        return kind, MUST_NOT, extension, data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    return "tail", MUST_NOT, extension, data + draw.randbytes(draw.randrange(1, 500))


def soak_pictures(n: int, *, seed: int = 0, workers: int = 2, tell: Callable[[int], None] | None = None) -> Outcome:
    """Check `n` mutated pictures and decode here what passes."""
    from headstart.crews import bad_reasons
    from headstart.decode import open_image
    from headstart.errors import DataError

    seeds, outcome, digest = seed_pictures(), Outcome(), hashlib.sha256()
    for start in range(0, n, BATCH):
        with tempfile.TemporaryDirectory(prefix="headstart-soak-") as folder:
            files = []
            for index in range(start, min(start + BATCH, n)):
                kind, expected, extension, data = mutated_picture(seeds, seed, index)
                path = Path(folder) / f"{index}.{extension}"
                path.write_bytes(data)
                files.append((kind, expected, path))
            ticks = [time.perf_counter()]
            reasons = bad_reasons(
                [path for _, _, path in files],
                workers=workers,
                progress=lambda *_, t=ticks: t.append(time.perf_counter()),
            )
            pauses = [after - before for before, after in pairwise(ticks)]
            outcome.slowest_seconds = max(outcome.slowest_seconds, *pauses)
            for (kind, expected, path), reason in zip(files, reasons, strict=True):
                outcome.take(kind, expected, path.name, reason)
                digest.update(b"1" if reason else b"0")
                if reason is None:
                    try:
                        open_image(path)
                    except DataError as error:
                        outcome.failures.append(f"{path.name}: {kind}: passed the check, but not here: {error}")
        if tell:
            tell(outcome.files)
    outcome.digest = digest.hexdigest()
    return outcome


# ---- model files -----------------------------------------------------------------------------------------------


def seed_models(folder: Path) -> list[tuple[str, bytes]]:
    """(file name, bytes) of what `save` and `torch.save` write."""
    import torch

    import headstart

    headstart.save(headstart.create_classifier("test_resnet", ("no", "yes"), weights="none"), folder)
    small = {f"layer{i}.weight": torch.zeros(3, 4) for i in range(4)}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(small, new)
    torch.save(small, old, _use_new_zipfile_serialization=False)
    from safetensors.torch import save

    return [
        ("model.json", (folder / "model.json").read_bytes()),
        ("weights.safetensors", save(small)),
        ("weights.safetensors", save(small | {"count": torch.tensor(3), "half": torch.zeros(2, dtype=torch.bfloat16)})),
        ("new.pth", new.getvalue()),
        ("old.pth", old.getvalue()),
    ]


def mutated_model(seeds: list[tuple[str, bytes]], seed: int, index: int) -> tuple[str, str, bytes]:
    """Kind, file name and bytes of model file `index`."""
    draw = random.Random(f"{seed} {index}")
    name, data = draw.choice(seeds)
    kind = draw.choice(("bits", "cut", "splice", "page", "length", "numbers", "tail", "renamed"))
    if kind == "bits":
        return kind, name, flipped(data, draw)
    if kind == "cut":
        return kind, name, data[: draw.randrange(len(data))]
    if kind == "splice":
        return kind, name, spliced(data, draw.choice(seeds)[1], draw)
    if kind == "page":
        at = draw.randrange(len(data))
        return kind, name, data[:at] + draw.randbytes(16) + data[at + 16 :]
    if kind == "length":
        return (
            kind,
            name,
            struct.pack("<Q", draw.choice((0, 1, 2**20, 2**40, 2**64 - 1, draw.getrandbits(64)))) + data[8:],
        )
    if kind == "numbers":  # every digit may become another: shapes, offsets, versions
        digits = b"0123456789"
        return kind, name, bytes(draw.choice(digits) if b in digits and draw.random() < 0.1 else b for b in data)
    if kind == "tail":
        return kind, name, data + draw.randbytes(draw.randrange(1, 100))
    return kind, draw.choice(seeds)[0], data


def soak_models(n: int, *, seed: int = 0, tell: Callable[[int], None] | None = None) -> Outcome:
    """Read `n` mutated model files; only the readers' own errors are allowed."""
    from headstart.checkpoint import read_card
    from headstart.errors import CheckpointError
    from headstart.weights import read_weights

    outcome, digest = Outcome(), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="headstart-soak-") as made:
        seeds = seed_models(Path(made) / "run")
        for index in range(n):
            kind, name, data = mutated_model(seeds, seed, index)
            path = Path(made) / name
            path.write_bytes(data)
            reason, started = None, time.perf_counter()
            try:
                if name == "model.json":
                    read_card(Path(made))
                else:
                    read_weights(path)
            except CheckpointError as error:
                reason = str(error).partition(made)[2].partition(": ")[2] or str(error)
                if name not in str(error):
                    outcome.failures.append(f"{index}: {kind}: the error does not name the file: {error}")
            except Exception as error:  # what a soak is looking for
                reason = f"{type(error).__name__}: {error}"
                outcome.failures.append(f"{index} {name}: {kind}: {reason}")
            outcome.slowest_seconds = max(outcome.slowest_seconds, time.perf_counter() - started)
            outcome.take(f"{kind} {path.suffix}", MAY, name, reason)
            digest.update(b"1" if reason else b"0")
            if tell and index % 1000 == 999:
                tell(index + 1)
    outcome.digest = digest.hexdigest()
    return outcome


def peaks() -> tuple[int, int]:
    """Peak memory in MB of this process, and of its largest child (never less than this one's at its start)."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, theirs = (resource.getrusage(kind).ru_maxrss >> 10 for kind in kinds)
    return own, theirs


# ---- the command -----------------------------------------------------------------------------------------------


def report(outcome: Outcome, seconds: float) -> Iterator[str]:
    """The lines that are printed."""
    own, theirs = peaks()
    yield f"{outcome.files:,} files in {seconds:.0f} s: {outcome.refused:,} refused by name, the others pass"
    yield f"longest pause {outcome.slowest_seconds:.2f} s; peak memory {own} MB here, at most {theirs} MB in a worker"
    for kind in sorted({kind for kind, _ in outcome.by_kind}):
        refused, passed = outcome.by_kind[kind, True], outcome.by_kind[kind, False]
        yield f"  {kind:<24}{refused:>8,} refused{passed:>8,} passed"
    for reason, count in outcome.reasons.most_common(12):
        yield f"  {count:>8,}  {reason}"
    yield f"digest {outcome.digest}"
    yield f"{len(outcome.failures)} failures"
    yield from outcome.failures[:50]


def main() -> int:
    """Parse, soak, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("pictures", "models"))
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the figures to this JSONL file")
    args = parser.parse_args()
    started = time.perf_counter()

    def tell(done: int) -> None:
        print(f"  {done:,} of {args.n:,}", end="\r", file=sys.stderr, flush=True)

    soak = soak_pictures if args.what == "pictures" else soak_models
    outcome = soak(args.n, seed=args.seed, tell=tell)
    seconds = time.perf_counter() - started
    print("\n".join(report(outcome, seconds)))
    if args.json:
        row = {
            **{"what": args.what, "n": args.n, "seed": args.seed, "seconds": round(seconds, 1)},
            **{"refused": outcome.refused, "failures": len(outcome.failures), "digest": outcome.digest},
            **{"longest_pause": round(outcome.slowest_seconds, 2), "peak_mb": peaks()[0], "peak_mb_worker": peaks()[1]},
        }
        with Path(args.json).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
