"""The pictures of one split: the plain evaluation view of each, and augmented views drawn on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .augment import augmented_batch
from .dataset import ImageTable, open_image
from .errors import DataError
from .pixelstore import PixelStore
from .recipe import AugmentSpec
from .transforms import DataSpec, load_view, working_image

Augment = AugmentSpec | Callable[[Tensor], Tensor]


def is_augmented(augment: Augment | None) -> bool:
    """False when every view equals the plain one."""
    return augment is not None and not (isinstance(augment, AugmentSpec) and augment.is_identity)


@dataclass
class _Kept:
    """Decoded pictures by number, and the bytes there is still room for."""

    room: int
    plain: dict[int, Tensor] = field(default_factory=dict)
    working: dict[int, np.ndarray] = field(default_factory=dict)

    def reserve(self, nbytes: int) -> bool:
        if nbytes > self.room:
            return False
        self.room -= nbytes
        return True


class Pixels:
    """The pictures of one split, ready to be batched.

    View 0 of a picture is its evaluation view, the very one that `predict` computes. View v > 0 is augmented and
    is a pure function of (seed, index, v). Decoded pictures come from the store where they are in it; others are
    kept in memory up to `cache_bytes` and beyond that decoded again, so memory stays bounded and nothing else changes.

    Args:
        table: N pictures.
        spec: size, interpolation, crop of the views.
        augment: ranges, or any torchvision v2 transform of the user's.
        seed: the views' random numbers start here.
        workers: threads that decode.
        cache_bytes: memory for decoded pictures, evaluation views and working images together.
        store: decoded pictures on disk, filled beforehand.
    """

    def __init__(
        self,
        table: ImageTable,
        spec: DataSpec,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 2,
        cache_bytes: int = 1 << 30,
        store: PixelStore | None = None,
    ) -> None:
        self.table, self.spec, self.seed, self.store = table, spec, seed, store
        self.augment = AugmentSpec() if augment is None else augment
        self._alike = False
        self._kept = _Kept(cache_bytes)
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
        """Pictures as uint8 [B, 3, S, S]; view 0 is the plain one.

        Raises:
            DataError: a file can no longer be read; the message names it.
        """
        if not len(indices):
            raise DataError("There is no picture in this split. Hold some out, or leave the step that needs it.")
        out: list[Tensor | None] = [None] * len(indices)
        plain = [p for p, v in enumerate(views) if v == 0 or not self.is_augmented]
        mixed = [p for p, v in enumerate(views) if v != 0 and self.is_augmented]
        for p, picture in zip(plain, self._pool.map(lambda p: self._plain_view(indices[p]), plain), strict=True):
            out[p] = picture
        if mixed:
            images = list(self._pool.map(lambda p: self._working_image(indices[p]), mixed))
            drawn = augmented_batch(
                images,
                self.spec,
                self.augment,
                seed=self.seed,
                indices=[0 if self._alike else int(indices[p]) for p in mixed],
                views=[int(views[p]) for p in mixed],
            )
            for p, picture in zip(mixed, drawn, strict=True):
                out[p] = picture
        return torch.stack([picture for picture in out if picture is not None])

    def _plain_view(self, index: int) -> Tensor:
        path = self.table.paths[index]
        kept = self._kept.plain.get(index)
        if kept is None and self.store is not None:
            kept = self.store.view(path)
        if kept is not None:
            return kept
        picture = load_view(path, self.spec)
        if self._kept.reserve(picture.numel()):
            self._kept.plain[index] = picture
        return picture

    def _working_image(self, index: int) -> np.ndarray:
        path = self.table.paths[index]
        kept = self._kept.working.get(index)
        if kept is None and self.store is not None:
            kept = self.store.working(path)
        if kept is not None:
            return kept
        picture = working_image(open_image(path), self.spec)
        if self._kept.reserve(picture.nbytes):
            self._kept.working[index] = picture
        return picture
