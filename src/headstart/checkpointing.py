"""Activations that are computed again for the backward pass instead of being kept: less memory for more time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .fxtrace import Forward, Uncuttable
from .passgraph import PassGraph, record, tensor_shapes, with_numbers_held

Within = Callable[[], AbstractContextManager[object]]

_TRIALS = 24  # sizes of the largest segment that are tried


class Segments:
    """A forward pass in segments, each kept as its input alone and computed again for the backward pass.

    Gradients are those of the plain pass: dropout draws the same numbers again, and BatchNorm that learns takes its
    statistics from the first pass only. Reference: Chen et al. 2016, arXiv 1604.06174.

    Args:
        again: what the second pass runs within, where the first one does: the backward pass leaves it.
    """

    def __init__(self, parts: Sequence[nn.Module], again: Within = nullcontext) -> None:
        self.parts, self.again = list(parts), again
        self._norms = [
            [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._NormBase)] for part in self.parts
        ]

    def __call__(self, x: Tensor) -> Tensor:
        for part, norms in zip(self.parts, self._norms, strict=True):
            x = checkpoint(part, x, use_reentrant=False, context_fn=self._contexts(norms))
        return x

    def _contexts(
        self, norms: Sequence[nn.modules.batchnorm._NormBase]
    ) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        return lambda: (nullcontext(), _without_learning(norms, self.again))


@contextmanager
def _without_learning(norms: Sequence[nn.modules.batchnorm._NormBase], again: Within) -> Iterator[None]:
    """Norms with statistics normalise as before, but leave their running statistics and their count alone."""
    before = [(norm, norm.momentum, norm._buffers.get("num_batches_tracked")) for norm in norms]
    try:
        for norm, _, count in before:
            norm.momentum = 0.0
            if count is not None:
                norm._buffers["num_batches_tracked"] = None
        with again():
            yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if count is not None:
                norm._buffers["num_batches_tracked"] = count


def segments(
    net: nn.Module,
    *,
    example_shape: tuple[int, ...],
    forward: Forward = nn.Module.__call__,
    kept_in_eval: Sequence[nn.Module] = (),
    again: Within = nullcontext,
) -> Segments | str:
    """Divide a pass in training mode where a single tensor is alive, so that least memory is taken; or say why not.

    What is kept is the segments' inputs, and while one is computed again all that lies in it: the sum of both is
    made as small as it gets.

    Args:
        net: a network, or the recorded half of one (see `cut`).
        example_shape: of one input, without the batch.
        kept_in_eval: modules (each without its children) that stay in evaluation mode in training.
        again: see `Segments`.
    """
    try:
        if isinstance(net, fx.GraphModule):
            graph = PassGraph(net, net.graph)
        else:
            graph = record(net, forward, training=True, but=kept_in_eval)
        with torch.random.fork_rng(devices=[]):
            shapes = tensor_shapes(graph, net, example_shape)
            graph = with_numbers_held(graph, net, example_shape)
    except Uncuttable as reason:
        return str(reason)
    sizes = [
        math.prod(shapes[node.name][0]) * shapes[node.name][1].itemsize if node.name in shapes else 0
        for node in graph.chain
    ]
    places = [graph.place[n] for n in graph.single_tensors(len(sizes) - 1) if _is_place(graph, n)]
    ends = [graph.chain[place] for place in best_places(sizes, [p for p in places if sizes[p]])]
    pieces = zip([None, *ends], [*ends, None], strict=True)
    return Segments([graph.piece(start, end) for start, end in pieces], again)


def _is_place(graph: PassGraph, node: fx.Node) -> bool:
    """A result that is not changed in place by the BatchNorm behind it, which is part of its convolution by then."""
    norms = nn.modules.batchnorm._NormBase
    followed_by_norm = any(
        user.op == "call_module" and isinstance(graph.whole.get_submodule(str(user.target)), norms)
        for user in node.users
    )
    return node is not graph.input and not followed_by_norm


def best_places(sizes: Sequence[int], places: Sequence[int]) -> list[int]:
    """Where to divide a chain of results of these sizes; `places` are allowed, rising.

    For a number of bounds on the largest segment, the division with the least sum of inputs; of these the one whose
    inputs and largest segment together take least.
    """
    points = [-1, *places, len(sizes) - 1]
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    inside = [[before[b + 1] - before[a + 1] for a in points[:j]] for j, b in enumerate(points)]
    least = max((min(row) for row in inside[1:]), default=0)
    best: tuple[int, list[int]] = (before[-1], [])
    for k in range(_TRIALS):
        bound = int(least * (max(before[-1], 1) / max(least, 1)) ** (k / (_TRIALS - 1))) + 1
        found = _least_inputs([sizes[p] if p >= 0 else 0 for p in points], inside, bound)
        if found and found[0] + min(bound, before[-1]) < best[0]:
            best = found[0] + bound, [points[i] for i in found[1]]
    return best[1]


def _least_inputs(inputs: Sequence[int], inside: Sequence[Sequence[int]], bound: int) -> tuple[int, list[int]] | None:
    """The cheapest way through the points with no segment above the bound: its inputs' bytes, and the points."""
    cost: list[float] = [0.0]
    came: list[int] = [0]
    for j in range(1, len(inputs)):
        ways = [(cost[i] + inputs[i], i) for i in range(j) if inside[j][i] <= bound]
        best = min(ways, default=(math.inf, 0))
        cost.append(best[0])
        came.append(best[1])
    if math.isinf(cost[-1]):
        return None
    path, at = [], came[-1]
    while at:
        path.append(at)
        at = came[at]
    return int(cost[-1]), path[::-1]
