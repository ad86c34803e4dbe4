"""What do the five examples come to on small real sets, beside the figures of the tutorials that they follow?

    python benchmarks/examples.py run [--only hotdog,emotions] [--seeds 0,1,2]
    python benchmarks/examples.py table [--write]      # the tables in examples/README.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Each example's own script runs in a
process of its own, as it is written, with mobilenetv2_100 and its ImageNet weights in place of the tutorial's backbone,
on a set of the same kind, for the epochs, picture sizes and numbers of pictures below: cut to a minute or two of one
thread each (emotions and hotdog: two to four minutes a seed). Three seeds, or one where an example takes longer than
that. The baseline in the same run is the
example's first recipe, or the one from scratch. Validation chooses; the test split is scored once per recipe and seed.
The scripts append their records to benchmarks/results/examples-DATE.jsonl; an example that has one for these seeds is
not run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from records import HERE, RESULTS, SHARED, WEIGHTS, newest, parser, show

from headstart.comparison import pair_sentence

EXAMPLES = HERE.parent / "examples"
BACKBONE = "mobilenetv2_100"


@dataclass(frozen=True)
class Example:
    """How an example is run here, and what its tutorial reports.

    published: by recipe, as it is reported. pairs: of recipes, whose difference the page tells. courses: recipes of
    which it tells how the validation loss went, since the state that is kept does not show it.
    """

    data: str
    tutorial: str
    options: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    published: dict[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    courses: tuple[str, ...] = ()


RUNS = {
    "emotions": Example(
        "emotions3",
        "a three-class emotion set, EfficientNet at 256 px; validation",
        ("--image-size", "64", "--limit", "1200", "--budget", "same rate=20,3", "--budget", "rate / 100=20,3",
         "--budget", "training mode=20,3"),
        seeds=(0, 1, 2),
        published={"head": "about 70 %", "rate / 100": "72.2 %"},
        pairs=(("rate / 100", "head"), ("rate / 100", "training mode"), ("head", "training mode")),
        courses=("rate / 100", "training mode"),
    ),
    "cats_dogs_finetune": Example(
        "cats_dogs",
        "the course, cats and dogs, VGG16 at 224 px; no figure at hand",
        seeds=(0, 1, 2),
        pairs=(("closed form first", "finetune + fit"),),
    ),
    "vgg16_180": Example(
        "cats_dogs_128",
        "Deep Learning with Python, 2,000 pictures of cats and dogs, VGG16; test, first / second edition",
        ("--features-from", "blocks.6", "--last-block", "blocks.6", "--views", "2", "--limit", "400",
         "--budget", "augmented=20", "--budget", "fine-tuned=20,10"),
        published={"fine-tuned": "96.8 / 98.5 %"},
        pairs=(("augmented", "features"), ("fine-tuned", "augmented")),
    ),
    "dog_breeds": Example(
        "dogs10",
        "Stanford Dogs, 120 breeds, EfficientNet-B0; the Keras example (it validates on the test set and drops its last"
        " batch), the head without augmentation: the course notebook",
        ("--image-size", "96", "--limit", "1000", "--budget", "scratch=5@64"),
        published={"scratch": "21.5 %", "head": "74.6 %", "head, not augmented": "about 60 %", "fine-tuned": "77.0 %"},
        pairs=(("head", "head, not augmented"), ("fine-tuned", "head")),
    ),
    "hotdog": Example(
        "hotdog",
        "Dive into Deep Learning, 2,000 pictures, ResNet-18 at 224 px, 80 steps of 128 pictures (here 25); test, which"
        " also chose",
        ("--image-size", "64", "--limit", "1000"),
        seeds=(0, 1, 2),
        published={"joint": "94.0 %", "scratch": "85.0 %"},
        pairs=(("joint", "scratch"),),
        courses=("joint", "joint, momentum 0.9", "scratch"),
    ),
}  # fmt: skip


def records() -> dict[str, dict]:
    """The last record of each example."""
    return {record["example"]: record for record in newest("examples", "example")}


def run_one(name: str, seeds: list[int], log: Path) -> None:
    """Run an example's script; it appends its record."""
    example = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        words = [str(SHARED / "data" / example.data), "--backbone", BACKBONE, *example.options]
        words += ["--seeds", ",".join(map(str, seeds))]
        words += ["--weights", str(WEIGHTS)]
        words += ["--out", str(Path(folder) / name), "--record", str(log)]
        subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", *words],
            check=True, cwd=folder, env=os.environ | {"MPLBACKEND": "Agg"},
        )  # fmt: skip


