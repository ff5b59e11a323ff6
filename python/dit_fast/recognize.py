"""What of a model and its per-sample loss can be compiled: a chain of linear layers and activations, and a known loss.

The chain is read from the module itself (torch.fx), the loss found by comparing per_sample_loss with our formulas at
random outputs. Whatever is not certain is refused with a reason in one line.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dit_fast.mlp import Mlp, MlpLayer
from dit_fast.problem import Batch, Evaluator, Params

# the loss must be ours to this share of its size, in float64
LOSS_AGREEMENT = 1e-9
TARGETS_AT_ONCE = 1 << 16
_OUTSIDE = "a class of cross entropy lies outside the model's outputs"
# times larger outputs at which the loss must be ours too: others differ from ours in their tails alone, as Huber's does
FAR = 100.0

_SHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity)
_SHAPE_CALLS = (torch.flatten, torch.reshape, torch.squeeze)
_SHAPE_METHODS = ("flatten", "view", "reshape", "squeeze", "contiguous")
_SIZE_CALLS = (getattr, operator.getitem, len)

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
_CALLS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: "leaky_relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}


class NotCompiled(Exception):
    """Why a model or a loss cannot be compiled, in one line."""


@dataclass(frozen=True)
class Recognized:
    """A net with its loss. parameters: the names of each layer's weight and bias, in turn; None for no bias.

    output_shape: the model's output's, behind the batch.
    """

    net: Mlp
    parameters: tuple[str | None, ...]
    output_shape: torch.Size

    @property
    def description(self) -> str:
        """ "62-8-1 relu, bce_logits"."""
        layers = self.net.layers
        widths = "-".join(str(n) for n in [layers[0].inputs, *(layer.outputs for layer in layers)])
        kinds = dict.fromkeys(layer.activation for layer in layers if layer.activation != "identity")
        return f"{' '.join([widths, *kinds])}, {self.net.loss}"

    def inputs(self, x: Tensor) -> Tensor:
        """The model's input [B, ...] as rows [B, I], contiguous."""
        return x.reshape(len(x), self.net.layers[0].inputs).contiguous()

    def targets(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Classes [B] int64 or rows [B, O]."""
        if self.net.loss == "cross_entropy":
            return target.contiguous()
        return target.reshape(len(target), self.net.layers[-1].outputs).to(dtype).contiguous()


def recognize(ev: Evaluator, params: Params, batch: Batch, targets: Tensor | None = None) -> Recognized:
    """The net and loss of a problem in the state its session has set; NotCompiled says why it is none we know.

    batch, params: a batch of the log and the parameters before it, whose shapes the loss is tried on. targets: the data's
    [n, ...], for every one of which the loss must be the same; where they are not at hand, `check_targets` is for later.
    """
    if len(batch.args) != 1 or batch.kwargs or not isinstance(batch.args[0], Tensor):
        raise NotCompiled("the model takes more than one tensor")
    layers, parameters = _chain(ev)
    x = batch.args[0]
    if not x.is_floating_point() or x.numel() != len(batch.ids) * layers[0].inputs:
        raise NotCompiled(f"an input {tuple(x.shape)} {x.dtype} is not {layers[0].inputs} floating numbers per sample")
    with torch.no_grad():
        output = ev.output(params, batch)
    if not isinstance(output, Tensor) or output.numel() != len(batch.ids) * layers[-1].outputs:
        raise NotCompiled("the model's output is not one tensor with a row per sample")
    rows = None if targets is None else _distinct(targets)
    loss, scale = recognize_loss(ev, output, batch.target, None if rows is None else rows[:TARGETS_AT_ONCE])
    recognized = Recognized(Mlp(layers, loss, scale), parameters, output.shape[1:])
    if rows is not None and len(rows) > TARGETS_AT_ONCE:
        check_targets(ev, recognized, rows[TARGETS_AT_ONCE:])
    return recognized


def trace(model: nn.Module) -> fx.Graph:
    """The model's operations; NotCompiled where its forward pass is no fixed sequence of them."""
    hooked = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    if hooked:
        raise NotCompiled(f"module '{hooked[0]}' has hooks")
    names = _leaves_in_order(model)
    if names is not None:
        # the graph that the tracer would make, in a tenth of its time
        graph = fx.Graph()
        node = graph.placeholder("input")
        for name in names:
            node = graph.call_module(name, (node,))
        graph.output(node)
        return graph
    try:
        return fx.Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward on proxies: anything may be raised there
        raise NotCompiled(f"torch.fx cannot trace the model: {str(error).splitlines()[0][:120]}") from error


def _leaves_in_order(model: nn.Module, prefix: str = "") -> list[str] | None:
    """The modules that nested Sequentials call one after the other; None where there is anything else."""
    if type(model) is not nn.Sequential or "forward" in vars(model):
        return None
    names: list[str] = []
    for name, module in model._modules.items():
        if module is None:
            return None
        if isinstance(module, nn.Sequential):
            inner = _leaves_in_order(module, f"{prefix}{name}.")
            if inner is None:
                return None
            names += inner
        elif type(module).__module__.startswith("torch.nn."):
            names.append(prefix + name)
        else:
            return None
    return names


def _chain(ev: Evaluator) -> tuple[tuple[MlpLayer, ...], tuple[str | None, ...]]:
    model = ev.problem.model
    graph = trace(model)
    names = {id(p): name for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in ev.shapes.values()]
    position = dict(zip(ev.shapes, accumulate(sizes, initial=0), strict=False))
    layers: list[MlpLayer] = []
    used: list[str | None] = []
    for module_or_call, node in _operations(graph, model):
        parameters = _linear_parameters(module_or_call, node, model)
        if parameters is not None:
            own = [None if p is None else names.get(id(p)) for p in parameters]
            weight, bias = own
            if weight not in position or (parameters[1] is not None and bias not in position):
                raise NotCompiled(f"a parameter of {node_name(node)} was not trained")
            if {weight, bias} - {None} & set(used):
                raise NotCompiled(f"{node_name(node)} shares its parameters with another call")
            outputs, inputs = ev.shapes[weight]
            if layers and inputs != layers[-1].outputs:
                raise NotCompiled(f"{node_name(node)} takes {inputs} of the {layers[-1].outputs} numbers before it at a time")
            layers.append(MlpLayer(outputs, inputs, position[weight], None if bias is None else position[bias]))
            used += [weight, bias]
            continue
        found = activation(module_or_call, node)
        if found is not None:
            if not layers or layers[-1].activation != "identity":
                raise NotCompiled(f"{node_name(node)} does not follow a linear layer")
            layers[-1] = replace(layers[-1], activation=found[0], slope=found[1])
        elif not changes_shape_alone(module_or_call, node):
            raise NotCompiled(f"{node_name(node)} is none of the operations that are compiled")
    if not layers:
        raise NotCompiled("the model has no linear layer")
    if unused := [name for name in ev.shapes if name not in used]:
        raise NotCompiled(f"parameter '{unused[0]}' belongs to no linear layer")
    return tuple(layers), tuple(used)


def _operations(graph: fx.Graph, model: nn.Module) -> list[tuple[Any, fx.Node]]:
    """The graph as a chain from the input to the output: each operation (module, function or method name) with its node."""
    current: fx.Node | None = None
    chain: list[tuple[Any, fx.Node]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is not None and node.users:
                raise NotCompiled("the model takes more than one input")
            current = current or node
        elif node.op == "output":
            if node.args[0] is not current:
                raise NotCompiled("the model returns something else than the end of one chain")
        elif node.op == "get_attr" or is_size(node):
            continue
        else:
            inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
            if inputs != [current]:
                raise NotCompiled(f"{node_name(node)} is not part of one chain of operations")
            current = node
            chain.append((model.get_submodule(node.target) if node.op == "call_module" else node.target, node))
    return chain


def is_size(node: fx.Node) -> bool:
    """A question about shapes, such as x.size(0), x.shape or x.shape[0]."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function" or node.target not in _SIZE_CALLS:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.target is len or (isinstance(node.args[0], fx.Node) and is_size(node.args[0]))


def _linear_parameters(operation: Any, node: fx.Node, model: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if type(operation) is nn.Linear:
        return operation.weight, operation.bias
    if node.op == "call_function" and operation is F.linear:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        tensors = [None if n is None else _attribute(model, n) for n in (given["weight"], given.get("bias"))]
        assert tensors[0] is not None
        return tensors[0], tensors[1]
    return None


def _attribute(model: nn.Module, node: Any) -> Tensor:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise NotCompiled("a linear layer's weight is computed in the forward pass")
    return operator.attrgetter(str(node.target))(model)


def activation(operation: Any, node: fx.Node) -> tuple[str, float] | None:
    """(name, slope) of an activation, as in csrc/activation.h; None for anything else."""
    if isinstance(operation, nn.Module):
        kind = _MODULES.get(type(operation))
        if kind == "gelu":
            return ("gelu_tanh" if operation.approximate == "tanh" else "gelu"), 0.0
        return None if kind is None else (kind, float(getattr(operation, "negative_slope", 0.0)))
    if node.op == "call_method":
        kind = _METHODS.get(str(operation))
        return None if kind is None else (kind, 0.0)
    kind = _CALLS.get(operation)
    if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        return "gelu_tanh", 0.0
    if kind == "leaky_relu":
        slope: Any = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
        return kind, float(slope)
    return None if kind is None else (kind, 0.0)


def changes_shape_alone(operation: Any, node: fx.Node) -> bool:
    """Flatten, view, squeeze and what does nothing; that the shapes are right the comparison on real batches shows."""
    if isinstance(operation, nn.Module):
        if isinstance(operation, nn.modules.dropout._DropoutNd):
            return not operation.training or operation.p == 0
        return isinstance(operation, _SHAPE_MODULES)
    if node.op == "call_method":
        return operation in _SHAPE_METHODS
    if operation is F.dropout:
        given = {"p": 0.5, "training": True} | dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        return not given["training"] or bool(given["p"] == 0)
    return operation in _SHAPE_CALLS


def node_name(node: fx.Node) -> str:
    """For messages."""
    if node.op == "call_module":
        return f"module '{node.target}'"
    return str(getattr(node.target, "__name__", node.target))


def recognize_loss(ev: Evaluator, output: Tensor, target: Any, rows: Tensor | None = None) -> tuple[str, float]:
    """The name and scale of the loss that per_sample_loss equals at random outputs, in value and gradient (float64).

    Found with drawn targets, at outputs near and far; with `rows` of the data's targets it must be the same.
    """
    if not isinstance(target, Tensor) or target.ndim == 0 or len(target) != len(output):
        raise NotCompiled("the target is not one tensor with a row per sample")
    generator = torch.Generator().manual_seed(0)
    size, shape = 6, output.shape[1:]
    near = 3 * torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    outputs = [near, FAR * near]
    if rows is not None and len(rows):
        outputs.append(torch.randn(len(rows), *shape, generator=generator, dtype=torch.float64))
    for kind, draw in _CANDIDATES.items():
        tau = draw(size, output, target, generator)
        if tau is None:
            continue
        is_outside = rows is not None and kind == "cross_entropy" and not _are_classes(rows, output.shape[1])
        pieces = outputs[:2] if is_outside else outputs
        z, tau = torch.cat(pieces), torch.cat([tau, tau] if rows is None or is_outside else [tau, tau, rows])
        try:
            value, gradient = _value_and_gradient(ev.losses_of, z, tau, len(z))
        except Exception:  # the user's loss may refuse targets of this kind in any way
            continue
        expected, expected_gradient = _FORMULAS[kind](z, tau)
        at_near = expected_gradient[:size]
        scale = float((gradient[:size] * at_near).sum() / at_near.square().sum())
        starts = [0, size, 2 * size][: len(pieces)]
        is_near, is_far, *of_data = _fit((value, gradient), (scale * expected, scale * expected_gradient), starts)
        if scale != 0 and is_near and is_far:
            if is_outside:
                raise NotCompiled(_OUTSIDE)
            if not all(of_data):
                raise NotCompiled(f"per_sample_loss is not {kind} for every target of the data")
            return kind, _round_scale(scale, output.numel() // len(output))
    raise NotCompiled("per_sample_loss is none of cross entropy, BCE with logits and squared error at random outputs")


def check_targets(ev: Evaluator, recognized: Recognized, targets: Tensor) -> None:
    """NotCompiled unless per_sample_loss is the recognised loss for every one of the data's targets [n, ...]."""
    net = recognized.net
    generator = torch.Generator().manual_seed(1)
    for rows in _distinct(targets).split(TARGETS_AT_ONCE):
        if net.loss == "cross_entropy" and not _are_classes(rows, net.layers[-1].outputs):
            raise NotCompiled(_OUTSIDE)
        z = torch.randn(len(rows), *recognized.output_shape, generator=generator, dtype=torch.float64)
        found = _value_and_gradient(ev.losses_of, z, rows, len(rows))
        expected, expected_gradient = _FORMULAS[net.loss](z, recognized.targets(rows, torch.float64))
        if not all(_fit(found, (net.loss_scale * expected, net.loss_scale * expected_gradient), [0])):
            raise NotCompiled(f"per_sample_loss is not {net.loss} for every target of the data")


def _distinct(targets: Tensor) -> Tensor:
    """Targets as the loss is tried on them: on the CPU, floating ones in float64, of classes each one once."""
    targets = targets.cpu()
    if targets.is_floating_point():
        return targets.double()
    return targets.unique() if targets.ndim == 1 else targets


def _are_classes(rows: Tensor, number: int) -> bool:
    return bool(((rows >= 0) & (rows < number)).all())


def _value_and_gradient(loss: Callable[..., Tensor], z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    y = z.clone().requires_grad_()
    value = loss(y, *arguments)
    return value.detach().double(), torch.autograd.grad(value, y, torch.ones_like(value))[0]


def _fit(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], starts: list[int]) -> list[bool]:
    """For each piece of the rows, by where it starts: whether values and gradients are finite and as they should be, to a
    share of the largest in the piece."""
    off = torch.stack([_rows((a - b).abs()).amax(1) for a, b in zip(ours, theirs, strict=True)])
    size = torch.stack([_rows(b.abs()).amax(1) for b in theirs])
    error, largest = (np.maximum.reduceat(rows.numpy(), starts, axis=1) for rows in (off, size))
    # NaN and infinity of ours are in the error where theirs are finite
    fits: list[bool] = np.all((error <= LOSS_AGREEMENT * largest) & np.isfinite(largest), axis=0).tolist()
    return fits


def _round_scale(scale: float, outputs: int) -> float:
    """The fraction that the scale is, free of the rounding it was found with."""
    for exact in (1.0, 0.5, 2.0, 1 / outputs, 0.5 / outputs):
        if abs(scale - exact) <= LOSS_AGREEMENT * exact:
            return exact
    return scale


def _draw_classes(size: int, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor | None:
    if target.dtype != torch.int64 or target.ndim != 1 or output.ndim != 2:
        return None
    return torch.randint(output.shape[1], (size,), generator=generator)


def _draw_probabilities(size: int, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor | None:
    if target.numel() != output.numel() or target.is_complex():
        return None
    if not target.is_floating_point():
        return torch.randint(2, (size, *target.shape[1:]), generator=generator).to(target.dtype)
    return torch.rand(size, *target.shape[1:], generator=generator, dtype=torch.float64)


def _draw_numbers(size: int, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor | None:
    if target.numel() != output.numel() or target.is_complex():
        return None
    if not target.is_floating_point():
        return torch.randint(2, (size, *target.shape[1:]), generator=generator).to(target.dtype)
    return torch.randn(size, *target.shape[1:], generator=generator, dtype=torch.float64)


_CANDIDATES: dict[str, Callable[[int, Tensor, Tensor, torch.Generator], Tensor | None]] = {
    "cross_entropy": _draw_classes,
    "bce_logits": _draw_probabilities,
    "squared_error": _draw_numbers,
}


def _rows(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)


def _cross_entropy(y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    own = tau[:, None]
    return y.logsumexp(1) - y.gather(1, own)[:, 0], y.softmax(1).scatter_add_(1, own, -torch.ones_like(y[:, :1]))


def _bce_logits(y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    # log(1 + exp y) − τ y
    value = (_rows(y).logaddexp(torch.zeros((), dtype=y.dtype)) - _rows(y) * _rows(tau)).sum(1)
    return value, y.sigmoid() - tau.view_as(y)


def _squared_error(y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    return (_rows(y) - _rows(tau)).square().sum(1), 2 * (y - tau.view_as(y))


# csrc/loss.h in torch: values [B] and their gradient, of the shape of y
_FORMULAS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "bce_logits": _bce_logits,
    "squared_error": _squared_error,
}
