"""The compiled ops: checks, device and stream here, arithmetic in csrc. The only module that imports `_C`.

Each op works in place on torch tensors and has a plain-torch twin of the same name in dit_fast.ops_torch.
Alphabet: K adjoint columns, B batch, R rows per sample, S positions in a sequence, O/I out and in features. Tensors are
float32 or float64, all of one dtype, except `dots` and `coefficients`, which are always float64. All lie on one device;
the last dimension is contiguous, every other stride is free. Autograd does not see what the ops do.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import dit_fast._C as _C
from dit_fast.lowrank import (
    Directions,
    GradDotLayer,
    LowrankUpdateLayer,
    Samples,
    UpdateDotLayer,
    check_dots,
    check_layers,
    unpack,
)
from dit_fast.mlp import (
    ACTIVATIONS,
    CURVATURES,
    LOSSES,
    Mlp,
    MlpModels,
    MlpSteps,
    MlpVisits,
    check_data,
    check_loss_changes,
    check_retrain,
    check_sweep,
)

# samples of `mlp_loss_changes` that go through the net at a time
_LOSS_ROWS = 64


def grad_dot(dots: Tensor, delta: Tensor, activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Inner products of K directions with the gradients of B samples, for one linear layer, added to `dots`.

        dots[k,b,r] += Σ_s ( Σ_o Σ_i δ[b,r,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,r,s,o] v[k,o] )

    Args:
        dots: [K, B] float64, accumulated into; [K, B, R] where delta has R. Sums are in double; each Σ_i is of the
            operands' dtype and serves all R.
        delta: δ [B, S, O], gradients of each sample's loss with respect to the layer's output, or [B, R, S, O], R of them.
        activations: a [B, S, I], the layer's inputs.
        weight: U [K, O, I], one direction per column.
        bias: v [K, O], or None for a layer without bias.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: a shape, a device or a stride does not fit; the message names the argument.
        RuntimeError: CUDA tensors where the CUDA part is not compiled.
    """
    grad_dot_layers(dots, [(delta, activations, weight, bias)])


def grad_dot_layers(dots: Tensor, layers: Sequence[GradDotLayer]) -> None:
    """`grad_dot` summed over the layers of a net, in one call and, on a GPU, one launch.

    Args:
        dots: [K, B] or [K, B, R] float64, accumulated into.
        layers: (delta, activations, weight, bias) of each layer, as in `grad_dot`. K, B, R, dtype and device are the
            same in all; S, O and I are free. Without layers nothing happens.

    Raises:
        TypeError, ValueError, RuntimeError: as `grad_dot`; the message names the layer where there are several.
    """
    parts = [
        (Directions(weight, bias, False), Samples(delta, activations))
        for delta, activations, weight, bias in unpack(layers, 4, "delta, activations, weight, bias")
    ]
    check_layers([(directions, (samples,)) for directions, samples in parts])
    if not parts:
        return
    weight = parts[0][0].weight
    spec = parts[0][1].per_sample("dots", dots, weight)
    check_dots(dots)
    _launch("grad_dot", weight, len(weight), spec, [(samples.spec(), directions.spec()) for directions, samples in parts])
    torch.autograd.graph.increment_version(dots)


def lowrank_update(
    weight: Tensor, bias: Tensor | None, coefficients: Tensor, delta: Tensor, activations: Tensor, alpha: float = 1.0
) -> None:
    """A weighted sum of B samples' gradients, added to alpha times each of K directions, for one linear layer.

        U[k,o,i] = alpha U[k,o,i] + Σ_b Σ_r c[k,b,r] Σ_s δ[b,r,s,o] a[b,s,i]
        v[k,o]   = alpha v[k,o]   + Σ_b Σ_r c[k,b,r] Σ_s δ[b,r,s,o]

    Args:
        weight: U [K, O, I], updated in place.
        bias: v [K, O], updated in place, or None for a layer without bias.
        coefficients: c [K, B] float64, any sign; no mean is taken; [K, B, R] where delta has R.
        delta: δ [B, S, O], gradients of each sample's loss with respect to the layer's output, or [B, R, S, O], R of them.
        activations: a [B, S, I], the layer's inputs.
        alpha: 0 overwrites U and v, whatever they hold. For U it is rounded to the operands' dtype.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: a shape, a device or a stride does not fit; the message names the argument.
        RuntimeError: CUDA tensors where the CUDA part is not compiled.
    """
    lowrank_update_layers(coefficients, [(weight, bias, delta, activations)], alpha)


