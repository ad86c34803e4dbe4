"""What this machine computes rightly, and how it keeps its memory."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


def bf16_works(device: torch.device | str = "cpu") -> bool:
    """Does this machine compute in bfloat16 natively, and rightly?

    Hardware without it would emulate, slower than float32. Some library versions computed certain bfloat16
    convolutions wrongly on some processors (2 x 2 kernels, stride 3), so a few small ones are compared with float32,
    forward and backward; the answer is kept for the life of the process.
    """
    return _bf16_works(torch.device(device))


@functools.cache
def _bf16_works(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):  # what is supported is asked of the current one
            native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bf16()
    return native and all(error < 1e-2 for error in bf16_errors(device).values())


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_matrix_units() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in units of their own (Intel's AMX), many times quicker."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def bf16_errors(device: torch.device | str = "cpu") -> dict[str, float]:
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
            # Through a scalar: given a gradient of another shape, PyTorch first imports sympy, for half a second.
            results.append((out.detach(), *torch.autograd.grad((out * grad.to(dtype)).sum(), (a, b))))
    return max(float((half.float() - full).norm() / full.norm()) for full, half in zip(*results, strict=True))


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next allocation instead of giving it back to the system; True if it will.

    A training step on a CPU frees and allocates the same large activations over and over; each round trip through
    the system has every page zeroed and mapped anew. The process then stays at its peak size until it ends. Does
    nothing where the C library is not glibc, nor where the process has a limit (`ulimit -v`, `-d`): once that is
    reached only this C library would have memory, and oneDNN none for the code of a smaller batch.
    """
    if sys.platform != "linux":
        return False
    import resource

    if any(resource.getrlimit(of)[0] != resource.RLIM_INFINITY for of in (resource.RLIMIT_AS, resource.RLIMIT_DATA)):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never_mmap = mallopt(-4, 0)  # M_MMAP_MAX
    never_trim = mallopt(-1, -1)  # M_TRIM_THRESHOLD: no size
    return bool(never_mmap and never_trim)
