"""The primitive by per-sample gradients in factors, made from the problem where the log holds none.

One forward pass, and one backward pass to the outputs of the layers for every row of a sample: its gradient alone for the
empirical Fisher and for no curvature, its C outputs for Gauss–Newton. No pass is needed for a column.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import factor_products, ops
from dit_fast.data import leaves
from dit_fast.errors import UnsupportedError
from dit_fast.factored import Factors, Part
from dit_fast.layer_factors import Call, Images, Layer, find_layers, parts_of
from dit_fast.linearize import Hessian, Linearized, linearize
from dit_fast.output_slopes import slopes_and_curvature
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.sweep import Linearizer

# the two paths must agree on the first batch; a layer that sees the batch in another order would not
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9}


def refusal(ev: Evaluator, params: Params, batch: Batch, hessian: Hessian, only_linear: bool = False) -> str | None:
    """Why this path cannot be taken, in one line; None where it can, proved on `batch` against the generic path.

    only_linear: whether to take it where it is sure to be the faster one, for linear layers and one row per sample.
    """
    if hessian == "exact" or (only_linear and hessian == "ggn"):
        also = "" if only_linear else ", 'ggn'"
        return f"hessian={hessian!r} is not made of per-sample gradients; it is for 'fisher'{also} and 'none'"
    if ev.device.type == "cuda" and not ops.build_info()["cuda_compiled"]:
        return "the CUDA part of dit_fast is not compiled"
    try:
        layers = layers_of(ev)
        other = next((layer for layer in layers if layer.kind != "linear"), None)
        if only_linear and other is not None:
            return f"{other} is no linear layer"
        dots, hvp = linearizer(ev, hessian, False)(params, batch)[1](_probe(params))
    except (ValueError, UnsupportedError) as error:
        # what a Recorder could leave out is not for choice here
        return str(error).removeprefix("factors: ").partition("; leave it out")[0].partition(" Otherwise ")[0]
    expected_dots, expected_hvp = linearize(ev, params, batch, hessian)[1](_probe(params))
    tolerance = AGREEMENT[ev.dtype]
    pairs = [(dots, expected_dots), *((hvp[name], expected_hvp[name]) for name in params)]
    if any((a - b).abs().max() > tolerance * b.abs().max().clamp_min(1e-30) for a, b in pairs if b.numel()):
        return "it does not agree with the generic path on the first batch (is a layer applied across the batch?)"
    return None


def linearizer(ev: Evaluator, hessian: Hessian, needs_gradient: bool) -> Linearizer:
    """`linearize` by factors; needs_gradient: else the gradient is left empty."""
    layers = layers_of(ev)
    by_factors = factor_products.linearizer(ev.shapes, ev.l2, hessian != "none", needs_gradient)

    def run(params: Params, batch: Batch) -> Linearized:
        return by_factors(params, capture(ev, params, batch, layers, hessian))

    return run


def capture(ev: Evaluator, params: Params, batch: Batch, layers: Sequence[Layer], hessian: Hessian) -> Factors:
    """The factors of a batch at `params`: rows of the outputs for "ggn", else the gradients alone."""
    ev.seed(batch)
    inputs = {name: value.detach().requires_grad_() for name, value in params.items()}
    return ev.call(inputs, lambda model: _capture(ev, model, batch, layers, hessian))


def _capture(ev: Evaluator, model: nn.Module, batch: Batch, layers: Sequence[Layer], hessian: Hessian) -> Factors:
    seen: list[tuple[int, tuple[Tensor, ...], Tensor]] = []

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *kwargs.values()]
            if not isinstance(output, Tensor) or not given or not all(isinstance(value, Tensor) for value in given):
                raise UnsupportedError(f"{layers[number]} takes or gives something else than tensors")
            seen.append((number, tuple(value.detach() for value in given), output))

        return hook

    handles = [layer.module.register_forward_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        output = model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    size = len(batch.ids)
    losses = ev.losses_of(output, batch.target, size)
    if hessian == "ggn":
        targets, slopes, curvature = _of_outputs(ev, output, batch)
    else:
        targets = [losses.sum()]
        slopes = losses.new_ones(size, 1)
        curvature = slopes[:, :, None]
    outputs = [z for _, _, z in seen]
    rows = [torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True) for target in targets]
    calls: dict[int, list[Call]] = {number: [] for number in range(len(layers))}
    for i, (number, given, z) in enumerate(seen):
        deltas = [torch.zeros_like(z) if row[i] is None else row[i] for row in rows]
        if not z.ndim or len(z) != size:
            raise UnsupportedError(f"{layers[number]} does not see the batch in its first dimension")
        calls[number].append(Call(given, torch.stack(deltas, 1)))
    parts: list[Part] = []
    for number, layer in enumerate(layers):
        for part in parts_of(layer, calls[number], size, len(targets)):
            parts.append(part.unfolded() if isinstance(part, Images) else part)
    made = Factors(batch.step, batch.ids, batch.coefficients, slopes, curvature, tuple(_detached(part) for part in parts))
    return factor_products.placed(made, ev.device, ev.dtype)


def _of_outputs(ev: Evaluator, output: Any, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every output of all samples summed, and the loss's slopes [B, C] and curvature [B, C, C] by them."""
    found = [z for z in leaves(output) if z.requires_grad]
    if len(found) != 1 or found[0] is not output:
        raise UnsupportedError("hessian='ggn' by factors is for a model whose output is one tensor [B, ...]")
    slopes, curvature = slopes_and_curvature(ev.problem.per_sample_loss, output, batch.target)
    return list(output.reshape(len(output), -1).sum(0).unbind()), slopes, curvature


def _detached(part: Part) -> Part:
    values = {name: value.detach() for name, value in vars(part).items() if isinstance(value, Tensor)}
    return type(part)(**(vars(part) | values))


def layers_of(ev: Evaluator) -> list[Layer]:
    """The modules that own the logged parameters."""
    model = ev.problem.model
    return find_layers(model, {name: p for name, p in model.named_parameters() if name in ev.shapes}, ())


def _probe(params: Params) -> Params:
    """Two columns of fixed pseudo-random numbers, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, *v.shape, generator=generator, dtype=v.dtype).to(v.device) for n, v in params.items()}
