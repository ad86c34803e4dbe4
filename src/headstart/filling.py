"""The rows that a frozen part makes of pictures, put in place batch by batch, in memory, on a GPU or on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .errors import SetupError
from .fxtrace import Forward
from .memory import sent
from .rowstore import RowStore
from .runtime import Runtime, free_memory_bytes
from .terminal import file_size

MEMORY_SHARE = 0.8  # rows held in memory may take this much of what is free


@dataclass(frozen=True)
class Stored:
    """What a function gave for every picture and view.

    Attributes:
        rows: [K * N, ...], view after view, so that fewer views are the beginning of more.
        channels_last: the rows are feature maps that lie as [H, W, C].
        dtype: the format in which they were computed; they may be kept in a shorter one.
    """

    rows: Tensor
    channels_last: bool
    dtype: torch.dtype

    def take(self, places: Tensor) -> Tensor:
        """Rows in the layout and format in which they were computed."""
        chosen = self.rows.index_select(0, sent(places, self.rows.device)).to(self.dtype)
        return chosen.permute(0, 3, 1, 2) if self.channels_last else chosen


@dataclass(frozen=True)
class FrozenPart:
    """A part that runs once.

    net, at: its module, and where in the network it ends. forward: what of the module runs on normalised pictures.
    compute: the same from pixels. shape, dtype: of what is kept of a picture. finish: what is done with the module's
    result, if anything; see `frozen_forward`.
    """

    net: nn.Module
    at: str
    forward: Forward
    compute: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    finish: Forward | None = None


@dataclass
class Filling:
    """Rows of a part, put in place batch by batch; room for all of them is taken once, when the first ones come.

    by_the_way: nobody needs them; who fills it stops where they are not going to disk.
    """

    part: FrozenPart
    size: int
    runtime: Runtime
    disk: RowStore | None
    by_the_way: bool = False
    stored: Stored | None = None

    def put(self, chunk: Tensor, out: Tensor) -> None:
        """The rows of these places, the next ones in order, from what this process made of its share."""
        made = out.dtype
        out = self.runtime.gather(out.to(self.part.dtype), len(chunk))
        if self.stored is None:
            mapped = out.dim() == 4 and not out.is_contiguous()  # the layout in which the first ones came
            mapped = mapped and out.is_contiguous(memory_format=torch.channels_last)
            self.stored = self._begin(channels_last=mapped, made=made)
        now = self.stored.rows[chunk[0] : chunk[-1] + 1]
        now[:] = out.permute(0, 2, 3, 1) if self.stored.channels_last else out
        if self.disk and self.stored.rows.device.type == "cpu":
            self.disk.filled(now)

    @property
    def on_disk(self) -> bool:
        """Whether the rows so far went to disk."""
        return self.disk is not None and self.disk.is_open

    def put_earlier(self, fewer: Stored, batch_size: int) -> None:
        """The first rows, as a pass over fewer views has made them; copied so many at once."""
        self.stored = self._begin(channels_last=fewer.channels_last, made=fewer.dtype)
        for there, here in zip(fewer.rows.split(batch_size), self.stored.rows.split(batch_size), strict=False):
            now = here[: len(there)]
            now.copy_(there)
            if self.disk and now.device.type == "cpu":
                self.disk.filled(now)

    def _begin(self, *, channels_last: bool, made: torch.dtype) -> Stored:
        """Room for all rows."""
        shape, dtype = self.part.shape, self.part.dtype
        size = (self.size, *((*shape[1:], shape[0]) if channels_last else shape))
        if self.runtime.holds(math.prod(size) * dtype.itemsize):
            rows = torch.empty(size, dtype=dtype, device=self.runtime.device)
        else:
            on_disk = self.disk.begin(size, dtype) if self.disk else None
            in_memory = torch.empty if self.by_the_way else _in_memory
            rows = in_memory(size, dtype=dtype) if on_disk is None else on_disk
        return Stored(rows, channels_last, made)

    def keep(self, batch_size: int) -> Stored:
        """All rows are in their place: on disk, where there is one, for later runs and stages."""
        assert self.stored is not None, "Pixels of no picture raise"
        stored, rows = self.stored, self.stored.rows
        if self.disk is None:
            return stored
        facts = {"channels_last": stored.channels_last, "made": str(stored.dtype)[len("torch.") :]}
        if rows.device.type == "cpu":
            return replace(stored, rows=self.disk.finish(rows, facts))
        kept = self.disk.begin(tuple(rows.shape), rows.dtype)
        if kept is None:
            return stored
        for there, here in zip(rows.split(batch_size), kept.split(batch_size), strict=True):
            here.copy_(there)
            self.disk.filled(here)
        self.disk.finish(kept, facts)
        return stored


def _in_memory(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room in memory; systems that promise more than they have would end the process later, without a word.

    Raises:
        SetupError: there is not enough of it.
    """
    nbytes, free = math.prod(size) * dtype.itemsize, free_memory_bytes()
    if nbytes > MEMORY_SHARE * free:
        raise SetupError(
            f"Stored features take {file_size(nbytes)}, which have no room in the cache folder, and {file_size(free)}"
            " of memory are free. Give the cache room (HEADSTART_CACHE names another folder, HEADSTART_CACHE_LIMIT"
            " its size), store fewer views (--views), or move the freeze line back (--freeze-line)."
        )
    return torch.empty(size, dtype=dtype)
