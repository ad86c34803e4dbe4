"""Backbones against one another: a linear probe on the stored features of each, then the best few fine-tuned.

The test split chooses nothing: probes and fine-tuned states are ranked on validation pictures, and the one backbone
that is chosen in the end is scored on the test pictures, once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from .backbones import spec_of
from .bench import Bench, contents_digest, data_digest, settle
from .checkpoint import load
from .classifier import Classifier, create_classifier
from .closing import trained_on
from .comparison import run_name, run_or_read
from .dataset import Splits
from .dataspec import DataSpec
from .errors import HeadstartError, ModelError, RecipeError, SetupError
from .features import FeatureSource, make_source
from .files import to_json, write_atomic
from .freezing import set_freeze_line
from .groundwork import make_bench, refuse_as_class
from .linear import fit_ridge
from .metrics import judge_pairs, paired_difference, wilson_interval
from .once import fast_kernels
from .recipe import Recipe, load_recipe
from .recipes import weights_of
from .run_record import RunRecord, is_run, read_run
from .runtime import Runtime, make_runtime
from .settings import own_settings
from .shootout_page import seen_words, write_shootout
from .terminal import ProgressBar, duration, say
from .tracing import evaluation_mode
from .weights import contents_of

FILE = "shootout.json"
PROBED = 2000  # training pictures of a probe at the most, and as many for validation: a ranking needs no more
PROBE_SHARE = 0.5  # of the time: no probe begins later, so that something is left for fine-tuning
TIMED_PICTURES = 16  # of one batch, in float32, as `predict` computes
TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Entrant:
    """One backbone of a shoot-out: its name and weights; `label` is what tables call it."""

    label: str
    backbone: str
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """A run folder, a timm NAME (hub weights), or NAME=WEIGHTS (none, hub, a file, a run folder).

        Raises:
            RecipeError: nothing in front of or behind the sign.
        """
        if is_run(text):
            backbone = (read_run(text).model.get("backbone") or {}).get("name")
            if backbone is None:
                raise RecipeError(f"{text}: this run's backbone is a module of its maker's own, which has no name.")
            return cls(f"{backbone} ({Path(text).name})", backbone, str(Path(text)))
        name, equals, weights = text.partition("=")
        if not name or (equals and not weights):
            raise RecipeError(f"Backbone {text!r}: it takes a timm name, NAME=WEIGHTS, or a run folder.")
        if not weights or weights == "hub":
            return cls(name, name)
        of = "random" if weights == "none" else Path(weights).stem
        return cls(name if of == name else f"{name} ({of})", name, weights)

    @property
    def folder(self) -> str:
        """Of its run: names, and some letters that tell equal ones of other weights, or what those were, apart."""
        contents = contents_of(self.weights) if self.weights else ""
        digest = hashlib.sha256(f"{self.backbone}={self.weights}{contents}".encode()).hexdigest()[:6]
        of = f"{self.backbone} ({Path(self.weights).stem})" if self.weights and contents else self.label
        return run_name(f"{of}-{digest}", 0)


@dataclass(frozen=True)
class Shootout:
    """What `shootout` found.

    results: what shootout.json holds: `entrants`, `pairs` (differences between finalists, each with a `sentence`),
    `chosen` and what it got on the `test` pictures. path: the folder; the finalists' runs lie in it. page_path: of
    shootout.html.
    """

    results: dict[str, Any]
    path: Path
    page_path: Path


@own_settings(draws=True)
def shootout(
    data: Any,
    *,
    backbones: str | Entrant | Sequence[str | Entrant],
    minutes: float = 10.0,
    finalists: int = 3,
    recipe: str | Path | Recipe = "fine-tune",
    spec_overrides: Mapping[str, Any] | None = None,
    out: str | Path = "runs/shootout",
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    compile: str = "auto",
    progress: bool = False,
    **data_options: Any,
) -> Shootout:
    """Probe every backbone on its frozen features, fine-tune the best few while there is time, and choose one.

    Args:
        backbones: as `Entrant.parse` takes them.
        minutes: for everything, reading the pictures included. No probe begins in the second half, and no fine-tuning
            that would take longer than what is left, by the time of a picture and by those that have ended.
        finalists: backbones that are fine-tuned at the most, in the order of their probes' validation loss.
        recipe: of the fine-tuning.
        spec_overrides: of every backbone's preprocessing.
        out: folder of shootout.json, shootout.html and the finalists' runs; the same call takes finished runs from it.
        data_options: val, test, val_folder, test_folder, root, bad_files, limit and cache, as in `fine_tune`.
    Raises:
        RecipeError: backbones or a recipe that cannot be used, or none that can be probed.
    """
    started = time.perf_counter()
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    entrants = _entrants(backbones, plan)
    if not 0 < minutes < math.inf or finalists < 1 or finalists != int(finalists):
        raise RecipeError(f"minutes is {minutes:g} and finalists {finalists}; a shoot-out takes more than 0 of both.")
    overrides = dict(spec_overrides or {})
    refuse_as_class(out, data, **data_options)
    bench = data if isinstance(data, Bench) else make_bench(
        data, runtime=make_runtime(device=device, precision=precision, workers=workers, compile=compile),
        seed=plan.seed, spec=_first_spec(entrants, overrides), progress=progress, **data_options,
    )  # fmt: skip
    settings = {
        "data": data_digest(bench.splits), "contents of the pictures": contents_digest(bench),
        "recipe": json.loads(to_json(plan.to_dict())),
        "pictures": json.loads(to_json(overrides)), "precision": str(bench.runtime.dtype).removeprefix("torch."),
    }  # fmt: skip
    folder = settle(out, FILE, settings, overwrite=overwrite)
    clock = _Clock(started, 60 * minutes)
    blind = bench.without_test()
    rows = [
        _probed(one, blind, plan, overrides, clock, progress) | _seen(one, bench.splits, progress) for one in entrants
    ]
    if not any("probe" in row for row in rows):
        raise RecipeError("No backbone could be probed: " + "; ".join(f"{r['label']}: {r['why_not']}" for r in rows))
    _mark_fronts(rows)
    runs = _fine_tuned(rows, blind, plan, overrides, folder, finalists, clock, overwrite, progress)
    results = {
        "settings": settings, "minutes": minutes, "recipe": plan.name, "class_names": list(bench.splits.class_names),
        "root": str(bench.splits.train.root),
        "n": {part: len(table) for part, table in bench.splits.named().items()},
        "n_probed": min(PROBED, len(bench.splits.train)), "entrants": rows, "pairs": _pairs(runs),
        **_chosen(rows, bench, folder), "wall_seconds": time.perf_counter() - started,
        "earlier_seconds": sum(
            row["fine_tuned"]["seconds"] for row in rows if "fine_tuned" in row and not row["fine_tuned"]["trained_now"]
        ),
    }  # fmt: skip
    write_atomic(folder / FILE, to_json(results, indent=1) + b"\n")
    return Shootout(results, folder, write_shootout(folder))


@dataclass(frozen=True)
class _Clock:
    """Seconds since the call, of those it may take."""

    started: float
    limit: float

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started


def _first_spec(entrants: Sequence[Entrant], overrides: Mapping[str, Any]) -> DataSpec | None:
    """The preprocessing of the first backbone that can be had: the look at the pictures decodes them for it, too."""
    for one in entrants:
        with suppress(HeadstartError):  # why not is told where it is probed
            return spec_of(one.backbone, one.weights or "hub", **overrides)
    return None


def _entrants(backbones: str | Entrant | Sequence[str | Entrant], plan: Recipe) -> list[Entrant]:
    given = [backbones] if isinstance(backbones, (str, Entrant)) else backbones
    found = [one if isinstance(one, Entrant) else Entrant.parse(one) for one in given]
    labels = [one.label for one in found]
    found = [  # runs in folders of one name, each called by its whole path
        replace(one, label=f"{one.backbone} ({one.weights})") if one.weights and labels.count(one.label) > 1 else one
        for one in found
    ]
    labels = [one.label for one in found]
    if not found or len({*labels}) != len(labels):
        raise RecipeError(f"Backbones {', '.join(labels) or '(none)'}: give one or more, each once.")
    if not plan.pretrained:
        raise RecipeError(f"Recipe {plan.name!r} starts from random weights; a shoot-out is between pretrained ones.")
    return found


# ---- probes ----------------------------------------------------------------------------------------------------


def _probed(
    one: Entrant, bench: Bench, plan: Recipe, overrides: dict[str, Any], clock: _Clock, show: bool
) -> dict[str, Any]:
    """What one backbone costs and how its probe does, or why there is none."""
    row: dict[str, Any] = {"label": one.label, "backbone": one.backbone, "weights": one.weights or "hub",
                           "run": one.folder}  # fmt: skip
    if clock.passed > PROBE_SHARE * clock.limit:
        return {**row, "why_not": f"no time for a probe in the first {duration(PROBE_SHARE * clock.limit)}"}
    try:
        model = create_classifier(
            one.backbone, bench.splits.class_names, head=plan.head, weights=str(weights_of(plan, one.weights)),
            seed=plan.seed, **overrides,
        ).to(bench.runtime.device)  # fmt: skip
        for stage in plan.stages:  # a line that is not in this network is found before others are trained
            set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        row |= _costs(model, bench)
        row["probe"] = probe_on(model, bench, show=show)
    except HeadstartError as error:
        say(f"{one.label}: {error}", enabled=show)
        return {**row, "why_not": str(error).splitlines()[0]}
    found = row["probe"]
    say(
        f"{one.label}: probe {found['accuracy']:.4f} of the validation pictures right, loss {found['log_loss']:.4f}"
        f" ({found['seconds']:.1f} s)",
        enabled=show,
    )
    return row


def _seen(one: Entrant, splits: Splits, show: bool) -> dict[str, Any]:
    """How many of the pictures that score it a run folder has met before: its figures are then too good."""
    if one.weights is None or not is_run(one.weights) or not _trained_its_backbone(Path(one.weights)):
        return {}
    row = {"seen": {part: int(trained_on(Path(one.weights), splits.named()[part]).sum()) for part in ("val", "test")}}
    say(f"{one.label}: {seen_words(row)}", enabled=show and any(row["seen"].values()))
    return row


def _trained_its_backbone(run: Path) -> bool:
    """Whether its backbone is more than the weights it began with; a run that began with another's is taken to be."""
    metrics = read_run(run).metrics
    began_with_a_run = is_run(metrics.get("weights") or "")
    return began_with_a_run or any(stage["freeze_line"] != "head" for stage in metrics.get("stages", []))


