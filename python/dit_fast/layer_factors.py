"""The layers of a model whose per-sample gradients can be had from what goes in and what comes back, and these gradients.

A layer's gradient is of sums of its calls, one call of [B, …] inputs and [B, R, …] output gradients each; the batch lies in
dimension 0 of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dit_fast.errors import UnsupportedError
from dit_fast.factor_log import Geometry
from dit_fast.factored import Lookup, Outer, Plain

_FORWARDS = {nn.Linear: "linear", nn.Conv2d: "convolution", nn.Embedding: "embedding"}


@dataclass(frozen=True)
class Images:
    """A convolution's rows before unfolding: images [B, C, H, W], deltas [B, R, S, O]."""

    weight: str
    bias: str | None
    images: Tensor
    deltas: Tensor
    geometry: Geometry

    def unfolded(self) -> Outer:
        """The same as the rows of a linear layer."""
        return Outer(self.weight, self.bias, self.geometry.unfold(self.images), self.deltas)


Raw = Images | Outer | Lookup | Plain


@dataclass(frozen=True)
class Layer:
    """A module and its covered parameters: role in the module ("weight", "bias", …) → name in the log."""

    name: str
    module: nn.Module
    kind: str
    names: dict[str, str]

    def __str__(self) -> str:
        return f"{type(self.module).__name__} '{self.name}'"

    @property
    def advice(self) -> str:
        """How to log the others without it."""
        return leave_out(self.name or next(iter(self.names.values())))

    @property
    def batch_advice(self) -> str:
        """What to do where it does not see the batch."""
        way = "give it indices with the batch in front, such as arange(S).expand(B, S), or " if self.kind == "embedding" else ""
        return f"is the batch in dimension 0? Otherwise {way}{self.advice}"


@dataclass
class Call:
    """One call of a layer: its inputs, and the gradients [B, R, …] at its output."""

    inputs: tuple[Tensor, ...]
    deltas: Tensor


def leave_out(name: str) -> str:
    """How to log the others without this module or parameter."""
    return f'leave it out with FactorOptions(layers=["!{name}"])'


