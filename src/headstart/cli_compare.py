"""`headstart compare`: its options, and the call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import terminal
from .cli_options import (
    PHOTOS_HELP,
    RECIPE_OPTIONS,
    Command,
    add_audit_option,
    add_augment_option,
    add_cache_option,
    add_compile_option,
    add_data_options,
    add_head_options,
    add_machine_options,
    add_picture_options,
    add_quiet_option,
    default_run_path,
    given,
    short_path,
)
from .cli_overrides import apply_overrides, picture_overrides
from .cli_recipe import follow_tuned
from .errors import RecipeError
from .recipe import DEFAULT_BACKBONE, RECIPES

DEFAULT_RECIPES = "scratch,head,fine-tune"


def whole_numbers(flag: str, text: str) -> list[int]:
    """`0,1,2` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{flag} is {text!r}; it takes whole numbers with commas between.") from None


def words(text: str) -> list[str]:
    """`a,b,c` as a list without empty places."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--recipes",
        metavar="A,B,...",
        help=f"{', '.join(RECIPES)}, JSON files, or freeze lines (last:3, layer4, all): the default recipe fine-tuned "
        f"there (default: {DEFAULT_RECIPES})",
    )
    group.add_argument("--seeds", metavar="N,...", help="of first weights, order and augmentation; the first one also "
                       "of the split, which all share (default: 0)")  # fmt: skip
    group.add_argument(
        "--budget",
        action="append",
        metavar="RECIPE=EPOCHS[@PX]",
        help="epochs and picture size of one recipe, such as scratch=10@96 or fine-tune=30,5; may be repeated",
    )
    group.add_argument("--out", metavar="FOLDER", help="for compare.html, compare.json and a run folder per recipe and "
                       "seed (default: runs/PHOTOS-BACKBONE-compare); the same command goes on there")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace what other settings left there")
    group.add_argument("--limit", type=int, metavar="N", help="dry run on N pictures")
    add_audit_option(group)
    add_cache_option(group)
    add_quiet_option(group)
    add_data_options(parser)
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", metavar="NAME", help=f"any timm model (default: {DEFAULT_BACKBONE})")
    group.add_argument("--weights", metavar="WHICH", help="hub, none, a weights file, or a run folder; a recipe from "
                       "scratch leaves it out (default: hub)")  # fmt: skip
    add_picture_options(parser)
    add_head_options(parser)
    group = parser.add_argument_group("recipes", "Put into every recipe that is compared.")
    for option in RECIPE_OPTIONS:
        if option.name != "seed":  # --seeds
            group.add_argument(option.flag, metavar=option.metavar, help=option.help)
    add_augment_option(group)
    add_compile_option(add_machine_options(parser))


def read_budgets(texts: Sequence[str]) -> dict[str, str]:
    """`scratch=10@96` as {"scratch": "10@96"}."""
    budgets = {}
    for one in texts:
        name, equals, budget = one.partition("=")
        if not equals or not name or not budget:
            raise RecipeError(f"--budget is {one!r}; it takes RECIPE=EPOCHS[@PX], such as scratch=10@96.")
        if name in budgets:
            raise RecipeError(f"--budget of {name} is given twice. Leave one out.")
        budgets[name] = budget
    return budgets


def run(args: argparse.Namespace) -> int:
    budgets = read_budgets(args.budget or [])
    seeds = whole_numbers("--seeds", args.seeds or "0")
    recipes = words(args.recipes or DEFAULT_RECIPES)
    follow_tuned(args, recipes)
    backbone = args.backbone or DEFAULT_BACKBONE
    overrides = picture_overrides(vars(args))
    from . import comparison

    result = comparison.compare(
        args.photos,
        recipes=[apply_overrides(comparison.named_recipe(name), vars(args)) for name in recipes],
        seeds=seeds,
        budgets={name: comparison.Budget.parse(text) for name, text in budgets.items()},
        backbone=backbone,
        out=args.out or default_run_path(args.photos, f"{backbone}-compare", overwrite=True),
        overwrite=args.overwrite,
        spec_overrides=overrides,
        progress=not args.quiet,
        **given(args, "weights", "bad_files", "val", "test", "val_folder", "test_folder", "root", "limit"),
        **given(args, "device", "precision", "workers", "compile", "cache", "audit"),
    )
    print(terminal.comparison_tables(result.results))
    print(f"\npage    {short_path(result.page_path)}")
    return 0


COMMAND = Command(
    "train recipes or freeze lines side by side, and say which differences are real",
    "PHOTOS [options]",
    add_options,
    run,
)
