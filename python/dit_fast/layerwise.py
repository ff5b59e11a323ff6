"""The primitive for convolutional nets: dual numbers through every layer, all columns of a few samples at a time.

The tangent of a sample's loss along C_k is ⟨C_k, ∇ℓ_b⟩, that of the weight gradient H C_k. The forward and the backward pass
of the values are made once for all columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dit_fast.data import leaves, map_tensors
from dit_fast.duals import Dual, Maybe
from dit_fast.known_loss import KnownLoss
from dit_fast.layers import Net, Node, read
from dit_fast.linearize import Hessian, Linearized, linearize, with_l2
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.recognize import NotCompiled, recognize_loss
from dit_fast.sweep import Linearizer

# this path must meet the generic one on a batch of the log
COMPARED_SAMPLES = 8
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-10}

# tangents of the largest layer that go through the net together: what stays in the cache, and is not asked of the system anew
CHUNK_BYTES = 8 * 2**20
# columns that share the values of a chunk: at least these, and more where so many samples of them fit
COLUMNS_AT_ONCE, SAMPLES_AT_ONCE = 4, 16
# just below the largest that glibc heeds (32 MiB)
ALLOCATION = 31 * 2**20
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
    net = replace(net, loss=_find_loss(ev, net, params, batch))
    _compare(ev, net, params, batch, hessian)
    return net


def linearizer(
    ev: Evaluator, net: Net, hessian: Hessian, num_columns: int = COLUMNS_AT_ONCE, with_gradient: bool = True
) -> Linearizer:
    """`linearize` for this net, its chunks of samples sized for `num_columns`; without `with_gradient` g is left empty."""
    columns, chunk = sizes(ev, net, num_columns)
    # after an allocation of this size is freed, glibc keeps freed memory of up to twice of it instead of returning it to the
    # system with each chunk; nothing touches it. Page faults were a fifth of the time
    torch.empty(ALLOCATION, dtype=torch.uint8)

    def run(params: Params, batch: Batch) -> Linearized:
        with torch.no_grad():
            tensors = _tensors(ev, net, params)
        chunks = _cut(net, batch, chunk)
        gradient = {name: torch.zeros_like(value) for name, value in params.items()} if with_gradient else {}
        kept: list[_Chunk] = []

        def made() -> Iterator[_Chunk]:
            """A chunk is made when its turn comes and forgotten after it: memory that is still in the cache is used again."""
            for rows, target in chunks:
                yield _Chunk(ev, net, hessian, tensors, batch, rows, target)

        with torch.no_grad():
            if with_gradient:
                kept = list(made())
                for part in kept:
                    part.backward(gradient)

        def pull(block: Params) -> tuple[Tensor, Params]:
            num_columns = len(next(iter(block.values())))
            dots = torch.zeros(num_columns, len(batch.ids), dtype=torch.float64, device=ev.device)
            hvp = {name: torch.zeros_like(value) for name, value in block.items()}
            with torch.no_grad():
                for part in kept or made():
                    if not kept and hessian == "exact":
                        part.backward(None)
                    for start in range(0, num_columns, columns):
                        some = slice(start, start + columns)
                        own = {name: value[some] for name, value in hvp.items()}
                        dots[some, part.rows] = part.pull({name: value[some] for name, value in block.items()}, own)
            return dots, hvp

        return with_l2(ev.l2, params, batch, hessian, gradient, pull)

    return run


def sizes(ev: Evaluator, net: Net, num_columns: int) -> tuple[int, int]:
    """How many columns and how many samples go through the net together."""
    limit = CHUNK_BYTES if ev.device.type == "cpu" else DEVICE_CHUNK_BYTES
    one = net.largest * ev.dtype.itemsize
    columns = min(num_columns, max(COLUMNS_AT_ONCE, limit // (SAMPLES_AT_ONCE * one)))
    return columns, max(1, limit // (one * columns))


def _cut(net: Net, batch: Batch, size: int) -> list[tuple[slice, Any]]:
    """The batch in even chunks of at most `size` samples, each with its targets; whole where those cannot be cut."""
    x, target = batch.args[0], batch.target
    if x.shape[1:] != net.sample_shape:
        raise NotCompiled(f"samples of step {batch.step} have another shape than those of the first step")
    B = len(x)
    own = leaves(target) if isinstance(target, Tensor | tuple | list | dict) else []
    if not own or not all(leaf.ndim and len(leaf) == B for leaf in own) or len(own) != _num_leaves(target):
        return [(slice(0, B), target)]
    num_chunks = -(-B // size)
    rows = [slice(B * i // num_chunks, B * (i + 1) // num_chunks) for i in range(num_chunks)]
    return [(part, map_tensors(target, itemgetter(part))) for part in rows]


def _num_leaves(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(_num_leaves, tree.values()))
    return sum(map(_num_leaves, tree)) if isinstance(tree, tuple | list) else 1


class _Chunk:
    """Some samples of a batch at one θ: their values, and the loss at the output."""

    def __init__(
        self, ev: Evaluator, net: Net, hessian: Hessian, tensors: Tensors, batch: Batch, rows: slice, target: Any
    ) -> None:
        self.net, self.hessian, self.rows = net, hessian, rows
        self.duals = _forward(net, batch.args[0][rows], tensors)
        self.coefficients = batch.coefficients[rows]
        with torch.enable_grad():
            self.output = self.duals[-1].y.detach().requires_grad_()
            total = ev.losses_of(self.output, target, rows.stop - rows.start).sum()
            self.slope, self.loss = _slope(total, self.output, target, net.loss, hessian)

    def backward(self, gradient: Params | None) -> None:
        """δ of every operation, for the weighted batch loss; the gradient of that is added to `gradient`."""

        def visit(node: Node, dual: Dual, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
            if gradient is not None and any(node.parameters):
                _accumulate(gradient, node.parameters, dual.gradients(delta))
            own = dual.backward(delta, wanted)
            if self.hessian != "exact":
                dual.delta = None
            return own

        _backwards(self.net, self.duals, _weighted(self.slope.detach(), self.coefficients), visit)

    def pull(self, block: Params, hvp: Params) -> Tensor:
        """dots [K, B] float64; adds H C to `hvp`. For columns that go through together."""

        def visit(node: Node, dual: Dual, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
            own, products = dual.tangent_backward(delta, _columns(node, block), wanted)
            _accumulate(hvp, node.parameters, products)
            return own

        tangent = _tangents(self.net, self.duals, block)
        if self.hessian != "none":
            _backwards(self.net, self.duals, self._curved(tangent), visit)
        return (self.slope[:, None].detach() * tangent).flatten(2).double().sum(2).T

    def _curved(self, tangent: Tensor) -> Tensor:
        """a_b ∇²ℓ_b ż_b [B, K, ...] at the output."""
        if self.loss is not None:
            return self.loss.curved(tangent, self.coefficients)
        if not self.slope.requires_grad:
            return torch.zeros_like(tangent)
        columns = [
            torch.autograd.grad(self.slope, self.output, column, retain_graph=True, materialize_grads=True)[0]
            for column in tangent.unbind(1)
        ]
        return _weighted(torch.stack(columns, 1), self.coefficients)


def _forward(net: Net, x: Tensor, tensors: Tensors) -> list[Dual]:
    values, made = [x], []
    for node, own in zip(net.nodes, tensors, strict=True):
        made.append(node.make([values[i] for i in node.inputs], own))
        made[-1].owns = net.owned[len(made) - 1]
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


def _slope(
    total: Tensor, output: Tensor, target: Any, known: tuple[str, float] | None, hessian: Hessian
) -> tuple[Tensor, KnownLoss | None]:
    """∂ℓ_b/∂z_b (a sample's loss depends on its own output alone) and the curvature; without that autograd has it."""
    if hessian == "none":
        return torch.autograd.grad(total, output)[0], None
    if known is not None:
        (slope,) = torch.autograd.grad(total, output, retain_graph=True)
        loss = KnownLoss.at(known, output, target, slope)
        if loss is not None:
            return slope, loss
    return torch.autograd.grad(total, output, create_graph=True)[0], None


def _find_loss(ev: Evaluator, net: Net, params: Params, batch: Batch) -> tuple[str, float] | None:
    with torch.no_grad():
        output = _forward(net, batch.args[0], _tensors(ev, net, params))[-1].y
    try:
        return recognize_loss(ev, output, batch.target)
    except NotCompiled:
        return None


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
