"""Dual numbers through single operations of a net: primal, backward, and both of their tangents, K columns at once.

Every operation is made for one set of samples and keeps what its later passes need. Shapes: values and δ [B, ...],
tangents and δ̇ [B, K, ...]. With the sample outermost a shared weight sees [B·K, ...], and a product of a shared value
with K parameter tangents has them stacked as K·O (or K·I) channels, both without a copy.

    y = primal                      from the inputs and parameters, in the constructor
    backward(δ)                     → δ of each input; δ is kept for `tangent_backward`
    gradients(δ)                    → the gradient of each parameter
    tangent(ẋ, C)                   → ẏ; ẋ of each input, None for 0; C of each parameter [K, *shape], None if not trained
    tangent_backward(δ̇, C, wanted)  → δ̇ of each input where wanted, and the tangent of each parameter's gradient

Without a `backward` before it δ counts as 0, which leaves the Gauss–Newton part of `tangent_backward`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast import dual_rows, ops_torch, pooling
from dit_fast.pooling import PoolWindow

Maybe = Tensor | None
Call = Callable[[Tensor], Tensor]


class Dual:
    """An operation without parameters on one input; also what a new one inherits.

    owns: whether `tangent_backward` may overwrite the δ̇ it is given.
    """

    y: Tensor
    delta: Maybe = None
    owns: bool = False

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        raise NotImplementedError

    def gradients(self, delta: Tensor) -> list[Maybe]:
        return []

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        raise NotImplementedError

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        raise NotImplementedError


class Window(NamedTuple):
    """How a convolution moves over its input, one number per spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Conv(Dual):
    """y = conv(x, W) + b, in one or two spatial dimensions."""

    def __init__(self, window: Window, x: Tensor, weight: Tensor, bias: Maybe) -> None:
        self.window, self.x, self.weight, self.bias = window, x, weight, bias
        self.y = self._apply(x, weight, bias)
        self.dx: Maybe = None

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        self.delta = delta
        return [self._to_input(delta, self.x.shape, self.weight) if wanted[0] else None]

    def gradients(self, delta: Tensor) -> list[Maybe]:
        return [self._to_weight(delta, self.x, self.weight.shape), _to_bias(delta) if self.bias is not None else None]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (self.dx,), (weight, bias) = dxs, block
        y = None
        if weight is not None:
            # conv(x, C_k): the columns as stacked output channels, group by group
            K, O, G = *weight.shape[:2], self.window.groups
            stacked = weight.unflatten(1, (G, O // G)).transpose(0, 1).flatten(0, 2)
            shift = None if bias is None else bias.unflatten(1, (G, O // G)).transpose(0, 1).flatten()
            y, bias = _from_groups(self._apply(self.x, stacked, shift), G, K), None
        if self.dx is not None:
            shared = self._apply(self.dx.flatten(0, 1), self.weight).unflatten(0, self.dx.shape[:2])
            y = shared if y is None else y.add_(shared)
        return _add_bias(y, bias, self.y)

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        (weight, bias), (B, K), G = block, delta.shape[:2], self.window.groups
        O, I, *kernel = self.weight.shape
        dx = None
        if wanted[0]:
            shape = torch.Size((B * K, *self.x.shape[1:]))
            dx = self._to_input(delta.flatten(0, 1), shape, self.weight).unflatten(0, (B, K))
            if weight is not None and self.delta is not None:
                # [K, G·O, I] as G·O filters of K·I channels
                stacked = weight.transpose(0, 1).flatten(1, 2)
                shape = torch.Size((B, K * G * I, *self.x.shape[2:]))
                dx.add_(_from_groups(self._to_input(self.delta, shape, stacked), G, K))
        product = None
        if weight is not None:
            shape = torch.Size((K * O, I, *kernel))
            product = self._to_weight(_to_groups(delta, G), self.x, shape)
            product = product.unflatten(0, (G, K, O // G)).transpose(0, 1).flatten(1, 2)
            if self.dx is not None and self.delta is not None:
                shape = torch.Size((O, K * I, *kernel))
                other = self._to_weight(self.delta, _to_groups(self.dx, G), shape)
                product = product + other.unflatten(1, (K, I)).transpose(0, 1)
        self.dx = None
        return [dx], [product, None if bias is None else delta.flatten(3).sum((0, 3))]

    def _apply(self, x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
        return (F.conv1d if x.ndim == 3 else F.conv2d)(x, weight, bias, *self.window)

    def _to_input(self, delta: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        # of the input only the shape counts; one that is not contiguous would be copied
        return self._transposed(delta, delta.new_empty(shape), weight, (True, False, False))[0]

    def _to_weight(self, delta: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return self._transposed(delta, x, delta.new_empty(shape), (False, True, False))[1]

    def _transposed(self, delta: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
        stride, padding, dilation, groups = self.window
        none = [0] * len(stride)
        return torch.ops.aten.convolution_backward(delta, x, weight, None, stride, padding, dilation, False, none, groups, mask)


class Linear(Dual):
    """y = x Wᵀ + b over the last dimension of [B, ..., I]."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Maybe) -> None:
        self.weight, self.bias = weight, bias
        self.y = F.linear(x, weight, bias)
        self.x = x.reshape(len(x), -1, x.shape[-1])
        self.dx: Maybe = None

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        self.delta = delta.reshape(len(delta), -1, delta.shape[-1])
        return [delta @ self.weight if wanted[0] else None]

    def gradients(self, delta: Tensor) -> list[Maybe]:
        rows = delta.reshape(-1, delta.shape[-1])
        return [rows.T @ self.x.flatten(0, 1), rows.sum(0) if self.bias is not None else None]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,), (weight, bias), (B, S, _) = dxs, block, self.x.shape
        self.dx = None if dx is None else dx.reshape(B, len(dx[0]), S, -1)
        y = None if self.dx is None else self.dx @ self.weight.T
        if weight is not None:
            own = (self.x.flatten(0, 1) @ weight.flatten(0, 1).T).view(B, S, *weight.shape[:2]).transpose(1, 2)
            y = own if y is None else y.add_(own)
        if y is not None:
            y = y.reshape(B, y.shape[1], *self.y.shape[1:])
        return None if bias is None and y is None else _add(y, None if bias is None else _spread(bias, self.y, last=True))

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        (weight, bias), (B, K), S = block, delta.shape[:2], self.x.shape[1]
        shape = delta.shape
        delta = delta.reshape(B, K, S, -1)
        dx = product = None
        if wanted[0]:
            dx = delta @ self.weight
            if weight is not None and self.delta is not None:
                stacked = self.delta.flatten(0, 1) @ weight.transpose(0, 1).flatten(1)
                dx += stacked.view(B, S, K, -1).transpose(1, 2)
            dx = dx.reshape(*shape[:-1], -1)
        if weight is not None:
            rows = delta.transpose(1, 2).reshape(B * S, -1)
            product = (rows.T @ self.x.flatten(0, 1)).view_as(weight)
            if self.dx is not None and self.delta is not None:
                columns = self.dx.transpose(1, 2).reshape(B * S, -1)
                other = self.delta.flatten(0, 1).T @ columns
                product += other.view(len(other), K, -1).transpose(0, 1)
        self.dx = None
        return [dx], [product, None if bias is None else delta.sum((0, 2))]


class Activation(Dual):
    """y = f(x), elementwise; f′ and f″ once for all columns, compiled where `name` says which f it is, else by autograd."""

    def __init__(self, name: str | None, f: Call, x: Tensor) -> None:
        self.ops = _dual_rows(x)
        values: tuple[Tensor, Tensor, Maybe] = self.ops.activation_values(name, x) if name else _derivatives(f, x)
        self.y, self.first, self.second = values
        self.dx: Maybe = None

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        # here f″ δ is what is kept
        self.delta = None if self.second is None else self.second * delta
        return [self.first * delta]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        if dx is None:
            return None
        self.dx = None if self.delta is None else dx
        # torch's product is as fast as a compiled one
        return self.first[:, None] * dx

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        # δ̇_x = f′ δ̇ + f″ δ ẋ
        curve = None if self.dx is None else self.delta
        dx = self.ops.activation_columns(self.first, delta, curve, None if curve is None else self.dx, in_place=self.owns)
        self.dx = None
        return [dx], []


class PiecewiseLinear(Dual):
    """y = x where x > 0, slope·x elsewhere."""

    def __init__(self, slope: float, x: Tensor) -> None:
        self.ops, self.slope, self.x = _dual_rows(x), slope, x
        self.y = x.relu() if slope == 0 else F.leaky_relu(x, slope)

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        return [self._gated(delta[:, None])[:, 0]]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        return None if dx is None else self._gated(dx)

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        return [self._gated(delta, self.owns)], []

    def _gated(self, columns: Tensor, in_place: bool = False) -> Tensor:
        gated: Tensor = self.ops.activation_columns(self.x, columns, slope=self.slope, in_place=in_place)
        return gated


class MaxPool(Dual):
    """y = the largest number of each window of x, behind it an activation x > 0 ? x : slope·x, slope ≥ 0; 1 for none.

    With f: the largest of f(x), but y is x itself at those places, so that f can follow on fewer numbers; slope is 1.
    """

    def __init__(self, window: PoolWindow, slope: float, f: Call | None, x: Tensor) -> None:
        self.window, self.slope, self.spatial = window, slope, x.shape[2:]
        self.ops: Any = pooling if pooling.is_compiled(x.device) else ops_torch
        self.y, self.places = self.ops.max_pool(x if f is None else f(x.clone()), window, slope)
        if f is not None:
            self.y = self._tangent(x[:, None])[:, 0]

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        return [self._transposed(delta[:, None])[:, 0]]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        return None if dx is None else self._tangent(dx)

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        return [self._transposed(delta)], []

    def _tangent(self, dx: Tensor) -> Tensor:
        return self.ops.pool_tangent(self.window, self.places, dx, *self._activation())

    def _transposed(self, delta: Tensor) -> Tensor:
        return self.ops.pool_transposed(self.window, self.places, delta, self.spatial, *self._activation())

    def _activation(self) -> tuple[Maybe, float]:
        return (None if self.slope == 1 else self.y), self.slope


class LinearMap(Dual):
    """y = f(x), linear in x and without parameters (average pooling, means): its own derivative."""

    def __init__(self, f: Call, x: Tensor) -> None:
        self.f, self.shape = f, x.shape
        self.y = f(x)
        self.graph: tuple[Tensor, Tensor] | None = None

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        return [self._transposed(delta)]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        return None if dx is None else self.f(dx.flatten(0, 1)).unflatten(0, dx.shape[:2])

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        return [self._transposed(delta.flatten(0, 1)).unflatten(0, delta.shape[:2])], []

    def _transposed(self, delta: Tensor) -> Tensor:
        with torch.enable_grad():
            x = delta.new_zeros(len(delta), *self.shape[1:]).requires_grad_()
            return torch.autograd.grad(self.f(x), x, delta)[0]


class Reshape(Dual):
    """The same numbers of each sample in another shape."""

    def __init__(self, x: Tensor, shape: Sequence[int]) -> None:
        self.before, self.after = x.shape[1:], tuple(shape)
        self.y = x.reshape(len(x), *shape)

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        return [delta.reshape(len(delta), *self.before)]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        return None if dx is None else dx.reshape(*dx.shape[:2], *self.after)

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        return [delta.reshape(*delta.shape[:2], *self.before)], []


class Sum(Dual):
    """y = x₁ + x₂, of one shape."""

    def __init__(self, x: Tensor, other: Tensor) -> None:
        self.y = x + other

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        return [delta, delta]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        x, other = dxs
        return _add(x, other, in_place=False)

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        return [delta, delta], []


class Norm(Dual):
    """y = γ n + β, n = (x − μ)/σ over groups of m neighbouring numbers of a sample; with given μ, σ (BatchNorm) affine.

    rows: the groups of a sample, 0 where the statistics are given as `fixed` = (μ, 1/σ), shaped to broadcast with x.
    affine: the shape in which γ and β broadcast with a sample of x.
    """

    def __init__(
        self,
        x: Tensor,
        rows: int,
        eps: float,
        fixed: tuple[Tensor, Tensor] | None,
        affine: Sequence[int],
        gamma: Maybe,
        beta: Maybe,
    ) -> None:
        self.shape, self.rows, self.affine = x.shape, rows, tuple(affine)
        self.has_beta, self.parameter_shape = beta is not None, None if gamma is None else gamma.shape
        if fixed is None:
            groups = x.reshape(len(x), rows, -1)
            centred = groups - groups.mean(-1, keepdim=True)
            self.scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
            self.n = centred * self.scale
        else:
            self.scale = fixed[1]
            self.n = (x - fixed[0]) * self.scale
        self.fixed = fixed is not None
        self.gamma = torch.ones((), dtype=x.dtype, device=x.device) if gamma is None else gamma.view(self.affine)
        n = self.n.view(x.shape)
        self.y = self.gamma * n + (0 if beta is None else beta.view(self.affine))
        self.moved: Maybe = None

    def backward(self, delta: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
        self.delta = delta
        return [self._project(self._grouped((self.gamma * delta)[:, None])).view_as(delta) if wanted[0] else None]

    def gradients(self, delta: Tensor) -> list[Maybe]:
        if self.parameter_shape is None:
            return []
        weight, bias = (self._to_parameter((part)[:, None])[0] for part in (delta * self.n.view(self.shape), delta))
        return [weight, bias if self.has_beta else None]

    def tangent(self, dxs: list[Maybe], block: list[Maybe]) -> Maybe:
        (dx,) = dxs
        gamma, beta = block or [None, None]
        self.dx = None if dx is None else self._grouped(dx)
        self.moved = None if self.dx is None else self._project(self.dx)
        y = None if dx is None or self.moved is None else self.gamma * self.moved.view_as(dx)
        if gamma is not None:
            y = _add(y, gamma.view(-1, *self.affine) * self.n.view(self.shape)[:, None])
        if beta is not None:
            y = _add(y, beta.view(1, -1, *self.affine).expand(len(self.n), -1, *self.shape[1:]))
        return y

    def tangent_backward(self, delta: Tensor, block: list[Maybe], wanted: Sequence[bool]) -> tuple[list[Maybe], list[Maybe]]:
        gamma, beta = block or [None, None]
        dx: Maybe = None
        products: list[Maybe] = [None, None] if block else []
        if wanted[0]:
            inner = self.gamma * delta
            if gamma is not None and self.delta is not None:
                inner = inner + gamma.view(-1, *self.affine) * self.delta[:, None]
            dx = self._project(self._grouped(inner))
            if self.delta is not None and self.moved is not None and self.dx is not None and not self.fixed:
                # J = (I − 11ᵀ/m − nnᵀ/m)/σ, and J̇ δ_n with σ̇ = mean(n ẋ)
                own = self._grouped((self.gamma * self.delta)[:, None])
                n, scale = self.n[:, None], self.scale[:, None]
                dx -= scale * (n * self.dx).mean(-1, keepdim=True) * self._project(own)
                dx -= scale * self.moved * (n * own).mean(-1, keepdim=True)
                dx -= scale * n * (self.moved * own).mean(-1, keepdim=True)
            dx = dx.view_as(delta)
        if gamma is not None:
            whole = delta * self.n.view(self.shape)[:, None]
            if self.delta is not None and self.moved is not None:
                whole += self.moved.view_as(delta) * self.delta[:, None]
            products[0] = self._to_parameter(whole)
        if beta is not None:
            products[1] = self._to_parameter(delta)
        self.dx = self.moved = None
        return [dx], products

    def _grouped(self, v: Tensor) -> Tensor:
        return v if self.fixed else v.reshape(*v.shape[:2], self.rows, -1)

    def _project(self, v: Tensor) -> Tensor:
        """J v = (v − mean(v) − n mean(n v))/σ, symmetric; v grouped, [B, K, rows, m]."""
        if self.fixed:
            return v * self.scale
        n = self.n[:, None]
        return self.scale[:, None] * (v - v.mean(-1, keepdim=True) - n * (n * v).mean(-1, keepdim=True))

    def _to_parameter(self, v: Tensor) -> Tensor:
        """Σ over samples and over what a parameter is spread, [K, *shape]."""
        assert self.parameter_shape is not None
        return v.sum(0).sum_to_size(v.shape[1], *self.affine).reshape(v.shape[1], *self.parameter_shape)


def _dual_rows(x: Tensor) -> Any:
    return dual_rows if dual_rows.is_compiled(x.device) else ops_torch


def _derivatives(f: Call, x: Tensor) -> tuple[Tensor, Tensor, Maybe]:
    """f, f′ and f″ at x; None for f″ of a piecewise linear f."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = f(point.clone())  # the clone is what an in-place f may overwrite
        (first,) = torch.autograd.grad(y.sum(), point, create_graph=True)
        second = torch.autograd.grad(first.sum(), point, allow_unused=True)[0] if first.requires_grad else None
    return y.detach(), first.detach(), second


def _to_bias(delta: Tensor) -> Tensor:
    return delta.flatten(2).sum((0, 2))


def _to_groups(v: Tensor, G: int) -> Tensor:
    """[B, K, G·C, ...] → [B, G·K·C, ...], a view where there is one group."""
    return v.unflatten(2, (G, -1)).transpose(1, 2).flatten(1, 3)


def _from_groups(v: Tensor, G: int, K: int) -> Tensor:
    """[B, G·K·C, ...] → [B, K, G·C, ...], a view where there is one group."""
    return v.unflatten(1, (G, K, -1)).transpose(1, 2).flatten(2, 3)


def _add(x: Maybe, other: Maybe, in_place: bool = True) -> Maybe:
    if x is None or other is None:
        return other if x is None else x
    return x.add_(other) if in_place else x + other


def _spread(bias: Tensor, like: Tensor, last: bool = False) -> Tensor:
    """A bias's tangent [K, O] over the output like [B, O, ...] (or [B, ..., O]), as [B, K, ...]."""
    between = like.ndim - 2
    shape = (1, len(bias), *([1] * between), bias.shape[1]) if last else (1, len(bias), bias.shape[1], *([1] * between))
    return bias.view(shape).expand(len(like), -1, *like.shape[1:])


def _add_bias(y: Maybe, bias: Maybe, like: Tensor) -> Maybe:
    return y if bias is None else _add(y, _spread(bias, like))
