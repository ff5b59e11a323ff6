"""The loss by the model's outputs: slopes ∂ℓ/∂z and curvature ∂²ℓ/∂z∂z per sample, and labels drawn from the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UnsupportedError


def slopes_and_curvature(
    per_sample_loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any, with_curvature: bool = True
) -> tuple[Tensor, Tensor]:
    """∂ℓ/∂z [B, C] and ∂²ℓ/∂z∂z [B, C, C] of an output [B, …] taken as [B, C]; ValueError for a loss that is not [B]."""
    size = len(output)
    with torch.enable_grad():
        z = output.detach().reshape(size, -1).requires_grad_()
        losses = per_sample_loss(z.reshape(output.shape), target)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (size,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"factors: per_sample_loss must return one loss per sample, [{size}], got {shape}")
        (slopes,) = torch.autograd.grad(losses.sum(), z, create_graph=with_curvature)
        curvature = z.new_zeros(size, z.shape[1], z.shape[1])
        if with_curvature and slopes.requires_grad:
            for c in range(z.shape[1]):
                (row,) = torch.autograd.grad(slopes[:, c].sum(), z, retain_graph=True, allow_unused=True)
                if row is not None:
                    curvature[:, c] = row
    return slopes.detach(), curvature.detach()


def sampled_slopes(output: Tensor, generator: torch.Generator) -> Tensor:
    """∂/∂z of −log p(y|z) in the output's shape, y drawn from the model: softmax of [B, C], sigmoid of [B, 1] and [B]."""
    z = output.detach()
    uniform = torch.rand(z.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    if z.ndim == 2 and z.shape[1] > 1:
        noise = -torch.log(-torch.log(uniform))
        drawn = torch.argmax(z + noise.to(z), dim=1)
        return torch.softmax(z, 1) - torch.nn.functional.one_hot(drawn, z.shape[1]).to(z)
    if z.ndim == 1 or (z.ndim == 2 and z.shape[1] == 1):
        probability = torch.sigmoid(z)
        return probability - (uniform.to(z) < probability).to(z)
    raise UnsupportedError(f"factors: labels are drawn for outputs [B, C], [B, 1] or [B]; the model's is {list(z.shape)}")


def check_is_likelihood(output: Tensor, curvature: Tensor) -> None:
    """UnsupportedError where the loss's curvature [B, C, C] is not that of the distribution labels are drawn from."""
    z = output.detach().reshape(len(output), -1)
    if z.shape[1] > 1:
        p = torch.softmax(z, 1)
        expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    else:
        p = torch.sigmoid(z)
        expected = (p * (1 - p))[:, :, None]
    if not torch.allclose(curvature, expected, rtol=1e-3, atol=1e-6):
        raise UnsupportedError(
            'factors: curvature="sampled ggn" is for cross entropy of [B, C] and binary cross entropy with logits of [B, 1] or '
            '[B], unweighted; per_sample_loss is neither: use "ggn"'
        )
