"""Is what `headstart advise` proposes the best choice, and more often than one and the same advice for every set?

    python benchmarks/advice.py ask [--sets flowers5,hotdog]    # the advice, and its seconds, for each set
    python benchmarks/advice.py table [--write]                 # the tables in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with
ImageNet weights at 224 px. The recipes that advice chooses from are what `compare_sets.py run --groups lines` compares:
the head alone, the last quarter of the layers, the default (the last 80 %), and every layer at twice the rate for ten
epochs; they share the pictures, the split and the head stage. The baseline is the constant advice that is best most
often. Best is told three times: by test accuracy, strictly, ties counted; within noise: `compare` shows no other
recipe to be better on the same test pictures (McNemar's test, adjusted by Holm); and by validation loss, strictly.
Records are appended to benchmarks/results/advice-DATE.jsonl; what is there is not asked again.
"""

from __future__ import annotations

import torch
from compare_sets import BACKBONE, FAR, GROUPS, SETS, recorded
from records import SHARED, WEIGHTS, Record, append, parser, read, show

import headstart
from headstart.comparison import named_recipe
from headstart.groundwork import make_bench
from headstart.recipe import Recipe
from headstart.runtime import make_runtime

CHOICES = {name: FAR if name == FAR.name else named_recipe(name) for name in GROUPS["lines"][0]}
SENSES = ("by test", "in noise", "by validation")


def records() -> dict[str, Record]:
    """The last advice for each set."""
    return {r["set"]: r for r in read("advice") if r["kind"] == "advice" and not r["limit"]}


def ask(name: str) -> Record:
    """The advice for a set, recorded."""
    bench = make_bench(
        SHARED / "data" / name, runtime=make_runtime(), seed=0, test_folder="val" if name == "hymenoptera" else None
    )
    advice = headstart.advise(
        bench, seed=0, backbone=BACKBONE, weights=WEIGHTS,
        spec_overrides={"interpolation": "bilinear"},
    )  # fmt: skip
    record = {"kind": "advice", "set": name, "seed": 0, "limit": None, **advice.to_dict()}
    del record["found_on"]
    record |= {"candidate": choice_of(advice.recipe), "threads": torch.get_num_threads()}
    append("advice", record)
    return record


def choice_of(recipe: Recipe) -> str | None:
    """The recipe of the comparison with these stages and this head; None where it holds no such recipe."""
    return next((name for name, one in CHOICES.items() if (one.stages, one.head) == (recipe.stages, recipe.head)), None)


def outcome(compared: Record) -> dict[str, Record]:
    """For each recipe of a comparison: its figures, and whether it is best in each of the three senses."""
    entries = compared["recipes"]
    highest = max(entry["test"]["accuracy"] for entry in entries)
    lowest = min(entry["val"]["log_loss"] for entry in entries)
    beaten = {pair["b"] if pair["difference"] > 0 else pair["a"] for pair in compared["pairs"] if pair["shown"]}
    return {
        entry["name"]: {
            "accuracy": entry["test"]["accuracy"],
            "loss": entry["val"]["log_loss"],
            "by test": entry["test"]["accuracy"] == highest,
            "in noise": entry["name"] not in beaten,
            "by validation": entry["val"]["log_loss"] == lowest,
        }
        for entry in entries
    }


def table() -> str:
    """Markdown: the advice and the recipes of each set, then how often which advice was best."""
    out = [
        "| set | pictures | case | errors removed | seconds | advised | test accuracy (validation loss) of each recipe "
        "| best by test, strictly | within noise | by validation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hits = {key: dict.fromkeys(SENSES, 0) for key in ("the advice", *CHOICES)}
    judged = 0
    known = records()
    for name in filter(known.__contains__, SETS):
        advice, compared = known[name], recorded(name, "lines")
        facts, chosen = advice["facts"], advice["candidate"]
        cells = ["not compared yet", "-", "-", "-"]
        if compared and chosen:
            judged += 1
            found = outcome(compared)
            cells = [", ".join(f"{key} {one['accuracy']:.3f} ({one['loss']:.3f})" for key, one in found.items())]
            cells += ["yes" if found[chosen][sense] else "no" for sense in SENSES]
            for key, one in {**found, "the advice": found[chosen]}.items():
                for sense in SENSES:
                    hits[key][sense] += one[sense]
        row = [name, f"{facts['train']:,}", advice["case"], f"{facts['removed']:.0%}", f"{advice['seconds']:.0f}"]
        out.append(f"| {' | '.join([*row, chosen or advice['recipe']['name'], *cells])} |")
    out += ["", "| advice | best by test, strictly | within noise | by validation loss |", "|---|---|---|---|"]
    for key in sorted(hits, key=lambda key: (key != "the advice", *(-hits[key][sense] for sense in SENSES))):
        words = key if key == "the advice" else f"always `{key}`"
        out.append(f"| {' | '.join([words, *(f'{hits[key][sense]} of {judged}' for sense in SENSES)])} |")
    return "\n".join(out)


def main() -> None:
    options = parser(__doc__, "ask")
    options.add_argument("--sets", default=",".join(SETS))
    args = options.parse_args()
    if args.what == "table":
        show(table(), "advice", write=args.write)
        return
    for name in args.sets.split(","):
        if name not in records():
            record = ask(name)
            print(name, record["case"], record["candidate"], f"{record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
