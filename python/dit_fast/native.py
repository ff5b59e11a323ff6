"""What compiled sweeps and retraining of feed-forward nets share: the net recognised and proved, its blocks, the log loaded."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import mlp, mlp_gemm, mlp_team, ops
from dit_fast.data import default_unpack
from dit_fast.linearize import Hessian, linearize
from dit_fast.log import Step
from dit_fast.optimizers import SGD
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.recognize import NotCompiled, Recognized, check_targets, recognize

# the compiled path must meet the generic one on a batch of the log
COMPARED_SAMPLES = 16
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-10}

# a call does about this much work (0.05 s at 20 GFLOP/s), so that Ctrl-C and progress do not wait longer
CALL_FLOPS = 1e9
# samples whose inner products are kept at most, and the share of the products that they must leave: between 0.75 and 0.8
# they cost what they save, over a dozen shapes on one Zen 4 core
MOST_GRAM_ROWS, GRAM_SHARE = 4096, 0.7
# rows of them are made at a time, and what is symmetric is copied
GRAM_BLOCK = 64
# numbers of the log and of the data that are copied at a time where they cannot be used in place
SLICE_NUMBERS = 1 << 24


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


def split(ev: Evaluator, flat: Tensor) -> Params:
    """Rows [K, P] as one block [K, *shape] per parameter."""
    pieces = flat.split([shape.numel() for shape in ev.shapes.values()], 1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(ev.shapes.items(), pieces, strict=True)}


def blocks(ev: Evaluator, native: Native, num_columns: int, gram: Tensor | None = None) -> list[Tensor | None]:
    """A zero block [K, *shape] for each parameter in the order of the layers, None for an absent bias.

    With gram (`inner_products`) the first weight's has a column per sample, not per input.
    """
    made: list[Tensor | None] = []
    for i, name in enumerate(native.recognized.parameters):
        shape = None if name is None else ev.shapes[name]
        if i == 0 and gram is not None and shape is not None:
            shape = torch.Size((shape[0], len(gram)))
        made.append(None if shape is None else mlp.mlp_block(num_columns, shape, ev.dtype, i == 0, ev.device))
    return made


def by_name(ev: Evaluator, native: Native, blocks: Sequence[Tensor | None]) -> Params:
    """The same blocks by the parameters' names, in the order of θ."""
    named = {n: block for n, block in zip(native.recognized.parameters, blocks, strict=True) if n and block is not None}
    return {name: named[name] for name in ev.shapes}


def inner_products(ev: Evaluator, native: Native, steps: int, visits: int) -> Tensor | None:
    """x xᵀ [M, M] of the samples where the first layer is cheaper in terms of them (`ops.MlpSweep`, `ops.MlpRetrain`).

    steps: of all columns or models together; visits: how often one is made of the inputs, or read as such. A step costs 2·B·I·O
    products of the first layer, or M·B·O; to begin with ½·M²·I, and M·I·O for each visit.
    """
    if native.engine != "cpu" or native.data is None or ev.l2:
        return None
    x = native.data[0]
    (M, I), O, batch = x.shape, native.recognized.net.layers[0].outputs, len(ev.trajectory.batch_ids(0))
    products = M * M * I / 2 + visits * M * I * O + steps * M * batch * O
    if M > MOST_GRAM_ROWS or products > GRAM_SHARE * 2 * steps * batch * I * O:
        return None
    gram = x.new_empty(M, M)
    for start in range(0, M, GRAM_BLOCK):
        rows = slice(start, start + GRAM_BLOCK)
        torch.mm(x[rows], x[: rows.stop].T, out=gram[rows, : rows.stop])
        gram[:start, rows] = gram[rows, :start].T
    # a sample that no step took may hold anything, which a sum over all samples would spread
    return gram if math.isfinite(float(gram.sum())) else None


def flops_per_column(ev: Evaluator, native: Native) -> float:
    """Of one step and column, for a batch of the size of the first: 6F, F = 2·B·ΣIO."""
    return 12.0 * len(ev.trajectory.batch_ids(0)) * sum(la.inputs * la.outputs for la in native.recognized.net.layers)


