"""What the options that were given change in a recipe, a head, an augmentation or a preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cli_options import RECIPE_OPTIONS, STAGE_OPTIONS, read_number, read_whole, read_word
from .errors import RecipeError, near_matches
from .fields import read_json_file
from .recipe import POLICIES, AugmentSpec, HeadSpec, HiddenLayer, Recipe, Stage


def apply_overrides(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with every given option put in its place.

    Args:
        options: option names with underscores -> their text; None or absent leaves what the recipe says.
    Raises:
        RecipeError: a value that cannot be read or is out of range, or a list whose length is not that of the stages.
    """
    changes: dict[str, Any] = {
        option.name: option.read(option.flag, options[option.name])
        for option in RECIPE_OPTIONS
        if options.get(option.name) is not None
    }
    if options.get("augment") is not None:
        changes["augment"] = read_augment(options["augment"])
    if options.get("erasing") is not None:
        policy = replace(recipe, augment=changes.get("augment", recipe.augment)).augment_spec
        changes["augment"] = replace(policy, erasing=read_number("--erasing", options["erasing"]))
    return replace(recipe, **changes, head=override_head(recipe.head, options), stages=_stages(recipe, options))


def _stages(recipe: Recipe, options: Mapping[str, Any]) -> tuple[Stage, ...]:
    changes: list[dict[str, Any]] = [{} for _ in recipe.stages]
    for option in STAGE_OPTIONS:
        text = options.get(option.name)
        if text is None:
            continue
        for change, part in zip(changes, _per_stage(option.flag, text, recipe), strict=True):
            if part:
                change[option.name] = option.read(option.flag, part)
    return tuple(replace(stage, **change) for stage, change in zip(recipe.stages, changes, strict=True))


def _per_stage(flag: str, text: str, recipe: Recipe) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    names = [stage.name for stage in recipe.stages]
    if len(parts) == 1:
        if not parts[0]:
            raise RecipeError(f"{flag} is empty. Give a value, or leave the option out to keep what the recipe says.")
        return parts * len(names)
    if len(parts) != len(names):
        raise RecipeError(
            f"{flag} is {text!r}: {len(parts)} values, but recipe {recipe.name!r} has {len(names)} "
            f"stage{'s' * (len(names) > 1)} ({', '.join(names)}). Give one value for all, or one per stage."
        )
    return parts


def override_head(head: HeadSpec, options: Mapping[str, Any]) -> HeadSpec:
    """The head with every given option put in its place; see `apply_overrides`."""
    changes: dict[str, Any] = {
        name: options[name] for name in ("pool", "output", "features_from") if options.get(name) is not None
    }
    if options.get("hidden") is not None:
        changes["hidden"] = read_hidden(options["hidden"])
    if options.get("head_batchnorm") is not None:
        changes["batchnorm"] = options["head_batchnorm"]
    if options.get("head_dropout") is not None:
        changes["dropout"] = read_number("--head-dropout", options["head_dropout"])
    return replace(head, **changes)


def read_hidden(text: str) -> tuple[HiddenLayer, ...]:
    """`512:none:bn-after:0.2,64:gelu` as hidden layers; `none` is no hidden layer.

    The parts behind the width may be left out, and are told apart by what they are.
    """
    return () if text == "none" else tuple(_hidden_layer(part) for part in text.split(","))


def _hidden_layer(text: str) -> HiddenLayer:
    width, *parts = text.strip().split(":")
    values: dict[str, Any] = {"width": read_whole("--hidden: width", width)}
    for part in parts:
        name, value = _hidden_part(part)
        if name in values:
            raise RecipeError(f"--hidden: {text!r} gives its {name} twice.")
        values[name] = value
    return HiddenLayer(**values)


def _hidden_part(part: str) -> tuple[str, str | float]:
    if part.startswith("bn-"):
        return "batchnorm", part.removeprefix("bn-")
    if part[:1].isdigit() or part[:1] in "-.":
        return "dropout", read_number("--hidden: dropout", part)
    return "activation", part


def read_augment(text: str, flag: str = "--augment") -> str | AugmentSpec:
    """A policy's name as it is, or the ranges from a JSON file, as given behind `flag`."""
    if text in POLICIES:
        return text
    path = Path(text)
    if not path.is_file():
        raise RecipeError(
            f"{flag} is {text!r}: neither a policy ({', '.join(POLICIES)}) nor a file."
            f"{near_matches(text, tuple(POLICIES))}"
        )
    return AugmentSpec.from_dict(read_json_file(path, f"{flag} {text}"), where=text)


def picture_overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given ones among image_size, mean, std, interpolation, crop_pct and fit, read from their text."""
    readers: dict[str, Callable[[str, str], Any]] = {
        "image_size": read_whole,
        "mean": _channels,
        "std": _channels,
        "interpolation": read_word,
        "crop_pct": read_number,
        "fit": read_word,
    }
    return {
        name: read("--" + name.replace("_", "-"), options[name])
        for name, read in readers.items()
        if options.get(name) is not None
    }


def _channels(flag: str, text: str) -> tuple[float, ...]:
    values = tuple(read_number(flag, part) for part in text.split(","))
    if len(values) not in (1, 3):
        raise RecipeError(f"{flag} is {text!r}; it takes three numbers with commas between, or one for all channels.")
    return values * 3 if len(values) == 1 else values
