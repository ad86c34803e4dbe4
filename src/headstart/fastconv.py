"""Convolutions with faster arithmetic on a CPU: gradients of depthwise and 1 x 1 ones by quicker ways than the stock
kernels, fixed BatchNorm and the activation after it done by the convolution itself.

Nothing here changes a module; `fastops` exchanges them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

_backward = torch.ops.aten.convolution_backward

# oneDNN's depthwise weight-gradient kernel (`jit_dw`) takes kernels up to this wide, of any height; wider ones go to
# a kernel that pads every channel to a 16 x 16 block (ONEDNN_VERBOSE=1, oneDNN 3.13).
STRIP = 3

_CHUNK_BYTES = 4 << 20  # float32 copies of this size stay in the cache; measured best between 2 and 8 MB

# Activations that oneDNN applies while a convolution writes its output, and how its operation is told of them.
Fused = tuple[str, tuple[float, ...], str]
FUSED: dict[type, Fused] = {
    nn.ReLU: ("relu", (), ""),
    nn.ReLU6: ("hardtanh", (0.0, 6.0), ""),
    nn.SiLU: ("swish", (), ""),
    nn.Hardswish: ("hardswish", (), ""),
}
# How far a fused activation may lie from one that is done apart, relative and absolute. In bfloat16 the one is applied
# before the result is rounded, the other after: the same bits for ReLU and ReLU6, another rounding for the two others.
# In both formats oneDNN's ReLU and ReLU6 give 0 for NaN: weights are looked at instead, when loaded and after an epoch.
_ROUNDING = {torch.float32: (1e-5, 1e-8), torch.bfloat16: (2e-2, 1e-2)}
# The gradient of these two can be told from the result alone, so that training needs no pass of its own for them.
_FROM_RESULT = (nn.ReLU, nn.ReLU6)


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
    reach = (grad.shape[3] - 1) * stride[1] + STRIP  # input columns that one strip meets
    starts = [*range(0, width - STRIP, STRIP), width - STRIP]
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    bias_grad = None
    for start in starts:
        left = padding[1] - start
        view = F.pad(x, (left, reach - left - x.shape[3]))  # negative padding crops
        _, strip, sums = _backward(
            grad, view, weight[..., :STRIP].contiguous(), [weight.shape[0]], stride, [padding[0], 0], [1, 1],
            False, [0, 0], weight.shape[0], [False, True, bias and start == 0],
        )  # fmt: skip
        result[..., start : start + STRIP] = strip
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


class Convolution(torch.autograd.Function):
    """A convolution with the stock result, an activation done with it, and a backward that avoids slow CPU kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        act: Fused | None,
    ) -> Tensor:
        where = (stride, padding, dilation, groups)
        out = F.conv2d(x, weight, bias, *where) if act is None else _with_activation(x, weight, bias, *where, act)
        ctx.save_for_backward(x, weight, None if act is None else out)
        ctx.where, ctx.act = where, act
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.where
        if ctx.act is not None:
            grad = _activation_gradient(grad, out, ctx.act)
        want_x, want_w, want_b = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_b = None
        if _may_be_products(grad, x, weight, stride, padding, groups):
            of_input, of_weight = products_pay()
            found = pointwise_gradients(
                grad, x, weight, want_x and of_input, want_w and of_weight, want_b and of_weight
            )
            grad_x, grad_w, grad_b = found
            want_x, want_w, want_b = want_x and not of_input, want_w and not of_weight, want_b and not of_weight
        elif writes_past_its_memory(weight.shape, stride, padding, groups) and grad.dtype == x.dtype == torch.float32:
            read = x[:, :, :: stride[0], :: stride[1]]
            _, grad_w, grad_b = pointwise_gradients(grad, read, weight, False, want_w, want_b)
            want_w = want_b = False
        elif is_depthwise(weight, groups, dilation):
            where = {"stride": stride, "padding": padding}
            if want_x and x.dtype == torch.bfloat16 and max(stride) > 1:
                grad_x, want_x = depthwise_grad_input(grad, x, weight, **where), False
            if want_w and weight.shape[3] > STRIP:
                grad_w, grad_b = depthwise_grad_weight(grad, x, weight, bias=want_b, **where)
                want_w = want_b = False
        if want_x or want_w or want_b:
            rest = _backward(
                grad, x, weight, [weight.shape[0]], stride, padding, dilation,
                False, [0, 0], groups, [want_x, want_w, want_b],
            )  # fmt: skip
            had = (grad_x, grad_w, grad_b)
            grad_x, grad_w, grad_b = (new if old is None else old for new, old in zip(rest, had, strict=True))
        return grad_x, grad_w, grad_b, None, None, None, None, None


