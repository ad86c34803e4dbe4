"""Faster arithmetic for what is trained or frozen: depthwise convolutions whose slow CPU kernels are avoided, fixed
BatchNorm and activations done by the convolution before them.

Modules are changed in place by exchanging their class, so that parameters, buffers, names and hooks stay what they
were, and every change can be undone. Nothing here knows of classifiers or freeze lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, fx, nn

from .fastconv import (
    FUSED,
    STRIP,
    Done,
    FastConv2d,
    FastConv2dSame,
    activate,
    is_depthwise,
    is_pointwise,
    products_pay,
    stock_activation,
    writes_past_its_memory,
)
from .fxtrace import Forward, trace
from .passgraph import is_written_to
from .stock import is_as_built


class Undo:
    """What a conversion did, as something to take back: call `undo()`, or use it as a context manager."""

    def __init__(self, steps: Iterable[Callable[[], None]]) -> None:
        self._steps = list(steps)
        self.converted = len(self._steps)  # how many modules were converted

    def undo(self) -> None:
        """Put every converted module back; a second call does nothing."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class _FusedNorm(nn.BatchNorm2d):
    """A BatchNorm whose scale and shift its convolution applies, as long as its statistics are fixed."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training else input


class _FusedNormAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return x if self.__dict__.get("done") else activate(self.act, self.drop(x))


_FAST_CONV: dict[type, type] = {nn.Conv2d: FastConv2d, Conv2dSame: FastConv2dSame}
_FUSED_NORM: dict[type, type] = {nn.BatchNorm2d: _FusedNorm, BatchNormAct2d: _FusedNormAct}
_MARKS = {"norm", "gradients", "act"}
_STOCK: dict[type, type] = {fast: stock for stock, fast in {**_FAST_CONV, **_FUSED_NORM}.items()}


def _stock_class(module: nn.Module) -> type:
    return _STOCK.get(type(module), type(module))


def stock_form(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """A module's class and settings, the same whether or not this room's exchanges are at work.

    Without parameters, buffers and children, and without what changes how its result is computed but not the result.
    """
    kind = stock_activation(module) if type(module) is Done else _stock_class(module)
    ours = {*_MARKS, "done", "stock", "inplace", "training"}
    return f"{kind.__module__}.{kind.__qualname__}", {
        key: value for key, value in vars(module).items() if key not in ours and not key.startswith("_")
    }


def _is_plain_conv(module: nn.Module) -> bool:
    return (
        _stock_class(module) in _FAST_CONV
        and cast(nn.Conv2d, module).padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and is_as_built(module)
    )


def _has_slow_backward(module: nn.Module) -> bool:
    """Is this a convolution that one of the remedies is for?"""
    if not isinstance(module, nn.Conv2d) or not _is_plain_conv(module):
        return False
    if is_depthwise(module.weight, module.groups, module.dilation):
        return module.kernel_size[1] > STRIP or max(module.stride) > 1
    padding = cast("tuple[int, ...]", module.padding)
    if writes_past_its_memory(module.weight.shape, module.stride, padding, module.groups):
        return True
    return is_pointwise(module.kernel_size, module.stride, padding, module.groups) and any(products_pay())


def _mark(conv: nn.Module, key: str, value: Any) -> Callable[[], None]:
    """Give a convolution its fast class and one of its marks; returns what takes it back."""
    conv.__class__ = _FAST_CONV[_stock_class(conv)]
    conv.__dict__[key] = value  # past Module.__setattr__, which would make the norm a child and rename its keys

    def undo() -> None:
        conv.__dict__.pop(key, None)
        if not conv.__dict__.keys() & _MARKS:
            conv.__class__ = _stock_class(conv)

    return undo


def fast_gradients(module: nn.Module) -> Undo:
    """Let the convolutions in `module` whose stock gradients are slow on a CPU use the fast ones, in place.

    The forward is the stock one, bit for bit; parameters, buffers and their names do not change. On other devices, and
    where no gradient is wanted, the stock operation runs.
    """
    slow = [m for m in module.modules() if _has_slow_backward(m) and "gradients" not in m.__dict__]
    return Undo(_mark(m, "gradients", True) for m in slow)


class Chain(NamedTuple):
    """Names of a convolution and of what alone reads its output: a BatchNorm, an activation, or one after the other."""

    conv: str
    norm: str | None
    act: str | None


def conv_chains(module: nn.Module, forward: Forward) -> list[Chain]:
    """Every convolution with a BatchNorm or an activation after it; each module of a chain is called once.

    Found in the graph of `forward(module, x)`, or in the module's own where it is one half of a cut; empty where that
    cannot be traced. An activation inside a norm is not named.
    """
    if isinstance(module, fx.GraphModule):
        graph, own = module.graph, ""
    else:
        try:
            graph, own = trace(module, forward, in_place=True)[1], "net."
        except Exception:  # whatever a foreign forward raises under tracing: then nothing is known of its order
            return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def name_of(node: fx.Node) -> str:
        return f"{node.target}.".removeprefix(own).removesuffix(".")  # "" where the network is one layer itself

    def module_of(node: fx.Node) -> nn.Module:
        return module.get_submodule(name_of(node))

    def reader(node: fx.Node) -> fx.Node | None:
        """The call that alone reads this one's output, past what passes it on as it is."""
        found = next(iter(node.users)) if len(node.users) == 1 else None
        if found is None or found.op != "call_module" or found.args[:1] != (node,):
            return None
        if type(module_of(found)) is nn.Identity:
            return reader(found)
        return found if calls[found.target] == 1 else None

    chains = []
    for node in graph.nodes:
        if node.op != "call_module" or calls[node.target] > 1 or not _is_plain_conv(module_of(node)):
            continue
        norm = reader(node)
        act = norm
        if norm is not None and _has_fixed_form(module_of(norm)):
            act = None if isinstance(module_of(norm), BatchNormAct2d) else reader(norm)
        else:
            norm = None
        if act is not None and not (stock_activation(module_of(act)) in FUSED and is_as_built(module_of(act))):
            act = None
        # An activation's gradient is told from its result, which must stay what it was.
        if act is not None and is_written_to(act, module_of):
            act = None
        elif norm is not None and _has_own_activation(module_of(norm)) and is_written_to(norm, module_of):
            continue
        if norm is not None or act is not None:
            names = (None if n is None else name_of(n) for n in (node, norm, act))
            chains.append(Chain(*names))  # type: ignore[arg-type]
    return chains


