"""How much quicker is a fine-tuning step than the stock one of PyTorch, and than Keras's?

    python benchmarks/step.py run [--backbones mobilenetv2_100,...] [--batches 16,32] [--rounds 7] [--threads 1]
    python benchmarks/step.py table [--write]            # the table in docs/benchmarks.md, from the records

One step: forward pass, cross-entropy, backward pass and AdamW update of the whole network, 224 px, random weights and
pixels that are at hand. `stock`: timm's network in training mode, float32, PyTorch's usual layout. `stock, fixed`:
the same with BatchNorm's statistics fixed, which is what headstart trains with. `headstart`: the step of `fit` with
the line at `all`, in float32 or bfloat16 as it decides itself. `keras`: `train_on_batch` of benchmarks/peers/
run_keras.py with the same network of keras.applications. Two steps each to warm up, then one of each in turn, round by
round; medians over the rounds, of wall and of processor seconds (on a machine that does other work the latter
compare). With several threads those of PyTorch sleep while they wait for each other, OMP_WAIT_POLICY=passive, as
TensorFlow's do: spinning, they would count the time in which other work has the cores. Records are appended to
benchmarks/results/step-DATE.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from peers import make_environment
from records import HERE, WEIGHTS, Record, append, parser, read, show
from runner_common import IMAGE_SIZE, cpu_words

BACKBONES = ("mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0")
CLASSES = 10
WARM_UP = 2
BAR = 1.6
Seconds = tuple[float, float]
"""Of the wall, of the processor."""
Step = Callable[[], Seconds]


def timed(step: Callable[[], object]) -> Step:
    def run() -> Seconds:
        started, busy = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - started, time.process_time() - busy

    return run


def stock(backbone: str, batch: int, *, fixed: bool) -> Step:
    """A step as in any PyTorch loop; `fixed` keeps BatchNorm in evaluation mode."""
    import timm
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=CLASSES).train()
    for module in model.modules():
        if fixed and isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images, labels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(batch) % CLASSES

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return timed(step)


@contextmanager
def ours(backbone: str, batch: int) -> Iterator[tuple[Step, str]]:
    """The step of `fit` on a batch of pixels with the whole network behind the line, and its number format."""
    import torch
    from torch import nn

    from headstart import create_classifier, make_runtime, set_freeze_line
    from headstart.once import fast_kernels
    from headstart.recipe import FINE_TUNE_STAGE
    from headstart.schedule import make_optimizer

    runtime = make_runtime(device="cpu")
    torch.manual_seed(0)
    model = create_classifier(backbone, [str(i) for i in range(CLASSES)], weights="none")
    set_freeze_line(model, "all", batchnorm="fixed")
    model.train()
    optimizer = make_optimizer(model, replace(FINE_TUNE_STAGE, freeze_line="all"), lr=1e-5)
    images = torch.randint(0, 256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    labels = torch.arange(batch) % CLASSES

    def step() -> None:
        with runtime.autocast():
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with fast_kernels(model, runtime):
        yield timed(step), str(runtime.dtype).removeprefix("torch.")


@contextmanager
def keras(backbone: str, batch: int, threads: int) -> Iterator[Step]:
    """`train_on_batch` in Keras's own process, asked for one step at a time."""
    command = [
        str(make_environment("keras")), str(HERE / "peers" / "run_keras.py"), "--splits", "-", "--root", "-",
        "--weights", str(WEIGHTS), "--threads", str(threads), "--variant", f"step {batch} {backbone}",
    ]  # fmt: skip
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers, requests = process.stdout, process.stdin

    def step() -> Seconds:
        requests.write("1\n")
        requests.flush()
        wall, processor = json.loads(answers.readline())[0]
        return wall, processor

    try:
        assert answers.readline().strip() == "ready"
        yield step
    finally:
        requests.close()
        process.wait()


def measure(backbone: str, batch: int, *, rounds: int, threads: int, with_keras: bool) -> Record:
    """Medians of all kinds of step for one network and batch size."""
    import torch

    torch.set_num_threads(threads)
    with ExitStack() as stack:
        mine, dtype = stack.enter_context(ours(backbone, batch))
        kinds = {
            "stock": stock(backbone, batch, fixed=False),
            "stock, fixed": stock(backbone, batch, fixed=True),
            "headstart": mine,
        }
        if with_keras:
            kinds["keras"] = stack.enter_context(keras(backbone, batch, threads))
        for _ in range(WARM_UP):
            for step in kinds.values():
                step()
        found: dict[str, list[Seconds]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, step in kinds.items():
                found[name].append(step())
    wall, processor = (
        {name: statistics.median(s[i] for s in seconds) for name, seconds in found.items()} for i in (0, 1)
    )
    return {
        "backbone": backbone, "batch": batch, "rounds": rounds, "threads": threads, "dtype": dtype,
        "wall": wall, "processor": processor, "all": found,
    }  # fmt: skip


def table() -> str:
    """Markdown: seconds of a step, of every CPU, network and batch size the newest record, and headstart's gain."""
    rows = [
        "| CPU | network | batch | threads | stock, s | stock, fixed, s | Keras, s | headstart, s | against stock"
        " | by wall seconds | against Keras | by wall seconds | bar 1.6x |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("cpu_flags", "backbone", "batch", "threads")
    records = {tuple(str(record[key]) for key in keys): record for record in read("step")}
    for record in sorted(records.values(), key=lambda r: [r[key] for key in keys]):
        flags, backbone, batch, threads = (record[key] for key in keys)
        dtype = record["dtype"]
        seconds, wall = record["processor"], record["wall"]
        gain, keras_too = seconds["stock"] / seconds["headstart"], "keras" in seconds
        cells = (
            cpu_words(flags), backbone, batch, threads, f"{seconds['stock']:.2f}", f"{seconds['stock, fixed']:.2f}",
            f"{seconds['keras']:.2f}" if keras_too else "-", f"{seconds['headstart']:.2f} ({dtype})",
            f"{gain:.2f}x", f"{wall['stock'] / wall['headstart']:.2f}x",
            *(f"{of['keras'] / of['headstart']:.2f}x" if keras_too else "-" for of in (seconds, wall)),
            "held" if gain >= BAR else f"missed: {gain:.2f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--backbones", default=",".join(BACKBONES))
    options.add_argument("--batches", default="16,32")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--no-keras", action="store_true")
    args = options.parse_args()
    if args.what == "table":
        show(table(), "step", write=args.write)
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported
    for backbone in args.backbones.split(","):
        for batch in map(int, args.batches.split(",")):
            record = measure(backbone, batch, rounds=args.rounds, threads=args.threads, with_keras=not args.no_keras)
            append("step", record)
            print(backbone, batch, {name: round(value, 3) for name, value in record["processor"].items()}, flush=True)


if __name__ == "__main__":
    main()