def find_layers(model: nn.Module, params: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> list[Layer]:
    """Every parameter asked for in the layer it belongs to; UnsupportedError or ValueError for one that cannot be had."""
    owners: dict[int, list[tuple[str, str]]] = {}
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for role, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append((prefix, role))
    roles: dict[str, dict[str, str]] = {}
    for name in _chosen(list(params), patterns):
        places = owners[id(params[name])]
        if len(places) > 1:
            shared = ", ".join(f"'{prefix}.{role}'" for prefix, role in places)
            raise UnsupportedError(
                f"factors: parameter '{name}' is tied ({shared}), so it has no layer of its own; {leave_out(name)}"
            )
        roles.setdefault(places[0][0], {})[places[0][1]] = name
    return [_layer(prefix, modules[prefix], names) for prefix, names in roles.items()]


def parts_of(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    """The layer's rows for a batch of this size, summed over its calls; rows of zeros where there is none."""
    for call in calls:
        seen = [tuple(tensor.shape) for tensor in (*call.inputs, call.deltas)]
        without = layer.kind == "linear" and len(seen[0]) < 2
        if without or any(not shape or shape[0] != size for shape in seen):
            raise UnsupportedError(
                f"factors: {layer} takes inputs of shape {list(seen[0])} and gives gradients for {seen[-1][0]} rows where "
                f"the batch has {size} samples: {layer.batch_advice}"
            )
    return _PARTS[layer.kind](layer, calls, size, num_rows)


def weighted_sum(part: Raw, weights: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter → (Σ_br weights[b,r] J_br, the same sum of absolute values), [O, I], [O] or the parameter's own shape."""
    if isinstance(part, Images):
        part = part.unfolded()
    if isinstance(part, Plain):
        scaled = part.rows * weights.to(part.rows).reshape(*weights.shape, *[1] * (part.rows.ndim - 2))
        return {part.name: (scaled.sum((0, 1)), scaled.abs().sum((0, 1)))}
    scaled = part.deltas * weights.to(part.deltas)[:, :, None, None]
    signed, absolute = scaled.sum(1), scaled.abs().sum(1)
    if isinstance(part, Lookup):
        flat = part.indices.flatten().long()
        empty = signed.new_zeros(shapes[part.weight])
        sums = [empty.index_add(0, flat, value.flatten(0, 1)) for value in (signed, absolute)]
        return {part.weight: (sums[0], sums[1])}
    inputs = part.inputs.flatten(0, 1)
    found = {part.weight: (signed.flatten(0, 1).T @ inputs, absolute.flatten(0, 1).T @ inputs.abs())}
    if part.bias is not None:
        found[part.bias] = (signed.sum((0, 1)), absolute.sum((0, 1)))
    return found


def _chosen(names: list[str], patterns: Sequence[str]) -> list[str]:
    """The names that patterns ask for; ValueError for a pattern that fits nothing, or where nothing is left."""

    def fits(name: str, pattern: str) -> bool:
        pieces = name.split(".")
        return any(fnmatchcase(".".join(pieces[:end]), pattern) for end in range(1, len(pieces) + 1))

    for pattern in patterns:
        if not any(fits(name, pattern.removeprefix("!")) for name in names):
            raise ValueError(f"factors: no trained parameter or module is called {pattern.removeprefix('!')!r}")
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    chosen = [n for n in names if any(fits(n, p) for p in wanted) and not any(fits(n, p) for p in unwanted)]
    if not chosen:
        raise ValueError(f"factors: layers={list(patterns)} leaves no parameter")
    return chosen


def _layer(prefix: str, module: nn.Module, names: dict[str, str]) -> Layer:
    layer = Layer(prefix, module, _kind(module, names), names)
    reason = _refusal(layer)
    if reason is not None:
        listed = ", ".join(f"'{name}'" for name in names.values())
        raise UnsupportedError(f"factors: {listed} of {layer} cannot be had: {reason}; {layer.advice}")
    return layer


def _kind(module: nn.Module, names: dict[str, str]) -> str:
    known = next((kind for cls, kind in _FORWARDS.items() if isinstance(module, cls) and _calls(module, cls)), None)
    if known == "convolution" and module.groups != 1:
        return "general"
    if known in ("linear", "convolution") and "weight" not in names and set(names) == {"bias"}:
        return "bias"
    if known is not None and set(names) <= {"weight", "bias"}:
        return known
    for cls in (nn.LayerNorm, nn.GroupNorm):
        if isinstance(module, cls) and _calls(module, cls):
            return "normalization"
    return "general"


def _calls(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module's forward is that of cls: a subclass may have made something else of its parameters."""
    return type(module).forward is cls.forward and "forward" not in vars(module)


def _refusal(layer: Layer) -> str | None:
    module = layer.module
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "it is parametrized, so it is used before any sample is seen"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "max_norm changes the weights in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq couples the samples of a batch"
    if layer.kind == "general" and next(module.children(), None) is not None:
        return "the module has others within it, so its own parameters are not those of one simple layer"
    return None


def _linear(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    if calls:
        inputs = _joined([c.inputs[0].reshape(size, -1, weight.shape[1]) for c in calls], 1)
        deltas = _joined([_positions(c.deltas) for c in calls], 2)
    else:
        inputs, deltas = weight.new_zeros(size, 1, weight.shape[1]), weight.new_zeros(size, num_rows, 1, weight.shape[0])
    return [Outer(layer.names["weight"], layer.names.get("bias"), inputs, deltas)]


def _convolution(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    module = layer.module
    assert isinstance(module, nn.Conv2d)
    geometry = geometry_of(module)
    names = layer.names["weight"], layer.names.get("bias")
    parts = [Images(*names, _batched_images(c.inputs[0]), _channels_last(c.deltas), geometry) for c in calls]
    if len(parts) == 1:
        return [parts[0]]
    if not parts:
        inputs = module.weight.new_zeros(size, 1, module.weight[0].numel())
        return [Outer(*names, inputs, module.weight.new_zeros(size, num_rows, 1, len(module.weight)))]
    unfolded = [part.unfolded() for part in parts]
    return [Outer(*names, torch.cat([u.inputs for u in unfolded], 1), torch.cat([u.deltas for u in unfolded], 2))]


def _embedding(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    module = layer.module
    assert isinstance(module, nn.Embedding)
    weight = module.weight
    indices = [c.inputs[0].reshape(size, -1) for c in calls] or [torch.zeros(size, 1, dtype=torch.int64, device=weight.device)]
    deltas = [_positions(c.deltas, module.embedding_dim) for c in calls] or [
        weight.new_zeros(size, num_rows, 1, weight.shape[1])
    ]
    where, rows = _joined(indices, 1), _joined(deltas, 2)
    if module.padding_idx is not None:  # torch gives that row no gradient
        rows = rows.masked_fill((where == module.padding_idx)[:, None, :, None], 0)
    return [Lookup(layer.names["weight"], where, rows)]


def _bias(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    value = layer.module.bias
    assert isinstance(value, Tensor)
    rows = value.new_zeros(size, num_rows, len(value))
    for call in calls:
        is_image = isinstance(layer.module, nn.Conv2d)
        rows = rows + (_channels_last(call.deltas) if is_image else _positions(call.deltas)).sum(2)
    return [Plain(layer.names["bias"], rows)]


def _normalization(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    """y = x̂·weight + bias with x̂ free of parameters, so the rows are Σ δ x̂ and Σ δ over positions."""
    module = layer.module
    rows = _zero_rows(layer, size, num_rows)
    for call in calls:
        inputs, deltas = call.inputs[0], call.deltas
        if isinstance(module, nn.LayerNorm):
            normal = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
            dims = tuple(range(2, deltas.ndim - len(module.normalized_shape)))
        else:
            assert isinstance(module, nn.GroupNorm)
            normal = functional.group_norm(inputs, module.num_groups, eps=module.eps)
            dims = tuple(range(3, deltas.ndim))
        for role in layer.names:
            value = deltas * normal[:, None] if role == "weight" else deltas
            rows[role] = rows[role] + (value.sum(dims) if dims else value)
    return [Plain(layer.names[role], value) for role, value in rows.items()]


class _Bare(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module.forward(*inputs)


def _general(layer: Layer, calls: Sequence[Call], size: int, num_rows: int) -> list[Raw]:
    """The layer's backward pass once more, sample by sample."""
    rows = _zero_rows(layer, size, num_rows)
    own = {f"module.{role}": _value(layer, role).detach() for role in layer.names}
    bare = _Bare(layer.module)

    def one(inputs: tuple[Tensor, ...], delta: Tensor) -> dict[str, Tensor]:
        def forward(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(bare, values, tuple(value[None] for value in inputs))

        pull: Callable[[Tensor], Any] = torch.func.vjp(forward, own)[1]
        return pull(delta[None])[0]

    for call in calls:
        for number in range(num_rows):
            try:
                found = torch.func.vmap(one)(call.inputs, call.deltas[:, number])
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise UnsupportedError(
                    f"factors: {layer} has no gradients of single samples ({reason}); {layer.advice}"
                ) from error
            for role in layer.names:
                rows[role][:, number] += found[f"module.{role}"].detach()
    return [Plain(layer.names[role], value) for role, value in rows.items()]


_PARTS: dict[str, Callable[[Layer, Sequence[Call], int, int], list[Raw]]] = {
    "linear": _linear,
    "convolution": _convolution,
    "embedding": _embedding,
    "bias": _bias,
    "normalization": _normalization,
    "general": _general,
}


def geometry_of(module: nn.Conv2d) -> Geometry:
    """How a convolution reads its images."""
    kernel, stride, dilation = ((value[0], value[1]) for value in (module.kernel_size, module.stride, module.dilation))
    if module.padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    elif isinstance(module.padding, str):
        padding = (0, 0, 0, 0)
    else:
        padding = (module.padding[1], module.padding[1], module.padding[0], module.padding[0])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return Geometry(kernel, stride, dilation, padding, mode)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    """End to end; one piece as it is, without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _value(layer: Layer, role: str) -> Tensor:
    value = layer.module._parameters[role]
    assert value is not None
    return value


def _zero_rows(layer: Layer, size: int, num_rows: int) -> dict[str, Tensor]:
    return {role: (v := _value(layer, role)).new_zeros(size, num_rows, *v.shape) for role in layer.names}


def _batched_images(images: Tensor) -> Tensor:
    if images.ndim != 4:
        raise UnsupportedError(f"factors: a convolution's input of shape {list(images.shape)} has no batch dimension")
    return images


def _positions(deltas: Tensor, size: int | None = None) -> Tensor:
    """[B, R, …, O] → [B, R, S, O]."""
    return deltas.reshape(*deltas.shape[:2], -1, deltas.shape[-1] if size is None else size)


def _channels_last(deltas: Tensor) -> Tensor:
    """[B, R, O, h, w] → [B, R, S, O]."""
    return deltas.flatten(3).transpose(2, 3)
