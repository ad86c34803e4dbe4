"""What a frozen part gave for every picture and view, on disk: found by everything that determines it, or made anew."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .classifier import Classifier
from .contract import tensors_digest
from .fastops import stock_form
from .pixels import Pixels
from .pixelstore import Say
from .recipe import AugmentSpec
from .runtime import Runtime
from .stock import is_stock_module
from .store import Cache, EntryWriter, code_hash, drop, key_of
from .terminal import file_size

_LIBRARIES = ("headstart", "torch", "torchvision", "timm", "numpy", "pillow")
# What timm notes of a network's weights: these themselves count.
_NO_SETTINGS = {"pretrained_cfg", "default_cfg"}


class RowStore:
    """The rows of one frozen pass in the cache folder, memory-mapped: loaded, or written as they are made.

    Rows are given back to the bit as they were made. A file whose length, description or bytes are not what was
    written is removed, and the rows are made again.

    Args:
        key: what determines the rows; see `row_keys`.
        writes: whether this process keeps what it makes.
        say: is told when rows made before are used.

    Attributes:
        is_kept: what was written is on disk under its name.
    """

    def __init__(self, cache: Cache, key: str, *, writes: bool, say: Say) -> None:
        self._cache, self._key, self._writes, self.tell = cache, key, writes, say
        self._writer: EntryWriter | None = None
        self._crc, self.is_kept = 0, False

    def load(self) -> tuple[Tensor, dict[str, Any]] | None:
        """Rows [N, ...] and what `finish` was told about them; None where they have to be made."""
        entry = self._cache.open("features", self._key)
        if entry is None:
            return None
        if zlib.crc32(entry.data.data) != entry.meta["crc"]:
            drop(entry.path)
            return None
        dtype = getattr(torch, entry.meta["dtype"])
        return torch.from_numpy(entry.data).view(dtype).reshape(entry.meta["shape"]), entry.meta

    @property
    def is_there(self) -> bool:
        """Whether there are rows."""
        return self._cache.describe("features", self._key) is not None

    def has_room(self, nbytes: int) -> bool:
        """Whether this process may write so many bytes; room is made for them."""
        try:
            return self._writes and self._cache.make_room(nbytes)
        except OSError:
            return False

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Room on disk for all rows, to be filled in order; None where the cache has none."""
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            has_room = self._writes and self._cache.make_room(nbytes)
            if self._writes and not has_room:
                room, size = file_size(self._cache.room()), file_size(nbytes)
                self.tell(
                    f"Stored features take {size}, and {self._cache.folder} has room for {room} (HEADSTART_CACHE_LIMIT,"
                    " free disk): they are held in memory, and not kept."
                )
            if has_room:
                self._writer = self._cache.write("features", self._key)
                return torch.from_numpy(self._writer.reserve(nbytes)).view(dtype).reshape(shape)
        except OSError as error:
            self.tell(f"Stored features are not kept: {self._cache.folder} cannot be used ({error}).")
            self.discard()
        return None

    @property
    def is_from_before(self) -> bool:
        """Whether the rows, if there are any, were made by an earlier run, and not by an earlier stage."""
        return not self._cache.began("features", self._key)

    @property
    def is_open(self) -> bool:
        """Whether rows are being written to disk."""
        return self._writer is not None

    def filled(self, rows: Tensor) -> None:
        """These rows, the next ones in order, are in their place."""
        if self._writer is not None:
            self._crc = zlib.crc32(rows.reshape(-1).view(torch.uint8).numpy().data, self._crc)

    def finish(self, rows: Tensor, facts: Mapping[str, Any]) -> Tensor:
        """All rows are in their place; returns them, from where they are kept."""
        if self._writer is None:
            return rows
        dtype = str(rows.dtype).removeprefix("torch.")
        try:
            self._writer.publish({**facts, "crc": self._crc, "shape": list(rows.shape), "dtype": dtype})
            self.is_kept = True
        except OSError as error:
            self.tell(f"Stored features are not kept: {self._cache.folder} cannot be used ({error}).")
            return rows
        finally:
            self.discard()
        entry = self._cache.open("features", self._key)  # held from here on, as a later run would hold it
        return rows if entry is None else torch.from_numpy(entry.data).view(rows.dtype).reshape(rows.shape)

    def remove(self) -> None:
        """Take kept rows off the disk; whoever holds them goes on holding them."""
        drop(self._cache.path("features", self._key))  # a system may remove nothing that is held

    def discard(self) -> None:
        """Leave nothing half done behind."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None


def row_stores(
    model: Classifier, net: nn.Module, at: str, pixels: Pixels, *, batch_size: int, runtime: Runtime, kind: str
) -> Callable[[int], RowStore | None]:
    """Where the output of `net`, the part of the model up to `at`, is kept of so many views; None: nothing names it."""
    key_of_views = row_keys(model, net, at, pixels, batch_size=batch_size, runtime=runtime, kind=kind)

    def of(views: int) -> RowStore | None:
        key = key_of_views(views)
        if key is None or pixels.store is None:
            return None
        return RowStore(pixels.store.cache, key, writes=runtime.is_main, say=pixels.store.say)

    return of


def built(net: nn.Module) -> list[Any] | None:
    """What a network's modules are and how they are set, parameters and buffers aside, as plain values.

    None where nobody can tell: a module of the user's own, one with hooks, a setting that has no plain form. Of a
    traced part the operations between its modules count as well.
    """
    rows: list[Any] = []
    for name, module in net.named_modules():
        if module is net and isinstance(net, fx.GraphModule):
            rows.append(net.code)
        elif is_stock_module(module):
            kind, settings = stock_form(module)
            try:
                plain = {key: _plain(settings[key]) for key in sorted(settings.keys() - _NO_SETTINGS)}
            except _NotPlain:
                return None
            rows.append([name, kind, plain])
        else:
            return None
    return rows


class _NotPlain(Exception):
    """What a setting is cannot be told."""


def _plain(value: Any) -> Any:
    """A module's setting as a value that is the same in another process."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return tensors_digest([("", torch.as_tensor(value))])
    if isinstance(value, torch.dtype | torch.device | torch.memory_format):
        return str(value)
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if getattr(value, "__module__", "").partition(".")[0] in ("torch", "timm") and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"  # a function or a class
    raise _NotPlain


