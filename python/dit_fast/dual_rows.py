"""Activations and losses in dual numbers, K tangents at once, compiled (csrc/dual_rows.h), on the CPU and on CUDA.

Values are [B, ...], tangents and cotangents [B, K, ...], float32 or float64.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast import ops
from dit_fast.mlp import ACTIVATIONS, LOSSES

# activations that have a curvature, of those in csrc/activation.h
SMOOTH = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh")


def is_compiled(device: torch.device) -> bool:
    """Whether the functions below run on such a device; dit_fast.ops_torch has their twins for the others."""
    return device.type == "cpu" or (device.type == "cuda" and ops.cuda_compiled())


def activation_values(activation: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, first, second): φ(x), φ′(x) and φ″(x), in the shape of x.

    Args:
        activation: one of SMOOTH; gelu is x Φ(x), gelu_tanh its approximation by tanh.
        x: of any shape; what is neither contiguous nor channels last is copied.

    Raises:
        TypeError: x is neither float32 nor float64.
        ValueError: another activation.
    """
    if activation not in SMOOTH:
        raise ValueError(f"activation must be one of {', '.join(SMOOTH)}, got {activation}")
    _check_dtype("x", x)
    # elementwise: any order of the numbers will do, as long as it is the same
    order = torch.channels_last if _is_last(x) else torch.contiguous_format
    x = x.contiguous(memory_format=order)
    parts = [part.contiguous(memory_format=order) for part in _parts(activation, x)]
    y, first, second = (torch.empty_like(x) for _ in range(3))
    operands = [x, parts[0], parts[-1], y, first, second]
    _launch("activation_values", x, x.numel(), ACTIVATIONS.index(activation), [v.data_ptr() for v in operands])
    return y, first, second


def activation_columns(
    gate: Tensor,
    value: Tensor,
    curve: Tensor | None = None,
    tangent: Tensor | None = None,
    *,
    slope: float | None = None,
    in_place: bool = False,
) -> Tensor:
    """φ′ value + curve tangent for K columns, [B, K, ...]: tangents behind an activation, cotangents in front of it.

    Args:
        gate: φ′(x) [B, ...]; with `slope` x itself, and φ′ is 1 where x > 0, slope elsewhere.
        value: [B, K, ...].
        curve, tangent: [B, ...] and [B, K, ...], for cotangents φ″(x) δ and ẋ; both or neither, not with `slope`.
        in_place: `value` may be overwritten; the result is `value` where its layout allows.

    The result has the layout of `value`: contiguous, or with channels last where `value` and `gate` have them so.

    Raises TypeError or ValueError for operands that do not belong together.
    """
    others = {"gate": gate}
    if curve is not None:
        others["curve"] = curve
    if tangent is not None:
        others["tangent"] = tangent
    _check_columns(value, others, slope)
    gate, value, curve, tangent, sizes = _arrange(gate, value, curve, tangent)
    to = value if in_place else torch.empty_like(value)
    addresses = (gate.data_ptr(), _address(curve), _address(tangent), value.data_ptr(), to.data_ptr())
    _launch("activation_columns", value, sizes, slope is not None, float(slope or 0), addresses)
    return to