def lowrank_update_layers(coefficients: Tensor, layers: Sequence[LowrankUpdateLayer], alpha: float = 1.0) -> None:
    """`lowrank_update` of all layers of a net, in one call and, on a GPU, one launch.

    Args:
        coefficients: c [K, B] or [K, B, R] float64.
        layers: (weight, bias, delta, activations) of each layer, as in `lowrank_update`. K, B, R, dtype and device are
            the same in all; S, O and I are free. No two layers may share memory.
        alpha: as in `lowrank_update`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lowrank_update`; the message names the layer where there are several.
    """
    parts = [
        (Directions(weight, bias, True), Samples(delta, activations))
        for weight, bias, delta, activations in unpack(layers, 4, "weight, bias, delta, activations")
    ]
    check_layers([(directions, (samples,)) for directions, samples in parts])
    if not parts:
        return
    weight = parts[0][0].weight
    spec = parts[0][1].per_sample("coefficients", coefficients, weight)
    specs = [(samples.spec(), directions.spec()) for directions, samples in parts]
    _launch("lowrank_update", weight, len(weight), float(alpha), spec, specs)
    _count_writes(directions for directions, _ in parts)


def update_dot(
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    delta: Tensor,
    activations: Tensor,
    dots: Tensor,
    dot_delta: Tensor,
    dot_activations: Tensor,
    alpha: float = 1.0,
) -> None:
    """`lowrank_update` and then `grad_dot` with the directions that came out, U read and written once.

        U[k] = alpha U[k] + Σ_b Σ_r c[k,b,r] Σ_s δ[b,r,s] ⊗ a[b,s]        v[k] likewise, without a
        dots[k,b,r] += Σ_s δ'[b,r,s] · (U[k] a'[b,s] + v[k])

    Args:
        weight, bias, coefficients, delta, activations, alpha: as in `lowrank_update`.
        dots, dot_delta (δ'), dot_activations (a'): as in `grad_dot`; B, R and S may differ from those of the update.

    Raises:
        TypeError, ValueError, RuntimeError: as `lowrank_update` and `grad_dot`.
    """
    update_dot_layers(coefficients, dots, [(weight, bias, delta, activations, dot_delta, dot_activations)], alpha)


def update_dot_layers(coefficients: Tensor, dots: Tensor, layers: Sequence[UpdateDotLayer], alpha: float = 1.0) -> None:
    """`update_dot` of all layers of a net, in one call and, on a GPU, one launch; the dots are summed over the layers.

    Args:
        coefficients, dots, alpha: as in `update_dot`.
        layers: (weight, bias, delta, activations, dot_delta, dot_activations) of each layer. K, dtype and device, the
            update's B and R and the dots' B and R are the same in all; every S, O and I is free. No two layers may share
            memory.

    Raises:
        TypeError, ValueError, RuntimeError: as `update_dot`; the message names the layer where there are several.
    """
    members = "weight, bias, delta, activations, dot_delta, dot_activations"
    parts = [
        (Directions(weight, bias, True), (Samples(delta, activations), Samples(dot_delta, dot_activations, "dot_")))
        for weight, bias, delta, activations, dot_delta, dot_activations in unpack(layers, 6, members)
    ]
    check_layers(parts)
    if not parts:
        return
    directions, (update, dot) = parts[0]
    weight = directions.weight
    coefficients_spec = update.per_sample("coefficients", coefficients, weight)
    dots_spec = dot.per_sample("dots", dots, weight)
    check_dots(dots)
    specs = [(update.spec(), dot.spec(), directions.spec()) for directions, (update, dot) in parts]
    _launch("update_dot", weight, len(weight), float(alpha), coefficients_spec, dots_spec, specs)
    _count_writes(directions for directions, _ in parts)
    torch.autograd.graph.increment_version(dots)


