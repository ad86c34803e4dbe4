"""Where and how to compute: device, number format, worker threads, and this process's place among several."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from .errors import RecipeError, SetupError
from .memory import Portion
from .numerics import bf16_works, keep_freed_memory
from .owners import launched
from .terminal import say

if sys.platform != "win32":
    import resource

GPU_SHARE = 0.2  # of a GPU's free memory: what one thing kept there, a split's pictures or rows, may take

_CGROUP = Path("/sys/fs/cgroup")
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """One process's means. `dtype` is what convolutions and matrix products compute in; weights stay float32.

    compile: whether a frozen pass is compiled: `on`, `off`, or `auto`, where that pays; see `frozenpass.compile_pays`.
    times_formats: a training step is timed in `dtype` and in float32 first, and computed in the quicker one.
    portion: how many pictures go through a network at once where no gradients are computed; all runtimes made from this
    one by `dataclasses.replace` share it.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    workers: int = 2
    rank: int = 0
    world: int = 1
    compile: str = "auto"
    times_formats: bool = False
    portion: Portion = field(default_factory=lambda: Portion(tell=say), compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @property
    def gpu(self) -> torch.device | None:
        """The device, where it is a GPU whose memory may hold pictures and what is made of them."""
        return self.device if self.device.type == "cuda" else None

    @property
    def generators(self) -> list[torch.device]:
        """Devices whose random numbers are drawn, beside the CPU's: what `fork_rng` wants to know."""
        return [self.device] if self.device.type == "cuda" else []

    @property
    def batch_size(self) -> int:
        """How many pictures at once where no gradients are computed: with fewer a GPU idles, a CPU is no quicker."""
        return 256 if self.gpu else 32

    def filled(self, n: int, full: int) -> int:
        """How many rows a short batch of n is filled up to, where batches are of `full` rows as a rule.

        On a GPU cuDNN makes a plan for every shape that comes, and for depthwise convolutions compiles a kernel, some
        tenths of a second each. Powers of two are few, and no batch takes more than twice as long.
        """
        return n if self.gpu is None or not 0 < n < full else min(full, 1 << (n - 1).bit_length())

    def holds(self, nbytes: int) -> bool:
        """Whether the memory of a GPU has room for so much of one thing."""
        return self.gpu is not None and nbytes <= GPU_SHARE * free_bytes(self.gpu)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in `dtype` inside this context; float32 inside means nothing is changed."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def alone(self) -> Runtime:
        """The same means without the other processes: for work that each of them does whole."""
        return replace(self, rank=0, world=1)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of `rows`: every world-th one, from its own rank on."""
        return rows[self.rank :: self.world]

    def gather(self, part: Tensor, n: int) -> Tensor:
        """The inverse of `share`: all `n` rows in order, from every process's part [n_rank, ...]."""
        if self.world == 1:
            return part
        longest = -(-n // self.world)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(parts, padded.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)[:n]

    def agrees(self, flag: bool) -> bool:
        """Whether `flag` is true in every process: what only some of them have found, none may rely on."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(votes)
        return int(votes) == self.world

    def least(self, number: int) -> int:
        """The smallest number that any process has."""
        if self.world == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
        return int(numbers)

    def follow_main(self, tensors: Iterable[Tensor]) -> None:
        """Put what the main process holds into the same tensors of every other one."""
        if self.world == 1:
            return
        for tensor in tensors:
            held = tensor.contiguous()
            torch.distributed.broadcast(held, src=0)
            tensor.copy_(held)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of all processes; each process has divided its loss by the whole batch's weight."""
        if self.world == 1:
            return
        held = [p for p in parameters if p.requires_grad]
        # A process whose share of the batch is empty has no gradients, but must take part in the sum all the same.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held])
        torch.distributed.all_reduce(flat)
        for p, total in zip(held, flat.split([p.numel() for p in held]), strict=True):
            # In the parameter's own memory layout (channels-last, say): fused optimisers pair the two by their places.
            p.grad = torch.empty_like(p).copy_(total.view(p.shape))


def prefetch(
    prepare: Callable[[Job], Result], jobs: Iterable[Job], *, pool: ThreadPoolExecutor | None, ahead: int
) -> Iterator[Result]:
    """`prepare` of each job, in order, done `ahead` of its use by a pool's threads; without a pool, when asked for."""
    if pool is None:
        yield from map(prepare, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(prepare, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def free_memory_bytes() -> int:
    """Memory this process may still take: what the system has left, or its container or `ulimit` where less."""
    free = psutil.virtual_memory().available
    if sys.platform != "win32":
        taken = psutil.Process().memory_info()
        for of, size in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, getattr(taken, "data", 0))):
            most = resource.getrlimit(of)[0]
            if most != resource.RLIM_INFINITY:
                free = min(free, most - size)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        counted = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        files = int(counted["inactive_file"]) + int(counted["active_file"])  # read files, dropped when room is needed
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()) + files)
    except (OSError, ValueError, KeyError):  # no such limit here, or "max"
        pass
    return max(0, int(free))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take where `device` keeps its tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, and unused
        return int(torch.cuda.mem_get_info(device)[0]) + int(kept)
    return free_memory_bytes()


def make_runtime(
    *, device: str = "auto", precision: str = "auto", workers: int | None = None, compile: str = "auto"
) -> Runtime:
    """Choose device and number format; under `accelerate launch` also this process's rank.

    Args:
        device: `auto` (a GPU where there is one) or a torch device such as `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: `fp32`, `bf16`, or `auto`: bf16 where the machine computes in it natively and a start-up
            self-test of its kernels passes, else fp32; and on a CPU a training step only where it is quicker so. On a
            CPU the process also keeps freed memory from now on.
        workers: threads that decode and augment pictures; None means one per core, at most 8.
        compile: `on` compiles what is frozen before it runs over the pictures, `off` never does, `auto` does where so
            many pictures go through it that the time comes back.
    Raises:
        SetupError: no such device. RecipeError: unknown precision or compile.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise RecipeError(f"precision is {precision!r}; allowed: auto, fp32, bf16.")
    if compile not in ("auto", "on", "off"):
        raise RecipeError(f"compile is {compile!r}; allowed: auto, on, off.")
    if workers is not None and workers < 1:
        raise RecipeError(f"workers is {workers}; it takes a whole number from 1.")
    rank, world = 0, launched()[1]
    chosen = find_device(device, shared=world > 1)
    if world > 1:
        from accelerate import PartialState

        state = PartialState(cpu=chosen.type == "cpu")
        rank, world, chosen = state.process_index, state.num_processes, state.device
    if precision == "auto":
        dtype = torch.bfloat16 if bf16_works(chosen) else torch.float32
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if chosen.type == "cpu":
        keep_freed_memory()
    times_formats = precision == "auto" and dtype != torch.float32 and chosen.type == "cpu"
    return Runtime(chosen, dtype, workers or min(8, os.cpu_count() or 1), rank, world, compile, times_formats)


def find_device(name: str, *, shared: bool = False) -> torch.device:
    """The device of this name, `auto` included, once it was used; one that is `shared` by several processes is not
    touched: each is given its own.

    Raises:
        SetupError: it cannot be used here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if shared and device.type == "cuda" and torch.cuda.is_available():
            return device
        # With its number: which one is the current one is a matter of each thread.
        device = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SetupError(
            f"Device {name!r} cannot be used here ({reason}). Pass --device cpu, or leave it out: auto chooses."
        ) from None
    return device
