"""Memory that runs out is met with smaller batches; the memory that a computation takes, measured."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import SetupError, in_words

# What PyTorch's CPU allocator says, on Linux, on Windows, what the system's own words for it are, and how oneDNN, which
# allocates for itself, puts it. That it cannot create a descriptor says that it does not know the operation.
_CPU_WORDS = re.compile(
    "can't allocate memory|not enough memory|cannot allocate memory|bad allocation|bad_alloc"
    "|could not create a (primitive|memory)(?! descriptor)"
)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a CUDA GPU is not waited for, which reads what it is sent before the call returns.

    Other devices may read later, when a passing tensor is no longer there.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def ready(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where a GPU fetches it itself, in its own time: from other memory perhaps the sending thread waits."""
    is_to_be_pinned = device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    return tensor.pin_memory() if is_to_be_pinned else tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, or of the CPU, whose allocator raises a plain RuntimeError.

    Errors raised while one was handled, or because of one, count as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and _CPU_WORDS.search(str(seen).lower()):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def equal_parts(n: int, count: int) -> list[int]:
    """n as a sum of `count` numbers, as equal as can be, the larger ones first."""
    return [n // count + (i < n % count) for i in range(count)]


@dataclass
class Portion:
    """How many pictures go through a network at once: a whole batch, or fewer once memory has run out.

    size: the most at once; None is a whole batch. least: never fewer than this (BatchNorm that learns wants two).
    tell: is given the line that says what happened. events: the same as records, for who keeps them; see `take`.
    """

    size: int | None = None
    least: int = 1
    tell: Callable[[str], None] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def parts(self, n: int) -> list[int]:
        """The sizes of the parts in which a batch of n is computed, as equal as can be."""
        count = max(1, min(-(-n // (self.size or n)), n // self.least)) if n else 1
        return equal_parts(n, count)

    def halve(self, n: int, error: BaseException, *, doing: str) -> None:
        """Memory ran out with a batch of n: half as many at once from now on.

        Raises:
            SetupError: there is nothing left to halve.
        """
        now = max(self.parts(n))
        self.size = max(self.least, now // 2)
        if max(self.parts(n)) >= now:
            raise SetupError(
                f"Out of memory {doing}, with {now} picture{'s' * (now != 1)} at once, which is the least"
                f" ({in_words(error)}). Take a smaller --image-size or --backbone, move the freeze line"
                " back (--freeze-line), switch --checkpointing on, or free memory."
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"Out of memory {doing}: {self.size} picture{'s' * (self.size != 1)} at once from now on, {now} before"
        self.note("out-of-memory", f"{text}; results stay the same within rounding.")

    def note(self, kind: str, message: str) -> None:
        """Tell and keep what was decided."""
        self.events.append({"kind": kind, "message": message, "at_once": self.size})
        if self.tell:
            self.tell(message)

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        taken, self.events = self.events, []
        return taken


def filled_up(batch: Tensor, size: int) -> Tensor:
    """A batch of `size` rows, the last of which are its last one again; whole ones are left as they are."""
    n = len(batch)
    return batch if n >= size else torch.cat([batch, batch[-1:].expand(size - n, *batch.shape[1:])])


def in_portions(
    compute: Callable[[Tensor], Tensor], batch: Tensor, portion: Portion, *, doing: str, size: int = 0
) -> Tensor:
    """`compute(batch)` without gradients, in as many parts as memory asks for; the first dimension is the pictures'.

    size: what a shorter batch is filled up to for it; see `Runtime.filled`.
    """
    n, batch = len(batch), filled_up(batch, size)
    while True:
        try:
            parts = [compute(part) for part in batch.split(portion.parts(len(batch)))]
            return (parts[0] if len(parts) == 1 else torch.cat(parts))[:n]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            portion.halve(len(batch), error, doing=doing)


class _Watch(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def drop(_: object) -> None:
            self.now -= nbytes
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, drop)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Memory that a computation takes at its peak beyond what was there before, backward pass included.

    On a GPU what the allocator has counted; elsewhere the tensors alive at once, without the scratch space that
    single kernels take and give back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with _Watch() as watch:
        compute()
    return int(watch.peak)
