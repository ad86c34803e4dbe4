"""Recipes and freeze lines against one another: the same pictures, splits and seeds, each with its stated budget."""

from __future__ import annotations

import json
import operator
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .backbones import spec_of
from .bench import Bench, contents_digest, data_digest, settle
from .classifier import create_classifier
from .comparison_page import write_comparison
from .dataset import ImageTable, Splits
from .errors import CheckpointError, HeadstartError, Interrupted, ModelError, RecipeError, near_matches
from .fields import as_tuple
from .files import to_json, write_atomic
from .freezing import set_freeze_line
from .groundwork import make_bench, refuse_as_class
from .metrics import judge_pairs, paired_difference, wilson_interval
from .points import has_points
from .recipe import DEFAULT_BACKBONE, RECIPES, Recipe, load_recipe
from .recipes import fine_tune, weights_of
from .resume import can_go_on
from .run_record import RunRecord, is_complete, is_run, read_run
from .runtime import make_runtime
from .settings import own_settings
from .terminal import say
from .verdicts import verdicts
from .weights import contents_of

FILE = "compare.json"
DEFAULT_RECIPES = ("scratch", "head", "fine-tune")
FIGURES = ("log_loss", "accuracy", "top5", "weighted_precision", "weighted_recall")


@dataclass(frozen=True)
class Budget:
    """What one recipe may spend: epochs, one number or one per stage, and the side of its pictures in pixels."""

    epochs: tuple[int, ...] = ()
    image_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "epochs", as_tuple("budget", "epochs", self.epochs, int, "whole numbers, such as (10,)")
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """`10`, `30,8`, `10@96` or `@96`: epochs, and behind an @ the picture size.

        Raises:
            RecipeError: anything else.
        """
        epochs, at, size = text.partition("@")
        try:
            return cls(tuple(int(n) for n in epochs.split(",")) if epochs else (), int(size) if at else None)
        except ValueError:
            raise RecipeError(
                f"Budget {text!r}: it takes epochs (10, or 30,8 for two stages), @ and a picture size (10@96, @96)."
            ) from None

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with this budget's epochs."""
        epochs = self.epochs * len(recipe.stages) if len(self.epochs) == 1 else self.epochs
        if epochs and len(epochs) != len(recipe.stages):
            raise RecipeError(
                f"Budget of {recipe.name!r}: {len(epochs)} numbers of epochs for {len(recipe.stages)} stages. Give one "
                "for all, or one per stage."
            )
        stages = zip(recipe.stages, epochs, strict=True) if epochs else ()
        return replace(recipe, stages=tuple(replace(s, epochs=n) for s, n in stages)) if epochs else recipe


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    results: what compare.json holds: `recipes` (the figures of each, over its seeds), `pairs` (differences on the same
    test pictures, each with a `sentence`), `chosen` (the best by validation loss). path: the folder; the runs lie in
    it. page_path: of compare.html.
    """

    results: dict[str, Any]
    path: Path
    page_path: Path


def named_recipe(name: str) -> Recipe:
    """A recipe by name or JSON file; any other word is a freeze line: the default recipe, fine-tuned there.

    The seed in a file, that of the run or sweep which wrote it, is left out.
    """
    is_file = name not in RECIPES and (name.endswith(".json") or Path(name).is_file())
    if name in RECIPES or is_file:
        return replace(load_recipe(name), name=Path(name).stem if is_file else name, seed=Recipe.seed)
    base = RECIPES["fine-tune"]
    return replace(base, name=name, stages=(*base.stages[:-1], replace(base.stages[-1], freeze_line=name)))


@own_settings(draws=True)
def compare(
    data: str | Path | ImageTable | Splits | Bench,
    *,
    recipes: str | Recipe | Sequence[str | Recipe] = DEFAULT_RECIPES,
    seeds: Sequence[int] = (0,),
    budgets: Mapping[str, Budget] | None = None,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    out: str | Path = "runs/compare",
    overwrite: bool = False,
    spec_overrides: Mapping[str, Any] | None = None,
    val: float = 0.15,
    test: float = 0.15,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
    bad_files: str = "error",
    limit: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    compile: str = "auto",
    cache: bool = True,
    audit: bool = True,
    progress: bool = False,
) -> Comparison:
    """Train recipes side by side on the same splits and say what differs by more than chance.

    Equal work is done once: decoded pictures, stored features, and a head stage that several recipes begin with. Each
    recipe's time is stated as it would be alone. The same call on a folder that holds part of the runs goes on there.

    Args:
        recipes: names, JSON files, `Recipe`s, or freeze lines (`last:3`, `layer4`): the default recipe, fine-tuned
            there.
        seeds: of first weights, order and augmentation; the first one also of the split, which all runs share. A
            recipe's own seed is not used.
        budgets: by recipe name, epochs and picture size in place of the recipe's own.
        backbone, weights: of every recipe; one that starts from random weights leaves `weights` out.
        out: folder of compare.json, compare.html and the runs, one per recipe and seed.
        overwrite: replace what other settings left in `out`.
        spec_overrides, val, test, ..., progress: as in `fine_tune`.
    Raises:
        RecipeError: recipes or budgets that cannot be used. CheckpointError: `out` holds something else.
    """
    seeds = _whole_numbers(seeds)
    plans = _plans(recipes, budgets or {})
    overrides = {p.name: _overrides(spec_overrides or {}, (budgets or {}).get(p.name)) for p in plans}
    sizes = {plan.name: check_lines(plan, backbone, weights, overrides[plan.name]) for plan in plans}
    refuse_as_class(out, data, val_folder=val_folder, test_folder=test_folder)
    bench = data if isinstance(data, Bench) else make_bench(
        data, runtime=make_runtime(device=device, precision=precision, workers=workers, compile=compile),
        seed=seeds[0], val=val, test=test, val_folder=val_folder, test_folder=test_folder, root=root,
        bad_files=bad_files, limit=limit, cache=cache, audit=audit, progress=progress,
        spec=spec_of(backbone, weights or "hub", **overrides[plans[-1].name]),
    )  # fmt: skip
    if not len(bench.splits.test):
        raise RecipeError("The test split is empty, but a comparison is made on it. Hold some out: --test 0.15.")
    settings = {
        "backbone": backbone,
        "weights": str(weights or "hub"),
        "contents of the weights": contents_of(weights or "hub"),
        "seed of the split": seeds[0],
        "data": data_digest(bench.splits),
        "contents of the pictures": contents_digest(bench),
        "pictures": json.loads(to_json(dict(spec_overrides or {}))),
        "precision": str(bench.runtime.dtype).removeprefix("torch."),
    }
    folder = settle(out, FILE, settings, overwrite=overwrite)
    started = time.perf_counter()
    runs: dict[str, list[RunRecord]] = {plan.name: [] for plan in plans}
    for seed in seeds:
        if seed != seeds[0]:
            bench.forget()  # what the seed before has shared
        for plan in plans:
            say(f"{plan.name}, seed {seed}", enabled=progress)
            runs[plan.name].append(
                run_or_read(
                    bench, replace(plan, seed=seed), folder / run_name(plan.name, seed), backbone=backbone,
                    weights=weights if plan.pretrained else None, overrides=overrides[plan.name], size=sizes[plan.name],
                    overwrite=overwrite, progress=progress,
                )
            )  # fmt: skip
    results = {"settings": settings, "seeds": list(seeds), "wall_seconds": time.perf_counter() - started}
    results |= summarise(runs, bench.splits)
    write_atomic(folder / FILE, to_json(results, indent=1) + b"\n")
    return Comparison(results, folder, write_comparison(folder))


def run_name(recipe: str, seed: int) -> str:
    """The folder of one run: letters, digits, `.`, `-` and `_` of the recipe's name, and the seed."""
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in recipe).strip("-.") + f"-seed{seed}"


