"""Many short trials of one recipe with other rates, decays, dropouts, lines or backbones, chosen by validation.

The test split is taken away before the first trial. Trials at one line share the stored features, so that a trial of
the head costs seconds. The study lives in a journal file or a database that several processes may share.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from .backbones import spec_of
from .bench import Bench, contents_digest, data_digest, settle
from .comparison import check_lines
from .errors import HeadstartError, Interrupted, RecipeError, in_words
from .files import to_json, write_atomic
from .groundwork import make_bench
from .memory import is_out_of_memory
from .owners import this_process
from .plots import plot_parallel
from .recipe import DEFAULT_BACKBONE, Recipe, load_recipe
from .recipes import fine_tune, weights_of
from .run import refuse_among_pictures
from .runtime import make_runtime
from .settings import own_settings
from .space import Space, describe, point_key, trial_recipe
from .study import ask, draw, is_scored, load_optuna, open_study, taken_points
from .terminal import say
from .tuned import write_tuned
from .weights import contents_of

FILE = "sweep.json"
JOURNAL = "journal.log"
TPE_TRIALS = 20


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    results: what sweep.json holds: `trials`, each with its `values`, `state` and, where it was not ended early, `val`
    figures, and `best`, the number of the best one. path: the folder. best: the recipe of best.json; None where no
    trial came to its end.
    """

    results: dict[str, Any]
    path: Path
    best: Recipe | None


