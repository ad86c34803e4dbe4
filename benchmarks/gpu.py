"""On a GPU: how quick are the frozen pass, the fine-tuning step and a whole fit?

    python benchmarks/gpu.py run [--parts frozen,step,fit] [--networks resnet18,...] [--device cuda]
    python benchmarks/gpu.py run --no-compile          # a few minutes; then what is compiled, network by network
    python benchmarks/gpu.py table [--write]           # the table in docs/benchmarks.md, from the records

frozen: pictures uint8 of 224 px that lie on the device go through the frozen network, as `fit` runs it: BatchNorm
    folded, channels-last, bfloat16, its kernels recorded as one CUDA graph (*recorded*), or compiled; also with
    augmented views of policy `photo`, drawn there from working images, one after the other (in a fit the next ones are
    drawn meanwhile). The baselines in the same run are the network as a plain loop runs it (eager, autocast,
    channels-last), and timm's published figures for compiled networks on an RTX 5090.
step: a step of the default fine-tuning stage from stored activations, its kernels recorded as one CUDA graph, one by
    one, and compiled, beside a loop written by hand over the same pictures: the whole network, as it is and compiled,
    bfloat16, channels-last, fused AdamW, the same layers frozen, which it runs every time.
fit: the default recipe on generated pictures (2,000 in two classes, resnet18), from an empty cache and again; and
    mobilenetv2_100 with ImageNet weights on flowers5, where the folder of real pictures and weights is
    (HEADSTART_SHARED, else ../shared).

Random weights but for that. Rates are medians over rounds in which the ways take turns, each round waiting for the
device at its end; *first call* is how long the first one took, compiling included. With `--device cpu` the script runs
too, to be tried out; the table leaves that away. Records are appended to benchmarks/results/gpu-DATE.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from records import SHARED, WEIGHTS, Record, append, newest, parser, show
from size import make_pictures
from torch import nn

import headstart
from headstart import frozenpass, gradients
from headstart.backbones import backbone_output, pool_output
from headstart.batchviews import views_together
from headstart.cut import Cut, cut_or_reason
from headstart.features import ActivationSource
from headstart.filling import Stored
from headstart.frozenpass import frozen_forward
from headstart.gradients import Batch, CompiledForward, Gradients
from headstart.once import fast_kernels
from headstart.pixels import views_at_once
from headstart.recipe import FINE_TUNE_STAGE, POLICIES
from headstart.runtime import Runtime
from headstart.schedule import make_optimizer

FLOORS = {"resnet18": 35_600, "resnet50": 12_400, "efficientnet_b0": 18_200, "vit_small_patch16_224": 13_400}
"""Pictures a second of the compiled networks in timm's results file for an RTX 5090."""
CLASSES = tuple(str(i) for i in range(10))
REAL = "mobilenetv2_100"
"""Is fitted to real pictures."""


def rates(ways: dict[str, Callable[[], object]], pictures: int, options: argparse.Namespace) -> Record:
    """Pictures a second of each way, which handles so many at a call, and the seconds that its first call took.

    A way that fails here is left out, and said.
    """
    alive, times, first = dict(ways), {name: [] for name in ways}, {}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, run in list(alive.items()):
            wait(options.device)
            started = time.perf_counter()
            try:
                for call in range(options.calls):
                    run()
                    if not turn and not call:
                        wait(options.device)
                        first[name] = round(time.perf_counter() - started, 2)
            except Exception as error:
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
                del alive[name]
                continue
            wait(options.device)
            if turn:
                times[name].append((time.perf_counter() - started) / options.calls)
    found = {name: round(pictures / statistics.median(times[name]), 1) for name in alive}
    return found | {"first call": {name: first[name] for name in alive}}


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device.startswith("cuda") else torch.float32


