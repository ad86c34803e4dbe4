"""A frozen module as a fast function: BatchNorm folded, channels-last, bfloat16 or compiled; when compiling pays."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from .errors import in_words
from .fastconv import is_depthwise, scale_and_shift
from .fastops import conv_chains, restore_stock
from .fxtrace import Forward, Whole
from .memory import filled_up, is_out_of_memory
from .numerics import has_matrix_units
from .recording import CAN_RECORD, Recording

# What a compile takes, and the share of a pass that it saves, by device and number format; nothing where none is
# given. The shares come from timm's results files for GPUs and were not measured here.
COMPILE_SECONDS = 40.0
SAVED = {("cuda", torch.float32): 0.3, ("cuda", torch.bfloat16): 0.3}
# On a CPU a compiled network is no quicker than the kernels of `fastops`, neither in float32 nor in bfloat16, but where
# matrix units do the convolutions so quickly that the additions and activations between them count: resnet18 and
# resnet50 save 0.26 and 0.34 there, vit_small 0.08; mobilenetv2_100 and efficientnet_b0 lose
# (benchmarks/frozen_pass.py).
_SAVED_IN_MATRIX_UNITS = 0.25
# What is saved must be this many times what a compile takes: both are estimates.
_SURE = 2.0
# How far, relative, a quick function's output may lie from the module's own. GPUs round the inputs of float32
# convolutions to TF32's 10 bits, as PyTorch has them do unless told otherwise, and folded weights round otherwise.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 5e-3


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """How far, relative, a quick function's output may lie from the module's own there."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return _TF32_TOLERANCE
    return TOLERANCES[dtype]


