"""Maximum pooling and what it does to K tangents at once, compiled (csrc/max_pool.h), on the CPU and on CUDA.

A piecewise linear activation f(x) = x > 0 ? x : slope·x, slope ≥ 0, behind the pooling is part of it; slope 1 is none.
Values are [B, C, W] or [B, C, H, W], tangents [B, K, ...], float32 or float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_fast import ops

# numbers of a window that a byte tells apart
BYTE_PLACES = 255


class PoolWindow(NamedTuple):
    """How a pooling moves over its input, one number per spatial dimension; ceil_mode as in torch."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    ceil_mode: bool = False


def pooled_size(window: PoolWindow, spatial: Sequence[int]) -> list[int]:
    """The spatial dimensions of the output. ValueError for a window that does not fit, or lies in the padding alone."""
    sizes = []
    for n, k, s, p, d in zip(spatial, window.kernel, window.stride, window.padding, window.dilation, strict=True):
        reach = n + 2 * p - d * (k - 1) - 1
        if min(k, s, d) < 1 or p < 0 or reach < 0:
            raise ValueError(f"a window of {k} (stride {s}, padding {p}, dilation {d}) does not fit {n} numbers")
        size = (reach + s - 1 if window.ceil_mode else reach) // s + 1
        # the last window begins within the input or the padding before it
        sizes.append(size - 1 if (size - 1) * s >= n + p else size)
        # the first and the last window may reach over the input with all their numbers where they are dilated
        if any(not any(0 <= o * s - p + j * d < n for j in range(k)) for o in range(sizes[-1])):
            raise ValueError(f"a window of {k} (stride {s}, padding {p}, dilation {d}) lies in the padding of {n} numbers")
    return sizes


def is_compiled(device: torch.device) -> bool:
    """Whether the functions below run on such a device; dit_fast.ops_torch has their twins for the others."""
    return device.type == "cpu" or (device.type == "cuda" and ops.cuda_compiled())


def max_pool(x: Tensor, window: PoolWindow, slope: float = 1.0) -> tuple[Tensor, Tensor]:
    """(y, places): the largest number of each window, as f gives it, and its place in the window.

    Args:
        x: [B, C, *spatial]; what is not contiguous is copied.
        slope: of f for negative numbers, ≥ 0.

    Returns y [B, C, *pooled] and places of the same shape: bytes, or int32 for windows of more than 255 numbers. The first
    of equal numbers counts; a NaN is larger than any number, the last one counts.

    Raises:
        TypeError: x is neither float32 nor float64.
        ValueError: a shape, a window or a slope does not fit.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if slope < 0:
        raise ValueError(f"slope must be 0 or more, got {slope}")
    shape = _shape(window, x.shape[2:])
    x, area = x.contiguous(), shape[2][0] * shape[2][1]
    y = x.new_empty(*x.shape[:2], *_own(shape[1], x.ndim - 2))
    places = y.new_empty(y.shape, dtype=torch.uint8 if area <= BYTE_PLACES else torch.int32)
    operands = (x.data_ptr(), y.data_ptr(), places.data_ptr(), area > BYTE_PLACES)
    _launch("max_pool", x, len(x) * x.shape[1], shape, float(slope), *operands)
    return y, places


def pool_tangent(window: PoolWindow, places: Tensor, tangent: Tensor, y: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """The tangents behind a pooling, [B, K, C, *pooled], from those in front of it, [B, K, C, *spatial].

    places, y: what `max_pool` gave; y and slope are wanted where there is an activation.

    Raises TypeError or ValueError for operands that do not belong together.
    """
    return _columns(window, places, tangent, tangent.shape[3:], y, slope, transposed=False)


def pool_transposed(
    window: PoolWindow, places: Tensor, delta: Tensor, spatial: Sequence[int], y: Tensor | None = None, slope: float = 1.0
) -> Tensor:
    """The cotangents in front of a pooling, [B, K, C, *spatial], from those behind it, [B, K, C, *pooled].

    places, y, slope, errors: as in `pool_tangent`.
    """
    return _columns(window, places, delta, spatial, y, slope, transposed=True)


def _columns(
    window: PoolWindow, places: Tensor, value: Tensor, spatial: Sequence[int], y: Tensor | None, slope: float, transposed: bool
) -> Tensor:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tangents must be float32 or float64, got {value.dtype}")
    shape = _shape(window, spatial)
    own = _own(shape[1], len(spatial))
    (B, C), K = places.shape[:2], value.shape[1]
    expected = (B, K, C, *(own if transposed else spatial))
    area = shape[2][0] * shape[2][1]
    if value.shape != expected or places.shape != (B, C, *own):
        raise ValueError(f"tangents {list(value.shape)} and places {list(places.shape)} do not belong to this pooling")
    if places.dtype != (torch.uint8 if area <= BYTE_PLACES else torch.int32) or not places.is_contiguous():
        raise TypeError("places must be as max_pool gave them")
    if y is not None and (y.shape != places.shape or y.dtype != value.dtype or not y.is_contiguous()):
        raise ValueError("y must be as max_pool gave it")
    if places.device != value.device or (y is not None and y.device != value.device):
        raise ValueError(f"places and y must be on {value.device}, as the tangents are")
    value = value.contiguous()
    to = value.new_empty(B, K, C, *(spatial if transposed else own))
    operands = (0 if y is None else y.data_ptr(), places.data_ptr(), area > BYTE_PLACES, transposed)
    _launch("pool_columns", value, (B, K, C), shape, float(slope), *operands, value.data_ptr(), to.data_ptr())
    return to


def _shape(window: PoolWindow, spatial: Sequence[int]) -> list[tuple[int, int]]:
    """in, out, kernel, stride, padding and dilation of planes; one spatial dimension is their width."""
    if len(spatial) not in (1, 2) or len(window.kernel) != len(spatial):
        raise ValueError(
            f"a pooling over {len(window.kernel)} dimensions does not fit {len(spatial)} spatial ones; 1 or 2 are taken"
        )
    pairs = [
        (spatial, 1),
        (pooled_size(window, spatial), 1),
        (window.kernel, 1),
        (window.stride, 1),
        (window.padding, 0),
        (window.dilation, 1),
    ]
    return [(numbers[0], numbers[1]) if len(spatial) == 2 else (height, numbers[0]) for numbers, height in pairs]


def _own(size: tuple[int, int], dimensions: int) -> tuple[int, ...]:
    return size[2 - dimensions :]


def _launch(op: str, value: Tensor, *arguments: Any) -> None:
    if value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"a pooling runs on the CPU and on CUDA, not on {value.device}")
    threads = (torch.get_num_threads(),) if value.device.type == "cpu" else ()
    ops.core(op, value.device)(value.dtype == torch.float64, *arguments, *threads)
