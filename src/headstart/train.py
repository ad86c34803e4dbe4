"""The one training loop: it is fed by a source of batches and does not care whether those are pixels or features."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .alarm import CollapseError, make_alarm
from .attempt import Attempt
from .averaging import Candidate, State, best_mixture, restore, snapshot, trained_tensors
from .classifier import Classifier
from .course import Course, course_of
from .errors import ModelError
from .evaluation import Score
from .features import FeatureSource, StageData
from .freezing import is_batchnorm, learns_statistics
from .linear import set_ridge
from .memory import Portion
from .points import Keeper, Point
from .recipe import Stage
from .runtime import Runtime
from .schedule import in_numbers, learning_rate
from .stage_result import Log, Progress, Record, Report, StageResult

RETRY_DIVISOR = 10.0
SAME_LOSS = 0.01  # a tenth of the rate that leads to the same loss, to 1 %, shows that the rate is not its cause
MAX_RETRIES = 3


def fit(
    model: Classifier,
    data: StageData,
    stage: Stage,
    *,
    lr: float,
    seed: int = 0,
    runtime: Runtime,
    starts_trained: bool = False,
    log: Log | None = None,
    report: Report | None = None,
    keeper: Keeper | None = None,
) -> StageResult:
    """Train what stands behind the freeze line and leave the model in its best state by validation score.

    The freeze line must have been set. The state the stage starts from takes part in the choice, so the result is
    never worse on validation than what it started from, unless `select` is `last`. A KeyboardInterrupt restores the
    best state so far and is raised again.

    Args:
        lr: the stage's learning rate, per optimiser step.
        seed: order, views and dropout are pure functions of (seed, epoch).
        starts_trained: the head has been trained before, so a collapse in the first steps can be told.
        log: called with each history record.
        report: called after every optimiser step.
        keeper: keeps points of the stage as it goes, and may have one from which it goes on, to the same bits.
    Raises:
        ModelError: the freeze contract was broken; a loss that is not finite under `on_collapse="ignore"` too.
    """
    asked, begun = lr, keeper.begun if keeper else None
    started = time.perf_counter() - (begun.values["course"]["seconds"] if begun else 0.0)
    everyone = runtime
    if isinstance(data.train, FeatureSource):
        # Each process has all rows, and a head is quicker computed from whole batches than talked about: as one does.
        runtime = runtime.alone()
    entry_state = snapshot(model)
    history: list[Record] = list(keeper.records) if keeper and begun else []
    events: list[Record] = [record["event"] for record in history if record.get("event")]

    def write(record: Record) -> None:
        history.append(record)
        if record.get("event"):
            events.append(record["event"])
        if log:
            log(record)

    watch = starts_trained and stage.on_collapse != "ignore"
    loss_before = math.inf
    finds_size, stage = stage.batch_size == "auto", in_numbers(stage)
    # BatchNorm that learns its statistics takes no variance from one picture.
    portion = Portion(least=2 if learns_statistics(model) else 1)
    first = 0
    if begun:
        runtime = _in_format(runtime, begun.values["attempt"]["dtype"])
        first, lr = begun.values["course"]["number"], begun.values["course"]["lr"]
    for attempt in range(first, MAX_RETRIES + 1):
        run = Attempt(model, data, stage, lr=lr, seed=seed, runtime=runtime, portion=portion)
        try:
            with data.train.kernels(model, runtime):
                if attempt == 0 and not begun:
                    run.gradients.keep_quicker_format()
                    runtime = run.runtime = run.gradients.runtime
                    if finds_size:
                        run.gradients.fit_to_memory()
                if begun:
                    course = _course_at(run, begun)
                    entry_state, watch, loss_before = course.start, course.watch, course.loss_before
                    begun = None
                else:
                    course = _begin(run, entry_state, watch=watch, write=write)
                    course.number, course.loss_before = attempt, loss_before
                best, epochs = _attempt(run, course, write=write, report=report, keeper=keeper, started=started)
            break
        except CollapseError as collapse:
            restore(model, entry_state)
            if abs(collapse.loss - loss_before) < SAME_LOSS * loss_before and attempt < MAX_RETRIES:
                lr, watch = lr * RETRY_DIVISOR, False
                learns = any(map(is_batchnorm, model.head.modules()))
                norm = ", but the head's BatchNorm, which is still learning its statistics" * learns
                message = (
                    f"The validation loss is {collapse.loss:.3f} at a tenth of the rate too: the rate is not what moves"
                    f" it{norm}. Going on at {lr:g} without the alarm."
                )
                write(_event_record(run, {"kind": "rollback", "message": message}))
                continue
            loss_before = collapse.loss
            give_up = stage.on_collapse == "stop" or attempt == MAX_RETRIES
            scale = stage.lr_scale * lr / asked
            then = (
                f"kept the state before it. To train this stage, lower its lr_scale below {scale:g}"
                if give_up
                else f"retrying at {lr / RETRY_DIVISOR:g}. To begin there, lower the stage's lr_scale from"
                f" {stage.lr_scale:g} to {scale / RETRY_DIVISOR:g}"
            )
            message = f"{collapse} Rolled back to the state the stage started from; {then}."
            write(_event_record(run, {"kind": "rollback", "message": message}))
            if give_up:
                best, epochs = Candidate(entry_state, run.score_val(), 0), 0
                break
            lr /= RETRY_DIVISOR
    everyone.follow_main(trained_tensors(model).values())  # the same already, unless processes compute differently
    seconds = time.perf_counter() - started
    return StageResult(replace(stage), lr, best.val, best.epoch, epochs, seconds, history, events)


def _in_format(runtime: Runtime, dtype: str) -> Runtime:
    """The runtime in the number format that a stage was begun in, where that was chosen by timing a step."""
    return replace(runtime, dtype=getattr(torch, dtype)) if runtime.times_formats else runtime


def _course_at(run: Attempt, point: Point) -> Course:
    """What the attempt had come to at a point; the model and the attempt are where they were there."""
    run.go_on(point)
    return course_of(
        point, run.stage, device=run.runtime.device, steps_per_epoch=run.steps_per_epoch,
        training=len(run.data.train.labels), validation=len(run.data.val.labels),
    )  # fmt: skip


def _begin(run: Attempt, entry_state: State, *, watch: bool, write: Log) -> Course:
    """What stands before the first step: the state that the stage starts from, scored, or a warm start."""
    model, stage = run.model, run.stage
    entry = Candidate(entry_state, run.score_val(), 0)
    if not math.isfinite(entry.val.loss) and not learns_statistics(model):  # statistics still to be learned may mend it
        raise ModelError(
            f"The validation loss is {entry.val.loss} before the first step: the backbone gives NaN or infinite"
            " features, or the head such logits. No rate mends that: look at the weights, and at what is computed."
        )
    alarm = None
    if watch:
        alarm = make_alarm(
            stage, run.lr, entry.val, run.score_val, steps_per_epoch=run.steps_per_epoch,
            training=len(run.data.train.labels), validation=len(run.data.val.labels),
        )  # fmt: skip
    started, event = time.perf_counter(), None
    if stage.warm_start == "ridge":
        try:
            entry, event = _ridge(run, entry)
        except BaseException:
            restore(model, entry_state)
            raise
    best = last = entry
    seconds = time.perf_counter() - started
    event = _joined([*run.gradients.portion.take(), *([event] if event else [])])
    write(_record(run, epoch=0, train_loss=None, val=entry.val, best=True, seconds=seconds, event=event))
    return Course(entry_state, entry, best, last, alarm, run.lr, watch, number=0, loss_before=math.inf)


def _attempt(
    run: Attempt, course: Course, *, write: Log, report: Report | None, keeper: Keeper | None, started: float
) -> tuple[Candidate, int]:
    """Train all epochs; returns the state that was kept, which the model then holds, and the epochs trained."""
    model, stage, alarm = run.model, run.stage, course.alarm
    epoch, stage_started = course.epoch, started

    def look(limit: int | None) -> Score:
        with run.in_shown_state():  # a running average forgives single steps, as it does in what is kept
            return run.score_val(limit)

    def after_step() -> None:
        if report:
            report(Progress(stage.name, epoch, run.step, run.steps, run.pictures, course.last.val))
        if alarm:
            alarm.within(epoch, run.step, look)
        if run.runtime.world == 1:  # random numbers are each process's own
            keep()

    def keep() -> None:
        if keeper and keeper.is_due and stage.optimizer != "lbfgs":  # which is done in seconds
            course.seconds = time.perf_counter() - stage_started
            values, tensors = course.point()
            own_values, own_tensors = run.point()
            keeper.write({**values, "attempt": own_values}, tensors | own_tensors)

    pool = ThreadPoolExecutor(run.runtime.workers, thread_name_prefix="headstart-batch")
    try:
        for epoch in range(course.epoch + 1, stage.epochs + 1 if not course.over else 0):
            started = time.perf_counter()
            train_loss = run.epoch(epoch, pool=pool, after_step=after_step)
            run.contract.watch()
            with run.in_shown_state():
                val = run.score_val()
                if not (math.isfinite(val.loss) and run.is_finite()):
                    _not_finite(run, course.watch, epoch)
                if alarm:
                    alarm.at_end(epoch, run.step, val)
                better = stage.select == "last" or _is_better(val, course.best.val, stage.select)
                course.last = Candidate(snapshot(model) if better or stage.wise else {}, val, epoch)
                course.best = course.last if better else course.best
                waited = epoch - course.best.epoch
                stop = bool(stage.early_stop) and waited >= stage.early_stop and epoch < stage.epochs
                happened = run.gradients.portion.take()
                if stop:
                    text = f"No better validation score for {stage.early_stop} epochs."
                    happened.append({"kind": "early-stop", "message": text})
                elif run.is_through and epoch < stage.epochs:
                    stop = True
                    text = f"L-BFGS has found the least loss after {epoch} epoch{'s' * (epoch > 1)}."
                    happened.append({"kind": "early-stop", "message": text})
                write(
                    _record(
                        run,
                        epoch=epoch,
                        train_loss=train_loss,
                        val=val,
                        best=better,
                        seconds=time.perf_counter() - started,
                        event=_joined(happened),
                    )
                )
            course.epoch, course.over = epoch, stop
            keep()
            if stop:
                break
        if stage.wise:
            course.best = _wise(run, course.entry, course.best, course.last, write)
    except BaseException:
        restore(model, course.best.state)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    restore(model, course.best.state)
    run.contract.finish()
    return course.best, epoch


def _joined(events: list[Record]) -> Record | None:
    """What happened as one event: the last one's kind, the words of all."""
    return {**events[-1], "message": " ".join(event["message"] for event in events)} if events else None


