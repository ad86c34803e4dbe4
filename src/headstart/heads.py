"""Build a head from its spec: what turns pooled features into logits."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from .errors import ModelError
from .recipe import HeadSpec, HiddenLayer

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class BinaryLogits(nn.Module):
    """One sigmoid output as the logits of two classes: z [N, 1] -> [0, z] [N, 2].

    softmax([0, z])[1] equals sigmoid(z), so cross-entropy on it is binary cross-entropy on z, and everything behind
    the head treats two classes like any other number.
    """

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(z), z], dim=1)


def create_head(spec: HeadSpec, num_features: int, num_classes: int) -> nn.Module:
    """A head for pooled features [N, num_features] -> logits [N, num_classes], as an `nn.Sequential` of named layers.

    In order: BatchNorm on the features, the hidden layers (Linear, BatchNorm before or after the activation,
    dropout), dropout, the last Linear. Pooling is not part of it: the classifier pools before it.
    Weights of the last layer are drawn uniformly after Glorot and Bengio 2010 (Xavier), its bias is zero.

    Raises:
        ModelError: fewer than two classes, or a sigmoid output for other than two.
    """
    if num_classes < 2:
        raise ModelError(f"A head for {num_classes} class(es): there is nothing to tell apart. It takes two or more.")
    if spec.output == "sigmoid" and num_classes != 2:
        raise ModelError(
            f"output='sigmoid' is one output for two classes; there are {num_classes}. Use output='softmax'."
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if spec.batchnorm:
        layers["norm"] = nn.BatchNorm1d(num_features)
    width = num_features
    for number, hidden in enumerate(spec.hidden, 1):
        layers.update(_hidden_layers(hidden, width, f"hidden{number}"))
        width = hidden.width
    if spec.dropout:
        layers["dropout"] = nn.Dropout(spec.dropout)
    last = nn.Linear(width, 1 if spec.output == "sigmoid" else num_classes)
    nn.init.xavier_uniform_(last.weight)
    nn.init.zeros_(last.bias)
    layers["classifier"] = last
    if spec.output == "sigmoid":
        layers["logits"] = BinaryLogits()
    return nn.Sequential(layers)


def _hidden_layers(hidden: HiddenLayer, width: int, name: str) -> dict[str, nn.Module]:
    norm = {f"{name}_norm": nn.BatchNorm1d(hidden.width)}
    layers: dict[str, nn.Module] = {name: nn.Linear(width, hidden.width)}
    if hidden.batchnorm == "before":
        layers |= norm
    if hidden.activation != "none":
        layers[f"{name}_{hidden.activation}"] = _ACTIVATIONS[hidden.activation]()
    if hidden.batchnorm == "after":
        layers |= norm
    if hidden.dropout:
        layers[f"{name}_dropout"] = nn.Dropout(hidden.dropout)
    return layers