class MlpSweep:
    """Steps of the adjoint sweep of a feed-forward net, all columns in one call; checked when made (csrc/mlp_sweep.h).

    For every column k and step t, last to first, with c the cotangent of the batch gradient by the optimizer's rule,

        scores[k, ids_b] −= a_b ⟨c_k, ∇ℓ_b⟩        u_k = u_k + wd c_k + H c_k

    Args:
        net: layers and loss; ℓ_b includes ½·l2·‖θ‖².
        steps: what happened in the steps.
        blocks: u, [K, O, I] per weight and [K, O] per bias (None for none), in the order of the layers; updated in place.
            The first weight's lies in memory as [I, K, O] (`mlp_block`), the others are contiguous.
        momenta: the same for the momentum buffers' cotangents; None where no step has momentum.
        scores: [K, N] float64, accumulated into.
        visits: when columns join and leave; None: all K take part in all steps, with what their blocks hold.
        gram: the samples' inner products x xᵀ [M, M]. The first weight's block is then [K, O, M] and holds X u, of every
            sample, in place of u: a step adds combinations of samples to u and asks for products with samples alone. Faster
            where M < 2 I; not with l2.
        hessian: "exact", "ggn" or "none".

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a layout, an index out of range; the message names the argument.
    """

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        scores: Tensor,
        visits: MlpVisits | None = None,
        *,
        gram: Tensor | None = None,
        l2: float = 0.0,
        hessian: str = "exact",
    ) -> None:
        check_sweep(net, steps, blocks, momenta, scores, visits, gram, l2)
        _check_on_cpu(steps)
        specs, kinds = mlp_specs(net, hessian)
        self._steps, self._visits = steps, visits
        self._gradients, self._projected, projected = (0, 0), (0, 0), None
        if visits is not None:
            self._gradients = visits.gradients.data_ptr(), visits.gradients.stride(0)
            if gram is not None:
                layer = net.layers[0]
                weights = visits.gradients[:, layer.weight : layer.weight + layer.outputs * layer.inputs]
                projected = steps.x @ weights.reshape(-1, layer.inputs).T  # [M, n·O]
                self._projected = projected.data_ptr(), len(visits.gradients)
        self._kept = blocks, momenta, scores, gram, projected
        self._gram = (0, 0) if gram is None else (gram.data_ptr(), len(gram))
        self._twice = steps.theta.dtype == torch.float64
        self._model = (specs, kinds, net.loss_scale, l2)
        self._blocks, self._momenta = addresses(blocks), addresses(momenta or ())
        self._scores = (scores.data_ptr(), scores.stride(0))

    def run(self, start: int, stop: int) -> int | None:
        """Steps stop − 1 … start; the step whose scores are not finite, None if all are."""
        steps, visits, capacity = self._steps, self._visits, len(self._kept[2])
        if not 0 <= start <= stop <= len(steps.theta):
            raise ValueError(f"steps {start}..{stop} of {len(steps.theta)} are out of range")
        columns = [] if visits is None else [visits.joins - start, visits.leaves - start, visits.joining, visits.leaving]
        bad = _C.mlp_sweep_cpu(
            self._twice,
            *self._model,
            (len(columns[0]) if columns else capacity, capacity, stop - start),
            *logged(steps, start),
            self._blocks,
            self._momenta,
            self._scores,
            (addresses(columns) or [0] * 4, self._gradients, self._projected, self._gram),
            torch.get_num_threads(),
        )
        return None if bad < 0 else start + int(bad)


class MlpRetrain:
    """Steps of training without some samples, all models in one call; checked when made (csrc/mlp_retrain.h).

    For every model j and step t, first to last, d_j = θ_{−j} − θ[t] by the optimizer's rule from the difference of gradients

        g_j = Σ_{b not removed} a_b ∇ℓ_b(θ[t] + d_j) − Σ_b a_b ∇ℓ_b(θ[t])

    Args:
        net, steps, l2: as in `MlpSweep`.
        models: the K models' removed samples, and when each joins.
        blocks: d, as the blocks of `MlpSweep`, K = C models; updated in place.
        momenta: the differences of the momentum buffers; None where no step has momentum.
        gram: the samples' inner products x xᵀ [M, M]. The first weight's block is then [K, O, M] and holds A, d = A x, in
            place of d, and so do the momenta: all that a step adds to d are combinations of samples. Faster where M < 2 I; not
            with l2.

    Raises:
        TypeError, ValueError: as `MlpSweep`.
    """

    def __init__(
        self,
        net: Mlp,
        steps: MlpSteps,
        models: MlpModels,
        blocks: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None] | None,
        *,
        gram: Tensor | None = None,
        l2: float = 0.0,
    ) -> None:
        check_retrain(net, steps, models, blocks, momenta, gram, l2)
        _check_on_cpu(steps)
        self._steps, self._models, self._kept = steps, models, (blocks, momenta, gram)
        self._gram = (0, 0) if gram is None else (gram.data_ptr(), len(gram))
        self._twice = steps.theta.dtype == torch.float64
        self._model = (*mlp_specs(net, "none"), net.loss_scale, l2)
        self._blocks, self._momenta = addresses(blocks), addresses(momenta or ())

    def run(self, start: int, stop: int) -> None:
        """Steps start … stop − 1."""
        steps, models = self._steps, self._models
        if not 0 <= start <= stop <= len(steps.theta):
            raise ValueError(f"steps {start}..{stop} of {len(steps.theta)} are out of range")
        joins = models.joins - start
        _C.mlp_retrain_cpu(
            self._twice,
            *self._model,
            (len(joins), len(joins), stop - start),
            *logged(steps, start),
            self._blocks,
            self._momenta,
            [joins.data_ptr(), models.offsets.data_ptr(), models.removed.data_ptr()],
            self._gram,
            torch.get_num_threads(),
        )


