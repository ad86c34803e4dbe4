"""The learning-rate range test: train with a rate that rises exponentially and watch the loss.

Reference: Smith 2017, "Cyclical learning rates for training neural networks", arXiv 1506.01186; the stop and the
`valley` suggestion as in fastai's `lr_find`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .averaging import restore, snapshot
from .backbones import spec_of
from .bench import Bench
from .checkpoint import load, read_card
from .classifier import Classifier, create_classifier
from .dataspec import DataSpec
from .drawing import check_picture
from .errors import ModelError, RecipeError
from .features import StageData
from .fields import check_number
from .groundwork import make_bench
from .plots import plot_rates
from .recipe import DEFAULT_BACKBONE, Recipe, Stage, load_recipe
from .recipes import fine_tune, weights_of
from .run_record import read_run
from .runtime import Runtime, make_runtime
from .schedule import batches_of_epoch, class_weight_vector, make_optimizer, views_of_epoch
from .settings import own_settings
from .stage_run import source_behind
from .terminal import ProgressBar

SMOOTHING = 0.95
DIVERGED = 4.0  # the test ends where the smoothed loss exceeds this many times its minimum
LEAST_STEPS = 10


@dataclass(frozen=True)
class RateCurve:
    """Loss against rate for one stage, and what it suggests; rates are those of the stage, per optimiser step.

    losses: smoothed training loss (nats). steepest: where it falls fastest per decade. valley: half-way along the
    longest fall, as fastai has it. minimum_tenth: a tenth of the rate with the least loss. diverged: whether the test
    ended because the loss ran away. falls: whether it falls at all, by more than single batches scatter; without that
    no rate is worth taking.
    """

    stage: str
    freeze_line: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    steepest: float
    valley: float
    minimum_tenth: float
    diverged: bool
    option: str
    falls: bool = True
    picture: Path | None = None

    @property
    def suggestion(self) -> float:
        """The stage's rate to begin with: the valley's."""
        return self.valley


@own_settings(draws=True)
def find_lr(
    data: Any,
    *,
    run: str | Path | None = None,
    after_head: bool = False,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    recipe: str | Path | Recipe = "fine-tune",
    spec_overrides: Mapping[str, Any] | None = None,
    steps: int = 100,
    low: float = 1e-6,
    high: float = 10.0,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    progress: bool = False,
    **data_options: Any,
) -> RateCurve:
    """Look for a learning rate before the head stage, after it, or for going on with a finished run.

    Before the head stage the test runs on stored features and costs little more than one pass of the backbone.

    Args:
        run: a run folder: the test is of its recipe's last stage, from the run's final state.
        after_head: train the recipe's first stage, then test the next one.
        steps: rates tried between `low` and `high`, one optimiser step each.
        out: where to write the curve as a picture (png, jpg, pdf, svg); None writes none.
        data_options: val, test, val_folder, test_folder, root, bad_files, limit and cache, as in `fine_tune`.
    Raises:
        RecipeError: options that do not go together. ModelError: the run's classes are not the pictures'.
        DataError, CheckpointError: `out` has another ending, or cannot be written; told before the work.
    """
    if out is not None:
        check_picture("Curve", out)
    idle = {"weights": weights, "spec_overrides": spec_overrides, "recipe": recipe != "fine-tune"}
    idle |= {"backbone": backbone != DEFAULT_BACKBONE}
    if run is not None and any(idle.values()):
        named = ", ".join(name for name, is_given in idle.items() if is_given)
        raise RecipeError(f"{named} would change nothing: the run has its own. Leave it out.")
    if run is not None and after_head:
        raise RecipeError("after_head trains a new head; a run has its own. Leave one of the two out.")
    check_number("find_lr", "steps", steps, 2 * LEAST_STEPS, whole=True)
    check_number("find_lr", "low", low, 0, above=True)
    check_number("find_lr", "high", high, low, above=True)
    plan = Recipe.from_dict(read_run(run).recipe) if run is not None else _plan(recipe)
    if after_head and len(plan.stages) < 2:
        raise RecipeError(f"Recipe {plan.name!r} has one stage, so nothing comes after its head stage.")
    place = len(plan.stages) - 1 if run is not None else int(after_head)
    _refuse_lbfgs(plan.stages[place])
    spec = (
        DataSpec.from_dict(read_card(Path(run))["preprocessing"])
        if run is not None
        else spec_of(backbone, weights or "hub", **(spec_overrides or {}))
    )
    bench = data if isinstance(data, Bench) else make_bench(
        data, runtime=make_runtime(device=device, precision=precision, workers=workers), seed=plan.seed,
        spec=spec, progress=progress, **data_options,
    )  # fmt: skip
    bench = bench.without_test()
    if run is not None:
        model, stage = load(run, device=bench.runtime.device), plan.stages[-1]
        if model.class_names != bench.splits.class_names:
            raise ModelError(f"{run} knows the classes {', '.join(model.class_names)}, which are not the pictures'.")
    elif after_head:
        head = replace(plan, stages=plan.stages[:1])
        model = fine_tune(
            bench, recipe=head, backbone=backbone, weights=weights, spec_overrides=dict(spec_overrides or {}),
            progress=progress,
        ).model  # fmt: skip
        stage = plan.stages[1]
    else:
        model = create_classifier(
            backbone, bench.splits.class_names, head=plan.head, weights=str(weights_of(plan, weights)), seed=plan.seed,
            drop_rate=plan.drop_rate, drop_path_rate=plan.drop_path_rate, **(spec_overrides or {}),
        ).to(bench.runtime.device)  # fmt: skip
        stage = plan.stages[0]
    train = bench.pixels("train", model.spec, augment=plan.augment_spec, seed=plan.seed)
    source = source_behind(model, train, bench.pixels("val", model.spec), stage, bench, show=progress)
    curve = range_test(
        model, source, stage, steps=steps, low=low, high=high, seed=plan.seed,
        runtime=bench.runtime, nominal=plan.lr, place=place, stages=len(plan.stages), progress=progress,
    )  # fmt: skip
    if out is None:
        return curve
    return replace(curve, picture=plot_rates(asdict(curve), out))


def _plan(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


@own_settings()
def range_test(
    model: Classifier,
    data: StageData,
    stage: Stage,
    *,
    runtime: Runtime,
    steps: int = 100,
    low: float = 1e-6,
    high: float = 10.0,
    seed: int = 0,
    nominal: float = 5e-3,
    place: int = 0,
    stages: int = 1,
    progress: bool = False,
) -> RateCurve:
    """Train `steps` steps at rates from `low` to `high` behind the model's freeze line, then put everything back.

    Weights, statistics, modes and the random state are afterwards what they were, to the bit. Weight decay is left
    out: at the far rates it would shrink the weights and be seen in the loss. So are mixing, running averages and
    accumulation: a step is one batch.

    Args:
        nominal, place, stages: the recipe's rate, which of its stages this is, from 0, and how many it has: the terms
            of the suggestion.
    Raises:
        ModelError: the loss was not finite for the first steps already.
        RecipeError: the stage's optimiser finds the length of its steps itself.
    """
    _refuse_lbfgs(stage)
    state, was_training = snapshot(model), model.training
    try:
        with torch.random.fork_rng(devices=runtime.generators), data.train.kernels(model, runtime):
            torch.manual_seed(seed)
            rates, raw = _rising(model, data, replace(stage, weight_decay=0.0), runtime, steps, low, high, progress)
    finally:
        restore(model, state)
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    losses, diverged = smoothed(raw)
    diverged |= len(raw) < steps  # the test itself stopped where one batch's loss had run far away
    if len(losses) < LEAST_STEPS:
        raise ModelError(f"The loss ran away after {len(losses)} steps, at a rate of {rates[0]:g}. Start lower.")
    steepest, valley, tenth = suggestions(rates[: len(losses)], losses)
    return RateCurve(
        stage.name, stage.freeze_line, tuple(rates[: len(losses)]), tuple(losses), steepest, valley, tenth, diverged,
        option_for(valley, nominal=nominal, stage=stage, place=place, stages=stages), falls(losses, raw),
    )  # fmt: skip


def _refuse_lbfgs(stage: Stage) -> None:
    if stage.optimizer == "lbfgs":
        raise RecipeError(f"Stage {stage.name!r}: L-BFGS finds the length of its steps itself; it takes no rate.")


def option_for(rate: float, *, nominal: float, stage: Stage, place: int, stages: int) -> str:
    """The stage's rate in a recipe's terms: `--lr` for the first stage, a multiple of it for a later one."""
    if place == 0:
        return f"--lr {rate / stage.lr_scale:.2g}"
    return f"--lr-scale {',' * place}{rate / nominal:.2g}{',' * (stages - place - 1)}"


def _rising(
    model: Classifier,
    data: StageData,
    stage: Stage,
    runtime: Runtime,
    steps: int,
    low: float,
    high: float,
    show: bool,
) -> tuple[list[float], list[float]]:
    optimizer = make_optimizer(model, stage, lr=low)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    weights = class_weight_vector(stage, data.train.labels, len(model.class_names))
    weights = None if weights is None else weights.to(runtime.device)
    rates, losses, least = [], [], math.inf
    model.train()
    with ProgressBar(steps, "  rates", unit="step", enabled=show) as bar:
        for step, (indices, views) in zip(range(steps), _batches(data, stage), strict=False):
            rate = low * (high / low) ** (step / (steps - 1))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            inputs = data.train.batch(indices.tolist(), views.tolist()).to(runtime.device)
            with runtime.autocast():
                logits = data.train.forward(model, inputs)
            labels = data.train.labels[indices].to(logits.device)
            loss = torch.nn.functional.cross_entropy(
                logits.float(), labels, weight=weights, label_smoothing=stage.label_smoothing
            )
            value = float(loss.detach())
            rates.append(rate)
            losses.append(value)
            least = min(least, value)
            if not math.isfinite(value) or (step > LEAST_STEPS and value > 3 * DIVERGED * max(least, 0.1)):
                break
            loss.backward()
            if stage.clip_norm:
                torch.nn.utils.clip_grad_norm_(held, stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.advance()
    return rates, losses


def _batches(data: StageData, stage: Stage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of epoch after epoch, without end."""
    epoch = 0
    while True:
        epoch += 1
        for batch in batches_of_epoch(len(data.train.labels), data.train.labels, stage, seed=0, epoch=epoch):
            yield batch, views_of_epoch(batch, data.train.num_views, epoch=epoch)


