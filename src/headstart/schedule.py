"""What each step of a stage gets: its rate, its pictures and views, the weights of its loss, its optimiser."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .classifier import Classifier
from .errors import ModelError
from .linear import LBFGS_ITERATIONS
from .order import epoch_order
from .rates import param_groups
from .recipe import Stage


def learning_rate(step: int, *, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """The rate of optimiser step `step` (from 0) of `steps`.

    `warmup` is the share of the steps in which the rate rises linearly from 0; then it stays (`constant`), or
    follows half a cosine to 0 (`cosine`). `one-cycle` rises from lr/25 over the warm-up (0.3 when none is given)
    along half a cosine and falls to lr/1e4 (Smith and Topin 2018, arXiv 1708.07120; momentum is left alone).
    """
    if schedule == "one-cycle":
        rise = min(max(1, round((warmup or 0.3) * steps)), steps - 1)  # the only step there is has the full rate
        if step < rise:
            return _cosine(lr / 25, lr, step / rise)
        return _cosine(lr, lr / 1e4, (step - rise) / max(1, steps - rise))
    rise = round(warmup * steps)
    if step < rise:
        return lr * (step + 1) / (rise + 1)
    if schedule == "constant":
        return lr
    return _cosine(lr, 0.0, (step - rise) / max(1, steps - rise))


def _cosine(start: float, end: float, at: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * at)) / 2


def in_numbers(stage: Stage) -> Stage:
    """The stage with its batch size as a number; `auto` is all pictures of an optimiser step in one batch."""
    if stage.batch_size != "auto":
        return stage
    return replace(stage, batch_size=stage.batch_pictures, accumulate=1)


def batches_of_epoch(n: int, labels: Tensor, stage: Stage, *, seed: int, epoch: int, least: int = 2) -> list[Tensor]:
    """The picture indices of each batch: a pure function of (seed, epoch).

    With balanced sampling n pictures are drawn with replacement, every class equally often on average. A last
    batch of one is joined to the one before it: BatchNorm in the head has no variance to take from one picture. So is
    one of fewer than `least`, where several processes need a picture each.
    """
    if stage.balanced_sampling:
        per_class = torch.bincount(labels).clamp(min=1)
        chances = (1.0 / per_class[labels].double()).numpy()
        rng = np.random.default_rng([seed, epoch, 1])
        order = rng.choice(n, size=n, p=chances / chances.sum())
    else:
        order = epoch_order(n, seed=seed, epoch=epoch)
    batches = list(torch.from_numpy(order).split(stage.batch_pictures))
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def views_of_epoch(indices: Tensor, num_views: int | None, *, epoch: int) -> Tensor:
    """Which view each picture shows in this epoch (from 1): the stored ones in turn, or a fresh one each time."""
    if num_views is None:
        return torch.full_like(indices, epoch)
    # Neighbours start at different views, so that every epoch is a mixture of them.
    return (indices + epoch) % num_views


def class_weight_vector(stage: Stage, labels: Tensor, num_classes: int) -> Tensor | None:
    """Weights [C] of the training loss, or None; `balanced` is N / (C * n_c), as in scikit-learn."""
    if stage.class_weights == "none":
        return None
    if stage.class_weights == "balanced":
        counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
        return len(labels) / (num_classes * counts.float())
    weights = torch.tensor(stage.class_weights, dtype=torch.float32)
    if len(weights) != num_classes:
        raise ModelError(
            f"stage {stage.name!r}: class_weights has {len(weights)} numbers for {num_classes} classes; give one each."
        )
    return weights


def make_optimizer(model: Classifier, stage: Stage, *, lr: float) -> torch.optim.Optimizer:
    """The stage's optimiser over everything trainable; weight decay is applied apart from it, decoupled.

    Each group keeps its share of the rate as `scale` and its decay as `decay`. L-BFGS takes neither.
    """
    groups = param_groups(
        model,
        lr=1.0,
        head_lr_multiplier=stage.head_lr_multiplier,
        weight_decay=stage.weight_decay,
        layer_decay=stage.layer_decay,
    )
    for group in groups:
        group["scale"], group["decay"], group["lr"] = group["lr"], group.pop("weight_decay"), lr * group["lr"]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    if stage.optimizer == "lbfgs":
        held = [p for group in groups for p in group["params"]]
        return torch.optim.LBFGS(held, max_iter=LBFGS_ITERATIONS, line_search_fn="strong_wolfe")
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=stage.momentum, fused=fused)
    if stage.optimizer == "rmsprop":
        # alpha and eps as in Keras, whose tutorials this optimiser serves.
        return torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=1e-7)
    return torch.optim.Adam(groups, lr=lr, fused=fused)