def _plans(recipes: str | Recipe | Sequence[str | Recipe], budgets: Mapping[str, Budget]) -> list[Recipe]:
    given = [recipes] if isinstance(recipes, (str, Path, Recipe)) else recipes
    plans = [recipe if isinstance(recipe, Recipe) else named_recipe(str(recipe)) for recipe in given]
    names = [plan.name for plan in plans]
    if len({run_name(name, 0) for name in names}) != len(names) or not names:
        raise RecipeError(f"Recipes {', '.join(names) or '(none)'}: give one or more, each with a name of its own.")
    for name, budget in budgets.items():
        if not isinstance(budget, Budget):
            raise RecipeError(f"Budget of {name!r} is {budget!r}; it takes a Budget, such as Budget((10,)).")
        if name not in names:
            raise RecipeError(f"Budget for {name!r}, which is not compared. Recipes: {', '.join(names)}.")
    return [budgets[plan.name].apply(plan) if plan.name in budgets else plan for plan in plans]


def _overrides(shared: Mapping[str, Any], budget: Budget | None) -> dict[str, Any]:
    size = budget.image_size if budget else None
    return {**shared, **({"image_size": size} if size is not None else {})}


def _whole_numbers(seeds: Any) -> list[int]:
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        numbers = []
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise RecipeError(f"seeds are {seeds!r}; give one or more different whole numbers from 0, such as (0, 1).")
    return numbers


