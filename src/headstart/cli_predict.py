"""`headstart evaluate` and `headstart predict`: what a trained model says of pictures, printed or written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import terminal
from .cli_options import (
    EXIT_BAD_INPUT,
    Command,
    add_bad_files_option,
    add_machine_options,
    add_quiet_option,
    add_root_option,
    add_tta_option,
    add_unknown_option,
    given,
)
from .cli_transforms import add_transforms_option, run_transforms
from .errors import RecipeError
from .sources import source_name


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder written by `headstart fit`")
    parser.add_argument("folder", metavar="PHOTOS", help="folder or manifest, classes named as in training")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON instead of tables")
    parser.add_argument("--out", metavar="DIR", help="write metrics.json, predictions.csv and report.html there")
    overwritten = "replace an earlier evaluation in that folder"
    parser.add_argument("--overwrite", action="store_true", default=None, help=overwritten)
    add_quiet_option(parser)
    add_root_option(parser)
    add_tta_option(parser)
    add_transforms_option(parser)
    add_bad_files_option(parser)
    add_machine_options(parser)


def _evaluate(args: argparse.Namespace) -> int:
    if args.transforms is not None:
        return run_transforms(args)
    from . import asking

    metrics = asking.evaluate_run(
        args.model,
        args.folder,
        progress=not args.quiet,
        **given(args, "device", "precision", "workers", "bad_files", "root", "tta", "out", "overwrite"),
    )
    if args.json:
        print(json.dumps(metrics, indent=1))
        return 0
    print(terminal.per_class_table(metrics), "\n\n", terminal.scores_table({source_name(args.folder): metrics}), sep="")
    if args.out:
        print(f"\nreport  {terminal.printable(str(Path(args.out) / 'report.html'))}")
    return 0


def _predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder written by `headstart fit`")
    parser.add_argument("paths", nargs="+", metavar="FILE|FOLDER", help="pictures, or folders of them")
    parser.add_argument("--top", type=int, metavar="K", help="name the K most probable classes of each picture")
    add_unknown_option(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", metavar="OUT", help="write a CSV file instead of printing; - prints it")
    form.add_argument("--json", action="store_true", help="print JSON: a list with an object per picture")
    add_quiet_option(parser)
    add_tta_option(parser)
    add_bad_files_option(parser, "it is named, the others are predicted, and the exit code is 2, or 0 with skip")
    add_machine_options(parser)


def _predict(args: argparse.Namespace) -> int:
    if args.top is not None and args.top < 1:
        raise RecipeError(f"--top is {args.top}; it takes a whole number from 1.")
    from .files import check_target

    if args.csv not in (None, "-"):
        check_target(args.csv)
    from . import evaluation, familiar
    from .checkpoint import load
    from .dataset import bad_reasons, list_image_files
    from .runtime import make_runtime

    files, tta, show = list_image_files(args.paths), args.tta or "none", not args.quiet
    evaluation.tta_views(tta)  # what is wrong with the call is told before pictures are read
    if args.unknown is not None:
        familiar.check_share(args.unknown)
    runtime = make_runtime(**({"precision": "fp32"} | given(args, "device", "precision", "workers")))
    model = load(args.model, device=runtime.device)
    known = None if args.unknown is None else familiar.known_of(args.model, model, args.unknown)
    with terminal.ProgressBar(len(files), "Reading pictures", enabled=show) as bar:
        reasons = bad_reasons(files, workers=args.workers or 0, progress=lambda done, _: bar.move_to(done))
    good = [path for path, reason in zip(files, reasons, strict=True) if reason is None]
    rows: Iterable[Mapping[str, Any]] = ()
    if good:
        rows = evaluation.predictions(model, good, tta=tta, runtime=runtime, progress=show, known=known)
    for path, reason in zip(files, reasons, strict=True):
        if reason is not None:
            terminal.say(f"headstart predict: {path} cannot be read: {reason}")
    _print_predictions(rows, model.class_names, args)
    return 0 if len(good) == len(files) or args.bad_files == "skip" else EXIT_BAD_INPUT


def _print_predictions(rows: Iterable[Mapping[str, Any]], class_names: Sequence[str], args: argparse.Namespace) -> None:
    if args.csv:
        from .files import to_csv, write_atomic

        lines = to_csv(*terminal.predictions_csv(rows, class_names, top=args.top, unknown=args.unknown is not None))
        if args.csv == "-":
            sys.stdout.buffer.writelines(lines)
        else:
            write_atomic(args.csv, lines)
    elif args.json:
        print(terminal.as_json(terminal.predictions_json(rows, top=args.top)))
    elif rows:
        print(terminal.predictions_table(rows, top=args.top or 1))


EVALUATE = Command(
    "score a trained model on a folder of labelled pictures", "RUN PHOTOS [options]", _evaluate_options, _evaluate
)
PREDICT = Command("name the classes of pictures", "RUN FILE|FOLDER... [options]", _predict_options, _predict)
