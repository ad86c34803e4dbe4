"""What a recipe's file says beside the recipe: the backbone, weights and pictures it was found on."""

from __future__ import annotations

import argparse

from .terminal import say
from .tuned import tuned_on


def follow_tuned(args: argparse.Namespace) -> None:
    """Fill the options that were not given with what `--recipe FILE` was found on.

    The options of another backbone, or of `--from-run`, are left alone: weights and preprocessing go with a backbone.
    """
    found = tuned_on(args.recipe) if args.recipe else {}
    if not found or getattr(args, "from_run", None):
        return
    backbone, weights = found.get("backbone"), found.get("weights")
    if args.backbone not in (None, backbone):
        say(f"{args.recipe} was found on {backbone}; here it trains {args.backbone}.")
        return
    args.backbone = backbone
    if args.weights is None:
        args.weights = weights
        say(f"As {args.recipe} says: backbone {backbone}, weights {weights}.", enabled=not args.quiet)
    elif args.weights != weights:
        say(f"{args.recipe} was found with the weights {weights}; here it starts from {args.weights}.")
    for name, value in found.get("spec_overrides", {}).items():
        if getattr(args, name) is None:
            setattr(args, name, ",".join(map(repr, value)) if isinstance(value, tuple) else str(value))
