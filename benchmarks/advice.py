"""Is what `headstart advise` proposes the best choice, and more often than one and the same advice for every set?

    python benchmarks/advice.py advise [--sets ...] [--limit N]        # the advice alone: seconds for each set
    python benchmarks/advice.py run --sets flowers5,hymenoptera --limit 200 [--seeds 0,1,2] [--only head,far]
    python benchmarks/advice.py table [--limit N]

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with
ImageNet weights at 224 px. The candidates are a fixed list: the head alone, the last quarter of the layers, the default
(the last 80 %), and every layer at twice the rate for ten epochs; what the advice proposes besides is run as `advised`.
All share the pictures, the split and the head stage of a seed. `--limit N` takes N pictures of each set, over all its
splits, class by class, and the advice is then the one for those. The baseline is the constant advice that is best most
often. Best is told twice: by test accuracy (strictly, ties counted; and within noise: no other candidate is better
by McNemar's test, adjusted by Holm), and by validation loss (strictly). Records are appended to
benchmarks/results/advice-DATE.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headstart
from headstart.advising import FAR_STAGE
from headstart.bench import Bench, make_bench
from headstart.comparison import named_recipe, test_hits
from headstart.metrics import holm, paired_difference
from headstart.recipe import HEAD_STAGE, RECIPES, Recipe
from headstart.run import environment
from headstart.runtime import make_runtime

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("HEADSTART_SHARED", HERE.parents[1] / "shared"))
SETS = ("hotdog", "cats_dogs", "cats_dogs_128", "dogs10", "hymenoptera", "flowers5", "emotions3")
NET: dict[str, Any] = {
    "backbone": "mobilenetv2_100",
    "weights": SHARED / "weights" / "mobilenetv2_100.safetensors",
    "spec_overrides": {"interpolation": "bilinear"},
}
CANDIDATES: dict[str, Recipe] = {
    "head": RECIPES["head"],
    "last:25%": named_recipe("last:25%"),
    "fine-tune": RECIPES["fine-tune"],
    "far": replace(RECIPES["fine-tune"], name="far", stages=(HEAD_STAGE, FAR_STAGE)),
}
ALPHA = 0.05


def log_path() -> Path:
    return HERE / "results" / f"advice-{datetime.now(UTC):%Y-%m-%d}.jsonl"


def records(kind: str, limit: int | None) -> list[dict[str, Any]]:
    """All records of one kind made with this limit."""
    paths = sorted((HERE / "results").glob("advice-*.jsonl"))
    found = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [r for r in found if r["kind"] == kind and r["limit"] == limit]


def append(record: dict[str, Any]) -> None:
    facts = {"threads": torch.get_num_threads(), "versions": environment(), "when": f"{datetime.now(UTC):%FT%TZ}"}
    with log_path().open("a") as file:
        file.write(json.dumps({**record, **facts}) + "\n")


def bench_of(name: str, seed: int, limit: int | None) -> Bench:
    return make_bench(
        SHARED / "data" / name, runtime=make_runtime(), seed=seed, limit=limit,
        test_folder="val" if name == "hymenoptera" else None,
    )  # fmt: skip


def ask(name: str, seed: int, limit: int | None) -> dict[str, Any]:
    """The advice for a set, recorded once."""
    for earlier in records("advice", limit):
        if (earlier["set"], earlier["seed"]) == (name, seed):
            return earlier
    bench = bench_of(name, seed, limit)
    advice = headstart.advise(bench, seed=seed, **NET)
    record = {"kind": "advice", "set": name, "seed": seed, "limit": limit, **advice.to_dict()}
    record["candidate"] = candidate_of(advice.recipe)
    del record["found_on"]
    append(record)
    return record


def candidate_of(recipe: Recipe) -> str:
    """The candidate with this recipe's stages and head; `advised` where there is none."""
    same = [name for name, one in CANDIDATES.items() if (one.stages, one.head) == (recipe.stages, recipe.head)]
    return same[0] if same else "advised"


def run_set(name: str, seed: int, limit: int | None, only: Sequence[str]) -> None:
    """Train every candidate that has no record yet."""
    advice = ask(name, seed, limit)
    plans = {key: one for key, one in CANDIDATES.items() if key in only}
    if advice["candidate"] == "advised":
        plans["advised"] = Recipe.from_dict(advice["recipe"])
    done = {(r["set"], r["seed"], r["candidate"]) for r in records("run", limit)}
    bench = None
    for key, plan in plans.items():
        if (name, seed, key) in done:
            continue
        bench = bench or bench_of(name, seed, limit)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = headstart.fine_tune(bench, recipe=replace(plan, seed=seed), out=Path(folder) / "run", **NET)
            hits = test_hits(headstart.read_run(folder + "/run"), bench.splits.test)
        record = {
            "kind": "run", "set": name, "seed": seed, "limit": limit, "candidate": key,
            "n": {part: len(table) for part, table in bench.splits.named().items()},
            "val_loss": result.metrics["val"]["log_loss"], "val_accuracy": result.metrics["val"]["accuracy"],
            "test_accuracy": result.metrics["test"]["accuracy"], "right": "".join(str(int(hit)) for hit in hits),
            "seconds": round(time.perf_counter() - started, 1),
            "shared_seconds": round(sum(s["shared_seconds"] for s in result.metrics["stages"]), 1),
            "events": [event["message"] for s in result.metrics["stages"] for event in s["events"]],
        }  # fmt: skip
        append(record)
        print(name, seed, key, round(record["val_loss"], 4), record["test_accuracy"], record["seconds"], flush=True)


