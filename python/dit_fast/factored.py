"""Per-sample gradients in factors: what a log may hold instead of a model, and what the low-rank kernels take.

Sample b has R rows J_br, each of the size of the parameters; with slopes s and curvature M

    ∇ℓ_b = Σ_r s[b,r] J_br                      H = Σ_b a_b Σ_{r,q} M[b,r,q] J_br J_bqᵀ

    empirical Fisher            R = 1           J_b = ∇ℓ_b, s = 1, M = 1
    Gauss–Newton                R = outputs C   J_br = ∇z_br, s = ∂ℓ/∂z, M = ∂²ℓ/∂z∂z
    Gauss–Newton, one sampled   R = 2           J_b0 = ∇ℓ_b, J_b1 = the gradient for a label drawn from the model; s = (1, 0),
                                                M = diag(0, 1)

The l2 part of a loss is in none of them. A row is never divided by a slope, which may be 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """A linear layer's rows, or an unfolded convolution's: J_br = Σ_s deltas[b,r,s] ⊗ inputs[b,s], bias Σ_s deltas[b,r,s].

    inputs [B, S, I], deltas [B, R, S, O]. The weight is taken as a matrix [O, I], whatever its own shape.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class Lookup:
    """An embedding's rows: J_br = Σ_s e(indices[b,s]) ⊗ deltas[b,r,s]. indices int64 [B, S], deltas [B, R, S, O]."""

    weight: str
    indices: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class Plain:
    """Any other parameter's rows as they are: rows [B, R, *shape]."""

    name: str
    rows: Tensor


Part = Outer | Lookup | Plain


@dataclass(frozen=True)
class Factors:
    """One micro-batch: ids int64 [B], coefficients a float64 [B], slopes s [B, R], curvature M [B, R, R], and for every
    parameter covered exactly one part."""

    step: int
    ids: Tensor
    coefficients: Tensor
    slopes: Tensor
    curvature: Tensor
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """What is the same in all steps of a log with factors.

    shapes: parameter → shape of its block of U, [O, I] or [O] in the projected space where it is projected, else its own.
    curvature: "fisher", "ggn" or "sampled ggn", what M in the log is. l2: that of the run's losses.
    projections: parameter → what takes a gradient of that parameter [Q, *own shape] to [Q, *shapes[name]]; none where
    nothing is projected. dtype: in which factors are stored.
    """

    shapes: Mapping[str, torch.Size]
    curvature: str
    l2: float
    projections: Mapping[str, "Projection"]
    dtype: torch.dtype


@dataclass(frozen=True)
class Projection:
    """A seeded random map of one parameter's gradients with E[PᵀP] = I, so that inner products keep their mean: of a matrix
    [O, I] (whatever is behind the first dimension taken together) outputs [o, O] and inputs [i, I] of a Kronecker product,
    of a vector outputs [p, size] alone, for a bias those of its weight; None = that side as it is.
    """

    outputs: Tensor | None
    inputs: Tensor | None

    def __call__(self, gradient: Tensor) -> Tensor:
        """[Q, *own shape] → [Q, *projected shape]."""
        if gradient.ndim <= 2:
            return gradient if self.outputs is None else gradient @ self.outputs.to(gradient).T
        matrix = gradient.flatten(2)
        if self.inputs is not None:
            matrix = matrix @ self.inputs.to(gradient).T
        return matrix if self.outputs is None else torch.einsum("po,qoi->qpi", self.outputs.to(matrix), matrix)
