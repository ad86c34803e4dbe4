"""What the runners share, with the standard library alone: each runs in its own tool's virtual environment.

A runner reads the split list and the weights it is given, does what its tool's own page says, and prints one line of
JSON. Its clock starts when everything is imported and ends when the test pictures are scored, for every runner alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

BACKBONE = "mobilenetv2_100"
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADERS = 2
"""Threads or processes that read pictures beside the computing thread."""

Pictures = list[tuple[str, int]]
"""(path, class id) of each picture of a split."""


def arguments() -> argparse.Namespace:
    """What `benchmarks/peers.py` hands to every runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=Path, required=True, help="CSV with path, label, split")
    parser.add_argument("--root", type=Path, required=True, help="what the paths start from")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="pictures and what timm makes of them, for other layouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", default="", help="which of a runner's ways")
    parser.add_argument(
        "--epochs", type=int, default=0, help="only so many of each phase, nothing scored: for estimates"
    )
    return parser.parse_args()


def read_splits(path: Path, root: Path) -> tuple[list[str], dict[str, Pictures]]:
    """The class names in order, and the pictures of train, val and test."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    splits: dict[str, Pictures] = {"train": [], "val": [], "test": []}
    for row in rows:
        splits[row["split"]].append((str(root / row["path"]), names.index(row["label"])))
    return names, splits


def cpu_flags() -> list[str]:
    """Those of this CPU's abilities that decide how fast networks run on it."""
    try:
        found = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    except OSError:
        return []
    # Without AMX, avx512_vp2intersect beside avx512_bf16 marks Zen 5, whose AVX-512 is twice as wide inside as Zen 4's.
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "avx512_fp16", "avx512_vp2intersect")
    return [flag for flag in wanted if flag in found]


def cpu_words(flags: list[str]) -> str:
    """What a CPU with these abilities computes with."""
    wide = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "SSE"
    if "amx_bf16" in flags:
        return f"{wide}, bfloat16 in AMX"
    if "avx512_bf16" not in flags:
        return wide
    return f"{wide}, bfloat16, Zen 5" if "avx512_vp2intersect" in flags else f"{wide}, bfloat16"


def has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16 itself; where it does not, autocast would only slow it down."""
    return "bfloat16" in cpu_words(cpu_flags())


def processor_seconds() -> float:
    """User and system time of this process and of those children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Clock:
    """Seconds since the start, and the validation accuracy after each epoch."""

    def __init__(self) -> None:
        self._started, self._busy = time.perf_counter(), processor_seconds()
        self.curve: list[dict[str, Any]] = []
        self.head_seconds: float | None = None
        self.head_processor_seconds: float | None = None
        self.setup_seconds = self.setup_processor_seconds = 0.0

    def seconds(self) -> float:
        return round(time.perf_counter() - self._started, 2)

    def processor_seconds(self) -> float:
        return round(processor_seconds() - self._busy, 2)

    def epoch(self, phase: str, val_accuracy: float) -> None:
        """An epoch of this phase has ended with its validation."""
        self.curve.append(
            {
                "phase": phase,
                "seconds": self.seconds(),
                "processor_seconds": self.processor_seconds(),
                "val_accuracy": round(float(val_accuracy), 6),
            }
        )

    def begins(self) -> None:
        """The first epoch begins: what has passed is spent once, whatever the number of epochs."""
        self.setup_seconds, self.setup_processor_seconds = self.seconds(), self.processor_seconds()

    def head_ends(self) -> None:
        """From here on more than the head is trained, or nothing any more."""
        self.head_seconds, self.head_processor_seconds = self.seconds(), self.processor_seconds()


def finish(
    clock: Clock,
    *,
    planned: dict[str, int],
    val_accuracy: float,
    preds: Sequence[int],
    test: Pictures,
    packages: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Print the record: times, the accuracy of the model that is returned, and each test picture's verdict.

    Args:
        planned: epochs of each phase in a whole run.
        val_accuracy: of the state that is returned, as this tool measures it.
        preds: class ids of the test pictures, in the order of the list; empty where only some epochs were run.
    """
    hits = [int(int(pred) == label) for pred, (_, label) in zip(preds, test, strict=True)] if preds else []
    record = {
        "seconds": clock.seconds(),
        "processor_seconds": clock.processor_seconds(),
        "head_seconds": clock.head_seconds,
        "head_processor_seconds": clock.head_processor_seconds,
        "curve": clock.curve,
        "val_accuracy": round(float(val_accuracy), 6),
        "planned": planned,
        "setup_seconds": clock.setup_seconds,
        "setup_processor_seconds": clock.setup_processor_seconds,
        "test_accuracy": sum(hits) / len(hits) if hits else None,
        "test_hits": "".join(map(str, hits)),
        "settings": settings,
        "versions": {name: metadata.version(name) for name in packages},
    }
    print(json.dumps(record), flush=True)
