"""What a recipe's file says beside the recipe: the backbone, weights and pictures it was found on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .terminal import say
from .tuned import tuned_on


def follow_tuned(args: argparse.Namespace, recipes: Sequence[str] | None = None) -> None:
    """Fill the options that were not given with what the recipes' files were found on.

    The options of another backbone, or of `--from-run`, are left alone: weights and preprocessing go with a backbone.

    Args:
        recipes: names and files that all train one backbone; None is `--recipe` alone.
    Raises:
        RecipeError: two files were found on something different, and no option says which it shall be.
    """
    if getattr(args, "from_run", None):
        return
    names = [args.recipe] if recipes is None and args.recipe else recipes or []
    found = {name: tuned_on(name) for name in names if Path(name).is_file()}  # `compare` takes freeze lines, too
    _refuse_unlike({name: on for name, on in found.items() if on}, args)
    for name, on in found.items():
        if on:
            _follow(args, name, on)


def _follow(args: argparse.Namespace, recipe: str, found: Mapping[str, Any]) -> None:
    backbone, weights = found.get("backbone"), found.get("weights")
    if args.backbone not in (None, backbone):
        say(f"{recipe} was found on {backbone}; here it trains {args.backbone}.")
        return
    args.backbone = backbone
    if args.weights is None:
        args.weights = weights
        say(f"As {recipe} says: backbone {backbone}, weights {weights}.", enabled=not args.quiet)
    elif args.weights != weights:
        say(f"{recipe} was found with the weights {weights}; here it starts from {args.weights}.")
    for name, text in _pictures(found).items():
        if getattr(args, name) is None:
            setattr(args, name, text)


def _pictures(found: Mapping[str, Any]) -> dict[str, str]:
    """Its preprocessing, as the options are written."""
    return {
        name: ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
        for name, value in found.get("spec_overrides", {}).items()
    }


def _refuse_unlike(found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Files that would follow different ones of what no option has decided."""
    left: dict[str, dict[str, str]] = {}
    for recipe, on in found.items():
        if args.backbone in (None, on.get("backbone")):
            words = {name: str(on.get(name)) for name in ("backbone", "weights")} | _pictures(on)
            left[recipe] = {name: text for name, text in words.items() if getattr(args, name) is None}
    for name in dict.fromkeys(name for words in left.values() for name in words):
        said = {recipe: words.get(name, "the backbone's own") for recipe, words in left.items()}
        if len({*said.values()}) > 1:
            flag = f"--{name.replace('_', '-')}"
            each = ", ".join(f"{recipe} {text}" for recipe, text in said.items())
            raise RecipeError(
                f"These recipes were found with a different {flag} ({each}), but all train on the same one here. Say"
                f" which with {flag}."
            )
