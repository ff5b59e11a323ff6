"""The primitive for convolutional nets: dual numbers through every layer, all columns of a few samples at a time.

The tangent of a sample's loss along C_k is ⟨C_k, ∇ℓ_b⟩, that of the weight gradient H C_k. The forward and the backward pass
of the values are made once for all columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.duals import Dual, Maybe
from dit_fast.layers import Net, Node, read
from dit_fast.linearize import Hessian, Linearized, linearize, with_l2
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.recognize import NotCompiled
from dit_fast.sweep import Linearizer

# this path must meet the generic one on a batch of the log
COMPARED_SAMPLES = 8
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-10}

# tangents of the largest layer that go through the net together: what stays in the cache, and is not asked of the system anew
CHUNK_BYTES = 4 * 2**20
COLUMNS_AT_ONCE = 8
# on other devices what counts is to have enough to do
DEVICE_CHUNK_BYTES = 256 * 2**20

Tensors = list[list[Any]]


def prepare(ev: Evaluator, hessian: Hessian) -> Net:
    """The net of a problem in the state its session has set, proved on the first batch; NotCompiled says why there is none."""
    if hessian == "fisher":
        raise NotCompiled("hessian='fisher' is made of per-sample gradients")
    batch = ev.batches(0)[0]
    if batch.rng is not None:
        raise NotCompiled("the log holds dropout's masks")
    rows = slice(COMPARED_SAMPLES)
    params, batch = ev.params(0), ev.part(batch, rows) if len(batch.ids) > COMPARED_SAMPLES else batch
    if len(batch.args) != 1 or batch.kwargs or not isinstance(batch.args[0], Tensor) or not batch.args[0].is_floating_point():
        raise NotCompiled("the model takes something else than one tensor of floating numbers")
    net = read(ev, params, batch)
    _compare(ev, net, params, batch, hessian)
    return net


def linearizer(
    ev: Evaluator, net: Net, hessian: Hessian, num_columns: int = COLUMNS_AT_ONCE, with_gradient: bool = True
) -> Linearizer:
    """`linearize` for this net, its chunks of samples sized for `num_columns`; without `with_gradient` g is left empty."""
    columns, chunk = sizes(ev, net, num_columns)

    def run(params: Params, batch: Batch) -> Linearized:
        with torch.no_grad():
            step = _Step(ev, net, hessian, params, batch, chunk)
            gradient = step.backward(with_gradient) if with_gradient or hessian == "exact" else {}

        def pull(block: Params) -> tuple[Tensor, Params]:
            num_columns = len(next(iter(block.values())))
            dots = torch.zeros(num_columns, len(batch.ids), dtype=torch.float64, device=ev.device)
            hvp = {name: torch.zeros_like(value) for name, value in block.items()}
            with torch.no_grad():
                for start in range(0, num_columns, columns):
                    part = slice(start, start + columns)
                    own = {name: value[part] for name, value in hvp.items()}
                    step.pull({name: value[part] for name, value in block.items()}, dots[part], own)
            return dots, hvp

        return with_l2(ev.l2, params, batch, hessian, gradient, pull)

    return run


def sizes(ev: Evaluator, net: Net, num_columns: int) -> tuple[int, int]:
    """How many columns and how many samples go through the net together."""
    columns = min(num_columns, COLUMNS_AT_ONCE)
    limit = CHUNK_BYTES if ev.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return columns, max(1, limit // (net.largest * ev.dtype.itemsize * columns))


class _Step:
    """One batch at one θ: its values in chunks of samples, and the loss at the output."""

    def __init__(self, ev: Evaluator, net: Net, hessian: Hessian, params: Params, batch: Batch, chunk: int) -> None:
        self.net, self.hessian, self.params = net, hessian, params
        x = batch.args[0]
        if x.shape[1:] != net.sample_shape:
            raise NotCompiled(f"samples of step {batch.step} have another shape than those of the first step")
        tensors = _tensors(ev, net, params)
        # as even as can be
        num_chunks = -(-len(x) // chunk)
        self.rows = [slice(len(x) * i // num_chunks, len(x) * (i + 1) // num_chunks) for i in range(num_chunks)]
        self.chunks = [_forward(net, x[rows], tensors) for rows in self.rows]
        self.coefficients = batch.coefficients
        with torch.enable_grad():
            self.output = torch.cat([chunk[-1].y for chunk in self.chunks]).requires_grad_()
            losses = ev.losses_of(self.output, batch.target, len(batch.ids))
            # ∂ℓ_b/∂z_b: a sample's loss depends on its own output alone
            self.slope = torch.autograd.grad(losses.sum(), self.output, create_graph=hessian != "none")[0]

    def backward(self, with_gradient: bool) -> Params:
        """δ of every operation, for the weighted batch loss, and the gradient of that where asked for."""
        gradient = {name: torch.zeros_like(value) for name, value in self.params.items()} if with_gradient else {}

        def visit(node: Node, dual: Dual, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
            if with_gradient and any(node.parameters):
                _accumulate(gradient, node.parameters, dual.gradients(delta))
            own = dual.backward(delta, wanted)
            if self.hessian != "exact":
                dual.delta = None
            return own

        last = _weighted(self.slope.detach(), self.coefficients)
        for rows, chunk in zip(self.rows, self.chunks, strict=True):
            _backwards(self.net, chunk, last[rows], visit)
        return gradient

    def pull(self, block: Params, dots: Tensor, hvp: Params) -> None:
        """Writes dots [K, B] and adds H C to `hvp`, for columns that go through together."""

        def visit(node: Node, dual: Dual, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
            own, products = dual.tangent_backward(delta, _columns(node, block), wanted)
            _accumulate(hvp, node.parameters, products)
            return own

        for rows, chunk in zip(self.rows, self.chunks, strict=True):
            tangent = _tangents(self.net, chunk, block)
            dots[:, rows] = (self.slope[rows, None].detach() * tangent).flatten(2).double().sum(2).T
            if self.hessian != "none":
                _backwards(self.net, chunk, self._curved(tangent, rows), visit)

    def _curved(self, tangent: Tensor, rows: slice) -> Tensor:
        """a_b ∇²ℓ_b ż_b [B, K, ...] of some samples, at the output."""
        if not self.slope.requires_grad:
            return torch.zeros_like(tangent)
        curved = torch.empty_like(tangent)
        for k in range(tangent.shape[1]):
            # a sample's loss depends on its own output alone, so the others' tangents can be anything
            whole = torch.zeros_like(self.output)
            whole[rows] = tangent[:, k]
            curved[:, k] = torch.autograd.grad(self.slope, self.output, whole, retain_graph=True, materialize_grads=True)[0][
                rows
            ]
        return _weighted(curved, self.coefficients[rows])


def _forward(net: Net, x: Tensor, tensors: Tensors) -> list[Dual]:
    values, made = [x], []
    for node, own in zip(net.nodes, tensors, strict=True):
        made.append(node.make([values[i] for i in node.inputs], own))
        values.append(made[-1].y)
    return made


def _tangents(net: Net, chunk: list[Dual], block: Params) -> Tensor:
    tangents: list[Maybe] = [None]
    for node, dual in zip(net.nodes, chunk, strict=True):
        tangents.append(dual.tangent([tangents[i] for i in node.inputs], _columns(node, block)))
    assert tangents[-1] is not None
    return tangents[-1]


def _backwards(net: Net, chunk: list[Dual], last: Tensor, visit: Callable[..., list[Maybe]]) -> None:
    """visit(node, dual, δ of its output, which inputs are wanted) → δ of its inputs, from the last operation to the first."""
    deltas: list[Maybe] = [None] * len(chunk) + [last]
    for i in reversed(range(len(chunk))):
        node, delta = net.nodes[i], deltas.pop()
        if delta is None:
            continue
        wanted = [net.wanted[j] for j in node.inputs]
        for j, own in zip(node.inputs, visit(node, chunk[i], delta, wanted), strict=True):
            if net.wanted[j] and own is not None:
                before = deltas[j]
                deltas[j] = own if before is None else before + own


def _columns(node: Node, block: Params) -> list[Maybe]:
    return [None if name is None else block[name] for name in node.parameters]


def _accumulate(total: Params, names: Sequence[str | None], parts: Sequence[Maybe]) -> None:
    for name, part in zip(names, parts, strict=True):
        if name is not None:
            assert part is not None
            total[name] += part


def _weighted(value: Tensor, coefficients: Tensor) -> Tensor:
    return value * coefficients.view(-1, *[1] * (value.ndim - 1))


def _tensors(ev: Evaluator, net: Net, params: Params) -> Tensors:
    return ev.call(params, lambda model: [[getattr(m, attribute) for m, attribute in n.sources] for n in net.nodes])


def _compare(ev: Evaluator, net: Net, params: Params, batch: Batch, hessian: Hessian) -> None:
    """NotCompiled where gradient, dots or Hessian products of a batch differ from those of the generic path."""
    generator = torch.Generator().manual_seed(0)
    probe = {n: torch.randn(2, *v.shape, generator=generator, dtype=v.dtype).to(v.device) for n, v in params.items()}
    gradient, pull = linearizer(ev, net, hessian, 2)(params, batch)
    dots, hvp = pull(probe)
    try:
        expected_gradient, generic_pull = linearize(ev, params, batch, hessian, columns_per_pull=1)
        expected_dots, expected_hvp = generic_pull(probe)
    except (RuntimeError, NotImplementedError) as failure:
        raise NotCompiled(f"the generic path, to compare with, fails: {str(failure).splitlines()[0][:120]}") from failure
    for ours, theirs in ((gradient, expected_gradient), (hvp, expected_hvp), ({"": dots}, {"": expected_dots})):
        error = max(float((ours[name] - value).abs().max()) for name, value in theirs.items() if value.numel())
        scale = max(float(value.abs().max()) for value in theirs.values() if value.numel())
        if not error <= AGREEMENT[ev.dtype] * scale:
            raise NotCompiled(
                f"it does not agree with the generic path on the first batch ({error / (scale or 1):.1g} relative)"
            )