def _has_own_activation(norm: nn.Module) -> bool:
    return isinstance(norm, BatchNormAct2d) and type(norm.act) is not nn.Identity


def _has_fixed_form(norm: nn.Module) -> bool:
    is_known = _stock_class(norm) in _FUSED_NORM and is_as_built(norm)
    return is_known and cast(nn.BatchNorm2d, norm).running_var is not None


def fuse_fixed_batchnorm(module: nn.Module, forward: Forward = nn.Module.__call__) -> Undo:
    """Let convolutions apply the BatchNorm after them while its statistics are fixed (it is in eval mode), in place.

    With fixed statistics the norm is y = x * scale + shift per channel, so scaling the convolution's few weights does
    the same as scaling its many outputs, forward and backward, and the convolution's own output need not be kept.
    Gradients reach the convolution's weight and the norm's weight and bias as before. A norm that is put into training
    mode computes as ever. The activation after it, or after a convolution without a norm, is done by the convolution
    too, where it can be. What has a hook is left as it is, so that the hook sees and changes what it would.

    Args:
        forward: what is called with the module and its input; it must contain the layers to fuse.
    """
    steps = []
    for chain in conv_chains(module, forward):
        conv, norm, act = (None if name is None else module.get_submodule(name) for name in chain)
        assert conv is not None
        if conv.__dict__.keys() & {"norm", "act"}:
            continue  # within another such context, which takes back its own
        if norm is not None:
            steps.append(_fuse(conv, norm))
        if act is not None:
            steps.append(_take_over(conv, act, norm))
    return Undo(steps)


