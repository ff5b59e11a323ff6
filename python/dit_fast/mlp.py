"""Feed-forward nets and their logged steps as the compiled ops take them, and the checks of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")
LOSSES = ("cross_entropy", "bce_logits", "squared_error")
CURVATURES = ("exact", "ggn", "none")
SETTINGS = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "first")


@dataclass(frozen=True)
class MlpLayer:
    """h ↦ φ(h Wᵀ + b), W [outputs, inputs]; weight and bias are their positions in a flat row θ, bias None for none.

    activation: one of ACTIVATIONS; slope: that of leaky_relu left of 0.
    """

    outputs: int
    inputs: int
    weight: int
    bias: int | None
    activation: str = "identity"
    slope: float = 0.0


@dataclass(frozen=True)
class Mlp:
    """A feed-forward net with its per-sample loss, `loss_scale` times one of LOSSES (csrc/loss.h)."""

    layers: tuple[MlpLayer, ...]
    loss: str
    loss_scale: float = 1.0


@dataclass(frozen=True)
class MlpSteps:
    """n consecutive steps of a log, all on one device; floating ones of one dtype, `coefficients` and `settings` float64.

    theta [n, P]: flat parameters before each step. x [M, I] and targets (classes [M] int64 for cross_entropy, else [M, O]):
    the data. Step t used rows[offsets[t] : offsets[t+1]] of it, which are the samples `ids` with coefficients a; rows, ids,
    offsets int64. settings [n, 2L, 6]: of the weight and the bias of each layer, in the order of SETTINGS.
    """

    theta: Tensor
    x: Tensor
    targets: Tensor
    rows: Tensor
    ids: Tensor
    coefficients: Tensor
    offsets: Tensor
    settings: Tensor


@dataclass(frozen=True)
class MlpVisits:
    """When K columns join a sweep over the steps of `MlpSteps` and leave it, and with what; int64 [K], on the CPU.

    Column k takes part in the steps t < joins[k], which fall with k: once the steps from joins[k] on are done it becomes row
    joining[k] of `gradients` [n, P], laid out as theta. Row leaving[k] is subtracted from it once the steps from leaves[k] on
    are done; 0 or less for never. What has not joined must be zero.
    """

    joins: Tensor
    leaves: Tensor
    joining: Tensor
    leaving: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class MlpModels:
    """K counterfactual models: which join when, and what each lacks; int64.

    joins [K], rising: the step of `MlpSteps` from which a model differs, 0 or less for one that does already. The models
    removed[offsets[i] : offsets[i+1]] lack sample i, each named once; offsets [N+1] for ids below N.
    """

    joins: Tensor
    offsets: Tensor
    removed: Tensor


Record = TypeVar("Record", MlpSteps, MlpModels)


def mlp_models(joins: Sequence[int], removed: Sequence[Tensor], num_samples: int) -> MlpModels:
    """Models that lack the samples removed[j] [n_j]."""
    models = torch.repeat_interleave(torch.arange(len(removed)), torch.tensor([len(ids) for ids in removed], dtype=torch.int64))
    # by sample, then by model, each pair once
    pairs = (torch.cat([*removed, torch.zeros(0, dtype=torch.int64)]) * max(len(removed), 1) + models).unique()
    samples, models = pairs // max(len(removed), 1), pairs % max(len(removed), 1)
    offsets = torch.zeros(num_samples + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(samples, minlength=num_samples).cumsum(0)
    return MlpModels(torch.tensor(joins, dtype=torch.int64), offsets, models)


def on_device(record: Record, device: torch.device) -> Record:
    """Steps or models with all their tensors on a device."""
    return replace(record, **{name: value.to(device, non_blocking=True) for name, value in vars(record).items()})


def mlp_block(
    num_columns: int, shape: Sequence[int], dtype: torch.dtype, first: bool, device: torch.device | None = None
) -> Tensor:
    """A zero block [K, *shape] for a parameter of `MlpSweep` or `MlpRetrain`; `first`: that of the first layer's weight."""
    if first:
        return torch.zeros(shape[1], num_columns, shape[0], dtype=dtype, device=device).permute(1, 2, 0)
    return torch.zeros(num_columns, *shape, dtype=dtype, device=device)


