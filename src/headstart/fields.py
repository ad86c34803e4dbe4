"""Checks of a value object's fields, and its closed schema: unknown keys refused, near matches named.

`owner` in the checks is who has the field, in the message's words: "stage 'head'".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from .errors import RecipeError, near_matches


def check_choice(owner: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """One of a few words."""
    if value not in allowed:
        raise RecipeError(
            f"{owner}: {name} is {value!r}; allowed: {', '.join(allowed)}.{near_matches(str(value), tuple(allowed))}"
        )


def check_number(
    owner: str,
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """A finite number from `low` (or `above` it) to `high`; true and false are none."""
    kind = (int,) if whole else (int, float)
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    try:
        is_number = is_number and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:  # a whole number of hundreds of digits
        raise RecipeError(f"{owner}: {name} has {len(str(value)):,} digits; it takes a smaller number.") from None
    if not is_number or not low <= float(value) <= high or (above and float(value) == low):  # type: ignore[arg-type]
        what = "a whole number" if whole else "a number"
        span = f"{'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
        raise RecipeError(f"{owner}: {name} is {value!r}; it takes {what} {span}.")


def check_flag(owner: str, name: str, value: object) -> None:
    """True or false, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise RecipeError(f"{owner}: {name} is {value!r}; it takes true or false.")


def as_tuple(owner: str, name: str, value: object, kind: type, what: str) -> Any:
    """A list or tuple of `kind`, as a tuple; `what` says in words what is taken."""
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{owner}: {name} is {value!r}; it takes {what}.")
    for i, one in enumerate(value):
        if not isinstance(one, kind):
            raise RecipeError(f"{owner}: {name}[{i}] is {one!r}; it takes {what}.")
    return tuple(value)


def read_json_file(path: Path, what: str) -> Any:
    """What a user's JSON file holds, with or without a byte order mark.

    Raises:
        RecipeError: it is none; `what` says whose file it is, in the message's words.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise RecipeError(f"{what}: nested too deeply for a JSON file of ours.") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise RecipeError(f"{what}: not a JSON file ({error}).") from None


class Spec:
    """Closed-schema building, reading and writing of a value object."""

    def __new__(cls, *_args: Any, **values: Any) -> Self:
        """A name that it does not have is refused in words, where Python raises a TypeError."""
        cls._refuse_unknown(values, cls.__name__)
        return super().__new__(cls)

    @classmethod
    def _refuse_unknown(cls, values: Mapping[str, Any], where: str) -> None:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise RecipeError(f"{where}: unknown key {key!r}. Known: {', '.join(names)}.{near_matches(key, names)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from plain JSON values; an unknown key is an error that lists near matches."""
        where = where or cls.__name__
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: expected an object with named values, got {data!r}.")
        cls._refuse_unknown(data, where)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**cls._nested(values, where))
        except TypeError as error:
            raise RecipeError(f"{where}: {error}.") from None

    @classmethod
    def _nested(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is its inverse."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]
