"""How near does the frozen pass come to the slower of its two limits, where does a view's time go, does a compile pay?

    python benchmarks/frozen_pass.py run [PHOTOS] [--backbone NAME] [--views K] [--pictures N] [--rounds R] [--compile]
    python benchmarks/frozen_pass.py table [--write]      # the tables in docs/benchmarks.md, from the records

PHOTOS is flowers5 of the folder of real pictures (HEADSTART_SHARED, else ../shared) if it is not given. One process,
one run: pictures a second of (1) the frozen network alone on a batch that is at hand, (2) decoding and
augmenting alone, by the pass's own threads, (3) the frozen pass itself, which does both; the three alternate and the
best round of each counts. `ratio` is (3) / min(1, 2); the bar is 0.9. Where both kinds of work share one set of cores
(a CPU), no overlap can do more than 1 / (1/(1) + 1/(2)); `cpu` compares with that, in pictures per processor second, so
that other work on the machine does not count. Baseline: the limits themselves.

`parts` are processor milliseconds of one picture in one thread: decoding the file, the resizing to the working image
that views are cut from, an augmented view of it, the plain view. With `--compile` the network also runs as it does
after `fit --compile on` (folded, inductor with freezing), in the same rounds as (1), and the record says what the
compile took, with its own processes. Nothing is random but the machine: one seed. Records are appended to
benchmarks/results/frozen_pass-DATE.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headstart import create_classifier, load_images, make_runtime, set_freeze_line
from headstart.augment import augmented_view
from headstart.backbones import backbone_output, pool_output
from headstart.classifier import Classifier
from headstart.dataset import ImageTable, open_image
from headstart.frozenpass import frozen_forward
from headstart.once import fast_kernels, store_features
from headstart.pixels import Pixels
from headstart.portable import evaluation_view
from headstart.recipe import POLICIES
from headstart.runtime import Runtime, prefetch
from headstart.transforms import working_image

sys.path.insert(0, str(Path(__file__).parent))
import records
from runner_common import cpu_words

BATCH = 32
BAR = 0.9
BUSY = 2.0  # with more than this to do on its two cores, the machine's wall seconds say nothing
NAME = "frozen_pass"
LIMITS = ("forward", "decode and augment")


def spent() -> float:
    """Processor seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])


def compiled(model: Classifier, runtime: Runtime, at_hand: torch.Tensor) -> tuple[Callable[[], object], dict[str, Any]]:
    """The network as one compiled function of a batch, and what making it took and changed."""
    forward, finish = (partial(function, pool=model.pool) for function in (backbone_output, pool_output))
    started, busy = time.perf_counter(), spent()
    quick = frozen_forward(
        model.backbone, dtype=runtime.dtype, compiled=True, batch_size=BATCH, forward=forward, finish=finish
    )
    with torch.inference_mode():
        out = quick(model.enter(at_hand)).float()
        took = {"wall": time.perf_counter() - started, "processor": spent() - busy}
        own = model.features(at_hand).float()
    apart = float((out - own).norm() / own.norm())
    return lambda: quick(model.enter(at_hand)), {**took, "apart": apart, "error": quick.compile_error}


def parts(table: ImageTable, model: Classifier) -> dict[str, float]:
    """Processor milliseconds of a picture, one thread, each the best of three goes over the same pictures."""
    paths, spec, augment = table.paths[:64], model.spec, POLICIES["photo"]
    images = [open_image(path) for path in paths]
    working = [working_image(image, spec) for image in images]
    jobs: dict[str, Callable[[int], object]] = {
        "decode": lambda i: open_image(paths[i]),
        "resize to the working image": lambda i: working_image(images[i], spec),
        "augmented view": lambda i: augmented_view(working[i], spec, augment, seed=0, index=i, view=1),
        "plain view": lambda i: evaluation_view(images[i], spec),
    }
    found: dict[str, float] = {}
    for _ in range(3):
        for name, job in jobs.items():
            busy = time.process_time()
            for i in range(len(paths)):
                job(i)
            took = 1000 * (time.process_time() - busy) / len(paths)
            found[name] = min(took, found.get(name, took))
    return found


