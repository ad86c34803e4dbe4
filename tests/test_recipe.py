"""Recipes are closed values: what they hold reads back equal, what they do not know is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart import AugmentSpec, HeadSpec, HiddenLayer, Recipe, RecipeError, Stage, load_recipe
from headstart.recipe import POLICIES, RECIPES
from headstart.tuned import tuned_on


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_json(name: str, tmp_path: Path) -> None:
    head = HeadSpec(pool="avg", hidden=(HiddenLayer(8, "gelu", "before", 0.1), HiddenLayer(4, "none")), dropout=0.2)
    stages = tuple(replace(s, class_weights=(1.0, 2.0)) for s in RECIPES[name].stages)
    recipe = replace(RECIPES[name], head=head, augment=AugmentSpec(rotation=5, crop_scale=(0.5, 0.9)), stages=stages)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(path) == recipe
    assert load_recipe(name) == RECIPES[name]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stagez": []}, r"unknown key 'stagez'.*Did you mean: stages"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [{}, {}]}, "stage names repeat"),
        ({"stages": 5}, "takes a list of stages"),
        ({"stages": [{"epoch": 5}]}, r"stages\[0\]: unknown key 'epoch'.*epochs"),
        ({"stages": [{"epochs": 0}]}, "epochs is 0; it takes a whole number from 1"),
        ({"stages": [{"epochs": 2.5}]}, "epochs is 2.5"),
        ({"stages": [{"epochs": True}]}, "epochs is True"),
        ({"stages": [{"lr_scale": 0}]}, "lr_scale is 0; it takes a number above 0"),
        ({"stages": [{"lr_scale": "fast"}]}, "lr_scale is 'fast'"),
        ({"stages": [{"optimizer": "adamx"}]}, "optimizer is 'adamx'.*Did you mean: adam"),
        ({"stages": [{"class_weights": 5}]}, "class_weights is 5"),
        ({"stages": [{"class_weights": None}]}, "class_weights is None"),
        ({"stages": [{"class_weights": [0, 1]}]}, "class_weights is 0; it takes a number above 0"),
        ({"stages": [{"ema": 1}]}, "ema is 1; it takes a number from 0 to 0.99999"),
        ({"stages": [{"wise": "on"}]}, "wise is 'on'; it takes true or false"),
        ({"head": {"hidden": None}}, "hidden is None; it takes a list"),
        ({"head": {"hidden": [{"width": 0}]}}, "width is 0"),
        ({"head": {"features_from": ""}}, "features_from is ''"),
        ({"head": {"pool": "mean"}}, "pool is 'mean'"),
        ({"augment": "foto"}, "augment is 'foto'.*photo"),
        ({"augment": ["photo"]}, r"augment is \('photo',\)"),
        ({"augment": None}, "augment is None"),
        ({"augment": True}, "augment is True"),
        ({"augment": {"rotation": 200}}, "rotation is 200; it takes a number from 0 to 180"),
        ({"augment": {"auto": "rand"}}, "auto is 'rand'; allowed: none, randaugment, trivial"),
        ({"augment": {"auto_magnitude": 31}}, "auto_magnitude is 31; it takes a whole number from 0 to 30"),
        ({"augment": {"crop_scale": [0.9, 0.5]}}, "the first must not exceed the second"),
        ({"name": 5}, "name is 5"),
        ({"lr": float("nan")}, "lr is nan"),
        ([], "expected an object with named values"),
    ],
)
def test_what_a_recipe_does_not_take_is_named(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stage(lr=-1), "Stage: unknown key 'lr'.*lr_scale"),  # type: ignore[call-arg]
        (lambda: replace(Recipe(), stage=()), r"Recipe: unknown key 'stage'.*Did you mean: stages"),
        (lambda: HeadSpec(hidden=(64,)), r"hidden\[0\] is 64; it takes HiddenLayers"),  # type: ignore[arg-type]
        (lambda: HeadSpec(hidden=64), "hidden is 64; it takes HiddenLayers"),  # type: ignore[arg-type]
        (lambda: Recipe(head="linear"), "head is 'linear'; it takes a HeadSpec"),  # type: ignore[arg-type]
        (lambda: Recipe(stages=Stage()), "stages is Stage.*it takes a tuple"),  # type: ignore[arg-type]
        (lambda: Stage(class_weights={0: 1.0}), r"class_weights is \{0: 1.0\}.*in the order of the class names"),  # type: ignore[arg-type]
        (lambda: Stage(class_weights=np.ones((2, 2))), r"class_weights is \[1.0, 1.0\]; it takes a number"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_built_is_told_at_once(build: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build()


def test_lists_and_arrays_are_taken_as_tuples() -> None:
    for weights in ([1, 2], np.array([1, 2]), torch.tensor([1, 2]), [np.float32(1), np.float32(2)]):
        stage = Stage(class_weights=weights)  # type: ignore[arg-type]
        assert stage == Stage(class_weights=(1, 2))
        assert Recipe(stages=[stage]) == Recipe.from_dict(Recipe(stages=(stage,)).to_dict())  # type: ignore[arg-type]
    assert hash(HeadSpec(hidden=[HiddenLayer(8)])) == hash(HeadSpec(hidden=(HiddenLayer(8),)))  # type: ignore[arg-type]


def test_a_recipe_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither a known recipe .* nor a file.*Did you mean: fine-tune"):
        load_recipe("finetune")
    bad = tmp_path / "bad.json"
    deep, long = "[" * 100_000 + "]" * 100_000, "1" * 5000
    for text, words in (
        ("{", "not a JSON file"),
        (deep, "nested too deeply"),
        (f'{{"lr": {long}}}', "not a JSON file"),
    ):
        bad.write_text(text)
        for read in (load_recipe, tuned_on):
            with pytest.raises(RecipeError, match=words):
                read(bad)
    bad.write_text(json.dumps({"lr": 10**400}))
    with pytest.raises(RecipeError, match="lr has 401 digits; it takes a smaller number"):
        load_recipe(bad)
    bad.write_text(json.dumps(RECIPES["head"].to_dict()), encoding="utf-8-sig")  # as editors on Windows write it
    assert load_recipe(bad) == RECIPES["head"]


def test_fine_tuning_is_a_hundred_times_slower_than_the_head_and_none_changes_nothing() -> None:
    head, tune = RECIPES["fine-tune"].stages
    assert head.lr_scale / tune.lr_scale == pytest.approx(100)
    assert [name for name, policy in POLICIES.items() if policy.is_identity] == ["none"]
    assert Stage() == RECIPES["head"].stages[0]


def test_the_stages_of_quick_share_their_views_and_no_picture_is_seen_twice() -> None:
    head, tune = RECIPES["quick"].stages
    assert head.views == tune.views == tune.epochs
    assert (head.lr_scale, tune.lr_scale) == (1.0, 0.02)