def _ridge(run: Attempt, entry: Candidate) -> tuple[Candidate, Record]:
    """The head in closed form, or what the stage was given where that is better; and what the history says of it."""
    train, val = run.data.train, run.data.val
    assert isinstance(train, FeatureSource)
    assert isinstance(val, FeatureSource)
    found = set_ridge(run.model, train, val)
    score = run.score_val()
    better = _is_better(score, entry.val, run.stage.select)
    start = Candidate(snapshot(run.model), score, 0) if better else entry
    restore(run.model, start.state)
    message = f"Ridge regression (penalty {found.penalty:.3g}) gives validation loss {score.loss:.4f}; the stage starts"
    message += f" from it, {entry.val.loss:.4f} before." if better else f" from {entry.val.loss:.4f}, which it had."
    return start, {"kind": "warm-start", "message": message}


def _wise(run: Attempt, entry: Candidate, best: Candidate, last: Candidate, write: Log) -> Candidate:
    """Mix what the stage started from with its best and its last state; the history says which share was kept.

    Its record stands behind the last epoch's with the next number, which keeps the numbers of an attempt growing; no
    such epoch is trained.
    """
    started = time.perf_counter()
    ends = [best] * (best.epoch > 0) + [last] * (last.epoch != best.epoch)
    kept = best_mixture(
        run.model,
        entry,
        ends,
        score=run.score_val,
        is_better=lambda new, old: _is_better(new, old, run.stage.select),
    )
    restore(run.model, kept.state)
    what = "the state the stage started from"
    if kept.epoch:
        way = "" if kept.share == 1 else f"{100 * kept.share:.0f} % of the way from the stage's start to "
        what = f"{way}the weights of epoch {kept.epoch}"
    message = f"Kept by validation: {what} (loss {kept.val.loss:.4f}, accuracy {kept.val.accuracy:.4f})."
    event = {"kind": "wise", "message": message, "alpha": kept.share if kept.epoch else 0.0, "epoch": kept.epoch}
    seconds = time.perf_counter() - started
    write(
        _record(
            run,
            epoch=last.epoch + 1,
            train_loss=None,
            val=kept.val,
            best=(kept.epoch, kept.share) != (best.epoch, best.share),
            seconds=seconds,
            event=event,
        )
    )
    return kept


