"""The net as `layerwise` sees it, read from the module: a graph of single tensors made of the operations in `duals`."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dit_fast import duals
from dit_fast.dual_rows import SMOOTH
from dit_fast.duals import Dual
from dit_fast.pooling import PoolWindow, pooled_size
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.recognize import NotCompiled, activation, changes_shape_alone, is_size, node_name, trace

Make = Callable[[list[Tensor], list[Any]], Dual]


@dataclass(frozen=True)
class Node:
    """An operation: the values it takes (by number), how it is made of them, and its parameters.

    sources: (module, attribute) of each tensor `make` is given. parameters: the logged names of the first of them, those
    that `Dual.tangent` has tangents of; None for one that was not trained. activation: the function, where it is one;
    slope: where it is x > 0 ? x : slope·x. pool: of a maximum pooling, how it is made with this slope behind it or this
    activation in front. hands_on: whether δ̇ of its output is, as it is, that of its inputs.
    """

    inputs: tuple[int, ...]
    make: Make
    sources: tuple[tuple[nn.Module, str], ...] = ()
    parameters: tuple[str | None, ...] = ()
    activation: Callable[[Tensor], Tensor] | None = None
    slope: float | None = None
    pool: Callable[[float, Any], Make] | None = None
    hands_on: bool = False


@dataclass(frozen=True)
class Net:
    """nodes: in order; value 0 is the input, value i + 1 the output of node i, the last the model's.

    wanted: for each value whether it depends on a trained parameter. owned: for each node whether δ̇ of its output is held
    nowhere else. sample_shape: of the input. largest: numbers of the largest value of a sample. has_convolution: what `score`
    asks. loss: the per-sample loss where it is one of csrc/loss.h, with its scale.
    """

    nodes: tuple[Node, ...]
    wanted: tuple[bool, ...]
    owned: tuple[bool, ...]
    sample_shape: torch.Size
    largest: int
    has_convolution: bool
    loss: tuple[str, float] | None = None


def read(ev: Evaluator, params: Params, batch: Batch) -> Net:
    """The net, its values' shapes seen on a batch; NotCompiled for anything that is none of ours."""
    model = ev.problem.model
    graph = trace(model)
    x, size = batch.args[0], len(batch.ids)
    shapes = _Shapes(model, graph)
    with torch.no_grad():
        ev.call(params, lambda model: shapes.run(x))
    names = {id(p): name for name, p in model.named_parameters() if name in ev.shapes}
    nodes: list[Node] = []
    position: dict[fx.Node, int] = {}
    wanted = [False]
    for node in graph.nodes:
        if node.op == "placeholder":
            if position and node.users:
                raise NotCompiled("the model takes more than one input")
            position.setdefault(node, 0)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node) or position.get(node.args[0]) != len(nodes):
                raise NotCompiled("the model's output is not one tensor, the last that it computes")
        elif not is_size(node) and node.op != "get_attr":
            shape = shapes.found.get(node)
            if shape is None or not shape or shape[0] != size:
                raise NotCompiled(f"{node_name(node)} does not give one tensor with a row per sample")
            operation = model.get_submodule(node.target) if node.op == "call_module" else node.target
            made = _read_node(operation, node, shapes.found, position, names)
            is_wanted = any(made.parameters) or any(wanted[i] for i in made.inputs)
            _append(nodes, node, made)
            position[node] = len(nodes)
            wanted[len(nodes) :] = [is_wanted]
    used = {name for node in nodes for name in node.parameters}
    if unused := [name for name in ev.shapes if name not in used]:
        raise NotCompiled(f"parameter '{unused[0]}' belongs to none of the layers")
    if not wanted[-1]:
        raise NotCompiled("the model's output does not depend on the trained parameters")
    convolutions = (nn.Conv1d, nn.Conv2d)
    has_convolution = any(isinstance(module, convolutions) for node in nodes for module, _ in node.sources)
    largest = max(shape.numel() for node, shape in shapes.found.items() if node in position) // size
    return Net(tuple(nodes), tuple(wanted), _owned(nodes), x.shape[1:], largest, has_convolution)


def _owned(nodes: list[Node]) -> tuple[bool, ...]:
    """A sum gives both of its inputs the same δ̇; others make one of their own."""
    owned = [True] * (len(nodes) + 1)
    for i in reversed(range(len(nodes))):
        if nodes[i].hands_on:
            for j in nodes[i].inputs:
                owned[j] = owned[j] and owned[i + 1] and len(nodes[i].inputs) == 1
    return tuple(owned[1:])


