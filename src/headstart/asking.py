"""What a saved model is asked: its scores on labelled pictures, and what changes of them cost it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import load
from .classifier import Classifier
from .closing import CONTENT, trained_on, write_evaluation
from .dataset import ImageTable, check_images, list_image_files, load_images
from .errors import CheckpointError, DataError, RecipeError
from .evaluation import evaluate, predict_features, tta_views, unlabelled
from .familiar import NEIGHBOURS, Familiar, Known, spread
from .groundwork import say_left_out
from .harm import single_changes, transform_costs
from .hashes import FileHashes
from .metrics import wilson_interval
from .pixels import Pixels
from .recipe import POLICIES, AugmentSpec, load_recipe
from .run import open_evaluation, refuse_among_pictures
from .run_record import RunRecord, read_run
from .runtime import Runtime, make_runtime
from .settings import own_settings
from .store import Cache
from .terminal import ProgressBar, say
from .threads import map_threads

MOST_MET, FEWEST_MET = 2000, 20  # pictures of a split that are taken: in all, and of each class in any case


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


@own_settings()
def learn_familiar(
    run: str | Path,
    *,
    root: str | Path | None = None,
    against: str | Path | Sequence[str | Path] = (),
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Learn what pictures are familiar to a run's model, so that `predict_files(..., unknown=0.05)` can tell others.

    Features of the run's training pictures (2,000 or so, evenly over all of each class) and of its validation
    pictures are kept in the run folder, in `familiar.safetensors`.

    Args:
        run: a run folder whose pictures are still there.
        root: the folder of the pictures, where they were moved since.
        against: files or folders of pictures of other things, to see how many of them are told.
        device, precision, workers: as in `make_runtime`.
    Returns:
        path; n_met, n_held_out: how many training and validation pictures were taken; missing: how many of the run's
        are not there any more, or have changed; test (None without test pictures), and of each of `against` by its
        name: n, and unknown (how many are) and unknown_ci95 at the share `share`, 0.05 or the least one above.
    Raises:
        CheckpointError: no run there. DataError: none of its training or validation pictures are there; `against`
            cannot be read. SetupError: no such device.
    """
    record, runtime = read_run(run), make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    given = [against] if isinstance(against, (str, os.PathLike)) else against
    others = {str(one): list_image_files([one]) for one in given}
    own, missing = _own_pictures(record, root)
    for split in ("train", "val"):
        if len(own[split]) < (NEIGHBOURS if split == "train" else 1):
            raise DataError(
                f"Of the {split} pictures of {run} {len(own[split])} are as they were in"
                f" {_root_of(record, root) or 'a folder'}. Name the folder where they are now: --root FOLDER."
            )
    say(f"{missing:,} pictures of the run are gone or have changed, and are left out.", enabled=missing > 0)
    asked = own | others
    features = {}
    with ProgressBar(sum(map(len, asked.values())), "Looking", enabled=progress) as bar:
        for name, files in asked.items():
            pixels = Pixels(unlabelled(files, model), model.spec, workers=runtime.workers, cache_bytes=0)
            features[name] = predict_features(model, pixels, runtime=runtime, advance=bar.advance)[1]
    familiar = Familiar.of(model, features["train"], features["val"])
    share = max(0.05, familiar.least)

    def told(name: str) -> dict[str, Any]:
        n, unknown = len(features[name]), sum(one["unknown"] for one in Known(familiar, share).tell(features[name]))
        return {"n": n, "unknown": unknown, "unknown_ci95": list(wilson_interval(unknown, n)), "share": share}

    return {
        "path": familiar.write(Path(run)), "n_met": len(own["train"]), "n_held_out": len(own["val"]),
        "missing": missing, "test": told("test") if own["test"] else None, "against": {n: told(n) for n in others},
    }  # fmt: skip


def _root_of(record: RunRecord, root: str | Path | None) -> str | Path | None:
    return root or (record.metrics.get("data") or {}).get("root")


def _own_pictures(record: RunRecord, root: str | Path | None) -> tuple[dict[str, list[Path]], int]:
    """Pictures of a run by split, some of each class, those that are as they were; and how many others there are."""
    where, places = Path(_root_of(record, root) or "."), defaultdict[tuple[str, str], list[tuple[Path, str]]](list)
    for row in record.splits:
        places[row["split"], row["label"]].append((where / row["path"], row.get(CONTENT, "")))
    most = max(FEWEST_MET, MOST_MET // len({label for _, label in places}))
    chosen = [(split, of[i]) for (split, _), of in places.items() for i in spread(len(of), most)]
    hashes = FileHashes(Cache(limit_bytes=0), where)

    def is_as_it_was(place: int) -> bool:
        path, content = chosen[place][1]
        try:
            return path.is_file() if not content else hashes.of(path).startswith(content)
        except OSError:
            return False

    there = map_threads(is_as_it_was, range(len(chosen)))
    own: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for (split, (path, _)), is_there in zip(chosen, there, strict=True):
        if is_there:
            own[split].append(path)
    return own, there.count(False)


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
