"""How well a linear classifier tells pictures apart by what a backbone makes of them, its earlier blocks included."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from .backbones import pool_output
from .blocks import block_name
from .classifier import Classifier
from .doubtful import folds_of
from .linear import fit_ridge
from .once import Advance, fast_kernels
from .pixels import Pixels
from .runtime import Runtime

FINAL = ""  # the key of what the head takes
BATCH_SIZE = 32


@dataclass(frozen=True)
class Probe:
    """What ridge classifiers on one kind of features get right: `right` [N], each picture judged while held out.

    `mirrored` [N] is the same of the pictures' mirror images, by classifiers that saw plain ones; None if not asked.
    """

    right: NDArray[np.bool_]
    mirrored: NDArray[np.bool_] | None = None

    @property
    def accuracy(self) -> float:
        """Share of the pictures that are right."""
        return float(self.right.mean())


def blocks_to_probe(model: Classifier, shares: Sequence[float] = (0.5, 0.75)) -> tuple[str, ...]:
    """Whole blocks that end about these shares of the way through the backbone, in order; the last one is left out."""
    calls = model.backbone_trace().first_calls()
    blocks = [
        name
        for name, call in calls.items()
        if name.rpartition(".")[2].isdecimal() and block_name(name) == name and len(call.output_shape or ()) in (3, 4)
    ]
    return tuple(dict.fromkeys(blocks[int(share * len(blocks))] for share in shares)) if len(blocks) > 2 else ()


def pooled_features(
    model: Classifier,
    pixels: Pixels,
    *,
    blocks: Sequence[str] = (),
    mirrored: bool = False,
    side: int | None = None,
    runtime: Runtime,
    advance: Advance | None = None,
) -> dict[str, Tensor]:
    """Features [N, D] of the plain views, float32 on the CPU: what the head takes, and the mean of each block's map.

    Args:
        mirrored: left and right are swapped.
        side: the pictures are reduced to this side, in pixels; None is the network's own.
        advance: called with the number of pictures done.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in (*blocks, FINAL)}

    def keep(name: str, out: Tensor) -> None:
        found[name].append(out.detach().float().cpu())

    was_training = model.training
    model.eval()
    hooks = []
    try:
        with fast_kernels(model, runtime), torch.inference_mode(), runtime.autocast():
            for name in blocks:  # after the kernels are in place: those are found by tracing, which hooks would disturb
                hooks.append(
                    model.backbone.get_submodule(name).register_forward_hook(
                        lambda _m, _args, out, name=name: keep(name, pool_output(model.backbone, out, "avg"))
                    )
                )
            for part in torch.arange(len(pixels)).split(BATCH_SIZE):
                batch = pixels.batch(part.tolist(), [0] * len(part)).to(runtime.device)
                batch = batch.flip(-1) if mirrored else batch
                keep(FINAL, model.features(batch if side is None else interpolate(batch.float(), side, mode="area")))
                if advance:
                    advance(len(part))
            for hook in hooks:
                hook.remove()
            hooks.clear()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    # Random weights may blow up on the way; what is not finite tells nothing.
    return {name: torch.cat(rows).nan_to_num(0.0, 0.0, 0.0) for name, rows in found.items()}


def probe(
    features: Tensor,
    labels: NDArray[np.int64],
    groups: Sequence[str] = (),
    *,
    mirrored: Tensor | None = None,
    seed: int = 0,
) -> Probe:
    """Judge every picture by a ridge classifier that saw neither it nor its group (five folds).

    Each fold's penalty is chosen on the pictures it holds out: that flatters all kinds of features alike.

    Args:
        features: [N, D]. labels: class ids [N]. groups: per picture, '' for one by itself.
        mirrored: features [N, D] of the mirror images.
    """
    right = np.zeros(len(labels), dtype=bool)
    turned = None if mirrored is None else np.zeros(len(labels), dtype=bool)
    ids, classes = torch.tensor(labels), int(labels.max()) + 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # its pictures are then in fewer folds
        folds = folds_of(labels, groups, seed=seed)
    for train, held in folds:
        found = fit_ridge(features[train], ids[train], features[held], ids[held], classes)
        right[held] = _is_right(features[held], found.weight, found.bias, labels[held])
        if turned is not None and mirrored is not None:
            turned[held] = _is_right(mirrored[held], found.weight, found.bias, labels[held])
    return Probe(right, turned)


def _is_right(features: Tensor, weight: Tensor, bias: Tensor, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((features @ weight.T + bias).argmax(1).numpy() == labels)