def smoothed(losses: ArrayLike) -> tuple[list[float], bool]:
    """The running mean (each step weighs 0.95 of the next, begun without bias), cut where it has run away."""
    out: list[float] = []
    mean, least = 0.0, math.inf
    for step, loss in enumerate(np.asarray(losses, dtype=np.float64)):
        if not math.isfinite(loss):
            return out, True
        mean = SMOOTHING * mean + (1 - SMOOTHING) * float(loss)
        value = mean / (1 - SMOOTHING ** (step + 1))
        least = min(least, value)
        if step > LEAST_STEPS and value > DIVERGED * least:
            return out, True
        out.append(value)
    return out, False


def suggestions(rates: ArrayLike, losses: ArrayLike) -> tuple[float, float, float]:
    """(steepest, valley, a tenth of the minimum's) from a curve of rates [n], rising, and smoothed losses [n].

    Minimum and steepest place are not looked for in the first tenth, where the running mean still follows single
    batches.
    """
    x, y = np.log10(np.asarray(rates, dtype=np.float64)), np.asarray(losses, dtype=np.float64)
    first = len(y) // 10
    end = first + int(y[first:].argmin()) + 1  # behind the minimum nothing is to be found
    stop = max(end, first + 2)
    steepest = first + int(np.gradient(y[first:stop], x[first:stop]).argmin())
    return float(10 ** x[steepest]), float(10 ** x[_valley(y)]), float(10 ** (x[end - 1] - 1))


