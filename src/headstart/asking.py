"""What a saved model is asked: its scores on labelled pictures, and what changes of them cost it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .checkpoint import load
from .classifier import Classifier
from .closing import trained_on, write_evaluation
from .dataset import ImageTable, check_images, load_images
from .errors import CheckpointError, RecipeError
from .evaluation import evaluate, tta_views
from .groundwork import say_left_out
from .harm import single_changes, transform_costs
from .recipe import POLICIES, AugmentSpec, load_recipe
from .run import open_evaluation, refuse_among_pictures
from .runtime import Runtime, make_runtime
from .settings import own_settings
from .terminal import ProgressBar, say


@own_settings()
def evaluate_run(
    run: str | Path,
    folder: str | Path,
    *,
    tta: str | int = "none",
    root: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    bad_files: str = "error",
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a saved model on a folder or manifest of labelled pictures.

    Args:
        folder: as `load_images` takes it; classes are called as in training, and some of them are enough.
        tta: as in `evaluate`.
        root: the folder that a manifest's relative paths start from.
        device, precision, workers: as in `make_runtime`.
        bad_files: `error` names every unreadable file and stops; `skip` leaves them out.
        out: a folder for metrics.json, predictions.csv and report.html, in which the split is called test whatever the
            pictures are; `overwrite` replaces an earlier evaluation.
    Returns:
        n, accuracy, accuracy_ci95, top5 (None up to 5 classes), log_loss, balanced_accuracy, weighted_precision,
        weighted_recall, weighted_f1, majority_baseline, per_class (a list) and confusion (a row for each true class).
    Raises:
        CheckpointError: no model in `run`; `out` holds something else, or lies in the folder of the pictures.
        DataError: pictures that cannot be read, or of classes that the model does not know.
        RecipeError: `tta` or `overwrite` cannot be used. SetupError: no such device.
    """
    if not isinstance(run, (str, os.PathLike)):
        raise CheckpointError(
            f"evaluate_run takes a run folder; this is {type(run).__name__}. A model in memory is scored by"
            " evaluate(model, load_images(folder, class_names=model.class_names))."
        )
    views = len(tta_views(tta))
    if overwrite and out is None:
        raise RecipeError("overwrite: without effect where no folder is named; give --out, or leave it out.")
    target = None if out is None else open_evaluation(out, overwrite=overwrite)
    if target:
        refuse_among_pictures(target.path, folder)
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    table, seen = _asked_about(run, model, folder, runtime, progress=progress, root=root, bad_files=bad_files)
    with ProgressBar(len(table) * views, "Evaluating", enabled=progress) as bar:
        scored = evaluate(model, table, tta=tta, runtime=runtime, advance=bar.advance)
    if target:
        write_evaluation(target, run, model, scored, seen=seen)
    return scored.metrics


@own_settings()
def check_transforms(
    run: str | Path,
    folder: str | Path,
    *,
    augment: AugmentSpec | None = None,
    root: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    bad_files: str = "error",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """What each change of an augmentation costs a saved model on labelled pictures; see `transform_costs`.

    Args:
        augment: the changes to try; None takes those that the run was trained with.
    Raises:
        RecipeError: None, and the folder holds a model without its recipe.
    """
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    if augment is None:
        if not (Path(run) / "recipe.json").is_file():
            raise RecipeError(
                f"{run} holds a model without its recipe, which would say what changes it was trained with. Name those"
                f" to try: --transforms with a policy ({', '.join(POLICIES)}) or a JSON file, augment in Python."
            )
        augment = load_recipe(Path(run) / "recipe.json").augment_spec
    table, _ = _asked_about(run, model, folder, runtime, progress=progress, root=root, bad_files=bad_files)
    with ProgressBar(len(table) * (1 + len(single_changes(augment))), "Trying changes", enabled=progress) as bar:
        return transform_costs(model, table, augment, runtime=runtime, advance=bar.advance)


def _asked_about(
    run: str | Path, model: Classifier, folder: str | Path, runtime: Runtime, *, progress: bool, **reading: Any
) -> tuple[ImageTable, int]:
    """The pictures that a saved model is asked about, and how many of them its run has trained on, or has chosen it by.

    Those left out and those met before are told.
    """
    table = load_images(folder, class_names=model.class_names, check=False, **reading)
    with ProgressBar(len(table), "Reading pictures", enabled=progress) as bar:
        table = check_images(
            table, bad_files=reading["bad_files"], workers=runtime.workers, progress=lambda done, _: bar.move_to(done)
        )
    say_left_out(table, True)
    seen = int(trained_on(Path(run), table).sum())
    if seen:
        pictures = f"{seen:,} of these {len(table):,} pictures"
        say(f"{pictures} were trained on or chose the model: the figure is too good.", enabled=True)
    return table, seen
