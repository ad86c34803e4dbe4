"""PyTorch's settings for a whole process or thread: a caller's do not reach what is computed here, and are as they were
afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_settings(*, draws: bool = False) -> Iterator[None]:
    """Float32 unless something else is asked for, gradients where they are, and no autocast but our own.

    Args:
        draws: random numbers are drawn or seeded here: the caller's, of the CPU and of GPUs that are in use, go on
            afterwards as if they had not been. Not for what draws none: put back, they are again what they were when it
            began, and other threads would draw the same ones twice.
    """
    dtype = torch.get_default_dtype()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        if draws:
            stack.enter_context(torch.random.fork_rng(devices=gpus))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if dtype is not torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
