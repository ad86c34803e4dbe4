"""What does checkpointing cost in time, and what does it save in memory?

    python benchmarks/checkpointing.py [--backbones NAME ...] [--pictures 8] [--rounds 3]

One thread of a CPU, float32, random weights, 224 px: a training step (forward and backward of the whole backbone) of
the plain network and of the same one in segments, in alternating order. Memory is what the step's tensors take at their
peak; `each` is the part that grows with the pictures, from steps of two and of four. Time is the least of the rounds.
Prints one JSON line per backbone and adds it to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
from torch import Tensor

from headstart.checkpointing import Segments, segments
from headstart.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def step(forward: Callable[[Tensor], Tensor], n: int) -> Callable[[], None]:
    x = torch.randn(n, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        forward(x).sum().backward()

    return run


def measure(name: str, *, pictures: int, rounds: int) -> dict[str, object]:
    net = timm.create_model(name, num_classes=0).train().to(memory_format=torch.channels_last)
    divided = segments(net, example_shape=(3, 224, 224))
    assert isinstance(divided, Segments), divided
    ways: dict[str, Callable[[Tensor], Tensor]] = {"plain": net, "segments": divided}
    found: dict[str, object] = {"backbone": name, "segments_used": len(divided.parts), "pictures": pictures}
    for key, forward in ways.items():
        two, four = (peak_bytes(step(forward, n), CPU) for n in (2, 4))
        found[f"{key}_each_mb"] = round((four - two) / 2e6, 1)
        net.zero_grad(set_to_none=True)
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for _ in range(rounds):
        for key, forward in ways.items():
            run = step(forward, pictures)
            started = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - started)
            net.zero_grad(set_to_none=True)
    return found | {f"{key}_seconds": round(min(times), 3) for key, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2_100", "resnet50", "vit_small_patch16_224"])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.backbones:
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
        record |= measure(name, pictures=args.pictures, rounds=args.rounds)
        print(json.dumps(record), flush=True)
        with (RESULTS / f"checkpointing-{datetime.now(UTC):%Y-%m-%d}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
