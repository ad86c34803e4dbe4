"""`headstart audit`: its options, and how what it finds is printed and written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .cli_options import PHOTOS_HELP, Command, add_root_option
from .errors import DataError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write a page to look through and review, audit.json and sheets of thumbnails there",
    )
    parser.add_argument("--json", action="store_true", help="print what audit.json holds instead of the table")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per CPU core)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_root_option(parser)


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"--out is {args.out}, which is a file. Name a folder.")
    from .audit_page import write_page
    from .audit_sheet import findings_table, write_audit
    from .auditing import audit
    from .dataset import load_images

    options: dict[str, Any] = {"workers": args.workers} if args.workers is not None else {}
    table = load_images(args.photos, root=args.root, check=False)
    result = audit(table, progress=not args.quiet, **options)
    written = (write_audit(result, out), write_page(result, table.rows(), out)) if out is not None else None
    if args.json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
        return 0
    print(findings_table(result))
    if written is not None:
        print(f"\naudit   {written[0]}\npage    {written[1]}")
    return 0


AUDIT = Command(
    "look at the pictures before training: broken files, copies, leaks, shortcuts", "PHOTOS [options]", _options, _run
)
