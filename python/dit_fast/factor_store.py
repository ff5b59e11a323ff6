"""The smallest form of each part of the factors, and the tensors it is stored as: as they are, multiplied out, projected."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from dit_fast.factor_log import FactorSpec, PartSpec
from dit_fast.factor_options import FactorOptions
from dit_fast.factored import Lookup, Plain, Projection
from dit_fast.layer_factors import Images, Layer, Raw
from dit_fast.projections import Sizes, digests_of, projected_shape, sizes_of

Shapes = Mapping[str, torch.Size]


def spec_of(options: FactorOptions, layers: Sequence[Layer], shapes: Shapes, dtype: torch.dtype) -> FactorSpec:
    """What is known before the first step; `dtype` is that of the parameters. The digests are left out."""
    sizes: dict[str, Sizes] = {}
    biases: dict[str, str] = {}
    for layer in layers:
        goes_along = layer.kind in ("linear", "convolution") and set(layer.names) == {"weight", "bias"}
        for role, name in layer.names.items():
            if role == "bias" and goes_along:
                sizes[name] = sizes[layer.names["weight"]][0], None
                biases[name] = layer.names["weight"]
            else:
                sizes[name] = sizes_of(options.project_items, name, shapes[name])
    sizes = {name: pair for name, pair in sizes.items() if pair != (None, None)}
    return FactorSpec(
        dtype=options.dtype or str(dtype).removeprefix("torch."),
        curvature=options.curvature,
        l2=float(options.l2),
        layers=list(options.patterns),
        project=[[p, list(s) if isinstance(s, tuple | list) else s] for p, s in options.project_items],
        seed=options.seed,
        sizes=sizes,
        biases={name: weight for name, weight in biases.items() if name in sizes},
        digests={},
    )


def with_digests(spec: FactorSpec, projections: Mapping[str, Projection]) -> FactorSpec:
    """The same with the digests of its matrices."""
    return replace(spec, digests=digests_of(projections))


def plan(layer: Layer, part: Raw, spec: FactorSpec, shapes: Shapes) -> list[PartSpec]:
    """How a part is stored in the fewest numbers."""
    if isinstance(part, Plain):
        return [PartSpec("rows", layer.name, part.name)]
    own = shapes[part.weight]
    outputs, inputs = projected_shape([own[0], own[1:].numel()], spec.sizes.get(part.weight, (None, None)))
    rows = [PartSpec("rows", layer.name, part.weight)]
    if isinstance(part, Lookup):
        return rows if spec.sizes.get(part.weight, (None, None))[0] else [PartSpec("lookup", layer.name, part.weight)]
    if part.bias is not None:
        rows.append(PartSpec("rows", layer.name, part.bias))
    num_rows, positions = part.deltas.shape[1:3]
    factors = [PartSpec("outer", layer.name, part.weight, part.bias)]
    forms = [(positions * (inputs + num_rows * outputs), factors), (num_rows * outputs * (inputs + len(rows) - 1), rows)]
    if isinstance(part, Images) and part.weight not in spec.sizes:
        images = part.images[0].numel() + num_rows * positions * outputs
        forms.append((images, [PartSpec("convolution", layer.name, part.weight, part.bias, part.geometry)]))
    return min(forms, key=lambda form: form[0])[1]


def pack(part: Raw, forms: Sequence[PartSpec], projections: Mapping[str, Projection], shapes: Shapes) -> list[Tensor]:
    """The tensors of a part in the forms it is stored in."""
    kind = forms[0].kind
    if isinstance(part, Plain):
        projection = projections.get(part.name)
        return [part.rows if projection is None else projection(part.rows.flatten(0, 1)).unflatten(0, part.rows.shape[:2])]
    none = Projection(None, None)
    projection = projections.get(part.weight, none)
    if isinstance(part, Lookup):
        deltas = _mapped(part.deltas, projection.inputs)
        if projection.outputs is None:
            return [part.indices.int(), deltas]
        return [torch.einsum("obs,brsi->broi", projection.outputs.to(deltas)[:, part.indices.long()], deltas)]
    deltas = _mapped(part.deltas, projection.outputs)
    if isinstance(part, Images):
        if kind == "convolution":
            return [part.images, deltas]
        if projection.inputs is None:
            inputs = part.unfolded().inputs
        else:  # projecting what each position sees is a convolution itself
            geometry = part.geometry
            kernels = projection.inputs.to(deltas).reshape(-1, part.images.shape[1], *geometry.kernel)
            seen = functional.conv2d(geometry.pad(part.images), kernels, stride=geometry.stride, dilation=geometry.dilation)
            inputs = seen.flatten(2).transpose(1, 2)
    else:
        inputs = _mapped(part.inputs, projection.inputs)
    if kind == "outer":
        return [inputs, deltas]
    weight = torch.einsum("brso,bsi->broi", deltas, inputs)
    if projection is none:
        weight = weight.reshape(*weight.shape[:2], *shapes[part.weight])
    return [weight] if part.bias is None else [weight, deltas.sum(2)]


def _mapped(values: Tensor, matrix: Tensor | None) -> Tensor:
    return values if matrix is None else values @ matrix.to(values).T
