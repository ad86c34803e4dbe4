"""Where do the processor seconds of a default fit go?

    python benchmarks/profile_fit.py run [--sets flowers5] [--recipe fine-tune]
    python benchmarks/profile_fit.py table [--write]      # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with ImageNet
weights at 224 px, an empty cache, one thread (and those that read), seed 0. Every 20 ms what all processes of the run
have used up since the last look, threads that decode and augment included, is put down to what the main thread is at.
There is no baseline: the parts are compared with the whole. Records are appended to
benchmarks/results/profile_fit-DATE.jsonl.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from records import SHARED, WEIGHTS, append, newest, parser, show

import headstart
from headstart.numerics import bf16_works

# The part of a run that a function stands for; the outermost of them counts.
PARTS = {
    "groundwork.make_bench": "decoding, and the look at each picture",
    "once.store_features": "the head stage's frozen pass, augmentation included",
    "once.store_activations": "the fine-tuning stage's, of the views that the head stage had not",
    "gradients.keep_quicker_format": "timing a step in both formats",
    "gradients.add": "gradients",
    "attempt.score_val": "scoring validation, in float32",
    "attempt.score_train": "scoring training pictures",
    "stage_run.look_at_stored_labels": "the look at labels",
    "closing.finish": "scoring the test pictures, the report",
}
REST = "the rest: imports, optimiser, checks"


def spent() -> float:
    """Processor seconds of this process and of its children."""
    total = time.process_time()
    for child in psutil.Process().children():
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def part_of_run(thread: int) -> str:
    """What that thread is at."""
    frame, found = sys._current_frames().get(thread), REST
    while frame is not None:  # from the innermost outwards
        name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        found = PARTS.get(name, found)
        frame = frame.f_back
    return found


class Watch:
    """Looks every 20 ms, until it is stopped."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stop, self._main = threading.Event(), threading.get_ident()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        before = spent()
        while not self._stop.wait(0.02):
            now = max(before, spent())  # a child that has ended takes its seconds with it
            self.seconds[part_of_run(self._main)] += now - before
            before = now

    def stop(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return {name: round(seconds, 2) for name, seconds in self.seconds.items()}


def run_one(name: str, recipe: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HEADSTART_CACHE"] = folder
        watch = Watch()
        headstart.fine_tune(
            SHARED / "data" / name, weights=str(WEIGHTS), recipe=recipe, spec_overrides={"interpolation": "bilinear"},
            out=Path(folder) / "run",
        )  # fmt: skip
        seconds = watch.stop()
    append("profile_fit", {"set": name, "recipe": recipe, "bfloat16": bf16_works(), "seconds": seconds})


def table() -> str:
    """Markdown: seconds and shares of each part, a column for each record."""
    found = newest("profile_fit", "set", "recipe", "bfloat16")
    heads = [f"{r['set']}, {r['recipe']}, CPU with{'' if r['bfloat16'] else 'out'} bfloat16: s" for r in found]
    out = [f"| part | {' | '.join(f'{head} | %' for head in heads)} |", "|---" * (1 + 2 * len(found)) + "|"]
    for part in (*PARTS.values(), REST, "in all"):
        cells = []
        for record in found:
            whole = sum(record["seconds"].values())
            value = whole if part == "in all" else record["seconds"].get(part, 0.0)
            cells += [f"{value:.1f}", f"{100 * value / whole:.0f}"]
        out.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    line = parser(__doc__, "run")
    line.add_argument("--sets", default="flowers5")
    line.add_argument("--recipe", default="fine-tune")
    options = line.parse_args()
    if options.what == "table":
        show(table(), "profile", write=options.write)
        return
    for name in options.sets.split(","):
        run_one(name, options.recipe)


if __name__ == "__main__":
    main()
