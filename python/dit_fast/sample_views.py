"""Samples as a person looks at them: pictures as PNG data URIs, texts, labels."""

import base64
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.problem import Problem

MAX_PIXELS = 64
MAX_TEXT = 280


def views_of(
    ids: list[int],
    problem: Problem | None = None,
    samples: Any = None,
    labels: Any = None,
    image_shape: tuple[int, ...] | None = None,
) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """(pictures, texts, labels) of these samples, each id → what there is to show; empty where nothing is known.

    samples: images [N, H, W] or [N, C, H, W] (C = 1 or 3), or N texts; row j is the sample j. None: the problem's inputs,
        where they have that shape, or image_shape behind the first dimension after reshaping.
    labels: N of anything; None: the problem's targets, where they are whole numbers [N].

    Raises ValueError where an id has no row, or images have another shape.
    """
    inputs = targets = None
    if ids and problem is not None and problem.samples is not None:
        inputs, targets = _of_problem(problem, ids)
    if ids and samples is not None:
        inputs = _rows(samples, ids, "samples")
    if ids and labels is not None:
        targets = _rows(labels.tolist() if hasattr(labels, "tolist") else labels, ids, "labels")
    named = {} if targets is None else {j: str(label) for j, label in zip(ids, targets, strict=True)}
    if inputs is None:
        return {}, {}, named
    if isinstance(inputs, list) and all(isinstance(text, str) for text in inputs):
        return (
            {},
            {j: text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…" for j, text in zip(ids, inputs, strict=True)},
            named,
        )
    images = as_images(inputs, image_shape)
    if images is None:
        if samples is not None or image_shape is not None:
            raise ValueError(f"samples are no images [N, H, W] or [N, C, H, W] with C = 1 or 3, and no texts: {_shape(inputs)}")
        return {}, {}, named
    low, high = float(images.min()), float(images.max())
    pixels = ((images - low) / ((high - low) or 1.0) * 255).round().to(torch.uint8)
    return {j: png_uri(image) for j, image in zip(ids, pixels, strict=True)}, {}, named


def as_images(inputs: Any, image_shape: tuple[int, ...] | None = None) -> Tensor | None:
    """[n, C, H, W] float64, no side above MAX_PIXELS; None for what is no images."""
    if not isinstance(inputs, Tensor) or inputs.is_complex():
        return None
    x = inputs.detach().cpu().double()
    if image_shape is not None:
        if x[0].numel() != torch.Size(image_shape).numel():
            raise ValueError(f"a sample of {x[0].numel()} numbers has no image shape {'x'.join(map(str, image_shape))}")
        x = x.reshape(len(x), *image_shape)
    elif not inputs.is_floating_point() and inputs.dtype != torch.uint8:
        return None  # tokens
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2 or not torch.isfinite(x).all():
        return None
    side = max(x.shape[2:])
    if side > MAX_PIXELS:
        size = [max(1, round(length * MAX_PIXELS / side)) for length in x.shape[2:]]
        x = torch.nn.functional.interpolate(x, size=size, mode="area")
    return x


def png_uri(pixels: Tensor) -> str:
    """data:image/png;base64,… of uint8 pixels [C, H, W], grey (C = 1) or red, green, blue (C = 3)."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).contiguous().numpy()
    raw = b"".join(b"\0" + row.tobytes() for row in rows)  # 0: the row is stored unfiltered
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = (_png_chunk(b"IHDR", head), _png_chunk(b"IDAT", zlib.compress(raw, 9)), _png_chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _of_problem(problem: Problem, ids: list[int]) -> tuple[Any, Any]:
    """The model's first input for these samples and their targets as whole numbers; None where they are otherwise."""
    assert problem.samples is not None
    if max(ids) >= problem.samples.num_samples:
        raise ValueError(f"sample {max(ids)} is not in the problem's data, which has {problem.samples.num_samples} samples")
    args, _, target = problem.unpack(problem.samples.batch(torch.tensor(ids)))
    whole = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    return (args[0] if args else None), (target.tolist() if whole else None)


def _rows(values: Any, ids: list[int], what: str) -> Any:
    if max(ids) >= len(values):
        raise ValueError(f"{what} has {len(values)} rows: there is none for sample {max(ids)}")
    if isinstance(values, Tensor | np.ndarray):
        return torch.as_tensor(values)[torch.tensor(ids)]
    return [values[j] for j in ids]


def _shape(inputs: Any) -> str:
    return f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
