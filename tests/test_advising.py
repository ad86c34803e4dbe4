"""Advice: what is measured, what the figures decide, and that `fit --auto` does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_photos
from headstart import Recipe, RecipeError, advise, create_classifier, fine_tune, load_images, load_recipe, split
from headstart.advising import LARGE_FROM, Facts, _half_side, decide
from headstart.cli import main
from headstart.pixels import Pixels
from headstart.probing import FINAL, blocks_to_probe, pooled_features, probe
from headstart.recipe import FINE_TUNE_STAGE, HEAD_STAGE, HeadSpec
from headstart.runtime import make_runtime
from headstart.tuned import tuned_on

NET: dict[str, Any] = {"backbone": "test_resnet", "spec_overrides": {"image_size": 32}}
MACHINE: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1}
ARGUMENTS = ["--backbone", "test_resnet", "--image-size", "32", "--device", "cpu", "--precision", "fp32", "--workers",
             "1", "--quiet"]  # fmt: skip
FACTS = Facts(
    classes=5, train=2000, val=300, per_class=400, side_px=192, input_px=224, sampled=300, frozen=0.9, chance=0.4,
    blocks={"layer2": (0.8, 0.001), "layer3": (0.91, 0.6)}, mirrored=(0.89, 0.5),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 16)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose backbone has weights of its own."""
    run = fine_tune(
        folder, recipe=load_recipe("head"), weights="none", out=tmp_path_factory.mktemp("base") / "run", **NET,
        **MACHINE,
    ).run_path  # fmt: skip
    assert run is not None
    return run


# ---- the figures -----------------------------------------------------------------------------------------------


def test_a_probe_is_right_where_classes_lie_apart_and_guesses_where_nothing_tells_them() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    noise = torch.tensor(rng.normal(size=(90, 12)), dtype=torch.float32)
    told = noise + 6 * torch.nn.functional.one_hot(torch.tensor(labels), 12)
    assert probe(told, labels).accuracy == 1.0
    assert probe(noise, labels).accuracy < 0.6


def test_copies_are_never_held_out_against_each_other() -> None:
    rng = np.random.default_rng(0)
    single = torch.tensor(rng.normal(size=(30, 40)), dtype=torch.float32)
    features, labels = torch.cat([single] * 4), np.tile(np.arange(30) % 2, 4)
    groups = [f"g{i}" for i in range(30)] * 4
    assert probe(features, labels).accuracy > 0.9  # copies give each picture away
    assert probe(features, labels, groups).accuracy < 0.75


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_few_pictures_of_each_class_are_judged_in_fewer_folds(per_class: int) -> None:
    labels = np.repeat(np.arange(6), per_class)
    told = 6.0 * torch.nn.functional.one_hot(torch.tensor(labels), 6).float() + 0.1 * torch.rand(len(labels), 6)
    assert probe(told, labels).accuracy == (0.0 if per_class == 1 else 1.0)


def test_mirror_images_are_judged_by_classifiers_of_plain_ones() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 40)
    side = torch.tensor(2.0 * labels - 1, dtype=torch.float32)[:, None]
    features = 4 * side + torch.tensor(rng.normal(size=(80, 5)), dtype=torch.float32)
    found = probe(features, labels, mirrored=-features)  # left and right are what tells the classes apart
    assert found.mirrored is not None
    assert (found.accuracy, found.mirrored.mean()) == (1.0, 0.0)


