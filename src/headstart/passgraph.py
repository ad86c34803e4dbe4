"""The forward pass of a network as a graph: how it is recorded, and what can be asked of it.

The graph is torch.fx's, with timm's own leaf modules and functions. It holds what one run of the forward did, so a
network that does something else at every call, or draws random numbers of its own, is refused.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from timm.layers.drop import DropBlock2d, DropPath
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .errors import in_words
from .fastconv import Done
from .fxtrace import IN_PLACE, Forward, Uncuttable, mode, trace
from .stock import is_stock

# What gives new memory, by name; any other function or method may hand on what it was given, or a view of it.
_MAKES_NEW = frozenset(
    ("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "neg", "abs", "exp", "sqrt", "rsqrt", "clone", "cat",
     "stack", "concat", "mean", "sum", "var", "std", "amax", "amin", "norm", "matmul", "bmm", "softmax",
     "log_softmax", "sigmoid", "tanh", "gelu", "relu", "relu6", "silu", "hardswish", "hardsigmoid", "leaky_relu",
     "conv2d", "linear", "pad", "interpolate", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "lt", "gt", "eq",
     "adaptive_max_pool2d", "layer_norm", "group_norm", "batch_norm", "scaled_dot_product_attention", "normalize",
     "size", "dim", "numel", "argmax", "where", "roll")
)  # fmt: skip
_NO_TENSOR = frozenset(("shape", "ndim", "dtype", "device", "is_cuda"))
# Modules that hand on their input, at least in evaluation mode, or a view of it.
_HANDS_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, DropPath, DropBlock2d, Done)


def touches(target: str, names: Iterable[str]) -> bool:
    """Does the layer or parameter `target` lie in, or contain, one of the named ones?"""
    return any(target == name or target.startswith(f"{name}.") or name.startswith(f"{target}.") for name in names)


class PassGraph:
    """One traced forward, and what can be asked of it.

    Args:
        counts: operations that give how many pictures there are; any tensor's length says so, too.
    """

    def __init__(self, whole: nn.Module, graph: fx.Graph, counts: Iterable[fx.Node] = ()) -> None:
        self.whole, self.graph, self._counts = whole, graph, frozenset(counts)
        self.input = next(node for node in graph.nodes if node.op == "placeholder")
        self.output = next(node for node in graph.nodes if node.op == "output")
        depends: set[fx.Node] = {self.input}
        for node in graph.nodes:
            if node not in self._counts and any(source in depends for source in node.all_input_nodes):
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
        entry = graph.placeholder("x")
        copied[start or self.input] = entry if start is None else self._guard(graph, entry, start)
        copied |= dict.fromkeys(self._counts, graph.call_function(len, (entry,))) if self._counts else {}
        for node in self.graph.nodes:
            if node not in copied and (node not in self.place or first < self.place[node] <= last):
                copied[node] = graph.node_copy(node, copied.__getitem__)
        if end is not None:
            graph.output(copied[end])
        graph.eliminate_dead_code(is_impure_node=self._stays)
        return fx.GraphModule(self.whole, graph)

    def _stays(self, node: fx.Node) -> bool:
        """Placeholder and output have to, and what writes into its input (`x.relu_()`, as a statement); modules that
        nothing reads may go."""
        return node.op in ("placeholder", "output") or any(
            _writes(node, given, self._module_of) for given in node.all_input_nodes
        )

    def _module_of(self, node: fx.Node) -> nn.Module:
        return self.whole.get_submodule(str(node.target))

    def _guard(self, graph: fx.Graph, entry: fx.Node, at: fx.Node) -> fx.Node:
        """A copy of the stored tensor where something behind the cut would change it in place."""
        if self.is_written_to(at):
            return graph.call_method("clone", (entry,))
        return entry

    def changes_weights(self) -> bool:
        """Does an operation write into a buffer or a parameter? (Copied piece by piece it might be left out.)"""
        read = [node for node in self.graph.nodes if node.op == "get_attr"]
        return any(self.is_written_to(node) for node in read) or any(map(_learns, self.graph.nodes))

    def is_written_to(self, node: fx.Node) -> bool:
        """Would what follows write into this result?"""
        return is_written_to(node, self._module_of)


def is_written_to(node: fx.Node, module_of: Callable[[fx.Node], nn.Module]) -> bool:
    """Whether something in a graph writes into this operation's result, or into a view of it.

    What is not known to give new memory is taken for a view.
    """
    seen, look_at = {node}, [node]
    while look_at:
        result = look_at.pop()
        for user in result.users:
            if _writes(user, result, module_of):
                return True
            if user not in seen and _hands_on(user, module_of):
                seen.add(user)
                look_at.append(user)
    return False


def _name_of(node: fx.Node) -> str:
    """Of a function or a method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _writes(user: fx.Node, node: fx.Node, module_of: Callable[[fx.Node], nn.Module]) -> bool:
    if user.op == "output" or not user.args or user.args[0] is not node:
        return False
    if user.op == "call_module":
        return bool(getattr(module_of(user), "inplace", False))
    if user.target in IN_PLACE or user.target is operator.setitem or user.kwargs.get("inplace"):
        return True
    name = _name_of(user)
    # `relu(x, True)`, `dropout(x, p, training, True)`: in which place the flag stands is each function's own affair.
    flagged = getattr(user.target, "__module__", "") == "torch.nn.functional" and any(a is True for a in user.args)
    return flagged or (name.endswith("_") and not name.startswith("__"))


