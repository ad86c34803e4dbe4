"""`headstart cache`: what the cache folder holds, and emptying it."""

from __future__ import annotations

import argparse
from datetime import datetime

from . import terminal
from .errors import SetupError

KINDS = {
    "pixels": "decoded pictures",
    "features": "stored features",
    "audits": "looks at sets",
    "files": "hashes of files",
}
SETS = "sets"  # folders of files that runs name: the size limit does not touch them, and they are cleared by name only
SETS_TITLE = "sets of pictures"


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which part."""
    parser.add_argument("action", metavar="list|clear", choices=("list", "clear"), help="show it, or empty it")
    parser.add_argument(
        "--kind", choices=(*KINDS, SETS), help="this part alone; `clear` without it leaves the sets of pictures"
    )


def run_cache(args: argparse.Namespace) -> int:
    """Print what is there, or what was removed; returns the exit code.

    Raises:
        SetupError: a file stands where the cache folder is to be.
    """
    from .prepared import folder_bytes, prepared_folders, remove_prepared
    from .store import KINDS as ALL
    from .store import Cache

    cache = Cache()
    nearest = next((path for path in (cache.folder, *cache.folder.parents) if path.exists()), None)
    if nearest and not nearest.is_dir():
        raise SetupError(
            f"The cache folder is {cache.folder}, but {nearest} is a file. Let HEADSTART_CACHE name a folder."
        )
    kinds = tuple(kind for kind in ALL if args.kind in (None, kind))
    sets = prepared_folders() if args.kind in (None, SETS) else []
    in_sets = sum(map(folder_bytes, sets))
    if args.action == "clear":
        removed, kept = cache.clear(kinds)
        if args.kind == SETS:
            for folder in sets:
                nbytes = folder_bytes(folder)
                gone = remove_prepared(folder)
                removed, kept = removed + nbytes * gone, kept + (not gone)
        stay = "1 entry is in use and stays" if kept == 1 else f"{kept:,} entries are in use and stay"
        in_use = f"; {stay}" if kept else ""
        print(f"{terminal.file_size(removed)} removed from {cache.folder}{in_use}.")
        others = prepared_folders(ours=False) if args.kind == SETS else []
        if others:
            names = terminal.printable(", ".join(sorted(path.name for path in others)))
            print(f"Left alone in {others[0].parent}, since they are not headstart's: {names}")
        return 0
    entries = cache.entries()
    rows = []
    for kind in kinds:
        part = [entry for entry in entries if entry.kind == kind]
        last = datetime.fromtimestamp(part[-1].used).isoformat(" ", "minutes") if part else "-"
        size = terminal.file_size(sum(entry.nbytes for entry in part))
        rows.append([KINDS[kind], f"{len(part):,}", size, last])
    if args.kind in (None, SETS):
        last = datetime.fromtimestamp(sets[-1].stat().st_mtime).isoformat(" ", "minutes") if sets else "-"
        rows.append([SETS_TITLE, f"{len(sets):,}", terminal.file_size(in_sets), last])
    print(terminal.format_table(("kept", "entries", "size", "last used"), rows))
    total = terminal.file_size(sum(entry.nbytes for entry in entries))
    coming = cache.on_its_way()
    unfinished = f", {terminal.file_size(coming)} unfinished" if coming else ""
    limit = terminal.file_size(cache.limit_bytes)
    print(f"\n{total} of {limit} in {cache.folder}{unfinished}, sets of pictures not counted")
    return 0
