"""The low-rank path: for a net of linear layers ∇ℓ_b = Σ_s δ[b,s] ⊗ a[b,s], so dots and updates need no second backward.

a are the inputs of each layer and δ the gradients of ℓ_b with respect to its outputs; `ops.grad_dot` and
`ops.lowrank_update` do the rest, for the empirical Fisher and for no curvature at all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import ops
from dit_fast.linearize import Hessian, Linearized, linearize, with_l2
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.sweep import Linearizer

# the two paths must agree on the first batch; a layer that sees the batch in another order would not
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9}


def refusal(ev: Evaluator, params: Params, batch: Batch, hessian: Hessian) -> str | None:
    """Why this path cannot be taken, in one line; None where it can, proved on `batch` against the generic path."""
    if hessian not in ("fisher", "none"):
        return f"hessian={hessian!r} is not made of per-sample gradients; it is for 'fisher' and 'none'"
    if ev.device.type == "cuda" and not ops.build_info()["cuda_compiled"]:
        return "the CUDA part of dit_fast is not compiled"
    layers = _linear_layers(ev)
    owned = {name for layer in layers for name in _parameter_names(ev, layer)}
    for name in ev.shapes:
        if name not in owned:
            return f"parameter '{name}' does not belong to one torch.nn.Linear alone with a trained weight"
    try:
        dots, hvp = linearizer(ev, hessian)(params, batch)[1](_probe(params))
    except ValueError as error:
        return str(error)
    expected_dots, expected_hvp = linearize(ev, params, batch, hessian)[1](_probe(params))
    tolerance = AGREEMENT[ev.dtype]
    pairs = [(dots, expected_dots), *((hvp[name], expected_hvp[name]) for name in params)]
    if any((a - b).abs().max() > tolerance * b.abs().max().clamp_min(1e-30) for a, b in pairs if b.numel()):
        return "it does not agree with the generic path on the first batch (is a layer applied across the batch?)"
    return None


def linearizer(ev: Evaluator, hessian: Hessian) -> Linearizer:
    """`linearize` for nets whose logged parameters are those of linear layers, each called once."""
    layers = {layer: _parameter_names(ev, layer) for layer in _linear_layers(ev)}

    def run(params: Params, batch: Batch) -> Linearized:
        factors = _factors(ev, params, batch, list(layers))

        def pull(block: Params) -> tuple[Tensor, Params]:
            num_columns = len(next(iter(block.values())))
            dots = torch.zeros(num_columns, len(batch.ids), dtype=torch.float64, device=ev.device)
            hvp = {name: torch.zeros(value.shape, dtype=ev.dtype, device=ev.device) for name, value in block.items()}
            for layer, (weight, *bias) in layers.items():
                inputs, deltas = factors[layer]
                ops.grad_dot(dots, deltas, inputs, block[weight], *(block[name] for name in bias))
            if hessian == "fisher":
                weights = dots * batch.coefficients.double()
                for layer, (weight, *bias) in layers.items():
                    inputs, deltas = factors[layer]
                    ops.lowrank_update(hvp[weight], hvp[bias[0]] if bias else None, weights, deltas, inputs)
            return dots, hvp

        gradient: Params = {}
        for layer, (weight, *bias) in layers.items():
            inputs, deltas = factors[layer]
            weighted = deltas * batch.coefficients[:, None, None]
            gradient[weight] = weighted.flatten(0, 1).T @ inputs.flatten(0, 1)
            gradient |= {name: weighted.sum(dim=(0, 1)) for name in bias}
        return with_l2(ev.l2, params, batch, hessian, gradient, pull)

    return run


def _linear_layers(ev: Evaluator) -> list[str]:
    """Names of the linear layers whose weight is logged and whose parameters no other module shares."""
    owners: dict[int, int] = {}
    for module in ev.problem.model.modules():
        for value in module._parameters.values():
            owners[id(value)] = owners.get(id(value), 0) + 1
    return [
        name
        for name, module in ev.problem.model.named_modules()
        if isinstance(module, nn.Linear)
        and _join(name, "weight") in ev.shapes
        and all(owners[id(value)] == 1 for value in module.parameters())
    ]


def _parameter_names(ev: Evaluator, layer: str) -> list[str]:
    """The layer's logged weight and, where it has one that is logged, its bias."""
    return [name for name in (_join(layer, "weight"), _join(layer, "bias")) if name in ev.shapes]


def _factors(ev: Evaluator, params: Params, batch: Batch, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """layer → (inputs [B, S, I], gradients of ℓ_b with respect to its outputs [B, S, O])."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def watch(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen[layer].append((args[0] if args else kwargs["input"], output))

        return hook

    modules = dict(ev.problem.model.named_modules())
    handles = [modules[layer].register_forward_hook(watch(layer), with_kwargs=True) for layer in layers]
    try:
        losses = ev.losses({name: value.detach().requires_grad_() for name, value in params.items()}, batch)
    finally:
        for handle in handles:
            handle.remove()
    size = len(batch.ids)
    for layer, calls in seen.items():
        if len(calls) != 1:
            raise ValueError(f"linear layer '{layer}' is called {len(calls)} times in a forward pass, not once")
        if calls[0][1].ndim < 2 or len(calls[0][1]) != size:
            raise ValueError(f"linear layer '{layer}' does not see the batch in its first dimension")
    outputs = [seen[layer][0][1] for layer in layers]
    deltas = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
    found = {}
    for layer, output, delta in zip(layers, outputs, deltas, strict=True):
        inputs = seen[layer][0][0].detach()
        delta = torch.zeros_like(output) if delta is None else delta
        found[layer] = (inputs.reshape(size, -1, inputs.shape[-1]), delta.reshape(size, -1, delta.shape[-1]))
    return found


def _probe(params: Params) -> Params:
    """Two columns of fixed pseudo-random numbers, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, *v.shape, generator=generator, dtype=v.dtype).to(v.device) for n, v in params.items()}


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name
