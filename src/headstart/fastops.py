"""Faster arithmetic for what is trained: depthwise convolutions whose slow CPU kernels are avoided, fixed BatchNorm
fused into its convolution.

Modules are changed in place by exchanging their class, so that parameters, buffers, names and hooks stay what they
were, and every change can be undone. Nothing here knows of classifiers or freeze lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, fx, nn

from .cut import Forward, trace

_backward = torch.ops.aten.convolution_backward

# oneDNN's depthwise weight-gradient kernel (`jit_dw`) takes kernels up to this wide, of any height; wider ones go to
# a kernel that pads every channel to a 16 x 16 block (ONEDNN_VERBOSE=1, oneDNN 3.13).
_STRIP = 3

_CHUNK_BYTES = 4 << 20  # float32 copies of this size stay in the cache; measured best between 2 and 8 MB


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


def depthwise_grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride: tuple[int, int], padding: tuple[int, int], bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight (and bias) gradient of a depthwise convolution, computed in strips three columns wide.

    Column j of the kernel only meets the input shifted by j, so the columns can be had in groups: a kernel of any
    height and three columns has a fast kernel on CPUs where a 5 x 5 or 7 x 7 one has none. The strips overlap where
    the width is no multiple of three. Dilation must be 1.

    Args:
        grad: gradient of the output, [N, C, Ho, Wo].
        x: input, [N, C, H, W].
        weight: [C, 1, kh, kw], kw >= 3; only its shape is used.
        bias: also return the bias gradient, [C].
    """
    height, width = int(weight.shape[2]), int(weight.shape[3])
    reach = (grad.shape[3] - 1) * stride[1] + _STRIP  # input columns that one strip meets
    starts = [*range(0, width - _STRIP, _STRIP), width - _STRIP]
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    bias_grad = None
    for start in starts:
        left = padding[1] - start
        view = F.pad(x, (left, reach - left - x.shape[3]))  # negative padding crops
        _, strip, sums = _backward(
            grad, view, weight[..., :_STRIP].contiguous(), [weight.shape[0]], stride, [padding[0], 0], [1, 1],
            False, [0, 0], weight.shape[0], [False, True, bias and start == 0],
        )  # fmt: skip
        result[..., start : start + _STRIP] = strip
        bias_grad = sums if start == 0 else bias_grad
    assert result.shape[2] == height
    return result, bias_grad if bias else None


