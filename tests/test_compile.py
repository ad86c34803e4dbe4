"""The frozen pass as a compiled function: when it pays, that it agrees, what happens where it does not work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from headstart import RecipeError, create_classifier, load_images, make_runtime, set_freeze_line
from headstart.classifier import Classifier
from headstart.frozenpass import COMPILE_SECONDS, SAVED, compile_pays, share_saved
from headstart.memory import Portion
from headstart.once import store_features
from headstart.pixels import Pixels
from headstart.pixelstore import PixelStore
from headstart.runtime import Runtime
from headstart.store import Cache

NET = "test_resnet.r160_in1k"


class Told(list[str]):
    """The lines of a run."""

    def runtime(self, compile: str) -> Runtime:
        plain = make_runtime(device="cpu", precision="fp32", workers=1, compile=compile)
        return replace(plain, portion=Portion(tell=self.append))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def model(photos: Path) -> Classifier:
    made = create_classifier(NET, load_images(photos).class_names, weights="none", image_size=32)
    set_freeze_line(made, "head")
    return made


@pytest.fixture
def pixels(photos: Path, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pixels:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    table = load_images(photos)
    store = PixelStore(Cache(), model.spec)
    store.fill(table.paths, root=photos, workers=1)
    return Pixels(table, model.spec, store=store)


def compiles_to(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module, Tensor], Tensor]) -> list[nn.Module]:
    """Stand in for PyTorch's compiler: the "compiled" function does `change`; gives the modules that were compiled."""
    seen: list[nn.Module] = []

    def compiler(module: nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
        seen.append(module)
        return lambda x: change(module, x)

    monkeypatch.setattr(torch, "compile", compiler)
    return seen


def kept(pixels: Pixels) -> int:
    assert pixels.store is not None
    return len(pixels.store.cache.names("features"))


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(RecipeError, match="compile is 'yes'; allowed: auto, on, off"):
        make_runtime(compile="yes")


def test_a_compile_pays_where_it_saves_more_than_it_takes() -> None:
    assert compile_pays(COMPILE_SECONDS / 2, saved=0.5) == (False, "")
    pays, why = compile_pays(100, saved=0.5)
    assert not pays
    assert why == "The frozen layers are not compiled: that saves about 50 % of 100 seconds, for about 40."
    pays, why = compile_pays(1000, saved=0.3)
    assert pays
    assert why == "The frozen layers are compiled: that saves about 30 % of 1,000 seconds, for about 40."


@pytest.mark.parametrize("is_long", [True, False])
def test_a_long_pass_says_why_it_is_not_compiled_on_a_cpu(
    is_long: bool, model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.once._TIMED_FROM", 1 + len(pixels) // 8 + (not is_long))
    seen = compiles_to(monkeypatch, lambda module, x: module(x))
    store_features(model, pixels, runtime=told.runtime("auto"), batch_size=8)
    assert told == ["The frozen layers are not compiled: on cpu that is not known to save time for them."] * is_long
    assert not seen


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is installed")
@pytest.mark.filterwarnings("ignore")  # of PyTorch's own compiler
def test_compiled_features_agree_and_are_kept_apart(model: Classifier, pixels: Pixels, told: Told) -> None:
    plain = store_features(model, pixels, runtime=told.runtime("off"), batch_size=8)
    quick = store_features(model, pixels, runtime=told.runtime("on"), batch_size=8)
    assert told == ["The frozen layers are compiled, which takes a minute or so."]
    assert float((quick - plain).norm() / plain.norm()) < 1e-5
    assert kept(pixels) == 2
    again = store_features(model, pixels, runtime=told.runtime("on"), batch_size=8)
    assert torch.equal(again, quick)
    assert len(told) == 1  # nothing was compiled


def test_rows_of_a_compiled_function_have_a_place_of_their_own(
    model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = compiles_to(monkeypatch, lambda module, x: module(x) * (1 + 1e-6))
    plain = store_features(model, pixels, runtime=told.runtime("off"), batch_size=8)
    quick = store_features(model, pixels, runtime=told.runtime("on"), batch_size=8)
    assert not torch.equal(quick, plain)
    assert kept(pixels) == 2
    assert torch.equal(store_features(model, pixels, runtime=told.runtime("on"), batch_size=8), quick)
    assert torch.equal(store_features(model, pixels, runtime=told.runtime("off"), batch_size=8), plain)
    assert len(seen) == 1


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_a_compiler_that_fails_or_is_wrong_changes_nothing(
    fault: str, model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: nn.Module, x: Tensor) -> Tensor:
        if fault == "fails":
            raise RuntimeError("no compiler here\nand much more")
        return module(x) * (1 + 1e-3)  # type: ignore[no-any-return]

    compiles_to(monkeypatch, broken)
    found = store_features(model, pixels, runtime=told.runtime("on"), batch_size=8)
    reasons = {"fails": "compiling failed (RuntimeError: no compiler here)", "is wrong": "their output is 0.001 apart"}
    assert len(told) == 2
    assert told[1].startswith("The frozen layers run as they are: ")
    assert reasons[fault] in told[1]
    assert kept(pixels) == 1
    assert torch.equal(found, store_features(model, pixels, runtime=told.runtime("off"), batch_size=8))
    assert kept(pixels) == 1


def test_a_function_that_fails_on_the_way_is_not_kept(
    model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def tires(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > 2:
            raise RuntimeError("out of luck")
        return module(x)  # type: ignore[no-any-return]

    compiles_to(monkeypatch, tires)
    found = store_features(model, pixels, runtime=told.runtime("on"), batch_size=8)
    assert len(calls) == 3
    assert kept(pixels) == 0
    torch.testing.assert_close(found, store_features(model, pixels, runtime=told.runtime("off"), batch_size=8))


def test_auto_compiles_where_it_pays_and_is_quicker(
    model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[float, Tensor] = {}

    def knows(module: nn.Module, x: Tensor) -> Tensor:  # a batch that is timed again costs nothing
        key = float(x.double().sum())
        known[key] = known[key] if key in known else module(x)
        return known[key]

    seen = compiles_to(monkeypatch, knows)
    plain = store_features(model, pixels, runtime=told.runtime("auto"), batch_size=8)
    assert (seen, told) == ([], [])  # four batches: not even timed

    monkeypatch.setattr("headstart.once._TIMED_FROM", 1)
    monkeypatch.setattr("headstart.frozenpass.COMPILE_SECONDS", 0.0)
    monkeypatch.setitem(SAVED, ("cpu", torch.float32), 0.25)
    assert torch.equal(store_features(model, pixels, runtime=told.runtime("auto"), batch_size=8), plain)
    assert (seen, told) == ([], [])  # rows that are kept are taken before anything is timed
    fewer = Pixels(pixels.table.select(range(20)), model.spec, store=pixels.store)
    quick = store_features(model, fewer, runtime=told.runtime("auto"), batch_size=8)
    assert len(seen) == 1
    assert len(told) == 1
    assert told[0].startswith("The frozen layers are compiled: that saves about 25 % of")
    torch.testing.assert_close(quick, plain[:20])


@pytest.mark.parametrize(
    ("backbone", "saves"),
    [(NET, True), ("mobilenetv2_035", False), ("convnext_atto", False), ("vit_tiny_patch16_224", False)],
)
def test_on_a_cpu_a_compile_saves_where_matrix_units_do_whole_convolutions(
    backbone: str, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = timm.create_model(backbone)
    found = {
        (units, dtype): share_saved(net, torch.device("cpu"), dtype)
        for units in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
        if not monkeypatch.setattr("torch.cpu.get_capabilities", lambda units=units: {"amx_bf16": units})
    }
    assert [key for key, share in found.items() if share] == [(True, torch.bfloat16)] * saves


def test_where_another_process_cannot_save_time_none_waits_for_it(
    model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("headstart.once._TIMED_FROM", 1)
    monkeypatch.setattr("headstart.frozenpass.COMPILE_SECONDS", 0.0)
    monkeypatch.setitem(SAVED, ("cpu", torch.float32), 0.25)
    seen = compiles_to(monkeypatch, lambda module, x: module(x))
    monkeypatch.setattr(Runtime, "agrees", lambda runtime, flag: asked.append(flag) or False)
    store_features(model, pixels, runtime=told.runtime("auto"), batch_size=8)
    assert True in asked, "it would compile, alone"
    assert seen == []
    assert "not known to save time" in told[0]


def test_auto_keeps_to_the_plain_function_where_that_is_quicker(
    model: Classifier, pixels: Pixels, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.once._TIMED_FROM", 1)
    monkeypatch.setattr("headstart.frozenpass.COMPILE_SECONDS", 0.0)
    monkeypatch.setitem(SAVED, ("cpu", torch.float32), 0.25)
    compiles_to(monkeypatch, lambda module, x: torch.stack([module(x) for _ in range(20)])[0])
    found = store_features(model, pixels, runtime=told.runtime("auto"), batch_size=8)
    assert len(told) == 2
    assert "compiled, a batch takes" in told[1]
    assert torch.equal(found, store_features(model, pixels, runtime=told.runtime("off"), batch_size=8))
    assert kept(pixels) == 1
