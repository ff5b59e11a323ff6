"""The seeded random matrices that make per-sample gradients smaller: their sizes, and the matrices made again from a seed."""

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dit_fast.factored import Projection

Sizes = tuple[int | None, int | None]


def sizes_of(items: Sequence[tuple[str, Any]], name: str, shape: Sequence[int]) -> Sizes:
    """(outputs, inputs) that a parameter of this shape is projected to by the first pattern that fits; None = as it is."""
    asked: Any = next((sizes for pattern, sizes in items if fnmatchcase(name, pattern)), None)
    outputs, inputs = asked if isinstance(asked, tuple | list) else (asked, asked)
    sides = matrix_shape(shape)
    if not sides:
        return None, None
    return (
        outputs if outputs is not None and outputs < sides[0] else None,
        inputs if len(sides) > 1 and inputs is not None and inputs < sides[1] else None,
    )


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(O, I), or (size,) of a vector, or () of a number."""
    own = torch.Size(shape)
    return tuple(own) if len(own) < 2 else (own[0], own[1:].numel())


def projected_shape(shape: Sequence[int], sizes: Sizes) -> torch.Size:
    """The shape of a projected gradient: [o, i] or [o]; its own where nothing is projected."""
    if sizes == (None, None):
        return torch.Size(shape)
    return torch.Size([side if size is None else size for side, size in zip(matrix_shape(shape), sizes, strict=False)])


def make_projection(seed: int, name: str, shape: Sequence[int], sizes: Sizes) -> Projection:
    """The matrices of one parameter, float64 on the CPU, from nothing but these arguments."""
    sides = matrix_shape(shape)
    made = [
        None if size is None else _gaussian(f"{seed} {name} {what}", size, side)
        for what, size, side in zip(("outputs", "inputs"), sizes, [*sides, 0][:2], strict=True)
    ]
    return Projection(*made)


def digest_of(projection: Projection) -> str:
    """sha256 of the matrices' bytes, by which a log knows them."""
    digest = hashlib.sha256()
    for matrix in (projection.outputs, projection.inputs):
        digest.update(b"-" if matrix is None else matrix.numpy().tobytes())
    return digest.hexdigest()


def digests_of(projections: Mapping[str, Projection]) -> dict[str, str]:
    """Parameter → digest."""
    return {name: digest_of(projection) for name, projection in projections.items()}


def _gaussian(key: str, size: int, side: int) -> Tensor:
    """[size, side] with entries of variance 1/size, so that E[PᵀP] = I."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, side, generator=generator, dtype=torch.float64) / size**0.5