def mlp_loss_changes(
    net: Mlp,
    theta: Tensor,
    x: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    blocks: Sequence[Tensor | None],
    changes: Tensor,
) -> None:
    """How a weighted loss differs at K models θ + d_j from that at θ, added to `changes`; the l2 part is not in it.

        changes[j] += Σ_b a_b (ℓ_b(θ + d_j) − ℓ_b(θ))

    Args:
        theta: θ [P].
        x, targets, coefficients: the batch, as in `mlp_gradient`.
        blocks: d, as in `MlpRetrain`.
        changes: [K] float64, accumulated into; the losses are of theta's dtype.

    Raises:
        TypeError, ValueError: as `MlpSweep`.
    """
    check_loss_changes(net, theta, x, targets, coefficients, blocks, changes)
    rows, none = torch.arange(len(x)), torch.zeros(0, dtype=torch.float64)
    # a row of theta that is its own neighbour serves pieces of the batch as so many steps
    offsets = torch.tensor([*range(0, len(x), _LOSS_ROWS), len(x)])
    _C.mlp_loss_changes_cpu(
        theta.dtype == torch.float64,
        *mlp_specs(net, "none"),
        net.loss_scale,
        (len(changes), len(changes), len(offsets) - 1),
        (theta.data_ptr(), 0),
        (x.data_ptr(), x.stride(0)),
        targets.data_ptr(),
        [rows.data_ptr(), 0, coefficients.data_ptr(), offsets.data_ptr(), none.data_ptr()],
        addresses(blocks),
        changes.data_ptr(),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(changes)


def mlp_gradient(net: Mlp, theta: Tensor, x: Tensor, targets: Tensor, coefficients: Tensor, gradients: Tensor) -> None:
    """Weighted loss gradients at n parameter points, added to `gradients`; the l2 part is not in it.

        gradients[t] += Σ_b a_b ∇ℓ_b(θ[t])

    Args:
        theta: θ [n, P], flat parameters.
        x, targets: the batch, as in `MlpSteps`, [B, I] and [B] or [B, O].
        coefficients: a [B] float64.
        gradients: [n, P], accumulated into, in the order of theta.

    Raises:
        TypeError, ValueError: as `MlpSweep`.
    """
    n, B = len(theta), len(x)
    rows, none = torch.arange(B), torch.zeros(0, dtype=torch.float64)
    offsets = torch.tensor([0, B])
    check_data(net, theta, x, targets, coefficients, rows)
    if gradients.shape != theta.shape or gradients.dtype != theta.dtype or not gradients.is_contiguous():
        raise ValueError(f"gradients must be contiguous {list(theta.shape)} {_short(theta.dtype)}")
    _C.mlp_gradient_cpu(
        theta.dtype == torch.float64,
        *mlp_specs(net, "exact"),
        net.loss_scale,
        (0, 0, n),
        (theta.data_ptr(), theta.stride(0)),
        (x.data_ptr(), x.stride(0)),
        targets.data_ptr(),
        [rows.data_ptr(), 0, coefficients.data_ptr(), offsets.data_ptr(), none.data_ptr()],
        (gradients.data_ptr(), gradients.stride(0)),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(gradients)


def build_info() -> dict[str, Any]:
    """What was compiled and what is used: version, compilers, CUDA, BLAS, OpenMP, torch."""
    return {
        "version": _C.version,
        "compiler": _C.compiler,
        "openmp": _C.openmp,
        "blas": _C.blas_name(),
        "cuda_compiled": _C.cuda_compiled,
        "cuda_compiler": _C.cuda_compiler,
        "cuda_architectures": [a for a in _C.cuda_architectures.split(",") if a],
        "cuda_available": torch.cuda.is_available(),
        "torch": torch.__version__,
    }


def use_blas(allowed: bool) -> bool:
    """Allow the BLAS that torch has loaded (the default) or force the built-in product; whether BLAS is now in use.

    A switch for the whole process, for tests and for the day when torch hides its BLAS.
    """
    return bool(_C.use_blas(allowed))


def core(op: str, device: torch.device) -> Callable[..., Any]:
    """The compiled function of an op for a device, "<op>_cpu" or "<op>_cuda", which takes the GPU and the stream last.

    RuntimeError for a GPU where the CUDA part is not compiled.
    """
    if device.type == "cpu":
        function: Callable[..., Any] = getattr(_C, f"{op}_cpu")
        return function
    _check_cuda_compiled()
    index = torch.cuda.current_device() if device.index is None else device.index
    on_cuda = getattr(_C, f"{op}_cuda")
    return lambda *arguments: on_cuda(*arguments, index, torch.cuda.current_stream(index).cuda_stream)


def team_bytes(*arguments: Any) -> int:
    """Bytes of memory of a team of threads (csrc/team/net.h); use it through dit_fast.mlp_team."""
    return int(_C.team_bytes(*arguments))


def device_limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a block of a GPU may ask for, and how many processors there are."""
    _check_cuda_compiled()
    limits: tuple[int, int] = _C.device_limits(torch.cuda.current_device() if device.index is None else device.index)
    return limits


def cuda_compiled() -> bool:
    """Whether this build has the CUDA part."""
    return bool(_C.cuda_compiled)


def mlp_specs(net: Mlp, hessian: str) -> tuple[list[Any], tuple[int, int]]:
    """Layers, loss and curvature as the core takes them."""
    specs = [
        ((la.outputs, la.inputs, la.weight, -1 if la.bias is None else la.bias, ACTIVATIONS.index(la.activation)), la.slope)
        for la in net.layers
    ]
    return specs, (LOSSES.index(net.loss), CURVATURES.index(hessian))


def addresses(blocks: Sequence[Tensor | None]) -> list[int]:
    """0 for None."""
    return [0 if block is None else block.data_ptr() for block in blocks]


def logged(steps: MlpSteps, start: int) -> tuple[Any, ...]:
    """theta, x, targets and the log from step `start` on, as the core takes them."""
    theta = (steps.theta.data_ptr() + start * steps.theta.stride(0) * steps.theta.element_size(), steps.theta.stride(0))
    log = [
        steps.rows.data_ptr(),
        steps.ids.data_ptr(),
        steps.coefficients.data_ptr(),
        steps.offsets.data_ptr() + 8 * start,
        steps.settings.data_ptr() + 8 * start * steps.settings.stride(0),
    ]
    return theta, (steps.x.data_ptr(), steps.x.stride(0)), steps.targets.data_ptr(), log


def _count_writes(layers: Iterable[Directions]) -> None:
    torch.autograd.graph.increment_version([x for weight, bias, _ in layers for x in (weight, bias) if x is not None])


def _launch(op: str, weight: Tensor, *args: Any) -> None:
    twice = weight.dtype == torch.float64
    if weight.device.type == "cpu":
        getattr(_C, f"{op}_cpu")(twice, *args, torch.get_num_threads())
    elif weight.device.type == "cuda":
        _check_cuda_compiled()
        device = weight.device.index
        getattr(_C, f"{op}_cuda")(twice, *args, device, torch.cuda.current_stream(device).cuda_stream)
    else:
        raise ValueError(f"weight must be on a cpu or cuda device, got {weight.device}")


def _check_cuda_compiled() -> None:
    if not _C.cuda_compiled:
        raise RuntimeError(
            "dit_fast was built for the CPU alone: put nvcc on PATH and rebuild with "
            "'CMAKE_ARGS=-DDIT_FAST_CUDA=ON pip install --force-reinstall --no-deps .'"
        )


def _check_on_cpu(steps: MlpSteps) -> None:
    if steps.theta.device.type != "cpu":
        raise ValueError(f"steps must be on the CPU, got {steps.theta.device}: dit_fast.mlp_team has the ops for a GPU")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