def is_depthwise(weight: Tensor, groups: int, dilation: tuple[int, ...]) -> bool:
    """One kernel for each channel, undilated: what the remedies of the gradients are for."""
    return 1 < groups == weight.shape[0] and weight.shape[1] == 1 and tuple(dilation) == (1, 1)


def is_pointwise(kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], groups: int) -> bool:
    """A matrix product of all pixels."""
    return tuple(kernel) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0) and groups == 1


def writes_past_its_memory(
    weight: Sequence[int], stride: tuple[int, ...], padding: tuple[int, ...], groups: int
) -> bool:
    """Is this a convolution of whose weights oneDNN's kernel for AVX2 computes the gradient beyond its own memory?

    1 x 1 with a stride, of fewer than eight channels, channels-last: as RepVGG, MobileOne and FastViT begin. The
    process then ends in a crash, or goes on with damaged memory (PyTorch 2.14, AMD Zen 3).

    Args:
        weight: its shape, [C, D, 1, 1].
    """
    is_small = tuple(weight[2:]) == (1, 1) and weight[1] < 8 and groups == 1
    return is_small and max(stride) > 1 and tuple(padding) == (0, 0)


@functools.cache
def products_pay() -> tuple[bool, bool]:
    """Are MKL's matrix products quicker here than oneDNN's gradients of 1 x 1 convolutions?

    That of the input, and those of weight and bias. Measured on Intel's CPUs with AVX-512, where both are, and on
    AMD's without, where oneDNN takes long for the bias.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False, False
    if not torch.backends.mkl.is_available():
        return False, False
    return "GenuineIntel" in cpu, "GenuineIntel" in cpu or ("AuthenticAMD" in cpu and "avx512f" not in cpu)


def _may_be_products(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> bool:
    return (
        is_pointwise(weight.shape[2:], stride, padding, groups)
        and grad.dtype == x.dtype == torch.float32
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in (grad, x))
    )


def pointwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_w: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a 1 x 1 convolution's input, weight and bias as matrix products, where asked for.

    Args:
        grad: gradient of the output, [N, C, H, W], channels-last.
        x: input, [N, D, H, W], channels-last.
        weight: [C, D, 1, 1].
    """
    c, d = weight.shape[:2]
    n, _, height, width = x.shape
    of_pixels, pixels = grad.permute(0, 2, 3, 1).reshape(-1, c), x.permute(0, 2, 3, 1).reshape(-1, d)
    grad_x = grad_w = grad_b = None
    if want_x:
        grad_x = (of_pixels @ weight.view(c, d)).view(n, height, width, d).permute(0, 3, 1, 2)
    if want_w:  # the narrow one in front: up to half as long again the other way round
        grad_w = (pixels.T @ of_pixels).T.contiguous() if d < c else of_pixels.T @ pixels
        grad_w = grad_w.view(c, d, 1, 1)
    if want_b:
        grad_b = of_pixels.T @ of_pixels.new_ones(len(of_pixels))  # quicker than a sum over the long side
    return grad_x, grad_w, grad_b


def _with_activation(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """The activation is applied while the output is written, which saves reading and writing it once more."""
    stride, padding, dilation, groups, (name, scalars, algorithm) = how
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, name, list(scalars), algorithm
    )
    return out


def _activation_gradient(grad: Tensor, out: Tensor, act: Fused) -> Tensor:
    if act == FUSED[nn.ReLU6]:
        wanted: Tensor = torch.ops.aten.hardtanh_backward(grad, out, 0.0, 6.0)
    else:
        wanted = torch.ops.aten.threshold_backward(grad, out, 0.0)
    return wanted


