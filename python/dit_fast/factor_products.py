"""The primitive on per-sample gradients in factors (factored.py): inner products and curvature products of whole blocks.

Nothing of a model is needed. A block U holds K directions, [K, *shape] per parameter; rows J_br are those of one
micro-batch, with R of them per sample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.factored import Factors, Lookup, Outer, Part, Plain

Block = dict[str, Tensor]
Pull = Callable[[Block], tuple[Tensor, Block]]


def names(part: Part) -> list[str]:
    """The parameters whose gradients a part holds."""
    if isinstance(part, Plain):
        return [part.name]
    return [part.weight] if isinstance(part, Lookup) or part.bias is None else [part.weight, part.bias]


def rows_of(part: Part) -> Tensor:
    """The tensor of a part that has one slice for each row of each sample, [B, R, ...]."""
    return part.rows if isinstance(part, Plain) else part.deltas


def placed(factors: Factors, device: torch.device, dtype: torch.dtype) -> Factors:
    """The same on a device and in a dtype, as the ops take it; slopes, curvature and coefficients in float64."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).contiguous()

    def part(part: Part) -> Part:
        if isinstance(part, Outer):
            return replace(part, inputs=place(part.inputs), deltas=place(part.deltas))
        if isinstance(part, Lookup):
            return replace(part, indices=part.indices.to(device), deltas=place(part.deltas))
        return replace(part, rows=place(part.rows))

    return replace(
        factors,
        ids=factors.ids.to(device),
        coefficients=factors.coefficients.to(device, torch.float64),
        slopes=factors.slopes.to(device, torch.float64),
        curvature=factors.curvature.to(device, torch.float64),
        parts=tuple(part(p) for p in factors.parts),
    )


def gradients_alone(factors: Factors) -> Factors:
    """One row per sample, its gradient ∇ℓ_b = Σ_r s[b,r] J_br, with the curvature of the empirical Fisher, M = 1."""
    slopes = factors.slopes
    ones = slopes.new_ones(len(slopes), 1)
    if slopes.shape[1] == 1 and bool((slopes == 1).all()):
        return replace(factors, curvature=ones[:, :, None])

    def weighted(rows: Tensor) -> Tensor:
        if slopes.shape[1] == 1:
            return rows * slopes.to(rows).view(-1, *[1] * (rows.ndim - 1))
        return torch.einsum("br,br...->b...", slopes.to(rows), rows)[:, None].contiguous()

    def part(part: Part) -> Part:
        if isinstance(part, Plain):
            return replace(part, rows=weighted(part.rows))
        return replace(part, deltas=weighted(part.deltas))

    parts = tuple(part(p) for p in factors.parts)
    return replace(factors, slopes=ones, curvature=ones[:, :, None], parts=parts)


def row_dots(factors: Factors, block: Mapping[str, Tensor], scales: Mapping[str, float] | None = None) -> Tensor:
    """⟨U_k, J_br⟩ [K, B, R] float64; each parameter's part times its `scales` where they are given."""
    groups: dict[float, list[Part]] = {}
    for part in factors.parts:
        for scale, piece in _by_scale(part, scales):
            groups.setdefault(scale, []).append(piece)
    total = _no_dots(factors, block)
    for scale, parts in groups.items():
        if scale == 0:
            continue
        target = total if len(groups) == 1 else torch.zeros_like(total)
        ops.grad_dot_layers(target, [(p.deltas, p.inputs, *_directions(p, block)) for p in parts if isinstance(p, Outer)])
        for part in parts:
            _add_dots(part, block, target)
        if target is not total:
            total.add_(target, alpha=scale)
        elif scale != 1:
            total.mul_(scale)
    return total


def add_rows(factors: Factors, weights: Tensor, block: Mapping[str, Tensor], alpha: float = 1.0) -> None:
    """U_k = alpha·U_k + Σ_br weights[k,b,r] J_br in place, weights [K, B, R] float64."""
    weights = weights.contiguous()
    layers = [(*_directions(p, block), p.deltas, p.inputs) for p in factors.parts if isinstance(p, Outer)]
    ops.lowrank_update_layers(weights, layers, alpha)
    for part in factors.parts:
        _add_rows(part, weights, block, alpha)


def add_rows_and_dot(
    factors: Factors, weights: Tensor, after: Factors, block: Mapping[str, Tensor], alpha: float = 1.0
) -> Tensor:
    """`add_rows` and then `row_dots` of other factors of the same layers, in one pass over the layers' U."""
    weights, total = weights.contiguous(), _no_dots(after, block)
    own, other = ([p for p in f.parts if isinstance(p, Outer)] for f in (factors, after))
    layers = [(*_directions(p, block), p.deltas, p.inputs, q.deltas, q.inputs) for p, q in zip(own, other, strict=True)]
    ops.update_dot_layers(weights, total, layers, alpha)
    for part in factors.parts:
        _add_rows(part, weights, block, alpha)
    for part in after.parts:
        _add_dots(part, block, total)
    return total


def are_alike(factors: Factors, other: Factors) -> bool:
    """Whether both have the same layers in the same order."""
    return [(type(p), *names(p)) for p in factors.parts] == [(type(p), *names(p)) for p in other.parts]