def depthwise_grad_input(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Input gradient of a depthwise convolution in float32, as a transposed convolution; dilation must be 1.

    For bfloat16 and stride 2 oneDNN picks `brgconv_strided`, which treats every channel as a padded matrix product:
    16 to 70 times slower than going through float32, whose own depthwise kernel is used. A few pictures at a time, so
    that the wide copies stay in the cache. Of `x` only shape and format are used.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    lost = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + weight.shape[2 + i]) for i in (0, 1)
    ]
    wide_weight, result = weight.to(dtype), torch.empty_like(x)
    step = max(1, _CHUNK_BYTES // (x[0].numel() * dtype.itemsize))
    for piece, out in zip(grad.split(step), result.split(step), strict=True):
        out.copy_(F.conv_transpose2d(piece.to(dtype), wide_weight, None, stride, padding, lost, weight.shape[0]))
    return result


class DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution with the stock forward and a backward that avoids two slow CPU kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, 1, weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        where = {"stride": ctx.stride, "padding": ctx.padding}
        want_x, want_w, want_b = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_b = None
        if want_x and x.dtype == torch.bfloat16 and max(ctx.stride) > 1:
            grad_x, want_x = depthwise_grad_input(grad, x, weight, **where), False
        if want_w and weight.shape[3] > _STRIP:
            grad_w, grad_b = depthwise_grad_weight(grad, x, weight, bias=want_b, **where)
            want_w = want_b = False
        if want_x or want_w or want_b:
            rest = _backward(
                grad, x, weight, [weight.shape[0]], ctx.stride, ctx.padding, [1, 1],
                False, [0, 0], weight.shape[0], [want_x, want_w, want_b],
            )  # fmt: skip
            had = (grad_x, grad_w, grad_b)
            grad_x, grad_w, grad_b = (new if old is None else old for new, old in zip(rest, had, strict=True))
        return grad_x, grad_w, grad_b, None, None


class _FastConv(nn.Conv2d):
    """A convolution that may use `DepthwiseConv`, and may carry the scale and shift of a fixed BatchNorm after it."""

    depthwise: bool = False  # set on the instance by `fast_depthwise`

    def forward(self, input: Tensor) -> Tensor:
        norm = self.__dict__.get("norm")
        if norm is None or norm.training:
            return self._convolve(input, self.weight, self.bias)
        scale, shift = scale_and_shift(norm)
        shift = shift if self.bias is None else shift + self.bias * scale
        return self._convolve(input, self.weight * scale[:, None, None, None], shift)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = cast("tuple[int, int]", self.padding)
        if isinstance(self, Conv2dSame):
            x = pad_same(x, list(weight.shape[-2:]), list(self.stride), list(self.dilation))
        if not self.depthwise or x.device.type != "cpu" or not torch.is_grad_enabled():
            return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (_autocast(t) for t in (x, weight, bias))
        result: Tensor = DepthwiseConv.apply(x, weight, bias, self.stride, padding)
        return result


class FastConv2d(_FastConv):
    """`torch.nn.Conv2d`, exchanged in place."""


class FastConv2dSame(_FastConv, Conv2dSame):
    """timm's `Conv2dSame` (padding as TensorFlow does it), exchanged in place."""


def _autocast(tensor: Tensor | None) -> Any:
    """What autocast does to an argument of a convolution: any float but float64 becomes the autocast format."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype("cpu"))


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """y = x * scale + shift, what a BatchNorm with fixed statistics computes, differentiable in its affine part."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = torch.rsqrt(var + norm.eps)
    if not norm.affine:
        return scale, -mean * scale
    scale = norm.weight * scale
    return scale, norm.bias - mean * scale


class _FusedNorm(nn.BatchNorm2d):
    """A BatchNorm whose scale and shift its convolution applies, as long as its statistics are fixed."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training else input


class InPlaceReLU6(torch.autograd.Function):
    """min(max(x, 0), 6) in place, with a backward that reads the result: the stock one copies the input for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        result = F.relu6(x, inplace=True)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        wanted: Tensor = torch.ops.aten.hardtanh_backward(grad, result, 0.0, 6.0)
        return wanted


class _FusedNormAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        x = self.drop(x)
        is_copied = type(self.act) is nn.ReLU6 and self.act.inplace and x.requires_grad and torch.is_grad_enabled()
        result: Tensor = InPlaceReLU6.apply(x) if is_copied else self.act(x)
        return result


_FAST_CONV: dict[type, type] = {nn.Conv2d: FastConv2d, Conv2dSame: FastConv2dSame}
_FUSED_NORM: dict[type, type] = {nn.BatchNorm2d: _FusedNorm, BatchNormAct2d: _FusedNormAct}
_STOCK: dict[type, type] = {fast: stock for stock, fast in {**_FAST_CONV, **_FUSED_NORM}.items()}


def _stock_class(module: nn.Module) -> type:
    return _STOCK.get(type(module), type(module))


def _is_plain_conv(module: nn.Module) -> bool:
    return (
        _stock_class(module) in _FAST_CONV
        and cast(nn.Conv2d, module).padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _has_slow_backward(module: nn.Module) -> bool:
    """Is this a depthwise convolution that one of the two remedies is for?"""
    return (
        isinstance(module, nn.Conv2d)
        and _is_plain_conv(module)
        and 1 < module.groups == module.in_channels == module.out_channels
        and tuple(module.dilation) == (1, 1)
        and (module.kernel_size[1] > _STRIP or max(module.stride) > 1)
    )


def _mark(conv: nn.Module, key: str, value: Any) -> Callable[[], None]:
    """Give a convolution its fast class and one of its two marks; returns what takes it back."""
    conv.__class__ = _FAST_CONV[_stock_class(conv)]
    conv.__dict__[key] = value  # past Module.__setattr__, which would make the norm a child and rename its keys

    def undo() -> None:
        conv.__dict__.pop(key, None)
        if not conv.__dict__.keys() & {"norm", "depthwise"}:
            conv.__class__ = _stock_class(conv)

    return undo


def fast_depthwise(module: nn.Module) -> Undo:
    """Let the depthwise convolutions in `module` that have slow gradients on a CPU use the fast ones, in place.

    The forward is the stock one, bit for bit; parameters, buffers and their names do not change. On other devices, and
    where no gradient is wanted, the stock operation runs.
    """
    return Undo(_mark(m, "depthwise", True) for m in module.modules() if _has_slow_backward(m))


def conv_norm_pairs(module: nn.Module, forward: Forward) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the norm alone reads the convolution's output; each is called once.

    Found in the graph of `forward(module, x)`, or in the module's own where it is one half of a cut; empty where that
    cannot be traced.
    """
    if isinstance(module, fx.GraphModule):
        graph, own = module.graph, ""
    else:
        try:
            graph, own = trace(module, forward)[1], "net."
        except Exception:  # whatever a foreign forward raises under tracing: then nothing is known of its order
            return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {target for target, n in Counter(node.target for node in calls).items() if n == 1}
    pairs = []
    for node in calls:
        before = node.args[0] if node.args else None
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
            and {node.target, before.target} <= once
        ):
            conv, norm = str(before.target).removeprefix(own), str(node.target).removeprefix(own)
            if _is_plain_conv(module.get_submodule(conv)) and _has_fixed_form(module.get_submodule(norm)):
                pairs.append((conv, norm))
    return pairs


def _has_fixed_form(norm: nn.Module) -> bool:
    return _stock_class(norm) in _FUSED_NORM and cast(nn.BatchNorm2d, norm).running_var is not None


def fuse_fixed_batchnorm(module: nn.Module, forward: Forward = nn.Module.__call__) -> Undo:
    """Let convolutions apply the BatchNorm after them while its statistics are fixed (it is in eval mode), in place.

    With fixed statistics the norm is y = x * scale + shift per channel, so scaling the convolution's few weights does
    the same as scaling its many outputs, forward and backward, and the convolution's own output need not be kept.
    Gradients reach the convolution's weight and the norm's weight and bias as before. A norm that is put into training
    mode computes as ever. Hooks on such a convolution see the normalised output.

    Args:
        forward: what is called with the module and its input; it must contain the layers to fuse.
    """
    steps = []
    for conv_name, norm_name in conv_norm_pairs(module, forward):
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        steps.append(_fuse(conv, norm))
    return Undo(steps)


def _fuse(conv: nn.Module, norm: nn.Module) -> Callable[[], None]:
    stock, act = _stock_class(norm), getattr(norm, "act", None)
    unmark = _mark(conv, "norm", norm)
    norm.__class__ = _FUSED_NORM[stock]
    # SiLU and Hardswish need their input for the backward pass: in place, autograd copies it first.
    eager = act if isinstance(act, nn.SiLU | nn.Hardswish) and act.inplace else None
    if eager is not None:
        eager.inplace = False

    def undo() -> None:
        norm.__class__ = stock
        if eager is not None:
            eager.inplace = True
        unmark()

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


def fast_squeeze_excite(module: nn.Module) -> Undo:
    """Let timm's squeeze-and-excitation blocks in `module` keep channels-last order in their gradients, in place."""

    def exchange(block: nn.Module) -> Callable[[], None]:
        block.__class__ = FastSqueezeExcite

        def undo() -> None:
            block.__class__ = SqueezeExcite

        return undo

    return Undo(exchange(m) for m in module.modules() if type(m) is SqueezeExcite)


def restore_stock(module: nn.Module) -> None:
    for m in module.modules():
        for key in ("norm", "depthwise"):
            m.__dict__.pop(key, None) if type(m) in _FAST_CONV.values() else None
        m.__class__ = _stock_class(m)


def fast_training(module: nn.Module, forward: Forward = nn.Module.__call__) -> Undo:
    """Everything here that makes a training step on a CPU faster, in place; leave the context to undo it."""
    done = [fast_depthwise(module), fast_squeeze_excite(module), fuse_fixed_batchnorm(module, forward)]
    return Undo([each.undo for each in done])
