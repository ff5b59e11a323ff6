"""The curvature of per-sample losses that are ours (csrc/loss.h), for K tangents of the output at once."""

from typing import Any

import torch
from torch import Tensor

from dit_fast import dual_rows, ops_torch

# the loss's gradient must be ours to so many units of rounding
ROUNDING = 64


class KnownLoss:
    """∇²ℓ_b of some samples' losses at their outputs: of `scale` times "cross_entropy", "bce_logits" or "squared_error"."""

    def __init__(self, loss: str, scale: float, probabilities: Tensor | None) -> None:
        self.loss, self.scale, self.probabilities = loss, scale, probabilities

    @classmethod
    def at(cls, known: tuple[str, float], output: Tensor, target: Any, slope: Tensor) -> "KnownLoss | None":
        """The curvature at `output` [B, ...]; None where the loss is another one for these targets.

        known: (loss, scale). slope: ∂ℓ_b/∂z_b as the user's loss has it, which must be what ours has.
        """
        (loss, scale), z = known, output.detach()
        if not isinstance(target, Tensor) or target.numel() != (len(z) if loss == "cross_entropy" else z.numel()):
            return None
        if loss == "cross_entropy":
            # a class outside 0 … O − 1, which the loss may leave out, is found nowhere
            p, own = z.softmax(1), target.view(-1, 1) == torch.arange(z.shape[1], device=z.device)
        elif loss == "bce_logits":
            p, own = z.sigmoid(), target.reshape(z.shape)
        else:
            p, own = 2 * z, 2 * target.reshape(z.shape)
        error = (scale * (p - own.to(z.dtype)) - slope).abs().max()
        size = torch.maximum(slope.abs().max(), p.abs().max() * abs(scale))
        if not bool(error <= ROUNDING * torch.finfo(z.dtype).eps * size):
            return None
        return cls(loss, scale, None if loss == "squared_error" else p.flatten(1))

    def curved(self, tangent: Tensor, coefficients: Tensor) -> Tensor:
        """a_b ∇²ℓ_b ż_b [B, K, ...]; coefficients: a [B]."""
        ops: Any = dual_rows if dual_rows.is_compiled(tangent.device) else ops_torch
        curved: Tensor = ops.loss_columns(self.loss, self.scale, self.probabilities, coefficients, tangent.flatten(2))
        return curved.view_as(tangent)
