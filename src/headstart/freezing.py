"""The freeze line: what stands in front of it is a fixed function of the pixels, what stands behind it is trained.

Two different things are kept apart: *trainable* (gradients, `requires_grad`) and *training mode* (batch statistics
are used and learned, dropout and drop-path act). In front of the line nothing is trainable and nothing is in training
mode. Behind it everything is trainable and in training mode, except BatchNorm, which `batchnorm` governs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .backbones import block_aliases
from .blocks import block_names, network_depths
from .classifier import Classifier, as_classifier
from .errors import ModelError, near_matches
from .recipe import BATCHNORM_MODES
from .tracing import Trace

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class FreezeLine:
    """Where the line stands and what that means.

    frozen, trained: backbone layers in front of and behind the line, in order of execution, by their timm names.
    head: the head's layers, always trained. Parameters are counted over backbone and head; statistics are the
    numbers in running means and variances. cut_block: the block that the line runs through, one part of it trained and
    the other not; None where it stands between blocks.
    """

    where: str
    batchnorm: str
    frozen: tuple[str, ...]
    trained: tuple[str, ...]
    head: tuple[str, ...]
    trainable_parameters: int
    frozen_parameters: int
    statistics: int
    cut_block: str | None = None

    def describe(self) -> str:
        """One line for the terminal: what is trained, how much of it, and what BatchNorm does."""
        if not self.trained:
            part = "the head; the whole backbone is frozen"
        elif not self.frozen:
            part = "the whole backbone and the head"
        else:
            part = f"the head and {len(self.trained)} of {len(self.trained) + len(self.frozen)} backbone layers"
            part += f", from {self.trained[0]} on"
        if self.cut_block:
            part += f", which cuts {self.cut_block} in two (a block is better trained whole or not at all)"
        counts = f"{self.trainable_parameters:,} parameters trained, {self.frozen_parameters:,} frozen"
        modes = {
            "fixed": "statistics fixed, scale and shift trained",
            "frozen": "frozen",
            "train": "statistics learned",
        }
        batchnorm = f"; BatchNorm behind the line: {modes[self.batchnorm]}" if self.trained and self.statistics else ""
        return f"training {part} ({counts}{batchnorm})"


# ---------------------------------------------------------------- layers in order of execution


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own and none below it, or a single parameter of a module that has both.

    start: position in the trace at which it is first needed. parameters: full names.
    """

    name: str
    start: int
    parameters: tuple[str, ...]


def backbone_layers(model: Classifier) -> tuple[str, ...]:
    """The backbone's layers that own parameters, in order of execution.

    A parameter that a block holds itself (ViT's `pos_embed`, ConvNeXt's `gamma`) is a layer of its own name.
    Parameters that the forward pass never reads are not layers; they are never trained.
    """
    return tuple(layer.name for layer in layers_in_order(model.backbone, model.backbone_trace()))


def layers_in_order(net: nn.Module, seen: Trace) -> list[Layer]:
    """The layers of a traced module that own parameters, by their first use."""
    calls = seen.first_calls()
    layers = []
    for name, module in net.named_modules():
        own = [(f"{name}.{n}" if name else n) for n, _ in module.named_parameters(recurse=False)]
        used = [n for n in own if n in seen.first_use]
        if not used:
            continue
        if len(own) < len(list(module.parameters())):  # children have some as well
            layers += [Layer(n, seen.first_use[n], (n,)) for n in used]
        else:
            start = min(seen.first_use[n] for n in used)
            layers.append(Layer(name, min(start, calls[name].start) if name in calls else start, tuple(own)))
    return sorted(layers, key=lambda layer: layer.start)


def _line_position(model: Classifier, layers: list[Layer], where: str) -> int:
    """The number of layers in front of the line."""
    if where == "head":
        return len(layers)
    if where == "all":
        return 0
    if where.startswith("last:"):
        position = len(layers) - _last_n(where, len(layers))
        return _start_of_block(model.backbone, layers, position) if where.endswith("%") else position
    names = [layer.name for layer in layers]
    aliases = block_aliases(model.backbone)
    for position, name in enumerate(names):
        if any(fnmatchcase(n, where) for n in _with_parents(name)) or any(
            fnmatchcase(alias, where) and name in modules for alias, modules in aliases.items()
        ):
            return position
    known = tuple(dict.fromkeys([*aliases, *(n for name in names for n in _with_parents(name))]))
    modules = {n for n, _ in model.backbone.named_modules()}
    why = "it has no parameters" if where in modules else "no layer or block of the backbone has that name"
    raise ModelError(
        f"freeze line {where!r} selects nothing: {why}.{near_matches(where.strip('*'), known)} "
        f"Allowed: head, all, last:N (1 to {len(names)}), last:N%, or a name or wildcard, for example "
        f"{', '.join([*aliases, *dict.fromkeys(n.split('.')[0] for n in names)][-4:])}."
    )


