"""`headstart evaluate --transforms`: what each change of an augmentation costs the model on pictures with labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import terminal
from .cli_options import given
from .cli_overrides import read_augment
from .errors import RecipeError
from .recipe import POLICIES


def add_transforms_option(parser: argparse.ArgumentParser) -> None:
    """`--transforms`, with or without a policy."""
    parser.add_argument(
        "--transforms",
        nargs="?",
        const="",
        metavar="POLICY",
        help="instead of the figures, accuracy under each change of the run's augmentation, or of a policy or file",
    )


def run_transforms(args: argparse.Namespace) -> int:
    """Try the changes, print the table; returns the exit code."""
    for option, value in (("--tta", args.tta), ("--out", args.out), ("--overwrite", args.overwrite)):
        if value is not None:
            raise RecipeError(f"{option} goes with the figures; --transforms only prints what each change costs.")
    policy = read_augment(args.transforms, "--transforms") if args.transforms else None
    from . import asking

    rows = asking.check_transforms(
        args.model,
        args.folder,
        augment=POLICIES[policy] if isinstance(policy, str) else policy,
        progress=not args.quiet,
        **given(args, "device", "precision", "workers", "bad_files", "root"),
    )
    print(json.dumps(rows, indent=1) if args.json else costs_table(rows))
    return 0


def costs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per change, and a sentence on those that harm."""
    cells = [
        [
            row["change"],
            str(row["setting"]),
            terminal.figure(row["accuracy"]),
            f"{100 * (row['accuracy'] - row['plain']):+.1f}",
            f"{row['lost']:,}",
            f"{row['won']:,}",
        ]
        for row in rows
    ]
    table = terminal.format_table(["change", "setting", "accuracy", "points", "lost", "won"], cells, left=2)
    plain = f"Unchanged pictures: accuracy {terminal.figure(rows[0]['plain'])}."
    harmful = [row["change"] for row in rows if row["harms"]]
    if not harmful:
        return f"{table}\n\n{plain} No change costs more than chance explains."
    return (
        f"{table}\n\n{plain} More is lost than chance explains with {', '.join(harmful)}: look at the pictures"
        " (headstart preview), and leave out what changes their class."
    )
