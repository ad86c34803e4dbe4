"""The blocks of a backbone: which parameters are trained together, or share one learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import group_parameters
from torch import nn


def network_depths(net: nn.Module) -> Mapping[str, int] | None:
    """The block of each parameter, counted from the input, as timm's networks say it; None for any other."""
    matcher: Callable[[], Any] | None = getattr(net, "group_matcher", None)
    return group_parameters(net, matcher(), reverse=True) if callable(matcher) else None


def block_name(layer: str) -> str:
    """The block by a layer's name alone: up to the first number in it (`layer4.0`, `stages.2`), or the whole name."""
    parts = layer.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: first + 1])
