"""A linear head from features that are all at hand: ridge regression in closed form, and L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .classifier import Classifier
from .errors import ModelError
from .features import FeatureSource, StageData
from .recipe import Stage

# Relative to the features' own scale, which is one after standardising.
PENALTIES = tuple(10.0 ** (k / 2) for k in range(-4, 7))
# Ridge regression is fitted to targets of +-1; cross-entropy wants logits of another scale. A small validation split
# that is told apart without an error would take ever larger ones, and be wrong beyond measure elsewhere.
SCALES = tuple(10.0 ** (k / 10) for k in range(-5, 6))

LBFGS_ITERATIONS = 5  # in an epoch; each is about one pass over all stored views
_THROUGH = 1e-6


@dataclass(frozen=True)
class Ridge:
    """A linear head in closed form: `weight` [C, D] and `bias` [C], the penalty they belong to, and their val loss."""

    weight: Tensor
    bias: Tensor
    penalty: float
    loss: float


def fit_ridge(x: Tensor, labels: Tensor, val_x: Tensor, val_labels: Tensor, num_classes: int) -> Ridge:
    """Ridge regression on standardised features for every penalty at once; the best by validation cross-entropy.

    One eigendecomposition, of the D x D or the N x N products, whichever is smaller, serves all penalties. Targets are
    +-1 per class. A penalty's logits are the regression times one positive number, chosen with it.

    Args:
        x, val_x: features [N, D], float32. labels, val_labels: class ids.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))  # a constant feature tells nothing
    z, n = (x - mean) / std, len(x)
    targets = 2.0 * nn.functional.one_hot(labels, num_classes).to(x) - 1.0
    offset = targets.mean(0)
    products = z.T @ (targets - offset) / n
    if n >= x.shape[1]:
        values, basis = torch.linalg.eigh(z.T @ z / n)
    else:
        values, vectors = torch.linalg.eigh(z @ z.T / n)
        kept = values > 1e-6 * values[-1]
        values, basis = values[kept], z.T @ vectors[:, kept] / (n * values[kept]).sqrt()
    in_basis, seen = basis.T @ products, (val_x - mean) / std @ basis
    best: tuple[float, float, float] | None = None
    for penalty in PENALTIES:
        outputs = seen @ (in_basis / (values + penalty).clamp(min=penalty)[:, None]) + offset
        for scale in SCALES:
            loss = float(nn.functional.cross_entropy(scale * outputs, val_labels))
            if best is None or loss < best[0]:
                best = loss, penalty, scale
    assert best is not None
    loss, penalty, scale = best
    weight = scale * (basis @ (in_basis / (values + penalty).clamp(min=penalty)[:, None])).T / std
    return Ridge(weight, scale * offset - weight @ mean, penalty, loss)


def linear_layer(model: Classifier) -> nn.Linear | None:
    """The head's one Linear that gives the logits; None where the head does anything besides."""
    leaves = [m for m in model.head.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    if len(leaves) == 1 and isinstance(leaves[0], nn.Linear) and leaves[0].out_features == len(model.class_names):
        return leaves[0]
    return None


def check_linear(model: Classifier, data: StageData, stage: Stage) -> None:
    """Refuse `warm_start` and L-BFGS where they cannot do what they say.

    Raises:
        ModelError: the backbone is not wholly frozen, or the head is more than one Linear.
    """
    stored = isinstance(data.train, FeatureSource) and isinstance(data.val, FeatureSource)
    if stage.linear_settings and not stored:
        raise ModelError(
            f"stage {stage.name!r}: {stage.linear_settings}, which works on stored features, but the freeze line stands"
            f" at {stage.freeze_line!r}. Take it for a stage with freeze_line 'head'."
        )
    check_linear_head(model, stage)


def check_linear_head(model: Classifier, stage: Stage) -> None:
    """What a recipe cannot tell of a head module of the user's own; see `check_linear`.

    Raises:
        ModelError: the head is more than one Linear.
    """
    if stage.linear_settings and linear_layer(model) is None:
        raise ModelError(
            f"stage {stage.name!r}: {stage.linear_settings}, which is for a head of one Linear alone; this one has"
            " other layers or one sigmoid output. Leave hidden layers, dropout and BatchNorm out of the head, or take"
            " warm_start 'none' and another optimizer."
        )


def set_ridge(model: Classifier, train: FeatureSource, val: FeatureSource) -> Ridge:
    """Give the head the ridge solution on all stored views, the penalty chosen on the plain validation views."""
    layer = linear_layer(model)
    assert layer is not None
    x, labels = all_views(train)
    found = fit_ridge(x, labels, val.features[:, 0].float(), val.labels, len(model.class_names))
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        if layer.bias is not None:
            layer.bias.copy_(found.bias)
    return found


def all_views(source: FeatureSource) -> tuple[Tensor, Tensor]:
    """Features [K * N, D] in float32, view after view, and the label of each."""
    features = source.features.transpose(0, 1)
    return features.flatten(0, 1).float(), source.labels.repeat(len(features))


def lbfgs_epoch(
    optimizer: torch.optim.Optimizer,
    model: Classifier,
    source: FeatureSource,
    mean_loss: Callable[[Tensor, Tensor], Tensor],
    *,
    weight_decay: float,
) -> tuple[float, bool]:
    """Some iterations of L-BFGS on all stored views; returns the mean loss at their start, and whether it is through.

    Minimised is mean_loss(logits, labels) + weight_decay / 2 * |weight|^2; the bias is left alone. It is through where
    that has fallen by less than a millionth part.
    """
    device = next(model.head.parameters()).device
    x, labels = (t.to(device) for t in all_views(source))
    decayed = [p for p in model.head.parameters() if p.ndim > 1]
    losses: list[float] = []
    totals: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = mean_loss(source.forward(model, x), labels)
        total = loss + weight_decay / 2 * sum((p.square().sum() for p in decayed), torch.zeros((), device=device))
        total.backward()
        losses.append(float(loss.detach()))
        totals.append(float(total.detach()))
        return totals[-1]

    optimizer.step(closure)
    optimizer.zero_grad(set_to_none=True)
    return losses[0], totals[0] - min(totals) <= _THROUGH * abs(totals[0])
