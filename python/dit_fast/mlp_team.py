"""The sweep and retraining of feed-forward nets in one launch: each team of threads takes a few columns through all steps.

On a GPU a team is a block and everything it carries lies in shared memory, which limits the nets. On the CPU the same code
runs with `team_size` threads to a team: slow, for tests of what the GPU does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.mlp import SETTINGS, Mlp, MlpModels, MlpSteps, check_retrain, check_sweep

# columns or models to a team: what the logged model's pass is shared by
LARGEST_GROUP = 8
# bytes of shared memory that a block may ask for on an H100, for tests without one
H100_MEMORY, H100_PROCESSORS = 232448, 132
# bytes that a GPU keeps of every block's shared memory, beyond what a block may ask for: with a second block, of that too
RESERVED = 1024


@dataclass(frozen=True)
class Team:
    """Columns to a team, its largest batch, and the bytes of memory it may take; threads to a team count on the CPU alone."""

    group: int
    max_batch: int
    memory: int
    size: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.group, self.max_batch, self.memory


def plan(
    net: Mlp,
    dtype: torch.dtype,
    max_batch: int,
    num_columns: int,
    *,
    retrain: bool = False,
    hessian: str = "exact",
    momentum: bool = False,
    l2: float = 0.0,
    memory: int = H100_MEMORY,
    processors: int = H100_PROCESSORS,
) -> Team | None:
    """The team for this net, None where not one column (with retrain: one model) fits `memory` bytes.

    Columns share a team where there are more than two for every processor and two teams still fit side by side.
    """
    specs, kinds = ops.mlp_specs(net, hessian)

    def needs(group: int, limit: int) -> int:
        sizes = (group, max_batch, limit)
        return ops.team_bytes(dtype == torch.float64, retrain, specs, kinds, l2, momentum, sizes)

    if not 0 <= needs(1, memory) <= memory:
        return None
    group = max(1, min(LARGEST_GROUP, num_columns // (2 * processors)))
    half = (memory - RESERVED) // 2
    while group > 1 and needs(group, half) > half:
        group -= 1
    return Team(group, max_batch, memory if group == 1 else half)


class TeamSweep:
    """The steps of `ops.MlpSweep` in one launch, columns joining and leaving on the way (csrc/team/sweep.h).

    Args:
        net, steps, blocks, momenta, scores, l2, hessian: as in `ops.MlpSweep`, on any one device.
        joins: [K] int64, falling: column k takes part in the steps t < joins[k], with what its blocks hold at first.
        leaves: [K] int64: when all steps from leaves[k] on are done, `left` is subtracted from column k; 0 for never.
        left: blocks laid out as u; None where no column leaves.
        team: of `plan`.

    Raises:
        TypeError, ValueError: as `ops.MlpSweep`.
        RuntimeError: CUDA tensors where the CUDA part is not compiled.
    """

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        scores: Tensor,
        joins: Tensor,
        leaves: Tensor,
        left: Sequence[Tensor | None] | None,
        team: Team,
        *,
        l2: float = 0.0,
        hessian: str = "exact",
    ) -> None:
        check_sweep(net, steps, blocks, momenta, scores)
        if left is not None:
            check_sweep(net, steps, left, momenta, scores)
        for name, values in (("joins", joins), ("leaves", leaves)):
            if values.shape != (len(scores),) or values.dtype != torch.int64 or values.device != scores.device:
                raise ValueError(f"{name} must be [{len(scores)}] int64 on {scores.device}")
        if bool((joins.diff() > 0).any()):
            raise ValueError("joins must fall: columns are sorted by their last step")
        if left is None and bool((leaves > 0).any()):
            raise ValueError("left must be given where a column leaves")
        _check_batches(steps, team)
        self._steps, self._kept, self._team = steps, (blocks, momenta, scores, left), team
        self._joins, self._leaves = joins, leaves
        self._bad = torch.full((1,), -1, dtype=torch.int64, device=scores.device)
        self._model = (*ops.mlp_specs(net, hessian), net.loss_scale, l2)

    def run(self) -> None:
        """All steps, last to first. On a GPU it returns at once; `bad_step` waits."""
        steps, (blocks, momenta, scores, left), K = self._steps, self._kept, len(self._joins)
        arguments = (
            steps.theta.dtype == torch.float64,
            *self._model,
            (K, K, len(steps.theta)),
            *ops.logged(steps, 0),
            ops.addresses(blocks),
            ops.addresses(momenta or ()),
            (scores.data_ptr(), scores.stride(0)),
            self._team.sizes,
            ([x.data_ptr() for x in (self._joins, self._leaves, self._bad)], ops.addresses(left or ())),
        )
        _call("mlp_sweep_team", steps, self._team, arguments)

    def bad_step(self) -> int | None:
        """The last step whose scores are not finite, None where all are."""
        bad = int(self._bad)
        return None if bad < 0 else bad


class TeamRetrain:
    """The steps of `ops.MlpRetrain` in one launch (csrc/team/retrain.h); the arguments and errors of both classes above."""

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        models: MlpModels,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        team: Team,
        *,
        l2: float = 0.0,
    ) -> None:
        check_retrain(net, steps, models, blocks, momenta)
        # within a sample's models a team searches by halves
        starts = models.offsets[1:-1]
        falls = models.removed.diff() <= 0
        falls[starts[(starts > 0) & (starts < len(models.removed))] - 1] = False
        if bool(falls.any()):
            raise ValueError("removed must rise within each sample, as mlp_models makes it")
        _check_batches(steps, team)
        self._steps, self._models, self._kept, self._team = steps, models, (blocks, momenta), team
        self._model = (*ops.mlp_specs(net, "none"), net.loss_scale, l2)

    def run(self, start: int, stop: int) -> None:
        """Steps start … stop − 1. On a GPU it returns at once."""
        steps, models, (blocks, momenta) = self._steps, self._models, self._kept
        if not 0 <= start <= stop <= len(steps.theta):
            raise ValueError(f"steps {start}..{stop} of {len(steps.theta)} are out of range")
        joins, K = models.joins - start, len(models.joins)
        arguments = (
            steps.theta.dtype == torch.float64,
            *self._model,
            (K, K, stop - start),
            *ops.logged(steps, start),
            ops.addresses(blocks),
            ops.addresses(momenta or ()),
            [joins.data_ptr(), models.offsets.data_ptr(), models.removed.data_ptr()],
            self._team.sizes,
        )
        _call("mlp_retrain_team", steps, self._team, arguments)


def has_momentum(steps: MlpSteps) -> bool:
    """Whether any step has."""
    return bool(steps.settings[..., SETTINGS.index("momentum")].any())


def _check_batches(steps: MlpSteps, team: Team) -> None:
    largest = int(steps.offsets.diff().max()) if len(steps.offsets) > 1 else 0
    if largest > team.max_batch:
        raise ValueError(f"a batch of {largest} is larger than the team's {team.max_batch}")


def _call(op: str, steps: MlpSteps, team: Team, arguments: tuple[object, ...]) -> None:
    function = ops.core(op, steps.theta.device)
    if steps.theta.device.type == "cpu":
        function(*arguments, team.size)
    else:
        function(*arguments)
