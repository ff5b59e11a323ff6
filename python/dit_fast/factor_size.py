"""How many bytes a sample's factors will take in a log, before the run: the Recorder's own forms, on zeros."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.data import default_unpack, leaves
from dit_fast.errors import UnsupportedError
from dit_fast.factor_log import projections_of
from dit_fast.factor_options import FactorOptions
from dit_fast.factor_store import pack, plan, spec_of
from dit_fast.layer_factors import Call, Layer, find_layers, parts_of


def factor_bytes(model: nn.Module, params: Mapping[str, nn.Parameter], options: FactorOptions, batch: Any) -> tuple[float, int]:
    """(bytes per sample, bytes per micro-batch beside them: the shapes) by one forward pass of `batch` in eval mode.

    The model's mode, buffers and the random generators are left as they were. Raises UnsupportedError or ValueError where
    the Recorder would.
    """
    args, kwargs, _ = (options.unpack or default_unpack)(batch)
    layers = find_layers(model, params, options.patterns)
    seen, output = _forward(model, layers, args, kwargs)
    size = len(next(value for value in leaves(output) if value.ndim))
    num_rows = {"fisher": 1, "sampled ggn": 2}.get(options.curvature) or leaves(output)[0].numel() // size
    shapes = {name: params[name].shape for layer in layers for name in layer.names.values()}
    wide = torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32
    spec = spec_of(options, layers, shapes, wide)
    projections = projections_of(spec, shapes)
    stored: list[Tensor] = []
    for layer, calls in zip(layers, seen, strict=True):
        given = [Call(inputs, z.new_zeros(len(z), num_rows, *z.shape[1:])) for inputs, z in calls if z.ndim]
        for part in parts_of(layer, given, size, num_rows):
            stored += pack(part, plan(layer, part, spec, shapes), projections, shapes)
    numbers = sum(t.numel() * (spec.torch_dtype.itemsize if t.is_floating_point() else t.element_size()) for t in stored)
    if options.curvature == "ggn":
        numbers += wide.itemsize * size * (num_rows + num_rows**2)
    return numbers / size, 8 * sum(t.ndim for t in stored) + (8 * 5 if options.curvature == "ggn" else 0)


def _forward(
    model: nn.Module, layers: list[Layer], args: Any, kwargs: Any
) -> tuple[list[list[tuple[tuple[Tensor, ...], Tensor]]], Any]:
    """Per layer, its calls' inputs and outputs; and the model's output."""
    seen: list[list[tuple[tuple[Tensor, ...], Tensor]]] = [[] for _ in layers]

    def watch(number: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            inputs = (*given, *named.values())
            if not isinstance(output, Tensor) or not all(isinstance(value, Tensor) for value in inputs):
                raise UnsupportedError(
                    f"factors: {layers[number]} takes or gives something else than tensors; {layers[number].advice}"
                )
            seen[number].append((inputs, output))

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [layer.module.register_forward_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen, output
