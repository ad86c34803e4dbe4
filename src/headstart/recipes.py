"""The user's verbs: short functions that compose the rooms, read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .augment import as_augment
from .backbones import check_overrides
from .bench import Bench
from .checkpoint import check_savable, load
from .classifier import BY_DESIGN, Classifier, as_classifier, check_head_kind, create_classifier
from .closing import FitResult, finish, how_to_go_on, leaked_rows, leave_usable, not_interrupted, split_rows, write_plan
from .dataset import ImageTable, Splits, check_images
from .dataspec import DataSpec
from .diary import Diary
from .errors import CheckpointError, HeadstartError, Interrupted, ModelError, RecipeError, SetupError
from .evaluation import require_classes
from .fields import check_number
from .freezing import FreezeLine, set_freeze_line
from .groundwork import Data, find_data, make_bench, refuse_as_class, require_validation
from .handover import change_classes
from .linear import check_linear_head
from .mixing import check_mixing
from .pixels import Augment
from .points import has_points
from .recipe import (
    DEFAULT_BACKBONE,
    FINE_TUNE_STAGE,
    RECIPES,
    HeadSpec,
    Recipe,
    Stage,
    load_recipe,
)
from .resume import Journey, find_begun, open_again
from .run import check_run_path, open_run
from .runtime import Runtime, make_runtime
from .settings import own_settings
from .stage_result import Log, StageResult
from .stage_run import look_at_stored_labels, run_stage, source_behind, train_stage
from .terminal import say


@own_settings(draws=True)
def fine_tune(
    data: Data | Bench,
    *,
    backbone: str | nn.Module = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    from_run: str | Path | Classifier | None = None,
    out: str | Path | None = None,
    recipe: str | Path | Recipe = "fine-tune",
    head: HeadSpec | nn.Module | None = None,
    data_spec: DataSpec | None = None,
    spec_overrides: dict[str, Any] | None = None,
    augment: str | Augment | None = None,
    val: float = 0.15,
    test: float = 0.15,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
    bad_files: str = "error",
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    compile: str = "auto",
    limit: int | None = None,
    cache: bool = True,
    audit: bool = True,
    progress: bool = False,
    log: Log | None = None,
) -> FitResult:
    """Pictures in, a fine-tuned classifier out.

    Reads and checks the pictures, splits them, puts a new head on the backbone, trains the recipe's stages (by
    default the head on the frozen backbone, then most of it too at a rate 100 times smaller), keeps the best state by
    validation score and scores the test split once, at the end.

    Args:
        data: pictures as `load_images` takes them, an `ImageTable`, `Splits` made beforehand, a pair of pictures
            and labels in memory (see `images_from_arrays`), or a `Bench`, which brings its own machine (device,
            precision, workers, compile) and shares work between runs.
        backbone: a timm name, or any module together with `data_spec`.
        weights: `hub`, `none`, a weights file, or a run folder of this program; None is `hub`, or `none` where the
            recipe trains from scratch.
        from_run: go on from this run's whole model: backbone, preprocessing and head. Its head keeps what it knows
            of the classes that the pictures have, by name, and gets rows for new ones; see `change_classes`.
        out: the run folder to write; None writes nothing.
        recipe: a recipe's name, a JSON file, or a `Recipe`.
        head, augment: replace the recipe's; a head module or a torchvision v2 transform of your own is not saved
            in the recipe. Modules and models given here (backbone, head, from_run) are copied and
            stay as they are, but for those with hooks, or that cannot be copied.
        spec_overrides: image_size, mean, std, interpolation, crop_pct, fit in place of the backbone's own.
        val, test: shares held out where the data bring no such split.
        root: the folder that a manifest's relative paths start from.
        bad_files: `error` names every unreadable file and stops; `skip` leaves them out and lists them in the report.
        resume: go on with the run in `out` that was stopped or killed, with the same arguments; begin it where there
            is none yet. On the same machine it ends in the bits in which it would have ended. Where a run stands is
            written into its folder after each stage and every half minute, and removed at its end.
        device, precision, workers, compile: see `make_runtime`.
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
    if resume and (overwrite or out is None):
        why = "to overwrite it is to begin anew" if overwrite else "out names the run's folder"
        raise RecipeError(f"resume goes on with a run that was begun: {why}. Give the one or the other.")
    if isinstance(data, Bench):
        runtime = data.runtime
    else:
        runtime = make_runtime(device=device, precision=precision, workers=workers, compile=compile)
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    augment = None if augment is None else as_augment(augment)
    check_overrides(spec_overrides or {})
    if head is not None:
        check_head_kind(head)
    if isinstance(head, HeadSpec):
        plan = replace(plan, head=head)
    if from_run is not None:
        _refuse_beside_from_run(
            plan, backbone=None if backbone == DEFAULT_BACKBONE else backbone, weights=weights, head=head,
            data_spec=data_spec, spec_overrides=spec_overrides,
        )  # fmt: skip
    else:
        weights = weights_of(plan, weights)
    begun = find_begun(out) if resume and out is not None else None

    def check_out() -> None:
        if out is not None and not begun:
            check_run_path(out, overwrite=overwrite)
            refuse_as_class(out, data, val_folder=val_folder, test_folder=test_folder)

    _by_main(runtime, check_out)
    origin = weights if from_run is None else from_run
    diary = Diary(None, progress and runtime.is_main, listener=log, earlier=origin)
    try:
        with diary.phase("list pictures"):
            found = data.splits if isinstance(data, Bench) else find_data(
                data, seed=plan.seed, val_folder=val_folder, test_folder=test_folder, root=root, limit=limit
            )  # fmt: skip
        with diary.phase("load backbone"):
            if from_run is not None:
                model, plan = _go_on_from(from_run, found.class_names, plan, diary)
                if out is not None:
                    check_savable(model)
            else:
                try:
                    model = create_classifier(
                        _own(backbone), found.class_names,
                        head=_own(head) if isinstance(head, nn.Module) else plan.head,
                        weights=str(weights), data_spec=data_spec, drop_rate=plan.drop_rate,
                        drop_path_rate=plan.drop_path_rate, seed=plan.seed, **(spec_overrides or {}),
                    )  # fmt: skip
                except SetupError:  # no network: before anyone goes for the weights, bad pictures are named
                    if bad_files == "error" and isinstance(data, (str, Path)) and isinstance(found, ImageTable):
                        check_images(found, workers=runtime.workers)
                    raise
            model.to(runtime.device)
        for stage in plan.stages:  # a line that selects nothing is found before hours are spent in front of it
            check_mixing(stage, set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm))
            check_linear_head(model, stage)
        with diary.phase("read pictures"):  # the check decodes them to what this backbone needs
            bench = data if isinstance(data, Bench) else make_bench(
                found, runtime=runtime, seed=plan.seed, val=val, test=test, bad_files=bad_files, spec=model.spec,
                check=not isinstance(data, (ImageTable, Splits)), share=False, cache=cache, audit=audit,
                progress=progress,
            )  # fmt: skip
        splits = bench.splits
        _say_seen(diary, splits)
        pictures = split_rows(bench) if out is not None and (runtime.is_main or begun) else ()
    except KeyboardInterrupt:
        raise Interrupted("Stopped before training began; nothing was written.") from None

    def begin() -> None:
        if out is None:
            return
        if begun:
            diary.run = open_again(begun, plan, pictures, show=diary.show)
        else:
            diary.run = open_run(out, overwrite=overwrite)
        if begun and begun.point:
            return
        write_plan(diary.run, plan, pictures, origin)
        if bench.audit is not None:
            diary.run.write_json("audit.json", bench.audit.to_dict())

    goes_on, journey = begun is not None and begun.point is not None, None
    try:
        _by_main(runtime, begin)
        journey = Journey(
            model, plan, diary, bench.runtime, pictures=pictures, augment=augment or plan.augment_spec, begun=begun
        )
        if diary.run and goes_on:
            write_plan(diary.run, plan, pictures, origin)  # it is as it was: what was damaged is whole again
            if journey.audit is None and (diary.run.path / "audit.json").is_file():  # damaged
                if bench.audit is not None:
                    diary.run.write_json("audit.json", bench.audit.to_dict())
                else:
                    (diary.run.path / "audit.json").unlink()
        bench.audit = bench.audit if bench.share else journey.audit or bench.audit
        trainset = bench.pixels("train", model.spec, augment=augment or plan.augment_spec, seed=plan.seed)
        valset = bench.pixels("val", model.spec)
        skipped = journey.done
        for index, stage in list(enumerate(plan.stages))[skipped:]:
            source = run_stage(model, trainset, valset, stage, plan, diary, bench, journey.keeper(index))
            look_at_stored_labels(source, diary, bench)
            journey.stage_done()
        if skipped == len(plan.stages):  # it was killed while it was scored
            source = source_behind(model, trainset, valset, plan.stages[-1], bench, show=progress)
        return finish(model, bench, plan, diary, source)
    except KeyboardInterrupt:
        with not_interrupted():
            if goes_on and not (journey and journey.has_moved):
                where = diary.run.path if diary.run else out
                raise Interrupted(
                    f"Stopped before another epoch was done. {where} goes on with --resume.", model
                ) from None
            if not diary.history:
                _discard(diary)
                raise Interrupted("Stopped before anything was trained; nothing was written.", model) from None
            raise Interrupted(f"Stopped by hand. {_left(model, diary, splits)}", model) from None
    except Exception as error:
        if diary.run is None or (goes_on and not (journey and journey.has_moved)):
            raise
        if not (goes_on or has_points(diary.run.path) or any(record["epoch"] for record in diary.history)):
            _discard(diary)  # nothing has been trained: nothing is lost, and the same command can be given again
        elif isinstance(error, HeadstartError):
            raise type(error)(f"{error}\n{_left(model, diary, splits)}") from error
        else:
            say(_left(model, diary, splits), enabled=diary.show)
        raise
    finally:
        if diary.run:
            diary.run.let_go()


