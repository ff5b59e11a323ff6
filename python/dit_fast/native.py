"""The compiled whole-sweep path for feed-forward nets: many steps and all columns in one call of `ops.MlpSweep`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import mlp, mlp_gemm, mlp_team, ops
from dit_fast.data import default_unpack
from dit_fast.errors import LogError
from dit_fast.linearize import Hessian, linearize
from dit_fast.log import Step
from dit_fast.optimizers import SGD
from dit_fast.plan import Column
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.queries import CHUNK, Query
from dit_fast.recognize import NotCompiled, Recognized, check_targets, recognize
from dit_fast.sweep import QueryGradients

# the compiled path must meet the generic one on a batch of the log
COMPARED_SAMPLES = 16
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-10}

# a call does about this much work (0.05 s at 20 GFLOP/s), so that Ctrl-C and progress do not wait longer
CALL_FLOPS = 1e9
# numbers of the log and of the data that are copied at a time where they cannot be used in place
SLICE_NUMBERS = 1 << 24
# numbers of float32 in half a vector register, which the products take as a whole
LINE = 8


@dataclass(frozen=True)
class Native:
    """What was recognised: the net, and the data as rows [N, I] and targets where they fit in place; the largest batch of
    the log and whether the optimizer has momentum.

    engine: "cpu" (`ops.MlpSweep`), "team" (`mlp_team`, small nets on a GPU) or "gemm" (`mlp_gemm`, the others there).
    """

    recognized: Recognized
    data: tuple[Tensor, Tensor] | None
    max_batch: int
    momentum: bool
    engine: str

    def team(self, ev: Evaluator, num_columns: int, hessian: Hessian = "none", retrain: bool = False) -> mlp_team.Team:
        """How the columns, or the models of retraining, are taken on a GPU; NotCompiled where not one fits its memory."""
        options: dict[str, Any] = {"retrain": retrain, "hessian": hessian, "momentum": self.momentum, "l2": ev.l2}
        if ev.device.type == "cuda":
            options["memory"], options["processors"] = ops.device_limits(ev.device)
        team = mlp_team.plan(self.recognized.net, ev.dtype, self.max_batch, num_columns, **options)
        if team is None:
            raise NotCompiled(f"{self.recognized.description} does not fit the shared memory of a block on {ev.device}")
        return team


def prepare(ev: Evaluator, hessian: Hessian) -> Native:
    """The compiled path of this problem, proved on the first batch of the log; NotCompiled says why there is none."""
    if hessian not in mlp.CURVATURES:
        raise NotCompiled(f"hessian={hessian!r} is not compiled")
    native, params, batch = read(ev)
    if native.engine == "team":
        try:
            native.team(ev, 1, hessian)
        except NotCompiled:
            native = replace(native, engine="gemm")
    _compare(ev, native, params, batch, hessian)
    return native


def uses_teams(ev: Evaluator) -> bool:
    """Whether small nets are those of `mlp_team`, in one launch."""
    return ev.device.type == "cuda"


def read(ev: Evaluator) -> tuple[Native, Params, Batch]:
    """The net of this problem, not proved yet, with a few samples to prove it on and the parameters before them.

    NotCompiled where the device, the optimizer, the log or the net is none of those that are compiled.
    """
    if ev.device.type not in ("cpu", "cuda"):
        raise NotCompiled(f"it runs on the CPU and on CUDA, not on {ev.device}")
    if ev.device.type == "cuda" and not ops.cuda_compiled():
        raise NotCompiled("dit_fast was built without its CUDA part")
    rules = ev.trajectory.optimizer
    if not all(type(rule) is SGD for rule in rules):
        raise NotCompiled(f"{rules[0].kind} is not compiled")
    if any(rule.maximize for rule in rules):
        raise NotCompiled("maximize is not compiled")
    if ev.trajectory.clip:
        raise NotCompiled("clipped gradients are not compiled")
    if ev.trajectory.every > 1:
        raise NotCompiled("it needs the parameters of every step, and this log was written with every > 1")
    if ev.trajectory.stores_batches or ev.trajectory.rng is not None:
        raise NotCompiled("the log holds batches or dropout's masks of its own")
    step = ev.trajectory.steps(0, 1)[0]
    # a few samples show all there is to see
    size = min(COMPARED_SAMPLES, step.micro_sizes[0])
    params, batch = ev.params(0), ev.batch(0, step.ids[:size], step.coefficients[:size])
    data = _whole_data(ev)
    recognized = recognize(ev, params, batch, None if data is None else data[1])
    if data is not None:
        data = recognized.inputs(data[0].to(ev.device, ev.dtype)), recognized.targets(data[1].to(ev.device), ev.dtype)
    largest = max(sum(step.micro_sizes) for step in ev.trajectory.steps(0, ev.trajectory.num_steps))
    momentum = any(getattr(rule, "momentum", 0) for rule in rules)
    engine = "team" if uses_teams(ev) else "cpu"
    return Native(recognized, data, largest, momentum, engine), params, batch


def sweep(
    ev: Evaluator,
    columns: Sequence[Column],
    native: Native,
    hessian: Hessian,
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[..., object],
) -> Tensor:
    """Scores [K, N] float64, as `sweep.sweep` gives them; progress(n) is called after every n steps.

    Raises NotCompiled where data that is fetched on the way turns out to have targets of another kind.
    """
    capacity = _padded(native, len(columns), 2 * LINE)  # rows of the first layer's block then begin on cache lines
    scores = torch.zeros(capacity, num_samples, dtype=torch.float64, device=ev.device)
    blocks = make_blocks(ev, native, capacity)
    momenta = None
    if native.momentum:
        momenta = make_blocks(ev, native, capacity)
    views = {name: block.unbind(0) for name, block in blocks.items()}
    ends = sorted({t for column in columns for t in (column.start, column.stop) if t} | {0})
    t = columns[0].stop
    active, flops = 0, flops_per_column(ev, native)
    loaded = range(t, t)
    engine: ops.MlpSweep | mlp_gemm.GemmSweep | None = None
    while t > 0:
        if t == ends[-1]:
            ends.pop()
            _join_and_leave(t, columns, views, query_gradients(t))
            active = sum(column.stop >= t for column in columns)
        if t <= loaded.start or engine is None:
            loaded = range(max(0, t - steps_per_slice(ev, native, t - 1)), t)
            engine = _engine(ev, native, hessian, loaded, blocks, momenta, scores)
        start = max(ends[-1], loaded.start, t - max(1, int(CALL_FLOPS / (flops * active))))
        bad = engine.run(start - loaded.start, t - loaded.start, _padded(native, active))
        if isinstance(engine, mlp_gemm.GemmSweep) and start == loaded.start:  # once a slice: it waits for the GPU
            bad = engine.bad_step()
        if bad is not None:
            bad += loaded.start
            raise LogError(f"step {bad}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)")
        progress(t - start)
        t = start
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64, or check=True to test the log)")
    return scores[: len(columns)]


def _join_and_leave(t: int, columns: Sequence[Column], views: dict[str, tuple[Tensor, ...]], gradients: Params) -> None:
    """`sweep.join_and_leave` on the blocks' columns."""
    leaving = [(k, column.query) for k, column in enumerate(columns) if column.start == t]
    joining = [(k, column.query) for k, column in enumerate(columns) if column.stop == t]
    rows = {name: block.unbind(0) for name, block in gradients.items()}
    if leaving:
        of_columns = [views[name][k] for name in rows for k, _ in leaving]
        torch._foreach_sub_(of_columns, [own[query] for own in rows.values() for _, query in leaving])
    if joining:
        of_columns = [views[name][k] for name in rows for k, _ in joining]
        torch._foreach_copy_(of_columns, [own[query] for own in rows.values() for _, query in joining])


