"""A run whose numbers are at hand: the checks of `Trajectory.from_arrays` and the source they make."""

import hashlib
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import as_ids
from dit_fast.errors import LogError
from dit_fast.factored import Factors
from dit_fast.log import Header, Step, as_doubles, update_counts
from dit_fast.optimizers import RULES, SGD, Clip, Rule, State, constant_settings


class Arrays:
    """A source held in memory, complete and checked."""

    path: None = None
    factor_layout: None = None

    def __init__(self, header: Header, params: dict[str, Tensor], steps: list[Step], marks: dict[str, int]) -> None:
        self.header, self.marks = header, marks
        self._params, self._steps = params, steps
        self.num_steps = len(steps)
        largest = max((int(step.ids.max()) for step in steps), default=-1)
        self.num_samples = largest + 1 if header.num_samples is None else header.num_samples
        self._counts = update_counts(header, torch.zeros(len(header.parameters), dtype=torch.int64), steps)

    @cached_property
    def digest(self) -> str:
        """Over all that a result can depend on."""
        digest = hashlib.sha256(repr((self.header, self.marks, self.num_samples)).encode())
        for value in self._params.values():
            digest.update(value.numpy().tobytes())
        for step in self._steps:
            digest.update(step.ids.numpy().tobytes() + step.coefficients.numpy().tobytes())
            digest.update(repr((step.micro_sizes, step.settings, step.absent)).encode())
        return digest.hexdigest()

    def params(self, t: int) -> dict[str, Tensor]:
        return {name: value[t] for name, value in self._params.items()}

    def state(self, t: int) -> dict[str, State] | None:
        """Zeros before the first step, not known elsewhere."""
        zeros = {name: tuple(torch.zeros_like(value[0]) for _ in self.header.slots) for name, value in self._params.items()}
        return None if t else zeros

    def counts(self, t: int) -> Tensor:
        return self._counts[t]

    def segment(self, t: int) -> tuple[int, int]:
        return 0, self.num_steps

    def rows(self, start: int, stop: int) -> Tensor:
        dtype = self.header.row_dtype
        return torch.cat([value[start:stop].flatten(1).to(dtype) for value in self._params.values()], 1)

    def step(self, t: int) -> Step:
        return self._steps[t]

    def marked_queries(self) -> dict[int, tuple[list[str], dict[str, Tensor]]]:
        return {}

    def factors(self, t: int) -> list[Factors]:
        raise LogError("a run made from arrays holds no factors: they are written by Recorder(..., factors=True)")

    def verify(self) -> None:
        """Nothing to do: checked when made, and private since."""


def read_arrays(
    params: Mapping[str, Any],
    batch_ids: Any,
    lr: Any,
    optimizer: Rule | Sequence[Rule] | None,
    coefficients: Any,
    marks: Mapping[str, int] | Sequence[int] | None,
    num_samples: int | None,
    micro_batches: Sequence[Sequence[int]] | None,
    groups: Mapping[str, int] | None,
    absent: Sequence[Sequence[str]] | None,
    clip: Clip,
) -> Arrays:
    """The source `Trajectory.from_arrays` documents; TypeError or ValueError naming step and argument."""
    tensors = _as_params(params)
    num_steps = len(next(iter(tensors.values()))) - 1
    group_of = _as_groups(groups, tensors)
    rules = _as_rules(optimizer, 1 + max(group_of.values()))
    size = None if num_samples is None else integer(num_samples, "num_samples")
    ids = [_as_batch(batch, t, size) for t, batch in enumerate(_rows(batch_ids, num_steps, "batch_ids"))]
    settings = _as_settings(lr, rules, num_steps)
    missing = _as_absent(absent, list(tensors), num_steps)
    steps = [
        Step(
            b,
            _as_coefficients(coefficients, t, b, num_steps),
            _as_sizes(micro_batches, t, b, num_steps),
            settings[t],
            missing[t],
        )
        for t, b in enumerate(ids)
    ]
    header = Header({n: (v.shape[1:], v.dtype) for n, v in tensors.items()}, group_of, rules, size, clip=clip)
    return Arrays(header, tensors, steps, _as_marks(marks, num_steps))


def _as_params(params: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(params, Mapping) or not params:
        raise TypeError("params must be a non-empty dict: name → [T+1, *shape]")
    tensors = {}
    for name, value in params.items():
        tensor = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"params['{name}'] must be float32 or float64, got {tensor.dtype}")
        if tensor.ndim == 0 or len(tensor) == 0:
            raise ValueError(f"params['{name}'] must be [T+1, *shape], got shape {tuple(tensor.shape)}")
        bad = (~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1)).nonzero()
        if len(bad):
            raise ValueError(f"params['{name}'] holds NaN or infinity before step {int(bad[0])}")
        tensors[str(name)] = tensor
    lengths = {name: len(value) for name, value in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"params must all hold the same T+1 rows, got {lengths}")
    return tensors