def loss_columns(loss: str, scale: float, probabilities: Tensor | None, coefficients: Tensor, tangent: Tensor) -> Tensor:
    """The loss's Hessian on K tangents of its output, a_b scale ∂²ℓ_b/∂y² ẏ, [B, K, O]; losses: csrc/loss.h.

    Args:
        loss: "cross_entropy", "bce_logits" or "squared_error".
        scale: of the loss.
        probabilities: p [B, O], softmax or sigmoid of the output; None for squared_error.
        coefficients: a [B], of any floating dtype.
        tangent: ẏ [B, K, O]; what is not contiguous is copied.

    Raises TypeError or ValueError for operands that do not belong together.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss}")
    _check_dtype("tangents", tangent)
    if tangent.ndim != 3:
        raise ValueError(f"tangents must be [B, K, O], got {list(tangent.shape)}")
    B, K, O = tangent.shape
    if coefficients.shape != (B,):
        raise ValueError(f"coefficients must be [{B}], got {list(coefficients.shape)}")
    if (probabilities is None) != (loss == "squared_error"):
        raise ValueError("probabilities belong to cross_entropy and bce_logits, which need them")
    if probabilities is not None and (probabilities.shape != (B, O) or probabilities.dtype != tangent.dtype):
        raise ValueError(f"probabilities must be [{B}, {O}] {tangent.dtype}")
    given = [coefficients.double().contiguous(), None if probabilities is None else probabilities.contiguous()]
    _check_devices(given, tangent)
    tangent = tangent.contiguous()
    to = torch.empty_like(tangent)
    addresses = [_address(v) for v in (*given, tangent, to)]
    _launch("loss_columns", tangent, (B, K, O), LOSSES.index(loss), float(scale), addresses)
    return to


def _parts(activation: str, x: Tensor) -> list[Tensor]:
    """What of φ takes a function of libm, by torch's vectorised ones: csrc/activation.h."""
    if activation == "tanh":
        return [x.tanh()]
    if activation == "gelu":
        return [F.gelu(x), x.square().mul_(-0.5).exp_()]
    if activation == "gelu_tanh":
        return [x.square().mul_(0.044715).add_(1).mul_(x).mul_((2 / torch.pi) ** 0.5).tanh_()]
    return [x.sigmoid()]


def _arrange(
    gate: Tensor, value: Tensor, curve: Tensor | None, tangent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, int, int]]:
    """All in one order of rows [R, K, n], copied where they are not; with R, K and n."""
    B, K = value.shape[:2]
    n, order = gate.numel() // max(B, 1), torch.contiguous_format
    if not value.is_contiguous():
        if value.ndim == 5 and _is_last(gate) and value.permute(0, 1, 3, 4, 2).is_contiguous():
            order = torch.channels_last
        elif value.ndim == 5 and _is_last(gate) and value.permute(0, 3, 4, 1, 2).is_contiguous():
            # columns stacked as channels
            order, B, n = torch.channels_last, B * gate.shape[2] * gate.shape[3], gate.shape[1]
        else:
            value = value.contiguous()
    gate, curve = gate.contiguous(memory_format=order), None if curve is None else curve.contiguous(memory_format=order)
    if tangent is not None and tangent.stride() != value.stride():
        tangent = torch.empty_like(value).copy_(tangent)
    return gate, value, curve, tangent, (B, K, n)


def _is_last(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _check_columns(value: Tensor, others: dict[str, Tensor], slope: float | None) -> None:
    _check_dtype("value", value)
    if value.ndim < 2:
        raise ValueError(f"value must be [B, K, ...], got {list(value.shape)}")
    if len(others) == 2 or (slope is not None and len(others) > 1):
        raise ValueError("curve and tangent come together, and not with a slope")
    shape, dtype = value.shape, value.dtype
    shared = shape[:1] + shape[2:]
    for name, other in others.items():
        expected = shape if name == "tangent" else shared
        if other.shape != expected or other.dtype != dtype:
            raise ValueError(f"{name} must be {list(expected)} {dtype}, got {list(other.shape)} {other.dtype}")
    _check_devices(others.values(), value)


def _check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def _check_devices(operands: Iterable[Tensor | None], value: Tensor) -> None:
    device = value.device
    for operand in operands:
        if operand is not None and operand.device != device:
            raise ValueError(f"all tensors must be on {device}, as the tangents are")


def _launch(op: str, value: Tensor, *arguments: Any) -> None:
    device = value.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"dual numbers are compiled for the CPU and CUDA, not for {device}")
    threads = (torch.get_num_threads(),) if device.type == "cpu" else ()
    ops.core(op, device)(value.dtype == torch.float64, *arguments, *threads)
