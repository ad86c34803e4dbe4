"""What does checkpointing cost in time, and what does it save in memory?

    python benchmarks/checkpointing.py run [--backbones resnet50,...] [--pictures 8] [--rounds 3]
    python benchmarks/checkpointing.py table [--write]      # the table in docs/benchmarks.md, from the records

One thread of a CPU, float32, random weights, 224 px: a training step (forward and backward of the whole backbone) of
the plain network and of the same one in segments, in alternating order. Memory is what the step's tensors take at their
peak; `each` is the part that grows with the pictures, from steps of two and of four. Time is the least of the rounds,
by processor seconds. Records are appended to benchmarks/results/checkpointing-DATE.jsonl; the first has wall seconds
alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch
from records import Record, append, newest, parser, show
from torch import Tensor

from headstart.checkpointing import Segments, segments
from headstart.memory import peak_bytes

CPU = torch.device("cpu")


def step(forward: Callable[[Tensor], Tensor], n: int) -> Callable[[], None]:
    x = torch.randn(n, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        forward(x).sum().backward()

    return run


def measure(name: str, *, pictures: int, rounds: int) -> Record:
    net = timm.create_model(name, num_classes=0).train().to(memory_format=torch.channels_last)
    divided = segments(net, example_shape=(3, 224, 224))
    assert isinstance(divided, Segments), divided
    ways: dict[str, Callable[[Tensor], Tensor]] = {"plain": net, "segments": divided}
    found: Record = {"backbone": name, "segments_used": len(divided.parts), "pictures": pictures}
    for key, forward in ways.items():
        two, four = (peak_bytes(step(forward, n), CPU) for n in (2, 4))
        found[f"{key}_each_mb"] = round((four - two) / 2e6, 1)
        net.zero_grad(set_to_none=True)
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in ways}
    for _ in range(rounds):
        for key, forward in ways.items():
            run = step(forward, pictures)
            started, busy = time.perf_counter(), time.process_time()
            run()
            seconds[key].append((time.process_time() - busy, time.perf_counter() - started))
            net.zero_grad(set_to_none=True)
    for key, times in seconds.items():
        processor, wall = min(times)
        found |= {f"{key}_processor_seconds": round(processor, 3), f"{key}_seconds": round(wall, 3)}
    return found


def table() -> str:
    """Markdown: memory and time of a step, plain and in segments, of every network the newest record."""
    rows = [
        "| network | segments | memory for each picture, MB: plain | in segments | a step of pictures | processor"
        " seconds: plain | in segments | memory | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in newest("checkpointing", "backbone"):
        if "plain_processor_seconds" not in r:
            continue
        plain, divided = (r[f"{way}_processor_seconds"] for way in ("plain", "segments"))
        cells = (
            r["backbone"], r["segments_used"], f"{r['plain_each_mb']:.1f}", f"{r['segments_each_mb']:.1f}",
            r["pictures"], f"{plain:.2f}", f"{divided:.2f}", f"{r['segments_each_mb'] / r['plain_each_mb']:.2f}x",
            f"{divided / plain:.2f}x",
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--backbones", default="mobilenetv2_100,resnet50,vit_small_patch16_224")
    options.add_argument("--pictures", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    if args.what == "table":
        show(table(), "checkpointing", write=args.write)
        return
    torch.set_num_threads(1)
    for name in args.backbones.split(","):
        record = measure(name, pictures=args.pictures, rounds=args.rounds)
        append("checkpointing", record)
        print(record, flush=True)


if __name__ == "__main__":
    main()