def row_keys(
    model: Classifier, net: nn.Module, at: str, pixels: Pixels, *, batch_size: int, runtime: Runtime, kind: str
) -> Callable[[int], str | None]:
    """A name for everything that decides the rows of so many views; None with a module or transform of the user's own.

    What `net` is built of, its weights and buffers, where it ends, preparation, contents of the files in order, views
    with their policy and seed, number format, batch shape, processes, threads, machine, the kind of function that made
    them, libraries, and our own source text.
    """
    contents = pixels.store.contents(pixels.table.paths) if pixels.store else None
    form = built(net) if contents and model.backbone_name else None
    if pixels.store is None or form is None or contents is None:
        return lambda views: None
    facts = {
        "weights": tensors_digest(chain(net.named_parameters(), net.named_buffers())),
        "net": [model.backbone_name, model.backbone_args, model.pool, at, form],
        "pixels": [pixels.spec.to_dict(), pixels.store.family],
        "contents": hashlib.sha256("".join(contents).encode()).hexdigest(),
        "computed": [runtime.dtype, batch_size, runtime.world, kind, *_machine(runtime.device)],
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "code": code_hash(),
    }

    def of(views: int) -> str | None:
        if views == 1 or not pixels.is_augmented:
            return key_of({**facts, "views": views})
        if not isinstance(pixels.augment, AugmentSpec):
            return None
        return key_of({**facts, "views": [views, pixels.augment.to_dict(), pixels.seed]})

    return of


def _machine(device: torch.device) -> list[Any]:
    """What decides the order of additions, and to how many bits float32 is rounded before products (TF32)."""
    of: Any = torch.backends
    rounding = [part.fp32_precision for part in (of, of.cudnn.conv, of.cuda.matmul, of.mkldnn.conv, of.mkldnn.matmul)]
    if device.type == "cuda":
        return [device.type, torch.cuda.get_device_name(device), *rounding]
    return [device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), *rounding]
