"""Factors as a log holds them: what its manifest says of them, and the way from the tensors of a chunk to `Factors`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_fast.errors import LogError
from dit_fast.factored import Factors, Layout, Lookup, Outer, Part, Plain, Projection
from dit_fast.projections import Sizes, digests_of, make_projection, projected_shape

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its images: kernel, stride and dilation (rows, columns), padding (left, right, top, bottom) and
    its mode as in torch.nn.functional.pad."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    mode: str

    def pad(self, images: Tensor) -> Tensor:
        """[B, C, H, W] with the padding around."""
        if not any(self.padding):
            return images
        own = torch.float32 if images.dtype == torch.bfloat16 and self.mode != "constant" else images.dtype
        return functional.pad(images.to(own), self.padding, mode=self.mode).to(images.dtype)

    def unfold(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, S, C·kernel], what each output position sees, in the order of the weight."""
        padded = self.pad(images)
        patches = functional.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)
        return patches.transpose(1, 2)


@dataclass(frozen=True)
class PartSpec:
    """One part of every micro-batch's factors, and which tensors it is stored as.

    kind: "outer" (inputs, deltas), "convolution" (images, deltas), "lookup" (indices, deltas) or "rows" (rows).
    layer: the module. weight: its parameter; bias: one that goes with it. geometry: a convolution's.
    """

    kind: str
    layer: str
    weight: str
    bias: str | None = None
    geometry: Geometry | None = None

    @property
    def num_tensors(self) -> int:
        """How many tensors it is stored as."""
        return 1 if self.kind == "rows" else 2


@dataclass(frozen=True)
class FactorSpec:
    """What a log says once of its factors. parts is empty until the first step.

    dtype: of the stored tensors. layers, project: as asked for, in JSON. sizes, digests: of the parameters projected.
    biases: those that go with a weight, projected by its matrices → the weight.
    """

    dtype: str
    curvature: str
    l2: float
    layers: list[str]
    project: list[Any]
    seed: int
    sizes: dict[str, Sizes]
    biases: dict[str, str]
    digests: dict[str, str]
    parts: tuple[PartSpec, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {
            "sizes": {name: list(sizes) for name, sizes in self.sizes.items()},
            "parts": [asdict(part) for part in self.parts],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FactorSpec":
        """From the manifest; KeyError, TypeError or ValueError where it does not say it."""
        parts = []
        for row in data["parts"]:
            geometry: Any = row["geometry"]
            if geometry is not None:
                fields: dict[str, Any] = {k: v if isinstance(v, str) else tuple(v) for k, v in geometry.items()}
                geometry = Geometry(**fields)
            parts.append(PartSpec(**(row | {"geometry": geometry})))
        sizes = {name: (outputs, inputs) for name, (outputs, inputs) in data["sizes"].items()}
        return cls(**(dict(data) | {"parts": tuple(parts), "sizes": sizes}))

    def difference(self, other: "FactorSpec", with_parts: bool) -> str | None:
        """What another run's factors have otherwise; None where nothing."""
        for field in ("dtype", "curvature", "l2", "layers", "project", "seed", "digests", *(["parts"] if with_parts else [])):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                what = "" if field in ("parts", "digests") else f": {mine}, not {theirs}"
                return f"its factors were logged with other {field}{what}"
        return None

    @property
    def num_leading(self) -> int:
        """Tensors in front of those of the parts: slopes and curvature, where they are not the same for all samples."""
        return 2 if self.curvature == "ggn" else 0

    @property
    def num_tensors(self) -> int:
        """Tensors of one micro-batch."""
        return self.num_leading + sum(part.num_tensors for part in self.parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored tensors."""
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def covered(self) -> list[str]:
        """Names of the parameters the factors are of."""
        return [name for part in self.parts for name in (part.weight, part.bias) if name is not None]


def projections_of(spec: FactorSpec, shapes: Shapes) -> dict[str, Projection]:
    """Parameter → its projection, made again from the seed."""
    made: dict[str, Projection] = {}
    for name, sizes in spec.sizes.items():
        weight = spec.biases.get(name)
        if weight is None:
            made[name] = make_projection(spec.seed, name, shapes[name], sizes)
        else:
            outputs = make_projection(spec.seed, weight, shapes[weight], (sizes[0], None)).outputs
            made[name] = Projection(outputs, None)
    return made


def layout_of(spec: FactorSpec, shapes: Shapes) -> Layout:
    """LogError where the projections made from the seed are not those the log was written with."""
    for name in sorted({*spec.covered, *spec.sizes} - set(shapes)):
        raise LogError(f"the logged factors are of parameter '{name}', which is not in the log: are they of another model?")
    projections = projections_of(spec, shapes)
    for name, digest in digests_of(projections).items():
        if spec.digests.get(name) != digest:
            raise LogError(
                f"the projection of '{name}' made from seed {spec.seed} is not the one the log was written with: another "
                "seed, or a torch whose random numbers are others"
            )
    own = {name: projected_shape(shapes[name], spec.sizes.get(name, (None, None))) for name in spec.covered}
    return Layout({name: own[name] for name in shapes if name in own}, spec.curvature, spec.l2, projections, spec.torch_dtype)


def unpack(spec: FactorSpec, layout: Layout, step: int, ids: Tensor, coefficients: Tensor, stored: Sequence[Tensor]) -> Factors:
    """One micro-batch's factors from its tensors; ValueError where they do not fit together."""
    tensors = list(stored)
    if len(tensors) != spec.num_tensors:
        raise ValueError(f"{len(tensors)} tensors for {spec.num_tensors}")
    size, num_rows = len(ids), {"fisher": 1, "sampled ggn": 2}.get(spec.curvature) or tensors[0].shape[-1]
    if spec.num_leading:
        slopes, curvature = tensors.pop(0), tensors.pop(0)
    else:
        slopes = torch.zeros(size, num_rows, dtype=torch.float64)
        slopes[:, 0] = 1
        curvature = torch.zeros(size, num_rows, num_rows, dtype=torch.float64)
        curvature[:, -1, -1] = 1
    _expect("slopes", slopes, (size, num_rows))
    _expect("curvature", curvature, (size, num_rows, num_rows))
    parts: list[Part] = []
    for part in spec.parts:
        first, rest = tensors.pop(0), [tensors.pop(0) for _ in range(part.num_tensors - 1)]
        shape = layout.shapes[part.weight]
        if part.kind == "rows":
            _expect(part.weight, first, (size, num_rows, *shape))
            parts.append(Plain(part.weight, first))
            continue
        deltas = rest[0]
        if part.kind == "convolution":
            assert part.geometry is not None
            first = part.geometry.unfold(first)
        if part.kind == "lookup":
            _expect(part.weight, deltas, (size, num_rows, deltas.shape[2], shape[1]))
            _expect(part.weight, first, (size, deltas.shape[2]))
            parts.append(Lookup(part.weight, first.long(), deltas))
        else:
            _expect(part.weight, deltas, (size, num_rows, deltas.shape[2], shape[0]))
            _expect(part.weight, first, (size, deltas.shape[2], shape[1:].numel()))
            parts.append(Outer(part.weight, part.bias, first, deltas))
    return Factors(step, ids, coefficients, slopes, curvature, tuple(parts))


def _expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"the factors of '{name}' have shape {list(tensor.shape)}, not {list(shape)}")
