"""A GPU that is not there: tensors on it have shapes, places and formats, but no values."""

from __future__ import annotations

from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class PretendedGpu(TorchDispatchMode):
    """Inside, `cuda` takes tensors: what is computed there has no values, while the CPU computes as ever.

    waits: each operation for which the program would have waited until the GPU had done all its work: a copy to it
    from memory that is not pinned, unless it is a `non_blocking` one; a copy from it; a value that is asked for (which
    also raises, for there is none). Source: PyTorch's notes on CUDA semantics.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __enter__(self) -> Self:
        self._no_driver = mock.patch("torch.cuda._lazy_init")
        self._no_driver.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._no_driver.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places = {leaf.device.type for leaf in tensors} | {
            leaf.type for leaf in leaves if isinstance(leaf, torch.device)
        }
        if "cuda" not in places and not any(isinstance(leaf, FakeTensor) for leaf in tensors):
            return func(*args, **kwargs)
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in _SYNCS and "cuda" in places:
            self.waits.append(name)
        if name in ("_to_copy", "copy_"):
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if places == {"cpu", "cuda"} and blocking:
                self.waits.append(f"{name} {[tuple(one.shape) for one in tensors]} {kwargs}")
        if func.namespace == "aten" and func._can_decompose():
            with self:  # as in inference mode, where an operation comes here before it is taken apart
                return func.decompose(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)