class _Shapes(fx.Interpreter):
    """Runs the model on a batch and keeps the shape of every value."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = value.shape
        return value


def _append(nodes: list[Node], node: fx.Node, made: Node) -> None:
    """Adds `made`; a pooling behind an activation of its own takes it in or trades places: behind it are fewer numbers."""
    before = nodes[made.inputs[0] - 1] if nodes and made.inputs[0] == len(nodes) else None
    if made.pool is None or before is None or before.activation is None or len(node.all_input_nodes[0].users) != 1:
        nodes.append(made)
    elif before.slope is not None and before.slope >= 0:
        # it rises and so leaves the places where they are, up to ties at slope 0, which nothing passes
        nodes[-1] = Node(before.inputs, made.pool(before.slope, None))
    else:
        nodes[-1] = Node(before.inputs, made.pool(1.0, before.activation))
        nodes.append(Node((len(nodes),), before.make))


def _read_node(
    operation: Any, node: fx.Node, shapes: dict[fx.Node, torch.Size], position: dict[fx.Node, int], names: dict[int, str]
) -> Node:
    """One of our operations; NotCompiled where it is none."""
    own = [n for n in node.args if isinstance(n, fx.Node) and n in position]
    inputs = tuple(position[n] for n in own)
    if operation in _SUMS:
        if len(own) != 2 or len(node.args) != 2 or node.kwargs or shapes[own[0]] != shapes[own[1]]:
            raise NotCompiled(f"{node_name(node)} is no sum of two of the net's own values of one shape")
        return Node(inputs, lambda values, tensors: duals.Sum(*values), hands_on=True)
    if len(own) != 1 or node.args[0] is not own[0] or len([n for n in node.all_input_nodes if not is_size(n)]) != 1:
        raise NotCompiled(f"{node_name(node)} does not take one of the net's own values")
    if changes_shape_alone(operation, node):
        after = shapes[node][1:]
        return Node(inputs, lambda values, tensors: duals.Reshape(values[0], after), hands_on=True)
    before = shapes[own[0]]
    if isinstance(operation, nn.Module):
        made = _read_module(operation, node, before)
        if made is not None:
            make, sources, num_parameters = made
            parameters = [None if p is None else names.get(id(p)) for p in (getattr(m, a) for m, a in sources[:num_parameters])]
            return Node(inputs, make, tuple(sources), tuple(parameters))
    call: Callable[[Tensor], Tensor] = operation
    if not isinstance(operation, nn.Module):
        arguments, keywords = node.args[1:], node.kwargs
        function = getattr(Tensor, operation) if isinstance(operation, str) else operation
        call = lambda x: function(x, *arguments, **keywords)  # noqa: E731
    kind = type(operation) if isinstance(operation, nn.Module) else operation
    if kind in _ACTIVATIONS:
        slope = _slope(operation, node)
        if slope is None:
            found = activation(operation, node)
            name = found[0] if found is not None and found[0] in SMOOTH else None
            return Node(inputs, lambda values, tensors: duals.Activation(name, call, *values), activation=call)
        return Node(inputs, lambda values, tensors: duals.PiecewiseLinear(slope, *values), activation=call, slope=slope)
    if kind in _MAX_POOLS:
        pool = partial(partial, _max_pool, _window(operation, node, _MAX_POOLS[kind], before))
        return Node(inputs, pool(1.0, None), pool=pool)
    if kind in _LINEAR_MAPS or (kind in _MEANS and _spares_samples(node, len(before))):
        return Node(inputs, lambda values, tensors: duals.LinearMap(call, *values))
    raise NotCompiled(f"{node_name(node)} is none of the operations that are compiled")


def _read_module(module: Any, node: fx.Node, shape: torch.Size) -> tuple[Make, list[tuple[nn.Module, str]], int] | None:
    """A layer with parameters: how it is made of [input] and tensors, where these come from, how many are parameters."""
    both = [(module, "weight"), (module, "bias")]
    if type(module) is nn.Linear:
        return lambda values, own: duals.Linear(*values, *own), both, 2
    if type(module) in (nn.Conv1d, nn.Conv2d):
        window = _conv_window(module, node, shape)
        return lambda values, own: duals.Conv(window, *values, *own), both, 2
    if type(module) in (nn.GroupNorm, nn.LayerNorm):
        parameters = both if module.weight is not None else []
        rows, affine = _groups(module, shape)
        eps = module.eps
        made: Make = lambda values, own: duals.Norm(values[0], rows, eps, None, affine, *(own or (None, None)))  # noqa: E731
        return made, parameters, len(parameters)
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return _read_batch_norm(module, node, shape)
    return None


def _conv_window(module: Any, node: fx.Node, shape: torch.Size) -> duals.Window:
    if len(shape) != len(module.kernel_size) + 2:
        raise NotCompiled(f"{node_name(node)} takes a batch without a dimension of its own")
    padding = module.padding
    if module.padding_mode != "zeros":
        raise NotCompiled(f"{node_name(node)} pads with something else than zeros")
    if padding == "valid":
        padding = [0] * len(module.kernel_size)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise NotCompiled(f"{node_name(node)} pads its two sides differently")
        padding = [r // 2 for r in reach]
    return duals.Window(list(module.stride), list(padding), list(module.dilation), module.groups)


def _groups(module: Any, shape: torch.Size) -> tuple[int, list[int]]:
    """Groups of a sample that share their statistics, and how γ and β spread over a sample."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, [shape[1], *[1] * (len(shape) - 2)]
    leading = len(shape) - 1 - len(module.normalized_shape)
    if leading < 0:
        raise NotCompiled("a LayerNorm takes in the whole batch")
    return shape[1 : 1 + leading].numel(), [*[1] * leading, *module.normalized_shape]