def steps_per_slice(ev: Evaluator, native: Native, t: int) -> int:
    """How many steps such as t are handed over together."""
    numbers = ev.num_parameters
    if native.data is None:
        numbers += len(ev.trajectory.batch_ids(t)) * native.recognized.net.layers[0].inputs
    return max(1, SLICE_NUMBERS // numbers)


def load_steps(ev: Evaluator, native: Native, loaded: range) -> mlp.MlpSteps:
    """The steps `loaded` of the log as the ops take them; NotCompiled where they hold what is not compiled."""
    logged = ev.trajectory.steps(loaded.start, loaded.stop)
    theta = ev.trajectory.rows(loaded.start, loaded.stop).to(ev.dtype)
    if not math.isfinite(float(theta.sum())):  # a sum may overflow itself: the exact check is the evaluator's
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
    offsets = torch.tensor([0, *itertools.accumulate(sum(step.micro_sizes) for step in logged)])
    coefficients = torch.cat([step.coefficients for step in logged])
    steps = mlp.MlpSteps(theta, x, targets, rows, ids, coefficients, offsets, _settings(ev, native, loaded, logged))
    return mlp.on_device(steps, ev.device)


def _settings(ev: Evaluator, native: Native, loaded: range, logged: list[Step]) -> Tensor:
    """[n, 2L, 6] in the order of mlp.SETTINGS."""
    rules, groups = ev.trajectory.optimizer, ev.trajectory.groups
    if any(step.absent for step in logged):
        raise NotCompiled("a parameter was without a gradient in some step")
    numbers = itertools.chain.from_iterable(itertools.chain.from_iterable(step.settings for step in logged))
    table = np.fromiter(numbers, np.float64).reshape(len(logged), len(rules), -1)
    _check_momentum(rules, table)
    # what is not logged with every step is the rule's own
    others = [name for name in mlp.SETTINGS if name not in rules[0].setting_names]
    own = [[0.0 if name == "first" else float(getattr(rule, name, 0)) for name in others] for rule in rules]
    wide = np.concatenate([table, np.broadcast_to(np.array(own), (len(logged), len(rules), len(others)))], 2)
    columns = [*rules[0].setting_names, *others]
    of_parameter = [[0] if name is None else [groups[name]] for name in native.recognized.parameters]
    values = wide[:, of_parameter, [columns.index(name) for name in mlp.SETTINGS]]
    if ev.trajectory.slots:
        # steps whose momentum buffer is not there yet
        first = [[name is not None and not counts[name] for name in native.recognized.parameters]
                 for counts in map(ev.trajectory.counts, loaded)]  # fmt: skip
        values[..., mlp.SETTINGS.index("first")] = first
    return torch.from_numpy(np.ascontiguousarray(values))


def _check_momentum(rules: Sequence[Any], table: Any) -> None:
    """NotCompiled where a schedule takes momentum away for a step, in which torch leaves the buffer alone."""
    momentum = table[..., rules[0].setting_names.index("momentum")]
    if any(rule.momentum and (momentum[:, group] == 0).any() for group, rule in enumerate(rules)):
        raise NotCompiled("a momentum that is 0 in some steps is not compiled")
    if table[..., rules[0].setting_names.index("maximize")].any():
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
    probe = split(ev, flat)
    dots, hvp = linearize(ev, params, batch, hessian)[1](probe)
    size, recognized = len(batch.ids), native.recognized
    # lr = −1 makes c = u, coefficients enter the scores as −a_b
    steps = one_step(ev, native, params, batch, lr=-1.0)
    own = blocks(ev, native, 1)
    named = by_name(ev, native, own)
    for name, value in probe.items():
        named[name].copy_(value)
    scores = torch.zeros(1, size, dtype=torch.float64, device=ev.device)
    if native.engine == "team":
        joins = torch.ones(1, dtype=torch.int64, device=ev.device)
        team = native.team(ev, 1, hessian)
        options: dict[str, Any] = {"l2": ev.l2, "hessian": hessian}
        mlp_team.TeamSweep(recognized.net, steps, own, None, scores, joins, 0 * joins, None, team, **options).run()
    else:
        op = mlp_gemm.GemmSweep if native.engine == "gemm" else ops.MlpSweep
        op(recognized.net, steps, own, None, scores, l2=ev.l2, hessian=hessian).run(0, 1)
    moved, expected = (torch.cat([values[name].flatten() for name in probe]) for values in (named, hvp))
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
