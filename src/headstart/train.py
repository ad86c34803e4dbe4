"""The one training loop: it is fed by a source of batches and does not care whether those are pixels or features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from .alarm import CollapseError, make_alarm
from .averaging import Candidate, RunningAverage, State, best_mixture, restore, snapshot, trained_tensors
from .classifier import Classifier
from .errors import ModelError
from .evaluation import Score, score
from .features import FeatureSource, StageData
from .freezing import Contract, learns_statistics
from .gradients import Batch, Gradients
from .linear import check_linear, lbfgs_epoch, set_ridge
from .memory import Portion, ready, sent
from .mixing import check_mixing, draw_mix
from .order import epoch_order
from .recipe import Stage
from .runtime import Runtime, prefetch
from .schedule import batches_of_epoch, in_numbers, learning_rate, make_optimizer, views_of_epoch
from .stage_result import Log, Progress, Record, Report, StageResult

# Training pictures scored in evaluation mode each epoch: enough for a +-6 point interval. Where layers run for them,
# no more than there are validation pictures, which they are compared with, but these at least.
TRAIN_SCORE_LIMIT, TRAIN_SCORE_LEAST = 256, 100
RETRY_DIVISOR = 10.0
SAME_LOSS = 0.01  # a tenth of the rate that leads to the same loss, to 1 %, shows that the rate is not its cause
MAX_RETRIES = 3


def has_batchnorm(module: nn.Module) -> bool:
    """Does any of its layers learn batch statistics in training mode?"""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


class _Stage:
    """The state of one attempt at a stage."""

    def __init__(
        self,
        model: Classifier,
        data: StageData,
        stage: Stage,
        *,
        lr: float,
        seed: int,
        runtime: Runtime,
        portion: Portion,
    ) -> None:
        self.model, self.data, self.stage, self.lr, self.seed, self.runtime = model, data, stage, lr, seed, runtime
        self.optimizer = make_optimizer(model, stage, lr=lr)
        self.contract = Contract(model, self.optimizer)
        self.average = RunningAverage(model, stage.ema) if stage.ema else None
        self.gradients = Gradients(model, data.train, stage, runtime=runtime, portion=portion)
        self._refuse_small_batches()
        check_mixing(stage, model.freeze_line)
        check_linear(model, data, stage)
        n = len(data.train.labels)
        self.train_subset = torch.from_numpy(epoch_order(n, seed=0, epoch=0)[: self._train_scored()])
        self.steps_per_epoch = -(-len(self._batches(epoch=1)) // stage.accumulate)
        self.steps = self.steps_per_epoch * stage.epochs
        self.step = self.pictures = 0
        self.is_through = False  # no further epoch would change anything

    def _refuse_small_batches(self) -> None:
        """BatchNorm in training mode has no variance to take from one picture; every process needs one."""
        batch, world = min(self.stage.batch_pictures, len(self.data.train.labels)), self.runtime.world
        if self.gradients.portion.least > batch:
            raise ModelError(
                f"stage {self.stage.name!r}: BatchNorm cannot learn its statistics from batches of one picture."
                " Take a batch size of 2 or more, and at least two training pictures."
            )
        if batch < world:
            raise ModelError(
                f"stage {self.stage.name!r}: {world} processes cannot share batches of {batch} pictures: each needs"
                f" one. Take a batch size of {world} or more, at least as many training pictures, or fewer processes."
            )

    def _batches(self, epoch: int) -> list[Tensor]:
        labels, least = self.data.train.labels, max(2, self.runtime.world)
        return batches_of_epoch(len(labels), labels, self.stage, seed=self.seed, epoch=epoch, least=least)

    def _train_scored(self) -> int:
        if isinstance(self.data.train, FeatureSource):
            return TRAIN_SCORE_LIMIT
        return min(TRAIN_SCORE_LIMIT, max(TRAIN_SCORE_LEAST, len(self.data.val.labels)))

    def epoch(self, epoch: int, *, pool: ThreadPoolExecutor, after_step: Callable[[], None]) -> float:
        """Train one epoch (from 1) and return the mean training loss, weights and smoothing included."""
        model, runtime, stage = self.model, self.runtime, self.stage
        train = self.data.train
        if isinstance(train, FeatureSource) and stage.optimizer == "lbfgs":
            loss, self.is_through = lbfgs_epoch(
                self.optimizer, model, train, self.gradients.mean_loss, weight_decay=stage.weight_decay
            )
            self.step, self.pictures = self.step + self.steps_per_epoch, self.pictures + len(train.labels)
            after_step()
            return loss
        batches = self._batches(epoch)
        model.train()
        # Dropout and drop-path draw from a state that depends on (seed, epoch, rank) alone.
        torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, runtime.rank]).generate_state(1)[0]))
        total, count = torch.zeros((), device=runtime.device), 0.0
        shares = [runtime.share(batch) for batch in batches]

        def prepare(indices: Tensor) -> Tensor:
            views = views_of_epoch(indices, train.num_views, epoch=epoch)
            return ready(train.batch(indices.tolist(), views.tolist()), runtime.device)

        inputs = prefetch(prepare, shares, pool=pool if train.in_background else None, ahead=runtime.workers + 1)
        for first in range(0, len(batches), stage.accumulate):
            group = range(first, min(first + stage.accumulate, len(batches)))
            # One divisor for the whole step, however it is cut into batches and processes.
            weight = sum(self.gradients.weight(train.labels[batches[i]]) for i in group)
            drawn = [self._batch(next(inputs), batches[i], seed=(self.seed, epoch, 2, i, 0)) for i in group]
            total += self.gradients.add([batch for batch in drawn if len(batch.labels)], weight)
            self.pictures += sum(len(batches[i]) for i in group)
            count += weight
            self._optimizer_step()
            self.step += 1
            after_step()
        # The sum of per-step means times weights, over all weights: exact also with a short last batch.
        return self._sum_over_processes(total) / count

    def _batch(self, inputs: Tensor, rows: Tensor, *, seed: Sequence[int]) -> Batch:
        """This process's share of the batch of these rows, whose inputs it has, mixed as the whole batch is."""
        runtime, labels = self.runtime, self.data.train.labels[rows]
        mix = draw_mix(len(rows), mixup=self.stage.mixup, cutmix=self.stage.cutmix, seed=seed)
        if mix is None or runtime.world == 1:
            return Batch(inputs, runtime.share(labels), mix)
        # Partners may be another process's; to be given their inputs costs less than to make them again.
        whole = Batch(runtime.gather(sent(inputs, runtime.device), len(rows)), labels)
        return Batch(inputs, runtime.share(labels), replace(mix, partners=runtime.share(mix.partners)), whole)

    def _optimizer_step(self) -> None:
        stage = self.stage
        rate = learning_rate(self.step, steps=self.steps, lr=self.lr, schedule=stage.schedule, warmup=stage.warmup)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.runtime.sum_gradients(held)
        if stage.clip_norm:
            nn.utils.clip_grad_norm_(held, stage.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
            if group["decay"]:
                with torch.no_grad():
                    torch._foreach_mul_(group["params"], 1.0 - group["lr"] * group["decay"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()

    def in_shown_state(self) -> AbstractContextManager[None]:
        """With a running average, the model holds it inside; an epoch is judged by it. Training goes on without it."""
        return self.average.applied() if self.average else nullcontext()

    def is_finite(self) -> bool:
        """Whether all trained weights are; the loss does not tell, where a convolution's ReLU makes zeros of NaN."""
        trained = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        return math.isfinite(float(nn.utils.get_total_norm(trained)))

    def _sum_over_processes(self, value: Tensor) -> float:
        if self.runtime.world > 1:
            torch.distributed.all_reduce(value)
        return float(value)

    def score_val(self, limit: int | None = None) -> Score:
        """Score the validation split, or a fixed random part of it."""
        n = len(self.data.val.labels)
        # In float32, as the final scores are, so that a state is chosen by the very figure it is reported with.
        chosen = (
            torch.arange(n)
            if limit is None or n <= limit
            else torch.from_numpy(epoch_order(n, seed=0, epoch=0)[:limit])
        )
        return score(self.model, self.data.val, indices=chosen, runtime=replace(self.runtime, dtype=torch.float32))

    def score_train(self) -> Score:
        """Score a fixed part of the training split as the validation split is scored, so that both compare."""
        return score(self.model, self.data.train, indices=self.train_subset, runtime=self.runtime)


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
    Raises:
        ModelError: the freeze contract was broken; a loss that is not finite under `on_collapse="ignore"` too.
    """
    started, asked = time.perf_counter(), lr
    everyone = runtime
    if isinstance(data.train, FeatureSource):
        # Each process has all rows, and a head is quicker computed from whole batches than talked about: as one does.
        runtime = runtime.alone()
    entry_state = snapshot(model)
    history: list[Record] = []
    events: list[Record] = []

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
    for attempt in range(MAX_RETRIES + 1):
        run = _Stage(model, data, stage, lr=lr, seed=seed, runtime=runtime, portion=portion)
        try:
            with data.train.kernels(model, runtime):
                if attempt == 0:
                    run.gradients.keep_quicker_format()
                    runtime = run.runtime = run.gradients.runtime
                if finds_size and attempt == 0:
                    run.gradients.fit_to_memory()
                best, epochs = _attempt(run, entry_state, watch=watch, write=write, report=report)
            break
        except CollapseError as collapse:
            restore(model, entry_state)
            if abs(collapse.loss - loss_before) < SAME_LOSS * loss_before and attempt < MAX_RETRIES:
                lr, watch = lr * RETRY_DIVISOR, False
                norm = ", but the head's BatchNorm, which is still learning its statistics" * has_batchnorm(model.head)
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


def _attempt(
    run: _Stage, entry_state: State, *, watch: bool, write: Log, report: Report | None
) -> tuple[Candidate, int]:
    """Train all epochs; returns the state that was kept, which the model then holds, and the epochs trained."""
    model, stage = run.model, run.stage
    entry = Candidate(entry_state, run.score_val(), 0)
    alarm = None
    if watch:
        alarm = make_alarm(
            stage, run.lr, entry.val, run.score_val, steps_per_epoch=run.steps_per_epoch,
            training=len(run.data.train.labels), validation=len(run.data.val.labels),
        )  # fmt: skip
    started, event = time.perf_counter(), None
    if stage.warm_start == "ridge":
        entry, event = _ridge(run, entry)
    best = last = entry
    seconds = time.perf_counter() - started
    event = _joined([*run.gradients.portion.take(), *([event] if event else [])])
    write(_record(run, epoch=0, train_loss=None, val=entry.val, best=True, seconds=seconds, event=event))
    epoch = 0

    def look(limit: int | None) -> Score:
        with run.in_shown_state():  # a running average forgives single steps, as it does in what is kept
            return run.score_val(limit)

    def after_step() -> None:
        if report:
            report(Progress(stage.name, epoch, run.step, run.steps, run.pictures, last.val))
        if alarm:
            alarm.within(epoch, run.step, look)

    pool = ThreadPoolExecutor(run.runtime.workers, thread_name_prefix="headstart-batch")
    try:
        for epoch in range(1, stage.epochs + 1):
            started = time.perf_counter()
            train_loss = run.epoch(epoch, pool=pool, after_step=after_step)
            run.contract.watch()
            with run.in_shown_state():
                val = run.score_val()
                if not (math.isfinite(val.loss) and run.is_finite()):
                    _not_finite(run, watch, epoch)
                if alarm:
                    alarm.at_end(epoch, run.step, val)
                better = stage.select == "last" or _is_better(val, best.val, stage.select)
                last = Candidate(snapshot(model) if better or stage.wise else {}, val, epoch)
                best = last if better else best
                stop = bool(stage.early_stop) and epoch - best.epoch >= stage.early_stop and epoch < stage.epochs
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
            if stop:
                break
        if stage.wise:
            best = _wise(run, entry, best, last, write)
    except BaseException:
        restore(model, best.state)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    restore(model, best.state)
    run.contract.finish()
    return best, epoch


def _joined(events: list[Record]) -> Record | None:
    """What happened as one event: the last one's kind, the words of all."""
    return {**events[-1], "message": " ".join(event["message"] for event in events)} if events else None


def _ridge(run: _Stage, entry: Candidate) -> tuple[Candidate, Record]:
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


def _wise(run: _Stage, entry: Candidate, best: Candidate, last: Candidate, write: Log) -> Candidate:
    """Mix what the stage started from with its best and its last state; the history says which share was kept."""
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
        way = "" if kept.share == 1 else f"{kept.share:.0%} of the way from the stage's start to "
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
            best=kept is not best,
            seconds=seconds,
            event=event,
        )
    )
    return kept


def _not_finite(run: _Stage, watch: bool, epoch: int) -> None:
    text = f"A learning rate of {run.lr:g} drove the loss out of bounds in epoch {epoch} (not a finite number)."
    if watch:
        raise CollapseError(text, math.inf)
    raise ModelError(f"{text} Lower it: stage {run.stage.name!r}, --lr or --lr-scale.")


def _is_better(new: Score, old: Score, select: str) -> bool:
    if select == "accuracy":
        return (new.accuracy, -new.loss) > (old.accuracy, -old.loss)
    return new.loss < old.loss


def _record(
    run: _Stage,
    *,
    epoch: int,
    train_loss: float | None,
    val: Score,
    best: bool,
    seconds: float,
    event: Record | None = None,
) -> Record:
    last = max(0, run.step - 1)
    rate = learning_rate(last, steps=run.steps, lr=run.lr, schedule=run.stage.schedule, warmup=run.stage.warmup)
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


def _event_record(run: _Stage, event: Record) -> Record:
    """What stands in the history where a stage was rolled back: the restored state's scores and what happened."""
    return _record(run, epoch=0, train_loss=None, val=run.score_val(), best=False, seconds=0.0, event=event)
