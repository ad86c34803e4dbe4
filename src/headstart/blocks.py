"""The blocks of a backbone: which parameters are trained together, or share one learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn


def network_depths(net: nn.Module) -> Mapping[str, int] | None:
    """The block of each parameter, counted from the input, as timm's networks say it; None for any other."""
    matcher: Callable[[], Any] | None = getattr(net, "group_matcher", None)
    return group_parameters(net, matcher(), reverse=True) if callable(matcher) else None


def block_names(layers: Sequence[str]) -> list[str]:
    """The block of each layer by the names alone: up to the first number in it (`layer4.0`, `stages.2`).

    What all names begin with, as in a network wrapped in a `Sequential`, says nothing. Without a number by itself the
    first part that ends in one counts (`denseblock4`), and without any the whole name.
    """
    split = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[: _end_of_block(parts[shared:]) + shared]) for parts in split]


def block_name(layer: str) -> str:
    """The block of a layer by its name and no other."""
    parts = layer.split(".")
    return ".".join(parts[: _end_of_block(parts)])


def _end_of_block(parts: Sequence[str]) -> int:
    """How many parts of a layer's name are its block's."""
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    numbers += [i for i, part in enumerate(parts[:-1]) if part[-1:].isdecimal()]
    return numbers[0] + 1 if numbers else len(parts)
