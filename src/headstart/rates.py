"""Optimiser groups: which parameters are decayed, and the learning rate of each depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .blocks import block_names, network_depths
from .classifier import Classifier
from .errors import ModelError
from .freezing import is_batchnorm, layers_in_order


def param_groups(
    model: Classifier,
    *,
    lr: float,
    head_lr_multiplier: float = 1.0,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into optimiser groups: backbone and head, each with and without weight decay.

    With `layer_decay` below 1 the backbone has groups for each depth, and lr(depth) = lr * layer_decay ** (deepest -
    depth).
    Norms, biases, single numbers per channel and what the network itself exempts (`no_weight_decay()`, such as
    position embeddings) are not decayed.

    Args:
        lr: learning rate of the backbone's deepest layers, per optimiser step; the head has `lr * head_lr_multiplier`.
        weight_decay: of the parameters that are decayed; 0 is none.
        layer_decay: factor in (0, 1] from each depth to the one in front of it; 1 means one rate everywhere. Depths
            are counted over the whole backbone, wherever the freeze line stands.
    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`, input side first; empty ones are left out. Together
        they hold every trainable parameter exactly once.
    Raises:
        ModelError: nothing is trainable; a trainable parameter has no depth.
    Reference: Bao et al. 2021, arXiv 2106.08254.
    """
    depths = layer_depths(model) if layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for part, name, parameter, is_decayed in _trainable(model):
        depth = depths.get(name, 0) if part == "backbone" else 0
        label = f"backbone, depth {depth} of {deepest}" if part == "backbone" and depths else part
        rate = lr * layer_decay ** (deepest - depth) if part == "backbone" else lr * head_lr_multiplier
        group = {
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
            "name": label if is_decayed else f"{label}, no decay",
        }
        groups.setdefault((part, depth, not is_decayed), group)["params"].append(parameter)
    if not groups:
        raise ModelError("Nothing is trainable. Set a freeze line: set_freeze_line(model, 'head').")
    return [groups[key] for key in sorted(groups)]  # "backbone" comes before "head"


def layer_depths(model: Classifier) -> dict[str, int]:
    """The depth of each of the backbone's parameters, from 0 at the input; those of one block share one.

    timm's networks say themselves what their blocks are. In any other a block is what its name says up to the first
    number in it (`layer4.0`, `stages.2`), in order of execution.

    Raises:
        ModelError: a trainable parameter is never used, so it has no depth; the message lists up to five.
    """
    net = model.backbone
    depths = network_depths(net)
    if depths is not None:
        return dict(depths)
    layers = layers_in_order(net, model.backbone_trace())
    blocks = block_names([layer.name for layer in layers])
    depth_of = {block: depth for depth, block in enumerate(dict.fromkeys(blocks))}
    found = {name: depth_of[block] for layer, block in zip(layers, blocks, strict=True) for name in layer.parameters}
    lost = [name for name, p in net.named_parameters() if p.requires_grad and name not in found]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ModelError(
            f"layer_decay: {', '.join(lost[:5])}{more} of the backbone has no depth, since its forward pass does not"
            " use it. Freeze it, or train with layer_decay 1."
        )
    return found


def _trainable(model: Classifier) -> Iterator[tuple[str, str, nn.Parameter, bool]]:
    """Part, name within it, parameter, and whether it is decayed; a shared parameter comes once."""
    skip = _exempt(model.backbone)
    seen: set[int] = set()
    for part, net in (("backbone", model.backbone), ("head", model.head)):
        norms = {id(p) for m in net.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
        for name, p in net.named_parameters():
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            per_channel = p.ndim != 2 and p.numel() == max(p.shape, default=1)  # also as [C, 1, 1]
            spared = per_channel or id(p) in norms or name.endswith("bias") or (part == "backbone" and name in skip)
            yield part, name, p, not spared


def _exempt(net: nn.Module) -> set[str]:
    """Parameters that the network itself wants left alone by weight decay, by timm's two ways of saying so."""
    names, words = (getattr(net, n, None) for n in ("no_weight_decay", "no_weight_decay_keywords"))
    exempt = set(names()) if callable(names) else set()
    if callable(words):
        exempt |= {n for n, _ in net.named_parameters() if any(word in n for word in words())}
    return exempt


def _is_norm(module: nn.Module) -> bool:
    return is_batchnorm(module) or isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or "Norm" in type(module).__name__
