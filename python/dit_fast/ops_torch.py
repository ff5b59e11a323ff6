"""Plain-torch twins of dit_fast.ops, pooling and dual_rows: the same names, arguments and results, in a few lines each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn import functional as F

from dit_fast.lowrank import GradDotLayer, LowrankUpdateLayer, UpdateDotLayer
from dit_fast.mlp import SETTINGS, Mlp, MlpModels, MlpSteps, MlpVisits
from dit_fast.pooling import BYTE_PLACES, PoolWindow


def grad_dot(dots: Tensor, delta: Tensor, activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """dots[k,b,r] += Σ_s ( Σ_o Σ_i δ[b,r,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,r,s,o] v[k,o] ), all of it in double.

    Shapes, dtypes and errors: dit_fast.ops.grad_dot.
    """
    delta = _with_rows(delta).double()
    found = torch.einsum("brso,koi,bsi->kbr", delta, weight.double(), activations.double())
    if bias is not None:
        found += torch.einsum("brso,ko->kbr", delta, bias.double())
    dots += found.view(dots.shape)


def lowrank_update(
    weight: Tensor, bias: Tensor | None, coefficients: Tensor, delta: Tensor, activations: Tensor, alpha: float = 1.0
) -> None:
    """U[k] = alpha U[k] + Σ_b Σ_r c[k,b,r] Σ_s δ[b,r,s] ⊗ a[b,s] and v[k] likewise without a, summed in double.

    Shapes, dtypes and errors: dit_fast.ops.lowrank_update.
    """
    delta = _with_rows(delta).double()
    weighted = torch.einsum("kbr,brso->kbso", coefficients.reshape(len(coefficients), *delta.shape[:2]), delta)
    changes = [(weight, torch.einsum("kbso,bsi->koi", weighted, activations.double()))]
    if bias is not None:
        changes.append((bias, weighted.sum((1, 2))))
    for value, change in changes:
        value.copy_(change if alpha == 0 else alpha * value.double() + change)


def update_dot(
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    delta: Tensor,
    activations: Tensor,
    dots: Tensor,
    dot_delta: Tensor,
    dot_activations: Tensor,
    alpha: float = 1.0,
) -> None:
    """`lowrank_update`, then `grad_dot` with the directions that came out.

    Shapes, dtypes and errors: dit_fast.ops.update_dot.
    """
    lowrank_update(weight, bias, coefficients, delta, activations, alpha)
    grad_dot(dots, dot_delta, dot_activations, weight, bias)


def grad_dot_layers(dots: Tensor, layers: Sequence[GradDotLayer]) -> None:
    """`grad_dot` of one layer after the other; arguments and errors: dit_fast.ops.grad_dot_layers."""
    for layer in layers:
        grad_dot(dots, *layer)


def lowrank_update_layers(coefficients: Tensor, layers: Sequence[LowrankUpdateLayer], alpha: float = 1.0) -> None:
    """`lowrank_update` of one layer after the other; arguments and errors: dit_fast.ops.lowrank_update_layers."""
    for weight, bias, delta, activations in layers:
        lowrank_update(weight, bias, coefficients, delta, activations, alpha)


def update_dot_layers(coefficients: Tensor, dots: Tensor, layers: Sequence[UpdateDotLayer], alpha: float = 1.0) -> None:
    """`update_dot` of one layer after the other; arguments and errors: dit_fast.ops.update_dot_layers."""
    for weight, bias, delta, activations, dot_delta, dot_activations in layers:
        update_dot(weight, bias, coefficients, delta, activations, dots, dot_delta, dot_activations, alpha)


def _with_rows(delta: Tensor) -> Tensor:
    """[B, R, S, O], R = 1 where there is none."""
    return delta if delta.ndim == 4 else delta[:, None]


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: z.relu(),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "tanh": lambda z, slope: z.tanh(),
    "sigmoid": lambda z, slope: z.sigmoid(),
    "silu": lambda z, slope: F.silu(z),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
}
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda y, target: F.cross_entropy(y, target, reduction="none"),
    "bce_logits": lambda y, target: F.binary_cross_entropy_with_logits(y, target, reduction="none").sum(1),
    "squared_error": lambda y, target: (y - target).square().sum(1),
}


def _mlp_output(net: Mlp, theta: Tensor, x: Tensor) -> Tensor:
    h = x
    for layer in net.layers:
        weight = theta[layer.weight : layer.weight + layer.outputs * layer.inputs]
        bias = None if layer.bias is None else theta[layer.bias : layer.bias + layer.outputs]
        h = _ACTIVATIONS[layer.activation](F.linear(h, weight.view(layer.outputs, layer.inputs), bias), layer.slope)
    return h


def mlp_gradient(net: Mlp, theta: Tensor, x: Tensor, targets: Tensor, coefficients: Tensor, gradients: Tensor) -> None:
    """gradients[t] += Σ_b a_b ∇ℓ_b(θ[t]) by autograd; arguments and errors: dit_fast.ops.mlp_gradient."""

    def total(point: Tensor) -> Tensor:
        losses = net.loss_scale * _LOSSES[net.loss](_mlp_output(net, point, x), targets)
        return (coefficients.to(losses.dtype) * losses).sum()

    for t in range(len(theta)):
        gradients[t] += grad(total)(theta[t])


def mlp_loss_changes(
    net: Mlp,
    theta: Tensor,
    x: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    blocks: Sequence[Tensor | None],
    changes: Tensor,
) -> None:
    """changes[j] += Σ_b a_b (ℓ_b(θ + d_j) − ℓ_b(θ)), model by model; arguments and errors: dit_fast.ops.mlp_loss_changes."""

    def total(point: Tensor) -> Tensor:
        losses = net.loss_scale * _LOSSES[net.loss](_mlp_output(net, point, x), targets)
        return (coefficients * losses.double()).sum()

    for j in range(len(changes)):
        d = torch.zeros_like(theta)
        for place, block, _ in _places(net, blocks):
            d[place] = block[j].flatten()
        changes[j] += total(theta + d) - total(theta)


class MlpRetrain:
    """The steps of dit_fast.ops.MlpRetrain, same arguments and results, one step and model at a time by autograd."""

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        models: MlpModels,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        *,
        l2: float = 0.0,
    ) -> None:
        self.net, self.steps, self.models, self.blocks, self.momenta, self.l2 = net, steps, models, blocks, momenta, l2

    def run(self, start: int, stop: int) -> None:
        """Steps start … stop − 1."""
        s, models = self.steps, self.models
        sample_of = torch.repeat_interleave(torch.arange(len(models.offsets) - 1), models.offsets.diff())
        for t in range(start, stop):
            batch = slice(int(s.offsets[t]), int(s.offsets[t + 1]))
            for j in range(len(models.joins)):
                if models.joins[j] > t:
                    continue
                d = torch.zeros_like(s.theta[t])
                for place, block, _ in _places(self.net, self.blocks):
                    d[place] = block[j].flatten()
                kept = ~torch.isin(s.ids[batch], sample_of[models.removed == j])
                theirs = self._gradient(s.theta[t] + d, batch, s.coefficients[batch] * kept)
                change = theirs - self._gradient(s.theta[t], batch, s.coefficients[batch])
                for place, block, i in _places(self.net, self.blocks):
                    self._advance(block, i, j, t, change[place].view_as(block[j]))

    def _gradient(self, theta: Tensor, batch: slice, a: Tensor) -> Tensor:
        x, target, a = self.steps.x[self.steps.rows[batch]], self.steps.targets[self.steps.rows[batch]], a.to(theta.dtype)

        def total(point: Tensor) -> Tensor:
            return (a * self.net.loss_scale * _LOSSES[self.net.loss](_mlp_output(self.net, point, x), target)).sum()

        return grad(total)(theta) + self.l2 * a.sum() * theta

    def _advance(self, block: Tensor, i: int, j: int, t: int, g: Tensor) -> None:
        lr, wd, momentum, dampening, nesterov, first = self.steps.settings[t, i].tolist()
        g = g + wd * block[j]
        if momentum:
            assert self.momenta is not None
            m = self.momenta[i]
            assert m is not None
            m[j] = momentum * m[j] + (1 if first else 1 - dampening) * g
            g = g + momentum * m[j] if nesterov else m[j]
        block[j] -= lr * g


def _places(net: Mlp, blocks: Sequence[Tensor | None]) -> list[tuple[slice, Tensor, int]]:
    """Of each parameter: where it stands in θ, its block, and its number."""
    starts = [at for layer in net.layers for at in (layer.weight, layer.bias)]
    pairs = [(at, block, i) for i, (at, block) in enumerate(zip(starts, blocks, strict=True))]
    return [(slice(at, at + p[0].numel()), p, i) for at, p, i in pairs if at is not None and p is not None]


class MlpSweep:
    """The adjoint steps of dit_fast.ops.MlpSweep, same arguments and results, one step and column at a time by autograd."""

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
    ) -> None:
        self.net, self.steps, self.blocks, self.momenta, self.scores = net, steps, blocks, momenta, scores
        self.visits, self.l2, self.hessian = visits, l2, hessian

    def run(self, start: int, stop: int) -> int | None:
        """Steps stop − 1 … start; the step whose scores are not finite, None if all are."""
        s, num_columns = self.steps, len(self.scores)
        for t in reversed(range(start, stop)):
            if self.visits is not None:
                self._visit(t + 1)
                num_columns = int((self.visits.joins > t).sum())
            batch = slice(int(s.offsets[t]), int(s.offsets[t + 1]))
            x, target, a = s.x[s.rows[batch]], s.targets[s.rows[batch]], s.coefficients[batch]
            for k in range(num_columns):
                c = torch.zeros_like(s.theta[t])
                for place, _, i in _places(self.net, self.blocks):
                    c[place] = self._cotangent(i, k, t).flatten()
                dots, hvp = self._pull(s.theta[t], c, x, target, a.to(c.dtype))
                if not torch.isfinite(dots).all():
                    return t
                self.scores[k].index_add_(0, s.ids[batch], a * dots.double(), alpha=-1)
                for place, p, _ in _places(self.net, self.blocks):
                    p[k] += hvp[place].view_as(p[k])
        return None

    def _visit(self, t: int) -> None:
        v = self.visits
        assert v is not None
        for k in range(len(v.joins)):
            for place, p, _ in _places(self.net, self.blocks):
                if v.joins[k] == t:
                    p[k] = v.gradients[v.joining[k], place].view_as(p[k])
                if v.leaves[k] == t > 0:
                    p[k] -= v.gradients[v.leaving[k], place].view_as(p[k])

    def _cotangent(self, i: int, k: int, t: int) -> Tensor:
        """c of one parameter; its u takes the weight decay, its m the rule's."""
        lr, wd, momentum, dampening, nesterov, first = self.steps.settings[t, i].tolist()
        block = self.blocks[i]
        assert block is not None and len(SETTINGS) == 6
        u, r = block[k], -lr * block[k]
        c = r
        if momentum:
            assert self.momenta is not None
            m = self.momenta[i]
            assert m is not None
            buffer = m[k] + (momentum * r if nesterov else r)
            c = (1 if first else 1 - dampening) * buffer + (r if nesterov else 0)
            m[k] = momentum * buffer
        u += wd * c
        return c

    def _pull(self, theta: Tensor, c: Tensor, x: Tensor, target: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        def output(theta: Tensor) -> Tensor:
            return _mlp_output(self.net, theta, x)

        def losses(y: Tensor) -> Tensor:
            return self.net.loss_scale * _LOSSES[self.net.loss](y, target)

        def total(y: Tensor) -> Tensor:
            return (a * losses(y)).sum()

        def regularized(theta: Tensor) -> Tensor:
            return losses(output(theta)) + 0.5 * self.l2 * theta.square().sum()

        def batch_loss(theta: Tensor) -> Tensor:
            return total(output(theta))

        dots: Tensor = jvp(regularized, (theta,), (c,))[1]
        hvp = (0.0 if self.hessian == "none" else self.l2 * a.sum()) * c
        if self.hessian == "exact":
            hvp = hvp + jvp(grad(batch_loss), (theta,), (c,))[1]
        elif self.hessian == "ggn":
            y, tangent = jvp(output, (theta,), (c,))[:2]
            curved = jvp(grad(total), (y,), (tangent,))[1]
            hvp = hvp + vjp(output, theta)[1](curved)[0]
        return dots, hvp


def max_pool(x: Tensor, window: PoolWindow, slope: float = 1.0) -> tuple[Tensor, Tensor]:
    """Largest numbers of windows as f gives them, and their places in the windows; arguments: dit_fast.pooling.max_pool."""
    pool: Callable[..., tuple[Tensor, Tensor]] = F.max_pool1d if x.ndim == 3 else F.max_pool2d
    y, flat = pool(x, *map(list, window[:4]), ceil_mode=window.ceil_mode, return_indices=True)
    place = torch.zeros_like(flat)
    corners = _corners(window, flat)
    along = [flat // x.shape[3], flat % x.shape[3]] if x.ndim == 4 else [flat]
    for at, corner, kernel, dilation in zip(along, corners, window.kernel, window.dilation, strict=True):
        place = place * kernel + (at - corner) // dilation
    area = torch.Size(window.kernel).numel()
    return torch.where(y > 0, y, slope * y), place.to(torch.uint8 if area <= BYTE_PLACES else torch.int32)


def pool_tangent(window: PoolWindow, places: Tensor, tangent: Tensor, y: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """to[b,k,c,o] = f' from[b,k,c,w(b,c,o)]; arguments: dit_fast.pooling.pool_tangent."""
    flat = _flat_places(window, places, tangent.shape[3:])[:, None].expand(-1, tangent.shape[1], -1, -1)
    to = tangent.flatten(3).gather(3, flat).unflatten(3, places.shape[2:])
    return to if y is None else to * _pool_factor(y, slope)


def pool_transposed(
    window: PoolWindow, places: Tensor, delta: Tensor, spatial: Sequence[int], y: Tensor | None = None, slope: float = 1.0
) -> Tensor:
    """to[b,k,c,w(b,c,o)] += f' from[b,k,c,o]; arguments: dit_fast.pooling.pool_transposed."""
    flat = _flat_places(window, places, spatial)[:, None].expand(-1, delta.shape[1], -1, -1)
    delta = delta if y is None else delta * _pool_factor(y, slope)
    to = delta.new_zeros(*delta.shape[:3], torch.Size(spatial).numel())
    return to.scatter_add_(3, flat, delta.flatten(3)).unflatten(3, spatial)


def activation_values(activation: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ(x), φ′(x), φ″(x); arguments: dit_fast.dual_rows.activation_values."""

    def slope(x: Tensor) -> Tensor:
        first: Tensor = grad(lambda x: _ACTIVATIONS[activation](x, 0.0).sum())(x)
        return first

    return _ACTIVATIONS[activation](x, 0.0), slope(x), jvp(slope, (x,), (torch.ones_like(x),))[1]


def activation_columns(
    gate: Tensor,
    value: Tensor,
    curve: Tensor | None = None,
    tangent: Tensor | None = None,
    *,
    slope: float | None = None,
    in_place: bool = False,
) -> Tensor:
    """φ′ value + curve tangent; arguments: dit_fast.dual_rows.activation_columns."""
    factor = (gate if slope is None else _pool_factor(gate, slope).squeeze(1)).unsqueeze(1)
    to = value.mul_(factor) if in_place else value * factor
    return to if curve is None or tangent is None else to.addcmul_(curve.unsqueeze(1), tangent)


def loss_columns(loss: str, scale: float, probabilities: Tensor | None, coefficients: Tensor, tangent: Tensor) -> Tensor:
    """a_b scale ∂²ℓ_b/∂y² ẏ; arguments: dit_fast.dual_rows.loss_columns."""
    weights = (scale * coefficients.double()).to(tangent.dtype)[:, None, None]
    if probabilities is None:
        return 2 * weights * tangent
    p = probabilities[:, None]
    if loss == "cross_entropy":
        return weights * p * (tangent - (p * tangent).sum(2, keepdim=True))
    return weights * p * (1 - p) * tangent


def _pool_factor(y: Tensor, slope: float) -> Tensor:
    return torch.full_like(y, slope).masked_fill_(y > 0, 1)[:, None]


def _corners(window: PoolWindow, places: Tensor) -> list[Tensor]:
    """Of every window the place of its first number in each spatial dimension, shaped to broadcast with `places`."""
    found = []
    for i, n in enumerate(places.shape[2:]):
        start = torch.arange(n, device=places.device) * window.stride[i] - window.padding[i]
        found.append(start.view(-1, *[1] * (places.ndim - 3 - i)))
    return found


def _flat_places(window: PoolWindow, places: Tensor, spatial: Sequence[int]) -> Tensor:
    """Where the numbers lie in the flattened spatial dimensions, [B, C, outputs]."""
    within, flat = places.long(), torch.zeros_like(places, dtype=torch.int64)
    numbers = [within // window.kernel[-1], within % window.kernel[-1]] if len(spatial) == 2 else [within]
    for corner, number, dilation, n in zip(_corners(window, places), numbers, window.dilation, spatial, strict=True):
        flat = flat * n + corner + number * dilation
    return flat.flatten(2)
