"""What the quick audit said of the very same pictures, kept in the cache folder: a second fit does not look again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata

from . import decode
from .audit_quick import QuickAudit
from .dataset import ImageTable
from .files import to_json
from .findings import AuditResult
from .store import Cache, code_hash, key_of

_ROOMS = (
    "audit_copies", "audit_files", "audit_quick", "dataset", "decode", "duplicates", "findings", "inspection",
    "metrics", "portable", "shortcuts",
)  # fmt: skip
_LIBRARIES = ("numpy", "pillow", "scipy")


def audit_key(table: ImageTable, contents: Sequence[str]) -> str:
    """A name for everything that decides what `quick_audit` says.

    Args:
        contents: hashes of the files, in the table's order.
    """
    return key_of(
        {
            "contents": hashlib.sha256("".join(contents).encode()).hexdigest(),
            "root": str(table.root),
            "names": table.relative_paths,
            "labels": table.labels.tolist(),
            "classes": table.class_names,
            "splits": table.split_names,
            "bad": [(str(path), reason) for path, reason in table.bad_files],
            "max_pixels": decode.MAX_PIXELS,
            "code": code_hash(*_ROOMS),
            "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        }
    )


def kept_audit(cache: Cache, key: str) -> tuple[AuditResult, tuple[str, ...]] | None:
    """The result and the names of the groups of copies, as `keep_audit` was given them; None where there are none."""
    entry = cache.open("audits", key)
    if entry is None:
        return None
    return AuditResult.from_dict(entry.meta["result"]), tuple(entry.meta["copies"])


def keep_audit(cache: Cache, key: str, quick: QuickAudit) -> None:
    """Keep both for the next run; a cache folder that cannot be written, or is full, keeps nothing."""
    kept = {"result": quick.result.to_dict(), "copies": quick.copies.names}
    with suppress(OSError):
        if not cache.make_room(len(to_json(kept))):
            return
        writer = cache.write("audits", key)
        try:
            writer.publish(kept)
        finally:
            writer.discard()
