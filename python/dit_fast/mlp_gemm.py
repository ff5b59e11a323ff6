"""The adjoint sweep of feed-forward nets that are too large for one launch: torch's GEMMs around compiled pieces.

The algebra is that of csrc/cpu/mlp_columns.cpp. Tangents are [B, K, O], so that one product serves all columns where the
weight is shared. On a GPU steps alike are captured in a CUDA graph and replayed; on the CPU the same code runs for tests.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.mlp import ACTIVATIONS, LOSSES, Mlp, MlpLayer, MlpSteps, MlpVisits, check_sweep

# graphs that are kept: a schedule that changes with every step would capture each one for itself
MOST_GRAPHS = 64

_PIECES = ("activate", "combine", "loss_rows", "loss_columns")
_LINEAR = ("identity", "relu", "leaky_relu")


class Direction(NamedTuple):
    """c = scale · data of a parameter; u is multiplied by `keep` when H c is added to it."""

    data: Tensor
    scale: float
    keep: float
    u: Tensor


class Replayed:
    """Calls functions, on a GPU as replays of CUDA graphs: one call of a key runs, the next is captured, more are replays.

    What a function reads must lie at the same addresses whenever its key is the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        """function(), whose work on the device `key` determines."""
        if self.device.type != "cuda" or (key not in self.graphs and len(self.graphs) >= MOST_GRAPHS):
            function()
        elif key not in self.graphs:
            function()  # what the libraries allocate at first use must not be part of a capture
            self.graphs[key] = None
        else:
            graph = self.graphs[key]
            if graph is None:
                graph = self.graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    function()
            graph.replay()


