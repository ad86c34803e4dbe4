"""Which fine-tuning stage should be the default? One trained head, then several stages from it, judged on validation.

    python benchmarks/fine_tuning_variants.py run --sets flowers5 --seeds 0,1,2
    python benchmarks/fine_tuning_variants.py table

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with ImageNet
weights at 224 px, head stage of the default recipe. The baseline in the same run is the head as it is before any
fine-tuning. The choice is by validation loss, meaned over seeds; the test split is not looked at. Records are appended
to benchmarks/results/fine_tuning_variants-DATE.jsonl. Those of 2026-11-24 ran on one thread beside other work, so their
seconds are upper bounds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from records import SHARED, WEIGHTS, append, parser, read

import headstart
from headstart.recipe import FINE_TUNE_STAGE, RECIPES

# What each changes in the default fine-tuning stage; `lr` is the stage's own rate.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"freeze_line": "last:80%", "epochs": 4, "wise": True, "ema": 0.0, "views": 4, "lr": 1e-4, "warmup": 0.1},
    {"freeze_line": "last:80%", "epochs": 4, "wise": True, "ema": 0.9, "views": 2, "lr": 1e-4, "warmup": 0.1},
    {"freeze_line": "blocks.3*", "epochs": 4, "wise": True, "ema": 0.9, "views": 4, "lr": 1e-4, "warmup": 0.1},
    {"freeze_line": "blocks.3*", "epochs": 6, "wise": True, "ema": 0.9, "views": 4, "lr": 2e-4, "warmup": 0.1},
    {"freeze_line": "last:80%", "epochs": 4, "wise": True, "ema": 0.9, "views": 4, "lr": 1e-4, "warmup": 0.3},
    {"freeze_line": "last:80%", "epochs": 5, "wise": True, "ema": 0.9, "views": 4, "lr": 5e-5, "warmup": 0.2},
    {"freeze_line": "all", "epochs": 8, "wise": False, "ema": 0.0, "views": 2, "lr": 5e-5, "warmup": 0.1},
)


def run_one(name: str, seed: int) -> list[dict[str, Any]]:
    """The head's record, then one for each variant."""
    table = headstart.load_images(SHARED / "data" / name, test_folder="val" if name == "hymenoptera" else None)
    splits = headstart.split(table, seed=seed)
    model = headstart.create_classifier(
        "mobilenetv2_100", splits.class_names, weights=str(WEIGHTS), interpolation="bilinear", seed=seed
    )
    recipe = RECIPES["fine-tune"]
    records, trained = [], None
    for variant in ({}, *VARIANTS):
        stage = recipe.stages[0]
        if variant:
            stage = replace(FINE_TUNE_STAGE, **{k: v for k, v in variant.items() if k != "lr"})
            model.load_state_dict(trained)
        headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        started = time.perf_counter()
        result = headstart.fit(
            model, splits, stage, lr=variant.get("lr", recipe.lr), seed=seed, starts_trained=bool(variant)
        )
        trained = trained or {name: tensor.clone() for name, tensor in model.state_dict().items()}
        records.append(
            {
                "set": name,
                "seed": seed,
                "variant": variant or "head",
                "seconds": round(time.perf_counter() - started, 1),
                "val_loss": round(result.best.loss, 4),
                "val_accuracy": round(result.best.accuracy, 4),
                "rolled_back": any(event["kind"] == "rollback" for event in result.events),
            }
        )
    return records


def table() -> str:
    """Markdown: each variant's validation loss, meaned over the seeds that have it, best first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in read("fine_tuning_variants"):
        variant = record["variant"]
        text = variant if variant == "head" else ", ".join(f"{k} {v}" for k, v in variant.items())
        groups.setdefault((record["set"], text), []).append(record)
    rows = [(name, statistics.mean(r["val_loss"] for r in rs), text, rs) for (name, text), rs in groups.items()]
    out = ["| set | stage | seeds | validation loss | accuracy | rolled back |", "|---|---|---|---|---|---|"]
    for name, loss, text, rs in sorted(rows, key=lambda row: row[:2]):
        seeds = ",".join(str(r["seed"]) for r in rs)
        accuracy, backs = statistics.mean(r["val_accuracy"] for r in rs), sum(r["rolled_back"] for r in rs)
        out.append(f"| {name} | {text} | {seeds} | {loss:.3f} | {accuracy:.3f} | {backs} of {len(rs)} |")
    return "\n".join(out)


def main() -> None:
    line = parser(__doc__, "run")
    line.add_argument("--sets", default="flowers5")
    line.add_argument("--seeds", default="0,1,2")
    options = line.parse_args()
    if options.what == "table":
        print(table())
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for record in run_one(name, seed):
                append("fine_tuning_variants", record)


if __name__ == "__main__":
    main()
