"""How many stored views of a picture are as good as a fresh one in every epoch?

    python benchmarks/views.py run [--sets flowers5,hymenoptera,hotdog] [--seeds 0,1,2]
    python benchmarks/views.py stored --sets hotdog                   # without the fresh ones: a fourth of the price
    python benchmarks/views.py pixels --sets flowers5 --seeds 0       # fresh views through the whole network
    python benchmarks/views.py fine-tune --sets flowers5 --seeds 0    # the same question for the second stage
    python benchmarks/views.py table [--write]                        # the tables in docs/benchmarks.md

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with ImageNet
weights at 224 px, default augmentation. `run` is the head stage of the default recipe, 30 epochs: K = 1 (the plain
picture alone), 2, 4 and 8 stored views, and a fresh view in every epoch. View v of a picture is the same for all of
them, so the frozen backbone runs once over views 0 to 30: K views are its first K, and epoch e of `fresh` takes view e.
A seed (split, first weights, order, views) is compared with itself; the baseline is the default K. Processor seconds
are what a run of that kind alone takes: decoding, its own share of the views, and its own training. `pixels` trains
with fresh views in the loop, the backbone in every step, as a check of both the figures and the price.

`fine-tune` is the default second stage (line at 80 % of the layers, five epochs) from one trained head for all K; with
8 views and five epochs no view is shown twice. Test pictures: the set's own test folder (hymenoptera: its val folder).
Records are appended to benchmarks/results/views-DATE.jsonl; what is there is not run again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from records import SHARED, WEIGHTS, Record, append, newest, parser, show
from runner_common import processor_seconds
from scipy import stats
from torch import Tensor

import headstart
from headstart import train
from headstart.averaging import restore, snapshot
from headstart.bench import Bench
from headstart.classifier import Classifier
from headstart.evaluation import Evaluation
from headstart.features import FeatureSource, PixelSource, StageData
from headstart.metrics import paired_difference
from headstart.once import store_features
from headstart.recipe import RECIPES
from headstart.runtime import make_runtime
from headstart.stage_result import StageResult

SETS = ("flowers5", "hymenoptera", "hotdog")
VIEWS = (1, 2, 4, 8)
FRESH, PIXELS = "fresh", "fresh, from pixels"
KINDS = (*map(str, VIEWS), FRESH, PIXELS)
RECIPE = RECIPES["head"]
STAGE = RECIPE.stages[0]


class FreshFeatures(FeatureSource):
    """Features [N, 1 + epochs, D] of which epoch e gets view e, as the loop gives it pixels."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        super().__init__(features, labels)
        self.num_views = None


def opened(name: str, seed: int) -> tuple[Bench, Classifier]:
    table = headstart.load_images(SHARED / "data" / name, test_folder="val" if name == "hymenoptera" else None)
    splits = headstart.split(table, seed=seed)
    model = headstart.create_classifier(
        "mobilenetv2_100", splits.class_names, weights=str(WEIGHTS), interpolation="bilinear", seed=seed
    )
    return Bench(splits, make_runtime(device="cpu"), share=True, cache=False), model


def timed(job: Callable[[], Any]) -> tuple[Any, float]:
    """What the job gives, and its processor seconds."""
    busy = processor_seconds()
    found = job()
    return found, processor_seconds() - busy