def _discard(diary: Diary) -> None:
    if diary.run:
        diary.run.discard()


def _left(model: Classifier, diary: Diary, splits: Splits) -> str:
    """See `leave_usable`; what stopped the run is told, too, where nothing can be written any more."""
    try:
        return leave_usable(model, diary, splits)
    except (HeadstartError, OSError) as error:
        words = f"The state so far could not be saved: {error}"
        return "\n".join([words, *(how_to_go_on(diary.run, diary.run.path) if diary.run else ())])


@own_settings(draws=True)
def fit(
    model: Classifier,
    splits: Splits,
    stage: Stage | None = None,
    *,
    lr: float | None = None,
    augment: str | Augment | None = "photo",
    seed: int = 0,
    runtime: Runtime | None = None,
    starts_trained: bool = False,
    log: Log | None = None,
    cache: bool = True,
    progress: bool = False,
) -> StageResult:
    """Train one stage from where the freeze line stands; the model ends in its best state by validation score.

    Args:
        splits: as `split` makes them; `train` and `val` are used.
        stage: lengths and rates; its freeze line must be where the model's stands. None takes the default head
            stage with the line at `head`, and the default fine-tuning stage elsewhere.
        lr: the stage's learning rate; None is the default nominal head rate times the stage's `lr_scale`.
        augment: a policy's name, an `AugmentSpec` or a torchvision v2 transform; None changes nothing.
        seed: of the order of the pictures, their views and dropout.
        runtime: None is what `make_runtime` finds.
        starts_trained: the head was trained before; a collapse in the first steps is then caught and rolled back.
        log, cache, progress: as in `fine_tune`.
    Raises:
        ModelError: the stage's line is not the model's. DataError: no `Splits`, or no validation pictures in them.
    """
    runtime = runtime or make_runtime()
    line = model.freeze_line
    require_validation(splits)
    require_classes(model, splits.class_names)
    if not isinstance(stage, (Stage, type(None))):
        raise RecipeError(f"stage is {stage!r}; it takes a Stage, such as Stage(epochs=5, freeze_line='head').")
    if stage is None:  # the head's own stage, or the careful one where the backbone is trained too
        where, batchnorm = (line.where, line.batchnorm) if line else ("all", "fixed")
        stage = replace(Stage() if where == "head" else FINE_TUNE_STAGE, freeze_line=where, batchnorm=batchnorm)
    augment = None if augment is None else as_augment(augment)
    if lr is not None:
        lr = lr.item() if hasattr(lr, "item") and getattr(lr, "ndim", 0) == 0 else lr
        check_number("fit", "lr", lr, 0, 100, above=True)
    if line is None:
        line = _place_first_line(model, stage)
    if (stage.freeze_line, stage.batchnorm) != (line.where, line.batchnorm):
        raise ModelError(
            f"Stage {stage.name!r} has its freeze line at {stage.freeze_line!r} (batchnorm {stage.batchnorm}), the"
            f" model's stands at {line.where!r} (batchnorm {line.batchnorm}). Call set_freeze_line(model,"
            f" {stage.freeze_line!r}, batchnorm={stage.batchnorm!r}) first."
        )
    check_linear_head(model, stage)
    model.to(runtime.device)
    bench = Bench(splits, runtime, cache=cache, progress=progress and runtime.is_main)
    try:
        return train_stage(
            model, bench.pixels("train", model.spec, augment=augment, seed=seed), bench.pixels("val", model.spec),
            stage, bench=bench, show=progress, plan=Recipe(seed=seed), starts_trained=starts_trained,
            lr=float(lr) if lr is not None else RECIPES["fine-tune"].lr * stage.lr_scale, log=log,
        ).result  # fmt: skip
    finally:
        model.eval()  # in training mode a mere look at what it says would change a head's BatchNorm


