"""Cut a backbone in two where the freeze line lies: a fixed prefix to run once, and a suffix to train.

The backbone's forward is recorded as a graph (torch.fx, with timm's own leaf modules and functions). Between two
operations where exactly one tensor is alive the graph can be cut; both halves keep using the backbone's own modules
and parameters, so training the suffix trains the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from torch import Tensor, fx, nn

Forward = Callable[[Any, Tensor], Tensor]

# Modules whose behaviour hangs on their own training flag, and convolutions whose class may have been exchanged for a
# faster one: called as they are, never looked into.
_LEAVES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.dropout._DropoutNd,
    nn.Conv2d,
    DropPath,
    DropBlock2d,
)


class Whole(nn.Module):
    """The backbone with the forward that is asked for, as something a tracer can start from."""

    def __init__(self, net: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.net = net
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        functions = [f for f in get_notrace_functions() if callable(f)]
        super().__init__(autowrap_modules=(math,), autowrap_functions=tuple(functions))
        self._leaves = (*_LEAVES, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(net: nn.Module, forward: Forward) -> tuple[nn.Module, fx.Graph]:
    """Record `forward(net, x)` as a graph over the module that is returned with it; its names start with `net.`.

    The graph is that of the modes the modules are in: what asks for `self.training` in the middle of a forward is
    decided now. Normalisation, dropout and drop-path modules are called as they are and keep their own modes.
    """
    whole = Whole(net, forward)
    return whole, _Tracer().trace(whole)