def query_gradients(
    ev: Evaluator, native: Native, asked: Sequence[Query], points: Sequence[int], generic: QueryGradients
) -> QueryGradients:
    """q(t) for the points t: compiled, all at once, where the query is a loss over a set of samples and the device the CPU;
    else `generic`.

    One of the points is compared with the generic gradient: queries run in eval mode, of which the net was not read.
    """
    if (
        native.engine != "cpu"
        or len(asked) != 1
        or asked[0].batch is None
        or len(points) < 2
        or len(points) * ev.num_parameters > SLICE_NUMBERS
    ):
        return generic
    theta = _rows(ev, points)
    args, kwargs, target = ev.unpack(asked[0].batch)
    recognized = native.recognized
    try:
        x, targets = recognized.inputs(*args, **kwargs), recognized.targets(target, ev.dtype)
        flat = torch.zeros_like(theta, memory_format=torch.contiguous_format)
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            weights = torch.full((len(x[rows]),), 1 / len(x), dtype=torch.float64)
            ops.mlp_gradient(recognized.net, theta, x[rows], targets[rows], weights, flat)
    except (TypeError, ValueError, RuntimeError):  # not the inputs or targets of this net
        return generic

    def agrees(position: int) -> bool:
        theirs = torch.cat([value.flatten() for value in generic(points[position]).values()])
        return bool((flat[position] - theirs).abs().max() <= AGREEMENT[ev.dtype] * theirs.abs().max())

    # that of the last point is likely at hand, but may be all rounding where the run has converged
    if not agrees(-1) and not agrees(0):
        return generic
    found = {name: piece[:, None] for name, piece in _split(ev, flat).items()}
    by_point = zip(*(value.unbind(0) for value in found.values()), strict=True)
    at = {t: dict(zip(found, values, strict=True)) for t, values in zip(points, by_point, strict=True)}
    return at.__getitem__


