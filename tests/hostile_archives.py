"""Archives that must not be unpacked: each a name and a function that makes its bytes."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable

from PIL import Image

Member = tuple[str, bytes]


def picture(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """The bytes of a small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
GOOD: tuple[Member, ...] = tuple((f"{name}/{i}.png", picture((i, 0, 0))) for name in ("cat", "dog") for i in range(3))
BAD_NAMES = {
    "parent": "../evil.png",
    "parent inside": "cat/../../evil.png",
    "parent that stays inside": "cat/../dog/9.png",
    "parent alone": "..",
    "deep parents": "a/b/" + "../" * 12 + "tmp/evil.png",
    "absolute": "/tmp/evil.png",
    "two slashes": "//tmp/evil.png",
    "drive": "C:/evil.png",
    "drive without slash": "c:evil.png",
    "drive inside": "cat/D:/evil.png",
    "backslash": "cat\\evil.png",
    "backslash parent": "..\\..\\evil.png",
    "unc": "\\\\host\\share\\evil.png",
    "newline": "cat/e\nvil.png",
    "escape": "cat/\x1b[2Jevil.png",
    "device con": "cat/con.png",
    "device nul": "NUL",
    "device com1": "com1.png/evil.png",
    "device with a dot": "aux.",
    "dots": "cat/.../evil.png",
    "blank folder": "cat/ /evil.png",
    "long part": "cat/" + "x" * 256 + ".png",
    "long name": "/".join(["y" * 200] * 6) + "/evil.png",
    "deep": "z/" * 17 + "evil.png",
}
PAIRS = {
    "case of files": ("cat/A.png", "cat/a.png"),
    "case of folders": ("Cat/a.png", "cat/b.png"),
    "sharp s": ("cat/stra\u00dfe.png", "cat/STRASSE.png"),
    "composed and decomposed": ("caf\u00e9/a.png", "cafe\u0301/b.png"),
    "trailing dot": ("cat/a.png", "cat/a.png."),
    "trailing blank": ("cat/a.png", "cat /b.png"),
    "twice": ("cat/x.png", "cat/x.png"),
    "twice with a dot": ("cat/x.png", "./cat/x.png"),
    "file and folder": ("cat/x", "cat/x/evil.png"),
    "folder and file": ("cat/x/evil.png", "cat/x"),
}


# ---------------------------------------------------------------------------------------------------------------- zip


