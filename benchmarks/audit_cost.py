"""What share of a fit does its look at the data cost?

    python benchmarks/audit_cost.py run [--sets flowers5,hotdog] [--recipes head,fine-tune]
    python benchmarks/audit_cost.py table [--write]     # the table in docs/audit.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Each fit (mobilenetv2_100, ImageNet
weights, run folder and report written) runs in a process of its own: first with an empty cache, then again, where
pictures, looks and features are kept. Seconds are processor time, which other work on the machine hardly stretches:
of the fit, its decoding processes included; of the looks, taken there and here once more; of the quick audit (reading
looks, copies, shortcuts, its imports); and of the out-of-fold predictions. The baseline is the fit without these parts,
their seconds subtracted. One run each (no accuracy is measured). Records are appended to
benchmarks/results/audit_cost-DATE.jsonl; they name the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import HERE, SHARED, WEIGHTS, append, newest, show

# What counts as the audit, beside the looks: room and function, its name in the record, and the clock.
PARTS = (
    ("bench", "quick_audit", "quick", time.process_time),
    ("stage_run", "look_at_labels", "labels", time.process_time),
)


def fit_once(photos: Path, recipe: str, out: Path) -> dict[str, Any]:
    """One fit in this process, and the processor seconds of it and of its parts that look at the data."""
    import importlib

    import headstart
    from headstart.decode import file_bytes, picture_of
    from headstart.inspection import look_of_bytes

    parts = {"looks": 0.0} | {name: 0.0 for *_, name, _ in PARTS}

    def timed(function: Callable[..., Any], name: str, clock: Callable[[], float]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            started = clock()
            try:
                return function(*args, **options)
            finally:
                parts[name] += clock() - started

        return run

    for room, function, name, clock in PARTS:
        module = importlib.import_module(f"headstart.{room}")
        setattr(module, function, timed(getattr(module, function), name, clock))
    before, started = _cpu_seconds(), time.perf_counter()
    result = headstart.fine_tune(photos, weights=WEIGHTS, recipe=recipe, out=out, device="cpu")
    took = {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(_cpu_seconds() - before, 2)}
    paths = [path for table in result.splits.named().values() for path in table.paths]
    for path in paths if out.name == "empty" else ():
        image = picture_of(data := file_bytes(path))
        begun = time.thread_time()
        look_of_bytes(image, data)
        parts["looks"] += time.thread_time() - begun
    return {
        "pictures": sum(len(table) for table in result.splits.named().values()),
        **took,
        "cpu_seconds_of": {name: round(value, 2) for name, value in parts.items()},
        "phases": {one["name"]: round(one["seconds"], 2) for one in result.metrics["phases"]},
        "audit_seconds": json.loads((out / "audit.json").read_bytes())["seconds"],
    }


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(name: str, recipe: str) -> list[dict[str, Any]]:
    """The first and the second fit of a set, each in a process of its own."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            command = [sys.executable, __file__, "one", name, recipe, str(Path(folder) / cache)]
            env = {**os.environ, "HEADSTART_CACHE": str(Path(folder) / "cache")}
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            records.append({"set": name, "recipe": recipe, "cache": cache, **figures})
    return records


def table() -> str:
    """The records as a table; the last one of each line counts."""
    lines = [
        "| set | recipe | cache | pictures | fit, CPU s | looks | quick | labels | fast part's share | with labels |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in newest("audit_cost", "set", "recipe", "cache"):
        looks, quick, labels = (one["cpu_seconds_of"][part] for part in ("looks", "quick", "labels"))
        shares = [100 * part / one["cpu_seconds"] for part in (looks + quick, looks + quick + labels)]
        lines.append(
            f"| {one['set']} | {one['recipe']} | {one['cache']} | {one['pictures']:,} | {one['cpu_seconds']:.1f}"
            f" | {looks:.2f} | {quick:.2f} | {labels:.2f} | {shares[0]:.1f} % | {shares[1]:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--sets", default="flowers5,hotdog")
    run.add_argument("--recipes", default="head,fine-tune")
    one = commands.add_parser("one")
    for word in ("set", "recipe", "out"):
        one.add_argument(word)
    commands.add_parser("table").add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(fit_once(SHARED / "data" / args.set, args.recipe, Path(args.out))))
        return
    if args.command == "run":
        for recipe in args.recipes.split(","):
            for name in args.sets.split(","):
                for record in measure(name, recipe):
                    append("audit_cost", record)
    write = args.command == "table" and args.write
    show(table(), "cost", write=write, page=HERE.parent / "docs" / "audit.md")


if __name__ == "__main__":
    main()
