"""Shapes and settings that the tests of all ops share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dit_fast import ops

# K, B, S, O, I: single elements, odd sizes, edges of the tiles (64 and 16 on CUDA, 512 and 1024 on the CPU)
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 5, 1, 1, 7),
    (2, 1, 3, 4, 1),
    (3, 7, 3, 5, 9),
    (5, 4, 1, 13, 17),
    (4, 33, 2, 65, 31),
    (2, 64, 1, 64, 64),
    (1, 3, 70, 10, 129),
    (3, 520, 1, 350, 3),
    (5, 2, 300, 3, 5),
]
THREADS = [1, 2, 5]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


def to(device: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """On the device with the strides kept: a plain .to() would make the strided cases contiguous."""
    if device == "cpu":
        return list(tensors)
    return [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in tensors
    ]


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def built_in_product(used: bool = True) -> Iterator[None]:
    """Force the GEMM of our own, and prove that it is the one in use."""
    ops.use_blas(not used)
    try:
        assert (ops.build_info()["blas"] == "built-in") == used
        yield
    finally:
        ops.use_blas(True)