def _fuse(conv: nn.Module, norm: nn.Module) -> Callable[[], None]:
    stock, act = _stock_class(norm), getattr(norm, "act", None)
    steps = [_mark(conv, "norm", norm)]
    norm.__class__ = _FUSED_NORM[stock]
    if act is not None and type(getattr(norm, "drop", None)) is nn.Identity:
        steps.append(_mark(conv, "act", act))
        norm.__dict__["done"] = True
    if act is not None:
        steps.append(_keep_input(act))

    def undo() -> None:
        norm.__class__ = stock
        norm.__dict__.pop("done", None)
        for step in reversed(steps):
            step()

    return undo


def _take_over(conv: nn.Module, act: nn.Module, norm: nn.Module | None) -> Callable[[], None]:
    """Let a convolution do the activation after it, or after the norm between them."""
    steps = [_mark(conv, "act", act), _keep_input(act)]
    act.__dict__.update(stock=stock_activation(act), norm=norm)
    act.__class__ = Done

    def undo() -> None:
        _restore_activation(act)
        for step in reversed(steps):
            step()

    return undo


def _restore_activation(act: nn.Module) -> None:
    act.__class__ = act.__dict__.pop("stock")
    del act.__dict__["norm"]


def _keep_input(act: nn.Module) -> Callable[[], None]:
    """SiLU and Hardswish need their input for the backward pass: in place, autograd copies it first."""
    eager = isinstance(act, nn.SiLU | nn.Hardswish) and act.inplace
    if eager:
        act.inplace = False  # type: ignore[assignment]

    def undo() -> None:
        if eager:
            act.inplace = True  # type: ignore[assignment]

    return undo


class SpatialMean(torch.autograd.Function):
    """Mean over height and width, [N, C, H, W] -> [N, C, 1, 1], whose gradient is spread as a view.

    The stock backward writes the spread gradient out in NCHW order whatever the order of the input; adding that to
    a channels-last gradient is 5 to 15 times slower than adding a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        spread: Tensor = grad / (ctx.shape[2] * ctx.shape[3])
        return spread.expand(ctx.shape)


class FastSqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation of the EfficientNet and MobileNet families, exchanged in place."""

    def forward(self, x: Tensor) -> Any:
        gate = self.conv_expand(self.act1(self.conv_reduce(SpatialMean.apply(x))))
        return x * self.gate(gate)


_STOCK[FastSqueezeExcite] = SqueezeExcite


def fast_squeeze_excite(module: nn.Module) -> Undo:
    """Let timm's squeeze-and-excitation blocks in `module` keep channels-last order in their gradients, in place."""

    def exchange(block: nn.Module) -> Callable[[], None]:
        block.__class__ = FastSqueezeExcite

        def undo() -> None:
            block.__class__ = SqueezeExcite

        return undo

    return Undo(exchange(m) for m in module.modules() if type(m) is SqueezeExcite)


def restore_stock(module: nn.Module) -> None:
    """Take back every exchange of class in a copy of a module, whose marks were copied with it."""
    for m in module.modules():
        if type(m) is Done:
            _restore_activation(m)
        elif type(m) in _STOCK:
            for mark in (*_MARKS, "done"):
                m.__dict__.pop(mark, None)
        m.__class__ = _stock_class(m)


def fast_training(module: nn.Module, forward: Forward = nn.Module.__call__) -> Undo:
    """Everything here that makes a training step on a CPU faster, in place; leave the context to undo it."""
    done = [fast_gradients(module), fast_squeeze_excite(module), fuse_fixed_batchnorm(module, forward)]
    return Undo([each.undo for each in done])
