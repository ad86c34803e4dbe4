"""Watch one forward pass without computing it: what is called, in which order, with which shapes, using which weights.

The pass runs on the meta device (shapes only) with the weights swapped for the call, so it costs neither memory nor
arithmetic and leaves the module as it was. A module whose forward cannot run there is run once on black pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Forward = Callable[[Any, torch.Tensor], Any]

# Functions that draw random numbers when they are told that the module calling them is in training mode.
_RANDOM = ("dropout", "scaled_dot_product_attention", "multi_head_attention_forward")


@dataclass(frozen=True)
class Call:
    """One call of a submodule: positions count calls and uses of weights alike; shapes are of tensors, batch first."""

    name: str
    start: int
    end: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Trace:
    """What one forward pass did: its calls by start, and the shape of what came out.

    first_use: position at which each parameter and buffer is first read. first_random: position at which a module
    itself, not one below it, first calls a function that may drop values.
    """

    calls: tuple[Call, ...]
    first_use: dict[str, int]
    first_random: dict[str, int]
    output_shape: tuple[int, ...] | None

    def first_calls(self) -> dict[str, Call]:
        """The first call of each submodule, by name, in order of execution."""
        found: dict[str, Call] = {}
        for call in self.calls:
            found.setdefault(call.name, call)
        return found


class _Method(nn.Module):
    """`forward(module, x)` as a module, so that any function of a module can run with its weights swapped."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.module = module
        self.call = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.module, x)


class _Uses(TorchFunctionMode):
    """Notes the first operation that reads each of the given tensors, and each module's first that may be random."""

    def __init__(self, names: dict[int, str], clock: Iterator[int], open_calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.names, self.clock, self.open_calls = names, clock, open_calls
        self.first_use: dict[str, int] = {}
        self.first_random: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(word in getattr(func, "__name__", "") for word in _RANDOM):
            self.first_random.setdefault(self.open_calls[-1][0] if self.open_calls else "", next(self.clock))
        # Asking a weight for its shape or dtype is not using it; those getters give no tensor back.
        if getattr(func, "__name__", "") != "__get__" or isinstance(out, torch.Tensor):
            for tensor in _tensors((args, tuple(kwargs.values()))):
                name = self.names.get(id(tensor))
                if name is not None and name not in self.first_use:
                    self.first_use[name] = next(self.clock)
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _shape(value: Any) -> tuple[int, ...] | None:
    first = next(_tensors(value), None)
    return None if first is None else tuple(first.shape)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode for the block; afterwards each is back in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def trace(
    module: nn.Module, forward: Forward, x_shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Trace:
    """Trace `forward(module, x)` in evaluation mode for an `x` of that shape; names are those inside `module`.

    Raises:
        Exception: whatever the forward pass itself raises on a black picture, when it cannot run on shapes either.
    """
    state = _state(module)
    with evaluation_mode(module), torch.no_grad():
        shared = {id(t): torch.empty_like(t, device="meta") for t in state.values()}
        meta = {n: shared[id(t)] for n, t in state.items()}
        try:
            return _run(module, forward, meta, torch.empty(x_shape, dtype=dtype, device="meta"))
        except Exception:
            if any(t.is_meta for t in state.values()):
                raise
            device = next((t.device for t in state.values()), torch.device("cpu"))
            return _run(module, forward, state, torch.zeros(x_shape, dtype=dtype, device=device))


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of each module by its name; a tensor that several modules share has several.

    A module that is registered twice has its first name: swapped under both, its weights would not come back.
    """
    found = {}
    for name, sub in module.named_modules():
        for own, tensor in (*sub.named_parameters(recurse=False), *sub.named_buffers(recurse=False)):
            found[f"{name}.{own}" if name else own] = tensor
    return found


def _run(module: nn.Module, forward: Forward, state: dict[str, torch.Tensor], x: torch.Tensor) -> Trace:
    clock = iter(range(1 << 62))
    calls: list[Call] = []
    open_calls: list[tuple[str, int]] = []
    hooks = []
    for name, sub in module.named_modules():

        def enter(_m: nn.Module, _args: Any, name: str = name) -> None:
            open_calls.append((name, next(clock)))

        def leave(_m: nn.Module, args: Any, out: Any, name: str = name) -> None:
            _, start = open_calls.pop()
            calls.append(Call(name, start, next(clock), _shape(args), _shape(out)))

        hooks += [sub.register_forward_pre_hook(enter), sub.register_forward_hook(leave)]
    uses = _Uses({id(t): n for n, t in reversed(state.items())}, clock, open_calls)  # the first of several names
    try:
        with uses:
            out = torch.func.functional_call(
                _Method(module, forward),
                {f"module.{n}": t for n, t in state.items()},
                (x,),
                strict=False,
                tie_weights=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    ordered = tuple(sorted(calls, key=lambda c: c.start))
    return Trace(ordered, uses.first_use, uses.first_random, _shape(out))
