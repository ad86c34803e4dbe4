"""BatchNorm that learns from a batch which several processes share: its statistics are those of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SharedStatistics(TorchFunctionMode):
    """Inside, BatchNorm in training mode sees the pictures of all processes as one batch, forward and backward.

    A mode and no exchange of modules: PyTorch's norms, timm's and users' own all call `F.batch_norm`. Every process
    has to run the same layers in the same order, on one picture at least. A backward pass is a call that leaves the
    mode: what computes activations again has to enter it anew.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (shared_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """The sum over all processes; what it is used for in each of them counts in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(total := x.clone())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.distributed.all_reduce(total := grad.clone())
        return total


def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of x [N, C, ...] over all processes, whatever N each of them has."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = (t.double() for t in torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0))
    n = x.numel() // x.shape[1]
    # In float64 the squares lose nothing that matters where a mean is large beside its deviation.
    sums: Tensor = _Sum.apply(torch.stack([torch.full_like(mean, n), n * mean, n * (var + mean.square())]))
    count, total, squares = sums
    mean = total / count
    var = squares / count - mean.square()
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    scale, shift = (t.to(wide.dtype).view(1, -1, *[1] * (x.ndim - 2)) for t in (scale, shift))
    normalised: Tensor = wide * scale + shift
    return normalised.to(x.dtype)
