"""Compiled retraining of feed-forward nets: many steps and all models in one call of `ops.MlpRetrain`."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dit_fast import mlp, mlp_team, native, ops
from dit_fast.native import AGREEMENT, CALL_FLOPS, Native
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.queries import Query
from dit_fast.recognize import NotCompiled

# of a call on a GPU, some tenths of a second
CUDA_CALL_FLOPS = 1e12

# (batch, models [n, *shape], the samples each lacks) → batch gradients of the n models, by the generic path
Gradients = Callable[[Batch, Params, Sequence[Tensor]], Params]
# (θ, query, d [n, *shape]) → query(θ + d_j) − query(θ) [1, n]
QueryChanges = Callable[[Params, Query, Params], Tensor]


def prepare(ev: Evaluator, gradients: Gradients) -> Native:
    """The compiled path of this problem, proved on the first batch of the log; NotCompiled says why there is none."""
    compiled, params, batch = native.read(ev)
    if compiled.engine == "team":
        compiled.team(ev, 1, retrain=True)
    _compare(ev, compiled, params, batch, gradients)
    return compiled


def advance(
    ev: Evaluator,
    compiled: Native,
    removed: Sequence[Tensor],
    first: Sequence[int],
    ends: Sequence[int],
    progress: Callable[..., object],
) -> Iterator[tuple[int, Params]]:
    """(t, d [n, *shape]) at every end t, rising; d is overwritten afterwards. progress(n) is called after every n steps.

    removed: the samples each model lacks; first: the step it differs in first, rising.
    Raises NotCompiled where something on the way is not as the first batch showed it.
    """
    gram = native.inner_products(ev, compiled, sum(ends[-1] - t for t in first), len(ends) * len(removed))
    own = native.blocks(ev, compiled, len(removed), gram)
    momenta = native.blocks(ev, compiled, len(removed), gram) if compiled.momentum else None
    models = mlp.mlp_models([0] * len(removed), removed, ev.num_samples)
    joins = torch.tensor(first)
    # forward, backward and the weights' gradient: half of what a column of the sweep takes
    flops = CUDA_CALL_FLOPS if ev.device.type == "cuda" else CALL_FLOPS
    steps_per_call = max(1, int(flops / (native.flops_per_column(ev, compiled) / 2 * len(removed))))
    t, loaded = 0, range(0)
    engine: ops.MlpRetrain | mlp_team.TeamRetrain | None = None
    for end in ends:
        while t < end:
            if t >= loaded.stop or engine is None:
                loaded = range(t, min(ends[-1], t + native.steps_per_slice(ev, compiled, t)))
                steps = native.load_steps(ev, compiled, loaded)
                own_models = mlp.MlpModels(joins - t, models.offsets, models.removed)
                engine = _engine(ev, compiled, steps, own_models, own, momenta, gram)
            stop = min(end, loaded.stop, t + steps_per_call)
            engine.run(t - loaded.start, stop - loaded.start)
            progress(stop - t)
            t = stop
        yield end, _differences(ev, compiled, own, gram)


def _differences(ev: Evaluator, compiled: Native, own: Sequence[Tensor | None], gram: Tensor | None) -> Params:
    """d by the parameters' names; with gram the first weight's is put together from the samples."""
    first = own[0]
    if gram is not None and first is not None and compiled.data is not None:
        combinations = first.permute(2, 0, 1)  # [M, n, O], as it lies in memory
        made = compiled.data[0].T @ combinations.flatten(1)
        own = [made.unflatten(1, combinations.shape[1:]).permute(1, 2, 0), *own[1:]]
    return native.by_name(ev, compiled, own)


def _engine(
    ev: Evaluator,
    compiled: Native,
    steps: mlp.MlpSteps,
    models: mlp.MlpModels,
    blocks: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None] | None,
    gram: Tensor | None,
) -> ops.MlpRetrain | mlp_team.TeamRetrain:
    net = compiled.recognized.net
    if compiled.engine == "cpu":
        return ops.MlpRetrain(net, steps, models, blocks, momenta, gram=gram, l2=ev.l2)
    team = compiled.team(ev, len(models.joins), retrain=True)
    return mlp_team.TeamRetrain(net, steps, mlp.on_device(models, ev.device), blocks, momenta, team, l2=ev.l2)


def query_changes(ev: Evaluator, compiled: Native, query: Query, params: Params, generic: QueryChanges) -> QueryChanges:
    """Compiled where the query is a loss over a set of samples and the device the CPU, else `generic`.

    ev: in float64. params: θ somewhere, where two models are compared with the generic path: queries run in eval mode, of
    which the net was not read.
    """
    if query.batch is None or compiled.engine != "cpu":
        return generic
    net, names = compiled.recognized.net, compiled.recognized.parameters
    args, kwargs, target = ev.unpack(query.batch)

    def changes(params: Params, query: Query, shifts: Params) -> Tensor:
        theta = torch.cat([params[name].double().flatten() for name in ev.shapes])
        size = len(next(iter(shifts.values())))
        blocks = [
            None if name is None else mlp.mlp_block(size, ev.shapes[name], ev.dtype, i == 0).copy_(shifts[name])
            for i, name in enumerate(names)
        ]
        found = torch.zeros(size, dtype=torch.float64)
        weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        ops.mlp_loss_changes(net, theta, x, targets, weights, blocks, found)
        return found[None]

    probe = _probe(params, names[0])
    try:
        x, targets = compiled.recognized.inputs(*args, **kwargs), compiled.recognized.targets(target, ev.dtype)
        ours = changes(params, query, probe)
    except (TypeError, ValueError, RuntimeError):  # not the inputs or targets of this net
        return generic
    theirs = generic(params, query, probe)
    return changes if _agree(ours, theirs, torch.float64) else generic


def _agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype, scale: float = 0.0) -> bool:
    return float((ours - theirs).abs().max()) <= AGREEMENT[dtype] * max(scale, float(theirs.abs().max()))


def _probe(params: Params, first: str | None) -> Params:
    """Two differences as large as the parameters themselves, laid out as the op takes them."""
    generator = torch.Generator().manual_seed(0)
    probe = {}
    for name, value in params.items():
        probe[name] = mlp.mlp_block(2, value.shape, value.dtype, name == first, value.device)
        size = float(value.double().square().mean().sqrt()) or 0.1
        probe[name].copy_(size * torch.randn(2, *value.shape, generator=generator, dtype=torch.float64))
    return probe


def _compare(ev: Evaluator, compiled: Native, params: Params, batch: Batch, gradients: Gradients) -> None:
    """NotCompiled where the gradients' difference for two models, of which one lacks a sample, is not the generic one's."""
    names = compiled.recognized.parameters
    probe = _probe(params, names[0])
    removed = [batch.ids[:1], batch.ids[:0]]
    points = {name: torch.cat([value[None], value + probe[name]]) for name, value in params.items()}
    theirs = {name: value[1:] - value[0] for name, value in gradients(batch, points, [batch.ids[:0], *removed]).items()}
    blocks = {name: value.clone() for name, value in probe.items()}
    # lr = −1 makes d + g of d
    steps = native.one_step(ev, compiled, params, batch, lr=-1.0)
    # samples are numbered as they stand in the batch: all places of the one that is removed
    places = [torch.isin(batch.ids, ids).nonzero().flatten() for ids in removed]
    models = mlp.mlp_models([0, 0], places, len(batch.ids))
    own = [None if name is None else blocks[name] for name in names]
    _engine(ev, compiled, steps, models, own, None, None).run(0, 1)
    largest = max(float(value.abs().max()) for value in theirs.values())
    rounding = 4 * torch.finfo(ev.dtype).eps / AGREEMENT[ev.dtype]
    for name, value in theirs.items():
        scale = max(largest, rounding * float(probe[name].abs().max()))
        if not _agree(blocks[name] - probe[name], value, ev.dtype, scale):
            raise NotCompiled("its gradients do not agree with the generic path's on the first batch")
