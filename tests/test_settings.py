"""What a caller has set in PyTorch does not reach a fit, and a fit not the caller: numbers, modes, other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import headstart
from headstart import Recipe, Stage, create_classifier, fine_tune, fit, load_images, predict_files, split
from headstart.fxtrace import trace
from tiny import SPEC, TinyNet

SHORT = Recipe(stages=(Stage(epochs=2, batch_size=8),))
CPU = {"weights": "none", "precision": "fp32", "device": "cpu", "cache": False}


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting", [double, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_what_the_caller_has_set_changes_no_figure(
    setting: Callable[[], AbstractContextManager[Any]], photos: Path
) -> None:
    net = TinyNet()
    plain = fine_tune(photos, backbone=net, data_spec=SPEC, recipe=SHORT, **CPU)
    with setting():
        set_so = fine_tune(photos, backbone=net, data_spec=SPEC, recipe=SHORT, **CPU)
        scored = headstart.evaluate(set_so.model, set_so.splits.test).metrics
        now = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    with setting():
        assert now == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    assert set_so.metrics["test"] == scored == plain.metrics["test"]


@pytest.mark.parametrize("setting", [double, torch.inference_mode])
def test_a_model_that_is_made_under_a_caller_s_settings_trains(
    setting: Callable[[], AbstractContextManager[Any]], photos: Path, tmp_path: Path
) -> None:
    splits, stage = split(load_images(photos)), Stage(freeze_line="all", epochs=1, batch_size=8)
    with setting():
        made = create_classifier("test_resnet", splits.class_names, weights="none", image_size=32)
        headstart.save(made, tmp_path)
        loaded = headstart.load(tmp_path)
    for model in (made, loaded):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        fit(model, splits, stage, cache=False)


def test_the_caller_s_random_numbers_go_on_as_if_nothing_had_been_trained(photos: Path) -> None:
    splits, drawn = split(load_images(photos)), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(2)
        torch.manual_seed(seed)
        model = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
        fit(model, splits, Stage(freeze_line="all", epochs=1, batch_size=8), cache=False)
        drawn.append(torch.rand(2).equal(expected))
    assert drawn == [True, True]


def test_random_numbers_of_one_thread_are_not_drawn_twice_while_another_predicts(photos: Path) -> None:
    files = sorted(photos.rglob("*.jpg"))[:2]
    model = create_classifier(TinyNet(), ("a", "b"), data_spec=SPEC)
    with ThreadPoolExecutor(1) as pool:
        predicting = pool.submit(lambda: [predict_files(model, files, device="cpu") for _ in range(20)])
        drawn = []
        while not predicting.done():
            drawn.append(float(torch.rand(1, dtype=torch.float64)))
        predicting.result()
    assert len(set(drawn)) == len(drawn) > 20


def test_modules_of_other_threads_run_while_one_is_recorded() -> None:
    served, done, pixels = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), threading.Event(), torch.ones(2, 4)
    expected = served(pixels)

    def serve() -> int:
        count = 0
        while not done.is_set():
            assert torch.equal(served(pixels), expected)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(serve)
        try:
            recording = [
                pool.submit(trace, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), lambda net, x: net(x))
                for _ in range(40)
            ]
            graphs = [one.result()[1] for one in recording]
        finally:
            done.set()
        assert serving.result() > 0
    assert len({str(graph) for graph in graphs}) == 1


def test_one_model_predicts_in_several_threads_what_it_predicts_alone(photos: Path) -> None:
    files = sorted(photos.rglob("*.jpg"))[:8]
    model = create_classifier("test_efficientnet", ("a", "b"), weights="none", image_size=32)
    expected = predict_files(model, files, device="cpu")
    classes = [type(module) for module in model.modules()]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: predict_files(model, files, device="cpu"), range(12)))
    assert all(one == expected for one in told)
    assert [type(module) for module in model.modules()] == classes
