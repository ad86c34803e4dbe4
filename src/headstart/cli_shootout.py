"""`headstart shootout`: its options, and the call."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from . import terminal
from .cli_compare import words
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
from .errors import RecipeError
from .recipe import load_recipe
from .tuned import tuned_on


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("shoot-out")
    group.add_argument("--backbones", metavar="A,B,...", help="timm names (hub weights), NAME=WEIGHTS (none, a file, a "
                       "run folder), or run folders")  # fmt: skip
    group.add_argument("--minutes", type=float, metavar="X", help="for everything (default: 10)")
    group.add_argument("--finalists", type=int, metavar="N", help="backbones fine-tuned at the most (default: 3)")
    group.add_argument("--epochs", metavar="N", help="of every stage, or one per stage (30,8)")
    group.add_argument("--out", metavar="FOLDER", help="for shootout.html, shootout.json and the finalists' runs "
                       "(default: runs/PHOTOS-shootout); the same command takes finished runs from there")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace what other settings left there")
    group.add_argument("--limit", type=int, metavar="N", help="use N pictures only")
    add_cache_option(group)
    add_quiet_option(group)
    add_recipe_options(parser)
    add_data_options(parser)
    add_picture_options(parser)
    add_compile_option(add_machine_options(parser))


def run(args: argparse.Namespace) -> int:
    if not args.backbones:
        raise RecipeError("A shoot-out is between backbones: --backbones resnet18,mobilenetv3_small_100,RUN.")
    recipe = apply_overrides(load_recipe(args.recipe or "fine-tune"), vars(args))
    overrides = picture_overrides(vars(args))
    found = tuned_on(args.recipe) if args.recipe else {}
    if found:
        terminal.say(f"{args.recipe} was found on {found.get('backbone')}; here each backbone trains it.")
    from . import contest

    result = contest.shootout(
        args.photos,
        backbones=words(args.backbones),
        recipe=recipe,
        spec_overrides=overrides,
        out=args.out or default_run_path(args.photos, "shootout", overwrite=True),
        overwrite=args.overwrite,
        progress=not args.quiet,
        **given(args, "minutes", "finalists", "bad_files", "val", "test", "val_folder", "test_folder", "root"),
        **given(args, "limit", "cache", "device", "precision", "workers", "compile"),
    )
    print(shootout_table(result.results))
    print(f"\npage    {short_path(result.page_path)}")
    return 0


def shootout_table(results: Mapping[str, Any]) -> str:
    """One row per backbone, the chosen one first, then what the test pictures say of that one.

    Args:
        results: the content of shootout.json.
    """
    from .shootout_page import doubts, ranked, seen_words

    header = ["backbone", "MB", "ms", "probe loss", "probe acc.", "tuned loss", "tuned acc.", "time", ""]
    rows = []
    for row in ranked(results):
        probe, tuned = row.get("probe") or {}, row.get("fine_tuned") or {}
        figures = [terminal.figure(row.get(key), 1) for key in ("megabytes", "ms_per_picture")]
        figures += [terminal.figure(of.get(key)) for of in (probe, tuned) for key in ("log_loss", "accuracy")]
        time = terminal.duration(tuned["seconds"]) if tuned else "-"
        note = "chosen" if row["label"] == results["chosen"] else row.get("why_not", "")
        rows.append([row["label"], *figures, time, note if len(note) < 60 else f"{note[:57]}..."])
    parts = [terminal.format_table(header, rows), *(pair["sentence"] for pair in results["pairs"])]
    parts += [f"{row['label']}: {seen_words(row)}" for row in results["entrants"] if seen_words(row)]
    test = results["test"]
    if test:
        low, high = test["accuracy_ci95"]
        parts.append(
            f"{results['chosen']} on the test pictures, scored once: accuracy {test['accuracy']:.3f} ({low:.3f} -"
            f" {high:.3f}, n = {test['n']:,}), loss {test['log_loss']:.3f}. The rest is of validation pictures."
        )
    return "\n".join([*parts, *doubts(results)])


COMMAND = Command(
    "probe backbones on frozen features, fine-tune the best few, and choose one",
    "PHOTOS --backbones A,B,... [options]",
    add_options,
    run,
)
