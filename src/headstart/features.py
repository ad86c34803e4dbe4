"""Sources of batches for the one training loop: pixels, or what the frozen part makes of them, computed once.

Whatever stands in front of the freeze line is a fixed function of the pixels, so its output is computed once per
picture and view and kept; an epoch then costs only what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .backbones import backbone_features
from .classifier import Classifier
from .fastops import fast_training
from .pixels import Pixels
from .recipe import AugmentSpec
from .runtime import Runtime

Advance = Callable[[int], None]


class Source(Protocol):
    """One split as the training loop sees it: labels, and inputs for any picture and view."""

    labels: Tensor
    """Class ids [N], int64, on the CPU."""
    num_views: int | None
    """Views per picture, the plain one (view 0) included; None: a fresh one for each epoch."""

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Inputs [B, ...] of these pictures in these views."""
        ...

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        """Logits [B, C] from such inputs."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether `batch` may run in another thread while the network draws random numbers."""
        ...


class PixelSource:
    """Pictures as they are, for a line so far forward that the whole network runs in every step."""

    @property
    def in_background(self) -> bool:
        # A transform of the user's draws from torch's global generator, and so do dropout and drop-path.
        return isinstance(self.pixels.augment, AugmentSpec)

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.labels = _labels(pixels)
        self.num_views = None if pixels.is_augmented else 1

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return self.pixels.batch(indices, views)

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        return model(inputs)  # type: ignore[no-any-return]


def _labels(pixels: Pixels) -> Tensor:
    return torch.tensor(pixels.table.labels, dtype=torch.int64)


class FeatureSource:
    """The frozen backbone's pooled features [N, K, D], computed once; only the head runs in a step."""

    in_background = True

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels
        self.num_views: int | None = features.shape[1]

    def batch(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return self.features[torch.as_tensor(indices), torch.as_tensor(views)]

    def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
        # The head is small and its inputs are stored: float32 costs nothing here and loses nothing.
        with torch.autocast(inputs.device.type, enabled=False):
            return model.head(inputs.float())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and is scored on."""

    train: Source
    val: Source


def make_source(
    train: Pixels,
    val: Pixels,
    model: Classifier,
    *,
    views: int,
    runtime: Runtime,
    batch_size: int = 32,
    advance: Advance | None = None,
) -> StageData:
    """Choose what the loop is fed with, from where the model's freeze line stands.

    With the whole backbone frozen it runs here, once: `views` times per training picture (once when nothing is
    augmented) and once per validation picture, that one in float32 as `predict` would. Otherwise the loop gets pixels.

    Args:
        views: views stored per training picture, the plain one included.
        advance: called with the number of pictures done, for a progress bar.
    """
    if not model.backbone_is_frozen:
        return StageData(PixelSource(train), PixelSource(val))
    parts = ((train, views if train.is_augmented else 1, runtime), (val, 1, replace(runtime, dtype=torch.float32)))
    return StageData(
        *(
            FeatureSource(
                store_features(model, part, views=n, runtime=how, batch_size=batch_size, advance=advance),
                _labels(part),
            )
            for part, n, how in parts
        )
    )


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
    jobs = torch.cartesian_prod(torch.arange(len(pixels)), torch.arange(views)).reshape(-1, 2)
    mine = runtime.share(jobs)
    rows = []
    was_training = model.training
    model.eval()
    with fast_kernels(model, runtime), torch.inference_mode(), runtime.autocast():
        for part in mine.split(batch_size):
            batch = pixels.batch(part[:, 0].tolist(), part[:, 1].tolist()).to(runtime.device)
            rows.append(model.features(batch).float().cpu())
            if advance:
                advance(len(part))
    model.train(was_training)
    # A copy made outside inference mode: autograd refuses to save inference tensors for the head's backward pass.
    stored = torch.cat(rows).clone()
    return runtime.gather(stored, len(jobs)).reshape(len(pixels), views, -1)


def fast_kernels(model: Classifier, runtime: Runtime) -> AbstractContextManager[object]:
    """On a CPU: the backbone's same arithmetic by faster kernels, in place; undone on leaving."""
    if runtime.device.type != "cpu":
        return nullcontext()
    return fast_training(model.backbone, lambda net, x: backbone_features(net, x, model.pool))
