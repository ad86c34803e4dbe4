"""Modules of whose forward pass everything is known: PyTorch's, timm's and ours, as they were built."""

from __future__ import annotations

import torch
from torch import fx, nn


def is_stock(model: nn.Module) -> bool:
    """Whether all its modules are PyTorch's, timm's or ours, without hooks, and their BatchNorm keeps statistics.

    Such a one does the same at every call, and in evaluation mode treats each picture by itself. A graph or a script
    may hold anything.
    """
    return all(map(is_stock_module, model.modules()))


def is_stock_module(module: nn.Module) -> bool:
    """`is_stock` of a module without those below it."""
    return (
        type(module).__module__.partition(".")[0] in ("torch", "timm", __package__)
        and not isinstance(module, fx.GraphModule | torch.jit.ScriptModule)
        and is_as_built(module)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is None)
    )


def is_as_built(module: nn.Module) -> bool:
    """Whether nobody has hung anything on the module that may read or change what it takes and gives.

    That is a hook, or a function in place of a method of its class.
    """
    kind = type(module)
    replaced = any(callable(value) and callable(getattr(kind, name, None)) for name, value in vars(module).items())
    return not (module._forward_hooks or module._forward_pre_hooks or replaced)
