"""`headstart lr` and `headstart sweep`: their options, and the calls."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from shlex import quote
from typing import Any

from . import terminal
from .cli_options import (
    PHOTOS_HELP,
    Command,
    add_cache_option,
    add_compile_option,
    add_data_options,
    add_machine_options,
    add_picture_options,
    add_quiet_option,
    add_recipe_options,
    default_run_path,
    given,
    short_path,
)
from .cli_overrides import apply_overrides, picture_overrides
from .cli_recipe import follow_tuned
from .drawing import check_picture
from .errors import RecipeError
from .recipe import DEFAULT_BACKBONE, Recipe, load_recipe
from .space import COURSE_SPACE, Space, parse_point, parse_values

SWEEP_RECIPE = "head"
COURSE_EPOCHS = "10"  # of the notebook whose table the preset repeats


def add_work_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Data, backbone, pictures and machine, as every command that trains for a look takes them; the machine's group."""
    add_data_options(parser)
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", metavar="NAME", help=f"any timm model (default: {DEFAULT_BACKBONE})")
    group.add_argument("--weights", metavar="WHICH", help="hub, none, a weights file, or a run folder (default: hub)")
    add_picture_options(parser)
    return add_machine_options(parser)


def given_work(args: argparse.Namespace) -> dict[str, Any]:
    """The library's arguments for `add_work_options`."""
    return {
        "backbone": args.backbone or DEFAULT_BACKBONE,
        "spec_overrides": picture_overrides(vars(args)),
        **given(args, "weights", "bad_files", "val", "test", "val_folder", "test_folder", "root", "limit", "cache"),
        **given(args, "device", "precision", "workers"),
    }


def repeated_data(args: argparse.Namespace) -> str:
    """The options that say which pictures are meant and how they are split, as given, for another command."""
    names = ("root", "val_folder", "test_folder", "val", "test", "bad_files", "limit")
    return "".join(f" --{name.replace('_', '-')} {quote(str(v))}" for name, v in given(args, *names).items())


def recipe_of(args: argparse.Namespace, default: str) -> Recipe:
    """The recipe that the options describe; what its file was found on goes into `args`."""
    follow_tuned(args)
    return apply_overrides(load_recipe(args.recipe or default), vars(args))


# ---- lr --------------------------------------------------------------------------------------------------------


def _lr_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("test")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--after-head", action="store_true", help="train the head first, then test the stage after it")
    where.add_argument("--run", metavar="RUN", help="test the last stage of this run, from where the run ended")
    group.add_argument("--epochs", metavar="N", help="of every stage, or one per stage: how long the head is trained")
    group.add_argument("--steps", type=int, metavar="N", help="rates tried, one optimiser step each (default: 100)")
    group.add_argument("--low", type=float, metavar="X", help="the first rate (default: 1e-06)")
    group.add_argument("--high", type=float, metavar="X", help="the last rate (default: 10)")
    group.add_argument("--out", metavar="FILE", help="the curve: png, jpg, pdf or svg (default: lr.png)")
    group.add_argument("--limit", type=int, metavar="N", help="use N pictures only")
    add_cache_option(group)
    add_quiet_option(group)
    add_recipe_options(parser)
    add_work_options(parser)


def _of_a_run() -> list[str]:
    """The options whose values a run has its own of."""
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    add_picture_options(parser)
    return ["backbone", "weights", "epochs", *vars(parser.parse_args([]))]


def _lr(args: argparse.Namespace) -> int:
    idle = given(args, *_of_a_run()) if args.run else {}
    if idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise RecipeError(f"{flags} would change nothing: the run has its own. Leave it out.")
    if args.epochs is not None and not args.run and not args.after_head:
        raise RecipeError(
            "--epochs would change nothing: nothing is trained before the test. Give --after-head, or leave it"
            " out; --steps says how long the test is."
        )
    planned: dict[str, Any] = {} if args.run else {"recipe": recipe_of(args, "fine-tune")}
    work = given_work(args)
    out = args.out or "lr.png"
    check_picture("Curve", out)
    from . import lr_finder
    from .plots import plot_rates

    curve = lr_finder.find_lr(
        args.photos,
        run=args.run,
        after_head=args.after_head,
        progress=not args.quiet,
        **given(args, "steps", "low", "high"),
        **planned,
        **work,
    )
    print(lr_finder.describe(curve), flush=True)  # whatever becomes of the picture
    print(f"\ncurve   {plot_rates(asdict(curve), out)}")
    return 0


