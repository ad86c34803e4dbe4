"""Sources of batches for the one training loop: pixels, or what the frozen part makes of them, computed once.

Whatever stands in front of the freeze line is a fixed function of the pixels, so its output is computed once per
picture and view and kept; an epoch then costs only what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .backbones import backbone_output
from .classifier import Classifier
from .cut import Cut, cut_or_reason
from .filling import Stored
from .memory import sent
from .once import Advance, Aside, fast_kernels, store_activations, store_features
from .pixels import Pixels
from .recipe import AugmentSpec
from .runtime import Runtime, free_memory_bytes

# What is stored may take this much memory, or this share of what is free if that is less.
STORE_BYTES = 4 << 30
STORE_SHARE = 0.4
_LARGE = 100e6  # from here on the size of stored features is told beforehand


class Source(Protocol):
    """One split as the training loop sees it: labels, and inputs for any picture and view."""

    labels: Tensor
    """Class ids [N], int64, on the CPU."""
    num_views: int | None
    """Views per picture, the plain one (view 0) included; None: a fresh one for each epoch."""
    nbytes: int
    """Memory that stored inputs take."""

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Inputs [B, ...] of these pictures in these views."""
        ...

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        """Logits [B, C] from such inputs."""
        ...

    def kernels(self, model: Classifier, runtime: Runtime) -> AbstractContextManager[object]:
        """While this is entered, what `forward` runs does the same arithmetic by faster kernels."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether `batch` may run in another thread while the network draws random numbers."""
        ...


class PixelSource:
    """Pictures as they are, for a line so far forward that the whole network runs in every step."""

    @property
    def in_background(self) -> bool:
        return self.pixels.in_background

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.labels = _labels(pixels)
        self.num_views = None if pixels.is_augmented else 1
        self.nbytes = 0

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return self.pixels.batch(indices, views)

    def enter(self, model: Classifier, inputs: Tensor) -> Tensor:
        """What the backbone takes, with every module in the mode that it has to have."""
        return model.enter(inputs, are_ours=True)

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        return model.finish(backbone_output(model.backbone, self.enter(model, inputs), pool=model.pool))

    def kernels(self, model: Classifier, runtime: Runtime) -> AbstractContextManager[object]:
        return fast_kernels(model, runtime)


def _labels(pixels: Pixels) -> Tensor:
    return torch.tensor(pixels.table.labels, dtype=torch.int64)


class FeatureSource:
    """The frozen backbone's pooled features [N, K, D], computed once; only the head runs in a step."""

    in_background = False  # a batch of rows takes less time than handing it to a thread

    def __init__(self, features: Tensor, labels: Tensor, device: torch.device | None = None) -> None:
        self.features, self.labels = features, labels
        rows = features.transpose(0, 1).flatten(0, 1)  # view after view, as stored features lie: then no copy
        self._rows = rows if device is None else rows.to(device)  # a GPU's own copy
        self.num_views: int | None = features.shape[1]
        self.nbytes = features.nbytes

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        places = torch.as_tensor(views) * len(self.labels) + torch.as_tensor(indices)
        return self._rows.index_select(0, sent(places, self._rows.device))

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        # The head is small and its inputs are stored: float32 costs nothing here and loses nothing.
        with torch.autocast(inputs.device.type, enabled=False):
            return model.head(inputs.float())  # type: ignore[no-any-return]

    def kernels(self, model: Classifier, runtime: Runtime) -> AbstractContextManager[object]:
        return nullcontext()