def run(args: argparse.Namespace) -> None:
    runtime = make_runtime()
    table = load_images(args.photos).limit(args.pictures)
    model = create_classifier(args.backbone, table.class_names, weights=args.weights).to(runtime.device).eval()
    set_freeze_line(model, "head")
    jobs = [(i, v) for i in range(len(table)) for v in range(args.views)]
    batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]

    def pixels() -> Pixels:
        return Pixels(table, model.spec, augment=POLICIES["photo"], workers=runtime.workers, cache_bytes=0)

    def decode() -> None:
        source = pixels()
        with ThreadPoolExecutor(runtime.workers) as pool:
            for _ in prefetch(lambda b: source.batch(*zip(*b, strict=True)), batches, pool=pool, ahead=3):
                pass

    at_hand = pixels().batch(*zip(*batches[0], strict=True)).to(runtime.device)

    def forward(network: Callable[[], object]) -> None:
        with fast_kernels(model, runtime), torch.inference_mode(), runtime.autocast():
            for _ in batches:
                network()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()

    def whole() -> None:
        store_features(model, pixels(), views=args.views, runtime=runtime, batch_size=BATCH)

    steps: dict[str, Callable[[], None]] = {
        "forward": partial(forward, lambda: model.features(at_hand)), "decode and augment": decode, "frozen pass": whole
    }  # fmt: skip
    record: dict[str, Any] = {}
    if args.compile:
        quick, record["compile"] = compiled(model, runtime, at_hand)
        steps["forward, compiled"] = partial(forward, quick)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    per_cpu_second: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started, busy = time.perf_counter(), time.process_time()
            step()
            rates[name].append(len(jobs) / (time.perf_counter() - started))
            per_cpu_second[name].append(len(jobs) / (time.process_time() - busy))
    best, cpu = ({n: max(found) for n, found in each.items()} for each in (rates, per_cpu_second))
    record |= {
        "backbone": args.backbone, "pictures": len(table),
        "views": args.views, "dtype": str(runtime.dtype), "device": str(runtime.device),
        "threads": torch.get_num_threads(), "rates": best,
        "rates_per_cpu_second": cpu, "ratio": best["frozen pass"] / min(best[n] for n in LIMITS),
        "cpu": cpu["frozen pass"] * sum(1 / cpu[n] for n in LIMITS), "parts": parts(table, model),
    }  # fmt: skip
    records.append(NAME, record)
    print(", ".join(f"{n} {best[n]:.1f} img/s ({cpu[n]:.1f} per processor second)" for n in steps))
    print(f"ratio {record['ratio']:.2f} (bar {BAR}); per processor second {record['cpu']:.2f} of what both allow")
    print(", ".join(f"{name} {took:.2f} ms" for name, took in record["parts"].items()), record.get("compile", ""))


def table() -> str:
    """Markdown: each run against its limits, where the time of a view goes, and what a compile brings."""
    found = records.read(NAME)
    return "\n\n".join([_limits(found), _parts(found), _compiles(found)])


def _limits(found: Sequence[records.Record]) -> str:
    rows = [
        "| CPU | network | threads | load | network alone, img/s | decode and augment, img/s | frozen pass, img/s | of "
        "the slower | both together allow, per processor second | of that | bar 0.9 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        rates, cpu = r["rates"], r["rates_per_cpu_second"]
        held = "held" if r["ratio"] >= BAR else f"missed: {r['ratio']:.2f}"
        held = held if r["load"] < BUSY else "machine busy"
        cells = (
            _cpu(r), f"{r['backbone']} ({r['dtype'].removeprefix('torch.')})", r["threads"], f"{r['load']:.1f}",
            *(f"{rates[n]:.0f}" for n in (*LIMITS, "frozen pass")), f"{r['ratio']:.2f}",
            f"{1 / sum(1 / cpu[n] for n in LIMITS):.0f}", f"{r['cpu']:.2f}", held,
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _cpu(record: records.Record) -> str:
    return cpu_words(record["cpu_flags"]) if "cpu_flags" in record else "not recorded"


def _parts(found: Sequence[records.Record]) -> str:
    timed = [r["parts"] for r in found if "parts" in r]
    rows = ["| processor milliseconds of a picture | first record | newest record |", "|---|---|---|"]
    return "\n".join(rows + [f"| {name} | {took:.2f} | {timed[-1][name]:.2f} |" for name, took in timed[0].items()])


def _compiles(found: Sequence[records.Record]) -> str:
    rows = [
        "| CPU | network | pictures per processor second: as it is | compiled | compiled over as it is | the compile: "
        "processor seconds | wall seconds | output apart, relative |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        if "compile" in r:
            cpu, made = r["rates_per_cpu_second"], r["compile"]
            own, quick = cpu["forward"], cpu["forward, compiled"]
            took = f"{made['processor']:.0f} | {made['wall']:.0f} | {made['apart']:.0e}"
            network = f"{_cpu(r)} | {r['backbone']} ({r['dtype'].removeprefix('torch.')})"
            rows.append(f"| {network} | {own:.1f} | {quick:.1f} | {quick / own:.2f}x | {took} |")
    return "\n".join(rows)


def main() -> None:
    parser = records.parser(__doc__ or "", "run")
    parser.add_argument("photos", nargs="?", default=records.SHARED / "data" / "flowers5", type=Path)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also as a compiled function")
    args = parser.parse_args()
    if args.what == "table":
        records.show(table(), "frozen pass", write=args.write)
    else:
        run(args)


if __name__ == "__main__":
    main()
