"""`headstart familiar`: what a run's model has met, so that `headstart predict --unknown` can tell the rest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .cli_options import Command, add_machine_options, add_quiet_option, given, short_path
from .terminal import as_json, figure, format_table


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder written by `headstart fit`")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="FILE|FOLDER",
        help="pictures of other things, to see how many of them are told from those of the run",
    )
    parser.add_argument("--root", metavar="DIR", help="where the run's pictures are, if they were moved since")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_quiet_option(parser)
    add_machine_options(parser)


def _familiar(args: argparse.Namespace) -> int:
    from . import asking

    found = asking.learn_familiar(
        args.model, progress=not args.quiet, **given(args, "against", "root", "device", "precision", "workers")
    )
    if args.json:
        print(as_json(found | {"path": str(found["path"])}))
        return 0
    print(f"met      {found['n_met']:,} training pictures; {found['n_held_out']:,} held out say what is near")
    print(f"kept     {short_path(found['path'])}")
    counts = ({f"{args.model}, test": found["test"]} if found["test"] else {}) | found["against"]
    if counts:
        print(f"\n{_table(counts)}")
    return 0


def _table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, of in counts.items():
        shares = figure(of["unknown"] / of["n"]), " - ".join(map(figure, of["unknown_ci95"]))
        rows.append([name, f"{of['n']:,}", f"{of['unknown']:,}", *shares])
    share = next(iter(counts.values()))["share"]
    return format_table(["pictures", "n", f"unknown at {share:.2g}", "share", "95 % interval"], rows)


FAMILIAR = Command(
    "learn what is familiar to a model, so that predict can answer `unknown`", "RUN [options]", _options, _familiar
)