def _say_seen(diary: Diary, splits: Splits) -> None:
    seen = int(leaked_rows(diary, splits).sum() - splits.leaked().sum())
    if seen:
        say(
            f"{seen:,} of the {len(splits.test):,} test pictures were trained on or chose the state in the earlier run;"
            " the test split is scored with and without them.",
            enabled=diary.show,
        )


def _by_main(runtime: Runtime, work: Callable[[], object]) -> None:
    """Work of the main process alone; where it fails there, all end with it instead of waiting for it.

    All processes come here, whether or not they have been told of a folder.

    Raises:
        CheckpointError: in the other processes. Whatever the work raises, in the main one.
    """
    failed: Exception | None = None
    if runtime.is_main:
        try:
            work()
        except Exception as error:
            failed = error
    if not runtime.agrees(failed is None):
        raise failed or CheckpointError("The main process cannot make the run's folder.")


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
    earlier: str | Path | Classifier, class_names: Sequence[str], plan: Recipe, diary: Diary
) -> tuple[Classifier, Recipe]:
    """The earlier model for these classes, and the recipe as it is then: with that model's head and dropout."""
    model = load(earlier) if isinstance(earlier, (str, Path)) else _own(as_classifier(earlier))
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


def _own(part: Any) -> Any:
    """A copy of a caller's module, which then stays as it is; a backbone's name as it is.

    The module itself where a copy might not be one: a hook, or a function that it keeps, goes on with the original.
    """
    if not isinstance(part, nn.Module):
        return part
    for module in part.modules():
        held = vars(module).values()
        if module._forward_hooks or module._forward_pre_hooks or any(getattr(one, "__closure__", None) for one in held):
            return part
    try:
        return deepcopy(part)
    except Exception:  # what a caller's module keeps may be anything: locks, outputs with their history
        return part


