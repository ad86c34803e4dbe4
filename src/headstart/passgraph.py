"""The forward pass of a network as a graph: how it is recorded, and what can be asked of it.

The graph is torch.fx's, with timm's own leaf modules and functions. It holds what one run of the forward did, so a
network that does something else at every call, or draws random numbers of its own, is refused.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .errors import in_words
from .fastconv import Done
from .stock import is_stock

Forward = Callable[[Any, Tensor], Any]

# `x += y` and its like, which change x.
IN_PLACE = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow}
)

# Modules whose behaviour hangs on their own training flag, and those whose class may be exchanged for a faster one:
# called as they are, never looked into.
_LEAVES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.dropout._DropoutNd,
    nn.Conv2d,
    Done,
    SqueezeExcite,
    DropPath,
    DropBlock2d,
)


class Whole(nn.Module):
    """A module with the forward that is asked for, as something a tracer can start from."""

    def __init__(self, net: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.net = net
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


class _InPlace(fx.Proxy):
    """Records `x += y` as what it is; the stock one takes it for `x = x + y`."""


def _recorded(operation: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _operation in IN_PLACE:
    setattr(_InPlace, f"__{_operation.__name__}__", _recorded(_operation))


class _Tracer(fx.Tracer):
    def __init__(self, *, in_place: bool) -> None:
        self._proxy = _InPlace if in_place else fx.Proxy
        functions = [function for function in get_notrace_functions() if callable(function)]
        super().__init__(autowrap_modules=(math,), autowrap_functions=tuple(functions))
        self._leaves = (*_LEAVES, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._proxy(node, self)


def trace(net: nn.Module, forward: Forward, *, in_place: bool = False) -> tuple[nn.Module, fx.Graph]:
    """Record `forward(net, x)` as a graph over the module that is returned with it; its names start with `net.`.

    The graph is that of the modes the modules are in: what asks for `self.training` in the middle of a forward is
    decided now. Normalisation, dropout and drop-path modules are called as they are and keep their own modes.

    in_place: record `x += y` as an operation of `IN_PLACE`, to be looked at; a graph that runs changes nothing in
    place, which would be what is stored at a cut.
    """
    whole = Whole(net, forward)
    return whole, _Tracer(in_place=in_place).trace(whole)


class Uncuttable(Exception):
    """Why a forward pass cannot be recorded, or not be cut where it was asked; those who ask catch it."""


@contextmanager
def _mode(net: nn.Module, training: bool, but: Iterable[nn.Module] = ()) -> Iterator[None]:
    """All modules in one mode for a while, `but` these in evaluation mode; afterwards each is as it was."""
    before = [(module, module.training) for module in net.modules()]
    try:
        net.train(training)
        for module in but:
            module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


def touches(target: str, names: Iterable[str]) -> bool:
    """Does the layer or parameter `target` lie in, or contain, one of the named ones?"""
    return any(target == name or target.startswith(f"{name}.") or name.startswith(f"{target}.") for name in names)


class PassGraph:
    """One traced forward, and what can be asked of it."""

    def __init__(self, whole: nn.Module, graph: fx.Graph) -> None:
        self.whole, self.graph = whole, graph
        self.input = next(node for node in graph.nodes if node.op == "placeholder")
        self.output = next(node for node in graph.nodes if node.op == "output")
        depends: set[fx.Node] = {self.input}
        for node in graph.nodes:
            if any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        # What depends on weights alone (a position table, say) is computed again on whichever side wants it.
        self.chain = [node for node in graph.nodes if node in depends and node is not self.output]
        self.place = {node: i for i, node in enumerate(self.chain)} | {self.output: len(self.chain)}

    def weights(self, node: fx.Node) -> list[str]:
        """Names of the layers and parameters that this operation reads."""
        found, stack = [_plain(node)] if node.op == "call_module" else [], list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if source not in self.place:
                stack += source.all_input_nodes
                found += [_plain(source)] if source.op in ("get_attr", "call_module") else []
        return found

    def first_touch(self, names: tuple[str, ...]) -> int:
        """Position of the first operation that reads something named."""
        for i, node in enumerate(self.chain):
            if any(touches(read, names) for read in self.weights(node)):
                return i
        raise Uncuttable(f"none of the layers behind the line is called in the forward ({', '.join(names[:3])})")

    def layers(self, after: fx.Node, until: int | None = None) -> list[str]:
        """Layers with parameters of their own that run behind `after`, and before position `until`."""
        found: dict[str, None] = {}
        for node in self.chain[self.place[after] + 1 : until]:
            for name in self.weights(node):
                found |= dict.fromkeys(self._owners(name))
        return list(found)

    def _owners(self, name: str) -> list[str]:
        net = self.whole.get_submodule("net")
        try:
            module = net.get_submodule(name)
        except AttributeError:  # a tensor used by itself: a parameter, a buffer, or a constant of the recording
            return [name] if name in dict(net.named_parameters()) else []
        inside = ((f"{name}.{n}" if n else name, m) for n, m in module.named_modules())
        return [n for n, m in inside if any(True for _ in m.parameters(recurse=False))]

    def single_tensors(self, until: int) -> list[fx.Node]:
        """Operations before position `until` whose result alone is needed by everything after them."""
        last_use = {
            node: max((self.place[u] for u in node.users if u in self.place), default=-1) for node in self.chain
        }
        found, reach = [], -1
        for i, node in enumerate(self.chain[:until]):
            if reach <= i:  # nothing computed before this operation is used after it
                found.append(node)
            reach = max(reach, last_use[node])
        return found

    def has_weights(self, until: fx.Node) -> bool:
        """Does anything up to and with this operation read a weight?"""
        nodes = self.chain[: self.place[until] + 1]
        return any(self._owners(name) for node in nodes for name in self.weights(node))

    def key(self, node: fx.Node) -> tuple[Any, ...]:
        """What a node is called by in both recordings: the layers called so far, and the operation."""
        calls = [n for n in self.chain[: self.place[node] + 1] if n.op == "call_module"]
        last = self.place[calls[-1]] if calls else 0
        same = [n for n in self.chain[last : self.place[node] + 1] if (n.op, n.target) == (node.op, node.target)]
        return (tuple(str(n.target) for n in calls), node.op, str(node.target), len(same))

    def describe(self, node: fx.Node) -> str:
        """A printable name: the layer, or the module in whose forward the operation stands, and the operation."""
        if node.op == "call_module":
            return _plain(node)
        stack = [path.removeprefix("net").removeprefix(".") for path in node.meta.get("nn_module_stack", {})]
        where = stack[-1] if stack else ""
        return f"{where} ({node.name})" if where else node.name

    def split(self, at: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Prefix and suffix as modules over the shared layers."""
        return self.piece(None, at), self.piece(at, None)

    def piece(self, start: fx.Node | None, end: fx.Node | None) -> fx.GraphModule:
        """What lies behind `start` up to and with `end`, over the shared layers; None is the input, and the output.

        Both must be single tensors; see `single_tensors`.
        """
        first = -1 if start is None else self.place[start]
        last = len(self.chain) if end is None else self.place[end]
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        if start is not None:
            copied[start] = self._guard(graph, graph.placeholder("x"), start)
        for node in self.graph.nodes:
            if node not in self.place or first < self.place[node] <= last:
                copied[node] = graph.node_copy(node, copied.__getitem__)
        if end is not None:
            graph.output(copied[end])
        graph.eliminate_dead_code(is_impure_node=_keeps_input)
        return fx.GraphModule(self.whole, graph)

    def _guard(self, graph: fx.Graph, entry: fx.Node, at: fx.Node) -> fx.Node:
        """A copy of the stored tensor where something behind the cut would change it in place."""
        if self.is_written_to(at):
            return graph.call_method("clone", (entry,))
        return entry

    def is_written_to(self, node: fx.Node) -> bool:
        """Would what follows write into this result?"""
        return any(self._changes(user, node) for user in node.users)

    def _changes(self, user: fx.Node, node: fx.Node) -> bool:
        if not user.args or user.args[0] is not node:
            return False
        if user.op == "call_module":
            module = self.whole.get_submodule(str(user.target))
            return bool(getattr(module, "inplace", False))
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        in_place = name.endswith("_") or (name.startswith("i") and name in _IN_PLACE)
        return in_place or bool(user.kwargs.get("inplace", False)) or name in _VIEWS