def in_parts_of(factors: Factors, like: Factors) -> Factors | None:
    """The same rows in the parts that others of these parameters have, written out where those are; None where not."""
    own = {tuple(names(part)): part for part in factors.parts}
    parts: list[Part] = []
    for part in like.parts:
        found = own.get(tuple(names(part)))
        if found is not None and type(found) is type(part):
            parts.append(found)
            continue
        if not isinstance(part, Plain):
            return None
        outer = next((p for p in factors.parts if isinstance(p, Outer) and part.name in names(p)), None)
        if outer is None:
            return None
        if part.name == outer.bias:
            rows = outer.deltas.sum(2)
        else:
            rows = torch.einsum("brso,bsi->broi", outer.deltas, outer.inputs).unflatten(3, part.rows.shape[3:])
        parts.append(Plain(part.name, rows))
    return replace(factors, parts=tuple(parts))


def _no_dots(factors: Factors, block: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(block.values()))
    return torch.zeros(len(first), *factors.slopes.shape, dtype=torch.float64, device=first.device)


def _directions(part: Outer, block: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """U [K, O, I] and v [K, O] of a layer."""
    return block[part.weight].flatten(2), None if part.bias is None else block[part.bias]


def _by_scale(part: Part, scales: Mapping[str, float] | None) -> list[tuple[float, Part]]:
    """The part with its scale; its weight and its bias each with theirs where they differ."""
    if scales is None:
        return [(1.0, part)]
    weight, *bias = (scales[name] for name in names(part))
    if not bias or bias[0] == weight or not isinstance(part, Outer):
        return [(weight, part)]
    assert part.bias is not None
    return [(weight, replace(part, bias=None)), (bias[0], Plain(part.bias, part.deltas.sum(2)))]


def _add_dots(part: Part, block: Mapping[str, Tensor], total: Tensor) -> None:
    """Adds the ⟨U_k, J_br⟩ of what is no layer of the ops."""
    if isinstance(part, Lookup):
        found = block[part.weight][:, part.indices]  # [K, B, S, O]
        total += torch.einsum("kbso,brso->kbr", found.double(), part.deltas.double())
    elif isinstance(part, Plain):
        rows = part.rows.flatten(2)
        total += (block[part.name].flatten(1).double() @ rows.flatten(0, 1).double().T).view(total.shape)


def _add_rows(part: Part, weights: Tensor, block: Mapping[str, Tensor], alpha: float) -> None:
    """The same for updates."""
    if isinstance(part, Lookup):
        deltas = torch.einsum("kbr,brso->kbso", weights.to(part.deltas), part.deltas)
        block[part.weight].mul_(alpha).index_add_(1, part.indices.flatten(), deltas.flatten(1, 2))
    elif isinstance(part, Plain):
        rows = part.rows.flatten(0, 1).flatten(1)
        target = block[part.name]
        target.mul_(alpha).add_((weights.flatten(1).to(rows) @ rows).view(target.shape))


def batch_gradient(factors: Factors, shapes: Mapping[str, torch.Size]) -> Block:
    """g = Σ_b a_b ∇ℓ_b of one micro-batch, without the l2 part."""
    rows = rows_of(factors.parts[0])
    block = {name: torch.zeros(1, *shape, dtype=rows.dtype, device=rows.device) for name, shape in shapes.items()}
    add_rows(factors, (factors.coefficients[:, None] * factors.slopes)[None], block)
    return {name: value[0] for name, value in block.items()}


def sample_dots(factors: Factors, dots: Tensor) -> Tensor:
    """⟨U_k, ∇ℓ_b⟩ [K, B] from ⟨U_k, J_br⟩."""
    return (dots * factors.slopes).sum(2)


def curvature_weights(factors: Factors, dots: Tensor) -> Tensor:
    """w [K, B, R] with H U_k = Σ_br w[k,b,r] J_br, from ⟨U_k, J_br⟩."""
    if dots.shape[2] == 1:
        return dots * (factors.coefficients * factors.curvature[:, 0, 0])[:, None]
    return torch.einsum("brq,kbq->kbr", factors.curvature * factors.coefficients[:, None, None], dots)


def linearizer(
    shapes: Mapping[str, torch.Size], l2: float, has_curvature: bool, needs_gradient: bool
) -> Callable[[Block, Any], tuple[Block, Pull]]:
    """`linearize` (linearize.py) of a micro-batch of factors in the place of a batch.

    params are used where l2 is not 0 alone; has_curvature: else H = 0; needs_gradient: else the gradient is left empty.
    """

    def run(params: Block, factors: Factors) -> tuple[Block, Pull]:
        strength = l2 * float(factors.coefficients.sum())

        def pull(block: Block) -> tuple[Tensor, Block]:
            along = row_dots(factors, block)
            dots = sample_dots(factors, along)
            hvp = {name: torch.zeros_like(value) for name, value in block.items()}
            if has_curvature:
                add_rows(factors, curvature_weights(factors, along), hvp)
            if l2:
                inner: Any = sum(block[n].flatten(1).double() @ params[n].flatten().double() for n in block)
                dots = dots + l2 * inner[:, None]
                if has_curvature:
                    hvp = {name: value.add_(block[name], alpha=strength) for name, value in hvp.items()}
            return dots, hvp

        gradient = batch_gradient(factors, shapes) if needs_gradient else {}
        return {n: g + strength * params[n] if l2 else g for n, g in gradient.items()}, pull

    return run


def sizes(factors: Sequence[Factors]) -> tuple[int, int]:
    """(samples, rows) of the micro-batches of a step."""
    return sum(len(f.ids) for f in factors), sum(f.slopes.numel() for f in factors)


def num_bytes(factors: Factors) -> int:
    """Memory of the parts of a micro-batch."""
    tensors = [value for part in factors.parts for value in vars(part).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
