"""What a sweep tries: trials as they are, or values for each parameter; their words and numbers in a recipe."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from .errors import RecipeError
from .recipe import Recipe

PARAMETERS = ("lr", "weight_decay", "head_dropout", "freeze_line", "backbone")
WORDS = ("freeze_line", "backbone")
# The course notebook's table: epochs of the head on a frozen EfficientNet-B0, Stanford Dogs; its own accuracies.
COURSE: tuple[tuple[float, float, float], ...] = (
    (1e-2, 0.0, 0.7898),
    (1e-2, 1e-3, 0.7853),
    (1e-2, 1e-2, 0.7931),
    (1e-3, 1e-2, 0.8180),
    (1e-4, 1e-2, 0.8108),
)


@dataclass(frozen=True)
class Space:
    """What is tried: an explicit list of trials, or values for each parameter.

    The parameters are `lr`, `weight_decay`, `head_dropout` (numbers), `freeze_line` and `backbone` (words).

    points: trials as they are, such as `{"lr": 1e-3, "weight_decay": 0}`. values: choices by parameter name; two
    numbers are the ends of a range for `tpe`, and a grid takes every value. published: by trial of `points`, the figure
    somebody else reports, shown beside ours.
    """

    points: tuple[Mapping[str, Any], ...] = ()
    values: Mapping[str, tuple[Any, ...]] | None = None
    published: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.points) == bool(self.values):
            raise RecipeError("A sweep takes either an explicit list of trials or values for each parameter.")
        if self.values is not None and not isinstance(self.values, Mapping):
            raise RecipeError(
                f"The values of a sweep are {self.values!r}; give them by parameter: {{'lr': (1e-3, 1e-2)}}."
            )
        if self.values is not None:  # an array's numbers as Python's
            given: Mapping[str, Any] = self.values
            values = {name: tuple(v.tolist()) if getattr(v, "ndim", 0) == 1 else v for name, v in given.items()}
            object.__setattr__(self, "values", values)
        for name, choices in (self.values or {}).items():
            if not isinstance(choices, (list, tuple)) or not choices:
                raise RecipeError(
                    f"The values of {name!r} are {choices!r}; give a tuple of one or more, even of one: (1e-3,)."
                )
        for point in self.points:
            if not isinstance(point, Mapping):
                raise RecipeError(f"A trial is {point!r}; it takes values by parameter: {{'lr': 1e-3}}.")
        asked = [*(self.values or {}).items(), *((name, (v,)) for point in self.points for name, v in point.items())]
        for name, choices in asked:
            if name not in PARAMETERS:
                raise RecipeError(f"A sweep knows no parameter {name!r}. Known: {', '.join(PARAMETERS)}.")
            kind, what = (str, "words") if name in WORDS else (Real, "numbers")
            if any(not isinstance(value, kind) or isinstance(value, bool) for value in choices):
                raise RecipeError(f"The values of {name!r} are {tuple(choices)!r}; it takes {what}.")
        if len(self.published) not in (0, len(self.points)):
            raise RecipeError(f"{len(self.published)} published figures for {len(self.points)} trials; give one each.")

    def grid(self) -> list[dict[str, Any]]:
        """Every trial of an explicit list or a full grid, in order."""
        if self.points:
            return [dict(point) for point in self.points]
        values = self.values or {}
        return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


COURSE_SPACE = Space(
    points=tuple({"lr": lr, "weight_decay": decay} for lr, decay, _ in COURSE),
    published=tuple(accuracy for _, _, accuracy in COURSE),
)


def trial_recipe(plan: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe with a trial's values in their places."""
    stages = list(plan.stages)
    if "weight_decay" in point:
        stages = [replace(stage, weight_decay=float(point["weight_decay"])) for stage in stages]
    if "freeze_line" in point:
        stages[-1] = replace(stages[-1], freeze_line=str(point["freeze_line"]))
    head = replace(plan.head, dropout=float(point["head_dropout"])) if "head_dropout" in point else plan.head
    return replace(plan, stages=tuple(stages), head=head, lr=float(point.get("lr", plan.lr)))


def describe(point: Mapping[str, Any]) -> str:
    """`lr 0.01, weight_decay 0.001`."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())


def point_key(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def parse_values(texts: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """`lr=1e-4,1e-2` as {"lr": (0.0001, 0.01)}; freeze lines and backbones stay words.

    Raises:
        RecipeError: an unknown parameter, or a value that cannot be read.
    """
    values: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        if not equals or name not in PARAMETERS or not listed:
            raise RecipeError(f"{text!r}: it takes PARAMETER=VALUE,... with one of {', '.join(PARAMETERS)}.")
        if name in values:
            raise RecipeError(f"{name} is given twice. All its values go into one: {name}=A,B.")
        parts: Sequence[str] = listed.split(",")
        values[name] = tuple(parts) if name in WORDS else tuple(_number(name, p) for p in parts)
    return values


def parse_point(text: str) -> dict[str, Any]:
    """`lr=0.01,weight_decay=0` as one trial of an explicit list."""
    return {name: found[0] for name, found in parse_values(text.split(",")).items()}


def _number(name: str, text: str) -> float:
    if text == "none":
        return 0.0
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{name}={text!r}: it takes numbers.") from None