def check_lines(plan: Recipe, backbone: str, weights: str | Path | None, overrides: Mapping[str, Any]) -> int:
    """Place every line once, on random weights, before pictures are read and hours spent on other recipes.

    Returns:
        The side of the pictures, which is that of the weights given.

    Raises:
        ModelError: a line that selects nothing.
    """
    spec = spec_of(backbone, weights_of(plan, weights if plan.pretrained else None), **overrides)
    own = {**overrides, "image_size": spec.image_size}
    model = create_classifier(backbone, ("a", "b"), head=plan.head, weights="none", **own)
    for stage in plan.stages:
        try:
            set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        except ModelError as error:
            if plan.name in RECIPES or plan.name != stage.freeze_line:
                raise
            recipes = f"It is no recipe either ({', '.join(RECIPES)}).{near_matches(plan.name, tuple(RECIPES))}"
            raise ModelError(f"{error} {recipes}") from None
    return model.spec.image_size


def image_size(run: RunRecord) -> int | None:
    """The side of the pictures that a run was made with."""
    return (run.model.get("preprocessing") or {}).get("image_size")


def run_or_read(
    bench: Bench,
    plan: Recipe,
    path: Path,
    *,
    backbone: str,
    weights: str | Path | None,
    overrides: dict[str, Any],
    size: int,
    overwrite: bool,
    progress: bool,
) -> RunRecord:
    """Train, or read what an earlier call finished with the very same recipe and picture size, or go on with it.

    The bench of both has the same test pictures, or none.

    Raises:
        CheckpointError: a complete run of another recipe or picture size is there, and `overwrite` is not set.
    """
    resume = False
    if path.exists():
        try:
            earlier = read_run(path)
            # As recipes, not as text: a run of a version that did not know an option yet was made with its default.
            same = Recipe.from_dict(earlier.recipe, where=str(path)) == plan
            scored = [split for split in ("val", "test") if earlier.metrics.get(split)]
            whole = scored == (["val", "test"] if len(bench.splits.test) else ["val"]) and not has_points(path)
            if same and image_size(earlier) == size and whole:
                say("  done before; read from its folder", enabled=progress)
                return earlier
        except HeadstartError:
            pass  # torn or something else: the run below says whether it may be replaced
        resume = can_go_on(path, plan, size)
        if is_run(path) and is_complete(path) and not overwrite:
            raise CheckpointError(
                f"Run {path} is complete, of another recipe, budget or picture size. Choose another folder with --out,"
                " or pass --overwrite to replace it."
            )
    try:
        result = fine_tune(
            bench, recipe=plan, out=path, overwrite=path.exists() and not resume, resume=resume, backbone=backbone,
            weights=weights_of(plan, weights), spec_overrides=overrides, progress=progress,
        )  # fmt: skip
    except Interrupted:
        raise Interrupted("Stopped by hand. The same command goes on behind the runs that are done.") from None
    if result.stopped:
        raise Interrupted("Stopped by hand. The same command goes on behind the runs that are done.")
    return read_run(result.run_path or path)


# ---- what the runs say together --------------------------------------------------------------------------------