def _hands_on(user: fx.Node, module_of: Callable[[fx.Node], nn.Module]) -> bool:
    if user.op == "output":
        return False
    if user.op == "call_module":
        return isinstance(module_of(user), _HANDS_ON)
    if user.target in IN_PLACE or (user.target is getattr and user.args[1] in _NO_TENSOR):
        return False  # `y += x` hands on y
    return _name_of(user).strip("_") not in _MAKES_NEW


def _learns(node: fx.Node) -> bool:
    """Is this a norm as a function that updates the running statistics it is given?"""
    if node.op != "call_function" or _name_of(node) not in ("batch_norm", "instance_norm"):
        return False
    mean, learns = ([*node.args, *[None] * 6][i] for i in (1, 5))
    learns = node.kwargs.get("training", node.kwargs.get("use_input_stats", learns))
    return bool(learns) and node.kwargs.get("running_mean", mean) is not None


def _plain(node: fx.Node) -> str:
    return str(node.target).removeprefix("net.")


def record(net: nn.Module, forward: Forward, *, training: bool, but: Iterable[nn.Module] = ()) -> PassGraph:
    for _ in range(2):  # once more, lest another thread has drawn some meanwhile
        before = _random_states(net)
        try:
            with mode(net, training, but):
                made = PassGraph(*trace(net, forward))
        except Uncuttable:
            raise
        except Exception as error:  # whatever a foreign forward raises under tracing
            raise Uncuttable(f"{type(net).__name__} cannot be traced: {in_words(error)}") from error
        if _random_states(net) == before:
            break
    else:
        raise Uncuttable(f"{type(net).__name__} draws random numbers of its own, which a recording would hold fast")
    if made.changes_weights():
        raise Uncuttable(f"{type(net).__name__} changes its buffers itself, which a recording would not")
    return made


def _random_states(net: nn.Module) -> tuple[Any, ...]:
    """Of the global generators, and of those that modules have themselves."""
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    own = [value for module in net.modules() for value in vars(module).values()]
    tensors = [torch.get_rng_state(), *of_gpus, *(g.get_state() for g in own if isinstance(g, torch.Generator))]
    of_numpy: list[Any] = [np.random.get_state(legacy=False)]
    of_numpy += [g.bit_generator.state for g in own if isinstance(g, np.random.Generator)]
    of_numpy += [g.get_state(legacy=False) for g in own if isinstance(g, np.random.RandomState)]
    of_python = [random.getstate(), *(g.getstate() for g in own if isinstance(g, random.Random))]
    return of_python, repr(of_numpy), [bytes(state.cpu().numpy()) for state in tensors]


def _watched(graph: PassGraph, net: nn.Module, example_shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    """What operations give for so many black pictures, in evaluation mode: numbers, and of tensors shape and format."""
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    found: dict[str, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor):
                found[n.name] = (tuple(out.shape), out.dtype)
            elif type(out) is int:
                found[n.name] = out
            return out

    x = torch.zeros(batch, *example_shape, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad(), mode(net, False):
            Watch(graph.whole, graph=graph.graph).run(x)
    except Exception as error:  # whatever a foreign forward raises
        words = f"{type(net).__name__} does not run on pictures of shape {example_shape}: {in_words(error)}"
        raise Uncuttable(words) from error
    return found


def tensor_shapes(
    graph: PassGraph, net: nn.Module, example_shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape per picture and format of every float tensor with the batch in front, by node name, from one small run."""
    batch = 2  # one alone could not be told from a dimension of size one
    seen = _watched(graph, net, example_shape, batch)
    tensors = {name: out for name, out in seen.items() if isinstance(out, tuple)}
    return {
        name: (shape[1:], dtype)
        for name, (shape, dtype) in tensors.items()
        if dtype.is_floating_point and len(shape) > 1 and shape[0] == batch
    }


def with_numbers_held(graph: PassGraph, net: nn.Module, example_shape: tuple[int, ...]) -> PassGraph:
    """The same graph in which no number is alive that the pictures' shape alone decides, or how many they are.

    A grid's height and width that are taken at the beginning and used to the end (XCiT's) are constants then, and the
    length of a batch is asked of whatever tensor there is. The graph given is changed; it stays what it is where the
    network does not run on any number of pictures.
    """
    if not any(node.target in (getattr, len, "size") for node in graph.graph.nodes):
        return graph
    lengths = (2, 5)  # of which halves differ, too
    try:
        with torch.random.fork_rng(devices=[]):
            seen = [_watched(graph, net, example_shape, batch) for batch in lengths]
    except Uncuttable:
        return graph
    numbers = {name for name, out in seen[0].items() if type(out) is int}
    values = {name: tuple(found.get(name) for found in seen) for name in numbers}

    def held(node: fx.Node) -> Any:
        first, second = values.get(node.name, (None, None))
        return first if first is not None and first == second else node

    for node in graph.graph.nodes:
        node.args, node.kwargs = fx.node.map_arg(node.args, held), fx.node.map_arg(node.kwargs, held)
    return PassGraph(graph.whole, graph.graph, (n for n in graph.graph.nodes if values.get(n.name) == lengths))


def check_same(
    recorded: Callable[[Tensor], Any], net: nn.Module, forward: Forward, example_shape: tuple[int, ...]
) -> None:
    """Run what was recorded, whole or in its two halves, beside the network, which has to be in evaluation mode there.

    A module of the user's own may do other things at each call, which a recording does not.

    Raises:
        Uncuttable: they do not give the same.
    """
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    if is_stock(net) or weight.is_meta:
        return
    noise = torch.rand(2, *example_shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(weight.device, weight.dtype)
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    name, tolerance = type(net).__name__, 1e-4 if weight.dtype.itemsize >= 4 else 5e-2
    try:
        with torch.no_grad(), mode(net, False):
            outs = [recorded(x), forward(net, x), forward(net, x)]
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