def outcome(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each candidate of a set: its mean figures, and whether it is best in each of the three senses."""
    by: dict[str, list[dict[str, Any]]] = {}
    for r in sorted(runs, key=lambda r: r["seed"]):
        by.setdefault(r["candidate"], []).append(r)
    right = {key: np.stack([[float(c) for c in r["right"]] for r in rs]) for key, rs in by.items()}
    found = {
        key: {
            "test": statistics.mean(r["test_accuracy"] for r in rs),
            "val": statistics.mean(r["val_loss"] for r in rs),
            "seeds": len(rs),
        }
        for key, rs in by.items()
    }
    for key, one in found.items():
        others = [paired_difference(right[other], right[key]) for other in found if other != key]
        adjusted = holm([other["p"] for other in others])
        beaten = any(o["difference"] > 0 and p < ALPHA for o, p in zip(others, adjusted, strict=True))
        one["by test"] = one["test"] == max(o["test"] for o in found.values())
        one["by val"] = one["val"] == min(o["val"] for o in found.values())
        one["in noise"] = not beaten
    return found


def table(limit: int | None) -> str:
    """Markdown: the advice and the candidates of each set, then how often which advice was best."""
    out = [
        "| set | train / val / test | case | errors removed | seconds | advised | test accuracy of the candidates "
        "(validation loss) | best by test, strictly | within noise | by validation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hits: dict[str, dict[str, int]] = {}
    runs, judged = records("run", limit), 0
    for name in SETS:
        asked = [r for r in records("advice", limit) if r["set"] == name]
        if not asked:
            continue
        advice, mine = asked[0], [r for r in runs if r["set"] == name]
        facts = advice["facts"]
        cells = ["not run"] + ["-"] * 3
        counts = f"{facts['train']:,} / {facts['val']:,} / -"
        if {advice["candidate"], *CANDIDATES} <= {r["candidate"] for r in mine}:  # else the best one may be missing
            judged += 1
            n, found = mine[0]["n"], outcome(mine)
            counts = f"{n['train']:,} / {n['val']:,} / {n['test']:,}"
            chosen = found[advice["candidate"]]
            seeds = max(one["seeds"] for one in found.values())
            shown = [f"{key} {one['test']:.3f} ({one['val']:.3f})" for key, one in found.items()]
            cells = [f"{', '.join(shown)}; {seeds} seed{'s' * (seeds > 1)}"]
            for sense in ("by test", "in noise", "by val"):
                cells.append("yes" if chosen[sense] else "no")
                for key, one in {**found, "the advice": chosen}.items():
                    of = hits.setdefault(key, {})
                    of[sense] = of.get(sense, 0) + one[sense]
        row = [name, counts, advice["case"], f"{facts['removed']:.0%}", f"{advice['seconds']:.0f}", advice["candidate"]]
        out.append(f"| {' | '.join([*row, *cells])} |")
    if judged:
        out += ["", "| advice | best by test, strictly | within noise | by validation loss |", "|---|---|---|---|"]
        order = sorted(hits, key=lambda key: (key != "the advice", -hits[key]["by test"], -hits[key]["in noise"]))
        for key in order:
            words = "the advice" if key == "the advice" else f"always {key}"
            shares = (f"{hits[key][sense]} of {judged}" for sense in ("by test", "in noise", "by val"))
            out.append(f"| {' | '.join([words, *shares])} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("advise", "run", "table"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--limit", type=int, help="pictures of each set, over all its splits")
    parser.add_argument("--only", default=",".join(CANDIDATES))
    options = parser.parse_args()
    if options.what == "table":
        print(table(options.limit))
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            if options.what == "advise":
                record = ask(name, seed, options.limit)
                facts = record["facts"]
                figures = {key: facts[key] for key in ("frozen", "chance", "removed", "blocks", "mirrored", "side_px")}
                print(name, record["case"], record["candidate"], f"{record['seconds']:.0f} s", figures, flush=True)
            else:
                run_set(name, seed, options.limit, options.only.split(","))


if __name__ == "__main__":
    main()