def _not_finite(run: Attempt, watch: bool, epoch: int) -> None:
    text = f"A learning rate of {run.lr:g} drove the loss out of bounds in epoch {epoch} (not a finite number)."
    if watch:
        raise CollapseError(text, math.inf)
    raise ModelError(f"{text} Lower it: stage {run.stage.name!r}, --lr or --lr-scale.")


def _is_better(new: Score, old: Score, select: str) -> bool:
    if select == "accuracy":
        return (new.accuracy, -new.loss) > (old.accuracy, -old.loss)
    return new.loss < old.loss


def _record(
    run: Attempt,
    *,
    epoch: int,
    train_loss: float | None,
    val: Score,
    best: bool,
    seconds: float,
    event: Record | None = None,
) -> Record:
    last = max(0, run.step - 1)
    # L-BFGS finds the length of its steps itself: no schedule acts, and none may explain why a curve is flat.
    schedule = "constant" if run.stage.optimizer == "lbfgs" else run.stage.schedule
    rate = learning_rate(last, steps=run.steps, lr=run.lr, schedule=schedule, warmup=run.stage.warmup)
    return {
        "stage": run.stage.name,
        "epoch": epoch,
        "lr": rate,
        "train_loss": train_loss,
        "train": run.score_train().to_dict(),
        "val": val.to_dict(),
        "best": best,
        "seconds": seconds,
        "event": event,
    }


def _event_record(run: Attempt, event: Record) -> Record:
    """What stands in the history where a stage was rolled back: the restored state's scores and what happened."""
    return _record(run, epoch=0, train_loss=None, val=run.score_val(), best=False, seconds=0.0, event=event)