def check_sweep(
    net: Mlp,
    steps: MlpSteps,
    blocks: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None] | None,
    scores: Tensor,
    visits: MlpVisits | None = None,
    gram: Tensor | None = None,
    l2: float = 0.0,
) -> None:
    """What `ops.MlpSweep` refuses: TypeError or ValueError that names the argument."""
    K, N = scores.shape
    _check_tensors(steps.theta.device, ("scores", scores, torch.float64, (K, N)))
    _check_steps(net, steps, blocks, momenta, K, N, gram, l2)
    if visits is not None:
        _check_visits(steps, visits, K)


def _check_visits(steps: MlpSteps, visits: MlpVisits, most: int) -> None:
    K, n = len(visits.joins), len(visits.gradients)
    if most < K:
        raise ValueError(f"joins names {K} columns, the blocks hold {most}")
    names = ("joins", "leaves", "joining", "leaving")
    _check_tensors(torch.device("cpu"), *((name, getattr(visits, name), torch.int64, (K,)) for name in names))
    _check_tensors(steps.theta.device, ("gradients", visits.gradients, steps.theta.dtype, (n, steps.theta.shape[1])))
    _check_range("joining", visits.joining, n)
    _check_range("leaving", visits.leaving, n)
    if bool((visits.joins.diff() > 0).any()):
        raise ValueError("joins must fall: columns are sorted by their last step")


def check_retrain(
    net: Mlp,
    steps: MlpSteps,
    models: MlpModels,
    blocks: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None] | None,
    gram: Tensor | None = None,
    l2: float = 0.0,
) -> None:
    """The same for `ops.MlpRetrain`."""
    K, N, R = len(models.joins), len(models.offsets) - 1, len(models.removed)
    _check_tensors(
        steps.theta.device,
        ("joins", models.joins, torch.int64, (K,)),
        ("removed", models.removed, torch.int64, (R,)),
        ("models.offsets", models.offsets, torch.int64, (N + 1,)),
    )
    _check_range("removed", models.removed, K)
    if int(models.offsets[0]) != 0 or int(models.offsets[-1]) != R or bool((models.offsets.diff() < 0).any()):
        raise ValueError(f"models.offsets must rise from 0 to the number of removed, {R}")
    if bool((models.joins.diff() < 0).any()):
        raise ValueError("joins must rise: models are sorted by their first step")
    _check_steps(net, steps, blocks, momenta, K, N, gram, l2)


def check_loss_changes(
    net: Mlp, theta: Tensor, x: Tensor, targets: Tensor, coefficients: Tensor, blocks: Sequence[Tensor | None], changes: Tensor
) -> None:
    """The same for `ops.mlp_loss_changes`."""
    check_data(net, theta[None], x, targets, coefficients, torch.arange(len(x), device=x.device))
    _check_tensors(
        theta.device,
        ("changes", changes, torch.float64, (len(changes),)),
        *_blocks(net, "blocks", blocks, len(changes), theta.dtype),
    )