def table() -> str:
    """Markdown: each recipe beside its tutorial's figure, what the pairs say, and the notebook's sweep."""
    found = records()
    rows = [
        "| example, set, train / test pictures, seeds | recipe | tutorial | here | 95 % interval | top-5 | precision,"
        " recall | epochs: tutorial / here | px |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes, trials = [], []
    for name, example in RUNS.items():
        if name not in found:
            continue
        record = found[name]
        n, seeds = record["n"], len(record["seeds"])
        head = f"{name}, {record['data']}, {n['train'] + n['val']:,} / {n['test']:,}, {seeds}"
        rows += [f"| {head if i == 0 else ''} {_row(entry, example)}" for i, entry in enumerate(record["recipes"])]
        notes += [f"- {name}: {sentence}" for sentence in _sentences(record, example)]
        trials += record["sweep"] or []
    sources = [f"- {name}: {example.tutorial}." for name, example in RUNS.items() if name in found]
    parts = ["\n".join(rows), "The tutorials' figures:\n\n" + "\n".join(sources), "\n".join(notes)]
    missing = ", ".join(name for name in RUNS if name not in found)
    parts += [_sweep_table(trials), f"Not measured yet: {missing}." if missing else ""]
    return "\n\n".join(part for part in parts if part)


def _row(entry: dict, example: Example) -> str:
    test, budget = entry["test"], entry["budget"]
    low, high = (f"{100 * value:.1f}" for value in test["accuracy_ci95"])
    epochs = [" + ".join(map(str, numbers)) for numbers in (entry["tutorial_epochs"], budget["epochs"])]
    cells = (
        entry["name"],
        example.published.get(entry["name"], ""),
        f"{100 * test['accuracy']:.1f} %",
        f"{low} - {high}",
        "" if test["top5"] is None else f"{100 * test['top5']:.1f}",
        f"{100 * test['weighted_precision']:.1f}, {100 * test['weighted_recall']:.1f}",
        " / ".join(epochs) if epochs[0] != epochs[1] else epochs[0],
        budget["image_size"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _sentences(record: dict, example: Example) -> list[str]:
    """What the chosen pairs of recipes say, and each stage that was rolled back."""
    told = [
        pair_sentence(pair, len(record["pairs"]))
        for names in example.pairs
        for pair in record["pairs"]
        if {pair["a"], pair["b"]} == set(names)
    ]
    for entry in record["recipes"]:
        if entry["name"] in example.courses:
            told.append(f"{entry['name']}: {entry['verdicts'][0]['sentence']}")
        caught = [event for event in entry["events"] if "Rolled back" in event]
        if caught:
            told.append(f"{entry['name']}, {len(caught)} of {len(entry['runs'])} runs rolled back: {caught[0]}")
    return told


def _sweep_table(trials: list[dict]) -> str:
    if not trials:
        return ""
    rows = [
        "The notebook's sweep of the head, ten epochs each, validation accuracy (one seed):",
        "",
        "| rate | decay | notebook | here | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for trial in trials:
        values, val = trial["values"], trial["val"]
        low, high = (f"{100 * value:.1f}" for value in val["accuracy_ci95"])
        cells = (
            f"{values['lr']:g}", f"{values['weight_decay']:g}", f"{100 * trial['published']:.1f} %",
            f"{100 * val['accuracy']:.1f} %", f"{low} - {high}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    line = parser(__doc__, "run", page="examples/README.md")
    line.add_argument("--only", default=",".join(RUNS))
    line.add_argument("--seeds", help="such as 0,1,2; otherwise those of each example")
    options = line.parse_args()
    if options.what == "table":
        show(table(), "results", write=options.write, page=EXAMPLES / "README.md")
        return
    RESULTS.mkdir(exist_ok=True)
    log = RESULTS / f"examples-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    for name in options.only.split(","):
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else list(RUNS[name].seeds)
        if records().get(name, {}).get("seeds") != seeds:
            run_one(name, seeds, log)


if __name__ == "__main__":
    main()
