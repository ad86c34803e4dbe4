"""`headstart cache`: what the cache folder holds, and emptying it."""

from __future__ import annotations

import argparse
from datetime import datetime

from . import terminal

KINDS = {"pixels": "decoded pictures", "features": "stored features", "files": "hashes of files"}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which part."""
    parser.add_argument("action", metavar="list|clear", choices=("list", "clear"), help="show it, or empty it")
    parser.add_argument("--kind", choices=tuple(KINDS), help="clear this part alone")


def run_cache(args: argparse.Namespace) -> int:
    """Print what is there, or what was removed; returns the exit code."""
    from .store import KINDS as ALL
    from .store import Cache

    cache = Cache()
    if args.action == "clear":
        removed, kept = cache.clear((args.kind,) if args.kind else ALL)
        in_use = f"; {kept:,} entries are in use and stay" if kept else ""
        print(f"{terminal.file_size(removed)} removed from {cache.folder}{in_use}.")
        return 0
    entries = cache.entries()
    rows = []
    for kind in (args.kind,) if args.kind else ALL:
        part = [entry for entry in entries if entry.kind == kind]
        last = datetime.fromtimestamp(part[-1].used).isoformat(" ", "minutes") if part else "-"
        size = terminal.file_size(sum(entry.nbytes for entry in part))
        rows.append([KINDS[kind], f"{len(part):,}", size, last])
    print(terminal.format_table(("kept", "entries", "size", "last used"), rows))
    total = terminal.file_size(sum(entry.nbytes for entry in entries))
    print(f"\n{total} of {terminal.file_size(cache.limit_bytes)} in {cache.folder}")
    return 0
