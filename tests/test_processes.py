"""Several processes: the same model as one process makes, one run folder, one cache."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import several
from headstart import ModelError, Runtime, SetupError, Stage, create_classifier, make_runtime, set_freeze_line
from headstart.classifier import Classifier
from headstart.features import StageData
from headstart.gradients import Batch, Gradients
from headstart.schedule import batches_of_epoch
from headstart.store import Cache
from headstart.train import fit
from tiny import SPEC

CPU = make_runtime(device="cpu", precision="fp32", workers=1)

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
    assert (kinds.count("pixels"), kinds.count("audits")) == (2, 1)  # views and looks: nothing was decoded by both
    again = LAUNCHERS[launcher].format(port=free_port()) + " " + FIT.format(photos=photos, out=tmp_path / "three")
    run(again, cache)
    assert probabilities(tmp_path / "three") == got


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_together(photos: Path, tmp_path: Path) -> None:
    fit = FIT.replace("--epochs 4,2", "--epochs 4,40")

    def launched(out: Path, more: str = "") -> str:
        return f"{LAUNCHERS['accelerate'].format(port=free_port())} {fit.format(photos=photos, out=out)} {more}"

    whole, out, cache = tmp_path / "whole", tmp_path / "out", tmp_path / "cache"
    run(launched(whole), cache)
    environment = os.environ | {"HEADSTART_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launched(out).split()]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "point-a.json").exists() and time.monotonic() < deadline:  # the head stage is done
            time.sleep(0.02)
    finally:
        for process in (psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)):
            process.kill()
        started.wait()
    assert (out / "point-a.json").exists()
    assert not (out / "model.safetensors").exists()
    assert run(launched(out, "--resume"), cache).count("report  ") == 1
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert probabilities(out) == probabilities(whole)


@pytest.mark.slow
def test_what_the_main_process_alone_runs_into_ends_all_of_them(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("not a run")
    launcher = next(iter(LAUNCHERS.values())).format(port=free_port())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher.split(), *FIT.format(photos=photos, out=out).split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("a folder that is not empty is there") == 1
    assert "(process 1) The main process cannot make the run's folder." in done.stderr
    assert "recipes.py" not in done.stderr  # no trace of ours


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended the stages of `several` in."""
    folder, port = tmp_path_factory.mktemp("apart"), str(free_port())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(several.__file__)), str(folder)]
    started = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", several.STAGES)
def test_a_stage_in_which_batchnorm_learns_is_that_of_one_process(name: str, apart: list[dict[str, Any]]) -> None:
    first, second = (process[name] for process in apart)
    assert first["state"].keys() == second["state"].keys()
    for key, tensor in first["state"].items():
        assert torch.equal(second["state"][key], tensor), key  # statistics too
    assert first["losses"] == second["losses"]
    if name == "auto":  # memory, of which one of them has less, is for four pictures at once
        assert all("32 pictures, 4 at once" in events[0] for events in (first["events"], second["events"]))
        return
    one = several.trained(name, CPU)
    if name == "head":  # each process computes all of it
        assert all(torch.equal(one["state"][key], tensor) for key, tensor in first["state"].items())
    assert torch.allclose(first["logits"], one["logits"], rtol=0, atol=1e-4)
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-5)


@pytest.fixture
def as_if_two() -> Iterator[Runtime]:
    """One process that takes itself for the first of two, of which the other has nothing to add."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield replace(CPU, world=2)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("measured", [False, True])
def test_out_of_memory_is_an_error_where_processes_wait_for_each_other(as_if_two: Runtime, measured: bool) -> None:
    stage = Stage(freeze_line="all", batchnorm="train")
    source, model = (
        several.pictures(8, 0),
        create_classifier(several.backbone(), ["a", "b"], head=several.HEAD, data_spec=SPEC),
    )
    batch = Batch(source.batch(range(8), []), torch.arange(8) % 2)
    sizes: list[int] = []

    def short(model: Classifier, inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        raise MemoryError("no more")

    source.forward = short  # type: ignore[method-assign]
    made = Gradients(model, source, stage, runtime=as_if_two)
    compute = partial(made.step_bytes, 8) if measured else partial(made.add, [batch], 8.0)
    with pytest.raises(SetupError, match=r"in one of several processes, with 8 pictures .*--batchnorm fixed"):
        compute()
    assert sizes == [8]  # the other process is not left behind in a layer


@pytest.mark.parametrize("batchnorm", ["train", "fixed"])
def test_every_process_has_a_picture_of_every_batch(batchnorm: str) -> None:
    labels = torch.arange(49) % 3
    sizes = [len(b) for b in batches_of_epoch(49, labels, Stage(batch_size=23), seed=0, epoch=1, least=4)]
    assert sizes == [23, 26]
    stage = Stage(freeze_line="all", batchnorm=batchnorm, batch_size=3)
    model = create_classifier(several.backbone(), ["a", "b", "c"], head=several.HEAD, data_spec=SPEC)
    set_freeze_line(model, "all", batchnorm=batchnorm)
    data = StageData(several.pictures(49, 0), several.pictures(9, 1))
    with pytest.raises(ModelError, match=r"4 processes cannot share batches of 3 pictures.* batch size of 4"):
        fit(model, data, stage, lr=0.1, runtime=replace(CPU, world=4))


def test_summed_gradients_lie_as_their_parameters_do(as_if_two: Runtime) -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    conv(torch.randn(2, 3, 8, 8)).sum().backward()
    assert conv.weight.grad is not None
    expected = conv.weight.grad.clone()
    as_if_two.sum_gradients(conv.parameters())
    assert torch.equal(conv.weight.grad, expected)
    assert conv.weight.grad.stride() == conv.weight.stride()
    assert not as_if_two.agrees(True)
