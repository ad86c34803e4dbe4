"""Several processes: the same model as one process makes, one run folder, one cache."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from headstart import Runtime
from headstart.store import Cache

FIT = """fit {photos} --backbone test_resnet.r160_in1k --weights none --image-size 32 --device cpu --precision fp32
    --workers 1 --epochs 4,2 --batch-size 8 --out {out}"""
LAUNCHERS = {
    # --multi_gpu is accelerate's word for several processes on one machine; --device cpu says what they compute on.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--num_processes 2 --main_process_port {port} -m headstart.cli",
    "torchrun": "torch.distributed.run --nproc_per_node 2 --master_port {port} -m headstart.cli",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(command: str, cache: Path) -> str:
    """Standard output of a Python module's run."""
    environment = os.environ | {"HEADSTART_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", *command.split()]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probabilities(run: Path) -> dict[str, list[float]]:
    """The test and validation pictures' probabilities by path."""
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: [float(value) for name, value in row.items() if name.startswith("p:")] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_make_the_model_that_one_makes(launcher: str, photos: Path, tmp_path: Path) -> None:
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    run("headstart.cli " + FIT.format(photos=photos, out=one), tmp_path / "other-cache")
    both = LAUNCHERS[launcher].format(port=free_port()) + " " + FIT.format(photos=photos, out=two)
    out = run(both, cache)
    assert out.count("report  ") == 1  # one of them writes and prints
    expected, got = probabilities(one), probabilities(two)
    assert list(got) == list(expected)
    assert len(got) == 12
    for path, row in expected.items():
        assert got[path] == pytest.approx(row, abs=1e-5)
    kinds = [entry.kind for entry in Cache(cache).entries()]
    assert sorted(set(kinds)) == ["audits", "features", "files", "pixels"]
    assert kinds.count("pixels") == kinds.count("audits") == 1  # nothing was decoded by both
    again = LAUNCHERS[launcher].format(port=free_port()) + " " + FIT.format(photos=photos, out=tmp_path / "three")
    run(again, cache)
    assert probabilities(tmp_path / "three") == got


def test_summed_gradients_lie_as_their_parameters_do() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        conv(torch.randn(2, 3, 8, 8)).sum().backward()
        assert conv.weight.grad is not None
        expected = conv.weight.grad.clone()
        runtime = Runtime(torch.device("cpu"), world=2)  # as if another process had added nothing
        runtime.sum_gradients(conv.parameters())
        assert torch.equal(conv.weight.grad, expected)
        assert conv.weight.grad.stride() == conv.weight.stride()
        assert not runtime.agrees(True)
    finally:
        torch.distributed.destroy_process_group()