def _costs(model: Classifier, bench: Bench) -> dict[str, Any]:
    parameters = sum(p.numel() for p in model.backbone.parameters())
    stored = sum(t.numel() * t.element_size() for t in model.backbone.state_dict().values())
    return {
        "image_size": model.spec.image_size,
        "parameters": parameters,
        "megabytes": stored / 1e6,
        "ms_per_picture": 1000 * seconds_per_picture(model, bench.runtime),
    }


def seconds_per_picture(model: Classifier, runtime: Runtime) -> float:
    """Median time of a picture in batches of 16, in float32 as `predict` computes, decoding left out."""
    side = model.spec.image_size
    pixels = torch.randint(0, 256, (TIMED_PICTURES, 3, side, side), dtype=torch.uint8, device=runtime.device)
    exact = replace(runtime, dtype=torch.float32)
    times: list[float] = []
    with evaluation_mode(model), fast_kernels(model, exact), torch.inference_mode():
        model(pixels)  # the first one sets things up
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < TIMED_SECONDS:
            start = time.perf_counter()
            float(model(pixels).sum())  # waits for a GPU
            times.append(time.perf_counter() - start)
    return float(np.median(times)) / TIMED_PICTURES


def probe_on(model: Classifier, bench: Bench, *, show: bool = False) -> dict[str, Any]:
    """A ridge classifier on the frozen features of the plain training pictures, scored on the validation pictures.

    Its penalty is chosen on those too, for every backbone alike.
    """
    started = time.perf_counter()
    splits = bench.splits
    seen = Splits(splits.train.limit(PROBED), splits.val.limit(PROBED), splits.test)
    few = Bench(seen, bench.runtime, cache=bench.cache, progress=bench.progress)
    set_freeze_line(model, "head")
    train, val = few.pixels("train", model.spec), few.pixels("val", model.spec)
    with ProgressBar(len(train) + len(val), f"  {model.backbone_name}", enabled=show) as bar:
        source = make_source(train, val, model, views=1, runtime=bench.runtime, advance=bar.advance)
    assert isinstance(source.train, FeatureSource)
    assert isinstance(source.val, FeatureSource)
    x, held = (part.features[:, 0].float().nan_to_num(0.0, 0.0, 0.0) for part in (source.train, source.val))
    found = fit_ridge(x, source.train.labels, held, source.val.labels, len(seen.class_names))
    right = int(((held @ found.weight.T + found.bias).argmax(1) == source.val.labels).sum())
    return {
        "accuracy": right / len(held), "accuracy_ci95": list(wilson_interval(right, len(held))),
        "log_loss": found.loss, "n": len(held), "seconds": time.perf_counter() - started,
    }  # fmt: skip