def _place_first_line(model: Classifier, stage: Stage) -> FreezeLine:
    """The stage's line on a model that has none, unless it would train much of what the caller has frozen by hand."""
    frozen = [(name, p) for name, p in model.backbone.named_parameters() if not p.requires_grad]
    line = set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    thawed = [name for name, p in frozen if p.requires_grad]
    numbers = sum(p.numel() for _, p in frozen if p.requires_grad)
    if numbers < BY_DESIGN * sum(p.numel() for p in model.backbone.parameters()):  # such as positions that are fixed
        model.fixed += tuple(p for _, p in frozen)
        return set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm) if thawed else line
    model.freeze_line = None
    model.plan_modes(())
    by_hand = {id(p) for _, p in frozen}
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(id(parameter) not in by_hand)
    raise ModelError(
        f"{len(thawed):,} weights of the backbone ({thawed[0]} first) are frozen by hand, and the model has no freeze"
        f" line: they would be trained (freeze line {stage.freeze_line!r}). Call set_freeze_line(model, 'head'), or"
        " wherever the line is to be; it fixes BatchNorm's statistics and dropout in front of it, too."
    )


def weights_of(plan: Recipe, weights: str | Path | None) -> str | Path:
    if weights is None:
        return "hub" if plan.pretrained else "none"
    if not plan.pretrained and str(weights) != "none":
        raise RecipeError(
            f"Recipe {plan.name!r} starts from random weights, but weights are given ({weights}). Leave them out, or"
            " choose another recipe."
        )
    return weights
