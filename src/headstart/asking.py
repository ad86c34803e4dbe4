"""What a saved model is asked: its scores on labelled pictures, and what changes of them cost it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load
from .classifier import Classifier
from .closing import CONTENT, trained_on, write_evaluation
from .dataset import ImageTable, bad_reasons, check_images, list_image_files, load_images
from .errors import CheckpointError, DataError, RecipeError
from .evaluation import PREDICTED_AT_ONCE, evaluate, predict_features, tta_views, unlabelled
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
    _require_folder(
        "evaluate_run", run, " A model in memory is scored by evaluate(model, load_images(folder,"
        " class_names=model.class_names))."
    )  # fmt: skip
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

    Features of training pictures of the run (2,000 or so, and at least 20 of each class where there are so many), and
    how near its validation pictures are to them, are kept in the run folder, in `familiar.safetensors`. Validation
    pictures that are copies of training pictures are left out, and test pictures that are copies of either.

    Args:
        run: a run folder whose pictures are still there; of a model that needs no module of the user's.
        root: the folder of the pictures, where they were moved since.
        against: files or folders of pictures of other things, to see how many of them are told. Those that cannot be
            read are named and left out.
        device, precision, workers: as in `make_runtime`.
    Returns:
        path; n_met, n_held_out: how many training and validation pictures were taken; missing: how many of the run's
        are gone, or have changed as far as was looked; copies: how many were left out as such; test (None without test
        pictures), and against, of each name given: n, and unknown (how many are) and unknown_ci95 at the share
        `share`, 0.05 or the least one above.
    Raises:
        CheckpointError: no run there. DataError: less than half of its training or validation pictures are there, or
            none of a class; they are too few; nothing in `against` can be read. SetupError: no such device.
    """
    _require_folder("learn_familiar", run)
    record, runtime = read_run(run), make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    given = [against] if isinstance(against, (str, os.PathLike)) else against
    others = {str(one): _readable(list_image_files([one]), runtime) for one in given}
    own = _own_pictures(record, root)
    say(f"{own.missing:,} pictures of the run are gone or have changed, and are left out.", enabled=own.missing > 0)
    say(f"{own.copies:,} validation and test pictures are copies, and are left out.", enabled=own.copies > 0)
    every = [*own.files.values(), *others.values()]
    with ProgressBar(sum(map(len, every)), "Looking", enabled=progress) as bar:

        def features(files: Sequence[Path]) -> Tensor:
            parts = []  # a part at a time: beside its features each picture has a number for each class
            for start in range(0, len(files), PREDICTED_AT_ONCE):
                table = unlabelled(files[start : start + PREDICTED_AT_ONCE], model)
                pixels = Pixels(table, model.spec, workers=runtime.workers, cache_bytes=0)
                parts.append(predict_features(model, pixels, runtime=runtime, advance=bar.advance)[1])
            return torch.cat(parts)

        familiar = Familiar.of(model, features(own.files["train"]), features(own.files["val"]))
        known = Known(familiar, max(0.05, familiar.least))

        def told(files: Sequence[Path]) -> dict[str, Any]:
            unknown = sum(one["unknown"] for one in known.tell(features(files)))
            interval = list(wilson_interval(unknown, len(files)))
            return {"n": len(files), "unknown": unknown, "unknown_ci95": interval, "share": known.share}

        counts = {
            "test": told(own.files["test"]) if own.files["test"] else None,
            "against": {name: told(files) for name, files in others.items()},
        }
    return {
        "path": familiar.write(Path(run)), "n_met": len(own.files["train"]), "n_held_out": len(own.files["val"]),
        "missing": own.missing, "copies": own.copies, **counts,
    }  # fmt: skip


def _require_folder(who: str, run: object, else_where: str = "") -> None:
    """Raises: CheckpointError: a model in memory, or something else that is no path."""
    if not isinstance(run, (str, os.PathLike)):
        raise CheckpointError(f"{who} takes a run folder; this is {type(run).__name__}.{else_where}")


def _readable(files: Sequence[Path], runtime: Runtime) -> list[Path]:
    reasons = bad_reasons(files, workers=runtime.workers)
    for path, reason in zip(files, reasons, strict=True):
        say(f"{path} cannot be read: {reason}", enabled=reason is not None)
    good = [path for path, reason in zip(files, reasons, strict=True) if reason is None]
    if not good:
        raise DataError(f"Of {len(files):,} files, {files[0]} the first, none can be read.")
    return good


@dataclass(frozen=True)
class _Own:
    """Pictures of a run, by split, and how many are left out: gone or changed (`missing`), and `copies`."""

    files: dict[str, list[Path]]
    missing: int
    copies: int


def _own_pictures(record: RunRecord, root: str | Path | None) -> _Own:
    """Of a run's training pictures some of each class, of the others as they come, as new pictures would.

    Raises:
        DataError: too few of them are there.
    """
    where = Path(root or (record.metrics.get("data") or {}).get("root") or ".")
    rows = {split: [row for row in record.splits if row["split"] == split] for split in ("train", "val", "test")}
    met: set[str] = set()
    leaked, copies = set((record.metrics.get("data") or {}).get("leaked") or ()), 0
    for split, of in rows.items():
        seen = {row.get(CONTENT, "") for row in of} - {""}
        if split != "train":
            rows[split] = [row for row in of if row.get(CONTENT) not in met and row["path"] not in leaked]
            copies += len(of) - len(rows[split])
        met |= seen
    there = {split: _there(where, of) for split, of in rows.items()}
    missing = sum(map(len, rows.values())) - sum(map(len, there.values()))
    classes: dict[str, list[dict[str, str]]] = {row["label"]: [] for row in rows["train"]}
    for row in there["train"]:
        classes[row["label"]].append(row)
    most = max(FEWEST_MET, MOST_MET // max(1, len(classes)))
    chosen = {"train": [of[i] for of in classes.values() for i in spread(len(of), most)]}
    chosen |= {split: [there[split][i] for i in spread(len(there[split]), MOST_MET)] for split in ("val", "test")}
    hashes = FileHashes(Cache(limit_bytes=0), where)

    def is_as_it_was(row: dict[str, str]) -> bool:
        try:
            return not row.get(CONTENT) or hashes.of(where / row["path"]).startswith(row[CONTENT])
        except OSError:
            return False

    files: dict[str, list[Path]] = {}
    for split, of in chosen.items():
        same = map_threads(is_as_it_was, of)
        files[split] = [where / row["path"] for row, is_same in zip(of, same, strict=True) if is_same]
        missing += same.count(False)
    back = "Bring them back as they were, or name the folder where they are now: --root FOLDER."
    for split, least in (("train", NEIGHBOURS), ("val", 1)):
        if 2 * len(files[split]) < len(chosen[split]) or 2 * len(there[split]) < len(rows[split]):
            raise DataError(f"Most {split} pictures of {record.path} are not in {where} as they were. {back}")
        if len(files[split]) < least:
            raise DataError(f"{record.path} has {len(files[split])} {split} pictures of its own; {least} are needed.")
    if gone := [name for name, of in classes.items() if not of]:
        raise DataError(f"No train picture of {gone[0]!r} is in {where} any more; it would be unknown. {back}")
    return _Own(files, missing, copies)


def _there(where: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    is_there = map_threads(lambda row: (where / row["path"]).is_file(), rows)
    return [row for row, found in zip(rows, is_there, strict=True) if found]


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
