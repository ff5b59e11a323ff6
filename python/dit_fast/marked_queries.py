"""A query's gradients at the moment of a mark, with the live model's parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_fast import queries
from dit_fast.factor_options import FactorOptions
from dit_fast.log import Header
from dit_fast.problem import Evaluator, Problem
from dit_fast.trajectory import Trajectory


@dataclass(frozen=True)
class _Now:
    """A source that knows what a run's header says and nothing of its steps."""

    header: Header


def query_gradients(
    model: nn.Module, params: Mapping[str, Tensor], header: Header, options: FactorOptions, query: Any, step: int
) -> tuple[list[str], dict[str, Tensor]]:
    """(a label for each of Q values, q [Q, *shape] per parameter) at `params`, in eval mode; the model and torch's state are
    put back. ValueError for a loss where the options have none."""
    source: Any = _Now(header)
    now = Trajectory(source)
    problem = Problem(model, options.per_sample_loss or _no_loss, unpack=options.unpack, l2=options.l2)
    device = next(iter(params.values())).device
    asked = queries.as_list(query)
    ev = Evaluator(problem, now, device, header.state_dtype)
    with ev.session():
        blocks = queries.gradients_at(ev, step, {name: p.detach() for name, p in params.items()}, asked)
        sizes = [item.size if item.size is not None else -1 for item in asked]
        if -1 in sizes:  # one query of unknown size has what the others leave
            unknown = len(next(iter(blocks.values()))) - sum(size for size in sizes if size >= 0)
            if sizes.count(-1) > 1:
                raise ValueError("a mark takes at most one query whose number of values only the model tells")
            sizes = [unknown if size < 0 else size for size in sizes]
    return queries.names(asked, sizes), {name: block.detach() for name, block in blocks.items()}


def _no_loss(output: Any, target: Any) -> Tensor:
    raise ValueError("this query needs a loss: give Recorder(..., factors=FactorOptions(per_sample_loss=...))")
