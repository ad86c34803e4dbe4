"""What do the quicker ways of computing a convolution save, each by itself?

    python benchmarks/kernels.py run [--backbones mobilenetv2_100,...] [--batch 16] [--rounds 9] [--threads 1]
    python benchmarks/kernels.py table [--write]         # the table in docs/benchmarks.md, from the records

The training step and the forward pass of `fit` on random pixels at hand, 224 px, random weights, in bfloat16 where
the machine computes in it, with activations done by the convolution before them or apart, and with the gradients of
1 x 1 convolutions as matrix products or by oneDNN. The ways take turns, step by step; medians of processor seconds. How
far the results of a forward pass lie apart is relative to their largest. Records are appended to
benchmarks/results/kernels-DATE.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from records import Record, append, parser, read, show
from runner_common import cpu_words
from step import ours, timed

from headstart import create_classifier, fastconv, make_runtime
from headstart.once import fast_kernels

BACKBONES = ("mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "resnet18", "resnet50")
WAYS = {"stock": (False, False), "activations": (True, False), "both": (True, True)}
"""Are activations done by the convolution, are gradients of 1 x 1 convolutions products?"""


@contextmanager
def way(name: str) -> Iterator[None]:
    """Everything else is as `fit` does it."""
    fused, products = WAYS[name]
    had = fastconv.activations_fuse, fastconv.products_pay
    if not fused:
        fastconv.activations_fuse = lambda dtype: False  # type: ignore[assignment]
    if not products:
        fastconv.products_pay = lambda: (False, False)  # type: ignore[assignment]
    try:
        yield
    finally:
        fastconv.activations_fuse, fastconv.products_pay = had


def medians(run: Callable[[], tuple[float, float]], ways: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Processor seconds of each way, one round of all after the other; the first two rounds are for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name in ways:
            with way(name):
                busy = run()[1]
            if number > 1:
                seconds[name].append(busy)
    return {name: round(statistics.median(times), 4) for name, times in seconds.items()}


def measure(backbone: str, batch: int, *, rounds: int) -> Record:
    with ours(backbone, batch) as (step, dtype):
        steps = medians(step, tuple(WAYS), rounds)
    model = create_classifier(backbone, ["a", "b"], weights="none").eval()
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    runtime = make_runtime(device="cpu")
    with fast_kernels(model, runtime), torch.inference_mode(), runtime.autocast():
        passes = medians(timed(lambda: model.features(pixels)), ("stock", "activations"), rounds)
        found: dict[str, Any] = {}
        for name in ("stock", "activations"):
            with way(name):
                found[name] = model.features(pixels)
    found = {name: features.float() for name, features in found.items()}
    apart = (found["stock"] - found["activations"]).abs().max() / found["stock"].abs().max()
    return {
        "backbone": backbone, "batch": batch, "rounds": rounds, "threads": torch.get_num_threads(), "dtype": dtype,
        "products": any(fastconv.products_pay()), "step": steps, "pass": passes, "apart": float(apart),
    }  # fmt: skip


def table() -> str:
    """Markdown: what each way saves, of every network and number of threads the newest record."""
    rows = [
        "| CPU | network | format | threads | forward pass, s: activations apart | by the convolution | outputs apart "
        "| step, s: stock | activations by the convolution | and gradients as products |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    records = {str([r[key] for key in ("cpu_flags", "backbone", "dtype", "threads")]): r for r in read("kernels")}
    for r in records.values():
        step, forward = r["step"], r["pass"]
        cells = [
            cpu_words(r["cpu_flags"]),
            r["backbone"],
            r["dtype"],
            r["threads"],
            f"{forward['stock']:.3f}",
            _saved(forward, "activations"),
        ]
        cells += ["same bits" if r["apart"] == 0 else f"{r['apart']:.0e}", f"{step['stock']:.3f}"]
        cells += [_saved(step, "activations"), _saved(step, "both") if r["products"] else "not here"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _saved(seconds: dict[str, float], name: str) -> str:
    return f"{seconds[name]:.3f} ({seconds['stock'] / seconds[name]:.2f}x)"


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--backbones", default=",".join(BACKBONES))
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    if args.what == "table":
        show(table(), "kernels", write=args.write)
        return
    torch.set_num_threads(args.threads)
    for name in args.backbones.split(","):
        record = measure(name, args.batch, rounds=args.rounds)
        append("kernels", record)
        print({key: record[key] for key in ("backbone", "step", "pass", "apart")}, time.ctime(), flush=True)


if __name__ == "__main__":
    main()
