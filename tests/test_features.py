"""What is frozen runs once: counted, and equal to what running it again would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headstart import (
    Recipe,
    Stage,
    create_classifier,
    fine_tune,
    load_images,
    make_runtime,
    set_freeze_line,
    split,
)
from headstart.features import FeatureSource, PixelSource, make_source, store_features
from headstart.pixels import Pixels
from headstart.recipe import POLICIES
from tiny import SPEC, TinyNet

CPU = make_runtime(device="cpu", precision="fp32", workers=2)


@pytest.mark.parametrize(("augment", "views", "k"), [("photo", 3, 3), ("photo", 2, 2), ("none", 3, 1)])
@pytest.mark.parametrize("epochs", [2, 9])
def test_the_backbone_runs_once_per_picture_and_view_whatever_the_epochs(
    photos: Path, augment: str, views: int, k: int, epochs: int
) -> None:
    net = TinyNet()
    stage = Stage(epochs=epochs, views=views)
    result = fine_tune(
        photos, backbone=net, data_spec=SPEC, recipe=Recipe(stages=(stage,), augment=augment), precision="fp32"
    )
    splits = result.splits
    assert len(splits.train) == 24
    assert net.pictures == len(splits.train) * k + len(splits.val) + len(splits.test)


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
