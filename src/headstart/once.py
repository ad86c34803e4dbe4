"""The frozen part runs once: over every picture and view of a split, while the next ones are decoded and augmented."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .backbones import backbone_output
from .classifier import Classifier
from .cut import Cut
from .fastops import fast_training
from .memory import in_portions
from .pixels import Pixels
from .rowstore import RowStore, row_store
from .runtime import Runtime, prefetch

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Stored:
    """What a function gave for every picture and view.

    Attributes:
        rows: [N * K, ...], the views of a picture one after the other.
        channels_last: the rows are feature maps that lie as [H, W, C].
        dtype: the format in which they were computed; they may be kept in a shorter one.
    """

    rows: Tensor
    channels_last: bool
    dtype: torch.dtype

    def take(self, places: Tensor) -> Tensor:
        """Rows in the layout and format in which they were computed."""
        chosen = self.rows.index_select(0, places).to(self.dtype)
        return chosen.permute(0, 3, 1, 2) if self.channels_last else chosen


def store_features(
    model: Classifier,
    pixels: Pixels,
    *,
    views: int = 1,
    runtime: Runtime,
    batch_size: int = 32,
    advance: Advance | None = None,
) -> Tensor:
    """Run the frozen backbone once per picture and view: features [N, views, D], float32, on the CPU.

    View 0 is the plain evaluation view. Under several processes each computes its share.
    """
    part = _Frozen(
        model.backbone, "features", lambda x: model.features(x).float(), (model.num_features,), torch.float32
    )
    stored = _run_once(model, part, pixels, views=views, runtime=runtime, batch_size=batch_size, advance=advance)
    return stored.rows.reshape(len(pixels), views, -1)


def store_activations(
    model: Classifier,
    cut: Cut,
    pixels: Pixels,
    *,
    views: int = 1,
    runtime: Runtime,
    batch_size: int = 32,
    advance: Advance | None = None,
) -> Stored:
    """Run the part in front of the cut once per picture and view; kept on the CPU, in the runtime's number format.

    The memory is taken once, in its full size. Under several processes each computes its share.
    """
    dtype = cut.dtype if runtime.dtype == torch.float32 else runtime.dtype
    part = _Frozen(cut.prefix, cut.at, lambda x: cut.prefix(model.enter(x)), cut.shape, dtype)
    return _run_once(model, part, pixels, views=views, runtime=runtime, batch_size=batch_size, advance=advance)


@dataclass(frozen=True)
class _Frozen:
    """A part that runs once: its module, where it ends, how it is called, and the shape and format of what is kept."""

    net: nn.Module
    at: str
    compute: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype


def _run_once(
    model: Classifier,
    part: _Frozen,
    pixels: Pixels,
    *,
    views: int,
    runtime: Runtime,
    batch_size: int,
    advance: Advance | None,
) -> Stored:
    """What an earlier run has kept of this part, pictures and views, or else what the part gives now."""
    disk = row_store(model, part.net, part.at, pixels, views=views, batch_size=batch_size, runtime=runtime)
    kept = disk.load() if disk else None
    if runtime.agrees(kept is not None) and kept:
        rows, facts = kept
        if disk:
            shown = f"{len(pixels):,} pictures x {views} view{'s' * (views != 1)}"
            disk.tell(f"Features stored by an earlier run are used: {shown}.")
        if advance:
            advance(len(runtime.share(torch.arange(len(rows)))))
        return Stored(rows, facts["channels_last"], getattr(torch, facts["made"]))
    was_training = model.training
    model.eval()
    try:
        with fast_kernels(model if part.net is model.backbone else part.net, runtime):
            return _compute(part, pixels, disk, views=views, runtime=runtime, batch_size=batch_size, advance=advance)
    finally:
        model.train(was_training)
        if disk:
            disk.discard()


def _compute(
    part: _Frozen,
    pixels: Pixels,
    disk: RowStore | None,
    *,
    views: int,
    runtime: Runtime,
    batch_size: int,
    advance: Advance | None,
) -> Stored:
    """Fill a store of the part's row shape and format, allocated once, batch by batch."""
    places = torch.arange(len(pixels) * views)
    # Made outside inference mode: autograd refuses to save inference tensors for a backward pass.
    stored: Stored | None = None
    chunks = places.split(batch_size * runtime.world)
    shares = [runtime.share(chunk) for chunk in chunks]

    def prepare(mine: Tensor) -> Tensor | None:
        return pixels.batch((mine // views).tolist(), (mine % views).tolist()) if len(mine) else None

    def compute(batch: Tensor) -> Tensor:
        return part.compute(batch.to(runtime.device, non_blocking=True))

    with ThreadPoolExecutor(runtime.workers, thread_name_prefix="headstart-batch") as pool:
        # Decoding and augmenting go on while the network computes.
        threads = pool if pixels.in_background else None
        inputs = prefetch(prepare, shares, pool=threads, ahead=runtime.workers + 1)
        for chunk, mine, batch in zip(chunks, shares, inputs, strict=True):
            with torch.inference_mode(), runtime.autocast():
                if batch is None:
                    out = torch.zeros(0, *part.shape, device=runtime.device)
                else:
                    out = in_portions(compute, batch, runtime.portion, doing="in the frozen layers")
                made = out.dtype
                out = runtime.gather(out.to(part.dtype), len(chunk))
            if stored is None:
                mapped = out.dim() == 4 and not out.is_contiguous()
                mapped = mapped and out.is_contiguous(memory_format=torch.channels_last)
                size = (len(places), *((*part.shape[1:], part.shape[0]) if mapped else part.shape))
                rows = disk.begin(size, part.dtype) if disk else torch.empty(size, dtype=part.dtype)
                stored = Stored(rows, mapped, made)
            now = stored.rows[chunk[0] : chunk[-1] + 1]
            now[:] = out.permute(0, 2, 3, 1) if stored.channels_last else out
            if disk:
                disk.filled(now)
            if advance:
                advance(len(mine))
    assert stored is not None, "Pixels of no picture raise"
    if disk is None:
        return stored
    facts = {"channels_last": stored.channels_last, "made": str(stored.dtype).removeprefix("torch.")}
    return replace(stored, rows=disk.finish(stored.rows, facts))


def fast_kernels(model: Classifier | nn.Module, runtime: Runtime) -> AbstractContextManager[object]:
    """On a CPU: the same arithmetic of a classifier's backbone, or of a half of it, by faster kernels, in place.

    Undone on leaving.
    """
    if runtime.device.type != "cpu":
        return nullcontext()
    if isinstance(model, Classifier):
        return fast_training(model.backbone, partial(backbone_output, pool=model.pool))
    return fast_training(model)
