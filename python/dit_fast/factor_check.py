"""Whether factors are those of the gradient the optimizer sees: Σ_b a_b Σ_r s_br J_br + l2 Σ_b a_b θ against p.grad."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dit_fast.errors import LogError
from dit_fast.layer_factors import Raw, weighted_sum
from dit_fast.optimizers import Clip

# in units of the dtype's rounding, of the sum of absolute values; with TF32 on, the gradient itself is no better
_ROUNDINGS = 128
_TF32 = 5e-3


class GradientCheck:
    """Adds up one step's micro-batches, then compares."""

    def __init__(self, params: Mapping[str, Tensor], l2: float, clip: Clip, uses_tf32: bool) -> None:
        self._params, self._l2, self._clip, self._uses_tf32 = params, l2, clip, uses_tf32
        self._shapes = {name: p.shape for name, p in params.items()}
        self._sums = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}

    def add(self, parts: Sequence[Sequence[Raw]], coefficients: Tensor, slopes: Tensor | None) -> None:
        """One micro-batch; slopes None = 1 for the first row and 0 for others."""
        for part in (part for own in parts for part in own):
            rows = part.rows if hasattr(part, "rows") else part.deltas
            weights = torch.zeros(rows.shape[:2], dtype=rows.dtype, device=rows.device)
            weights[:] = coefficients.to(rows)[:, None] if slopes is None else coefficients.to(rows)[:, None] * slopes
            if slopes is None:
                weights[:, 1:] = 0
            for name, values in weighted_sum(part, weights, self._shapes).items():
                for total, value in zip(self._sums[name], values, strict=True):
                    total += value.reshape(total.shape)
        share = self._l2 * float(coefficients.sum())
        for name, p in self._params.items() if share else ():
            self._sums[name][0].add_(p.detach(), alpha=share)
            self._sums[name][1].add_(p.detach().abs(), alpha=abs(share))

    def compare(self, gradients: Mapping[str, Tensor | None]) -> None:
        """LogError naming a parameter whose gradient is something else."""
        found = {name: torch.zeros_like(self._params[name]) if g is None else g for name, g in gradients.items()}
        factor = self._clipping(found) if self._clip.norm is not None else None
        figures = torch.stack([self._figures(name, found[name], factor) for name in found]).cpu()
        for name, (difference, noise, size) in zip(found, figures.tolist(), strict=True):
            if not difference <= noise:
                share = f"{difference / size:.2g} of it" if size else "it is 0"
                raise LogError(
                    f"factors: the gradient of '{name}' is not the sum over its samples (off by {share}): is its layer used "
                    "otherwise too, or across the batch? is the loss's l2 given in FactorOptions(l2=...)? was the gradient "
                    "changed in between (clipping: clip_norm, clip_value), or not zeroed?"
                )

    def _figures(self, name: str, gradient: Tensor, factor: Tensor | None) -> Tensor:
        """(the difference's norm, the most that rounding explains, the gradient's norm)."""
        total, absolute = self._sums[name]
        if self._clip.value is not None:
            total = total.clamp(-self._clip.value, self._clip.value)
        scale = 1.0 if factor is None else factor
        is_rough = self._uses_tf32 and gradient.device.type == "cuda" and gradient.dtype == torch.float32
        noise = (absolute * scale).norm() * (_TF32 if is_rough else _ROUNDINGS * torch.finfo(gradient.dtype).eps)
        return torch.stack([(total * scale - gradient).norm().double(), noise.double(), gradient.norm().double()])

    def _clipping(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The one factor, at most 1, that takes our sums nearest to the gradient."""
        pairs = [(self._sums[name][0].double(), g.double()) for name, g in gradients.items()]
        inner, square = (sum((a * b).sum() for a, b in values) for values in (pairs, [(a, a) for a, _ in pairs]))
        assert isinstance(inner, Tensor) and isinstance(square, Tensor)
        return (inner / square.clamp_min(1e-300)).clamp(0, 1)
