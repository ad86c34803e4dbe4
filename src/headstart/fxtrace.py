"""A network's forward pass recorded by torch.fx, with timm's own leaf modules and functions, and no trace of it left.

What the recording would not do as the network does it, such as changing a buffer, is refused.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, fx, nn

from .fastconv import Done

Forward = Callable[[Any, Tensor], Any]

# `x += y` and its like, which change x.
IN_PLACE = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
     operator.iand, operator.ior, operator.ixor}
)  # fmt: skip
# Modules whose behaviour hangs on their own training flag, and those whose class may be exchanged for a faster one:
# called as they are, never looked into.
_LEAVES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.dropout._DropoutNd,
    nn.Conv2d,
    Done,
    SqueezeExcite,
    DropPath,
    DropBlock2d,
)


class Whole(nn.Module):
    """A module with the forward that is asked for, as something a tracer can start from."""

    def __init__(self, net: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.net = net
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


class _InPlace(fx.Proxy):
    """Records `x += y` as what it is; the stock one takes it for `x = x + y`."""


def _recorded(operation: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _operation in IN_PLACE:
    setattr(_InPlace, f"__{_operation.__name__}__", _recorded(_operation))


# torch.fx exchanges `nn.Module.__call__` for all threads: one traces at a time.
_tracing = threading.RLock()


class _Tracer(fx.Tracer):
    """Records what its own thread does; modules that run in others meanwhile run as ever."""

    def __init__(self, *, in_place: bool) -> None:
        self._thread = threading.get_ident()
        self._proxy = _InPlace if in_place else fx.Proxy
        functions = [function for function in get_notrace_functions() if callable(function)]
        super().__init__(autowrap_modules=(math,), autowrap_functions=tuple(functions))
        self._leaves = (*_LEAVES, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        ours = threading.get_ident() == self._thread
        return super().call_module(m, forward, args, kwargs) if ours else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        ours = threading.get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if ours else attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._proxy(node, self)


def trace(net: nn.Module, forward: Forward, *, in_place: bool = False) -> tuple[nn.Module, fx.Graph]:
    """Record `forward(net, x)` as a graph over the module that is returned with it; its names start with `net.`.

    The graph is that of the modes the modules are in: what asks for `self.training` in the middle of a forward is
    decided now. Normalisation, dropout and drop-path modules are called as they are and keep their own modes.

    in_place: record `x += y` as what it is, to be looked at; a graph that runs changes nothing in
    place, which would be what is stored at a cut.
    Raises:
        Uncuttable: the forward changes a buffer itself, which a recording would not do, or with numbers of its own.
    """
    whole = Whole(net, forward)
    with _tracing, _undisturbed(net):
        return whole, _Tracer(in_place=in_place).trace(whole)


class Uncuttable(Exception):
    """Why a forward pass cannot be recorded, or not be cut where it was asked; those who ask catch it."""


@contextmanager
def mode(net: nn.Module, training: bool, but: Iterable[nn.Module] = ()) -> Iterator[None]:
    """All modules in one mode for a while, `but` these in evaluation mode; afterwards each is as it was."""
    before = [(module, module.training) for module in net.modules()]
    try:
        net.train(training)
        for module in but:
            module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def _undisturbed(net: nn.Module) -> Iterator[None]:
    """Afterwards buffers and the modules' own attributes are what they were: tracing keeps its stand-ins for tensors
    where a forward keeps tensors (LeViT's table of attention biases), and what needs no stand-in is really done.

    Raises:
        Uncuttable: a buffer was changed.
    """
    buffers = [(b, b._version, b.clone()) for b in net.buffers() if not b.is_inference()]
    names = [(module._buffers, dict(module._buffers)) for module in net.modules()]
    own = [(vars(module), _own_attributes(module)) for module in net.modules()]
    try:
        yield
    finally:
        changed = [(buffer, value) for buffer, version, value in buffers if buffer._version != version]
        with torch.no_grad():
            for buffer, value in changed:
                buffer.copy_(value)
        rebound = [
            (held, old) for held, old in names if any(held.get(name) is not buffer for name, buffer in old.items())
        ]
        for held, old in rebound:
            held.update(old)
        for now, before in own:
            for name in now.keys() - _OF_EVERY_MODULE - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                now[name] = value
                if isinstance(value, dict):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content
    if changed or rebound:
        raise Uncuttable(f"{type(net).__name__} changes its buffers itself, which a recording would not")


def _own_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module has beside what every module has, with the present content of dictionaries and lists."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list)) else None)
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE
    }