def summarise(runs: Mapping[str, Sequence[RunRecord]], splits: Splits) -> dict[str, Any]:
    """The recipes' figures over their seeds, and every pair of recipes compared on the same test pictures."""
    test = splits.test.names_from(splits.train.root)
    right = {name: np.stack([test_hits(run, test) for run in of]) for name, of in runs.items()}
    entries = [_entry(name, of, right[name]) for name, of in runs.items()]
    pairs = []
    for a, b in combinations(entries, 2):
        # The one that is better on validation first: the test split chooses nothing.
        a, b = sorted((a, b), key=lambda e: e["val"]["log_loss"])
        pairs.append({"a": a["name"], "b": b["name"], **paired_difference(right[a["name"]], right[b["name"]])})
    judge_pairs(pairs)
    for pair in pairs:
        pair["sentence"] = pair_sentence(pair, len(pairs))
    return {
        "class_names": list(splits.class_names),
        "root": str(splits.train.root),
        "n": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
        "recipes": entries,
        "pairs": pairs,
        "chosen": min(entries, key=lambda e: e["val"]["log_loss"])["name"],
        "majority_baseline": next(iter(runs.values()))[0].metrics["test"]["majority_baseline"],
    }


def test_hits(run: RunRecord, names: Sequence[str]) -> NDArray[np.float64]:
    """1 where the run's prediction is right, for each picture [N] of the test split, called so, in this order."""
    hits = {row["path"]: float(row["pred"] == row["label"]) for row in run.answers if row["split"] == "test"}
    return np.array([hits[name] for name in names])


def _entry(name: str, runs: Sequence[RunRecord], right: NDArray[np.float64]) -> dict[str, Any]:
    first = runs[0]
    stages = first.metrics["stages"]
    seconds = [sum(s["seconds"] + s["shared_seconds"] for s in run.metrics["stages"]) for run in runs]
    mean = {
        split: {key: _mean([run.metrics[split][key] for run in runs]) for key in FIGURES} for split in ("val", "test")
    }
    hits = right.mean(axis=0)
    return {
        "name": name,
        "runs": [run.path.name for run in runs],
        "budget": {
            "epochs": [s["epochs"] for s in first.recipe["stages"]],
            "image_size": image_size(first),
        },
        "freeze_lines": [s["freeze_line"] for s in stages],
        "trained_parameters": max(s["trainable_parameters"] for s in stages),
        "frozen_parameters": min(s["frozen_parameters"] for s in stages),
        "seconds": seconds,
        "shared_seconds": [sum(s["shared_seconds"] for s in run.metrics["stages"]) for run in runs],
        "val": mean["val"],
        "test": {
            **mean["test"],
            "accuracy_ci95": list(wilson_interval(float(hits.sum()), len(hits))),
            "accuracy_per_seed": [run.metrics["test"]["accuracy"] for run in runs],
            "n": len(hits),
        },
        "events": [r["event"]["message"] for run in runs for r in run.history if r.get("event")],
        "verdicts": _verdicts(runs),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None


def _verdicts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Still learning, generalising, overfitting: the most frequent answer, in the words of the first run to give it."""
    asked = [verdicts(run.history, run.metrics)[:3] for run in runs]
    found = []
    for answers in zip(*asked, strict=True):
        given = [verdict.answer for verdict in answers]
        most = max(given, key=given.count)
        verdict = next(v for v in answers if v.answer == most)
        of = f"{given.count(most)} of {len(given)} seeds" if len(given) > 1 else ""
        found.append(
            {"question": verdict.question, "answer": most, "sentence": verdict.sentence, "good": verdict.good, "of": of}
        )
    return found


def pair_sentence(pair: Mapping[str, Any], of: int) -> str:
    """What one of `of` pairs shows, in words.

    Args:
        pair: what `paired_difference` and `judge_pairs` say of it, and the names `a` and `b`.
    """
    names, n = (pair["a"], pair["b"]), f"{pair['n']:,}"
    points, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
    if low <= 0 <= high:
        span = f"{points:+.1f} points (95 % interval {low:+.1f} to {high:+.1f} points)"
        return f"No difference between {' and '.join(names)} that these {n} pictures can show: {span}."
    if points < 0:
        names, points, low, high = names[::-1], -points, -high, -low
    better, worse = names
    ahead = f"by {points:.1f} points on the same {n} test pictures (95 % interval {low:+.1f} to {high:+.1f} points"
    if pair["shown"]:
        return f"{better} is better than {worse} {ahead})."
    # The interval is this pair's alone; what is shown is judged beside the others.
    if of > 1 and pair["p"] < 0.05:
        why = "once the number of comparisons is taken into account"
        p = f"p = {pair['p']:.2g} alone, {pair['p_adjusted']:.2g} among {of} pairs"
    else:
        why, p = "by the paired test", f"p = {pair['p']:.2g}"
    return f"Not shown {why}: {better} is ahead of {worse} {ahead}; {p})."
