"""What a run leaves: its plan at the start, its scores and pages at the end, something usable when it is stopped."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .bench import Bench
from .checkpoint import save
from .classifier import Classifier
from .dataset import ImageTable, Splits
from .diary import Diary
from .errors import CheckpointError, HeadstartError
from .evaluation import Evaluation, source_logits
from .features import PixelSource, StageData
from .files import read_csv
from .hashes import FileHashes
from .points import has_points
from .recipe import Recipe
from .run import Run
from .sizes import input_sizes
from .store import Cache
from .terminal import ProgressBar
from .threads import map_threads

EARLIER_PICTURES = "earlier_pictures.csv"
CONTENT, CONTENT_LETTERS = "content", 20  # the column of splits.csv with the beginning of the hash of each file's bytes
SPLIT_COLUMNS = ("path", "split", "label", CONTENT)


@dataclass
class FitResult:
    """What `fine_tune` returns: the model in its best state, and what the run folder holds.

    metrics: what metrics.json holds: `val` and `test` (no `test` where that split is empty) with the figures that
    `evaluate_run` returns, `stages`, `phases` and `data`. history: the records of history.jsonl. splits, recipe: what
    was trained on, and by. run_path, report_path: of the run folder; None where `out` is None, and in all processes but
    the one that writes it. stopped: whether Ctrl-C came while a complete run was written.
    """

    model: Classifier
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    splits: Splits
    recipe: Recipe
    run_path: Path | None
    report_path: Path | None
    stopped: bool = False


def _contents_met(run: Path) -> set[str]:
    """The contents of the pictures in a run's train and validation splits, and in those of the runs it went on from.

    Raises:
        OSError, ValueError, KeyError: no run, or one whose tables cannot be read.
    """
    rows = [row for row in read_csv(run / "splits.csv") if row["split"] != "test"]
    return {row[CONTENT] for row in (*rows, *read_csv(run / EARLIER_PICTURES)) if row.get(CONTENT)}


def trained_on(run: Path, table: ImageTable) -> NDArray[np.bool_]:
    """Mask of the pictures that stand in the run's train or validation split: the files there, and copies of them.

    A copy is told by its bytes, where the run has noted those of its own files; so are the pictures of the runs that
    it went on from, one after the other.
    """
    try:
        root = json.loads((run / "metrics.json").read_bytes())["data"]["root"]
        here = Path(root).resolve()  # the same folder under another name, too
        used = {str(here / row["path"]) for row in read_csv(run / "splits.csv") if row["split"] != "test"}
        contents = _contents_met(run)
    except (OSError, ValueError, KeyError, TypeError, HeadstartError):
        return np.zeros(len(table), dtype=bool)  # a folder `save` wrote holds the model alone
    here = table.root.resolve()
    hashes = FileHashes(Cache(limit_bytes=0), table.root)  # which keeps nothing here

    def is_known(place: int) -> bool:
        if str(here / table.relative_paths[place]) in used:
            return True
        try:
            return bool(contents) and hashes.of(table.paths[place])[:CONTENT_LETTERS] in contents
        except OSError:  # what becomes of it is told where it is read
            return False

    return np.array(map_threads(is_known, range(len(table))), dtype=bool)


def leaked_rows(diary: Diary, splits: Splits) -> NDArray[np.bool_]:
    """Mask of the test pictures that this run, or the earlier one its weights come from, has met in other splits."""
    if diary.leaked is None:
        diary.leaked = splits.leaked()
        earlier = _earlier_run(diary.earlier)
        if earlier:
            diary.leaked |= trained_on(earlier, splits.test)
    return diary.leaked


def _earlier_run(origin: object) -> Path | None:
    """What may be a run folder of what the weights come from: not a model, nor one of the two words."""
    return Path(origin) if isinstance(origin, (str, Path)) and origin not in ("hub", "none") else None


def write_plan(run: Run, plan: Recipe, pictures: Sequence[Sequence[str]], earlier: object = None) -> None:
    """What is going to be done, on which machine, and with which pictures, those of the run `earlier` included."""
    run.write_json("recipe.json", plan.to_dict())
    run.write_environment()
    run.write_csv("splits.csv", SPLIT_COLUMNS, pictures)
    folder = _earlier_run(earlier)
    if folder:
        with suppress(OSError, ValueError, KeyError, HeadstartError):  # no run: a weights file, or a model alone
            if met := _contents_met(folder):
                run.write_csv(EARLIER_PICTURES, (CONTENT,), [(content,) for content in sorted(met)])


def split_rows(bench: Bench) -> list[tuple[str, str, str, str]]:
    """Each picture's path, split, label, and the beginning of the hash of its bytes."""
    splits = bench.splits
    return [
        (path, name, splits.class_names[label], content[:CONTENT_LETTERS])
        for name, table in _tables(splits)
        for path, label, content in zip(
            table.names_from(splits.train.root), table.labels, bench.contents(table), strict=True
        )
    ]


