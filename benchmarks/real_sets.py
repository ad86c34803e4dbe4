"""How good is the default recipe on small real sets, after the head stage and after fine-tuning, and how quick?

    python benchmarks/real_sets.py run [--sets hotdog,flowers5] [--seeds 0,1,2] [--recipe quick]
    python benchmarks/real_sets.py table [--write]     # the table in the README, from the records
    python benchmarks/real_sets.py collapse            # fine-tuning at the head's own rate: is each collapse caught?

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with
ImageNet weights at 224 px, default recipe, three seeds (the seed moves the held-out validation pictures, the head's
first weights, order and augmentation). The baseline in the same run is the head stage: a linear classifier on frozen
features, trained on augmented views. Test pictures: the set's own test folder (hymenoptera: its val folder). Whatever
was chosen was chosen on validation pictures. Records are appended to benchmarks/results/real_sets-DATE.jsonl;
finished runs are not run again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import replace

import torch
from records import HERE, SHARED, WEIGHTS, append, parser, read, show
from scipy import stats

import headstart
from headstart.recipe import RECIPES, Recipe

SETS = ("hotdog", "cats_dogs", "dogs10", "hymenoptera", "flowers5", "emotions3")
BACKBONE = "mobilenetv2_100"


def records() -> list[dict]:
    """Every record ever appended; of repeated runs of one recipe the last one counts."""
    runs = [r for r in read("real_sets") if "set" in r]
    return list({(r["set"], r["seed"], r["recipe_id"]): r for r in runs}.values())


def records_of(recipe: str = "fine-tune") -> list[dict]:
    """The newest record of each set and seed with what this recipe is now, whatever options have been added since."""
    mine = [r for r in records() if Recipe.from_dict(r["recipe"] | {"seed": 0}) == RECIPES[recipe]]
    return list({(r["set"], r["seed"]): r for r in mine}.values())


def recipe_id(recipe: str) -> str:
    """Names a recipe in a record."""
    return hashlib.sha256(json.dumps(RECIPES[recipe].to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def run_one(name: str, seed: int, kind: str) -> dict:
    """Train a recipe stage by stage, scoring the test split after each."""
    recipe = replace(RECIPES[kind], seed=seed)
    folder = SHARED / "data" / name
    started, computing = time.perf_counter(), time.process_time()
    table = headstart.load_images(folder, test_folder="val" if name == "hymenoptera" else None)
    splits = headstart.split(table, seed=seed)
    model = headstart.create_classifier(
        BACKBONE, splits.class_names, weights=str(WEIGHTS),
        interpolation="bilinear", seed=seed,
    )  # fmt: skip
    stages, trained, computed = [], time.perf_counter() - started, time.process_time() - computing
    for stage in recipe.stages:
        started, computing = time.perf_counter(), time.process_time()
        headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        result = headstart.fit(
            model, splits, stage, lr=recipe.lr * stage.lr_scale, augment=recipe.augment, seed=seed,
            starts_trained=bool(stages), cache=False, progress=True,
        )  # fmt: skip
        trained += time.perf_counter() - started
        computed += time.process_time() - computing
        test = headstart.evaluate(model, splits.test).metrics
        stages.append(
            {
                "stage": stage.name,
                "seconds": round(trained, 1),
                "processor_seconds": round(computed, 1),
                "val_loss": result.best.loss,
                "val_accuracy": result.best.accuracy,
                "test_accuracy": test["accuracy"],
                "test_ci95": test["accuracy_ci95"],
                "test_log_loss": test["log_loss"],
                "best_epoch": result.best_epoch,
                "events": result.events,
            }
        )
    return {
        "set": name,
        "seed": seed,
        "recipe_id": recipe_id(kind),
        "recipe": recipe.to_dict(),
        "classes": len(splits.class_names),
        "n": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
        "stages": stages,
        "threads": torch.get_num_threads(),
    }


def collapse_one(name: str, seed: int) -> dict:
    """Fine-tune at the head's own rate, a hundred times the default, and say whether the stage was stopped."""
    head, fine_tuning = RECIPES["fine-tune"].stages
    fine_tuning = replace(fine_tuning, on_collapse="stop", views=1, epochs=2, warmup=0.0)
    table = headstart.load_images(SHARED / "data" / name, test_folder="val" if name == "hymenoptera" else None)
    splits = headstart.split(table, seed=seed)
    model = headstart.create_classifier(
        BACKBONE, splits.class_names, weights=str(WEIGHTS),
        interpolation="bilinear", seed=seed,
    )  # fmt: skip
    results = []
    for stage in (head, fine_tuning):
        headstart.set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        results.append(
            headstart.fit(
                model,
                splits,
                stage,
                lr=RECIPES["fine-tune"].lr,
                augment="none",
                seed=seed,
                starts_trained=bool(results),
            )
        )
    return {
        "collapse": name,
        "seed": seed,
        "val_loss_head": results[0].best.loss,
        "val_loss_returned": results[1].best.loss,
        "caught": any(event["kind"] == "rollback" for event in results[1].events),
        "events": results[1].events,
    }


