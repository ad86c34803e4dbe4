"""What the five examples share: their options, what is trained at each line, the table and the record of what came out.

Everything is done by the public library; what stands here only spares each example the same twenty lines.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import headstart
from headstart import Budget, Comparison, Recipe


def options(example: str, *, backbone: str, image_size: int, photos: str = "photos") -> argparse.ArgumentParser:
    """The options that every example has; the defaults are the tutorial's own."""
    parser = argparse.ArgumentParser(prog=f"{example}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("photos", nargs="?", default=photos, help="one folder per class, with or without split folders")
    parser.add_argument("--backbone", default=backbone, help="any timm model")
    parser.add_argument("--weights", default="hub", help="hub, none or a weights file")
    parser.add_argument("--image-size", type=int, default=image_size, help="side of the pictures in pixels")
    parser.add_argument("--seeds", type=_numbers, default=(0,), help="such as 0,1,2")
    parser.add_argument(
        "--epochs-scale", type=float, default=1.0, help="times the epochs of every stage; 0 is one each"
    )
    parser.add_argument("--budget", action="append", default=[], metavar="RECIPE=EPOCHS[@PX]",
                        help="epochs and picture size of one recipe, such as scratch=10@96; repeatable")  # fmt: skip
    parser.add_argument("--limit", type=int, help="use this many pictures only")
    parser.add_argument("--out", type=Path, default=Path("runs") / example, help="folder of the runs")
    parser.add_argument("--overwrite", action="store_true", help="replace what other settings left in that folder")
    parser.add_argument("--record", type=Path, help="add a line with the result to this file")
    parser.set_defaults(example=example)
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given on the command line; a notebook has none and takes the defaults.

    What can be put right (`HeadstartError`) then ends the script with its message alone, as it ends `headstart`.
    """
    if "ipykernel" in sys.modules:
        return parser.parse_args([])
    sys.excepthook = functools.partial(_explain, parser.prog)
    return parser.parse_args()


def _explain(program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, headstart.HeadstartError):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{program}: error: {error}", file=sys.stderr)
    raise SystemExit(130 if isinstance(error, headstart.Interrupted) else 2)


def settings(args: argparse.Namespace, recipes: Iterable[Recipe]) -> dict[str, Any]:
    """The options as `headstart.compare` takes them."""
    return {
        "backbone": args.backbone,
        "weights": args.weights,
        "seeds": args.seeds,
        "budgets": _budgets(args, recipes),
        "limit": args.limit,
        "out": args.out,
        "overwrite": args.overwrite,
        "progress": True,
    }


def scaled(args: argparse.Namespace, epochs: int) -> int:
    """These epochs times `--epochs-scale`, at least one."""
    return max(1, round(epochs * args.epochs_scale))


def show_lines(args: argparse.Namespace, recipe: Recipe) -> None:
    """Print what each stage of the recipe trains, on this backbone with random weights."""
    names = headstart.load_images(args.photos, check=False).class_names
    model = headstart.create_classifier(
        args.backbone, names, head=recipe.head, weights="none", image_size=args.image_size
    )
    for stage in recipe.stages:
        line = headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        print(f"{stage.name}: {line.describe()}")


def show(comparison: Comparison) -> None:
    """Print the figures of each recipe, what the pairs say, and what happened on the way."""
    results = comparison.results
    print(
        f"{'recipe':<20}{'epochs':>10}{'accuracy':>10}  {'95 % interval':<16}{'precision':>10}{'recall':>8}{'top-5':>8}"
    )
    for entry in results["recipes"]:
        test = entry["test"]
        low, high = test["accuracy_ci95"]
        top5 = "" if test["top5"] is None else f"{test['top5']:.3f}"
        epochs = ",".join(map(str, entry["budget"]["epochs"]))
        print(f"{entry['name']:<20}{epochs:>10}{test['accuracy']:>10.3f}  {f'{low:.3f} - {high:.3f}':<16}"
              f"{test['weighted_precision']:>10.3f}{test['weighted_recall']:>8.3f}{top5:>8}")  # fmt: skip
    for entry in results["recipes"]:
        for event in entry["events"]:
            print(f"{entry['name']}: {event}")
    for pair in results["pairs"]:
        print(pair["sentence"])
    print(f"page: {comparison.page_path}")


def record(
    args: argparse.Namespace, comparison: Comparison, recipes: Sequence[Recipe], *, sweep: headstart.Sweep | None = None
) -> None:
    """With `--record FILE`: add one line of JSON with the figures, and the budget beside the tutorial's epochs."""
    if args.record is None:
        return
    results = comparison.results
    entries = zip(results["recipes"], recipes, strict=True)
    line = {
        "example": args.example,
        "data": Path(args.photos).name,
        "backbone": args.backbone,
        "seeds": results["seeds"],
        "n": results["n"],
        "classes": len(results["class_names"]),
        "majority_baseline": results["majority_baseline"],
        "recipes": [entry | {"tutorial_epochs": [s.epochs for s in recipe.stages]} for entry, recipe in entries],
        "pairs": results["pairs"],
        "wall_seconds": results["wall_seconds"],
        "sweep": sweep.results["trials"] if sweep else None,
        "versions": headstart.read_run(run_folder(comparison, recipes[0].name)).environment,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with args.record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run_folder(comparison: Comparison, recipe: str) -> Path:
    """The folder of a recipe's first run."""
    entry = next(entry for entry in comparison.results["recipes"] if entry["name"] == recipe)
    return comparison.path / str(entry["runs"][0])


def _budgets(args: argparse.Namespace, recipes: Iterable[Recipe]) -> dict[str, Budget]:
    given = dict(one.partition("=")[::2] for one in args.budget)
    found = {}
    for recipe in recipes:
        asked = Budget.parse(given.pop(recipe.name, ""))
        found[recipe.name] = Budget(
            asked.epochs or tuple(scaled(args, stage.epochs) for stage in recipe.stages), asked.image_size
        )
    if given:
        raise headstart.RecipeError(f"--budget {', '.join(given)}: no such recipe. There are: {', '.join(found)}.")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