def _tables(splits: Splits) -> tuple[tuple[str, ImageTable], ...]:
    return ("train", splits.train), ("val", splits.val), ("test", splits.test)


def finish(model: Classifier, bench: Bench, plan: Recipe, diary: Diary, last: StageData) -> FitResult:
    """Score validation and test once with the final model, in float32, and write the run folder."""
    splits, exact = bench.splits, replace(bench.runtime, dtype=torch.float32)
    model.eval()  # in training mode a mere look at what it says would change a head's BatchNorm
    results: dict[str, Evaluation] = {}
    with diary.phase("evaluate"), ProgressBar(len(splits.test), "  evaluating", enabled=diary.show) as bar:
        if isinstance(last.val, PixelSource):
            results["val"] = bench.evaluate(model, "val")
        else:  # the frozen part has seen these pictures in float32 already
            with last.val.kernels(model, exact):
                logits = source_logits(model, last.val, indices=torch.arange(len(splits.val)), runtime=exact)
            results["val"] = Evaluation.from_logits(logits, splits.val)
        if len(splits.test):
            results["test"] = bench.evaluate(model, "test", advance=bar.advance)
    scores: dict[str, dict[str, Any] | None] = {name: result.metrics for name, result in results.items()}
    leaked = leaked_rows(diary, splits)
    if len(splits.test) and leaked.any():
        scores["test_without_leaks"] = results["test"].only(~leaked)
    metrics = scores | _facts(model, diary, splits)
    run = diary.run
    report_path, stopped = None, False
    if run:
        from .report import write_report

        with not_interrupted() as came:  # all is done but for the writing
            save(model, run.path)
            _write_predictions(run, results, splits.class_names, splits.train.root)
            run.write_json("metrics.json", metrics)
            with diary.phase("report"):
                write_report(run.path)
            run.forget_points()
            report_path = run.finish() / "report.html"
        stopped = bool(came)
    return FitResult(model, metrics, diary.history, splits, plan, run.path if run else None, report_path, stopped)


def _facts(model: Classifier, diary: Diary, splits: Splits, *, interrupted: bool = False) -> dict[str, Any]:
    names = splits.test.names_from(splits.train.root)
    return {
        "stages": diary.stages,
        "phases": diary.phases,
        "data": {
            "root": str(splits.train.root),
            **{f"n_{name}": len(table) for name, table in _tables(splits)},
            "class_counts": {
                name: dict(zip(splits.class_names, map(int, table.class_counts()), strict=True))
                for name, table in _tables(splits)
            },
            "bad_files": [[str(path), reason] for path, reason in splits.train.bad_files],
            "dropped": [[str(path), reason] for path, reason in splits.train.dropped],
            "sizes": input_sizes(splits.train.paths, model.spec.image_size),
            "leaked": [names[i] for i in np.flatnonzero(leaked_rows(diary, splits))],
            "doubtful_labels": diary.doubtful,
            "shared_groups": {group: list(names) for group, names in splits.shared_groups().items()},
        },
        "backbone": model.backbone_name or type(model.backbone).__name__,
        "weights": str(diary.earlier) if isinstance(diary.earlier, (str, Path)) else None,
        "from_run": None if diary.handover is None else asdict(diary.handover),
        "interrupted": interrupted,
    }


