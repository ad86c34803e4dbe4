"""What is frozen runs once: counted, and equal to what running it again would give."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headstart import (
    Recipe,
    Stage,
    create_classifier,
    fine_tune,
    load_images,
    make_runtime,
    set_freeze_line,
    split,
    train,
)
from headstart import fit as fit_stage
from headstart.contract import fixed_tensors, tensors_digest
from headstart.errors import DataError
from headstart.evaluation import predict_logits, source_logits
from headstart.features import (
    ActivationSource,
    FeatureSource,
    PixelSource,
    make_source,
    place_source,
)
from headstart.once import fast_kernels, store_activations, store_features
from headstart.pixels import Pixels
from headstart.recipe import POLICIES
from test_cut import LINES
from tiny import SPEC, TinyNet

CPU = make_runtime(device="cpu", precision="fp32", workers=2)


@pytest.mark.parametrize(("augment", "views", "k"), [("photo", 3, 3), ("photo", 2, 2), ("none", 3, 1)])
@pytest.mark.parametrize("epochs", [2, 9])
def test_the_backbone_runs_once_per_picture_and_view_whatever_the_epochs(
    photos: Path, augment: str, views: int, k: int, epochs: int
) -> None:
    stage = Stage(epochs=epochs, views=views)
    result = fine_tune(
        photos, backbone=TinyNet(), data_spec=SPEC, recipe=Recipe(stages=(stage,), augment=augment), precision="fp32"
    )
    splits = result.splits
    assert len(splits.train) == 24
    assert result.model.backbone.pictures == len(splits.train) * k + len(splits.val) + len(splits.test)


def test_with_the_line_further_forward_the_pixels_are_the_source(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    pixels = Pixels(splits.train, SPEC, augment=POLICIES["photo"]), Pixels(splits.val, SPEC)
    for where, kind in (("head", FeatureSource), ("block", PixelSource), ("all", PixelSource)):
        set_freeze_line(model, where)
        data = make_source(*pixels, model, views=2, runtime=CPU)
        assert isinstance(data.train, kind)
        assert isinstance(data.val, kind)


def test_stored_features_equal_recomputed_ones(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier(TinyNet(dropout=0.5), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, "head")
    model.train()
    pixels = Pixels(splits.train, SPEC, augment=POLICIES["photo"], seed=4)
    stored = store_features(model, pixels, views=3, runtime=CPU, batch_size=7)
    assert stored.shape == (24, 3, model.num_features)
    assert model.training
    again = Pixels(splits.train, SPEC, augment=POLICIES["photo"], seed=4)
    for picture, view in ((0, 0), (5, 1), (23, 2)):
        with torch.no_grad():
            fresh = model.eval().features(again.batch([picture], [view]))[0]
        assert torch.allclose(stored[picture, view], fresh, rtol=1e-5, atol=1e-6)
    assert not torch.equal(stored[:, 1], stored[:, 2])
    other_seed = Pixels(splits.train, SPEC, augment=POLICIES["photo"], seed=5)
    redrawn = store_features(model, other_seed, views=2, runtime=CPU)
    assert torch.equal(redrawn[:, 0], stored[:, 0])  # the plain view knows no seed
    assert not torch.equal(redrawn[:, 1], stored[:, 1])


def test_the_frozen_pass_computes_in_bfloat16_and_validation_in_float32(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, "head")
    train, val = Pixels(splits.train, SPEC), Pixels(splits.val, SPEC)
    exact = make_source(train, val, model, views=1, runtime=CPU)
    half = make_source(train, val, model, views=1, runtime=replace(CPU, dtype=torch.bfloat16))
    assert isinstance(exact.train, FeatureSource)
    assert isinstance(half.train, FeatureSource)
    assert half.train.features.dtype == torch.float32
    apart = (half.train.features - exact.train.features).norm() / exact.train.features.norm()
    assert 1e-4 < float(apart) < 5e-2
    assert isinstance(exact.val, FeatureSource)
    assert isinstance(half.val, FeatureSource)
    assert torch.equal(half.val.features, exact.val.features)


def test_pixels_are_the_same_with_and_without_a_cache(photos: Path) -> None:
    table = load_images(photos)
    kept = Pixels(table, SPEC, augment=POLICIES["photo"], seed=1)
    fresh = Pixels(table, SPEC, augment=POLICIES["photo"], seed=1, cache_bytes=0)
    jobs = [3, 3, 20, 7], [0, 2, 1, 0]
    first = kept.batch(*jobs)
    assert first.shape == (4, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, kept.batch(*jobs))
    assert torch.equal(first, fresh.batch(*jobs))
    assert torch.equal(first[0], kept.batch([3], [0])[0])


def test_the_backbone_of_a_classifier_runs_by_the_fast_kernels(photos: Path) -> None:
    model = create_classifier("mobilenetv3_small_050", ["a", "b"], weights="none")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    with fast_kernels(model, CPU):
        assert sum(type(m).__name__ == "_FusedNormAct" for m in model.backbone.modules()) == norms
    set_freeze_line(model, "blocks.3")
    train = Pixels(split(load_images(photos)).train, model.spec)
    place = place_source(train, train, model, views=1, runtime=CPU)
    assert place.cut is not None
    for half in (place.cut.prefix, place.cut.suffix.train_graph):
        with fast_kernels(half, CPU):
            fused = [type(m).__name__ == "_FusedNormAct" for m in half.modules() if isinstance(m, nn.BatchNorm2d)]
            assert fused
            assert all(fused)


def test_pictures_are_made_ready_in_other_threads_while_the_backbone_computes(photos: Path) -> None:
    model = create_classifier(TinyNet(), ["red", "green", "blue"], data_spec=SPEC)
    set_freeze_line(model, "head")
    threads: list[str] = []

    class Watched(Pixels):
        def batch(self, *jobs: Any) -> Tensor:
            threads.append(threading.current_thread().name)
            return super().batch(*jobs)

    def own(picture: Tensor) -> Tensor:
        return picture

    table = load_images(photos)
    for augment, in_background in ((POLICIES["photo"], True), (own, False)):
        threads.clear()
        pixels = Watched(table, SPEC, augment=augment)
        advanced: list[int] = []
        store_features(model, pixels, views=2, runtime=CPU, batch_size=16, advance=advanced.append)
        assert [name.startswith("headstart-batch") for name in threads] == [in_background] * 6
        assert advanced == [16, 16, 4] * 2  # view after view


# ---------------------------------------------------------------- a line in the middle


class CutNet(nn.Module):
    """A small network that can be recorded, with a frozen dropout and BatchNorm on both sides of its lines."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.last = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            for norm in (self.norm, self.block[1]):
                nn.init.uniform_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.block(x)
        return self.dropout(self.last(x)).mean((2, 3))