def _read_batch_norm(module: Any, node: fx.Node, shape: torch.Size) -> tuple[Make, list[tuple[nn.Module, str]], int]:
    if module.training or module.running_mean is None:
        raise NotCompiled(f"{node_name(node)} takes its statistics from the batch")
    parameters = [(module, "weight"), (module, "bias")] if module.affine else []
    affine, eps = [shape[1], *[1] * (len(shape) - 2)], module.eps

    def make(values: list[Tensor], own: list[Any]) -> Dual:
        gamma, beta = own[:-2] or (None, None)
        fixed = own[-2].view(affine), (own[-1] + eps).rsqrt().view(affine)
        return duals.Norm(values[0], 0, eps, fixed, affine, gamma, beta)

    return make, [*parameters, (module, "running_mean"), (module, "running_var")], len(parameters)


def _max_pool(window: PoolWindow, slope: float, activation: Any, values: list[Tensor], tensors: list[Any]) -> Dual:
    return duals.MaxPool(window, slope, activation, *values)


def _window(operation: Any, node: fx.Node, dimensions: int, shape: torch.Size) -> PoolWindow:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if isinstance(operation, nn.Module):
        found = {name: getattr(operation, name) for name in (*names, "return_indices")}
    else:
        given = dict(zip(("input", *names, "return_indices"), node.args, strict=False)) | node.kwargs
        found = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False} | given
    if found["return_indices"] or len(shape) != dimensions + 2:
        raise NotCompiled(f"{node_name(node)} is no pooling of one tensor with samples and channels")
    found["stride"] = found["stride"] or found["kernel_size"]
    kernel, stride, padding, dilation = (_each(found[name], dimensions) for name in names[:4])
    window = PoolWindow(kernel, stride, padding, dilation, bool(found["ceil_mode"]))
    try:
        pooled_size(window, shape[2:])
    except ValueError as refusal:
        raise NotCompiled(f"{node_name(node)}: {refusal}") from refusal
    return window


def _each(value: Any, dimensions: int) -> Sequence[int]:
    return [value] * dimensions if isinstance(value, int) else [*value] * (dimensions if len(value) == 1 else 1)


def _slope(operation: Any, node: fx.Node) -> float | None:
    """Of a piecewise linear activation on its left side; None for others."""
    if isinstance(operation, nn.ReLU) or operation in (F.relu, torch.relu, "relu", "relu_"):
        return 0.0
    if isinstance(operation, nn.LeakyReLU):
        return float(operation.negative_slope)
    if operation is F.leaky_relu:
        return float(node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01))  # type: ignore[arg-type]
    return None


def _spares_samples(node: fx.Node, ndim: int) -> bool:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(dims, Sequence) and len(dims) > 0 and all(isinstance(d, int) and d % ndim for d in dims)


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MEANS = (torch.mean, "mean")
_ACTIVATIONS: set[Any] = {
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU),
    *(F.relu, F.leaky_relu, F.tanh, F.sigmoid, F.gelu, F.silu, F.elu, torch.relu, torch.tanh, torch.sigmoid),
    *("relu", "tanh", "sigmoid"),
}
# with the number of dimensions they pool over
_MAX_POOLS: dict[Any, int] = {
    nn.MaxPool1d: 1,
    F.max_pool1d: 1,
    torch.max_pool1d: 1,
    nn.MaxPool2d: 2,
    F.max_pool2d: 2,
    torch.max_pool2d: 2,
}
_LINEAR_MAPS: set[Any] = {
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
}