class ActivationSource:
    """What the frozen part in front of a cut gives, computed once; what lies behind the cut runs in a step."""

    in_background = True

    def __init__(self, stored: Stored, labels: Tensor, cut: Cut) -> None:
        self.stored, self.labels, self.cut = stored, labels, cut
        self.num_views: int | None = len(stored.rows) // len(labels)
        self.nbytes = stored.rows.nbytes

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return self.stored.take(torch.as_tensor(views) * len(self.labels) + torch.as_tensor(indices))

    def enter(self, model: Classifier, inputs: Tensor) -> Tensor:
        """What the suffix takes, with every module in the mode that it has to have."""
        model.keep_frozen()
        self.cut.suffix.training = model.training  # its modules are the model's, which has set their modes
        # A frozen pass in bfloat16 may feed a step in float32.
        return inputs if torch.is_autocast_enabled(inputs.device.type) else inputs.float()

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        return model.finish(self.cut.suffix(self.enter(model, inputs)))

    def kernels(self, model: Classifier, runtime: Runtime) -> AbstractContextManager[object]:
        return fast_kernels(self.cut.suffix.train_graph, runtime)


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and is scored on."""

    train: Source
    val: Source

    @property
    def nbytes(self) -> int:
        """The memory of what is stored; 0 where the loop is fed with pixels."""
        return self.train.nbytes + self.val.nbytes

    def behind(self, cut: Cut | None) -> StageData:
        """The same stored activations in front of the rest of an equal model, cut in the same place."""
        return StageData(
            *(
                ActivationSource(part.stored, part.labels, cut) if cut and isinstance(part, ActivationSource) else part
                for part in (self.train, self.val)
            )
        )


@dataclass(frozen=True)
class Placement:
    """Where a stage is fed from, decided before anything is computed.

    Attributes:
        views: views of each training picture that are computed and stored; 0 where pixels feed the stage.
        cut: where the backbone is cut; None where it runs whole, or not at all in a step.
        passes: pictures that will go through the frozen part.
        nbytes: memory that their activations take.
        budget: what they may take; where there is none to store, 0.
        why: one line for the user; empty where there is nothing to decide.
    """

    views: int = 0
    cut: Cut | None = None
    passes: int = 0
    nbytes: int = 0
    budget: int = 0
    why: str = ""


def place_source(
    train: Pixels,
    val: Pixels,
    model: Classifier,
    *,
    views: int,
    runtime: Runtime,
    budget_bytes: int | None = None,
) -> Placement:
    """Decide from the model's freeze line what is computed once: pooled features, activations at a cut, or nothing.

    Args:
        views: views stored per training picture, the plain one included (one when nothing is augmented).
        budget_bytes: what stored activations may take, in all processes together; None is 4 GB of memory, or 40 % of
            what is free if that is less, or half of the cache folder where they are kept there. Where they do not fit,
            a smaller tensor further to the front is stored, or else pixels feed the stage.
    """
    views = views if train.is_augmented else 1
    passes = len(train) * views + len(val)
    if model.backbone_is_frozen:
        nbytes = passes * model.num_features * 4
        large = f"The frozen backbone runs once ({_counts(train, val, views)}): {_size(nbytes)} of features."
        return Placement(views, None, passes, nbytes, why=large if nbytes >= _LARGE else "")
    if model.freeze_line is None or not model.freeze_line.frozen:
        return Placement()
    # All processes must take the same way, and each holds all rows: together they may take what one of them may.
    budget = runtime.least(_budget(train, model, runtime) if budget_bytes is None else budget_bytes) // runtime.world
    # Validation is kept in float32: bytes per number of a picture's activation, over all pictures.
    bytes_per_number = len(train) * views * runtime.dtype.itemsize + len(val) * 4
    find = partial(
        cut_or_reason,
        model.backbone,
        model.freeze_line.trained,
        example_shape=(3, model.spec.image_size, model.spec.image_size),
        forward=partial(backbone_output, pool=model.pool),
        kept_in_eval=model.kept_in_eval,
    )
    found = find()
    if isinstance(found, Cut) and (nbytes := math.prod(found.shape) * bytes_per_number) > budget:
        smaller = find(max_bytes=budget // bytes_per_number * found.dtype.itemsize)
        taken = f"{_size(nbytes)} of activations ({_counts(train, val, views)}) exceed the {_size(budget)} allowed"
        found = smaller if isinstance(smaller, Cut) else taken
    if not isinstance(found, Cut):
        return Placement(budget=budget, why=f"Frozen layers run in every step: {found}.")
    nbytes = math.prod(found.shape) * bytes_per_number
    why = f"Frozen layers up to {found.at} run once ({_counts(train, val, views)}), stored in {_size(nbytes)}."
    return Placement(views, found, passes, nbytes, budget, why)


def _budget(train: Pixels, model: Classifier, runtime: Runtime) -> int:
    memory = min(STORE_BYTES, int(STORE_SHARE * free_memory_bytes()))
    is_kept = model.backbone_name and isinstance(train.augment, AugmentSpec) and runtime.world == 1
    if train.store is None or not is_kept or not train.store.cache.is_writable:
        return memory
    return max(memory, min(train.store.cache.room(), train.store.cache.limit_bytes // 2))


def _counts(train: Pixels, val: Pixels, views: int) -> str:
    return f"{len(train):,} pictures x {views} view{'s' * (views != 1)}, {len(val):,} for validation"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def make_source(
    train: Pixels,
    val: Pixels,
    model: Classifier,
    *,
    views: int,
    runtime: Runtime,
    batch_size: int = 32,
    advance: Advance | None = None,
    placement: Placement | None = None,
    aside: Aside | None = None,
) -> StageData:
    """Make what the loop is fed with, from where the model's freeze line stands.

    What stands in front of the line runs here, once: `views` times per training picture (once when nothing is
    augmented) and once per validation picture, that one in float32 as `predict` would. With nothing in front of the
    line, or where the backbone cannot be cut, the loop gets pixels.

    Args:
        views: views stored per training picture, the plain one included.
        batch_size: pictures in a pass of the frozen part.
        advance: called with the number of pictures done, for a progress bar.
        placement: what `place_source` decided; None decides here.
        aside: finds where the next stage cuts the backbone that this one runs whole; see `store_features`.
    """
    place = placement or place_source(train, val, model, views=views, runtime=runtime)
    if not place.views:
        return StageData(PixelSource(train), PixelSource(val))
    sources: list[Source] = []
    as_predict = replace(runtime, dtype=torch.float32, compile="off")
    for part, n, how in ((train, place.views, runtime), (val, 1, as_predict)):
        if place.cut is None:
            features = store_features(
                model, part, views=n, runtime=how, batch_size=batch_size, advance=advance, aside=aside
            )
            held = runtime.gpu if runtime.holds(features.nbytes) else None
            sources.append(FeatureSource(features, _labels(part), held))
        else:
            stored = store_activations(
                model, place.cut, part, views=n, runtime=how, batch_size=batch_size, advance=advance
            )
            sources.append(ActivationSource(stored, _labels(part), place.cut))
    return StageData(*sources)
