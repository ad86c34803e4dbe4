"""`headstart compare` on seven small real sets: from scratch, frozen head, fine-tuned, as a table.

    python benchmarks/compare_sets.py run [--sets flowers5,hotdog] [--groups scratch,lines,seeds]
    python benchmarks/compare_sets.py table [--write]     # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Three calls for each set: `seeds`
are the named recipes `head` and `fine-tune` with mobilenetv2_100's ImageNet weights at 224 px, three seeds; `scratch`
is the same network from random weights with a small budget, one seed, 10 epochs at 96 px: what a beginner can afford
here, not the best that training from scratch can do; `lines`, one seed, sets the last quarter of the layers and every
layer at twice the rate for ten epochs beside the two, which is what benchmarks/advice.py judges advice by.
All runs of a set
share its split and its test pictures (hymenoptera: its val folder); the difference between two recipes is tested on the
same pictures. Runs are kept under ~/.cache/headstart-bench (HEADSTART_BENCH), and what one call has trained another
reads. One record per set and call is appended to benchmarks/results/compare_sets-DATE.jsonl; a finished one is not run
again.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from records import SHARED, WEIGHTS, Record, append, parser, read, show

import headstart
from headstart.advising import FAR_STAGE
from headstart.comparison import pair_sentence
from headstart.recipe import HEAD_STAGE, RECIPES

SETS = ("hotdog", "cats_dogs", "cats_dogs_128", "dogs10", "hymenoptera", "flowers5", "emotions3")
BACKBONE = "mobilenetv2_100"
BENCH = Path(os.environ.get("HEADSTART_BENCH", Path.home() / ".cache" / "headstart-bench"))
SCRATCH = headstart.Budget((10,), 96)
FAR = replace(RECIPES["fine-tune"], name="far", stages=(HEAD_STAGE, FAR_STAGE))
GROUPS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "scratch": (("scratch",), (0,)),
    "lines": (("head", "last:25%", "fine-tune", "far"), (0,)),
    "seeds": (("head", "fine-tune"), (0, 1, 2)),
}


def run_one(name: str, recipes: tuple[str, ...], seeds: tuple[int, ...]) -> Record:
    """One call of `compare`; the record holds each recipe's figures and each pair's difference."""
    found = headstart.compare(
        SHARED / "data" / name, recipes=[FAR if recipe == "far" else recipe for recipe in recipes], seeds=seeds,
        budgets={"scratch": SCRATCH} if "scratch" in recipes else None, backbone=BACKBONE, cache=False, progress=True,
        weights=WEIGHTS, out=BENCH / "compare" / name,
        spec_overrides={"interpolation": "bilinear"}, test_folder="val" if name == "hymenoptera" else None,
    ).results  # fmt: skip
    return {
        "set": name,
        "seeds": list(seeds),
        "n": found["n"],
        "recipes": found["recipes"],
        "pairs": found["pairs"],
        "threads": torch.get_num_threads(),
    }


def recorded(name: str, group: str) -> Record | None:
    """The last record of a set that holds a group's recipes over its seeds."""
    recipes, seeds = GROUPS[group]
    found = [r for r in read("compare_sets") if r["set"] == name and r["seeds"] == list(seeds)]
    return next((r for r in reversed(found) if {e["name"] for e in r["recipes"]} == set(recipes)), None)


def table() -> str:
    """Markdown: a row for each set and recipe."""
    out = [
        "| set | recipe | trained | seeds | budget | seconds | accuracy | log loss | precision | recall "
        "| still learning | generalises | overfits |"
    ]
    out.append("|---" * 13 + "|")
    sentences = []
    for name in SETS:
        for record in filter(None, (recorded(name, group) for group in ("scratch", "seeds"))):
            told = [pair_sentence(pair, len(record["pairs"])) for pair in record["pairs"]]
            sentences += [f"- {name}: {sentence}" for sentence in told]
            for entry in record["recipes"]:
                test, budget = entry["test"], entry["budget"]
                low, high = test["accuracy_ci95"]
                seconds = sorted(entry["seconds"])[len(entry["seconds"]) // 2]
                cells = (
                    name, entry["name"], f"{entry['trained_parameters']:,}", len(record["seeds"]),
                    f"{'+'.join(map(str, budget['epochs']))} epochs, {budget['image_size']} px", f"{seconds:.0f}",
                    f"{test['accuracy']:.3f} ({low:.3f} - {high:.3f})", f"{test['log_loss']:.3f}",
                    f"{test['weighted_precision']:.3f}", f"{test['weighted_recall']:.3f}",
                    *(verdict["answer"] for verdict in entry["verdicts"]),
                )  # fmt: skip
                out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*out, "", *sentences])


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--sets", default=",".join(SETS))
    options.add_argument("--groups", default=",".join(GROUPS))
    args = options.parse_args()
    if args.what == "table":
        show(table(), "compare", write=args.write)
        return
    for name in args.sets.split(","):
        for group in args.groups.split(","):
            if recorded(name, group):
                continue
            record = run_one(name, *GROUPS[group])
            append("compare_sets", record)
            print(
                name, [(e["name"], e["test"]["accuracy_per_seed"], e["seconds"]) for e in record["recipes"]], flush=True
            )


if __name__ == "__main__":
    main()