# ---- sweep -----------------------------------------------------------------------------------------------------


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("trials", "Parameters: lr, weight_decay, head_dropout, freeze_line, backbone.")
    group.add_argument("--values", action="append", metavar="NAME=A,B,...", help="values of one parameter; may be "
                       "repeated. A grid tries all combinations; tpe takes two numbers as a range")  # fmt: skip
    group.add_argument("--trial", action="append", metavar="NAME=A,NAME=B", help="one trial of an explicit list: "
                       "lr=0.01,weight_decay=none; may be repeated")  # fmt: skip
    group.add_argument("--preset", choices=("course",), help="a course notebook's five pairs of rate and decay, 10 "
                       "epochs of the head each, its own figures beside ours")  # fmt: skip
    group.add_argument(
        "--method", choices=("grid", "tpe"), help="all combinations, or Optuna's sampler (default: grid)"
    )
    group.add_argument("--trials", type=int, metavar="N", help="end after N trials of the study (default: tpe 20)")
    group.add_argument("--minutes", type=float, metavar="X", help="begin no trial after this time")
    group.add_argument("--epochs", metavar="N", help="of every stage, or one per stage (30,8)")
    group.add_argument("--no-prune", action="store_true", help="train every trial to its end")
    group.add_argument("--no-share", action="store_true", help="keep no stored features between trials")
    group.add_argument("--storage", metavar="WHERE", help="journal file or database URL that processes or machines "
                       "share (default: a journal file in the folder)")  # fmt: skip
    group.add_argument("--out", metavar="FOLDER", help="for sweep.json, best.json and parallel.png (default: "
                       "runs/PHOTOS-BACKBONE-sweep); the same command goes on there")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="begin anew where other settings left a sweep")
    group.add_argument("--limit", type=int, metavar="N", help="use N pictures only")
    add_cache_option(group)
    add_quiet_option(group)
    add_recipe_options(parser, SWEEP_RECIPE)
    add_compile_option(add_work_options(parser))


def _sweep(args: argparse.Namespace) -> int:
    ways = [flag for flag in ("values", "trial", "preset") if getattr(args, flag)]
    if len(ways) != 1:
        raise RecipeError("A sweep takes one of --values (repeated), --trial (repeated) or --preset.")
    if args.preset and args.epochs is None:
        args.epochs = COURSE_EPOCHS
    recipe = recipe_of(args, SWEEP_RECIPE)
    work = given_work(args)
    if args.preset:
        space, recipe = COURSE_SPACE, replace(recipe, name=args.preset)
    elif args.trial:
        space = Space(points=tuple(map(parse_point, args.trial)))
    else:
        space = Space(values=parse_values(args.values))
    if args.lr is not None and all("lr" in point for point in space.grid()):
        raise RecipeError("--lr would change nothing: every trial has its own. Leave it out.")
    from .sweeps import sweep

    result = sweep(
        args.photos,
        space=space,
        recipe=recipe,
        prune=not (args.no_prune or args.preset),
        share=not args.no_share,
        out=args.out or default_run_path(args.photos, f"{work['backbone']}-sweep", overwrite=True),
        overwrite=args.overwrite,
        progress=not args.quiet,
        **given(args, "method", "trials", "minutes", "storage", "compile"),
        **work,
    )
    print(terminal.sweep_table(result.results))
    if result.best:
        best = short_path(result.path / "best.json")
        print(
            f"\nbest    {best}\nuse     headstart fit {quote(args.photos)} --recipe {quote(best)}{repeated_data(args)}"
        )
    return 0


LR = Command(
    "look for a learning rate: loss against rate, before or after the head", "PHOTOS [options]", _lr_options, _lr
)
SWEEP = Command(
    "try rates, decays, dropouts, freeze lines or backbones, and keep the best",
    "PHOTOS [options]",
    _sweep_options,
    _sweep,
)