def count_pictures(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: None if args[0].is_meta else seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("augment", "k"), [("photo", 3), ("none", 1)])
@pytest.mark.parametrize("epochs", [2, 7])
def test_the_frozen_part_runs_once_per_picture_and_view(photos: Path, augment: str, k: int, epochs: int) -> None:
    net = CutNet()
    splits = split(load_images(photos))
    model = create_classifier(net, splits.class_names, data_spec=SPEC)
    stage = Stage(freeze_line="block", epochs=epochs, views=3)
    set_freeze_line(model, "block")
    stem, block = count_pictures(net.stem), count_pictures(net.block[0])
    fit_stage(model, splits, stage, augment=augment, runtime=CPU)
    # A small run looks at the shapes of what could be stored, and three try whether the module does the same each time,
    # recorded whole and in two halves.
    deciding = 2 + 2 * 3 * 2
    assert sum(stem) - deciding == len(splits.train) * k + len(splits.val)
    assert sum(block) > epochs * len(splits.train)


@pytest.mark.parametrize("where", ["norm", "block", "block.1", "last"])
def test_stored_activations_are_the_recomputed_ones(photos: Path, where: str) -> None:
    splits = split(load_images(photos))
    model = create_classifier(CutNet(), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, where)
    train = Pixels(splits.train, SPEC, augment=POLICIES["photo"], seed=4)
    val = Pixels(splits.val, SPEC)
    data = make_source(train, val, model, views=3, runtime=CPU, batch_size=8)
    assert isinstance(data.train, ActivationSource)
    again = store_activations(model, data.train.cut, train, views=3, runtime=CPU, batch_size=8)
    assert torch.equal(again.rows, data.train.stored.rows)
    for picture, view in ((0, 0), (5, 1), (23, 2)):
        with torch.no_grad():
            x = model.eval().enter(train.batch([picture], [view]))
            fresh = data.train.cut.prefix(x)
        stored = data.train.batch([picture], [view])
        assert torch.allclose(stored, fresh, rtol=1e-5, atol=1e-6)
        assert stored.is_contiguous(memory_format=torch.channels_last)
    with data.val.kernels(model, CPU):
        logits = source_logits(model, data.val, indices=torch.arange(len(val)), runtime=CPU)
    torch.testing.assert_close(logits, predict_logits(model, val, runtime=CPU), rtol=1e-5, atol=1e-6)