# ---- finals ----------------------------------------------------------------------------------------------------


def _fine_tuned(
    rows: list[dict[str, Any]], bench: Bench, plan: Recipe, overrides: dict[str, Any], folder: Path, finalists: int,
    clock: _Clock, overwrite: bool, show: bool,
) -> dict[str, RunRecord]:  # fmt: skip
    """Fine-tune in the order of the probes while the time lasts; what each came to goes into its row."""
    runs: dict[str, RunRecord] = {}
    slower = 1.0  # how much longer than estimated the ones before took
    for row in sorted((r for r in rows if "probe" in r), key=lambda r: r["probe"]["log_loss"]):
        if len(runs) == finalists:
            row["why_not"] = f"not among the {finalists} best probes"
            continue
        estimate = estimated_seconds(plan, len(bench.splits.train), row["ms_per_picture"] / 1000)
        left = clock.limit - clock.passed
        if not (folder / row["run"]).exists() and slower * estimate > left:
            row["why_not"] = f"it would take about {duration(slower * estimate)} of the {duration(max(0, left))} left"
            continue
        say(f"{row['label']}: fine-tuning", enabled=show)
        done = folder / row["run"] / "metrics.json"
        before = done.stat().st_mtime_ns if done.exists() else None
        try:
            run = run_or_read(
                bench, plan, folder / row["run"], backbone=row["backbone"],
                weights=None if row["weights"] == "hub" else row["weights"], overrides=overrides,
                size=row["image_size"], overwrite=overwrite, progress=show,
            )  # fmt: skip
        except (ModelError, SetupError) as error:  # of this backbone: the others may still win
            row["why_not"] = str(error).splitlines()[0]
            say(f"{row['label']}: {error}", enabled=show)
            continue
        seconds = sum(stage["seconds"] for stage in run.metrics["stages"])
        trained_now = done.stat().st_mtime_ns != before  # else by an earlier call
        if trained_now:
            slower = seconds / max(estimate, 1e-9)
        runs[row["label"]] = run
        score = run.metrics["val"]
        row["fine_tuned"] = {
            **{key: score[key] for key in ("accuracy", "accuracy_ci95", "log_loss", "n")}, "seconds": seconds,
            "trained_now": trained_now,
        }  # fmt: skip
    return runs


