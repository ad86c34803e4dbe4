"""`headstart audit`: its options, and how what it finds is printed and written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import terminal
from .cli_options import (
    PHOTOS_HELP,
    Command,
    add_cache_option,
    add_machine_options,
    add_picture_options,
    add_quiet_option,
    add_root_option,
    given,
)
from .cli_overrides import picture_overrides
from .errors import DataError, RecipeError
from .files import check_target
from .recipe import DEFAULT_BACKBONE
from .run import check_own_folder, refuse_among_pictures
from .run_record import is_run
from .terminal import printable


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write a page to look through and review, audit.json and sheets of thumbnails there",
    )
    parser.add_argument(
        "--write-clean",
        metavar="FILE",
        help="write a CSV manifest that follows the findings; fit takes it as PHOTOS, the pictures stay as they are",
    )
    parser.add_argument("--json", action="store_true", help="print what audit.json holds instead of the table")
    add_cache_option(parser)
    add_quiet_option(parser)
    add_root_option(parser)
    group = parser.add_argument_group("backbone", "With the options of a fit, doubtful labels are those that it tells.")
    group.add_argument(
        "--fast", action="store_true", help="no backbone: leave out doubtful labels and outliers, which need one"
    )
    group.add_argument("--backbone", metavar="NAME", help=f"whose features are looked at (default: {DEFAULT_BACKBONE})")
    group.add_argument("--weights", metavar="WHICH", help="hub, a weights file, or an earlier run (default: hub)")
    add_picture_options(parser)
    add_machine_options(parser)


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"--out is {args.out}, which is a file. Name a folder.")
    if out is not None:
        _check_out(out, args.photos)
    overrides = picture_overrides(vars(args))
    machine = given(args, "device", "precision", "cache")
    idle = [*given(args, "backbone", "weights"), *overrides, *machine] if args.fast else []
    if idle:
        flags = ", ".join("--" + ("no-cache" if name == "cache" else name.replace("_", "-")) for name in idle)
        raise RecipeError(f"--fast looks without a backbone, so {flags} would change nothing. Leave one of them out.")
    clean = _clean_path(args.write_clean, args.photos)
    from .audit_page import write_page
    from .audit_sheet import findings_text, write_audit
    from .auditing import audit
    from .clean import clean_rows, counts_of
    from .dataset import load_images
    from .manifest import write_manifest

    options: dict[str, Any] = {**given(args, "workers"), **machine}
    if not args.fast:
        options |= {"backbone": args.backbone or DEFAULT_BACKBONE, "weights": args.weights or "hub"}
        options |= {"spec_overrides": overrides}
    table = load_images(args.photos, root=args.root, check=False)
    result = audit(table, progress=not args.quiet, **options)
    if clean is not None:
        rows = clean_rows(table, result)
        write_manifest(rows, clean)
    written = (write_audit(result, out), write_page(result, table.rows(dropped=True), out)) if out is not None else None
    if args.json:
        print(terminal.as_json(result.to_dict()))
        return 0
    print(printable(findings_text(result)))
    if written is not None:
        print(f"\naudit   {written[0]}\npage    {written[1]}")
    if clean is not None:
        print("\nclean   " + ", ".join(f"{n:,} {word}" for word, n in counts_of(rows).items()) + f": {clean}")
    return 0


def _check_out(out: Path, photos: str) -> None:
    """Refuse a folder among the pictures, and one that holds something else than an earlier audit.

    What lies beside an earlier audit stays.
    """
    refuse_among_pictures(out, photos)
    is_earlier = out.is_dir() and not is_run(out) and _is_audit(out / "audit.json")
    files = [entry.name for entry in out.iterdir()] if is_earlier else []
    check_own_folder(out, files, "an earlier audit", overwrite=True)


def _is_audit(path: Path) -> bool:
    from .findings import read_audit

    try:
        read_audit(path)
    except Exception:  # none there, or whatever somebody has called audit.json
        return False
    return True


def _clean_path(text: str | None, photos: str) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix.lower() != ".csv" or not path.absolute().parent.is_dir():
        raise DataError(f"--write-clean is {text}; it takes a .csv file in a folder that is there.")
    if path.exists() and Path(photos).exists() and path.samefile(photos):
        raise DataError(f"--write-clean is {text}, the manifest that is read, which stays as it is. Name another.")
    check_target(path)
    return path


AUDIT = Command(
    "look at the pictures before training: broken files, copies, leaks, shortcuts, doubtful labels",
    "PHOTOS [options]",
    _options,
    _run,
)