def test_scoring_that_fails_leaves_the_model_in_training_mode(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_images(photos)
    model = create_classifier(CutNet(), table.class_names, data_spec=SPEC).train()
    pixels = Pixels(table, SPEC)
    modes = [m.training for m in model.modules()]
    monkeypatch.setattr(Pixels, "batch", mock.Mock(side_effect=DataError("gone")))
    for scored in (
        lambda: predict_logits(model, pixels, runtime=CPU),
        lambda: source_logits(model, PixelSource(pixels), indices=torch.arange(4), runtime=CPU),
    ):
        with pytest.raises(DataError, match="gone"):
            scored()
        assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("where", ["norm", "block", "block.1", "last"])
def test_a_fit_from_the_store_is_the_fit_from_pixels(photos: Path, where: str) -> None:
    splits = split(load_images(photos))
    stage = Stage(name="x", freeze_line=where, epochs=3, batch_size=8, optimizer="sgd")
    results = []
    for budget in (None, 0):
        model = create_classifier(CutNet(), splits.class_names, data_spec=SPEC)
        set_freeze_line(model, where)
        frozen = tensors_digest(fixed_tensors(model))
        pixels = Pixels(splits.train, SPEC), Pixels(splits.val, SPEC)
        place = place_source(*pixels, model, views=2, runtime=CPU, budget_bytes=budget)
        data = make_source(*pixels, model, views=2, runtime=CPU, placement=place)
        assert isinstance(data.train, PixelSource if budget == 0 else ActivationSource)
        train.fit(model, data, stage, lr=0.05, runtime=CPU)
        assert tensors_digest(fixed_tensors(model)) == frozen
        results.append(predict_logits(model, pixels[1], runtime=CPU))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    fresh = create_classifier(CutNet(), splits.class_names, data_spec=SPEC)
    assert not torch.allclose(results[0], predict_logits(fresh, pixels[1], runtime=CPU), atol=1e-3)


def test_dropout_behind_the_line_acts_in_training_alone(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier(CutNet(dropout=0.5), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, "last")
    data = make_source(Pixels(splits.train, SPEC), Pixels(splits.val, SPEC), model, views=1, runtime=CPU)
    x = data.train.batch([0, 1], [0, 0])
    model.train()
    assert not torch.equal(data.train.forward(model, x), data.train.forward(model, x))
    model.eval()
    assert torch.equal(data.train.forward(model, x), data.train.forward(model, x))


def test_processes_decide_alike_and_together_keep_what_one_may(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = split(load_images(photos))
    model = create_classifier(CutNet(), splits.class_names, data_spec=SPEC)
    pixels = Pixels(splits.train, SPEC, augment=POLICIES["photo"]), Pixels(splits.val, SPEC)
    set_freeze_line(model, "block")
    needed = place_source(*pixels, model, views=2, runtime=CPU).nbytes
    other = [0]  # what the other process may take
    monkeypatch.setattr("headstart.runtime.Runtime.least", lambda self, mine: min(mine, other[0]))
    for mine, others, fits in (
        (2 * needed, 2 * needed, True),
        (2 * needed - 1, 9 * needed, False),
        (9 * needed, needed, False),
    ):
        other[0] = others
        place = place_source(*pixels, model, views=2, runtime=replace(CPU, world=2), budget_bytes=mine)
        assert bool(place.views) is fits


def test_the_decision_is_said_in_one_line_with_its_size(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier(CutNet(), splits.class_names, data_spec=SPEC)
    pixels = Pixels(splits.train, SPEC, augment=POLICIES["photo"]), Pixels(splits.val, SPEC)
    assert (len(pixels[0]), len(pixels[1])) == (24, 6)
    set_freeze_line(model, "block")
    place = place_source(*pixels, model, views=2, runtime=CPU)
    assert place.nbytes == (24 * 2 + 6) * 8 * 8 * 8 * 4
    assert place.passes == 24 * 2 + 6
    assert place.why == (
        "Frozen layers up to relu run once (24 pictures x 2 views, 6 for validation), stored in 0.1 MB."
    )
    place = place_source(*pixels, model, views=2, runtime=CPU, budget_bytes=place.nbytes - 1)
    assert not place.views
    assert "exceed the 0.1 MB allowed" in place.why
    set_freeze_line(model, "all")
    assert not place_source(*pixels, model, views=2, runtime=CPU).why
    unrecorded = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    set_freeze_line(unrecorded, "block")
    assert "TinyNet cannot be traced" in place_source(*pixels, unrecorded, views=2, runtime=CPU).why


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_every_family_trains_from_what_is_stored(name: str, photos: Path) -> None:
    middle, size = LINES[name][1][1], 64
    splits = split(load_images(photos))
    model = create_classifier(name, splits.class_names, weights="none", image_size=size)
    set_freeze_line(model, middle)
    frozen = tensors_digest(fixed_tensors(model))
    small = splits.train.select(np.arange(8))
    pixels = Pixels(small, model.spec), Pixels(splits.val, model.spec)
    data = make_source(*pixels, model, views=1, runtime=CPU)
    assert isinstance(data.train, ActivationSource), place_source(*pixels, model, views=1, runtime=CPU).why
    with data.val.kernels(model, CPU):
        logits = source_logits(model, data.val, indices=torch.arange(len(splits.val)), runtime=CPU)
    torch.testing.assert_close(logits, predict_logits(model, pixels[1], runtime=CPU), rtol=1e-4, atol=1e-5)
    model.train()
    gradients = []
    for source in (data.train, PixelSource(pixels[0])):
        torch.manual_seed(0)  # swin drops paths behind the line
        with source.kernels(model, CPU):
            source.forward(model, source.batch(range(8), [0] * 8)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    from_store, from_pixels = gradients
    assert from_store.keys() == from_pixels.keys()
    for n, grad in from_pixels.items():
        torch.testing.assert_close(from_store[n], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-7, msg=n)
    assert tensors_digest(fixed_tensors(model)) == frozen