def _write_predictions(run: Run, results: dict[str, Evaluation], class_names: Sequence[str], root: Path) -> None:
    def rows() -> Iterator[list[str]]:
        for name, result in results.items():
            paths = result.table.names_from(root)
            for path, label, row in zip(paths, result.table.labels, result.probs, strict=True):
                pred = int(row.argmax())
                answer = class_names[label], class_names[pred], repr(float(row[pred]))
                yield [path, name, *answer, *map(repr, row.tolist())]

    header = ["path", "split", "label", "pred", "prob", *(f"p:{name}" for name in class_names)]
    run.write_csv("predictions.csv", header, rows())


def write_evaluation(folder: Run, run: str | Path, model: Classifier, scored: Evaluation, *, seen: int) -> Path:
    """Scores, predictions and a report of pictures that a saved model was asked about; returns the report.

    Args:
        folder: what `open_evaluation` made. run: where the model came from.
        seen: how many of the pictures that run had trained on, or had chosen its state by.
    """
    table = scored.table
    counts = dict(zip(table.class_names, map(int, table.class_counts()), strict=True))
    data = {
        "root": str(table.root), "n_test": len(table), "class_counts": {"test": counts},
        "bad_files": [[str(path), reason] for path, reason in table.bad_files],
        "dropped": [[str(path), reason] for path, reason in table.dropped],
    }  # fmt: skip
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder.path}: the folder cannot be made ({error}). Choose another with --out."
        ) from None
    _write_predictions(folder, {"test": scored}, table.class_names, table.root)
    folder.write_json("metrics.json", {
        "test": scored.metrics, "data": data, "backbone": model.backbone_name or type(model.backbone).__name__,
        "evaluated": str(run), "seen": seen,
    })  # fmt: skip
    from .report import write_evaluation_report

    return write_evaluation_report(folder.path)


def leave_usable(model: Classifier, diary: Diary, splits: Splits) -> str:
    """Write what there is after Ctrl-C or an error, and say how to go on."""
    run = diary.run
    if run is None:
        return "The model is in its best state so far; it is the exception's `model`."
    from .report import write_report

    model.eval()
    save(model, run.path)
    run.write_json("metrics.json", _facts(model, diary, splits, interrupted=True))
    write_report(run.path)
    replaces = run.path != run.target
    path = run.path if replaces else run.finish()
    quoted = shlex.quote(str(path))
    lines = [f"{path} holds the best state so far, not yet scored on the test split."]
    if replaces:
        lines.append(f"The older run {run.target} is as it was.")
    lines += [f"Score it:    headstart evaluate {quoted} FOLDER", f"Use it:      headstart predict {quoted} FILES"]
    if model.backbone_name and model.head_spec:
        lines.append(f"Train on:    headstart fit PHOTOS --from-run {quoted} --out NEW_RUN")
    return "\n".join([*lines, *how_to_go_on(run, path)])


def how_to_go_on(run: Run, path: Path) -> list[str]:
    """The line that says how, where the run, which lies in `path`, has a point to go on from."""
    if not has_points(path):
        return []
    instead = " in place of --overwrite" if path != run.target else ""
    return [f"Go on:       the same command with --out {shlex.quote(str(path))} --resume{instead}"]


@contextmanager
def not_interrupted() -> Iterator[list[int]]:
    """Ctrl-C, and SIGTERM where it is taken as one, must not tear what is saved: the signals that came meanwhile."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    taken = [
        sign
        for sign, handler in before.items()
        if handler is not None and (sign == signal.SIGINT or handler is signal.default_int_handler)
    ]
    for sign in taken:
        signal.signal(sign, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for sign in taken:
            signal.signal(sign, before[sign])
