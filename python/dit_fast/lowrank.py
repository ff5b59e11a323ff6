"""The layers of a step as the low-rank ops take them: checks of what is handed over, and its addresses and strides.

Alphabet: K directions, B samples with R rows each, S positions in a sequence, O/I out and in features.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# of grad_dot_layers: delta, activations, weight, bias
GradDotLayer = tuple[Tensor, Tensor, Tensor, Tensor | None]
# of lowrank_update_layers: weight, bias, delta, activations
LowrankUpdateLayer = tuple[Tensor, Tensor | None, Tensor, Tensor]
# of update_dot_layers: weight, bias, delta, activations, dot_delta, dot_activations
UpdateDotLayer = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]

Layer = TypeVar("Layer", GradDotLayer, LowrankUpdateLayer, UpdateDotLayer)

# address and the strides of all dimensions but the last
Operand = tuple[int, tuple[int, int, int]]
SamplesSpec = tuple[int, Operand, Operand]
DirectionsSpec = tuple[tuple[int, int], Operand, Operand]
PerSample = tuple[Operand, tuple[int, int]]

_DTYPES = (torch.float32, torch.float64)


class Directions(NamedTuple):
    """U [K, O, I] and v [K, O] of one layer; `written` where an op changes them."""

    weight: Tensor
    bias: Tensor | None
    written: bool

    def spec(self) -> DirectionsSpec:
        _, O, I = self.weight.shape
        stride, bias = self.weight.stride(), self.bias
        return (
            (O, I),
            (self.weight.data_ptr(), (stride[0], stride[1], 0)),
            (0, (0, 0, 0)) if bias is None else (bias.data_ptr(), (bias.stride(0), 0, 0)),
        )

    def check(self) -> None:
        weight, bias = self.weight, self.bias
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor [K, O, I], got {type(weight).__name__}")
        if weight.ndim != 3:
            raise ValueError(f"weight must have shape [K, O, I], got {list(weight.shape)}")
        _check("weight", weight, weight)
        if self.written:
            _check_written("weight", weight)
        if bias is not None:
            _check_shape("bias", bias, weight.shape[:2], "[K, O]")
            _check("bias", bias, weight)
            if self.written:
                _check_written("bias", bias)


class Samples(NamedTuple):
    """δ [B, S, O] or [B, R, S, O] and a [B, S, I] of one layer, and what the arguments are called: "" or "dot_" in front."""

    delta: Tensor
    activations: Tensor
    prefix: str = ""

    def spec(self) -> SamplesSpec:
        delta, activations = self.delta, self.activations
        stride, a = delta.stride(), activations.stride()
        rows = (stride[0], stride[1], stride[2]) if delta.ndim == 4 else (stride[0], 0, stride[1])
        return delta.shape[-2], (delta.data_ptr(), rows), (activations.data_ptr(), (a[0], a[1], 0))

    def check(self, weight: Tensor) -> None:
        delta, name = self.delta, f"{self.prefix}delta"
        if not isinstance(delta, Tensor):
            raise TypeError(f"{name} must be a tensor [B, S, O] or [B, R, S, O], got {type(delta).__name__}")
        if delta.ndim not in (3, 4):
            raise ValueError(f"{name} must have shape [B, S, O] or [B, R, S, O], got {list(delta.shape)}")
        _, O, I = weight.shape
        if delta.shape[-1] != O:
            letters = "[B, S, O]" if delta.ndim == 3 else "[B, R, S, O]"
            raise ValueError(f"{name} must have shape {letters} with O = {O} as in weight, got {list(delta.shape)}")
        _check(name, delta, weight)
        shape = (delta.shape[0], delta.shape[-2], I)
        _check_shape(f"{self.prefix}activations", self.activations, shape, "[B, S, I]")
        _check(f"{self.prefix}activations", self.activations, weight)

    def per_sample(self, name: str, tensor: Tensor, weight: Tensor) -> PerSample:
        """Coefficients or dots as the core takes them, checked to be float64 [K, B], or [K, B, R] where delta has R."""
        K, B, R = len(weight), len(self.delta), self.delta.shape[1] if self.delta.ndim == 4 else 1
        if self.delta.ndim == 4:
            _check_shape(name, tensor, (K, B, R), "[K, B, R]")
        else:
            _check_shape(name, tensor, (K, B), "[K, B]")
        _check(name, tensor, weight, torch.float64)
        stride = tensor.stride()
        # for [K, B] a row of R = 1 elements; a stride of a dimension of size 1 may be anything
        return (tensor.data_ptr(), (stride[0], stride[1], 0)), (B, R)


def check_layers(layers: Sequence[tuple[Directions, Sequence[Samples]]]) -> None:
    """Each layer by itself, and that K, B, R, dtype and device are those of the first. A layer's number stands in front of
    what is said of it where there are several."""
    for number, (directions, batches) in enumerate(layers):
        try:
            directions.check()
            for samples in batches:
                samples.check(directions.weight)
            if number:
                _check_alike(layers[0], (directions, batches))
        except (TypeError, ValueError) as error:
            if len(layers) == 1:
                raise
            raise type(error)(f"layer {number}: {error}") from None


def check_dots(dots: Tensor) -> None:
    """That no element of what is written to is reached twice."""
    _check_written("dots", dots)


def unpack(layers: Sequence[Layer], length: int, letters: str) -> Iterator[Layer]:
    """The layers, each of which must have `length` members."""
    for number, layer in enumerate(layers):
        if not isinstance(layer, tuple | list) or len(layer) != length:
            raise TypeError(f"layer {number} must be a tuple ({letters})")
        yield layer


def _check_alike(first: tuple[Directions, Sequence[Samples]], other: tuple[Directions, Sequence[Samples]]) -> None:
    weight, expected = other[0].weight, first[0].weight
    if len(weight) != len(expected):
        raise ValueError(f"weight must have K = {len(expected)} as in layer 0, got {len(weight)}")
    if weight.dtype != expected.dtype:
        raise TypeError(f"weight must be {_short(expected.dtype)} as in layer 0, got {_short(weight.dtype)}")
    if weight.device != expected.device:
        raise ValueError(f"weight must be on {expected.device} as in layer 0, got {weight.device}")
    for samples, of_first in zip(other[1], first[1], strict=True):
        if samples.delta.shape[:-2] != of_first.delta.shape[:-2]:
            letters = "B" if of_first.delta.ndim == 3 else "B, R"
            raise ValueError(
                f"{samples.prefix}delta must have {letters} = {list(of_first.delta.shape[:-2])} as in layer 0, "
                f"got shape {list(samples.delta.shape)}"
            )


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int], letters: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {letters}, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(tensor.shape)}")


def _check(name: str, tensor: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """Dtype, device and layout; `dtype` None means that of weight, which must be one the ops know."""
    wanted = dtype or weight.dtype
    if wanted not in _DTYPES:
        raise TypeError(f"weight must be float32 or float64, got {_short(wanted)}")
    if tensor.dtype != wanted:
        why = "" if dtype else " as weight is"
        raise TypeError(f"{name} must be {_short(wanted)}{why}, got {_short(tensor.dtype)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} as weight is, got {tensor.device}")
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} must be a plain dense tensor")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}")


def _check_written(name: str, tensor: Tensor) -> None:
    """No element may be reached by two indices: sorted by stride, each dimension must step over the ones before."""
    if tensor.is_contiguous():
        return
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise ValueError(f"{name} is written to and must not overlap itself, got strides {list(tensor.stride())}")
            reach += stride * (size - 1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
