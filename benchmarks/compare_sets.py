"""`headstart compare` on seven small real sets: from scratch, frozen head, fine-tuned, as a table.

    python benchmarks/compare_sets.py run [--sets flowers5,hotdog] [--seeds 0,1,2]
    python benchmarks/compare_sets.py table [--write]     # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). `head` and `fine-tune` are the named
recipes with mobilenetv2_100's ImageNet weights at 224 px, over the seeds. `scratch` is the same network from random
weights with a small budget, one seed, 10 epochs at 96 px: what a beginner can afford here, not the best that training
from scratch can do. All runs of a set share its split and its test pictures (hymenoptera: its val folder); the
difference between two recipes is tested on the same pictures. One record per set and call is appended to
benchmarks/results/compare_sets-DATE.jsonl; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import headstart
from headstart.run import environment

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("HEADSTART_SHARED", HERE.parents[1] / "shared"))
SETS = ("hotdog", "cats_dogs", "cats_dogs_128", "dogs10", "hymenoptera", "flowers5", "emotions3")
BACKBONE = "mobilenetv2_100"
SCRATCH = headstart.Budget((10,), 96)


def run_one(name: str, recipes: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """One call of `compare`; the record holds each recipe's figures and each pair's difference."""
    with tempfile.TemporaryDirectory() as folder:
        found = headstart.compare(
            SHARED / "data" / name, recipes=recipes, seeds=seeds, backbone=BACKBONE,
            budgets={"scratch": SCRATCH} if "scratch" in recipes else None, out=Path(folder) / "compare",
            weights=None if recipes == ("scratch",) else SHARED / "weights" / f"{BACKBONE}.safetensors",
            spec_overrides={"interpolation": "bilinear"}, cache=False, progress=True,
            test_folder="val" if name == "hymenoptera" else None,
        ).results  # fmt: skip
    return {
        "set": name,
        "seeds": list(seeds),
        "n": found["n"],
        "recipes": found["recipes"],
        "pairs": found["pairs"],
        "threads": torch.get_num_threads(),
        "versions": environment(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def records() -> dict[tuple[str, str], dict[str, Any]]:
    """By set and recipe, the last record that holds it."""
    files = sorted((HERE / "results").glob("compare_sets-*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return {(r["set"], recipe["name"]): r for r in lines for recipe in r["recipes"]}


def table() -> str:
    """Markdown: a row for each set and recipe."""
    out = ["| set | recipe | trained | seeds | budget | seconds | accuracy | log loss | precision | recall | verdict |"]
    out.append("|---|---|---|---|---|---|---|---|---|---|---|")
    known = records()
    for name in SETS:
        for recipe in ("scratch", "head", "fine-tune"):
            if (name, recipe) not in known:
                continue
            record = known[name, recipe]
            entry = next(e for e in record["recipes"] if e["name"] == recipe)
            test, budget = entry["test"], entry["budget"]
            low, high = test["accuracy_ci95"]
            seconds = sorted(entry["seconds"])[len(entry["seconds"]) // 2]
            cells = (
                name, recipe, f"{entry['trained_parameters']:,}", len(record["seeds"]),
                f"{'+'.join(map(str, budget['epochs']))} epochs, {budget['image_size']} px", f"{seconds:.0f}",
                f"{test['accuracy']:.3f} ({low:.3f} - {high:.3f})", f"{test['log_loss']:.3f}",
                f"{test['weighted_precision']:.3f}", f"{test['weighted_recall']:.3f}",
                "; ".join(f"{v['question'].rstrip('?').lower()}: {v['answer']}" for v in entry["verdicts"]),
            )  # fmt: skip
            out.append(f"| {' | '.join(map(str, cells))} |")
    sentences = [
        f"- {name}: {pair['sentence']}"
        for name in SETS
        if (name, "fine-tune") in known
        for pair in known[name, "fine-tune"]["pairs"]
    ]
    return "\n".join([*out, "", *sentences])


def write_table(text: str) -> None:
    """Replace what stands between the marks in docs/benchmarks.md."""
    path = HERE.parent / "docs" / "benchmarks.md"
    page = path.read_text(encoding="utf-8")
    start, rest = page.split("<!-- compare:", 1)
    note, rest = rest.split("-->", 1)
    end = rest.split("<!-- end of compare -->", 1)[1]
    path.write_text(f"{start}<!-- compare:{note}-->\n{text}\n<!-- end of compare -->{end}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        if options.write:
            write_table(table())
        return
    log = HERE / "results" / f"compare_sets-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    seeds = tuple(map(int, options.seeds.split(",")))
    for name in options.sets.split(","):
        for recipes, of in ((("scratch",), seeds[:1]), (("head", "fine-tune"), seeds)):
            if (name, recipes[0]) in records():
                continue
            record = run_one(name, recipes, of)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(
                name, [(e["name"], e["test"]["accuracy_per_seed"], e["seconds"]) for e in record["recipes"]], flush=True
            )


if __name__ == "__main__":
    main()