def _valley(losses: NDArray[np.float64]) -> int:
    """The place that fastai's `valley` takes: as far back from the end of the longest falling subsequence as half its
    steps, the first of equally long ones.
    """
    n = len(losses)
    length = np.ones(n, dtype=np.int64)
    for i in range(1, n):
        higher = np.flatnonzero(losses[:i] > losses[i])
        if len(higher):
            length[i] = length[higher].max() + 1
    end = int(length.argmax())
    third = length[end] / 3
    return max(0, end - int(length[end]) + int(third) + int(third / 2))


def falls(losses: Sequence[float], raw: Sequence[float]) -> bool:
    """Whether the smoothed loss falls further than single batches scatter, before it is least."""
    smooth = np.asarray(losses)
    least = int(smooth.argmin())
    scatter = float(np.std(np.diff(np.asarray(raw, dtype=np.float64)[: len(smooth)]))) / math.sqrt(2)
    return bool(least >= LEAST_STEPS and smooth[:least].max() - smooth[least] > scatter)


def describe(curve: RateCurve) -> str:
    """The suggestion in words, in the recipe's terms."""
    ran = "the loss ran away" if curve.diverged else "the highest rate was reached"
    lines = [
        f"stage {curve.stage} (freeze line {curve.freeze_line}): {len(curve.rates)} rates from {curve.rates[0]:.1g}, "
        f"until {ran} at {curve.rates[-1]:.2g}",
        f"valley {curve.valley:.2g}   steepest {curve.steepest:.2g}   a tenth of the minimum's "
        f"{curve.minimum_tenth:.2g}",
        f"suggestion: {curve.option}"
        if curve.falls
        else "no suggestion: no rate here lowers the loss by more than it differs between batches; try others (--low,"
        " --high, --steps)",
    ]
    return "\n".join(lines)