def _check_steps(
    net: Mlp,
    steps: MlpSteps,
    blocks: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None] | None,
    K: int,
    N: int,
    gram: Tensor | None = None,
    l2: float = 0.0,
) -> None:
    n, B, M = len(steps.theta), len(steps.rows), len(steps.x)
    first_inputs = None if gram is None else M
    check_data(net, steps.theta, steps.x, steps.targets, steps.coefficients, steps.rows)
    _check_tensors(
        steps.theta.device,
        ("ids", steps.ids, torch.int64, (B,)),
        ("offsets", steps.offsets, torch.int64, (n + 1,)),
        ("settings", steps.settings, torch.float64, (n, 2 * len(net.layers), len(SETTINGS))),
        *_blocks(net, "blocks", blocks, K, steps.theta.dtype, first_inputs),
        *(_blocks(net, "momenta", momenta, K, steps.theta.dtype, first_inputs) if momenta is not None else ()),
    )
    if gram is not None:
        _check_tensors(steps.theta.device, ("gram", gram, steps.theta.dtype, (M, M)))
        if l2:
            raise ValueError("gram cannot be used with l2, whose part of the gradient is no combination of samples")
    _check_range("ids", steps.ids, N)
    if int(steps.offsets[0]) != 0 or int(steps.offsets[-1]) != B or bool((steps.offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of rows, {B}")
    if momenta is None and bool(steps.settings[..., SETTINGS.index("momentum")].any()):
        raise ValueError("momenta must be given where a step has momentum")


def check_data(net: Mlp, theta: Tensor, x: Tensor, targets: Tensor, coefficients: Tensor, rows: Tensor) -> None:
    """The same for a net, its parameters and its data."""
    if not net.layers or any(a.outputs != b.inputs for a, b in zip(net.layers, net.layers[1:], strict=False)):
        raise ValueError("layers must be at least one, each with as many inputs as the one before has outputs")
    wanted, M, O = theta.dtype, len(x), net.layers[-1].outputs
    if wanted not in (torch.float32, torch.float64):
        raise TypeError(f"theta must be float32 or float64, got {_short(wanted)}")
    labelled = net.loss == "cross_entropy"
    _check_tensors(
        theta.device,
        ("theta", theta, wanted, (len(theta), theta.shape[1])),
        ("x", x, wanted, (M, net.layers[0].inputs)),
        ("targets", targets, torch.int64 if labelled else wanted, (M,) if labelled else (M, O)),
        ("rows", rows, torch.int64, (len(rows),)),
        ("coefficients", coefficients, torch.float64, (len(rows),)),
    )
    _check_range("rows", rows, M)
    if labelled:
        _check_range("targets", targets, O)
    for layer in net.layers:
        ends = [layer.weight + layer.outputs * layer.inputs, 0 if layer.bias is None else layer.bias + layer.outputs]
        if max(ends) > theta.shape[1] or layer.weight < 0 or (layer.bias or 0) < 0:
            raise ValueError(f"a layer's parameters end at {max(ends)}, beyond the row of {theta.shape[1]}")


def _check_tensors(device: torch.device, *wanted: tuple[str, Tensor, torch.dtype, tuple[int, ...]]) -> None:
    for name, tensor, dtype, shape in wanted:
        turned = name[-3:] == "[0]"
        if (
            not turned
            and tensor.shape == shape
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {_short(dtype)}, got {_short(tensor.dtype)}")
        if turned:
            fits = tensor.permute(2, 0, 1).is_contiguous()
        else:
            rows_alone = name in ("x", "theta", "scores") and tensor.shape[1] > 0 and tensor.stride(1) == 1
            fits = tensor.is_contiguous() or (rows_alone and tensor.stride(0) >= tensor.shape[1])
        if tensor.device != device or not fits:
            layout = "as mlp_block makes it" if turned else "contiguous"
            raise ValueError(f"{name} must be {layout} and on {device}, as theta is")


def _blocks(
    net: Mlp, what: str, blocks: Sequence[Tensor | None], K: int, dtype: torch.dtype, first_inputs: int | None = None
) -> list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]]:
    if len(blocks) != 2 * len(net.layers):
        raise ValueError(f"{what} must hold a weight's and a bias's block per layer, {2 * len(net.layers)}, got {len(blocks)}")
    wanted: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = []
    for i, (layer, block) in enumerate(zip((la for la in net.layers for _ in range(2)), blocks, strict=True)):
        if (block is None) != (i % 2 == 1 and layer.bias is None):
            raise ValueError(f"{what}[{i}] must be {'None' if block is not None else 'a tensor'}")
        if block is not None:
            inputs = first_inputs if i == 0 and first_inputs is not None else layer.inputs
            shape = (K, layer.outputs) if i % 2 else (K, layer.outputs, inputs)
            wanted.append((f"{what}[{i}]", block, dtype, shape))
    return wanted


def _check_range(name: str, values: Tensor, end: int) -> None:
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must lie in 0..{end - 1}, got {low}..{high}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