def outcome(result: StageResult, scored: Evaluation, **known: object) -> Record:
    hits = (scored.preds == scored.table.labels).astype(int)
    return {
        **known, "val_loss": result.best.loss, "val_accuracy": result.best.accuracy, "best_epoch": result.best_epoch,
        "test_accuracy": scored.metrics["accuracy"], "test_ci95": scored.metrics["accuracy_ci95"],
        "test_log_loss": scored.metrics["log_loss"], "test_hits": "".join(map(str, hits)),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def head_stages(name: str, seed: int, *, kinds: tuple[int | str, ...] = (*VIEWS, FRESH)) -> list[Record]:
    """The head stage with every number of stored views and with fresh ones, from the same first weights."""
    needed = 1 + STAGE.epochs if FRESH in kinds else max(map(int, kinds))
    bench, model = opened(name, seed)
    headstart.set_freeze_line(model, STAGE.freeze_line)
    parts = {
        split: bench.pixels(split, model.spec, augment=RECIPE.augment_spec if split == "train" else None, seed=seed)
        for split in ("train", "val", "test")
    }
    labels = {split: torch.tensor(pixels.table.labels) for split, pixels in parts.items()}
    n = len(parts["train"])

    def decode() -> None:
        for first in range(0, n, 32):
            chosen = range(first, min(n, first + 32))
            for view in (0, 1):
                parts["train"].batch(chosen, [view] * len(chosen))

    _, decoding = timed(decode)
    features, passing = timed(lambda: store_features(model, parts["train"], views=needed, runtime=bench.runtime))
    exact = replace(bench.runtime, dtype=torch.float32)
    (val, test), scoring = timed(
        lambda: [store_features(model, parts[split], runtime=exact) for split in ("val", "test")]
    )
    each, untrained = passing / features.shape[1], snapshot(model)
    found = []
    for kind in kinds:
        restore(model, untrained)
        views = STAGE.epochs if kind == FRESH else int(kind)
        source = (
            FreshFeatures(features, labels["train"])
            if kind == FRESH
            else FeatureSource(features[:, :views], labels["train"])
        )
        data = StageData(source, FeatureSource(val, labels["val"]))
        result, training = timed(
            lambda data=data: train.fit(model, data, STAGE, lr=RECIPE.lr, seed=seed, runtime=bench.runtime)
        )
        with torch.inference_mode():
            scored = Evaluation.from_logits(model.eval().head(test[:, 0]), parts["test"].table)
        found.append(
            outcome(
                result, scored, stage="head", set=name, seed=seed, kind=str(kind), n_train=n, n_val=len(val),
                processor_seconds=round(decoding + views * each + scoring + training, 2), seconds_of_a_view=each,
                seconds_of_training=training,
            )
        )  # fmt: skip
    return found


def head_from_pixels(name: str, seed: int) -> list[Record]:
    """The head stage with fresh views in the loop, as a plain training loop does it."""
    bench, model = opened(name, seed)
    headstart.set_freeze_line(model, STAGE.freeze_line)

    def job() -> tuple[StageResult, Evaluation]:
        pixels = bench.pixels("train", model.spec, augment=RECIPE.augment_spec, seed=seed)
        data = StageData(PixelSource(pixels), PixelSource(bench.pixels("val", model.spec)))
        result = train.fit(model, data, STAGE, lr=RECIPE.lr, seed=seed, runtime=bench.runtime)
        return result, bench.evaluate(model, "test")

    (result, scored), seconds = timed(job)
    sizes = {"n_train": len(bench.splits.train), "n_val": len(bench.splits.val)}
    return [
        outcome(
            result, scored, stage="head", set=name, seed=seed, kind=PIXELS, processor_seconds=round(seconds, 2), **sizes
        )
    ]  # fmt: skip


def fine_tuning(name: str, seed: int) -> list[Record]:
    """The default second stage with every number of stored views, from one head."""
    bench, model = opened(name, seed)
    first, second = RECIPES["fine-tune"].stages
    found: list[Record] = []
    trained = None
    for stage in (first, *(replace(second, views=views) for views in VIEWS)):
        if trained is not None:
            model.load_state_dict(trained)
        headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        result, seconds = timed(
            lambda stage=stage: headstart.fit(
                model, bench.splits, stage, lr=RECIPE.lr * stage.lr_scale, seed=seed, runtime=bench.runtime,
                starts_trained=stage is not first, cache=False,
            )
        )  # fmt: skip
        found.append(
            outcome(
                result, bench.evaluate(model, "test"), stage="fine-tune", set=name, seed=seed,
                kind="head" if stage is first else str(stage.views), n_train=len(bench.splits.train),
                n_val=len(bench.splits.val), processor_seconds=round(seconds, 2),
            )
        )  # fmt: skip
        trained = trained or {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return found


def over_seeds(differences: list[float], digits: int) -> str:
    """The mean, with Student's 95 % interval over the seeds where there are two or more."""
    mean, n = statistics.mean(differences), len(differences)
    text = f"{mean:+.{digits}f}"
    if n < 2:
        return text
    reach = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return f"{text} ({mean - reach:+.{digits}f} to {mean + reach:+.{digits}f})"


def rows_of(stage: str, default: int) -> list[str]:
    """One row for each set and kind; differences are to the default number of views, over the seeds both have."""
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in newest("views", "stage", "set", "seed", "kind"):
        if record["stage"] == stage:
            runs.setdefault((record["set"], record["kind"]), {})[record["seed"]] = record
    rows = []
    for name, kind in [(name, kind) for name in SETS for kind in (*KINDS, "head") if (name, kind) in runs]:
        mine, base = runs[name, kind], runs[name, str(default)]
        both = sorted(mine.keys() & base.keys())
        mean = {key: statistics.mean(r[key] for r in mine.values()) for key in ("val_loss", "test_accuracy")}
        low, high = (statistics.mean(r["test_ci95"][i] for r in mine.values()) for i in (0, 1))
        hits = [[[int(hit) for hit in of[seed]["test_hits"]] for seed in both] for of in (mine, base)]
        points = {key: 100 * value for key, value in paired_difference(*hits).items()}
        losses = {
            key: over_seeds([mine[seed][key] - base[seed][key] for seed in both], 3)
            for key in ("val_loss", "test_log_loss")
        }
        same = kind == str(default)
        seconds = statistics.median(r["processor_seconds"] for r in mine.values())
        cells = (
            name, f"**{kind}**" if same else kind, len(mine), f"{seconds:.0f}", f"{mean['val_loss']:.3f}",
            f"{mean['test_accuracy']:.3f} ({low:.3f} - {high:.3f})",
            "" if same else f"{points['difference']:+.1f} ({points['low']:+.1f} to {points['high']:+.1f})",
            "" if same else losses["test_log_loss"], "" if same else losses["val_loss"],
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def table() -> str:
    """Markdown: a table for each stage that has been run."""
    heading = [
        "| set | views | seeds | processor seconds | validation loss | test accuracy | points to the default"
        " | test log loss to the default | validation loss to the default |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    default = {stage.name: stage.views for stage in RECIPES["fine-tune"].stages}
    parts = []
    for stage, title in (("head", "The head stage"), ("fine-tune", "The fine-tuning stage, from the trained head")):
        rows = rows_of(stage, default[stage])
        if rows:
            parts += [f"### {title}", "", *heading, *rows, ""]
    return "\n".join(parts).strip()


JOBS: dict[str, tuple[Callable[[str, int], list[Record]], str, str]] = {
    "run": (head_stages, "head", FRESH),
    "stored": (partial(head_stages, kinds=VIEWS), "head", str(VIEWS[-1])),
    "pixels": (head_from_pixels, "head", PIXELS),
    "fine-tune": (fine_tuning, "fine-tune", str(VIEWS[-1])),
}
"""What to call, and the stage and the last kind of its records."""


def main() -> None:
    options = parser(__doc__, *JOBS)
    options.add_argument("--sets", default=",".join(SETS))
    options.add_argument("--seeds", default="0,1,2")
    args = options.parse_args()
    if args.what == "table":
        show(table(), "views", write=args.write)
        return
    job, stage, last = JOBS[args.what]
    done = {(r["set"], r["seed"]) for r in newest("views", "stage", "set", "seed", "kind")
            if (r["stage"], r["kind"]) == (stage, last)}  # fmt: skip
    for seed in map(int, args.seeds.split(",")):
        for name in args.sets.split(","):
            if (name, seed) in done:
                continue
            for record in job(name, seed):
                append("views", record)
                shown = {key: round(record[key], 4) for key in ("val_loss", "test_accuracy", "processor_seconds")}
                print(name, seed, record["kind"], shown, flush=True)


if __name__ == "__main__":
    main()