def share_saved(net: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """The share of a pass of this network that a compiled function saves, as far as it is known; else 0."""
    if device.type == "cpu" and dtype == torch.bfloat16 and has_matrix_units() and _is_of_whole_convolutions(net):
        return _SAVED_IN_MATRIX_UNITS
    return SAVED.get((device.type, dtype), 0.0)


def _is_of_whole_convolutions(net: nn.Module) -> bool:
    """Mostly convolutions, none of which is depthwise."""
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    others = sum(isinstance(module, nn.Linear) for module in net.modules())
    return len(convs) > others and not any(is_depthwise(c.weight, c.groups, c.dilation) for c in convs)


def compile_pays(seconds: float, *, saved: float) -> tuple[bool, str]:
    """Whether a pass of so many seconds is worth a compile, and a line that says why; no line for a short pass.

    Args:
        saved: the share of the pass that a compiled function saves; see `share_saved`.
    """
    pays = seconds * saved >= _SURE * COMPILE_SECONDS
    if not pays and seconds < COMPILE_SECONDS:
        return False, ""
    estimate = f"about {100 * saved:.0f} % of {seconds:,.0f} seconds, for about {COMPILE_SECONDS:.0f}"
    return pays, f"The frozen layers are {'' if pays else 'not '}compiled: that saves {estimate}."


class FrozenForward:
    """A frozen module as a function of its input, without gradients; see `frozen_forward`.

    Attributes:
        module: the module that runs (a changed copy of the original).
        dtype: number format of the weights, the arithmetic and the output.
        folded: how many BatchNorm layers were folded into their convolutions.
        batch_size: every call computes on this many pictures (short ones are filled up and trimmed); None: as given.
        compiled: does a compiled function run? Compilation happens at the first call; where it fails this turns False,
            `compile_error` says why, and the module runs as it is.

        recorded: on a GPU the kernels of the first shape that comes are recorded as one CUDA graph, which starts them
            all at once. Where that fails this turns False; then, and with other shapes, they are started one by one.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        folded: int,
        batch_size: int | None,
        compiled: bool,
        recorded: bool,
    ) -> None:
        self.module, self.dtype, self.folded, self.batch_size = module, dtype, folded, batch_size
        self.compiled, self.compile_error = compiled, ""
        self._graph: _Recorded | None = None
        self._records = recorded and not compiled
        self._call: Callable[[Tensor], Tensor] = (
            torch.compile(module, dynamic=False, options={"freezing": True}) if compiled else module
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Float pixels or activations [N, ...] in any float format -> the module's output, in `dtype`."""
        n = len(x)
        x = filled_up(x, self.batch_size or n).to(self.dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = self._run(x)[:n]
        return result

    def _run(self, x: Tensor) -> Any:
        if not self.compiled:
            return self._replayed(x) if x.is_cuda and self._records else self._call(x)
        try:
            return self._call(x)
        except Exception as error:  # no compiler, a broken cache, an operation inductor cannot do: all recoverable
            self.compiled, self.compile_error = False, in_words(error)
            self._call = self.module
            if is_out_of_memory(error):  # smaller batches may do, which are not filled up any more
                self.batch_size = None
                raise
            return self._call(x)

    def _replayed(self, x: Tensor) -> Any:
        if self._graph is None:
            try:
                self._graph = _Recorded(self._call, x)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an operation that no graph takes: it computes the same without one
                self._records = False
                return self._call(x)
        return self._graph(x) if self._graph and self._graph.shape == x.shape else self._call(x)


class _Recorded:
    """A function of one tensor as a `Recording`, checked on another input.

    Raises:
        RuntimeError: what was recorded does not give what the function gives.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], example: Tensor) -> None:
        with torch.no_grad():
            self._recording = Recording(lambda x: [call(x)], [example])
            other = example.flip(0)
            if not torch.allclose(self(other), call(other), rtol=1e-2, atol=1e-2):
                raise RuntimeError("the graph gives another result")

    @property
    def shape(self) -> torch.Size:
        return self._recording.inputs[0].shape

    def __call__(self, x: Tensor) -> Tensor:
        return self._recording(x)[0].clone(memory_format=torch.preserve_format)  # the next run writes over it


def frozen_forward(
    module: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    recorded: bool = False,
    batch_size: int | None = None,
    forward: Forward = nn.Module.__call__,
    finish: Forward | None = None,
) -> FrozenForward:
    """A fast inference copy of a frozen module: BatchNorm folded, channels-last, in `dtype`.

    The original is left alone. Folding changes float32 results by about 1e-6 relative; bfloat16 by one to a few per
    cent. Bits are equal from call to call only for one batch size and one number of threads, so give `batch_size`
    where they must be.

    Args:
        dtype: float32, or bfloat16 where `bf16_works`.
        compiled: also compile with inductor's freezing, at the first call (tens of seconds; wants a C++ compiler on
            a CPU); each further batch shape costs as much again, so give `batch_size` too.
        recorded: see `FrozenForward`; left out where `CAN_RECORD` says so.
        forward: what of the module to run; what cannot be recorded as a graph keeps its BatchNorm as it is.
        finish: what is done with its result, given the module, too; this need not be recordable.
    """
    copy = deepcopy(module).eval().requires_grad_(False)
    restore_stock(copy)
    pairs = [(chain.conv, chain.norm) for chain in conv_chains(copy, forward) if chain.norm]
    for pair in pairs:
        _fold(copy, *pair)
    copy.to(dtype).to(memory_format=torch.channels_last)
    if finish is not None:
        copy = Whole(copy, lambda net, x: finish(net, forward(net, x))).eval()
    elif forward is not nn.Module.__call__:
        copy = Whole(copy, forward).eval()
    return FrozenForward(
        copy, dtype=dtype, folded=len(pairs), batch_size=batch_size, compiled=compiled,
        recorded=recorded and CAN_RECORD,
    )  # fmt: skip


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv = cast(nn.Conv2d, module.get_submodule(conv_name))
    norm = cast(nn.BatchNorm2d, module.get_submodule(norm_name))
    with torch.no_grad():
        scale, shift = scale_and_shift(norm)
        bias = shift if conv.bias is None else shift + conv.bias * scale
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bias.clone(), requires_grad=False)
    module.set_submodule(norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