_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "ipow"})
# Views share memory with the stored tensor, and what follows may write into them.
_VIEWS = frozenset({"view", "reshape", "flatten", "permute", "transpose", "getitem", "unflatten", "squeeze", "chunk"})


def _keeps_input(node: fx.Node) -> bool:
    """Only the placeholder and the output have to stay: modules that nothing reads may go."""
    return node.op in ("placeholder", "output")


def _plain(node: fx.Node) -> str:
    return str(node.target).removeprefix("net.")


def record(net: nn.Module, forward: Forward, *, training: bool, but: Iterable[nn.Module] = ()) -> PassGraph:
    for _ in range(2):  # once more, lest another thread has drawn some meanwhile
        before = _random_states()
        try:
            with _mode(net, training, but):
                made = PassGraph(*trace(net, forward))
        except Exception as error:  # whatever a foreign forward raises under tracing
            raise Uncuttable(f"{type(net).__name__} cannot be traced: {in_words(error)}") from error
        if _random_states() == before:
            return made
    raise Uncuttable(f"{type(net).__name__} draws random numbers of its own, which a recording would hold fast")


def _random_states() -> tuple[Any, ...]:
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    tensors = [bytes(state.numpy()) for state in (torch.get_rng_state(), *of_gpus)]
    return random.getstate(), repr(np.random.get_state(legacy=False)), tensors


