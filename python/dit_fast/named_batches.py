"""What a training loop says of a step: the samples of each backward(), and what can be seen of its forward passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import modules
from dit_fast.data import as_ids, leaves
from dit_fast.errors import UnsupportedError
from dit_fast.log import as_doubles, as_tree


@dataclass(frozen=True)
class Stored:
    """A batch taken apart: its layout and its tensors on the host."""

    layout: Any
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Named:
    """The samples of one backward(): ids [B], coefficients a [B], the batch itself where it is stored, and whether the
    coefficients are those of the Recorder's reduction. batch: as it was given, where more than its copy is asked for."""

    ids: Tensor
    coefficients: Tensor
    stored: Stored | None
    is_plain: bool
    batch: Any = None


class Batches:
    """Reads what `Recorder.step` and `Recorder.batch` are given. layout: of the stored batches, once there is one."""

    def __init__(
        self, reduction: str, num_samples: int | None, store_batches: bool, takes_batch: bool = False, needs_batch: bool = False
    ) -> None:
        self._reduction, self._num_samples, self._store_batches = reduction, num_samples, store_batches
        self._takes_batch, self._needs_batch = takes_batch, needs_batch
        self.layout: Any = None

    def read(self, where: str, ids: Any, scale: float, coefficients: Any, stored: Any) -> Named:
        """One backward()'s samples; TypeError or ValueError beginning with `where`."""
        try:
            batch = as_ids(ids, f"{where}: ids").clone()
        except (TypeError, ValueError) as error:
            if str(error).startswith(where):
                raise
            raise TypeError(f"{where}: ids must be integers [B]: {error}") from error
        if not len(batch):
            raise ValueError(f"{where}: ids is empty; leave out the step")
        low, high = (int(end) for end in batch.aminmax())
        if low < 0:
            raise ValueError(f"{where}: id {low} is negative; an id is a sample's position in the data")
        if self._num_samples is not None and high >= self._num_samples:
            raise ValueError(f"{where}: id {high} is outside the samples 0..{self._num_samples - 1}")
        if not math.isfinite(scale):
            raise ValueError(f"{where}: scale must be finite, got {scale}")
        if self._needs_batch and stored is None:
            raise ValueError(f"{where}: factors of this curvature need the batch: step(ids, batch=(x, y))")
        kept = None if self._takes_batch and not self._store_batches else self._read_stored(where, stored)
        given = stored if self._takes_batch else None
        if coefficients is None:
            share = scale / (len(batch) if self._reduction == "mean" else 1)
            return Named(batch, torch.full((len(batch),), share, dtype=torch.float64), kept, is_plain=True, batch=given)
        weights = as_doubles(coefficients)
        if weights.shape != batch.shape or not torch.isfinite(weights).all():
            raise ValueError(
                f"{where}: coefficients must be finite, one per id: got {list(weights.shape)} for {len(batch)} ids"
            )
        return Named(batch, weights * scale, kept, is_plain=False, batch=given)

    def _read_stored(self, where: str, stored: Any) -> Stored | None:
        """A copy of the batch on the host, on its way there where it is on a GPU."""
        if self._store_batches != (stored is not None):
            need = "needs the batch: step(ids, batch=(x, y))" if self._store_batches else "is needed to keep a batch"
            raise ValueError(f"{where}: store_batches=True {need}")
        if stored is None:
            return None
        try:
            layout, tensors = as_tree(stored)
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from error
        if self.layout not in (None, layout):
            raise ValueError(f"{where}: the batch is laid out as {layout}, those before as {self.layout}")
        self.layout = layout
        return Stored(layout, tuple(to_host(tensor) for tensor in tensors))


class ForwardPasses:
    """The training forward passes of a model since its last step: shapes of their inputs, and where dropout is active the
    random generator's state before each."""

    def __init__(self) -> None:
        self.rng: list[Tensor] = []
        self._inputs: list[tuple[int, ...]] = []

    def note(self, where: str, model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> None:
        """A forward pass that is about to begin; UnsupportedError under autocast."""
        if not torch.is_grad_enabled():
            return
        self._inputs.append(next((tuple(leaf.shape) for leaf in leaves((args, kwargs))), ()))
        if torch.is_autocast_enabled(device.type):
            raise UnsupportedError(
                f"{where}: the model runs under autocast, in less than float32: its steps cannot be reproduced; "
                "train in float32 (torch.autocast(..., enabled=False))"
            )
        if modules.has_active_dropout(model):
            self.rng.append(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())

    def check(self, where: str, named: Sequence[Named]) -> None:
        """ValueError or UnsupportedError where the named batches cannot be those of the passes."""
        if len(self._inputs) == len(named):
            for shape, batch in zip(self._inputs, named, strict=True):
                if shape and batch.is_plain and len(batch.ids) not in shape[:2]:
                    raise ValueError(
                        f"{where}: {len(batch.ids)} ids for a model input of shape {list(shape)}; name the sample of every row "
                        "(ids may repeat), or give coefficients= where rows are not samples"
                    )
        if self.rng and len(self.rng) != len(named):
            raise UnsupportedError(
                f"{where}: {len(self.rng)} forward passes of the model for {len(named)} named batches; "
                "dropout's masks can be replayed only where each named batch is one forward pass (others under torch.no_grad())"
            )

    def take(self) -> tuple[Tensor, ...]:
        """The random states, and none from now on."""
        rng, self.rng, self._inputs = tuple(self.rng), [], []
        return rng


def to_host(tensor: Tensor) -> Tensor:
    """A copy in memory of its own; from a GPU without waiting, as the chunk's event covers it."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