def _rows(ev: Evaluator, points: Sequence[int]) -> Tensor:
    """θ[t] for these t, rising, as rows [n, P]; in one piece of the log where they lie close together."""
    first, last = points[0], points[-1]
    if last - first < 4 * len(points):
        return ev.trajectory.rows(first, last + 1)[[t - first for t in points]].to(ev.dtype)
    return torch.cat([ev.trajectory.rows(t, t + 1) for t in points]).to(ev.dtype)


def _split(ev: Evaluator, flat: Tensor) -> Params:
    """Rows [K, P] as one block [K, *shape] per parameter."""
    pieces = flat.split([shape.numel() for shape in ev.shapes.values()], 1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(ev.shapes.items(), pieces, strict=True)}


def _padded(native: Native, num_columns: int, line: int = LINE) -> int:
    """As many columns as fit the lines that `num_columns` of the first layer take; those added are zero."""
    outputs = native.recognized.net.layers[0].outputs
    if line % outputs or num_columns * outputs == 1:
        return num_columns
    return -(-num_columns * outputs // line) * line // outputs


def make_blocks(ev: Evaluator, native: Native, num_columns: int) -> Params:
    """A zero block [K, *shape] for each parameter."""
    first = native.recognized.parameters[0]
    return {name: mlp.mlp_block(num_columns, s, ev.dtype, name == first, ev.device) for name, s in ev.shapes.items()}


def flops_per_column(ev: Evaluator, native: Native) -> float:
    """Of one step and column, for a batch of the size of the first: 6F, F = 2·B·ΣIO."""
    return 12.0 * len(ev.trajectory.batch_ids(0)) * sum(la.inputs * la.outputs for la in native.recognized.net.layers)


def steps_per_slice(ev: Evaluator, native: Native, t: int) -> int:
    """How many steps such as t are handed over together."""
    numbers = ev.num_parameters
    if native.data is None:
        numbers += len(ev.trajectory.batch_ids(t)) * native.recognized.net.layers[0].inputs
    return max(1, SLICE_NUMBERS // numbers)


def _engine(
    ev: Evaluator,
    native: Native,
    hessian: Hessian,
    loaded: range,
    blocks: Params,
    momenta: Params | None,
    scores: Tensor,
) -> ops.MlpSweep | mlp_gemm.GemmSweep:
    names = native.recognized.parameters
    own = [None if name is None else blocks[name] for name in names]
    own_momenta = None if momenta is None else [None if name is None else momenta[name] for name in names]
    steps = load_steps(ev, native, loaded)
    net = native.recognized.net
    op = mlp_gemm.GemmSweep if native.engine == "gemm" else ops.MlpSweep
    return op(net, steps, own, own_momenta, scores, l2=ev.l2, hessian=hessian)


def load_steps(ev: Evaluator, native: Native, loaded: range) -> mlp.MlpSteps:
    """The steps `loaded` of the log as the ops take them; NotCompiled where they hold what is not compiled."""
    logged = ev.trajectory.steps(loaded.start, loaded.stop)
    theta = ev.trajectory.rows(loaded.start, loaded.stop).to(ev.dtype)
    if not torch.isfinite(theta.sum(1)).all():  # a sum may overflow itself: the exact check is the evaluator's
        for t in loaded:
            ev.params(t)
    ids = torch.cat([step.ids for step in logged])
    if native.data is not None:
        (x, targets), rows = native.data, ids
        if int(ids.max()) >= len(x):
            for t in loaded:
                ev.batches(t)  # says which step
    else:
        batches = [batch for t in loaded for batch in ev.batches(t)]
        check_targets(ev, native.recognized, torch.cat([batch.target for batch in batches]))
        x = torch.cat([native.recognized.inputs(batch.args[0]) for batch in batches])
        targets = torch.cat([native.recognized.targets(batch.target, ev.dtype) for batch in batches])
        rows = torch.arange(len(ids))
    offsets = torch.from_numpy(np.cumsum([0, *(sum(step.micro_sizes) for step in logged)]))
    coefficients = torch.cat([step.coefficients for step in logged])
    steps = mlp.MlpSteps(theta, x, targets, rows, ids, coefficients, offsets, _settings(ev, native, loaded, logged))
    return mlp.on_device(steps, ev.device)


def _settings(ev: Evaluator, native: Native, loaded: range, logged: list[Step]) -> Tensor:
    """[n, 2L, 6] in the order of mlp.SETTINGS."""
    rules, groups = ev.trajectory.optimizer, ev.trajectory.groups
    if any(step.absent for step in logged):
        raise NotCompiled("a parameter was without a gradient in some step")
    table = np.array([step.settings for step in logged])  # [n, groups, settings]
    _check_momentum(rules, table)
    of_parameter = [0 if name is None else groups[name] for name in native.recognized.parameters]
    values = np.zeros((len(logged), len(of_parameter), len(mlp.SETTINGS)))
    for i, name in enumerate(mlp.SETTINGS):
        if name in rules[0].setting_names:
            values[..., i] = table[:, of_parameter, rules[0].setting_names.index(name)]
        elif name != "first":
            values[..., i] = [float(getattr(rules[group], name, 0)) for group in of_parameter]
    if ev.trajectory.slots:
        # steps whose momentum buffer is not there yet
        first = [[name is not None and not counts[name] for name in native.recognized.parameters]
                 for counts in map(ev.trajectory.counts, loaded)]  # fmt: skip
        values[..., mlp.SETTINGS.index("first")] = first
    return torch.from_numpy(values)


def _check_momentum(rules: Sequence[Any], table: Any) -> None:
    """NotCompiled where a schedule takes momentum away for a step, in which torch leaves the buffer alone."""
    momentum = table[..., rules[0].setting_names.index("momentum")]
    if any((momentum[:, group] == 0).any() and rule.momentum for group, rule in enumerate(rules)):
        raise NotCompiled("a momentum that is 0 in some steps is not compiled")
    if any(table[..., rules[0].setting_names.index("maximize")].flat):
        raise NotCompiled("maximize is not compiled")


def _whole_data(ev: Evaluator) -> tuple[Tensor, Tensor] | None:
    """The data as the user gave it, (x, targets); None where batches have to be asked for one by one."""
    tensors: Any = None if ev.problem.samples is None else ev.problem.samples._tensors
    if ev.problem.unpack is not default_unpack or not isinstance(tensors, tuple | list) or len(tensors) != 2:
        return None
    x, target = tensors
    if not isinstance(x, Tensor) or not isinstance(target, Tensor) or {x.device.type, target.device.type} - {"cpu", "cuda"}:
        return None
    in_place = x.dtype == ev.dtype and x.is_contiguous()
    if not x.is_floating_point() or not (in_place or x.numel() <= SLICE_NUMBERS):
        return None
    return x, target


def one_step(ev: Evaluator, native: Native, params: Params, batch: Batch, lr: float) -> mlp.MlpSteps:
    """A step of plain SGD on a batch, whose samples are numbered as they stand in it."""
    size, recognized = len(batch.ids), native.recognized
    settings = torch.zeros(1, len(recognized.parameters), len(mlp.SETTINGS), dtype=torch.float64)
    settings[..., 0] = lr
    steps = mlp.MlpSteps(
        torch.cat([value.flatten() for value in params.values()])[None],
        recognized.inputs(batch.args[0]),
        recognized.targets(batch.target, ev.dtype),
        torch.arange(size),
        torch.arange(size),
        batch.coefficients.double(),
        torch.tensor([0, size]),
        settings,
    )
    return mlp.on_device(steps, ev.device)


def _compare(ev: Evaluator, native: Native, params: Params, batch: Batch, hessian: Hessian) -> None:
    """NotCompiled where dots or Hessian products of a batch differ from those of the generic path."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(1, ev.num_parameters, generator=generator, dtype=torch.float64).to(ev.device, ev.dtype)
    probe = _split(ev, flat)
    dots, hvp = linearize(ev, params, batch, hessian)[1](probe)
    size, recognized = len(batch.ids), native.recognized
    # lr = −1 makes c = u, coefficients enter the scores as −a_b
    steps = one_step(ev, native, params, batch, lr=-1.0)
    blocks = make_blocks(ev, native, 1)
    for name, value in probe.items():
        blocks[name].copy_(value)
    scores = torch.zeros(1, size, dtype=torch.float64, device=ev.device)
    own = [None if name is None else blocks[name] for name in recognized.parameters]
    if native.engine == "team":
        joins = torch.ones(1, dtype=torch.int64, device=ev.device)
        team = native.team(ev, 1, hessian)
        options: dict[str, Any] = {"l2": ev.l2, "hessian": hessian}
        mlp_team.TeamSweep(recognized.net, steps, own, None, scores, joins, 0 * joins, None, team, **options).run()
    else:
        op = mlp_gemm.GemmSweep if native.engine == "gemm" else ops.MlpSweep
        op(recognized.net, steps, own, None, scores, l2=ev.l2, hessian=hessian).run(0, 1, 1)
    moved, expected = (torch.cat([own[name].flatten() for name in probe]) for own in (blocks, hvp))
    weighted = dots * batch.coefficients.double()
    # beside the rounding of the numbers that the products were added to
    rounding = 4 * torch.finfo(ev.dtype).eps * float(flat.abs().max())
    for error, scale, least in (
        (scores + weighted, weighted, 0.0),
        (moved - flat[0] - expected, expected, rounding / AGREEMENT[ev.dtype]),
    ):
        off, largest = float(error.abs().max()), float(scale.abs().max())
        if not off <= AGREEMENT[ev.dtype] * max(largest, least):
            raise NotCompiled(
                f"it does not agree with the generic path on the first batch ({off / (largest or 1):.1g} relative)"
            )