@own_settings(draws=True)
def sweep(
    data: Any,
    *,
    space: Space,
    method: str = "grid",
    trials: int | None = None,
    minutes: float | None = None,
    recipe: str | Path | Recipe = "head",
    epochs: int | None = None,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    spec_overrides: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    prune: bool = True,
    share: bool = True,
    out: str | Path = "runs/sweep",
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    compile: str = "auto",
    progress: bool = False,
    **data_options: Any,
) -> Sweep:
    """Try recipes and keep the one with the least validation loss; the same call goes on with the same study.

    Args:
        space: the trials. A trial's `lr`, `head_dropout` are the recipe's; `weight_decay` goes to every stage,
            `freeze_line` to the last one.
        method: `grid` (every combination, or the explicit list) or `tpe` (Optuna's sampler, which learns from trials).
        trials, minutes: end the study, over all its calls, or this call; `tpe` makes 20 trials when neither is given.
        epochs: of every stage, in place of the recipe's.
        weights: of the backbone; with several backbones the hub's.
        storage: None is a journal file in `out`; else a journal file's path, or a database URL such as
            `sqlite:///study.db`, which several processes or machines may share.
        prune: end a trial that is worse, after as many epochs, than the median of the others.
        share: keep decoded pictures and stored features between trials.
        out: folder of sweep.json, best.json (for `fit --recipe`; it names the backbone and weights too) and the
            parallel-coordinates picture.
        data_options: val, test, val_folder, test_folder, root, bad_files, limit and cache, as in `fine_tune`.
    Raises:
        SetupError: Optuna is not installed. RecipeError: options that cannot be used; every trial failed, while one
            that does is left out, and told, where others come to their end.
        Interrupted: stopped by hand; what the finished trials found is written.
    """
    if not isinstance(space, Space):
        raise RecipeError(f"space is {space!r}; it takes a Space, such as Space(values={{'lr': (1e-3, 1e-2)}}).")
    if method not in ("grid", "tpe"):
        raise RecipeError(f"method is {method!r}; allowed: grid, tpe.")
    if method == "tpe" and not space.values:
        raise RecipeError("tpe draws from values for each parameter; an explicit list is tried as it is (grid).")
    if (trials is not None and trials < 1) or (minutes is not None and not 0 < minutes < math.inf):
        raise RecipeError(
            f"trials is {trials} and minutes {minutes}; a sweep takes one or more trials, and more than 0 minutes."
        )
    optuna = load_optuna()
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if epochs is not None:
        plan = replace(plan, stages=tuple(replace(stage, epochs=epochs) for stage in plan.stages))
    # What cannot be is found before pictures are read and hours spent on the trials in front of it.
    for point in space.points or [{name: v} for name, of in (space.values or {}).items() for v in of]:
        trial_recipe(plan, point)
    where = dict.fromkeys((str(p.get("backbone", backbone)), p.get("freeze_line")) for p in space.grid())
    for name, line in where:
        own = _own(weights, name, backbone)
        check_lines(trial_recipe(plan, {"freeze_line": line} if line else {}), name, own, spec_overrides or {})
    if isinstance(data, (str, Path)):
        refuse_among_pictures(Path(out).expanduser(), data)  # parallel.png would be one
    bench = data if isinstance(data, Bench) else make_bench(
        data, runtime=make_runtime(device=device, precision=precision, workers=workers, compile=compile),
        seed=plan.seed, spec=spec_of(backbone, weights or "hub", **(spec_overrides or {})), share=share,
        progress=progress, **data_options,
    )  # fmt: skip
    bench = bench.without_test()
    settings = {
        "data": data_digest(bench.splits), "contents of the pictures": contents_digest(bench),
        "recipe": json.loads(to_json(plan.to_dict())), "backbone": backbone,
        "weights": str(weights or "hub"), "contents of the weights": contents_of(weights or "hub"),
        "pictures": json.loads(to_json(dict(spec_overrides or {}))),
        "precision": str(bench.runtime.dtype).removeprefix("torch."),
    }  # fmt: skip
    folder = settle(out, FILE, settings, overwrite=overwrite)
    # In a storage that several sweeps may share, a study is told apart by what its trials are.
    told = to_json({key: value for key, value in settings.items() if value != ""})
    name = folder.name if storage is None else f"{folder.name}-{sha256(told).hexdigest()[:12]}"
    if overwrite and storage is None:
        (folder / JOURNAL).unlink(missing_ok=True)
    study = open_study(optuna, str(storage or folder / JOURNAL), name=name, prune=prune, fresh=overwrite)
    started = time.perf_counter()
    limit = (trials or (TPE_TRIALS if minutes is None else None)) if method == "tpe" else trials
    stopped, failed = False, list[dict[str, Any]]()
    while minutes is None or time.perf_counter() - started < 60 * minutes:
        taken = taken_points(optuna, study)
        tried = [*taken, *(point_key(one["values"]) for one in failed)]
        left = [point for point in space.grid() if point_key(point) not in tried] if method == "grid" else [{}]
        if not left or (limit is not None and len(tried) >= limit):
            break
        trial = ask(optuna, study, seed=plan.seed)
        trial.set_user_attr("process", this_process())
        point = left[0] if method == "grid" else draw(optuna, study, trial, space.values or {})
        trial.set_user_attr("asked", point)
        overrides = dict(spec_overrides or {})
        try:
            _try(optuna, study, trial, point, plan, bench, backbone, weights, overrides, prune, progress)
        except (KeyboardInterrupt, Interrupted):
            stopped = True
            break
        except (HeadstartError, MemoryError, RuntimeError) as error:  # of this trial: others may do better
            if not (isinstance(error, HeadstartError) or is_out_of_memory(error)):
                raise
            reason = str(error) if isinstance(error, HeadstartError) else in_words(error)
            failed.append({"values": point, "reason": reason})
            say(f"{describe(point)}: failed: {reason}", enabled=True)
    results = {"settings": settings, "method": method, "wall_seconds": time.perf_counter() - started}
    results["trials"] = [_row(trial, space) for trial in study.get_trials(deepcopy=False) if is_scored(optuna, trial)]
    results["failed"] = failed  # in this call; the next one tries them again
    found = _finish(results, plan, folder)
    if failed and not stopped and not found.best:
        raise RecipeError(f"No trial came to its end. {describe(failed[0]['values'])}: {failed[0]['reason']}")
    if stopped:
        done = len(found.results["trials"])
        best = f", the best of them in {folder / 'best.json'}" if found.best else ""
        words = f"{done} trial{'s are' * (done != 1)}{' is' * (done == 1)} done"
        raise Interrupted(f"Stopped by hand. {words}{best}; the same command goes on.")
    return found


