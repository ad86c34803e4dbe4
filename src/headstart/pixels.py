"""The pictures of one split: the plain evaluation view of each, and augmented views drawn on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augment import augmented_batch
from .batchviews import is_drawn_together, views_together
from .dataset import ImageTable, open_image
from .dataspec import DataSpec
from .errors import DataError
from .memory import ready, sent
from .pixelstore import PixelStore
from .portable import evaluation_view
from .recipe import AugmentSpec
from .runtime import GPU_SHARE, free_bytes
from .transforms import as_tensor, working_image

Augment = AugmentSpec | Callable[[Tensor], Tensor]

_ROOM = 1 << 30
_VIEW_BYTES = 240  # of memory for each pixel of a view while it is drawn together with others: 12 MB at 224 px
_DRAWN_SHARE = 0.05  # of a GPU's free memory for that


def is_augmented(augment: Augment | None) -> bool:
    """False when every view equals the plain one."""
    return augment is not None and not (isinstance(augment, AugmentSpec) and augment.is_identity)


@dataclass
class _Kept:
    """Decoded pictures by number, and the bytes there is still room for; on a device: (is it working?, number).

    at_once: how many views are drawn together, once that has been asked; `drawing`: by one thread at a time.
    """

    room: int
    at_once: int = 0
    plain: dict[int, Tensor] = field(default_factory=dict)
    working: dict[int, np.ndarray] = field(default_factory=dict)
    on_device: dict[tuple[bool, int], Tensor] = field(default_factory=dict)
    drawing: threading.Lock = field(default_factory=threading.Lock)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > self.room:
                return False
            self.room -= nbytes
            return True


def views_at_once(device: torch.device, spec: DataSpec) -> int:
    """How many views are drawn together on a device; with few a GPU waits for its orders."""
    return min(256, max(32, int(_DRAWN_SHARE * free_bytes(device)) // (_VIEW_BYTES * spec.image_size**2)))


class Pixels:
    """The pictures of one split, ready to be batched.

    View 0 of a picture is its evaluation view, the very one that `predict` computes. View v > 0 is augmented and
    is a pure function of (seed, index, v). Decoded pictures come from the store where they are in it; others are
    kept in memory up to `cache_bytes` and beyond that decoded again, so memory stays bounded and nothing else changes.

    On a device, a GPU, pictures lie there uint8 from their first use on, while there is room, and augmented views are
    drawn there, a batch at once: the same random numbers, read by bilinear interpolation (see `batchviews`).

    Args:
        table: N pictures.
        spec: size, interpolation, crop of the views.
        augment: ranges, or any torchvision v2 transform of the user's.
        seed: the views' random numbers start here.
        workers: threads that decode.
        cache_bytes: memory for decoded pictures, evaluation views and working images together; None is 1 GB, or a
            fifth of what the device has free.
        store: decoded pictures on disk, filled beforehand.
        device: a GPU where batches are made; None: in this computer's memory, by its processor.
    """

    def __init__(
        self,
        table: ImageTable,
        spec: DataSpec,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 2,
        cache_bytes: int | None = None,
        store: PixelStore | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.table, self.spec, self.seed, self.store, self.device = table, spec, seed, store, device
        self.augment = AugmentSpec() if augment is None else augment
        self._alike = False
        room = _ROOM if device is None else int(GPU_SHARE * free_bytes(device))
        self._kept = _Kept(room if cache_bytes is None else cache_bytes)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="headstart-decode")

    def __len__(self) -> int:
        return len(self.table)

    def with_views(self, augment: Augment | None, *, seed: int = 0, alike: bool = False) -> Self:
        """The same pictures with other augmented views; what is decoded is shared, and so is the memory for it.

        With `alike` view v is drawn alike for every picture, whatever its place in the table.
        """
        other = copy(self)
        other._alike = alike
        other.augment, other.seed = AugmentSpec() if augment is None else augment, seed
        return other

    @property
    def is_augmented(self) -> bool:
        """False when every view equals the plain one."""
        return is_augmented(self.augment)

    @property
    def in_background(self) -> bool:
        """Whether `batch` may run in another thread while the network draws random numbers."""
        # A transform of the user's draws from torch's global generator, and so do dropout and drop-path.
        return isinstance(self.augment, AugmentSpec)

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Pictures as uint8 [B, 3, S, S], on the device where there is one; view 0 is the plain one.

        Raises:
            DataError: a file can no longer be read, or has changed since the store was filled; the message names it.
        """
        if not len(indices):
            raise DataError("There is no picture in this split. Hold some out, or leave the step that needs it.")
        out: list[Tensor | None] = [None] * len(indices)
        plain = [p for p, v in enumerate(views) if v == 0 or not self.is_augmented]
        mixed = [p for p, v in enumerate(views) if v != 0 and self.is_augmented]
        for p, picture in zip(plain, self._plain([int(indices[p]) for p in plain]), strict=True):
            out[p] = picture
        if mixed:
            drawn = self._drawn([int(indices[p]) for p in mixed], [int(views[p]) for p in mixed])
            for p, picture in zip(mixed, drawn, strict=True):
                out[p] = picture
        return torch.stack([picture for picture in out if picture is not None])

    def _plain(self, indices: list[int]) -> list[Tensor]:
        """Plain views, uint8 [3, S, S] each."""
        if self.device is None:
            return list(self._pool.map(self._plain_view, indices))
        return self._placed(self.device, indices, is_working=False)

    def _drawn(self, indices: list[int], views: list[int]) -> Tensor:
        """Augmented views [B, 3, S, S]."""
        device, augment = self.device, self.augment
        numbers = [0] * len(indices) if self._alike else indices
        if device is not None and isinstance(augment, AugmentSpec) and is_drawn_together(augment):
            placed = self._placed(device, indices, is_working=True)
            with self._kept.drawing:  # one batch's worth of memory, however many threads there are
                most = self._kept.at_once = self._kept.at_once or views_at_once(device, self.spec)
                parts = [slice(start, start + most) for start in range(0, len(placed), most)]
                return torch.cat(
                    [
                        views_together(
                            placed[part], self.spec, augment, seed=self.seed, indices=numbers[part], views=views[part]
                        )
                        for part in parts
                    ]
                )
        images = list(self._pool.map(self._working_image, indices))
        drawn = augmented_batch(images, self.spec, augment, seed=self.seed, indices=numbers, views=views)
        return drawn if device is None else sent(drawn, device)

    def _placed(self, device: torch.device, indices: list[int], *, is_working: bool) -> list[Tensor]:
        """Working images, uint8 [h, w, 3], or plain views, [3, S, S], on the device, sent in one piece."""
        kept, room = self._kept.on_device, self._kept
        found = {i: kept[is_working, i] for i in indices if (is_working, i) in kept}
        missing = [i for i in dict.fromkeys(indices) if i not in found]
        if missing:
            load = self._working_image if is_working else self._plain_view
            pictures = [torch.as_tensor(np.asarray(one)) for one in self._pool.map(load, missing)]
            flat = torch.cat([picture.flatten() for picture in pictures])
            flat = sent(ready(flat, device), device)
            pieces = flat.split([picture.numel() for picture in pictures])
            here = [piece.view(one.shape) for piece, one in zip(pieces, pictures, strict=True)]
            found |= dict(zip(missing, here, strict=True))
            if room.reserve(flat.numel()):
                kept.update({(is_working, i): found[i] for i in missing})
        return [found[i] for i in indices]

    def _plain_view(self, index: int) -> Tensor:
        path = self.table.paths[index]
        kept = self._kept.plain.get(index)
        if kept is None and self.store is not None:
            kept = self.store.view(path)
        if kept is not None:
            return kept
        picture = as_tensor(evaluation_view(self._picture(path), self.spec))
        if self.device is None and self._kept.reserve(picture.numel()):
            self._kept.plain[index] = picture
        return picture

    def _working_image(self, index: int) -> np.ndarray:
        path = self.table.paths[index]
        kept = self._kept.working.get(index)
        if kept is None and self.store is not None:
            kept = self.store.working(path)
        if kept is not None:
            return kept
        picture = working_image(self._picture(path), self.spec)
        if self.device is None and self._kept.reserve(picture.nbytes):
            self._kept.working[index] = picture
        return picture

    def _picture(self, path: Path) -> Image.Image:
        """The picture decoded from its file."""
        return open_image(path) if self.store is None else self.store.picture(path)
