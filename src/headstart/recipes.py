"""The user's verbs: short functions that compose the rooms, read from top to bottom."""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import train as training
from .auditing import look_at_labels
from .bench import Bench, Data, find_data, make_bench, require_validation
from .checkpoint import load, save
from .classifier import Classifier, create_classifier
from .dataset import ImageTable, Splits, load_images
from .errors import HeadstartError, Interrupted, ModelError, RecipeError
from .evaluation import Evaluation, evaluate, predict_probs, source_logits, tta_views
from .features import FeatureSource, PixelSource, StageData, place_source
from .freezing import set_freeze_line
from .handover import Handover, change_classes
from .harm import single_changes, transform_costs
from .mixing import check_mixing
from .pixels import Augment, Pixels
from .recipe import FINE_TUNE_STAGE, POLICIES, RECIPES, AugmentSpec, HeadSpec, Recipe, Stage, load_recipe
from .run import Run, check_run_path, environment, open_run, read_csv
from .runtime import Runtime, make_runtime
from .sizes import input_sizes
from .terminal import ProgressBar, duration, say
from .train import Progress, StageResult
from .transforms import DataSpec


@dataclass
class FitResult:
    """What `fine_tune` returns: the model in its best state, and what the run folder holds."""

    model: Classifier
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    splits: Splits
    recipe: Recipe
    run_path: Path | None
    report_path: Path | None