def _last_n(where: str, count: int) -> int:
    text = where.removeprefix("last:")
    is_share, digits = text.endswith("%"), text.removesuffix("%")
    if not digits.isdecimal() or not 1 <= int(digits) <= (100 if is_share else count):
        raise ModelError(
            f"freeze line {where!r}: {text or 'nothing'} is not a number from 1 to {count}, the backbone layers that "
            "own parameters, nor a share of them from 1% to 100%. Use head to freeze them all, all to train them all."
        )
    return math.ceil(count * int(digits) / 100) if is_share else int(digits)


def _start_of_block(net: nn.Module, layers: list[Layer], position: int) -> int:
    """The line moved in front of the block that it would split: a share of the layers is a share of whole blocks."""
    depths = network_depths(net)
    blocks: list[Any] = (
        block_names([layer.name for layer in layers])
        if depths is None
        else [depths.get(layer.parameters[0]) for layer in layers]
    )
    while position and blocks[position - 1] == blocks[position]:
        position -= 1
    return position


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


# ---------------------------------------------------------------- setting the line


def is_batchnorm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics: every BatchNorm of PyTorch and timm, frozen ones, SyncBatchNorm."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or any(
        module._buffers.get(n) is not None for n in _STATISTICS
    )


def learns_statistics(model: Classifier) -> bool:
    """Whether some BatchNorm of the model, head included, is in training mode when the model is."""
    kept = {id(module) for module in model.kept_in_eval}
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in kept for m in model.modules())


def set_freeze_line(model: Classifier, where: str, *, batchnorm: str = "fixed") -> FreezeLine:
    """Freeze everything in front of the line and make everything behind it trainable; the head always is.

    Args:
        where: `head` (the whole backbone is frozen), `all` (nothing is), `last:N` (the last N backbone layers that
            own parameters are trained), `last:N%` (that share of them, rounded up to whole blocks), or a block's or
            layer's name or wildcard (`layer4`, `blocks.6*`; VGG's `block1`..`block5`): the line stands before the
            first match in order of execution. On VGG16 `last:3` is `block5`, what Keras's `layers[:-4]` leaves
            trainable, since Keras counts the pooling layer too. A block or layer of the network that is itself called
            `head` is `head*`.
        batchnorm: of the backbone behind the line: `fixed` (statistics fixed, scale and shift trained), `frozen`
            (nothing of it trained) or `train` (statistics learned too). Other norms (LayerNorm, GroupNorm) keep no
            statistics and are trained like any layer. The head's own BatchNorm always learns.
    Returns:
        The line, also kept as `model.freeze_line`.
    Raises:
        ModelError: the pattern selects nothing, N is out of range, or nothing would be trained.
    """
    line = place_line(model, where, batchnorm=batchnorm)
    if not line.trainable_parameters:
        raise ModelError(f"With the freeze line at {where!r} nothing would be trained: the head has no parameters.")
    return line


