"""One stage of a recipe: the line set, the source made, the loop run with its bar, the outcome written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from . import train as training
from .audit_sheet import finding_line
from .auditing import for_labels, look_at_labels
from .bench import Bench
from .cautions import untrained_head
from .classifier import Classifier
from .cut import Cut
from .diary import Diary
from .features import FeatureSource, PixelSource, Placement, StageData, place_source
from .freezing import set_freeze_line
from .metrics import paired_difference
from .pixels import Pixels
from .points import Keeper
from .recipe import Recipe, Stage
from .stage_result import Log, Progress, StageResult
from .terminal import ProgressBar, duration, file_size, say


def run_stage(
    model: Classifier, trainset: Pixels, valset: Pixels, stage: Stage, plan: Recipe, diary: Diary, bench: Bench,
    keeper: Keeper,
) -> StageData:  # fmt: skip
    line = set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    say(f"Stage {stage.name}: {line.describe()}", enabled=diary.show)
    starts_trained = bool(diary.stages or diary.handover)
    if line.trained and len(plan.stages) > 1 and not starts_trained and str(diary.earlier) != "none":
        lines = [one.freeze_line for one in plan.stages]
        say(f"  {untrained_head(stage.name, len(line.trained), lines)}", enabled=diary.show)
    before = keeper.begun.values["course"]["seconds"] if keeper.begun else 0.0
    if keeper.begun:
        epoch = keeper.begun.values["course"]["epoch"]
        say(f"  goes on behind epoch {epoch} of {stage.epochs}", enabled=diary.show)
    started = time.perf_counter() - before
    with diary.phase(f"stage {stage.name}", before=before):
        done = train_stage(
            model, trainset, valset, stage, bench=bench, show=diary.show, plan=plan,
            starts_trained=starts_trained, lr=plan.lr * stage.lr_scale, log=diary.log,
            following=dict(pairwise(plan.stages)).get(stage), keeper=keeper,
        )  # fmt: skip
    result, seconds = done.result, time.perf_counter() - started
    best, which = result.best, "last" if stage.select == "last" else "best"
    shared = f", {duration(done.shared_seconds)} of work shared with an earlier run" if done.shared_seconds else ""
    say(
        f"  {which} epoch {result.best_epoch}: val loss {best.loss:.4f}, accuracy {best.accuracy:.4f}"
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
            "val_change": _change(best.right, diary.right),
            "freeze_line": stage.freeze_line,
            "batchnorm": stage.batchnorm,
            "trainable_parameters": line.trainable_parameters,
            "frozen_parameters": line.frozen_parameters,
            "trained": list(line.trained),
            "lr": result.lr,
            "views": None if isinstance(done.source.train, PixelSource) else done.source.train.num_views,
            "events": [*bench.runtime.portion.take(), *result.events],
        }
    )
    diary.right = best.right
    return done.source


def _change(now: NDArray[np.bool_] | None, before: NDArray[np.bool_] | None) -> dict[str, float] | None:
    """What a stage changed on the validation pictures, as `paired_difference` tells it; None for the first stage."""
    return None if now is None or before is None else paired_difference(now, before)


def look_at_stored_labels(source: StageData, diary: Diary, bench: Bench) -> None:
    """Doubtful labels from the features that the first stage on the frozen backbone has stored; nothing is run again.

    Runs that share a bench leave it out: each would say the same of the same pictures.
    """
    parts = (source.train, source.val)
    stored = [part.features[:, 0].numpy() for part in parts if isinstance(part, FeatureSource)]
    if bench.audit is None or bench.share or "labels" in bench.audit.seconds or not stored or not bench.runtime.is_main:
        return
    with diary.phase("look at labels"):
        bench.audit = look_at_labels(bench.audit, bench.splits, for_labels(stored))
    if bench.audit.doubtful is not None:
        diary.doubtful = [one.file for one in bench.audit.doubtful if one.flagged]
    for one in (*bench.audit.of_kind("doubtful-labels"), *bench.audit.of_kind("labels-unjudged")):
        say(finding_line(one), enabled=diary.show)
    if diary.run:
        diary.run.write_json("audit.json", bench.audit.to_dict())


@dataclass(frozen=True)
class Trained:
    """What a stage came to, what it was fed with, and the seconds an earlier run spent on work that it shared."""

    result: StageResult
    source: StageData
    shared_seconds: float


def train_stage(
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
    log: Log | None,
    following: Stage | None = None,
    keeper: Keeper | None = None,
) -> Trained:
    """Make the source that the freeze line calls for, then run the loop, each with its bar, or recall an equal stage.

    `plan` gives the seed, and what a shared stage is told apart by. `following` is the stage that comes next.
    """
    key = bench.stage_key(model, stage, plan, trainset)
    place = _placed(model, trainset, valset, stage, bench, keeper, show=show)
    if place.why:
        say(f"  {place.why}", enabled=show)
    aside = None
    if following and model.backbone_is_frozen and (following.views >= stage.views or not trainset.is_augmented):
        aside = cache(partial(_cut_of, following, model, trainset, valset, stage, bench))
    with ProgressBar(place.passes, "  frozen backbone", enabled=show and bool(place.passes)) as bar:
        source, shared = bench.source(trainset, valset, model, place, advance=bar.advance, aside=aside)
    if stage.mixup and not isinstance(source.train, PixelSource):
        say("  mixup blends what the frozen layers made of the pictures, which is stored, not pixels", enabled=show)
    begun = bool(keeper and keeper.begun)
    recalled = None if begun else bench.recall(key, model)
    if recalled:
        result, seconds = recalled
        for record in result.history if log else ():
            log(record)  # type: ignore[misc]
        return Trained(result, source, shared + seconds)
    with ProgressBar(len(trainset) * stage.epochs, f"  {stage.name}", enabled=show) as bar:
        result = training.fit(
            model, source, stage, lr=lr, seed=plan.seed, runtime=bench.runtime, starts_trained=starts_trained,
            log=log, report=_to_bar(bar), keeper=keeper,
        )  # fmt: skip
    if not begun:  # its key is of the state that it began in
        bench.keep(key, model, result, seconds=result.seconds)
    return Trained(result, source, shared)


def _placed(
    model: Classifier, trainset: Pixels, valset: Pixels, stage: Stage, bench: Bench, keeper: Keeper | None, *,
    show: bool,
) -> Placement:  # fmt: skip
    """Where a stage is fed from: one that goes on, from where it was before if that has room; its bits hang on it."""
    find = partial(place_source, trainset, valset, model, views=stage.views, runtime=bench.runtime)
    place = find()
    budget = keeper.begun.values.get("budget", place.budget) if keeper and keeper.begun else place.budget
    if budget != place.budget:
        before = find(budget_bytes=budget * bench.runtime.world)
        if before.nbytes <= place.budget:
            place = before
        else:
            say(
                f"Going on, but not to the same bits: {file_size(before.nbytes)} of activations were stored, and"
                f" {file_size(place.budget)} may be now (HEADSTART_CACHE_LIMIT, free disk, free memory).",
                enabled=show,
            )
    if keeper:
        keeper.budget = place.budget
    return place


def source_behind(
    model: Classifier, trainset: Pixels, valset: Pixels, stage: Stage, bench: Bench, *, show: bool
) -> StageData:
    """What a stage is fed with, for one that is done and is scored, or whose rates are tried."""
    set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    place = place_source(trainset, valset, model, views=stage.views, runtime=bench.runtime)
    with ProgressBar(place.passes, "  frozen backbone", enabled=show and bool(place.passes)) as bar:
        return bench.source(trainset, valset, model, place, advance=bar.advance)[0]


def _cut_of(
    following: Stage, model: Classifier, trainset: Pixels, valset: Pixels, stage: Stage, bench: Bench
) -> Cut | None:
    """Where the next stage cuts the backbone, if it does; the line then stands where this stage has it."""
    set_freeze_line(model, following.freeze_line, batchnorm=following.batchnorm)
    try:
        return place_source(trainset, valset, model, views=following.views, runtime=bench.runtime).cut
    finally:
        set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)


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