def estimated_seconds(plan: Recipe, pictures: int, seconds_per_picture: float) -> float:
    """What a recipe's stages take, from a picture's time through the whole network: a step is three passes."""
    passes = 0
    for stage in plan.stages:
        passes += stage.views + (0 if stage.freeze_line == "head" else 3 * stage.epochs)
    return passes * pictures * seconds_per_picture


def _pairs(runs: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """Every pair of finalists on the same validation pictures, and whether chance explains the difference."""
    right = {label: _hits(run) for label, run in runs.items()}
    pairs: list[dict[str, Any]] = [
        {"a": a, "b": b, **paired_difference(right[a], right[b])} for a, b in combinations(right, 2)
    ]
    judge_pairs(pairs)
    for pair in pairs:
        better, worse = (pair["a"], pair["b"]) if pair["difference"] > 0 else (pair["b"], pair["a"])
        points, n = 100 * abs(pair["difference"]), f"{pair['n']:,} validation pictures"
        pair["sentence"] = (
            f"{better} is better than {worse} by {points:.1f} points on the same {n}."
            if pair["shown"]
            else f"No difference between {pair['a']} and {pair['b']} that these {n} can show ({points:.1f} points)."
        )
    return pairs


def _hits(run: RunRecord) -> list[float]:
    rows = sorted((row for row in run.answers if row["split"] == "val"), key=lambda row: row["path"])
    return [float(row["pred"] == row["label"]) for row in rows]


def _chosen(rows: Sequence[Mapping[str, Any]], bench: Bench, folder: Path) -> dict[str, Any]:
    """The fine-tuned backbone with the least validation loss, and what it gets on the test pictures."""
    tuned = [row for row in rows if "fine_tuned" in row]
    if not tuned:
        best = min((row for row in rows if "probe" in row), key=lambda row: row["probe"]["log_loss"])
        return {"chosen": best["label"], "test": None}
    best = min(tuned, key=lambda row: row["fine_tuned"]["log_loss"])
    if not len(bench.splits.test):
        return {"chosen": best["label"], "test": None}
    model = load(folder / best["run"], device=bench.runtime.device)
    score = bench.evaluate(model, "test").metrics
    keys = ("accuracy", "accuracy_ci95", "log_loss", "n", "majority_baseline")
    return {"chosen": best["label"], "test": {key: score[key] for key in keys}}


def _mark_fronts(rows: Sequence[dict[str, Any]]) -> None:
    """Tell the rows whose probe no cheaper one matches, by time and by size; fine-tuned figures not all rows have."""
    probed = [row for row in rows if "probe" in row]
    for kind, cost in (("time", "ms_per_picture"), ("size", "megabytes")):
        flags = pareto_front([(row[cost], row["probe"]["accuracy"]) for row in probed])
        for row, is_on in zip(probed, flags, strict=True):
            row.setdefault("front", {})[kind] = is_on


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For (cost, accuracy) points: whether no other costs no more and is at least as accurate, and better in one."""
    return [not any(c <= cost and a >= share and (c, a) != (cost, share) for c, a in points) for cost, share in points]
