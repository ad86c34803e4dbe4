"""A function's kernels on tensors of fixed shapes, recorded as one CUDA graph, which starts them all at once.

A GPU that is quicker than the program that orders its kernels idles between them. See PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Before that a recording that fails leaves PyTorch unwell.
CAN_RECORD = TorchVersion(torch.__version__) >= "2.13"


class Recording:
    """What `call` does with tensors like the examples, with any values in them.

    The graph keeps its tensors and the memory in between for as long as it lives. Whatever is computed with other
    tensors than those given, weights for instance, is read from where it lies at each run.

    Args:
        call: takes the tensors and gives some; called a few times before it is recorded, so that libraries choose
            their kernels and take their memory.
    Raises:
        Exception: whatever an operation raises that no graph takes, such as one that asks for a value.
    """

    def __init__(self, call: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> None:
        device, gradients = examples[0].device, torch.is_grad_enabled()
        # Neither the graph's tensors nor its memory may be inference mode's, which outside of it nobody may write to.
        # To leave that mode is to switch gradients on.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.cuda.device(device):
            self.inputs = [one.clone(memory_format=torch.preserve_format) for one in examples]
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    call(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads go on making batches meanwhile. Where recording fails, `graph` leaves this thread on the
            # side stream, which nobody waits for; the outer context takes it back.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"),
            ):
                self.outputs = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What `call` gives of these, in tensors that the next run writes over."""
        for here, given in zip(self.inputs, inputs, strict=True):
            here.copy_(given, non_blocking=True)
        with torch.cuda.device(self.inputs[0].device):
            self.graph.replay()
        return self.outputs