def place_line(model: Classifier, where: str, *, batchnorm: str = "fixed") -> FreezeLine:
    """`set_freeze_line` also where nothing is left to train: a backbone alone, as a table shows it."""
    if batchnorm not in BATCHNORM_MODES:
        raise ModelError(
            f"batchnorm is {batchnorm!r}; allowed: {', '.join(BATCHNORM_MODES)}."
            f"{near_matches(batchnorm, BATCHNORM_MODES)}"
        )
    if not isinstance(where, str):
        raise ModelError(f"The freeze line is {where!r}; it takes a name: head, all, last:N or a block's.")
    model = as_classifier(model)
    net, seen = model.backbone, model.backbone_trace()
    layers = layers_in_order(net, seen)
    position = _line_position(model, layers, where)
    behind = layers[position:]
    norms = {id(p) for m in net.modules() if is_batchnorm(m) for p in m.parameters(recurse=False)}
    fixed = {id(p) for p in model.fixed}
    trained = _trained(net, layers[:position], behind, but=fixed | (norms if batchnorm == "frozen" else set()))
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in trained and parameter.is_floating_point())
    for parameter in model.head.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in fixed)
    # With nothing in front of the line, what runs before the first weight (noise, dropout) is behind it, too.
    start = None if not behind else behind[0].start if position else -1
    model.plan_modes(_kept_in_eval(net, seen, start, batchnorm))
    model.freeze_line = _describe(model, where, batchnorm, layers, position)
    return model.freeze_line  # type: ignore[no-any-return]


def _trained(net: nn.Module, frozen: Sequence[Layer], behind: Sequence[Layer], *, but: set[int]) -> set[int]:
    """The ids of the parameters behind the line, `but` these; one under two names may not lie on both sides of it."""
    named = dict(net.named_parameters(remove_duplicate=False))
    in_front = {id(named[name]): name for layer in frozen for name in layer.parameters}
    names = [name for layer in behind for name in layer.parameters if id(named[name]) not in but]
    for name in names:
        if id(named[name]) in in_front:
            raise ModelError(
                f"{in_front[id(named[name])]} and {name} are one parameter: trained behind the freeze line, it would"
                " change what lies in front of the line. Set the line in front of both, or behind them."
            )
    return {id(named[name]) for name in names}


def _kept_in_eval(net: nn.Module, seen: Trace, line: int | None, batchnorm: str) -> list[nn.Module]:
    """Modules that stay in evaluation mode: all in front of the line, and BatchNorm behind it unless it learns.

    A module's own flag counts, not its children's. One that begins in front of the line and ends behind it (the
    network itself, for one) is behind it, unless it drops values itself before the line is reached.
    """
    if line is None:
        return list(net.modules())
    # What also runs in front of the line must be fixed there, so a module's first call decides.
    calls = seen.first_calls()
    in_front: dict[str, bool] = {}
    kept = []
    for name, module in net.named_modules():  # parents come before their children
        if name in calls:
            in_front[name] = calls[name].end < line
        else:  # read by its parent instead of called: as its own weights say, or else as its parent
            prefix = f"{name}." if name else ""
            uses = [seen.first_use[n] for n in (prefix + t for t in _tensor_names(module)) if n in seen.first_use]
            in_front[name] = max(uses) < line if uses else in_front.get(name.rpartition(".")[0], False)
        drops_in_front = seen.first_random.get(name, line) < line
        if in_front[name] or drops_in_front or (is_batchnorm(module) and batchnorm != "train"):
            kept.append(module)
    return kept


def _tensor_names(module: nn.Module) -> list[str]:
    return [n for n, _ in (*module.named_parameters(), *module.named_buffers())]


def _describe(model: Classifier, where: str, batchnorm: str, layers: list[Layer], position: int) -> FreezeLine:
    names = [layer.name for layer in layers]
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    head = [n for n, m in model.head.named_modules() if next(m.parameters(recurse=False), None) is not None]
    return FreezeLine(
        where=where,
        batchnorm=batchnorm,
        frozen=tuple(names[:position]),
        trained=tuple(names[position:]),
        head=tuple(head),
        trainable_parameters=counts[True],
        frozen_parameters=counts[False],
        statistics=count_statistics(model),
        cut_block=_cut_block(model.backbone, names, position),
    )


def _cut_block(net: nn.Module, names: list[str], position: int) -> str | None:
    """The block (a module in a list or sequence of such) that holds the layers on both sides of the line."""
    if not 0 < position < len(names):
        return None
    both = [n for n in _with_parents(names[position - 1]) if n in _with_parents(names[position])]
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if not both or isinstance(net.get_submodule(both[-1]), lists):
        return None  # the line stands between two members
    return next((n for n in reversed(both) if isinstance(net.get_submodule(n.rpartition(".")[0]), lists)), None)


def count_statistics(module: nn.Module) -> int:
    """The numbers in running means and variances."""
    return sum(b.numel() for n, b in module.named_buffers() if n.rpartition(".")[2] in _STATISTICS)
