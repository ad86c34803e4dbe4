"""Which fine-tuning stage should be the default? A trained head, then several stages from it, judged on validation.

    python benchmarks/fine_tuning_variants.py run --sets flowers5,hymenoptera,dogs10,emotions3 --seeds 0,1
    python benchmarks/fine_tuning_variants.py table [--write]    # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with ImageNet
weights at 224 px, head stage of the default recipe. The baseline in the same run is the head as it is before any
fine-tuning. The choice is by validation loss; the test split is not looked at. Records are appended to
benchmarks/results/fine_tuning_variants-DATE.jsonl. All ran on one thread beside other work: seconds are the
processor's (older records have the wall's alone), and are compared with those of the default that ran last before, on
the same set and seed.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from records import SHARED, WEIGHTS, Record, append, parser, read, show

import headstart
from headstart.recipe import FINE_TUNE_STAGE, HEAD_STAGE, RECIPES, Stage

# What each changes in the default fine-tuning stage; `lr` is its own rate, `head_lr` that of the head it starts from.
# Rows of others are of older records.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"freeze_line": "last:60%", "epochs": 3, "views": 3, "lr": 1e-4},
    {"freeze_line": "last:60%", "epochs": 4, "views": 4, "lr": 1e-4},
    {"freeze_line": "last:80%", "epochs": 3, "views": 3, "lr": 1e-4},
    {"freeze_line": "last:60%", "epochs": 3, "views": 2, "lr": 1e-4},
    {"freeze_line": "last:60%", "epochs": 5, "views": 2},
    {"freeze_line": "last:60%", "epochs": 3, "views": 3, "batch_size": 16, "ema": 0.8},
    {"freeze_line": "last:60%", "epochs": 3, "views": 3, "batch_size": 16, "head_lr_multiplier": 10.0},
    {"freeze_line": "last:60%", "epochs": 3, "views": 3, "batch_size": 8},
    {"epochs": 4},
    {"epochs": 4, "lr": 6.5e-5},
    {"freeze_line": "last:60%", "epochs": 3, "views": 3, "lr": 1e-4, "head_lr": 1e-2},
    {"freeze_line": "last:60%", "epochs": 4, "views": 4, "lr": 1e-4, "head_lr": 1e-2},
)
COMPARED = (
    "freeze_line", "epochs", "views", "lr", "head_lr", "head_lr_multiplier", "batch_size", "schedule", "warmup", "ema",
    "wise",
)  # fmt: skip
DEFAULT = {name: getattr(FINE_TUNE_STAGE, name) for name in COMPARED if not name.endswith("lr")}
DEFAULT["lr"] = RECIPES["fine-tune"].lr * FINE_TUNE_STAGE.lr_scale
DEFAULT["head_lr"] = RECIPES["fine-tune"].lr
DEFAULT_NAME, HEAD_NAME = "**the default**", "no fine-tuning: the head alone"
SETS = ("flowers5", "hymenoptera", "dogs10", "emotions3")


def run_one(name: str, seed: int) -> list[dict[str, Any]]:
    """For each rate of the head: the head's record, then one for each variant that starts from it."""
    table = headstart.load_images(SHARED / "data" / name, test_folder="val" if name == "hymenoptera" else None)
    splits = headstart.split(table, seed=seed)
    model = headstart.create_classifier(
        "mobilenetv2_100", splits.class_names, weights=str(WEIGHTS), interpolation="bilinear", seed=seed
    )
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records: list[dict[str, Any]] = []

    def train(stage: Stage, variant: dict[str, Any] | str, lr: float, **options: Any) -> None:
        headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        started, computed = time.perf_counter(), time.process_time()
        result = headstart.fit(model, splits, stage, lr=lr, seed=seed, **options)
        records.append(
            {
                "set": name,
                "seed": seed,
                "variant": variant,
                "seconds": round(time.perf_counter() - started, 1),
                "processor_seconds": round(time.process_time() - computed, 1),
                "val_loss": round(result.best.loss, 4),
                "val_accuracy": round(result.best.accuracy, 4),
                "rolled_back": any(event["kind"] == "rollback" for event in result.events),
            }
        )

    for head in dict.fromkeys((DEFAULT | v)["head_lr"] for v in VARIANTS):
        model.load_state_dict(fresh)
        train(HEAD_STAGE, "head", head)
        records[-1]["head_lr"] = head
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for variant in (DEFAULT | v for v in VARIANTS if (DEFAULT | v)["head_lr"] == head):
            model.load_state_dict(trained)
            own = {k: v for k, v in variant.items() if k not in ("lr", "head_lr")}
            train(replace(FINE_TUNE_STAGE, **own), variant, variant["lr"], starts_trained=True)
    return records


def changes(record: Record) -> str:
    """What a stage changes in the default one, in words; the head alone can only have had another rate."""
    variant = record["variant"]
    if isinstance(variant, str):
        rate = record.get("head_lr", DEFAULT["head_lr"])
        return HEAD_NAME if rate == DEFAULT["head_lr"] else f"{HEAD_NAME}, head_lr {rate}"
    told = {name: variant[name] for name in COMPARED if variant.get(name, DEFAULT[name]) != DEFAULT[name]}
    return ", ".join(f"{name} {value}" for name, value in told.items()) or DEFAULT_NAME


def seconds(run: Record, default: Record) -> float:
    """The seconds of a stage over the default's: of the processor where both records have them."""
    unit = "processor_seconds" if "processor_seconds" in run and "processor_seconds" in default else "seconds"
    return run[unit] / default[unit]


def table() -> str:
    """Markdown: for each stage, its validation loss over the default's on the same sets and seeds, and its seconds."""
    runs: dict[str, list[tuple[Record, Record]]] = {}
    defaults: dict[tuple[str, int], Record] = {}
    records = read("fine_tuning_variants")
    for record in reversed(records):  # for a run with no default before it: the first one after it
        if changes(record) == DEFAULT_NAME:
            defaults[record["set"], record["seed"]] = record
    for record in records:
        name, where = changes(record), (record["set"], record["seed"])
        if name == DEFAULT_NAME:
            defaults[where] = record
        if where in defaults:
            runs.setdefault(name, []).append((record, defaults[where]))
    out = [f"| what is changed | seconds | {' | '.join(SETS)} |", "|---" * (2 + len(SETS)) + "|"]
    for name in (DEFAULT_NAME, HEAD_NAME, *sorted(runs.keys() - {DEFAULT_NAME, HEAD_NAME})):
        ratio = statistics.median(seconds(run, default) for run, default in runs[name])
        cells = []
        for wanted in SETS:
            by_seed = {run["seed"]: (run, default) for run, default in runs[name] if run["set"] == wanted}
            if not by_seed:
                cells.append("")
            elif name == DEFAULT_NAME:
                cells.append(f"{statistics.mean(run['val_loss'] for run, _ in by_seed.values()):.3f} ({len(by_seed)})")
            else:
                more = statistics.mean(run["val_loss"] - default["val_loss"] for run, default in by_seed.values())
                cells.append(f"{more:+.3f} ({len(by_seed)})")
        out.append(f"| {name} | {'' if name.startswith(HEAD_NAME) else f'{ratio:.2f}x'} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    line = parser(__doc__, "run")
    line.add_argument("--sets", default=",".join(SETS))
    line.add_argument("--seeds", default="0,1")
    options = line.parse_args()
    if options.what == "table":
        show(table(), "variants", write=options.write)
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for record in run_one(name, seed):
                append("fine_tuning_variants", record)


if __name__ == "__main__":
    main()
