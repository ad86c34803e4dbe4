"""How near does the frozen pass come to the slower of its two limits?

    python benchmarks/frozen_pass.py PHOTOS [--backbone NAME] [--weights FILE] [--views K] [--pictures N] [--rounds R]

One process, one run: pictures a second of (1) the frozen network alone on a batch that is at hand, (2) decoding and
augmenting alone, by the pass's own threads, (3) the frozen pass itself, which does both; the three alternate and the
best round of each counts. `ratio` is (3) / min(1, 2); the bar is 0.9. Where both kinds of work share one set of cores
(a CPU), no overlap can do more than 1 / (1/(1) + 1/(2)); `cpu` compares with that, in pictures per processor second, so
that other work on the machine does not count. Baseline: the limits themselves. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch

from headstart import create_classifier, load_images, make_runtime, set_freeze_line
from headstart.once import fast_kernels, store_features
from headstart.pixels import Pixels
from headstart.recipe import POLICIES
from headstart.run import environment
from headstart.runtime import prefetch

BATCH = 32
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
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

    def forward() -> None:
        with fast_kernels(model, runtime), torch.inference_mode(), runtime.autocast():
            for _ in batches:
                model.features(at_hand)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()

    def whole() -> None:
        store_features(model, pixels(), views=args.views, runtime=runtime, batch_size=BATCH)

    names = ("forward", "decode and augment", "frozen pass")
    rates: dict[str, list[float]] = {name: [] for name in names}
    per_cpu_second: dict[str, list[float]] = {name: [] for name in names}
    steps: list[Callable[[], None]] = [forward, decode, whole]
    for _ in range(args.rounds):
        for name, step in zip(names, steps, strict=True):
            started, busy = time.perf_counter(), time.process_time()
            step()
            rates[name].append(len(jobs) / (time.perf_counter() - started))
            per_cpu_second[name].append(len(jobs) / (time.process_time() - busy))
    best, cpu = ({n: max(found) for n, found in each.items()} for each in (rates, per_cpu_second))
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "backbone": args.backbone, "pictures": len(table),
        "views": args.views, "dtype": str(runtime.dtype), "device": str(runtime.device),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rates": best,
        "rates_per_cpu_second": cpu, "ratio": best["frozen pass"] / min(best[n] for n in names[:2]),
        "cpu": cpu["frozen pass"] * sum(1 / cpu[n] for n in names[:2]), "environment": environment(),
    }  # fmt: skip
    with (RESULTS / f"frozen_pass-{datetime.now(UTC):%Y-%m-%d}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(", ".join(f"{n} {best[n]:.1f} img/s ({cpu[n]:.1f} per processor second)" for n in names))
    print(f"ratio {record['ratio']:.2f} (bar 0.9); per processor second {record['cpu']:.2f} of what both allow")


if __name__ == "__main__":
    main()
