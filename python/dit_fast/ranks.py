"""The processes of a run under DistributedDataParallel: what each knows is gathered at every step, rank 0 writes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from dit_fast.errors import LogError

T = TypeVar("T")


class Ranks:
    """The processes that share a model, one alone where it is not wrapped. Gradients are averaged over `size` of them."""

    def __init__(self, wrapper: nn.parallel.DistributedDataParallel | None) -> None:
        self._group: Any = None if wrapper is None else wrapper.process_group
        self.size = 1 if wrapper is None else torch.distributed.get_world_size(self._group)
        self.number = 0 if wrapper is None else torch.distributed.get_rank(self._group)

    @property
    def writes(self) -> bool:
        """Whether this process writes the log."""
        return self.number == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What work() returns on each rank, in their order. What it raises on one rank is raised on all: there as it is,
        elsewhere as LogError that names the rank, so that nobody waits for one who has stopped."""
        if self.size == 1:
            return [work()]
        mine, problem = None, None
        try:
            mine = work()
        except Exception as error:
            problem = error
        shared: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(shared, (mine, None if problem is None else str(problem)), group=self._group)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise problem or LogError(f"rank {self.number} cannot reach the other processes of the run: {reason}") from error
        if problem is not None:
            raise problem
        for number, (_, message) in enumerate(shared):
            if message is not None:
                raise LogError(f"rank {number}: {message}")
        return [value for value, _ in shared]
