"""Is a fit on wrong labels better after the audit's proposals are followed without a look?

    python benchmarks/audit_gain.py run [--recipe head] [--sets hotdog] [--seeds 0,1,2] [--labels true,flipped]
    python benchmarks/audit_gain.py table [--write]     # the table in docs/audit.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). 10 % of the labels of train and val
are moved to another class, drawn by the seed; the test pictures keep theirs, and only the last score sees them.
Three tables of the same pictures are trained on with the same recipe and seed (mobilenetv2_100, ImageNet weights):
`true` (nothing moved; the ceiling), `flipped` (the baseline) and `cleaned` (the flipped table after
`headstart audit --write-clean`, test rows put back as they were). Where `true` has not been run, the table takes the
default recipe's own runs on the same seeds from benchmarks/real_sets.py. Records are appended to
benchmarks/results/audit_gain-DATE.jsonl; finished runs are not run again.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from real_sets import records_of
from records import HERE, SHARED, WEIGHTS, Record, append, newest, parser, show

import headstart
from headstart.cli import main as headstart_command
from headstart.dataset import load_images
from headstart.manifest import ManifestRow, read_manifest, write_manifest
from headstart.recipe import RECIPES

SETS = ("hotdog", "cats_dogs", "flowers5")
LABELS = ("true", "flipped", "cleaned")
SHARE = 0.1


def flip(rows: list[ManifestRow], share: float, seed: int, splits: tuple[str, ...]) -> list[ManifestRow]:
    """The rows with a share of the labels of these splits moved to another class; `original_label` has the true one."""
    classes = sorted({row.label for row in rows})
    rng = np.random.default_rng([seed, len(rows)])
    open_rows = [i for i, row in enumerate(rows) if row.split in splits]
    out = list(rows)
    for i in rng.choice(open_rows, round(share * len(open_rows)), replace=False):
        others = [name for name in classes if name != rows[i].label]
        out[i] = replace(rows[i], label=others[int(rng.integers(len(others)))], original_label=rows[i].label)
    return out


def cleaned(flipped: list[ManifestRow], folder: Path) -> list[ManifestRow]:
    """What `audit --write-clean` makes of the flipped table, which is not told what was flipped."""
    source, clean = folder / "flipped.csv", folder / "clean.csv"
    write_manifest([replace(row, original_label="") for row in flipped], source)
    code = headstart_command(["audit", str(source), "--write-clean", str(clean), "--weights", str(WEIGHTS), "--quiet"])
    assert code == 0, code
    test = {row.path: row for row in flipped if row.split == "test"}
    return [test.get(row.path, row) for row in read_manifest(clean)]


def run_one(name: str, seed: int, labels: str, recipe: str) -> Record:
    """Train on one of the three tables and score the untouched test pictures."""
    true = load_images(SHARED / "data" / name, check=False).rows()
    rows = true if labels == "true" else flip(true, SHARE, seed, ("train", "val"))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if labels == "cleaned":
            rows = cleaned(rows, Path(folder))
        manifest = write_manifest(rows, Path(folder) / "rows.csv")
        audited = time.perf_counter() - started
        result = headstart.fine_tune(
            manifest, recipe=replace(RECIPES[recipe], seed=seed), weights=str(WEIGHTS),
            spec_overrides={"interpolation": "bilinear"},
        )  # fmt: skip
    label_of = {row.path: row.label for row in true}
    used = [row for row in rows if not row.drop and row.split != "test"]
    test = result.metrics["test"]
    return {
        "set": name, "seed": seed, "labels": labels, "recipe": recipe, "recipe_values": RECIPES[recipe].to_dict(),
        "n": len(used), "wrong": sum(row.label != label_of[row.path] for row in used),
        "left_out": sum(row.drop for row in rows), "test_n": test["n"], "test_accuracy": test["accuracy"],
        "test_ci95": test["accuracy_ci95"], "test_log_loss": test["log_loss"], "audit_seconds": round(audited, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def records() -> list[Record]:
    """Of repeated runs the last one counts."""
    return newest("audit_gain", "set", "seed", "labels", "recipe")


def _mean_accuracy(runs: list[Record]) -> str:
    return f"{statistics.mean(r['test_accuracy'] for r in runs):.3f}"


def _of_real_sets(name: str, recipe: str, seeds: list[int]) -> str:
    """The same recipe and seeds on the labels as they are, where benchmarks/real_sets.py has run them."""
    runs = {r["seed"]: r["stages"][-1] for r in records_of() if r["set"] == name}
    held = recipe == "fine-tune" and all(seed in runs for seed in seeds)
    return _mean_accuracy([runs[seed] for seed in seeds]) if held else "-"


def table() -> str:
    """Markdown: mean test accuracy over the seeds on each of the three tables, and the wrong labels left."""
    out = ["| set | recipe | seeds | true labels | 10 % flipped | cleaned | gain, per seed | wrong before | after |"]
    out.append("|---|---|---|---|---|---|---|---|---|")
    known = {(r["set"], r["recipe"], r["labels"], r["seed"]): r for r in records()}
    for name in SETS:
        for recipe in dict.fromkeys(r["recipe"] for r in known.values()):
            seeds = [s for s in range(10) if all((name, recipe, labels, s) in known for labels in LABELS[1:])]
            if not seeds:
                continue
            runs = {labels: [known[name, recipe, labels, s] for s in seeds] for labels in LABELS[1:]}
            with_true = [known[name, recipe, "true", s] for s in seeds if (name, recipe, "true", s) in known]
            ceiling = _mean_accuracy(with_true) if len(with_true) == len(seeds) else _of_real_sets(name, recipe, seeds)
            means = [ceiling, *(_mean_accuracy(of) for of in runs.values())]
            gains = ", ".join(
                f"{after['test_accuracy'] - before['test_accuracy']:+.3f}"
                for before, after in zip(runs["flipped"], runs["cleaned"], strict=True)
            )
            wrong = [f"{statistics.mean(r['wrong'] for r in of):.0f}" for of in runs.values()]
            out.append(f"| {' | '.join([name, recipe, str(len(seeds)), *means, gains, *wrong])} |")
    return "\n".join(out)


def main() -> None:
    options = parser(__doc__, "run", page="docs/audit.md")
    options.add_argument("--recipe", default="head", choices=tuple(RECIPES))
    options.add_argument("--sets", default=",".join(SETS))
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--labels", default=",".join(LABELS))
    args = options.parse_args()
    if args.what == "table":
        show(table(), "gain", write=args.write, page=HERE.parent / "docs" / "audit.md")
        return
    done = {(r["set"], r["seed"], r["labels"], r["recipe"]) for r in records()}
    for seed in map(int, args.seeds.split(",")):
        for name in args.sets.split(","):
            for labels in args.labels.split(","):
                if (name, seed, labels, args.recipe) in done:
                    continue
                record = run_one(name, seed, labels, args.recipe)
                append("audit_gain", record)
                shown = ("n", "wrong", "left_out", "test_accuracy", "seconds")
                print(name, seed, labels, {key: record[key] for key in shown}, flush=True)


if __name__ == "__main__":
    main()