def test_features_of_a_block_are_those_of_a_backbone_that_ends_there(folder: Path) -> None:
    table = load_images(folder)
    how: dict[str, Any] = {"weights": "none", "image_size": 32, "seed": 0}
    model = create_classifier("test_resnet", table.class_names, **how)
    blocks = blocks_to_probe(model)
    assert blocks
    pixels, runtime = Pixels(table, model.spec), make_runtime(**MACHINE)
    found = pooled_features(model, pixels, blocks=blocks, runtime=runtime)
    assert set(found) == {*blocks, FINAL}
    assert found[FINAL].shape == (len(table), model.num_features)
    for block in blocks:
        short = create_classifier("test_resnet", table.class_names, head=HeadSpec(features_from=block), **how)
        short.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
        torch.testing.assert_close(pooled_features(short, pixels, runtime=runtime)[FINAL], found[block])
    turned = pooled_features(model, pixels, mirrored=True, runtime=runtime)[FINAL]
    assert not torch.allclose(turned, found[FINAL])
    assert not any(module._forward_hooks for module in model.modules())
    small = pooled_features(model, pixels, side=16, runtime=runtime)[FINAL]
    batch = pixels.batch(list(range(len(pixels))), [0] * len(pixels)).float()
    with torch.inference_mode():
        expected = model.eval().features(torch.nn.functional.avg_pool2d(batch, 2))
    torch.testing.assert_close(small, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backbone", "side"), [("test_resnet", 32), ("vit_tiny_patch16_224", None)])
def test_random_weights_see_half_the_side_where_the_backbone_takes_it(backbone: str, side: int | None) -> None:
    model = create_classifier(backbone, ["a", "b"], weights="none", image_size=64)
    assert _half_side(model) == side
    assert model.training


# ---- from figures to a recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [LARGE_FROM - 1, LARGE_FROM])
def test_similar_pictures_take_the_default_stages(per_class: int) -> None:
    recipe, reasons = decide(replace(FACTS, per_class=per_class))
    assert recipe.stages == (HEAD_STAGE, FINE_TUNE_STAGE)
    assert recipe.head == HeadSpec()
    assert reasons[0].startswith("Small" if per_class < LARGE_FROM else "Large")
    assert reasons[1].startswith("Similar")


def test_different_pictures_train_every_layer_faster_and_longer() -> None:
    facts = replace(FACTS, frozen=0.6, chance=0.4)
    recipe, reasons = decide(facts)
    assert reasons[1].startswith("Different")
    assert (recipe.stages[-1].freeze_line, recipe.stages[-1].epochs, recipe.stages[-1].lr_scale) == ("all", 10, 0.02)
    assert decide(replace(facts, train=1_000_000))[0].stages[-1].epochs == 2  # a long set is seen less often


def test_an_earlier_block_is_taken_where_few_different_pictures_show_it_better() -> None:
    facts = replace(FACTS, frozen=0.6, per_class=40, blocks={"layer2": (0.75, 0.01), "layer3": (0.8, 0.2)})
    assert decide(facts)[0].head.features_from == "layer2"
    assert decide(replace(facts, per_class=4000))[0].head.features_from is None
    assert decide(replace(facts, frozen=0.72, chance=0.1))[0].head.features_from is None  # similar


def test_few_validation_pictures_choose_nothing() -> None:
    recipe, reasons = decide(replace(FACTS, val=12))
    assert [stage.name for stage in recipe.stages] == ["head"]
    assert any("12 validation pictures" in reason for reason in reasons)


def test_what_the_mirror_harms_is_not_mirrored() -> None:
    recipe, reasons = decide(replace(FACTS, mirrored=(0.6, 1e-6)))
    assert recipe.augment_spec.hflip == 0
    assert recipe.augment_spec.rotation > 0
    assert "left and right mean something" in reasons[-1]
    assert decide(replace(FACTS, mirrored=(0.86, 0.05)))[0].augment == "photo"


def test_small_pictures_are_told() -> None:
    assert any("shorter side of 48 px" in reason for reason in decide(replace(FACTS, side_px=48))[1])
    assert not any("shorter side" in reason for reason in decide(FACTS)[1])


# ---- the verb and the command ----------------------------------------------------------------------------------


def test_advice_never_opens_a_test_picture(folder: Path, trained: Path) -> None:
    splits = split(load_images(folder))
    splits = replace(
        splits, test=replace(splits.test, paths=tuple(p.with_name("gone-" + p.name) for p in splits.test.paths))
    )
    advice = advise(splits, weights=trained, cache=False, **NET, **MACHINE)
    assert advice.facts.train == len(splits.train)
    assert 0 <= advice.facts.chance <= 1
    assert advice.case.split(", ")[0] == "small"
    with pytest.raises(RecipeError, match="scratch"):
        advise(splits, weights="none", **NET, **MACHINE)


def test_the_command_writes_a_recipe_that_fit_takes(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "advice.json"
    assert main(["advise", str(folder), "--weights", str(trained), "--out", str(out), "--val", "0.2", *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("This is the case: small, ")
    assert printed.rstrip().endswith(f"--recipe {out} --val 0.2")
    assert load_recipe(out).name == "advised"
    assert tuned_on(out)["weights"] == str(trained)
    assert main(["advise", str(folder), "--weights", str(trained), "--out", str(out), "--json", *ARGUMENTS]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["facts"]["classes"] == 3
    mine = tmp_path / "mine.csv"
    mine.write_text("path,label\n")
    for target, words in ((mine, "is there and is no recipe; it is not replaced"), (tmp_path, "it is a folder")):
        assert main(["advise", str(folder), "--weights", str(trained), "--out", str(target), *ARGUMENTS]) == 2
        assert words in capsys.readouterr().err
    assert mine.read_text() == "path,label\n"


def test_fit_auto_follows_the_advice_and_keeps_it(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = [str(folder), "--weights", str(trained), "--auto", "--lr", "0.02", "--out", str(run), *ARGUMENTS]
    assert main(["fit", *arguments]) == 0
    kept = json.loads((run / "advice.json").read_text())
    recipe = load_recipe(run / "recipe.json")
    assert recipe == replace(Recipe.from_dict(kept["recipe"]), lr=0.02)
    for beside in (["--recipe", "head"], ["--from-run", str(trained)]):
        assert main(["fit", str(folder), "--auto", *beside]) == 2
    assert "Leave one of them out" in capsys.readouterr().err
