"""What a recipe in a file was found on: the backbone, its weights and its pictures, for `fit --recipe` to repeat."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .fields import read_json_file
from .files import to_json, write_atomic
from .recipe import RECIPES, TUNED_ON, Recipe, recipe_file

_PICTURES = ("image_size", "mean", "std", "interpolation", "crop_pct", "fit")
_KNOWN = ("backbone", "weights", "pictures")


def write_tuned(
    path: str | Path, recipe: Recipe, *, backbone: str, weights: str | Path, pictures: Mapping[str, Any]
) -> None:
    """Write a recipe that says what it was found on; a weights file is named by its whole path.

    Args:
        pictures: what replaced the backbone's own preprocessing, as `spec_overrides` of `fine_tune`.
    """
    is_path = str(weights) not in ("hub", "none") and Path(weights).exists()
    where = str(Path(weights).absolute()) if is_path else str(weights)
    found_on = {"backbone": backbone, "weights": where, "pictures": dict(pictures)}
    write_atomic(path, to_json({**recipe.to_dict(), TUNED_ON: found_on}, indent=1) + b"\n")


def tuned_on(name_or_file: str | Path) -> dict[str, Any]:
    """What a recipe was found on, as arguments of `fine_tune`: backbone, weights, spec_overrides.

    Empty for a named recipe, and for a file that does not say it.

    Raises:
        RecipeError: neither a name nor a file; the file says something else there.
    """
    if str(name_or_file) in RECIPES:
        return {}
    data = read_json_file(recipe_file(name_or_file), f"Recipe {name_or_file}")
    found = data.get(TUNED_ON, {}) if isinstance(data, Mapping) else {}
    pictures = found.get("pictures", {}) if isinstance(found, Mapping) else None
    words = [found.get(name, "") for name in ("backbone", "weights")] if isinstance(found, Mapping) else []
    if (
        not isinstance(pictures, Mapping)
        or not all(isinstance(word, str) for word in words)
        or not {*found} <= {*_KNOWN}
        or not {*pictures} <= {*_PICTURES}
    ):
        raise RecipeError(
            f"Recipe {name_or_file}: {TUNED_ON} is {found!r}; it takes an object with backbone, weights (words) and"
            f" pictures, an object of {', '.join(_PICTURES)}."
        )
    arguments = {name: found[name] for name in ("backbone", "weights") if name in found}
    overrides = {name: tuple(value) if isinstance(value, list) else value for name, value in pictures.items()}
    return {**arguments, **({"spec_overrides": overrides} if overrides else {})}