def gain_over_seeds(gains: list[float]) -> str:
    """Mean gain in points with Student's 95 % interval over the seeds: each seed is compared with itself."""
    mean, n = statistics.mean(gains), len(gains)
    reach = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(gains) / n**0.5 if n > 1 else float("nan")
    points = [round(100 * value, 1) + 0.0 for value in (mean, mean - reach, mean + reach)]  # no -0.0
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


def table() -> str:
    """Markdown: per set the mean test accuracy after each stage, the gain seed by seed, and the time."""
    rows = [
        "| set | classes | train / test pictures | seeds | head alone | fine-tuned | gain, points"
        " | processor s: head | in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    mine = records_of()
    for name in SETS:
        runs = [r for r in mine if r["set"] == name]
        if not runs:
            continue
        columns = list(zip(*(r["stages"] for r in runs), strict=True))
        cells = []
        for column in columns:
            scores = [s["test_accuracy"] for s in column]
            low = statistics.mean(s["test_ci95"][0] for s in column)
            high = statistics.mean(s["test_ci95"][1] for s in column)
            cells.append(f"{statistics.mean(scores):.3f} ({low:.3f} - {high:.3f})")
        # Older records have the wall's seconds alone.
        timed = [[s["processor_seconds"] for s in column if "processor_seconds" in s] for column in columns]
        seconds = [f"{statistics.median(column):.0f}" if column else "-" for column in timed]
        n = runs[0]["n"]
        pictures = f"{n['train'] + n['val']:,} / {n['test']:,}"
        gain = gain_over_seeds([r["stages"][-1]["test_accuracy"] - r["stages"][0]["test_accuracy"] for r in runs])
        row = (name, runs[0]["classes"], pictures, len(runs), cells[0], cells[-1], gain, seconds[0], seconds[-1])
        rows.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(rows)


def main() -> None:
    line = parser(__doc__, "run", "collapse", page="README.md")
    line.add_argument("--sets", default=",".join(SETS))
    line.add_argument("--seeds", default="0,1,2")
    line.add_argument("--recipe", default="fine-tune", choices=tuple(RECIPES))
    options = line.parse_args()
    if options.what == "table":
        show(table(), "results", write=options.write, page=HERE.parent / "README.md")
        return
    if options.what == "collapse":
        for name in options.sets.split(","):
            record = collapse_one(name, seed=0)
            append("real_sets", record)
            print(name, "caught" if record["caught"] else "NOT CAUGHT", record["events"], flush=True)
        return
    done = {(r["set"], r["seed"]) for r in records_of(options.recipe) if "processor_seconds" in r["stages"][0]}
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            if (name, seed) in done:
                continue
            record = run_one(name, seed, options.recipe)
            append("real_sets", record)
            print(
                name,
                seed,
                [(s["stage"], round(s["test_accuracy"], 4), s["seconds"]) for s in record["stages"]],
                flush=True,
            )


if __name__ == "__main__":
    main()
