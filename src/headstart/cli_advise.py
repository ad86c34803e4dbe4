"""`headstart advise`, and `fit --auto`, which follows it: the options, and the calls."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from .cli_options import (
    PHOTOS_HELP,
    Command,
    add_cache_option,
    add_quiet_option,
    default_run_path,
    given,
    short_path,
)
from .cli_overrides import apply_overrides
from .cli_tuning import add_work_options, given_work, repeated_data
from .errors import CheckpointError, RecipeError
from .files import check_folder, check_target
from .recipe import Recipe, load_recipe
from .terminal import say

if TYPE_CHECKING:
    from .advising import Advice


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("advice")
    group.add_argument(
        "--out", metavar="FILE", help="the recipe, for `fit --recipe` (default: runs/PHOTOS-BACKBONE-advice.json)"
    )
    group.add_argument("--json", action="store_true", help="print the figures as JSON instead of sentences")
    group.add_argument("--seed", metavar="N", help="of the split, the sample and the random weights (default: 0)")
    group.add_argument("--limit", type=int, metavar="N", help="use N pictures only")
    add_cache_option(group)
    add_quiet_option(group)
    add_work_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.out:
        _check_out(Path(args.out))
    advice = _advise(args)
    backbone = advice.found_on["backbone"]
    out = Path(args.out) if args.out else default_run_path(args.photos, f"{backbone}-advice.json", overwrite=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    advice.write(out)
    if args.json:
        print(json.dumps(advice.to_dict(), indent=1, default=str))
    else:
        print(advice.text())
        use = f"headstart fit {quote(args.photos)} --recipe {quote(str(out))}{repeated_data(args)}"
        print(f"\nrecipe  {short_path(out.absolute())}\nuse     {use}")
    return 0


def _check_out(out: Path) -> None:
    """The recipe's file can be written, and replaces nothing but an earlier recipe; told before the work."""
    if not out.parent.is_dir():
        check_folder(out.parent, f"Cannot write {out}")
        return
    check_target(out)
    if out.is_file() and out.stat().st_size:
        try:
            load_recipe(out)
        except RecipeError:
            raise CheckpointError(f"{out} is there and is no recipe; it is not replaced. Name another file.") from None


def follow_advice(args: argparse.Namespace) -> Advice:
    """What `fit --auto` trains by; the reasons go to standard error.

    Raises:
        RecipeError: an option that brings a recipe or a model of its own.
    """
    beside = given(args, "recipe", "from_run")
    if beside:
        flags = ", ".join("--" + name.replace("_", "-") for name in beside)
        raise RecipeError(f"{flags} beside --auto: it chooses the recipe for a new head itself. Leave one of them out.")
    advice = _advise(args)
    say(advice.text(), enabled=not args.quiet)
    return advice


def _advise(args: argparse.Namespace) -> Advice:
    seed = apply_overrides(Recipe(), {"seed": args.seed}).seed
    work: dict[str, Any] = {**given_work(args), "seed": seed, "progress": not args.quiet}
    work |= {"audit": args.audit} if getattr(args, "audit", None) is not None else {}
    from . import advising

    return advising.advise(args.photos, **work)


COMMAND = Command(
    "look at pictures and frozen features, and propose a recipe with its reasons",
    "PHOTOS [options]",
    add_options,
    run,
)