def _as_groups(groups: Mapping[str, int] | None, params: Mapping[str, Tensor]) -> dict[str, int]:
    if groups is None:
        return dict.fromkeys(params, 0)
    if set(groups) != set(params):
        raise ValueError(f"groups and params must name the same parameters; they differ in {sorted(set(groups) ^ set(params))}")
    numbers = {name: integer(groups[name], f"groups['{name}']") for name in params}
    if min(numbers.values()) < 0:
        raise ValueError(f"groups must count from 0, got {numbers}")
    return numbers


def _as_rules(optimizer: Rule | Sequence[Rule] | None, num_groups: int) -> tuple[Rule, ...]:
    if optimizer is None:
        optimizer = SGD()
    rules: tuple[Any, ...] = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,) * num_groups
    for rule in rules:
        if type(rule) not in RULES.values():
            raise TypeError(f"optimizer must be one of dit_fast.{', '.join(RULES)} or a list of these, got {rule!r}")
    if len(rules) != num_groups:
        raise ValueError(f"optimizer holds {len(rules)} rules for {num_groups} parameter groups")
    if len({rule.setting_names for rule in rules}) > 1:
        raise ValueError(f"optimizer: the rules of all groups must be of one kind, got {rules}")
    return rules


def _as_settings(lr: Any, rules: tuple[Rule, ...], num_steps: int) -> list[list[list[float]]]:
    """[T][groups][settings] in the order of each rule's `setting_names`; all but the rate are constant."""
    rates = as_doubles(lr)
    if rates.ndim == 1:
        rates = rates[:, None]
    if rates.ndim and tuple(rates.shape) not in ((num_steps, 1), (num_steps, len(rules))):
        raise ValueError(
            f"lr must be a number, [T] or [T, groups] with T={num_steps}, groups={len(rules)}; got {list(rates.shape)}"
        )
    if not torch.isfinite(rates).all():
        raise ValueError("lr holds NaN or infinity")
    table = rates.expand(num_steps, len(rules)).tolist()
    return [[constant_settings(rule, rate) for rule, rate in zip(rules, row, strict=True)] for row in table]


def _rows(values: Any, num_steps: int, what: str) -> Any:
    if not has_length(values) or len(values) != num_steps:
        size = len(values) if has_length(values) else repr(values)
        raise ValueError(f"{what} must hold one array per step: {num_steps} (params hold T+1={num_steps + 1} rows), got {size}")
    return values


def _as_batch(batch: Any, t: int, num_samples: int | None) -> Tensor:
    ids = as_ids(batch, f"batch_ids[{t}]").clone()
    if not len(ids):
        raise ValueError(f"batch_ids[{t}] is empty; leave out the step")
    if int(ids.min()) < 0:
        raise ValueError(f"batch_ids[{t}] holds a negative id, {int(ids.min())}")
    if num_samples is not None and int(ids.max()) >= num_samples:
        raise ValueError(f"batch_ids[{t}] holds id {int(ids.max())}, outside num_samples={num_samples}")
    return ids


def _as_coefficients(coefficients: Any, t: int, ids: Tensor, num_steps: int) -> Tensor:
    if coefficients is None:
        return torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    values = as_doubles(_rows(coefficients, num_steps, "coefficients")[t])
    if values.shape != ids.shape:
        raise ValueError(f"coefficients[{t}] has shape {list(values.shape)} for {len(ids)} ids")
    if not torch.isfinite(values).all():
        raise ValueError(f"coefficients[{t}] holds NaN or infinity")
    return values


def _as_sizes(micro_batches: Sequence[Sequence[int]] | None, t: int, ids: Tensor, num_steps: int) -> tuple[int, ...]:
    if micro_batches is None:
        return (len(ids),)
    sizes = tuple(integer(size, f"micro_batches[{t}]") for size in _rows(micro_batches, num_steps, "micro_batches")[t])
    if sum(sizes) != len(ids) or min(sizes) < 1:
        raise ValueError(f"micro_batches[{t}] must be positive sizes that sum to {len(ids)}, got {list(sizes)}")
    return sizes


def _as_absent(absent: Sequence[Sequence[str]] | None, names: list[str], num_steps: int) -> list[tuple[int, ...]]:
    if absent is None:
        return [()] * num_steps
    rows = []
    for t, row in enumerate(_rows(absent, num_steps, "absent")):
        for name in row:
            if name not in names:
                raise ValueError(f"absent[{t}] names '{name}', which is not in params")
        rows.append(tuple(sorted(names.index(name) for name in row)))
    return rows


def _as_marks(marks: Mapping[str, int] | Sequence[int] | None, num_steps: int) -> dict[str, int]:
    items = marks.items() if isinstance(marks, Mapping) else ((f"step {step}", step) for step in marks or ())
    named = {str(name): integer(step, f"mark '{name}'") for name, step in items}
    for name, step in named.items():
        if not 0 <= step <= num_steps:
            raise ValueError(f"mark '{name}' at step {step} is outside the run, which has {num_steps} steps")
    return named


def integer(value: Any, what: str) -> int:
    """An int from anything that is one, bools excepted; TypeError names `what`."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{what}: steps and sizes must be integers, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: steps and sizes must be integers, got {value!r}") from None


def has_length(value: Any) -> bool:
    """Whether this is a sequence or an array of at least one dimension, and no string."""
    return hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "ndim", 1) > 0