def frozen(network: str, options: argparse.Namespace) -> Record:
    device, batch, dtype = torch.device(options.device), options.batch, dtype_of(options)
    model = headstart.create_classifier(network, CLASSES, weights="none").eval().to(device)
    side = model.spec.image_size
    pictures = torch.randint(0, 256, (4 * batch, 3, side, side), dtype=torch.uint8, device=device)
    working = [torch.randint(0, 256, (294, 392, 3), dtype=torch.uint8, device=device) for _ in range(batch)]
    forward, finish = (partial(function, pool=model.pool) for function in (backbone_output, pool_output))
    quick = partial(frozen_forward, model.backbone, dtype=dtype, forward=forward, finish=finish)
    recorded, compiled = quick(recorded=True), quick(compiled=True, batch_size=batch)
    at = iter(range(10**9))

    def chunk() -> torch.Tensor:
        return pictures.split(batch)[next(at) % 4]

    def plain() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model.features(chunk())

    def augmented() -> torch.Tensor:
        view, most = next(at) + 1, views_at_once(device, model.spec)  # together as many as a fit draws
        parts = [
            views_together(
                part, model.spec, POLICIES["photo"], seed=0, indices=range(len(part)), views=[view] * len(part)
            )
            for part in (working[start : start + most] for start in range(0, batch, most))
        ]
        return recorded(model.enter(torch.cat(parts)))

    with fast_kernels(model, Runtime(device)), torch.inference_mode():
        ways = {"plain": plain, "recorded": lambda: recorded(model.enter(chunk())), "augmented": augmented}
        if options.compile:
            ways["compiled"] = lambda: compiled(model.enter(chunk()))
        found = rates(ways, batch, options)
    # Both go on without what could not be had, and would be timed as what they are not.
    if device.type == "cuda" and recorded._graph is None:
        found = {name: rate for name, rate in found.items() if name not in ("recorded", "augmented")}
        print(f"{network}: its kernels could not be recorded", flush=True)
    if not compiled.compiled:
        found.pop("compiled", None)
        print(f"{network} could not be compiled: {compiled.compile_error}", flush=True)
    return found | {"BatchNorm layers folded": recorded.folded}


