"""What do stored features save a sweep? The course notebook's five trials, with them and without.

    python benchmarks/sweep_preset.py [--set flowers5] [--limit N]

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Both sides train the head of
mobilenetv2_100 at 224 px for ten epochs at each (rate, decay) of the preset, on the same pictures, split and seed, with
the default augmentation, and score validation after each epoch. `stored` is `headstart.sweep` from an empty cache;
`pixels`, the baseline, feeds the same loop with pictures decoded once and lets the frozen backbone run in every epoch,
as a plain training loop does. A record is appended to benchmarks/results/sweep_preset-DATE.jsonl and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import headstart
from headstart import train
from headstart.bench import make_bench
from headstart.features import PixelSource, StageData
from headstart.recipe import RECIPES
from headstart.run import environment
from headstart.runtime import make_runtime
from headstart.sweeps import COURSE, COURSE_SPACE

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("HEADSTART_SHARED", HERE.parents[1] / "shared"))
WEIGHTS = SHARED / "weights" / "mobilenetv2_100.safetensors"
EPOCHS = 10


def with_stored_features(photos: Path, limit: int | None) -> dict[str, Any]:
    """The sweep as a user runs it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = headstart.sweep(
            photos, space=COURSE_SPACE, epochs=EPOCHS, weights=WEIGHTS, spec_overrides={"interpolation": "bilinear"},
            out=Path(folder) / "sweep", prune=False, cache=False, limit=limit,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "val_loss": [row["val"]["log_loss"] for row in found.results["trials"]]}


def with_pixels(photos: Path, limit: int | None) -> dict[str, Any]:
    """The same five trials, the backbone running in every step of every epoch."""
    started, losses, each = time.perf_counter(), [], []
    runtime = make_runtime()
    bench = make_bench(headstart.load_images(photos), runtime=runtime, share=True, cache=False, limit=limit)
    stage, recipe = RECIPES["head"].stages[0], RECIPES["head"]
    for lr, decay, _ in COURSE:
        begun = time.perf_counter()
        model = headstart.create_classifier(
            "mobilenetv2_100", bench.splits.class_names, weights=str(WEIGHTS), interpolation="bilinear"
        ).to(runtime.device)
        headstart.set_freeze_line(model, "head")
        pixels = bench.pixels("train", model.spec, augment=recipe.augment_spec, seed=0)
        source = StageData(PixelSource(pixels), PixelSource(bench.pixels("val", model.spec)))
        trial = replace(stage, epochs=EPOCHS, weight_decay=decay)
        losses.append(train.fit(model, source, trial, lr=lr, runtime=runtime).best.loss)
        each.append(time.perf_counter() - begun)
    return {"seconds": time.perf_counter() - started, "seconds_each": each, "val_loss": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="flowers5")
    parser.add_argument("--limit", type=int, help="use so many pictures only")
    options = parser.parse_args()
    photos = SHARED / "data" / options.set
    stored = with_stored_features(photos, options.limit)
    pixels = with_pixels(photos, options.limit)
    record = {
        "set": options.set,
        "limit": options.limit,
        "epochs": EPOCHS,
        "stored": stored,
        "pixels": pixels,
        "ratio": pixels["seconds"] / stored["seconds"],
        "threads": torch.get_num_threads(),
        "versions": environment(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    log = HERE / "results" / f"sweep_preset-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({key: record[key] for key in ("set", "stored", "pixels", "ratio")}, indent=1))


if __name__ == "__main__":
    main()