@dataclass
class _Diary:
    """What a run writes down as it goes: history records, stages, and the seconds of each phase."""

    run: Run | None
    show: bool
    history: list[dict[str, Any]] = field(default_factory=list)
    listener: training.Log | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    earlier: str | Path | Classifier | None = None
    """What the weights come from; a run folder tells which pictures they have been trained on."""
    handover: Handover | None = None
    """What the head took over from an earlier run; None where it is a new one."""
    doubtful: list[str] | None = None
    """Files whose label may be wrong; None where labels were not looked at."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append({"name": name, "seconds": time.perf_counter() - started})

    def log(self, record: dict[str, Any]) -> None:
        record = {**record, "stage_index": len(self.stages)}
        self.history.append(record)
        if self.run:
            self.run.append_history(record)
        if record["event"]:
            say(record["event"]["message"], enabled=self.show)
        if self.listener:
            self.listener(record)


def fine_tune(
    data: Data | Bench,
    *,
    backbone: str | nn.Module = "mobilenetv2_100",
    weights: str | Path | None = None,
    from_run: str | Path | Classifier | None = None,
    out: str | Path | None = None,
    recipe: str | Path | Recipe = "fine-tune",
    head: HeadSpec | nn.Module | None = None,
    data_spec: DataSpec | None = None,
    spec_overrides: dict[str, Any] | None = None,
    augment: Augment | None = None,
    val: float = 0.15,
    test: float = 0.15,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
    bad_files: str = "error",
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    cache: bool = True,
    audit: bool = True,
    progress: bool = False,
    log: training.Log | None = None,
) -> FitResult:
    """Pictures in, a fine-tuned classifier out.

    Reads and checks the pictures, splits them, puts a new head on the backbone, trains the recipe's stages (by
    default the head on the frozen backbone, then most of it too at a rate 100 times smaller), keeps the best state by
    validation score and scores the test split once, at the end.

    Args:
        data: pictures as `load_images` takes them, an `ImageTable`, `Splits` made beforehand, a pair of pictures
            and labels in memory (see `images_from_arrays`), or a `Bench`, which brings its own machine (device,
            precision, workers) and shares work between runs.
        backbone: a timm name, or any module together with `data_spec`.
        weights: `hub`, `none`, a weights file, or a run folder of this program; None is `hub`, or `none` where the
            recipe trains from scratch.
        from_run: go on from this run's whole model: backbone, preprocessing and head. Its head keeps what it knows
            of the classes that the pictures have, by name, and gets rows for new ones; see `change_classes`.
        out: the run folder to write; None writes nothing.
        recipe: a recipe's name, a JSON file, or a `Recipe`.
        head, augment: replace the recipe's; a head module or a torchvision v2 transform of your own is not saved
            in the recipe.
        spec_overrides: image_size, mean, std, interpolation, crop_pct, fit in place of the backbone's own.
        val, test: shares held out where the data bring no such split.
        root: the folder that a manifest's relative paths start from.
        bad_files: `error` names every unreadable file and stops; `skip` leaves them out and lists them in the report.
        device, precision, workers: see `make_runtime`.
        limit: use this many pictures only, class by class: a dry run.
        cache: keep decoded pictures in the cache folder (see `headstart cache`), and use those kept before.
        audit: look at the pictures first: what is found is in the report, and copies of one picture stay on one side of
            the split. A stage on the frozen backbone then shows doubtful labels, too, where cleanlab is installed.
        progress: bars and a line for each step on standard error.
        log: called with each history record; what it raises ends the run.
    Raises:
        HeadstartError: one of its leaves, with what to do; nothing is left behind unless training had begun.
        Interrupted: stopped by hand during training; the run folder holds the best state so far.
    """
    runtime = (
        data.runtime if isinstance(data, Bench) else make_runtime(device=device, precision=precision, workers=workers)
    )
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(head, HeadSpec):
        plan = replace(plan, head=head)
    if from_run is not None:
        _refuse_beside_from_run(plan, weights=weights, head=head, data_spec=data_spec, spec_overrides=spec_overrides)
    else:
        weights = weights_of(plan, weights)
    if out is not None and runtime.is_main:
        check_run_path(out, overwrite=overwrite)
    origin = weights if from_run is None else from_run
    diary = _Diary(None, progress and runtime.is_main, listener=log, earlier=origin)
    try:
        with diary.phase("list pictures"):
            found = data.splits if isinstance(data, Bench) else find_data(
                data, seed=plan.seed, val_folder=val_folder, test_folder=test_folder, root=root, limit=limit
            )  # fmt: skip
        with diary.phase("load backbone"):
            if from_run is not None:
                model, plan = _go_on_from(from_run, found.class_names, plan, diary)
            else:
                model = create_classifier(
                    backbone, found.class_names, head=plan.head if not isinstance(head, nn.Module) else head,
                    weights=str(weights), data_spec=data_spec, drop_rate=plan.drop_rate,
                    drop_path_rate=plan.drop_path_rate, seed=plan.seed, **(spec_overrides or {}),
                )  # fmt: skip
            model.to(runtime.device)
        for stage in plan.stages:  # a line that selects nothing is found before hours are spent in front of it
            check_mixing(stage, set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm))
        with diary.phase("read pictures"):  # the check decodes them to what this backbone needs
            bench = data if isinstance(data, Bench) else make_bench(
                found, runtime=runtime, seed=plan.seed, val=val, test=test, bad_files=bad_files, spec=model.spec,
                check=not isinstance(data, (ImageTable, Splits)), share=False, cache=cache, audit=audit,
                progress=progress,
            )  # fmt: skip
        splits = bench.splits
        _say_seen(diary, splits)
    except KeyboardInterrupt:
        raise Interrupted("Stopped before training began; nothing was written.") from None
    if out is not None and runtime.is_main:
        diary.run = open_run(out, overwrite=overwrite)
        _write_plan(diary.run, plan, splits)
        if bench.audit is not None:
            diary.run.write_json("audit.json", bench.audit.to_dict())
    try:
        trainset = bench.pixels("train", model.spec, augment=augment or plan.augment_spec, seed=plan.seed)
        valset = bench.pixels("val", model.spec)
        for stage in plan.stages:
            source = _run_stage(model, trainset, valset, stage, plan, diary, bench)
            _look_at_labels(source, diary, bench)
        return _finish(model, bench, plan, diary, source)
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped by hand. {_leave_usable(model, diary, splits)}", model) from None
    except Exception as error:
        if diary.run is None:
            raise
        if not diary.stages:
            diary.run.discard()  # nothing has been trained: nothing is lost, and the same command can be given again
        elif isinstance(error, HeadstartError):
            raise type(error)(f"{error}\n{_leave_usable(model, diary, splits)}") from error
        else:
            _leave_usable(model, diary, splits)
        raise


def fit(
    model: Classifier,
    splits: Splits,
    stage: Stage | None = None,
    *,
    lr: float | None = None,
    augment: str | Augment = "photo",
    seed: int = 0,
    runtime: Runtime | None = None,
    starts_trained: bool = False,
    log: training.Log | None = None,
    cache: bool = True,
    progress: bool = False,
) -> StageResult:
    """Train one stage from where the freeze line stands; the model ends in its best state by validation score.

    Args:
        stage: lengths and rates; its freeze line must be where the model's stands. None takes the default head
            stage with the line at `head`, and the default fine-tuning stage elsewhere.
        lr: the stage's learning rate; None is the default nominal head rate times the stage's `lr_scale`.
        augment: a policy's name, an `AugmentSpec` or a torchvision v2 transform.
        starts_trained: the head was trained before; a collapse in the first steps is then caught and rolled back.
        cache: as in `fine_tune`.
    Raises:
        ModelError: the stage's line is not the model's.
    """
    runtime = runtime or make_runtime()
    line = model.freeze_line
    require_validation(splits)
    if stage is None:  # the head's own stage, or the careful one where the backbone is trained too
        where, batchnorm = (line.where, line.batchnorm) if line else ("all", "fixed")
        stage = replace(Stage() if where == "head" else FINE_TUNE_STAGE, freeze_line=where, batchnorm=batchnorm)
    if line is None:
        line = set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    if (stage.freeze_line, stage.batchnorm) != (line.where, line.batchnorm):
        raise ModelError(
            f"Stage {stage.name!r} has its freeze line at {stage.freeze_line!r} (batchnorm {stage.batchnorm}), the"
            f" model's stands at {line.where!r} (batchnorm {line.batchnorm}). Call set_freeze_line(model,"
            f" {stage.freeze_line!r}, batchnorm={stage.batchnorm!r}) first."
        )
    model.to(runtime.device)
    policy = POLICIES[augment] if isinstance(augment, str) else augment
    bench = Bench(splits, runtime, cache=cache, progress=progress and runtime.is_main)
    return _train(
        model, bench.pixels("train", model.spec, augment=policy, seed=seed), bench.pixels("val", model.spec), stage,
        bench=bench, show=progress, plan=Recipe(seed=seed), starts_trained=starts_trained,
        lr=lr if lr is not None else RECIPES["fine-tune"].lr * stage.lr_scale, log=log,
    ).result  # fmt: skip


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
    progress: bool = False,
) -> dict[str, Any]:
    """Score a saved model on a folder or manifest of labelled pictures: the figures of `metrics.json`, per split.

    With `tta` (see `tta_views`) the probabilities are means over several views of each picture.
    """
    views = len(tta_views(tta))
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    table = load_images(folder, root=root, bad_files=bad_files, class_names=model.class_names, workers=runtime.workers)
    seen = int(_trained_on(Path(run), table).sum())
    if seen:
        say(
            f"{seen:,} of these {len(table):,} pictures were trained on or chose the model: the figure is too good.",
            enabled=True,
        )
    with ProgressBar(len(table) * views, "Evaluating", enabled=progress) as bar:
        return evaluate(model, table, tta=tta, runtime=runtime, advance=bar.advance).metrics


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
    """
    plan = load_recipe(Path(run) / "recipe.json") if augment is None else None
    augment = plan.augment_spec if plan else augment
    assert augment is not None
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device)
    table = load_images(folder, root=root, bad_files=bad_files, class_names=model.class_names, workers=runtime.workers)
    with ProgressBar(len(table) * (1 + len(single_changes(augment))), "Trying changes", enabled=progress) as bar:
        return transform_costs(model, table, augment, runtime=runtime, advance=bar.advance)