def step(network: str, options: argparse.Namespace) -> Record:
    device, batch, dtype = torch.device(options.device), options.step_batch, dtype_of(options)
    runtime, stage = Runtime(device, dtype, compile="off"), replace(FINE_TUNE_STAGE, batch_size=batch, epochs=100)
    torch.manual_seed(0)
    model = headstart.create_classifier(network, CLASSES, weights="none").to(device)
    line = headstart.set_freeze_line(model, FINE_TUNE_STAGE.freeze_line, batchnorm="fixed")
    side = model.spec.image_size
    found = cut_or_reason(
        model.backbone, line.trained, example_shape=(3, side, side),
        forward=partial(backbone_output, pool=model.pool), kept_in_eval=model.kept_in_eval,
    )  # fmt: skip
    assert isinstance(found, Cut), found
    labels = torch.arange(4 * batch) % len(CLASSES)
    is_map = len(found.shape) == 3
    shape = (*found.shape[1:], found.shape[0]) if is_map else found.shape
    rows = torch.randn(4 * batch, *shape, device=device, dtype=dtype)
    source = ActivationSource(Stored(rows, is_map, dtype), labels, found)
    optimizer = make_optimizer(model, stage, lr=1e-4)
    at = iter(range(10**9))
    steps = {name: Gradients(model, source, stage, runtime=runtime) for name in ("ours", "ours, not recorded")}
    steps["ours, not recorded"]._records = False
    if options.compile:
        steps["ours, compiled"] = Gradients(model, source, stage, runtime=runtime)
        steps["ours, compiled"]._forward = CompiledForward(source)
        steps["ours, compiled"]._records = False

    def ours(gradients: Gradients) -> None:
        indices = torch.arange(batch) + batch * (next(at) % 4)
        one = Batch(source.batch(indices.tolist(), [0] * batch), labels[indices])
        gradients.add([one], float(batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    ways: dict[str, Callable[[], object]] = {name: partial(ours, made) for name, made in steps.items()}
    by_hand = by_hand_step(network, batch, options)
    with fast_kernels(found.suffix.train_graph, runtime):
        rated = rates(ways | by_hand, batch, options)
    if device.type == "cuda" and steps["ours"]._recording is None:
        print(f"{network}: its step could not be recorded", flush=True)
        rated.pop("ours", None)
    return rated | {"batch of a step": batch}


def by_hand_step(network: str, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The loop that a good page on speed would have one write."""
    device, dtype = torch.device(options.device), dtype_of(options)
    model = headstart.create_classifier(network, CLASSES, weights="none").to(device)
    headstart.set_freeze_line(model, FINE_TUNE_STAGE.freeze_line, batchnorm="fixed")
    model.train().to(memory_format=torch.channels_last)
    net = nn.Sequential(model.backbone, model.head)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
    side = model.spec.image_size
    pictures = torch.randint(0, 256, (4 * batch, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.arange(4 * batch, device=device) % len(CLASSES)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (model.spec.mean, model.spec.std))
    at = iter(range(10**9))

    def run(network: Callable[[torch.Tensor], torch.Tensor]) -> None:
        i = next(at) % 4
        x = ((pictures.split(batch)[i].float() - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(network(x), labels.split(batch)[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[], object]] = {"by hand": partial(run, net)}
    if options.compile:
        ways["by hand, compiled"] = partial(run, torch.compile(net))
    return ways


def fit(network: str, options: argparse.Namespace) -> Record:
    """A whole fit, of mobilenetv2_100 on real pictures, of another network on generated ones."""
    found: Record = {}
    is_real = network == REAL
    with tempfile.TemporaryDirectory() as folder:
        pictures = SHARED / "data" / "flowers5" if is_real else Path(folder) / "pictures"
        if not is_real:
            make_pictures(pictures, options.pictures)
        os.environ["HEADSTART_CACHE"] = f"{folder}/cache"
        torch.zeros(1, device=options.device)  # the device's own start-up is nobody's
        for cache in ("empty cache", "filled cache"):
            started = time.perf_counter()
            result = headstart.fine_tune(
                pictures, backbone=network, weights=str(WEIGHTS) if is_real else "none", out=f"{folder}/{cache}",
                device=options.device,
            )  # fmt: skip
            found[cache] = round(time.perf_counter() - started, 2)
            found[f"phases, {cache}"] = {one["name"]: round(one["seconds"], 2) for one in result.metrics["phases"]}
        if is_real:
            found["test accuracy"] = result.metrics["test"]["accuracy"]
    return found | {"pictures": len(result.splits.train) + len(result.splits.val)}


PARTS: dict[str, Callable[[str, argparse.Namespace], Record]] = {"frozen": frozen, "step": step, "fit": fit}


def table() -> str:
    """Markdown: of each device, part and network the newest record."""
    records = [r for r in newest("gpu", "device", "part", "network") if r["device"] != "cpu"]
    rows = ["| device | what | network | batch | pictures a second, or seconds | floor |", "|---|---|---|---|---|---|"]
    for r in records:
        figures = ", ".join(f"{name} {value:,}" for name, value in r["figures"].items() if isinstance(value, float))
        floor = f"{FLOORS[r['network']]:,}" if r["part"] == "frozen" and r["network"] in FLOORS else ""
        batch = r["figures"].get("batch of a step", r["batch"] // 4) if r["part"] == "step" else r["batch"]
        rows.append(f"| {r['device']} | {r['part']} | {r['network']} | {batch} | {figures} | {floor} |")
    return "\n".join(rows if records else [*rows, "| none was at hand | | | | | |"])


def main() -> None:
    line = parser(__doc__, "run")
    line.add_argument("--parts", default=",".join(PARTS))
    line.add_argument("--networks", default=",".join(FLOORS))
    line.add_argument("--device", default="cuda")
    line.add_argument("--batch", type=int, default=256, help="of the frozen pass")
    line.add_argument("--step-batch", type=int, default=FINE_TUNE_STAGE.batch_pictures)
    line.add_argument("--rounds", type=int, default=5)
    line.add_argument("--calls", type=int, default=10, help="in a round")
    line.add_argument("--pictures", type=int, default=2000, help="of the fit")
    line.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave the compiled ways out: each takes a minute"
    )
    line.add_argument("--record", action="store_true", help="record with a PyTorch that is too old for it, too")
    options = line.parse_args()
    if options.record:
        frozenpass.CAN_RECORD = gradients.CAN_RECORD = True
    if options.what == "table":
        show(table(), "gpu", write=options.write)
        return
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    failed: list[str] = []
    for part in options.parts.split(","):
        networks = options.networks.split(",") if part != "fit" else ["resnet18", *[REAL] * WEIGHTS.is_file()]
        for network in networks:
            try:
                figures = PARTS[part](network, options)
            except Exception:  # time on such a device is dear: the others are measured all the same
                traceback.print_exc()
                failed.append(f"{part} {network}")
                continue
            append(
                "gpu", {"device": name, "part": part, "network": network, "batch": options.batch, "figures": figures}
            )
            print(part, network, figures, flush=True)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
