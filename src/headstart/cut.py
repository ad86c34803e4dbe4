"""Cut a backbone in two where the freeze line lies: a fixed prefix to run once, and a suffix to train.

The backbone's forward is recorded as a graph. Between two operations where exactly one tensor is alive it can be cut;
both halves keep using the backbone's own modules and parameters, so training the suffix trains the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fxtrace import Forward, Uncuttable
from .passgraph import PassGraph, check_same, record, tensor_shapes, touches, with_numbers_held


def features(net: nn.Module, x: Tensor) -> Any:
    """timm's pooled features before the classifier, with the backbone's own pooling."""
    return net.forward_head(net.forward_features(x), pre_logits=True)  # type: ignore[operator]


def feature_map(net: nn.Module, x: Tensor) -> Any:
    """timm's features before pooling."""
    return net.forward_features(x)  # type: ignore[operator]


class Suffix(nn.Module):
    """What lies behind a cut, over the backbone's own modules; it never changes its input.

    Its own training flag chooses between the operations recorded in training and in evaluation mode (dropout that is
    written as a function of `self.training`); norms, dropout and drop-path modules go by their own flags. `train()`
    reaches the frozen layers between cut and line too: put them back into eval mode afterwards, as on the backbone; or
    set `training` alone where the backbone's modules have their modes already.
    """

    def __init__(self, train_graph: fx.GraphModule, eval_graph: fx.GraphModule) -> None:
        super().__init__()
        self.train_graph, self.eval_graph = train_graph, eval_graph

    def forward(self, x: Tensor) -> Any:
        return self.train_graph(x) if self.training else self.eval_graph(x)


@dataclass(frozen=True)
class Cut:
    """A backbone cut in two: `suffix(prefix(x))` is the forward that was asked for.

    Attributes:
        prefix: the fixed part; it shares the backbone's modules, which have to be in eval mode when it runs.
        suffix: the rest; see `Suffix`. Cut after moving the backbone to its device: buffers are shared as they are.
        at: what computes the stored tensor: a layer's name, or layer and operation as in `blocks.3.2 (add)`.
        frozen_between: layers with parameters behind the cut but not trained, in execution order.
        shape: shape of the stored tensor for one picture, without the batch.
        dtype: its number format when the backbone runs as it is.
    """

    prefix: nn.Module
    suffix: Suffix
    at: str
    frozen_between: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def bytes_per_picture(self, dtype: torch.dtype | None = None) -> int:
        """Size of one stored picture and view, in `dtype` or the backbone's own."""
        return math.prod(self.shape) * (dtype or self.dtype).itemsize


def cut(
    net: nn.Module,
    behind: str | Iterable[str],
    *,
    example_shape: tuple[int, ...],
    forward: Forward | str = features,
    max_bytes: int | None = None,
    kept_in_eval: Iterable[nn.Module] = (),
) -> Cut | None:
    """Cut a backbone at the last single tensor computed before anything trained; None where that cannot be done.

    `cut_or_reason` also says why not. Operations without weights just in front of the first trained layer belong to
    the prefix, so dropout among them is off.

    Args:
        behind: names of the trained layers or parameters (or a prefix of them, as `blocks.5`), in any order; one
            name alone means that layer and everything executed after it.
        example_shape: [C, H, W] of one picture.
        forward: function of (backbone, pictures [N, C, H, W]), or the name of a method.
        max_bytes: go further back to a tensor of at most this size per picture (in the backbone's own format).
        kept_in_eval: modules (each without its children) that stay in evaluation mode when the suffix is trained.
    """
    found = cut_or_reason(
        net, behind, example_shape=example_shape, forward=forward, max_bytes=max_bytes, kept_in_eval=kept_in_eval
    )
    return found if isinstance(found, Cut) else None


def cut_or_reason(
    net: nn.Module,
    behind: str | Iterable[str],
    *,
    example_shape: tuple[int, ...],
    forward: Forward | str = features,
    max_bytes: int | None = None,
    kept_in_eval: Iterable[nn.Module] = (),
) -> Cut | str:
    """As `cut`, with a reason in place of None."""
    call = _method(forward) if isinstance(forward, str) else forward
    names = (behind,) if isinstance(behind, str) else tuple(behind)
    try:
        at_eval = record(net, call, training=False)
        at_train = record(net, call, training=True, but=kept_in_eval)
        shapes = tensor_shapes(at_eval, net, example_shape)
        whole = fx.Interpreter(at_eval.whole, graph=at_eval.graph)
        check_same(whole.run, net, call, example_shape)
        try:
            place, place_train = _choose(at_eval, at_train, names, shapes, max_bytes)
            is_last = not at_eval.layers(place, at_eval.first_touch(names))
        except Uncuttable:
            is_last = False
        if not is_last:  # numbers that are alive all along may be in the way
            at_eval, at_train = (with_numbers_held(graph, net, example_shape) for graph in (at_eval, at_train))
            place, place_train = _choose(at_eval, at_train, names, shapes, max_bytes)
        prefix, eval_suffix = at_eval.split(place)
        check_same(lambda x: eval_suffix(prefix(x)), net, call, example_shape)
    except Uncuttable as reason:
        return str(reason)
    train_suffix = at_train.split(place_train)[1]
    layers = at_eval.layers(place)
    first_alone = isinstance(behind, str)
    line = at_eval.first_touch(names)
    frozen = at_eval.layers(place, line) if first_alone else [n for n in layers if not touches(n, names)]
    shape, dtype = shapes[place.name]
    suffix = Suffix(train_suffix, eval_suffix)
    suffix.training = net.training  # not `.train()`, which would reach the shared modules
    prefix.training = False
    return Cut(prefix, suffix, at_eval.describe(place), tuple(frozen), shape, dtype)


def _method(name: str) -> Forward:
    def call(net: nn.Module, x: Tensor) -> Any:
        return getattr(net, name)(x)

    return call


def _choose(
    at_eval: PassGraph,
    at_train: PassGraph,
    names: tuple[str, ...],
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    max_bytes: int | None,
) -> tuple[fx.Node, fx.Node]:
    """The last usable place at or before the line, in both recordings."""
    in_train = {at_train.key(node): node for node in at_train.single_tensors(at_train.first_touch(names))}
    places = [node for node in at_eval.single_tensors(at_eval.first_touch(names)) if node is not at_eval.input]
    fitting = False
    for node in reversed(places):
        if node.name not in shapes or not at_eval.has_weights(node) or at_eval.key(node) not in in_train:
            continue
        shape, dtype = shapes[node.name]
        if max_bytes is None or math.prod(shape) * dtype.itemsize <= max_bytes:
            return node, in_train[at_eval.key(node)]
        fitting = True
    if fitting:
        raise Uncuttable(f"no place before the line keeps a picture in {max_bytes:,} bytes")
    raise Uncuttable("no single tensor is computed from frozen weights before the first trained layer")
