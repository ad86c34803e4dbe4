"""The frozen part runs once: over every picture and view of a split, while the next ones are decoded and augmented."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .backbones import backbone_output, pool_output
from .classifier import Classifier
from .cut import Cut
from .errors import in_words
from .fastops import fast_training
from .filling import Filling, FrozenPart, Stored
from .frozenpass import FrozenForward, compile_pays, frozen_forward, share_saved, tolerance
from .memory import in_portions, sent
from .pixels import Pixels
from .rowstore import RowStore, row_stores
from .runtime import Runtime, prefetch
from .stock import is_stock
from .terminal import file_size

Advance = Callable[[int], None]
Aside = Callable[[], Cut | None]

_RECORDED_FROM = 4  # a pass of fewer batches is over before its kernels are recorded
_COMPARED = 4  # pictures on which a pass in two halves is compared with the whole
_LOOKED_FOR = 8  # where rows are wanted, those of up to so many views are looked for, of which they are the beginning
_TIMED_FROM = 100  # in a pass of fewer batches no compile pays, so none is timed


def store_features(
    model: Classifier,
    pixels: Pixels,
    *,
    views: int = 1,
    runtime: Runtime,
    batch_size: int = 32,
    advance: Advance | None = None,
    aside: Aside | None = None,
) -> Tensor:
    """Run the frozen backbone once per picture and view: features [N, views, D], float32, on the CPU.

    View 0 is the plain evaluation view. Under several processes each computes its share.

    Args:
        aside: finds the cut of the same backbone behind which the next stage trains, from as many views or more.
            Where rows are made, in one process on a CPU, what passes there is put on disk on the way if there is room
            and if it is, on the first pictures, to the bit what `store_activations` would make; that then finds it.
    """
    forward, finish = (partial(function, pool=model.pool) for function in (backbone_output, pool_output))
    part = FrozenPart(
        model.backbone, "features", forward, lambda x: model.features(x).float(), (model.num_features,), torch.float32,
        finish,
    )  # fmt: skip
    stored = _Pass(model, part, pixels, views, runtime, batch_size, advance, aside).run()
    return stored.rows.cpu().reshape(views, len(pixels), -1).transpose(0, 1)


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
    """Run the part in front of the cut once per picture and view; kept in the runtime's number format.

    On a GPU they stay there where they fit, else they are kept on the CPU. The memory is taken once, in its full size.
    Under several processes each computes its share.
    """
    return _Pass(model, _in_front_of(cut, model, runtime), pixels, views, runtime, batch_size, advance).run()


def _in_front_of(cut: Cut, model: Classifier, runtime: Runtime) -> FrozenPart:
    dtype = cut.dtype if runtime.dtype == torch.float32 else runtime.dtype

    def compute(x: Tensor) -> Tensor:
        out: Tensor = cut.prefix(model.enter(x))
        return out

    return FrozenPart(cut.prefix, cut.at, nn.Module.__call__, compute, cut.shape, dtype)


@dataclass(frozen=True)
class _Way:
    """A pass in two halves.

    filling: where what the first one gives is put. rest: the second one. few, alone: the first pictures, and what the
    first half gives of them when nothing but it is made quicker, as in a pass of its own.
    """

    filling: Filling
    rest: Callable[[Tensor], Tensor]
    few: Tensor | None
    alone: Tensor


@dataclass
class _Pass:
    """One pass of a part over all pictures and views, in batches that the processes share.

    aside: finds a cut on the way, whose rows are put on disk as well; see `store_features`.
    """

    model: Classifier
    part: FrozenPart
    pixels: Pixels
    views: int
    runtime: Runtime
    batch_size: int
    advance: Advance | None
    aside: Aside | None = None
    disk: RowStore | None = None
    way: _Way | None = None
    kind: str = ""
    _disks: Callable[[int], RowStore | None] = field(default=lambda views: None, init=False)

    def __post_init__(self) -> None:
        if self.runtime.gpu:
            self.batch_size = max(self.batch_size, self.runtime.batch_size)
        # No batch holds two views, so that a pass over fewer of them has the same batches, and rows with the same bits.
        each = torch.arange(len(self.pixels)).split(self.batch_size * self.runtime.world)
        self.chunks = [chunk + view * len(self.pixels) for view in range(self.views) for chunk in each]

    def run(self) -> Stored:
        """What is kept of this part, pictures and views from before, or else what the part gives now."""
        model = self.model
        # Not in float32: a GPU rounds its products to TensorFloat-32, those of folded weights otherwise than others.
        own = "folded" if self.runtime.gpu and self.runtime.dtype != torch.float32 else "module"
        kinds = ["compiled"] if self.runtime.compile == "on" else []
        kinds += [own, "module"]  # each where the one before it is not to be used
        stored = self.earlier(kinds[0])
        if stored is not None:
            return stored
        cut = self.aside() if self.aside and self.disk and self.runtime.world == 1 and not self.runtime.gpu else None
        was_training = model.training
        model.eval()
        try:
            self.way = self.in_halves(cut) if cut else None
            with fast_kernels(model if self.part.net is model.backbone else self.part.net, self.runtime):
                if self.runtime.compile == "auto" and self.compile_pays():
                    kinds = ["compiled", *kinds]
                for kind in dict.fromkeys(kinds):
                    stored = self.earlier(kind) if kind != self.kind else None
                    quick = self.tried(kind, own) if stored is None and kind != "module" else None
                    if stored or quick:
                        break
                return self.compute(quick) if stored is None else stored
        finally:
            model.train(was_training)
            for disk in (self.disk, self.way and self.way.filling.disk):
                if disk:
                    disk.discard()

    def earlier(self, kind: str) -> Stored | None:
        """What is kept from before; from here on the rows' place on disk is that of this kind of function.

        Kinds: the `module` as it is, a `folded` copy of it (see `frozen_forward`), or a `compiled` one.
        """
        self.kind, self._disks = kind, self._stores(self.part, kind)
        self.disk = self._disks(self.views)
        found = self._loaded(self._as_many)
        if found is None:
            return None
        stored = self._using(*found)
        on_device = self.runtime.holds(stored.rows.nbytes)
        return replace(stored, rows=stored.rows.to(self.runtime.device)) if on_device else stored

    def _stores(self, part: FrozenPart, kind: str) -> Callable[[int], RowStore | None]:
        """The places on disk of a part's rows by their number of views."""
        return row_stores(
            self.model, part.net, part.at, self.pixels, batch_size=self.batch_size, runtime=self.runtime, kind=kind
        )

    def _loaded(self, numbers: Iterable[int]) -> tuple[Stored, RowStore] | None:
        """Rows from before, of the first of these numbers of views of which there are any, as many as are of use."""
        for views in numbers:
            disk = self._disks(views)
            kept = disk.load() if disk else None
            if self.runtime.agrees(kept is not None) and disk and kept:
                rows, facts = kept
                rows = rows[: len(self.pixels) * self.views]
                return Stored(rows, facts["channels_last"], getattr(torch, facts["made"])), disk
        return None

    def _fewer(self) -> tuple[Stored, RowStore] | None:
        """Rows from before of the first views, where those of all views have room beside them."""
        fewer = self._loaded(range(self.views - 1, 0, -1))
        nbytes = self.size * math.prod(self.part.shape) * self.part.dtype.itemsize
        has_room = not (fewer and self.disk and self.runtime.is_main) or self.disk.has_room(nbytes)
        # While they are held they cannot go; with all rows made anew there may be room.
        return fewer if self.runtime.agrees(has_room or self.runtime.holds(nbytes)) else None

    def _using(self, stored: Stored, disk: RowStore) -> Stored:
        """Rows from before are used: the user is told, and the progress bar."""
        views = len(stored.rows) // len(self.pixels)
        if disk.is_from_before:
            shown = f"{len(self.pixels):,} pictures x {views} view{'s' * (views != 1)}"
            disk.tell(f"Features stored earlier are used: {shown}.")
        if self.advance:
            self.advance(len(self.runtime.share(torch.arange(len(stored.rows)))))
        return stored

    @property
    def _as_many(self) -> range:
        """Numbers of views of which rows hold those of this pass, as far as it is worth looking."""
        return range(self.views, max(self.views, _LOOKED_FOR) + 1)

    def compile_pays(self) -> bool:
        """Whether a compile pays, by the time of one batch and their number; a line says so for a long pass."""
        if len(self.chunks) < _TIMED_FROM:
            return False
        device = self.runtime.device
        saved = share_saved(self.part.net, device, self.runtime.dtype)
        if not self.runtime.agrees(bool(saved)):  # processes may be on machines of two kinds
            self._note(f"The frozen layers are not compiled: on {device.type} that is not known to save time for them.")
            return False
        pays, why = compile_pays(self._seconds(self.part.compute) * len(self.chunks), saved=saved)
        pays = self.runtime.agrees(pays)
        if why:
            self._note(why)
        return pays

    def tried(self, kind: str, own: str) -> FrozenForward | None:
        """The part as a function of this kind, tried on the first batch; None, and a line, where it is not to be used.

        That is where it fails, where results lie further apart than rounding explains, and, unless compiling was asked
        for, where a compiled function takes no less time than the device's own kind.
        """
        compiled = kind == "compiled"
        if compiled and self.runtime.compile == "on":
            self._note("The frozen layers are compiled, which takes a minute or so.")
        reason, at_once = "", self.runtime.portion.size
        try:
            quick = self._quick(kind)
            mine, exact = (self._run(f, self._first).float() for f in (self._through(quick), self.part.compute))
            apart = float((mine - exact).norm() / exact.norm().clamp_min(1e-30))
            reason = quick.compile_error and f"compiling failed ({quick.compile_error})"
            if not reason and not apart <= tolerance(self.runtime.device, self.runtime.dtype):
                reason = f"{kind}, their output is {apart:.1g} apart"
            if not reason and compiled and self.runtime.compile == "auto":
                rival = self.part.compute if own == "module" else self._through(self._quick(own))
                before, now = self._seconds(rival), self._seconds(self._through(quick))
                reason = "" if now < before else f"compiled, a batch takes {now:.2g} s instead of {before:.2g}"
        except Exception as error:  # a module that cannot be copied, say
            doing = "compiling" if compiled else "folding"
            reason = f"{doing} failed ({in_words(error)})"
        if self.runtime.agrees(not reason):
            return quick
        self.runtime.portion.size = at_once  # memory that it alone ran out of is no measure of the other ways
        self._note(f"The frozen layers run as they are: {reason or f'{kind} they failed in another process'}.")
        return None

    def _quick(self, kind: str) -> FrozenForward:
        return frozen_forward(
            self.part.net, dtype=self.runtime.dtype, compiled=kind == "compiled", forward=self.part.forward,
            finish=self.part.finish, batch_size=self.batch_size if kind == "compiled" else None,
            recorded=kind == "folded" and len(self.chunks) >= _RECORDED_FROM,
        )  # fmt: skip

    def compute(self, quick: FrozenForward | None) -> Stored:
        """Fill a store of the part's row shape and format, batch by batch."""
        # Made outside inference mode: autograd refuses to save inference tensors for a backward pass.
        filling = Filling(self.part, self.size, self.runtime, self.disk)
        way = self.way if self.way and not quick and self.agree(self.way) else None
        if way and way.filling.disk:
            size = file_size(self.size * math.prod(way.filling.part.shape) * way.filling.part.dtype.itemsize)
            of = f"{len(self.pixels):,} pictures x {self.views} view{'s' * (self.views != 1)} at {way.filling.part.at}"
            way.filling.disk.tell(f"  Stored on the way for the next stage: {of}, {size}.")
        # A pass with another on the way needs all its batches.
        found = None if way else self._fewer()
        done = 0
        if found:
            done = len(self._using(*found).rows)
            filling.put_earlier(found[0], self.batch_size)
        chunks = [chunk for chunk in self.chunks if chunk[0] >= done]
        shares = [self.runtime.share(chunk) for chunk in chunks]
        compute = self._through(quick) if quick else self.part.compute
        with ThreadPoolExecutor(self.runtime.workers, thread_name_prefix="headstart-batch") as pool:
            # Decoding and augmenting go on while the network computes.
            threads = pool if self.pixels.in_background else None
            inputs = prefetch(self._batch, shares, pool=threads, ahead=self.runtime.workers + 1)
            for chunk, mine, batch in zip(chunks, shares, inputs, strict=True):
                if way is None:
                    filling.put(chunk, self._run(compute, batch))
                else:
                    between = self._run(way.filling.part.compute, batch)
                    way.filling.put(chunk, between)
                    filling.put(chunk, self._run(way.rest, between))
                    way = way if way.filling.on_disk else None
                if self.advance:
                    self.advance(len(mine))
        if way:
            way.filling.keep(self.batch_size)
        if self.kind == "compiled" and quick and not quick.compiled:
            assert filling.stored is not None
            return filling.stored  # compiling failed on the way: rows of two functions
        stored = filling.keep(self.batch_size)
        # Its rows are the beginning of those just kept. Those of the plain view serve other seeds and policies, too.
        is_held_twice = done > len(self.pixels) and self.views <= _LOOKED_FOR and self.disk and self.disk.is_kept
        if found and is_held_twice:
            found[1].remove()
        return stored

    def in_halves(self, cut: Cut) -> _Way | None:
        """The pass in two halves, where what passes between them is not kept yet and has room on disk."""
        part = _in_front_of(cut, self.model, self.runtime)
        disks = self._stores(part, "module")
        disk = disks(self.views)
        if disk is None or any(other and other.is_there for other in map(disks, self._as_many)):
            return None
        if not disk.has_room(self.size * cut.bytes_per_picture(part.dtype)):
            return None
        cut.suffix.training = False
        few = self._batch(self.chunks[0][:_COMPARED])
        with fast_kernels(part.net, self.runtime):
            alone = self._run(part.compute, few)

        def rest(x: Tensor) -> Tensor:
            return pool_output(self.model.backbone, cut.suffix(x), self.model.pool).to(self.part.dtype)

        return _Way(Filling(part, self.size, self.runtime, disk, by_the_way=True), rest, few, alone)

    def agree(self, way: _Way) -> bool:
        """Whether the halves give the whole's bits, and the first half those of a pass of its own.

        It does not where the cut parts a convolution from the BatchNorm that is fused with it in the whole.
        """
        between = self._run(way.filling.part.compute, way.few)
        whole = self._run(self.part.compute, way.few)
        return torch.equal(between, way.alone) and torch.equal(self._run(way.rest, between), whole)

    def _batch(self, mine: Tensor) -> Tensor | None:
        """The pictures of these places, uint8; None where this process has no share."""
        if not len(mine):
            return None
        return self.pixels.batch((mine % len(self.pixels)).tolist(), (mine // len(self.pixels)).tolist())

    @property
    def size(self) -> int:
        """How many rows there are: pictures times views."""
        return len(self.pixels) * self.views

    @cached_property
    def _fills(self) -> bool:
        return is_stock(self.model.backbone)

    @cached_property
    def _first(self) -> Tensor | None:
        return self._batch(self.runtime.share(self.chunks[0]))

    def _through(self, quick: FrozenForward) -> Callable[[Tensor], Tensor]:
        return lambda x: quick(self.model.enter(x))

    def _run(self, compute: Callable[[Tensor], Tensor], batch: Tensor | None) -> Tensor:
        """What `compute` gives for a batch, in the runtime's number format and in as many parts as memory asks for."""
        runtime = self.runtime
        with torch.inference_mode(), runtime.autocast():
            if batch is None:
                return torch.zeros(0, *self.part.shape, device=runtime.device)
            on_device = partial(_on_device, compute, runtime.device)
            size = runtime.filled(len(batch), self.batch_size) if self._fills else 0
            return in_portions(on_device, batch, runtime.portion, doing="in the frozen layers", size=size)

    def _seconds(self, compute: Callable[[Tensor], Tensor]) -> float:
        """What a batch takes once everything is warm."""
        for _ in range(2):
            started = time.perf_counter()
            self._run(compute, self._first).cpu()  # waits for a GPU
        return time.perf_counter() - started

    def _note(self, line: str) -> None:
        if self.runtime.is_main:
            self.runtime.portion.note("compile", line)


def _on_device(compute: Callable[[Tensor], Tensor], device: torch.device, batch: Tensor) -> Tensor:
    return compute(sent(batch, device))


def fast_kernels(model: Classifier | nn.Module, runtime: Runtime) -> AbstractContextManager[object]:
    """On a CPU: the same arithmetic of a classifier's backbone, or of a half of it, by faster kernels, in place.

    Undone on leaving.
    """
    if runtime.device.type != "cpu":
        return nullcontext()
    if isinstance(model, Classifier):
        return fast_training(model.backbone, partial(backbone_output, pool=model.pool))
    return fast_training(model)