def zip_of(*members: Member | tuple[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that stands in it twice
        for name, data in (*GOOD, *members):
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_info(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def zip_link(target: str, *through: Member) -> bytes:
    return zip_of((zip_info("cat/link.png", stat.S_IFLNK | 0o777), target.encode()), *through)


def central(data: bytes, at: int, form: str, *values: int) -> bytes:
    """`data` with `values` packed in at offset `at` of the last entry of its table."""
    raw = bytearray(data)
    struct.pack_into(form, raw, raw.rfind(b"PK\1\2") + at, *values)
    return bytes(raw)


def local(data: bytes, at: int, form: str, *values: int) -> bytes:
    """The same in the local header of the last member."""
    raw = bytearray(data)
    struct.pack_into(form, raw, raw.rfind(b"PK\3\4") + at, *values)
    return bytes(raw)


def zip_with_nul() -> bytes:
    return zip_of(("cat/good.png?/../../evil", PICTURE)).replace(b"cat/good.png?", b"cat/good.png\0")


def zip_overlapping() -> bytes:
    """All entries of the table point to the same bytes, as in David Fifield's bombs."""
    one = zip_of(("cat/a.png", PICTURE), ("cat/b.png", PICTURE))
    raw = bytearray(one)
    first, second = raw.rfind(b"PK\1\2", 0, raw.rfind(b"PK\1\2")), raw.rfind(b"PK\1\2")
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    return bytes(raw)


def zip_quoted() -> bytes:
    """A sound archive, but for its first member, whose data hold the second one, header and all: Fifield's way.

    A stored block of deflate quotes the second header; behind it both members share one stream of compressed bytes.
    """
    shrink = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = shrink.compress(PICTURE) + shrink.flush()
    second = local_header(b"dog/b.png", PICTURE, len(stream))
    quote = struct.pack("<BHH", 0, len(second), len(second) ^ 0xFFFF) + second
    first = local_header(b"cat/a.png", second + PICTURE, len(quote) + len(stream))
    body = first + quote + stream
    entries = b"".join(
        b"PK\1\2" + struct.pack("<H", 20) + header[4:30] + bytes(10) + struct.pack("<L", offset) + header[30:]
        for header, offset in ((first, 0), (second, len(first) + 5))
    )
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 2, 2, len(entries), len(body), 0)
    return body + entries + end


def local_header(name: bytes, content: bytes, packed: int) -> bytes:
    fields = (20, 0, zipfile.ZIP_DEFLATED, 0, 0x21, zlib.crc32(content), packed, len(content), len(name), 0)
    return b"PK\3\4" + struct.pack("<HHHHHLLLHH", *fields) + name


def zip64_lie(size: int) -> bytes:
    """The last entry has its sizes in a zip64 field, and they are not true."""
    info = zipfile.ZipInfo("cat/big.png")
    info.extra = struct.pack("<HHQQ", 1, 16, size, size)
    return central(zip_of((info, PICTURE)), 20, "<LL", 0xFFFFFFFF, 0xFFFFFFFF)


def zip_bomb() -> bytes:
    return zip_of(("cat/zeros.png", bytes(80 << 20)), compression=zipfile.ZIP_DEFLATED)


def zip_many_bombs() -> bytes:
    return zip_of(*((f"cat/zeros{i}.png", bytes(9 << 20)) for i in range(8)), compression=zipfile.ZIP_DEFLATED)


def zip_in_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(16):  # as 42.zip does, which has more storeys
            archive.writestr(
                f"lib {i}.zip", zip_of(("cat/zeros.png", bytes(1 << 20)), compression=zipfile.ZIP_DEFLATED)
            )
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- tar


def tar_of(*members: Member | tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in (*GOOD, *members):
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_info(name: str, kind: bytes, target: str = "", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def tar_header(name: bytes, size: bytes, kind: bytes = b"0", body: bytes = b"") -> bytes:
    """A tar of the good members and one header written by hand; `size` is its field of 12 bytes."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:124] = b"0000644\0" + b"0000000\0" + b"0000000\0"
    head[124:136] = size.ljust(12, b"\0")
    head[136:148] = b"00000000000\0"
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    good = tar_of()
    end = good.rstrip(b"\0")
    padded = end + bytes(-len(end) % 512)
    return padded + bytes(head) + body + bytes(-len(body) % 512) + bytes(1024)


def octal(number: int) -> bytes:
    return f"{number:011o}\0".encode()


def tar_pax(**records: str) -> bytes:
    info = tarfile.TarInfo("cat/p.png")
    info.size = len(PICTURE)
    info.pax_headers = records
    return tar_of((info, PICTURE))


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 9)


def tar_link_chain() -> bytes:
    """Links that lead upwards step by step, then a file through them: CVE-2025-4517's way."""
    steps = [(tar_info(f"d{i}", tarfile.SYMTYPE, f"d{i - 1}/.." if i else "."), b"") for i in range(5)]
    return tar_of(*steps, ("d4/evil.png", PICTURE))


HOSTILE: dict[str, Callable[[], bytes]] = {
    **{f"zip name: {key}": (lambda n=name: zip_of((n, PICTURE))) for key, name in BAD_NAMES.items()},
    **{f"tar name: {key}": (lambda n=name: tar_of((n, PICTURE))) for key, name in BAD_NAMES.items()},
    **{f"zip pair: {key}": (lambda p=pair: zip_of(*((n, PICTURE) for n in p))) for key, pair in PAIRS.items()},
    **{f"tar pair: {key}": (lambda p=pair: tar_of(*((n, PICTURE) for n in p))) for key, pair in PAIRS.items()},
    "zip nul in a name": zip_with_nul,
    "zip link up": lambda: zip_link("../..", ("cat/link.png/evil.png", PICTURE)),
    "zip link to a file": lambda: zip_link("/etc/passwd"),
    "zip link inside": lambda: zip_link("0.png"),
    "zip device": lambda: zip_of((zip_info("cat/dev", stat.S_IFBLK | 0o666), b"")),
    "zip fifo": lambda: zip_of((zip_info("cat/fifo", stat.S_IFIFO | 0o666), b"")),
    "zip socket": lambda: zip_of((zip_info("cat/socket", stat.S_IFSOCK | 0o666), b"")),
    "zip folder with bytes": lambda: zip_of((zip_info("cat/sub/", stat.S_IFDIR | 0o755), b"payload")),
    "zip folder mode on a file": lambda: zip_of((zip_info("cat/f.png", stat.S_IFDIR | 0o755), PICTURE)),
    "zip encrypted": lambda: central(zip_of(("cat/a.png", PICTURE)), 8, "<H", 1),
    "zip strange method": lambda: central(zip_of(("cat/a.png", PICTURE)), 10, "<H", 99),
    "zip lzma": lambda: zip_of(("cat/a.png", PICTURE), compression=zipfile.ZIP_LZMA),
    "zip size too small": lambda: central(zip_of(("cat/a.png", PICTURE)), 24, "<L", 10),
    "zip size too large": lambda: central(zip_of(("cat/a.png", PICTURE)), 24, "<L", 4096),
    "zip size of 4 GB": lambda: central(zip_of(("cat/a.png", PICTURE)), 24, "<L", 0xFFFFFFF0),
    "zip64 size of 1 EB": lambda: zip64_lie(1 << 60),
    "zip64 size of -1": lambda: zip64_lie((1 << 64) - 1),
    "zip64 field missing": lambda: central(zip_of(("cat/a.png", PICTURE)), 20, "<LL", 0xFFFFFFFF, 0xFFFFFFFF),
    "zip wrong checksum": lambda: central(zip_of(("cat/a.png", PICTURE)), 16, "<L", 1),
    "zip other name inside": lambda: zip_of(("cat/in.png", PICTURE)).replace(b"cat/in.png", b"cat/ex.png", 1),
    "zip offset beyond": lambda: central(zip_of(("cat/a.png", PICTURE)), 42, "<L", 0x7FFFFFF0),
    "zip overlapping": zip_overlapping,
    "zip quoted headers": zip_quoted,
    "zip bomb": zip_bomb,
    "zip bomb in parts": zip_many_bombs,
    "zip in zip": zip_in_zip,
    "zip cut off": lambda: zip_of()[:-30],
    "zip cut in the middle": lambda: zip_of()[:200],
    "zip table lost": lambda: zip_of().replace(b"PK\1\2", b"PK\1\3"),
    "tar link up": lambda: tar_of((tar_info("up", tarfile.SYMTYPE, "../.."), b""), ("up/evil.png", PICTURE)),
    "tar link absolute": lambda: tar_of((tar_info("up", tarfile.SYMTYPE, "/tmp"), b""), ("up/evil.png", PICTURE)),
    "tar link inside": lambda: tar_of((tar_info("cat/l.png", tarfile.SYMTYPE, "0.png"), b"")),
    "tar link chain": tar_link_chain,
    "tar hard link out": lambda: tar_of((tar_info("cat/h.png", tarfile.LNKTYPE, "/etc/passwd"), b"")),
    "tar hard link inside": lambda: tar_of((tar_info("cat/h.png", tarfile.LNKTYPE, "cat/0.png"), b"")),
    "tar character device": lambda: tar_of((tar_info("cat/dev", tarfile.CHRTYPE, devmajor=1, devminor=5), b"")),
    "tar block device": lambda: tar_of((tar_info("cat/dev", tarfile.BLKTYPE, devmajor=8), b"")),
    "tar fifo": lambda: tar_of((tar_info("cat/fifo", tarfile.FIFOTYPE), b"")),
    "tar unknown type": lambda: tar_header(b"cat/odd.png", octal(0), b"Z"),
    "tar contiguous type": lambda: tar_header(b"cat/odd.png", octal(0), b"7"),
    "tar sparse": lambda: tar_pax(**{"GNU.sparse.map": "0,1,1073741824,1", "GNU.sparse.size": "1073741825"}),
    "tar pax path up": lambda: tar_pax(path="../evil.png"),
    "tar pax path absolute": lambda: tar_pax(path="/tmp/evil.png"),
    "tar pax size of 1 EB": lambda: tar_pax(size=str(1 << 60)),
    "tar pax size negative": lambda: tar_pax(size="-1024"),
    "tar long name up": lambda: tar_of(("../" * 60 + "evil.png", PICTURE), form=tarfile.GNU_FORMAT),
    "tar long name of 8 GB": lambda: tar_header(b"././@LongLink", octal(0o77777777777), b"L"),
    "tar pax header of 8 GB": lambda: tar_header(b"x", octal(0o77777777777), b"x"),
    "tar size of 8 GB": lambda: tar_header(b"cat/a.png", octal(0o77777777777)),
    "tar size negative": lambda: tar_header(b"cat/a.png", b"\xff" * 11 + b"\x00"),
    "tar long name of negative size": lambda: tar_header(b"././@LongLink", b"\xff" * 10 + b"\xfc\x00", b"L"),
    "tar size beyond the end": lambda: tar_header(b"cat/a.png", octal(100_000)),
    "tar cut off": lambda: tar_of().rstrip(b"\0"),
    "tar.gz bomb": lambda: gz(tar_of(("cat/zeros.png", bytes(80 << 20)))),
    "tar.gz bomb outside the pictures": lambda: gz(tar_of(("cat/zeros.txt", bytes(80 << 20)))),
    "tar.gz bomb behind the end": lambda: gz(tar_of() + bytes(8 << 20)),
    "tar.gz long name bomb": lambda: gz(tar_header(b"././@LongLink", octal(64 << 20), b"L", bytes(64 << 20))),
    "tar.gz cut off": lambda: gz(tar_of())[:-20],
    "tar.gz wrong checksum": lambda: gz(tar_of())[:-8] + bytes(8),
    "tar.gz of nothing": lambda: gz(b""),
    "gz of a picture": lambda: gz(PICTURE),
    "raw deflate": lambda: zlib.compress(tar_of()),
    "a web page": lambda: b"<!doctype html><title>404</title>" + bytes(600),
    "empty": lambda: b"",
}
