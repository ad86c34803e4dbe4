"""How many pictures of other things does a model tell from those of its own kind, and at what cost in those?

    python benchmarks/unknown.py run [--sets flowers5 ...] [--recipes head ...] [--seeds 0 1 2]
    python benchmarks/unknown.py table [--write]     # the table in docs/benchmarks.md

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). A model of mobilenetv2_100 is trained
on one set, learns what is familiar (`learn_familiar`), and is asked with `unknown=0.05` about its own test pictures and
about up to 200 pictures of each other set. Beside it stands what is usually done, on the same answers: a picture is
unknown where its highest probability is lower than that of all but 5 % of the validation pictures, by the same rule. A
record for each set, recipe and seed is appended to benchmarks/results/unknown-DATE.jsonl; what has one is left.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean

import numpy as np
from records import SHARED, WEIGHTS, Record, append, newest, parser, show

import headstart
from headstart.dataset import list_image_files
from headstart.recipe import RECIPES
from headstart.run_record import read_run

SHARE, MOST = 0.05, 200
SETS = ("flowers5", "dogs10", "hymenoptera")
OTHERS = {
    "flowers5": "flowers5", "dogs10": "dogs10", "hymenoptera": "hymenoptera", "emotions3": "emotions3",
    "hot dogs": "hotdog/test/hotdog",
}  # fmt: skip


def by_probability(held_out: list[float], asked: list[float]) -> int:
    """How many are unknown by their highest probability, each beside those of the held-out pictures."""
    no_surer = np.searchsorted(np.sort(held_out), asked, side="right")
    return int(((1 + no_surer) / (len(held_out) + 1) <= SHARE).sum())


def ask(name: str, recipe: str, seed: int, folder: Path) -> Record:
    """Train on a set, and ask about it and all others."""
    headstart.fine_tune(
        SHARED / "data" / name, recipe=replace(RECIPES[recipe], seed=seed), weights=WEIGHTS, out=folder,
        spec_overrides={"interpolation": "bilinear"},
    )  # fmt: skip
    learnt = headstart.learn_familiar(folder)
    rows = read_run(folder).predictions
    held_out = [float(row["prob"]) for row in rows if row["split"] == "val"]
    own = [float(row["prob"]) for row in rows if row["split"] == "test"]
    test = {"n": len(own), "familiar": learnt["test"]["unknown"], "probability": by_probability(held_out, own)}
    record = {"set": name, "recipe": recipe, "seed": seed, "held_out": len(held_out), "asked": {"own": test}}
    for other, place in OTHERS.items():
        if other == name:
            continue
        files = list_image_files([SHARED / "data" / place])
        files = random.Random(0).sample(files, min(MOST, len(files)))
        told = headstart.predict_files(folder, files, unknown=SHARE)
        record["asked"][other] = {
            "n": len(told), "familiar": sum(row["unknown"] for row in told),
            "probability": by_probability(held_out, [row["prob"] for row in told]),
        }  # fmt: skip
    return record


def table() -> str:
    """Markdown: a row for each set and recipe, means over the seeds."""
    kinds = ("own", *OTHERS)
    out = [
        "| trained on | recipe | seeds | "
        + " | ".join(f"{k} test pictures" if k == "own" else k for k in kinds)
        + " |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    records = sorted(newest("unknown", "set", "recipe", "seed"), key=lambda r: (SETS.index(r["set"]), r["recipe"]))
    for (name, recipe), group in groupby(records, key=lambda r: (r["set"], r["recipe"])):
        of, cells = list(group), []
        for kind in kinds:
            asked = [r["asked"][kind] for r in of if kind in r["asked"]]
            shares = [100 * mean(a[way] / a["n"] for a in asked) for way in ("familiar", "probability") if asked]
            cells.append(f"{shares[0]:.1f} ({shares[1]:.1f})" if asked else "")
        out.append(f"| {name} | {recipe} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    options.add_argument("--recipes", nargs="+", default=("head", "fine-tune"))
    options.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    args = options.parse_args()
    if args.what == "table":
        show(table(), "unknown", write=args.write)
        return
    done = {(r["set"], r["recipe"], r["seed"]) for r in newest("unknown", "set", "recipe", "seed")}
    for seed in args.seeds:
        for name in args.sets:
            for recipe in args.recipes:
                if (name, recipe, seed) not in done:
                    with tempfile.TemporaryDirectory() as folder:
                        record = ask(name, recipe, seed, Path(folder) / "run")
                    append("unknown", record)
                    print(record, flush=True)


if __name__ == "__main__":
    main()
