"""Faster arithmetic for what is trained: depthwise convolutions whose slow CPU kernels are avoided, fixed BatchNorm
fused into its convolution, bfloat16 where the machine has it and computes it rightly.

Modules are changed in place by exchanging their class, so that parameters, buffers, names and hooks stay what they
were, and every change can be undone. Nothing here knows of classifiers or freeze lines.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, fx, nn

from .cut import Forward, Whole, trace

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
        scale, shift = _scale_and_shift(norm)
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


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
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


class _FusedNormAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if self.training else self.act(self.drop(x))  # type: ignore[no-untyped-call]
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


class FrozenForward:
    """A frozen module as a function of its input, without gradients; see `frozen_forward`.

    Attributes:
        module: the module that runs (a changed copy of the original).
        dtype: number format of the weights, the arithmetic and the output.
        folded: how many BatchNorm layers were folded into their convolutions.
        batch_size: every call computes on this many pictures (short ones are filled up and trimmed); None: as given.
        compiled: does a compiled function run? Compilation happens at the first call; where it fails this turns False,
            `compile_error` says why, and the module runs as it is.
    """

    def __init__(
        self, module: nn.Module, *, dtype: torch.dtype, folded: int, batch_size: int | None, compiled: bool
    ) -> None:
        self.module, self.dtype, self.folded, self.batch_size = module, dtype, folded, batch_size
        self.compiled, self.compile_error = compiled, ""
        self._call: Callable[[Tensor], Tensor] = (
            torch.compile(module, dynamic=False, options={"freezing": True}) if compiled else module
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Float pixels or activations [N, ...] in any float format -> the module's output, in `dtype`."""
        n = len(x)
        if self.batch_size is not None and n < self.batch_size:
            x = torch.cat([x, x[-1:].expand(self.batch_size - n, *x.shape[1:])])
        x = x.to(self.dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = self._run(x)[:n]
        return result

    def _run(self, x: Tensor) -> Any:
        if not self.compiled:
            return self._call(x)
        try:
            return self._call(x)
        except Exception as error:  # no compiler, a broken cache, an operation inductor cannot do: all recoverable
            self.compiled, self.compile_error = False, f"{type(error).__name__}: {error}"
            self._call = self.module
            return self._call(x)


def frozen_forward(
    module: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    batch_size: int | None = None,
    forward: Forward = nn.Module.__call__,
) -> FrozenForward:
    """A fast inference copy of a frozen module: BatchNorm folded, channels-last, in `dtype`.

    The original is left alone. Folding changes float32 results by about 1e-6 relative; bfloat16 by one to a few per
    cent. Bits are equal from call to call only for one batch size and one number of threads, so give `batch_size`
    where they must be.

    Args:
        dtype: float32, or bfloat16 where `bf16_works`.
        compiled: also compile with inductor's freezing, at the first call (tens of seconds; wants a C++ compiler on
            a CPU); each further batch shape costs as much again, so give `batch_size` too.
        forward: what of the module to run.
    """
    copy = deepcopy(module).eval().requires_grad_(False)
    _restore_stock(copy)
    pairs = conv_norm_pairs(copy, forward)
    for conv_name, norm_name in pairs:
        _fold(copy, conv_name, norm_name)
    copy.to(dtype).to(memory_format=torch.channels_last)
    if forward is not nn.Module.__call__:
        copy = Whole(copy, forward).eval()
    return FrozenForward(copy, dtype=dtype, folded=len(pairs), batch_size=batch_size, compiled=compiled)


def _restore_stock(module: nn.Module) -> None:
    for m in module.modules():
        for key in ("norm", "depthwise"):
            m.__dict__.pop(key, None) if type(m) in _FAST_CONV.values() else None
        m.__class__ = _stock_class(m)


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv = cast(nn.Conv2d, module.get_submodule(conv_name))
    norm = cast(nn.BatchNorm2d, module.get_submodule(norm_name))
    with torch.no_grad():
        scale, shift = _scale_and_shift(norm)
        bias = shift if conv.bias is None else shift + conv.bias * scale
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bias.clone(), requires_grad=False)
    module.set_submodule(norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())


def bf16_works(device: torch.device | str = "cpu") -> bool:
    """Does this machine compute in bfloat16 natively, and rightly?

    Hardware without it would emulate, slower than float32. Some library versions computed certain bfloat16
    convolutions wrongly on some processors (2 x 2 kernels, stride 3), so a few small ones are compared with float32,
    forward and backward; the answer is kept for the life of the process.
    """
    return _bf16_works(torch.device(device).type)


@functools.cache
def _bf16_works(kind: str) -> bool:
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = kind == "cpu" and _cpu_has_bf16()
    return native and all(error < 1e-2 for error in bf16_errors(kind).values())


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


# name: (input channels, output channels, kernel, stride, groups) of the convolutions that bf16 is tried on
_TRIALS: dict[str, tuple[int, int, int, int, int]] = {
    "1x1": (16, 32, 1, 1, 1),
    "3x3": (16, 16, 3, 1, 1),
    "3x3 stride 2": (16, 16, 3, 2, 1),
    "5x5 stride 2": (16, 16, 5, 2, 1),
    "2x2 stride 2": (16, 16, 2, 2, 1),
    "3x3 stride 3": (16, 16, 3, 3, 1),
    "depthwise 3x3": (32, 32, 3, 1, 32),
    "depthwise 5x5 stride 2": (32, 32, 5, 2, 32),
}


def bf16_errors(device: str = "cpu") -> dict[str, float]:
    """Relative error, |bf16 - fp32| / |fp32|, of a few operations and their gradients; the largest of each.

    Right arithmetic gives 2e-3 to 4e-3 (bfloat16 has 8 significant bits); a wrong kernel gives about 1.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # Rounded to bfloat16 first, so that both formats start from the same numbers.
        values = torch.randn(shape, generator=generator).to(torch.bfloat16).to(device)
        return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values

    errors = {"matmul": _error(torch.mm, draw(64, 96), draw(96, 48), draw(64, 48))}
    for name, (into, out, kernel, stride, groups) in _TRIALS.items():
        convolve = functools.partial(F.conv2d, stride=stride, padding=(kernel - 1) // 2, groups=groups)
        x, weight = draw(2, into, 12, 12), draw(out, into // groups, kernel, kernel)
        errors[name] = _error(convolve, x, weight, draw(*convolve(x.float(), weight.float()).shape))
    return errors


def _error(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> float:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            out = function(a, b)
            results.append((out.detach(), *torch.autograd.grad(out, (a, b), grad.to(dtype))))
    return max(float((half.float() - full).norm() / full.norm()) for full, half in zip(*results, strict=True))


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next allocation instead of giving it back to the system; True if it will.

    A training step on a CPU frees and allocates the same large activations over and over; each round trip through
    the system has every page zeroed and mapped anew. The process then stays at its peak size until it ends. Does
    nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never_mmap = mallopt(-4, 0)  # M_MMAP_MAX
    never_trim = mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return bool(never_mmap and never_trim)


def fast_training(module: nn.Module, forward: Forward = nn.Module.__call__) -> Undo:
    """Everything here that makes a training step on a CPU faster, in place; leave the context to undo it."""
    done = [fast_depthwise(module), fast_squeeze_excite(module), fuse_fixed_batchnorm(module, forward)]
    return Undo([each.undo for each in done])
