"""The generic primitive: one batch's loss linearised at θ, for any module that can be differentiated twice.

`linearize(ev, params, batch, ...)` returns (g, pull): the batch gradient g = Σ_b a_b ∇ℓ_b(θ), and
pull(C) → (dots [K, B] = ⟨C_k, ∇ℓ_b⟩, hvp = H C_k), with H the chosen curvature of Σ_b a_b ℓ_b. All blocks are dicts of
[K, *shape] tensors, one per parameter. The l2 part of every ℓ_b is added in closed form: ∇ += l2·θ, H += l2·Σa·I.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_fast.data import leaves, map_tensors
from dit_fast.errors import UnsupportedError
from dit_fast.problem import Batch, Evaluator, Params

Hessian = Literal["exact", "ggn", "fisher", "none"]
Mode = Literal["double_backward", "forward_over_reverse"]
Pull = Callable[[Params], tuple[Tensor, Params]]
Linearized = tuple[Params, Pull]

HESSIANS: tuple[Hessian, ...] = ("exact", "ggn", "fisher", "none")


def linearize(
    ev: Evaluator,
    params: Params,
    batch: Batch,
    hessian: Hessian = "exact",
    mode: Mode = "double_backward",
    columns_per_pull: int | None = None,
) -> Linearized:
    """The batch gradient and the pull at `params` (module docstring); at most `columns_per_pull` columns at once."""
    if mode == "forward_over_reverse":
        if hessian != "exact":
            raise ValueError(f"forward_over_reverse gives the exact Hessian, not hessian={hessian!r}")
        gradient, data_pull = _forward_over_reverse(ev, params, batch, columns_per_pull)
    elif hessian == "ggn":
        gradient, data_pull = _gauss_newton(ev, params, batch, columns_per_pull)
    else:
        gradient, data_pull = _double_backward(ev, params, batch, hessian, columns_per_pull)
    return with_l2(ev.l2, params, batch, hessian, gradient, data_pull)


def with_l2(l2: float, params: Params, batch: Batch, hessian: Hessian, gradient: Params, data_pull: Pull) -> Linearized:
    """The same with ½·l2·‖θ‖² inside every per-sample loss; its curvature l2·Σa·I is exact, or 0 with hessian "none"."""
    if not l2:
        return gradient, data_pull
    strength = l2 * float(batch.coefficients.sum())

    def pull(block: Params) -> tuple[Tensor, Params]:
        dots, hvp = data_pull(block)
        dots = dots + l2 * _inner(block, params)[:, None]
        curvature = 0.0 if hessian == "none" else strength
        return dots, {name: value.add_(block[name], alpha=curvature) for name, value in hvp.items()}

    return {name: value + strength * params[name] for name, value in gradient.items()}, pull


def choose_mode(ev: Evaluator, params: Params, batch: Batch, hessian: Hessian) -> tuple[Mode, bool]:
    """The first mode that works on this batch, and whether its columns may share a pass.

    Double backward comes first: its columns share one primal pass, and it was the faster one for nearly every net and K
    measured, by up to six times on small nets (`bench/bench_linearize.py`). Columns share a pass only where two of them
    together give what each gives alone: torch's batched double backward is not right for every operation (GroupNorm).
    UnsupportedError names the module and the operation where no mode works.
    """
    generator = torch.Generator().manual_seed(0)
    probe = {n: torch.randn(2, *v.shape, generator=generator, dtype=v.dtype).to(v.device) for n, v in params.items()}
    # under torch.func some modules draw dropout's masks in another order than in training
    has_forward = hessian == "exact" and batch.rng is None
    modes: tuple[Mode, ...] = ("double_backward", "forward_over_reverse") if has_forward else ("double_backward",)
    failure: Exception | None = None
    for mode in modes:
        try:
            gradient, pull = linearize(ev, params, batch, hessian, mode, 1)
            alone = pull(probe)
            _check_dots(gradient, probe, batch, alone[0])
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not _is_missing_derivative(error):
                raise
            failure = failure or error
            continue
        try:
            return mode, _agree(linearize(ev, params, batch, hessian, mode)[1](probe), alone)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return mode, False
    culprit = _not_twice_differentiable(ev, params, batch)
    raise UnsupportedError(f"{culprit} cannot be differentiated twice: {str(failure).splitlines()[0]}") from failure


def _check_dots(gradient: Params, probe: Params, batch: Batch, dots: Tensor) -> None:
    """NotImplementedError where Σ_b a_b ⟨C, ∇ℓ_b⟩ is not ⟨C, g⟩: a backward pass hid itself from autograd, which then gives
    zeros and no error (torch's `once_differentiable` does so when derivatives are asked of chosen inputs)."""
    weighted = dots * batch.coefficients.double()
    size = weighted.abs().sum(1) + _inner(probe, gradient).abs()
    tolerance = 1e-3 if batch.coefficients.dtype == torch.float32 else 1e-9
    # NaN passes: it is named where it is met
    if bool(((weighted.sum(1) - _inner(probe, gradient)).abs() > tolerance * size).any()):
        raise NotImplementedError("its backward pass is not differentiable")


def _agree(a: tuple[Tensor, Params], b: tuple[Tensor, Params]) -> bool:
    pairs = [(a[0], b[0]), *((a[1][name], b[1][name]) for name in b[1])]
    size = max(float(y.abs().max()) for _, y in pairs if y.numel())
    tolerance = 1e-3 if next(iter(b[1].values())).dtype == torch.float32 else 1e-9
    return all(x.shape == y.shape and float((x - y).abs().max()) <= tolerance * size for x, y in pairs if y.numel())


def _double_backward(ev: Evaluator, params: Params, batch: Batch, hessian: Hessian, limit: int | None) -> Linearized:
    inputs = _leaves(params)
    coefficients = batch.coefficients.detach().clone().requires_grad_()
    losses = ev.losses(inputs, batch)
    # g(θ, a) = ∇_θ Σ_b a_b ℓ_b; ⟨C, g⟩ once more: ∂/∂θ = H C and ∂/∂a_b = ⟨C, ∇ℓ_b⟩
    gradient = _grad((coefficients * losses).sum(), inputs, create_graph=True)
    wanted: dict[str, Tensor] = {"": coefficients}
    if hessian == "exact":
        wanted |= inputs

    def pull(block: Params) -> tuple[Tensor, Params]:
        results = _vjp_block(gradient, wanted, block, limit)
        dots = results.pop("")
        if hessian == "fisher":
            # (Σ_b a_b ∇ℓ_b ∇ℓ_bᵀ) C_k = ∇ Σ_b a_b ⟨C_k, ∇ℓ_b⟩ ℓ_b
            results = _vjp_block({"": losses}, inputs, {"": dots * coefficients.detach()}, limit)
        elif hessian == "none":
            results = {name: torch.zeros_like(value) for name, value in block.items()}
        return dots.double(), results

    return {name: value.detach() for name, value in gradient.items()}, pull


def _forward_over_reverse(ev: Evaluator, params: Params, batch: Batch, limit: int | None) -> Linearized:
    def total(point: Params) -> tuple[Tensor, Tensor]:
        losses = ev.losses(point, batch)
        return (batch.coefficients * losses).sum(), losses

    gradient_and_losses = torch.func.grad(total, has_aux=True)

    def column(tangent: Params) -> tuple[Tensor, Params]:
        tangents: Any = torch.func.jvp(gradient_and_losses, (params,), (tangent,))[1]
        return tangents[1], tangents[0]

    def pull(block: Params) -> tuple[Tensor, Params]:
        dots, hvp = torch.func.vmap(column, randomness="different", chunk_size=limit)(block)
        return dots.double(), hvp

    return gradient_and_losses(params)[0], pull


def _gauss_newton(ev: Evaluator, params: Params, batch: Batch, limit: int | None) -> Linearized:
    inputs = _leaves(params)
    coefficients = batch.coefficients.detach().clone().requires_grad_()
    output = ev.output(inputs, batch)
    outputs = {str(i): z for i, z in enumerate(leaves(output)) if z.requires_grad}
    detached = {key: z.detach().requires_grad_() for key, z in outputs.items()}
    replaced = {id(outputs[key]): z for key, z in detached.items()}
    losses = ev.losses_of(map_tensors(output, lambda z: replaced.get(id(z), z)), batch.target, len(batch.ids))
    # g_z(z, a) = ∇_z Σ_b a_b ℓ_b(z)
    output_gradient = _grad((coefficients * losses).sum(), detached, create_graph=True)
    cotangents = {key: torch.zeros_like(z, requires_grad=True) for key, z in outputs.items()}
    # w ↦ Jᵀw is linear, so its derivative along C is J C: a forward product out of two backward ones
    transposed = _grad(list(outputs.values()), inputs, create_graph=True, grad_outputs=list(cotangents.values()))
    detached_gradient = [value.detach() for value in output_gradient.values()]
    gradient = _grad(list(outputs.values()), inputs, retain_graph=True, grad_outputs=detached_gradient)

    def pull(block: Params) -> tuple[Tensor, Params]:
        tangents = _vjp_block(transposed, cotangents, block, limit)
        results = _vjp_block(output_gradient, detached | {"": coefficients}, tangents, limit)
        dots = results.pop("")
        return dots.double(), _vjp_block(outputs, inputs, results, limit)

    return gradient, pull


def _vjp_block(outputs: Params, inputs: Params, block: Params, limit: int | None) -> Params:
    """Σ_outputs ⟨block_k, ∂output⟩ with respect to each input, [K, *shape]: K cotangents through one graph."""
    used = [name for name, value in outputs.items() if value.requires_grad]
    num_columns = len(next(iter(block.values())))
    step = limit or num_columns
    pieces = []
    for start in range(0, num_columns, step):
        size = min(step, num_columns - start)
        flat = torch.autograd.grad(
            [outputs[name] for name in used],
            list(inputs.values()),
            grad_outputs=[block[name][start] if size == 1 else block[name][start : start + size] for name in used],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=size > 1,
        )
        pieces.append(
            [
                value.new_zeros(size, *value.shape) if f is None else f.reshape(size, *value.shape)
                for value, f in zip(inputs.values(), flat, strict=True)
            ]
        )
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, *parts in zip(inputs, *pieces, strict=True)}