@functools.cache
def activations_fuse(dtype: torch.dtype) -> bool:
    """Does PyTorch's own, undocumented operation for this run here, and compute what the two steps do?"""
    if dtype not in _ROUNDING:
        return False
    x = torch.linspace(-9, 9, 2 * 8 * 5 * 5, dtype=dtype).view(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.linspace(-1, 1, 8 * 8, dtype=dtype).view(8, 8, 1, 1)
    rtol, atol = _ROUNDING[dtype]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            plain = F.conv2d(x, weight)
            return all(
                torch.allclose(
                    _with_activation(x, weight, None, (1, 1), (0, 0), (1, 1), 1, how), act()(plain), rtol, atol
                )
                for act, how in FUSED.items()
            )
    except (AttributeError, RuntimeError):  # another build of PyTorch, without it
        return False


class _FastConv(nn.Conv2d):
    """A convolution that may use `Convolution`, carry the scale and shift of a fixed BatchNorm, and do its activation.

    Marks on the instance: gradients: the stock ones are slow. norm: the BatchNorm after it. act: the activation
    after it, or after the norm; done here while the norm's statistics are fixed.
    """

    gradients: bool = False

    def forward(self, input: Tensor) -> Tensor:
        norm, act = self.__dict__.get("norm"), self.__dict__.get("act")
        if norm is None:
            return self._convolve(input, self.weight, self.bias, act)
        if norm.training:
            return self._convolve(input, self.weight, self.bias, None)
        scale, shift = scale_and_shift(norm)
        shift = shift if self.bias is None else shift + self.bias * scale
        return self._convolve(input, self.weight * scale[:, None, None, None], shift, act)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module | None) -> Tensor:
        padding = cast("tuple[int, int]", self.padding)
        if isinstance(self, Conv2dSame):
            x = pad_same(x, list(weight.shape[-2:]), list(self.stride), list(self.dilation))
        where = (self.stride, padding, self.dilation, self.groups)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        fused = _how_to_fuse(act, x, trains=trains)
        if fused is None and not (self.gradients and trains and x.device.type == "cpu"):
            out = F.conv2d(x, weight, bias, *where)
        else:
            if torch.is_autocast_enabled("cpu"):
                x, weight, bias = (_autocast(t) for t in (x, weight, bias))
            if fused is not None and not trains:
                return _with_activation(x, weight, bias, *where, fused)
            out = cast(Tensor, Convolution.apply(x, weight, bias, *where, fused))
        return out if act is None or fused is not None else activate(act, out)


def _how_to_fuse(act: nn.Module | None, x: Tensor, *, trains: bool) -> Fused | None:
    """How oneDNN is told to do an activation; None where it cannot, or its gradient needs what was there before."""
    if act is None or x.device.type != "cpu" or (trains and stock_activation(act) not in _FROM_RESULT):
        return None
    dtype = _autocast_dtype(x) if torch.is_autocast_enabled("cpu") else x.dtype
    return FUSED.get(stock_activation(act)) if torch.backends.mkldnn.enabled and activations_fuse(dtype) else None


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """An activation of a fresh tensor, by what its class was before any exchange."""
    kind = stock_activation(act)
    if kind is nn.ReLU6 and getattr(act, "inplace", False) and x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, InPlaceReLU6.apply(x))
    return cast(Tensor, kind.forward(act, x))


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
        return _activation_gradient(grad, result, FUSED[nn.ReLU6])


class Done(nn.Module):
    """What the class of an activation is exchanged for while its convolution does it.

    Marks on the instance: stock: the class it had. norm: a BatchNorm between the two, or None.
    """

    def forward(self, input: Tensor) -> Tensor:
        norm = self.__dict__["norm"]
        return input if norm is None or not norm.training else activate(self, input)


def stock_activation(act: nn.Module) -> type[nn.Module]:
    """The activation's class before any exchange."""
    return cast("type[nn.Module]", act.__dict__.get("stock", type(act)))


class FastConv2d(_FastConv):
    """`torch.nn.Conv2d`, exchanged in place."""


class FastConv2dSame(_FastConv, Conv2dSame):
    """timm's `Conv2dSame` (padding as TensorFlow does it), exchanged in place."""


def _autocast(tensor: Tensor | None) -> Any:
    """What autocast does to an argument of a convolution: any float but float64 becomes the autocast format."""
    return None if tensor is None else tensor.to(_autocast_dtype(tensor))


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    stays = not tensor.is_floating_point() or tensor.dtype == torch.float64
    return tensor.dtype if stays else torch.get_autocast_dtype("cpu")


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """y = x * scale + shift, what a BatchNorm with fixed statistics computes, differentiable in its affine part."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = torch.rsqrt(var + norm.eps)
    if not norm.affine:
        return scale, -mean * scale
    scale = norm.weight * scale
    return scale, norm.bias - mean * scale