def _try(
    optuna: Any, study: Any, trial: Any, point: Mapping[str, Any], plan: Recipe, bench: Bench, backbone: str,
    weights: str | Path | None, overrides: dict[str, Any], prune: bool, progress: bool,
) -> None:  # fmt: skip
    """Train one trial; report each epoch's validation loss, and end it early where it is far behind."""
    started, steps = time.perf_counter(), itertools.count()

    def watch(record: Mapping[str, Any]) -> None:
        loss = (record.get("val") or {}).get("loss")
        if loss is None or not prune:
            return
        trial.report(loss, next(steps))
        if trial.should_prune():
            raise optuna.TrialPruned

    name = str(point.get("backbone", backbone))
    try:
        recipe = trial_recipe(plan, point)
        result = fine_tune(
            bench, recipe=recipe, backbone=name, weights=_own(weights, name, backbone),
            spec_overrides=overrides, log=watch,
        )  # fmt: skip
    except optuna.TrialPruned:
        trial.set_user_attr("seconds", time.perf_counter() - started)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        say(f"{describe(point)}: ended early", enabled=progress)
        return
    except BaseException:  # else it would be in hand as long as this process lives
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    score = result.metrics["val"]
    stages = result.metrics["stages"]
    for key, value in (
        ("val", {k: score[k] for k in ("accuracy", "accuracy_ci95", "log_loss", "n")}),
        ("seconds", time.perf_counter() - started),
        ("shared_seconds", sum(stage["shared_seconds"] for stage in stages)),
        ("best_epoch", stages[-1]["best_epoch"]),
    ):
        trial.set_user_attr(key, value)
    study.tell(trial, score["log_loss"])
    say(
        f"{describe(point)}: val loss {score['log_loss']:.4f}, accuracy {score['accuracy']:.4f}"
        f" ({time.perf_counter() - started:.1f} s)",
        enabled=progress,
    )


def _own(weights: str | Path | None, name: str, backbone: str) -> str | Path | None:
    """What was given, for the backbone it was given with; a file or run fits no other, `none` fits all."""
    return weights if name == backbone or str(weights) == "none" else None


def _row(trial: Any, space: Space) -> dict[str, Any]:
    asked, attrs = trial.user_attrs["asked"], trial.user_attrs
    row = {"number": trial.number, "values": asked, "state": trial.state.name.lower(), **attrs}
    for name in ("asked", "process"):
        row.pop(name, None)
    if space.published and asked in [dict(point) for point in space.points]:
        row["published"] = space.published[[dict(point) for point in space.points].index(asked)]
    return row


def _finish(results: dict[str, Any], plan: Recipe, folder: Path) -> Sweep:
    """Write the table, the best recipe with what it was found on, and the picture."""
    done = [row for row in results["trials"] if row["state"] == "complete"]
    best = min(done, key=lambda row: row["val"]["log_loss"], default=None)
    recipe = None
    if best:
        recipe = replace(trial_recipe(plan, best["values"]), name="best")
        settings = results["settings"]
        backbone = str(best["values"].get("backbone", settings["backbone"]))
        weights = _own(settings["weights"], backbone, settings["backbone"]) if settings["weights"] != "hub" else None
        write_tuned(
            folder / "best.json", recipe, backbone=backbone, weights=weights_of(plan, weights),
            pictures=settings["pictures"],
        )  # fmt: skip
        results["best"] = best["number"]
    write_atomic(folder / FILE, to_json(results, indent=1) + b"\n")
    if len(done) > 1:
        plot_parallel([{**row["values"], "val loss": row["val"]["log_loss"]} for row in done], folder / "parallel.png")
    return Sweep(results, folder, recipe)