def _grad(outputs: Any, inputs: Params, **options: Any) -> Params:
    flat = torch.autograd.grad(outputs, list(inputs.values()), allow_unused=True, **options)
    return {name: torch.zeros_like(v) if f is None else f for (name, v), f in zip(inputs.items(), flat, strict=True)}


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _inner(block: Params, params: Params) -> Tensor:
    """⟨C_k, θ⟩ [K] in float64."""
    return sum(block[name].flatten(1).double() @ value.flatten().double() for name, value in params.items())  # type: ignore


def _is_missing_derivative(error: Exception) -> bool:
    text = str(error)
    marks = ("is not implemented", "not been implemented", "does not support", "not supported", "doesn't support", "twice")
    # the last one: an autograd.Function that forward mode cannot pass
    return isinstance(error, NotImplementedError) or any(mark in text for mark in (*marks, "setup_context"))


def _not_twice_differentiable(ev: Evaluator, params: Params, batch: Batch) -> str:
    """The leaf module whose own double backward fails, for the message; the loss where every module passes."""
    culprits: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [leaf for leaf in leaves((args, kwargs, list(module.parameters()))) if leaf.requires_grad]
            try:
                total = sum((leaf.square().sum() for leaf in leaves(output) if leaf.requires_grad), torch.zeros(()))
                once = torch.autograd.grad(total, inputs, create_graph=True, retain_graph=True, allow_unused=True)
                again = sum((g.sum() for g in once if g is not None and g.requires_grad), torch.zeros(()))
                if again.requires_grad:
                    # without inputs named, so that a backward pass cut off from them (once_differentiable) is met as well
                    again.backward(retain_graph=True)
            except (RuntimeError, NotImplementedError):
                culprits.append(f"{type(module).__name__} '{name}'")

        return hook

    model = ev.problem.model
    leaf_modules = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(check(name), with_kwargs=True) for name, module in leaf_modules]
    try:
        ev.output(_leaves(params), batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"module {culprits[0]}" if culprits else "the model or its per-sample loss"