def tensor_shapes(
    graph: PassGraph, net: nn.Module, example_shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape per picture and format of every float tensor with the batch in front, by node name, from one small run."""
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    batch = 2  # one alone could not be told from a dimension of size one
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1 and len(out) == batch:
                found[n.name] = (tuple(out.shape[1:]), out.dtype)
            return out

    x = torch.zeros(batch, *example_shape, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad(), _mode(net, False):
            Watch(graph.whole, graph=graph.graph).run(x)
    except Exception as error:
        words = f"{type(net).__name__} does not run on pictures of shape {example_shape}: {in_words(error)}"
        raise Uncuttable(words) from error
    return found


def check_same(graph: PassGraph, net: nn.Module, forward: Forward, example_shape: tuple[int, ...]) -> None:
    """A module of the user's own may do other things at each call, which a recording does not."""
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    if is_stock(net) or weight.is_meta:
        return
    noise = torch.rand(2, *example_shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(weight.device, weight.dtype)
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    name, tolerance = type(net).__name__, 1e-4 if weight.dtype.itemsize >= 4 else 5e-2
    try:
        with torch.no_grad(), _mode(net, False):
            outs = [fx.Interpreter(graph.whole, graph=graph.graph).run(x), forward(net, x), forward(net, x)]
            kept, *now = ([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in outs)
            is_same = all(
                torch.allclose(one, own, rtol=tolerance, atol=tolerance * float(own.abs().max()), equal_nan=True)
                for leaves in now
                for one, own in zip(leaves, kept, strict=True)
            )
    except Exception as error:  # whatever a foreign forward raises
        raise Uncuttable(f"{name} does not run on pictures of shape {example_shape}: {in_words(error)}") from error
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
    if not is_same:
        raise Uncuttable(f"{name} gives other numbers than its own recording, or at every call others")