class GemmSweep:
    """The steps of `ops.MlpSweep`, same arguments, results and errors, on any one device.

    `run` returns None; on a GPU it returns before the work is done, and `bad_step` waits.
    """

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        scores: Tensor,
        visits: MlpVisits | None = None,
        *,
        l2: float = 0.0,
        hessian: str = "exact",
        replayed: Replayed | None = None,
    ) -> None:
        check_sweep(net, steps, blocks, momenta, scores, visits)
        self.net, self.steps, self.blocks, self.momenta, self.scores = net, steps, blocks, momenta, scores
        self.l2, self.hessian, device = l2, hessian, steps.theta.device
        self.visits = visits
        if visits is not None:
            self.joins, self.leaves, self.joining, self.leaving = (
                values.tolist() for values in (visits.joins, visits.leaves, visits.joining, visits.leaving)
            )
        self.replayed = replayed or Replayed(device)
        # read once, so that no step has to wait for them
        self.offsets, self.settings = steps.offsets.tolist(), steps.settings.tolist()
        coefficients = steps.coefficients.tolist() if l2 else []
        self.totals = [sum(coefficients[a:b]) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        largest = max((b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)), default=0)
        # what a step reads, where a graph finds it
        self.theta = torch.empty_like(steps.theta[0] if len(steps.theta) else steps.theta.new_empty(steps.theta.shape[1]))
        self.rows, self.ids = (torch.empty(largest, dtype=torch.int64, device=device) for _ in range(2))
        self.a = torch.empty(largest, dtype=torch.float64, device=device)
        self.t, self.bad = (torch.full((), -1, dtype=torch.int64, device=device) for _ in range(2))

    def run(self, start: int, stop: int) -> None:
        """Steps stop − 1 … start."""
        num_columns = len(self.scores)
        for t in reversed(range(start, stop)):
            if self.visits is not None:
                self._join_and_leave(t + 1)
                num_columns = sum(join > t for join in self.joins)
            first, last = self.offsets[t : t + 2]
            B, batch = last - first, slice(first, last)
            self.theta.copy_(self.steps.theta[t])
            self.t.fill_(t)
            for own, logged in ((self.rows, self.steps.rows), (self.ids, self.steps.ids), (self.a, self.steps.coefficients)):
                own[:B].copy_(logged[batch])
            total, settings = self.totals[t], self.settings[t]
            key = (B, num_columns, total, tuple(map(tuple, settings)))
            self.replayed(key, lambda B=B, K=num_columns, s=settings, total=total: self._step(B, K, s, total))  # type: ignore[misc]

    def bad_step(self) -> int | None:
        """The last step whose scores are not finite, None where all are."""
        bad = int(self.bad)
        return None if bad < 0 else bad

    def _join_and_leave(self, t: int) -> None:
        """What the columns' blocks get once the steps from t on are done."""
        assert self.visits is not None
        layers = [layer for layer in self.net.layers for _ in range(2)]
        for i, (layer, block) in enumerate(zip(layers, self.blocks, strict=True)):
            if block is None:
                continue
            at = layer.weight if i % 2 == 0 else layer.bias
            assert at is not None
            own = self.visits.gradients[:, at : at + block[0].numel()].unflatten(1, block.shape[1:])
            joining = [(k, row) for k, (join, row) in enumerate(zip(self.joins, self.joining, strict=True)) if join == t]
            leaving = [(k, row) for k, (end, row) in enumerate(zip(self.leaves, self.leaving, strict=True)) if end == t > 0]
            if joining:
                torch._foreach_copy_([block[k] for k, _ in joining], [own[row] for _, row in joining])
            if leaving:
                torch._foreach_sub_([block[k] for k, _ in leaving], [own[row] for _, row in leaving])

    def _step(self, B: int, K: int, settings: list[list[float]], total: float) -> None:
        self.B, self.K = B, K
        curved = self.hessian != "none"
        self._forward(curved)
        ridge = self.l2 * total if curved else 0.0
        self.directions = [self._direction(i, values, ridge) for i, values in enumerate(settings)]
        dots = torch.zeros(B, K, dtype=torch.float64, device=self.theta.device)
        if self.l2:
            dots += self.l2 * self._penalty()
        if curved:
            d = self._tangents(dots)
            self._add_scores(dots)
            self._backward(d)
            return
        for layer in range(len(self.net.layers)):
            z = self._own(layer)
            dots += (self.deltas[layer][:, None] * z).sum(2, dtype=torch.float64)
        self._add_scores(dots)
        for c in self.directions:
            if c is not None and c.keep != 1:
                c.u.mul_(c.keep)

    def _weight(self, layer: MlpLayer) -> tuple[Tensor, Tensor | None]:
        weight = self.theta[layer.weight : layer.weight + layer.outputs * layer.inputs].view(layer.outputs, layer.inputs)
        return weight, None if layer.bias is None else self.theta[layer.bias : layer.bias + layer.outputs]

    def _forward(self, weighted: bool) -> None:
        """The logged model's pass and back: h, φ', the curves and δ of every layer."""
        rows, layers = self.rows[: self.B], self.net.layers
        self.h = [self.steps.x.index_select(0, rows)]
        self.first: list[Tensor] = []
        self.curve: list[Tensor | None] = []
        for layer in layers:
            weight, bias = self._weight(layer)
            z = self.h[-1] @ weight.T if bias is None else torch.addmm(bias, self.h[-1], weight.T)
            self.first.append(torch.empty_like(z))
            self.curve.append(None if layer.activation in _LINEAR else torch.empty_like(z))
            self._piece("activate", layer, z=z, first=self.first[-1], second=self.curve[-1])
            self.h.append(z)
        self.targets = self.steps.targets.index_select(0, rows)
        self.probabilities, self.top, delta = (torch.empty_like(self.h[-1]) for _ in range(3))
        self._piece(
            "loss_rows", layers[-1], weighted=weighted, z=self.h[-1], first=self.first[-1], second=self.curve[-1],
            probabilities=self.probabilities, top=self.top, delta=delta,
        )  # fmt: skip
        self.deltas = [delta]
        for i in reversed(range(1, len(layers)) if self.hessian != "ggn" else ()):
            back, curve = self.deltas[0] @ self._weight(layers[i])[0], self.curve[i - 1]
            if curve is not None:
                curve.mul_(back)
            self.deltas.insert(0, back.mul_(self.first[i - 1]))
        if self.hessian != "exact":
            self.curve = [None] * len(layers)

    def _direction(self, i: int, setting: list[float], ridge: float) -> Direction | None:
        block = self.blocks[i]
        if block is None:
            return None
        lr, weight_decay, momentum, dampening, nesterov, first = setting
        u, decay = block[: self.K], weight_decay + ridge
        if not momentum:
            return Direction(u, -lr, 1 - lr * decay, u)
        assert self.momenta is not None
        buffer = self.momenta[i]
        assert buffer is not None
        m, r = buffer[: self.K], -lr * u
        b = m + (momentum * r if nesterov else r)
        c = (1 if first else 1 - dampening) * b + (r if nesterov else 0)
        m.copy_(momentum * b)
        u.add_(c, alpha=decay)
        return Direction(c, 1.0, 1.0, u)

    def _penalty(self) -> Tensor:
        """⟨c_k, θ⟩ [K] in double."""
        total = torch.zeros(self.K, dtype=torch.float64, device=self.theta.device)
        for i, c in enumerate(self.directions):
            if c is not None:
                value = self._weight(self.net.layers[i // 2])[i % 2]
                assert value is not None
                total += c.scale * (c.data.double() * value).flatten(1).sum(1)
        return total

    def _own(self, layer: int, z: Tensor | None = None) -> Tensor:
        """z + h Cᵀ + c [B, K, O], into z where it is given."""
        weight, bias = self.directions[2 * layer : 2 * layer + 2]
        assert weight is not None
        K, O, I = weight.data.shape
        # of the first layer [I, K·O], of the others [K·O, I]
        flat = weight.data.permute(2, 0, 1).reshape(I, K * O) if layer == 0 else weight.data.reshape(K * O, I).T
        if z is None:
            z = torch.mm(self.h[layer], flat).mul_(weight.scale)
        else:
            z = z.view(self.B, K * O).addmm_(self.h[layer], flat, alpha=weight.scale)
        if bias is not None:
            z.add_(bias.data.reshape(K * O), alpha=bias.scale)
        return z.view(self.B, K, O)

    def _tangents(self, dots: Tensor) -> Tensor:
        """ż of every layer, dots, and δ̇ of the last [B, K, O]."""
        self.z: list[Tensor] = []
        self.dh: list[Tensor] = []
        for i, layer in enumerate(self.net.layers):
            through = None
            if i > 0:
                self.dh.append(self.first[i - 1][:, None] * self.z[-1])
                through = self.dh[-1].view(self.B * self.K, layer.inputs) @ self._weight(layer)[0].T
            self.z.append(self._own(i, through))
        d = torch.empty_like(self.z[-1])
        self._piece(
            "loss_columns", self.net.layers[-1], K=self.K, z=self.z[-1], first=self.first[-1], second=self.curve[-1],
            probabilities=self.probabilities, top=self.top, g=d, dots=dots,
        )  # fmt: skip
        return d

    def _add_scores(self, dots: Tensor) -> None:
        a = self.a[: self.B]
        self.scores[: self.K].index_add_(1, self.ids[: self.B], (dots * a[:, None]).T, alpha=-1)
        bad = torch.where(torch.isfinite(dots.sum()), -1, self.t)
        self.bad.copy_(torch.maximum(self.bad, bad))

    def _backward(self, d: Tensor) -> None:
        B, K, exact = self.B, self.K, self.hessian == "exact"
        for i in reversed(range(len(self.net.layers))):
            layer, (weight, bias) = self.net.layers[i], self.directions[2 * i : 2 * i + 2]
            assert weight is not None
            O, I = layer.outputs, layer.inputs
            flat = d.view(B, K * O)
            if i > 0:
                # δ̇ of the layer below = φ' (δ̇ W + δ C) + curve ż, before C = u changes
                below = (d.view(B * K, O) @ self._weight(layer)[0]).view(B, K, I)
                if exact:
                    delta = self.deltas[i].expand(K, B, O)
                    below.transpose(0, 1).baddbmm_(delta, weight.data, alpha=weight.scale)
                self._piece(
                    "combine", layer, outputs=I, K=K, first=self.first[i - 1], second=self.curve[i - 1], z=self.z[i - 1],
                    g=below,
                )  # fmt: skip
                weight.u.view(K * O, I).addmm_(flat.T, self.h[i], beta=weight.keep)
                if exact:
                    weight.u.baddbmm_(self.deltas[i].T.expand(K, O, B), self.dh[i - 1].transpose(0, 1))
            else:
                # a view, as the first weight's block lies [I, K, O]
                weight.u.permute(2, 0, 1).flatten(1).addmm_(self.h[0].T, flat, beta=weight.keep)
            if bias is not None:
                bias.u.mul_(bias.keep).add_(d.sum(0))
            if i > 0:
                d = below

    def _piece(
        self,
        piece: str,
        layer: MlpLayer,
        *,
        outputs: int = 0,
        K: int = 1,
        weighted: bool = True,
        z: Tensor | None = None,
        first: Tensor | None = None,
        second: Tensor | None = None,
        probabilities: Tensor | None = None,
        top: Tensor | None = None,
        delta: Tensor | None = None,
        g: Tensor | None = None,
        dots: Tensor | None = None,
    ) -> None:
        """One of the compiled pieces (csrc/mlp_rows.h)."""
        targets = self.targets if piece == "loss_rows" else None
        operands = (self.a, targets, z, first, second, probabilities, top, delta, g, dots)
        assert all(x is None or x.is_contiguous() for x in operands)
        ops.core("mlp_rows", self.theta.device)(
            self.theta.dtype == torch.float64,
            _PIECES.index(piece),
            (self.B, K, outputs or layer.outputs),
            (ACTIVATIONS.index(layer.activation), layer.slope),
            (LOSSES.index(self.net.loss), self.net.loss_scale),
            weighted,
            ops.addresses(operands),
        )