def predict_files(
    run: str | Path | Classifier,
    paths: Sequence[str | Path],
    *,
    tta: str | int = "none",
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Predict pictures with a saved model.

    Args:
        tta: average over several views of each picture; see `tta_views`.

    Returns:
        One dict per picture in the order given: `path`, `pred`, `prob`, and `probs` {class name: probability}.
    Raises:
        DataError: a file cannot be read.
    """
    views = len(tta_views(tta))
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = run.to(runtime.device) if isinstance(run, Classifier) else load(run, device=runtime.device)
    files = tuple(Path(path) for path in paths)
    table = ImageTable(
        root=Path.cwd(),
        paths=files,
        labels=np.zeros(len(files), dtype=np.int64),
        class_names=model.class_names,
        split_names=("",) * len(files),
    )
    pixels = Pixels(table, model.spec, workers=runtime.workers, cache_bytes=0)
    with ProgressBar(len(files) * views, "Predicting", enabled=progress) as bar:
        probs = predict_probs(model, pixels, tta=tta, runtime=runtime, advance=bar.advance)
    return [
        {
            "path": str(path),
            "pred": model.class_names[row.argmax()],
            "prob": float(row.max()),
            "probs": {name: float(p) for name, p in zip(model.class_names, row, strict=True)},
        }
        for path, row in zip(paths, probs, strict=True)
    ]


def _trained_on(run: Path, table: ImageTable) -> NDArray[np.bool_]:
    """Mask of the files that stand in the run's train or validation split, in the folder it was trained on."""
    try:
        root = json.loads((run / "metrics.json").read_bytes())["data"]["root"]
        used = {str(Path(root) / row["path"]) for row in read_csv(run / "splits.csv") if row["split"] != "test"}
    except (OSError, ValueError, KeyError, TypeError, HeadstartError):
        used = set()  # a folder `save` wrote holds the model alone
    return np.array([str(path) in used for path in table.paths], dtype=bool)


def _leaked(diary: _Diary, splits: Splits) -> NDArray[np.bool_]:
    """Mask of the test pictures that this run, or the earlier one its weights come from, has met in other splits."""
    leaked = splits.leaked()
    known = isinstance(diary.earlier, (str, Path))
    return leaked | _trained_on(Path(diary.earlier), splits.test) if known else leaked  # type: ignore[arg-type]


def _say_seen(diary: _Diary, splits: Splits) -> None:
    seen = int(_leaked(diary, splits).sum() - splits.leaked().sum())
    if seen:
        say(
            f"{seen:,} of the {len(splits.test):,} test pictures were trained on or chose the state in the earlier run;"
            " the test split is scored with and without them.",
            enabled=diary.show,
        )


def _refuse_beside_from_run(plan: Recipe, **given: object) -> None:
    idle = [name for name, value in given.items() if value]
    if idle:
        raise RecipeError(
            f"{', '.join(idle)}: without effect beside from_run, which brings its own backbone, preprocessing and head."
            " Leave it out; for a new head on an earlier backbone give the run as weights instead."
        )
    if not plan.pretrained:
        raise RecipeError(
            f"Recipe {plan.name!r} starts from random weights, but from_run is given. Choose another recipe."
        )


def _go_on_from(
    earlier: str | Path | Classifier, class_names: Sequence[str], plan: Recipe, diary: _Diary
) -> tuple[Classifier, Recipe]:
    """The earlier model for these classes, and the recipe as it is then: with that model's head and dropout."""
    model = earlier if isinstance(earlier, Classifier) else load(earlier)
    model, diary.handover = change_classes(model, class_names, seed=plan.seed)
    own: dict[str, Any] = {"head": model.head_spec or HeadSpec()}
    own |= {name: model.backbone_args.get(name, 0.0) for name in ("drop_rate", "drop_path_rate")}
    for name, value in own.items():
        asked = getattr(plan, name)
        if asked not in (value, getattr(Recipe(), name)):
            raise RecipeError(f"{name} is {asked}, but from_run was built with {value}. Leave it out.")
    where = "the model given" if isinstance(earlier, Classifier) else str(earlier)
    say(f"Going on from {where}: {diary.handover.describe()}.", enabled=diary.show)
    return model, replace(plan, **own)


def weights_of(plan: Recipe, weights: str | Path | None) -> str | Path:
    if weights is None:
        return "hub" if plan.pretrained else "none"
    if not plan.pretrained and str(weights) != "none":
        raise RecipeError(
            f"Recipe {plan.name!r} starts from random weights, but weights are given ({weights}). Leave them out, or"
            " choose another recipe."
        )
    return weights


def _run_stage(
    model: Classifier, trainset: Pixels, valset: Pixels, stage: Stage, plan: Recipe, diary: _Diary, bench: Bench
) -> StageData:
    line = set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    say(f"Stage {stage.name}: {line.describe()}", enabled=diary.show)
    started = time.perf_counter()
    with diary.phase(f"stage {stage.name}"):
        done = _train(
            model, trainset, valset, stage, bench=bench, show=diary.show, plan=plan,
            starts_trained=bool(diary.stages or diary.handover), lr=plan.lr * stage.lr_scale, log=diary.log,
        )  # fmt: skip
    result, seconds = done.result, time.perf_counter() - started
    best = result.best
    shared = f", {duration(done.shared_seconds)} of work shared with an earlier run" if done.shared_seconds else ""
    say(
        f"  best epoch {result.best_epoch}: val loss {best.loss:.4f}, accuracy {best.accuracy:.4f}"
        f" ({duration(seconds)}{shared})",
        enabled=diary.show,
    )
    diary.stages.append(
        {
            "name": stage.name,
            "seconds": seconds,
            "shared_seconds": done.shared_seconds,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "best_val_loss": best.loss,
            "best_val_accuracy": best.accuracy,
            "freeze_line": stage.freeze_line,
            "batchnorm": stage.batchnorm,
            "trainable_parameters": line.trainable_parameters,
            "frozen_parameters": line.frozen_parameters,
            "trained": list(line.trained),
            "lr": result.lr,
            "views": None if isinstance(done.source.train, PixelSource) else done.source.train.num_views,
            "events": result.events,
        }
    )
    return done.source


def _look_at_labels(source: StageData, diary: _Diary, bench: Bench) -> None:
    """Doubtful labels from the features that the first stage on the frozen backbone has stored; nothing is run again.

    Runs that share a bench leave it out: each would say the same of the same pictures.
    """
    parts = (source.train, source.val)
    stored = [part.features[:, 0].numpy() for part in parts if isinstance(part, FeatureSource)]
    if bench.audit is None or bench.share or "labels" in bench.audit.seconds or not stored or not bench.runtime.is_main:
        return
    with diary.phase("look at labels"):
        bench.audit = look_at_labels(bench.audit, bench.splits, np.concatenate(stored).astype(np.float64))
    if bench.audit.doubtful is not None:
        diary.doubtful = [one.file for one in bench.audit.doubtful if one.flagged]
    for one in bench.audit.of_kind("doubtful-labels"):
        say(f"{one.severity.capitalize()}: {one.title} {one.advice}", enabled=diary.show)
    if diary.run:
        diary.run.write_json("audit.json", bench.audit.to_dict())


@dataclass(frozen=True)
class _Trained:
    """What a stage came to, what it was fed with, and the seconds an earlier run spent on work that it shared."""

    result: StageResult
    source: StageData
    shared_seconds: float


def _train(
    model: Classifier,
    trainset: Pixels,
    valset: Pixels,
    stage: Stage,
    *,
    lr: float,
    plan: Recipe,
    bench: Bench,
    starts_trained: bool,
    show: bool,
    log: training.Log | None,
) -> _Trained:
    """Make the source that the freeze line calls for, then run the loop, each with its bar, or recall an equal stage.

    `plan` gives the seed, and what a shared stage is told apart by.
    """
    key = bench.stage_key(model, stage, plan, trainset)
    place = place_source(trainset, valset, model, views=stage.views, runtime=bench.runtime)
    if place.why:
        say(f"  {place.why}", enabled=show)
    with ProgressBar(place.passes, "  frozen backbone", enabled=show and bool(place.passes)) as bar:
        source, shared = bench.source(trainset, valset, model, place, advance=bar.advance)
    if stage.mixup and not isinstance(source.train, PixelSource):
        say("  mixup blends what the frozen layers made of the pictures, which is stored, not pixels", enabled=show)
    recalled = bench.recall(key, model)
    if recalled:
        result, seconds = recalled
        for record in result.history if log else ():
            log(record)  # type: ignore[misc]
        return _Trained(result, source, shared + seconds)
    with ProgressBar(len(trainset) * stage.epochs, f"  {stage.name}", enabled=show) as bar:
        result = training.fit(
            model, source, stage, lr=lr, seed=plan.seed, runtime=bench.runtime, starts_trained=starts_trained,
            log=log, report=_to_bar(bar),
        )  # fmt: skip
    bench.keep(key, model, result, seconds=result.seconds)
    return _Trained(result, source, shared)


def _to_bar(bar: ProgressBar) -> Callable[[Progress], None]:
    seen = 0

    def show(at: Progress) -> None:
        nonlocal seen
        if at.pictures >= seen:  # after a roll-back the count starts again: the bar waits
            bar.advance(at.pictures - seen)
            seen = at.pictures
        if at.val:
            bar.note(epoch=at.epoch, val_loss=f"{at.val.loss:.3f}", val_acc=f"{at.val.accuracy:.3f}")

    return show


def _write_plan(run: Run, plan: Recipe, splits: Splits) -> None:
    run.write_json("recipe.json", plan.to_dict())
    run.write_json("environment.json", environment())
    rows = [
        (path, name, splits.class_names[label])
        for name, table in _tables(splits)
        for path, label in zip(table.relative_paths, table.labels, strict=True)
    ]
    run.write_csv("splits.csv", ("path", "split", "label"), rows)


def _tables(splits: Splits) -> tuple[tuple[str, ImageTable], ...]:
    return ("train", splits.train), ("val", splits.val), ("test", splits.test)


def _finish(model: Classifier, bench: Bench, plan: Recipe, diary: _Diary, last: StageData) -> FitResult:
    """Score validation and test once with the final model, in float32, and write the run folder."""
    splits, exact = bench.splits, replace(bench.runtime, dtype=torch.float32)
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
    leaked = _leaked(diary, splits)
    if len(splits.test) and leaked.any():
        scores["test_without_leaks"] = results["test"].only(~leaked)
    metrics = scores | _facts(model, diary, splits)
    run = diary.run
    report_path = None
    if run:
        save(model, run.path)
        run.write_csv(*_predictions(results, splits.class_names))
        run.write_json("metrics.json", metrics)
        with diary.phase("report"):
            from .report import write_report

            write_report(run.path)
        report_path = run.finish() / "report.html"
    return FitResult(model, metrics, diary.history, splits, plan, run.path if run else None, report_path)


def _facts(model: Classifier, diary: _Diary, splits: Splits, *, interrupted: bool = False) -> dict[str, Any]:
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
            "leaked": [splits.test.relative_paths[i] for i in np.flatnonzero(_leaked(diary, splits))],
            "doubtful_labels": diary.doubtful,
            "shared_groups": {group: list(names) for group, names in splits.shared_groups().items()},
        },
        "backbone": model.backbone_name or type(model.backbone).__name__,
        "from_run": None if diary.handover is None else asdict(diary.handover),
        "interrupted": interrupted,
    }


def _predictions(results: dict[str, Evaluation], class_names: Sequence[str]) -> tuple[str, list[str], list[list[Any]]]:
    header = ["path", "split", "label", "pred", "prob", *(f"p:{name}" for name in class_names)]
    rows = []
    for name, result in results.items():
        for path, label, row in zip(result.table.relative_paths, result.table.labels, result.probs, strict=True):
            pred = int(row.argmax())
            rows.append(
                [path, name, class_names[label], class_names[pred], repr(float(row[pred])), *map(repr, map(float, row))]
            )
    return "predictions.csv", header, rows


def _leave_usable(model: Classifier, diary: _Diary, splits: Splits) -> str:
    """Write what there is after Ctrl-C or an error, and say how to go on."""
    run = diary.run
    if run is None:
        return "The model is in its best state so far; it is the exception's `model`."
    from .report import write_report

    with _not_interrupted():
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
    return "\n".join(lines)


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """A second Ctrl-C must not tear what the first one saves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
