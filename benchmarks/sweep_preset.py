"""What do stored features save a sweep? The course notebook's five trials, with them and without.

    python benchmarks/sweep_preset.py run [--set flowers5] [--limit N]
    python benchmarks/sweep_preset.py table [--write]     # the table in docs/benchmarks.md, from the last record

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Both sides train the head of
mobilenetv2_100 at 224 px for ten epochs at each (rate, decay) of the preset, on the same pictures, split and seed, with
the default augmentation, and score validation after each epoch. `stored` is `headstart.sweep` from an empty cache;
`pixels`, the baseline, feeds the same loop with pictures decoded once and lets the frozen backbone run in every epoch,
as a plain training loop does. Seconds of the wall and of the processor. A record is appended to
benchmarks/results/sweep_preset-DATE.jsonl.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from records import SHARED, WEIGHTS, Record, append, parser, read, show
from runner_common import processor_seconds

import headstart
from headstart import train
from headstart.features import PixelSource, StageData
from headstart.groundwork import make_bench
from headstart.recipe import RECIPES
from headstart.runtime import make_runtime
from headstart.space import COURSE, COURSE_SPACE

EPOCHS = 10


def with_stored_features(photos: Path, limit: int | None) -> Record:
    """The sweep as a user runs it."""
    started, before = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        found = headstart.sweep(
            photos, space=COURSE_SPACE, epochs=EPOCHS, weights=WEIGHTS, spec_overrides={"interpolation": "bilinear"},
            out=Path(folder) / "sweep", prune=False, cache=False, limit=limit,
        )  # fmt: skip
    rows = found.results["trials"]
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - before,
        "val_loss": [row["val"]["log_loss"] for row in rows],
        "val_accuracy": [row["val"]["accuracy"] for row in rows],
    }


def with_pixels(photos: Path, limit: int | None) -> Record:
    """The same five trials, the backbone running in every step of every epoch."""
    started, before, best, each = time.perf_counter(), processor_seconds(), [], []
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
        best.append(train.fit(model, source, trial, lr=lr, runtime=runtime).best)
        each.append(time.perf_counter() - begun)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - before,
        "seconds_each": each,
        "val_loss": [epoch.loss for epoch in best],
        "val_accuracy": [epoch.accuracy for epoch in best],
    }


def table() -> str:
    """Markdown: the five trials of the last record beside the notebook's own figures, and what each way took."""
    record = read("sweep_preset")[-1]
    stored, pixels = record["stored"], record["pixels"]
    out = ["| rate | decay | the notebook | stored: loss, accuracy | pixels: loss, accuracy |", "|---|---|---|---|---|"]
    for i, (lr, decay, published) in enumerate(COURSE):
        ours = [f"{way['val_loss'][i]:.4f}, {way['val_accuracy'][i]:.3f}" for way in (stored, pixels)]
        out.append(f"| {lr:g} | {decay:g} | {published:.4f} | {' | '.join(ours)} |")
    for title, key in (("processor seconds", "processor_seconds"), ("wall seconds", "seconds")):
        ratio = f"{pixels[key]:.0f} ({pixels[key] / stored[key]:.1f}x)"
        out.append(f"| all five, {title} | | | {stored[key]:.0f} | {ratio} |")
    return "\n".join(out)


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--set", default="flowers5")
    options.add_argument("--limit", type=int, help="use so many pictures only")
    args = options.parse_args()
    if args.what == "table":
        show(table(), "preset", write=args.write)
        return
    photos = SHARED / "data" / args.set
    record = {
        "set": args.set,
        "limit": args.limit,
        "epochs": EPOCHS,
        "stored": with_stored_features(photos, args.limit),
        "pixels": with_pixels(photos, args.limit),
        "threads": torch.get_num_threads(),
    }
    append("sweep_preset", record)
    print(json.dumps({key: record[key] for key in ("set", "stored", "pixels")}, indent=1))


if __name__ == "__main__":
    main()
