"""The compiled ops: checks, device and stream here, arithmetic in csrc. The only module that imports `_C`.

Each op works in place on torch tensors and has a plain-torch twin of the same name in dit_fast.ops_torch.
Alphabet: K adjoint columns, B batch, S positions in a sequence, O/I out and in features. Tensors are float32 or
float64, all of one dtype, except `dots` and `coefficients`, which are always float64. All lie on one device; the last
dimension is contiguous, every other stride is free. Autograd does not see what the ops do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dit_fast._C as _C
from dit_fast.mlp import (
    ACTIVATIONS,
    CURVATURES,
    LOSSES,
    Mlp,
    MlpModels,
    MlpSteps,
    check_data,
    check_loss_changes,
    check_retrain,
    check_sweep,
)

Operand = tuple[int, tuple[int, int]]

_DTYPES = (torch.float32, torch.float64)
_NO_OPERAND: Operand = (0, (0, 0))

# samples of `mlp_loss_changes` that go through the net at a time
_LOSS_ROWS = 64


def grad_dot(dots: Tensor, delta: Tensor, activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Inner products of K directions with the gradients of B samples, for one linear layer, added to `dots`.

        dots[k,b] += Σ_s ( Σ_o Σ_i δ[b,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,s,o] v[k,o] )

    Args:
        dots: [K, B] float64, accumulated into. Sums are in double; each Σ_i is of the operands' dtype.
        delta: δ [B, S, O], gradients of each sample's loss with respect to the layer's output.
        activations: a [B, S, I], the layer's inputs.
        weight: U [K, O, I], one direction per column.
        bias: v [K, O], or None for a layer without bias.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: a shape, a device or a stride does not fit; the message names the argument.
        RuntimeError: CUDA tensors where the CUDA part is not compiled.
    """
    sizes = _sizes(delta, activations, weight)
    K, B, _, O, _ = sizes
    _check("delta", delta, weight)
    _check("activations", activations, weight)
    _check("weight", weight, weight)
    _check_shape("dots", dots, (K, B), "[K, B]")
    _check("dots", dots, weight, torch.float64)
    _check_written("dots", dots)
    if bias is not None:
        _check_shape("bias", bias, (K, O), "[K, O]")
        _check("bias", bias, weight)
    operands = [_operand(x) for x in (dots, delta, activations, weight, bias)]
    _launch("grad_dot", weight, sizes, operands)
    torch.autograd.graph.increment_version(dots)


def lowrank_update(weight: Tensor, bias: Tensor | None, coefficients: Tensor, delta: Tensor, activations: Tensor) -> None:
    """A weighted sum of B samples' gradients, added to each of K directions, for one linear layer.

        U[k,o,i] += Σ_b c[k,b] Σ_s δ[b,s,o] a[b,s,i]        v[k,o] += Σ_b c[k,b] Σ_s δ[b,s,o]

    Args:
        weight: U [K, O, I], accumulated into.
        bias: v [K, O], accumulated into, or None for a layer without bias.
        coefficients: c [K, B] float64, any sign; no mean is taken.
        delta: δ [B, S, O], gradients of each sample's loss with respect to the layer's output.
        activations: a [B, S, I], the layer's inputs.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: a shape, a device or a stride does not fit; the message names the argument.
        RuntimeError: CUDA tensors where the CUDA part is not compiled.
    """
    sizes = _sizes(delta, activations, weight)
    K, B, _, O, _ = sizes
    _check("delta", delta, weight)
    _check("activations", activations, weight)
    _check("weight", weight, weight)
    _check_written("weight", weight)
    _check_shape("coefficients", coefficients, (K, B), "[K, B]")
    _check("coefficients", coefficients, weight, torch.float64)
    if bias is not None:
        _check_shape("bias", bias, (K, O), "[K, O]")
        _check("bias", bias, weight)
        _check_written("bias", bias)
    operands = [_operand(x) for x in (weight, bias, coefficients, delta, activations)]
    _launch("lowrank_update", weight, sizes, operands)
    torch.autograd.graph.increment_version([weight] if bias is None else [weight, bias])


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
        *,
        l2: float = 0.0,
        hessian: str = "exact",
    ) -> None:
        check_sweep(net, steps, blocks, momenta, scores)
        _check_on_cpu(steps)
        specs, kinds = mlp_specs(net, hessian)
        self._steps, self._kept = steps, (blocks, momenta, scores)
        self._twice = steps.theta.dtype == torch.float64
        self._model = (specs, kinds, net.loss_scale, l2)
        self._blocks, self._momenta = addresses(blocks), addresses(momenta or ())
        self._scores = (scores.data_ptr(), scores.stride(0))

    def run(self, start: int, stop: int, num_columns: int) -> int | None:
        """Steps stop − 1 … start for the first `num_columns` columns; the step whose scores are not finite, None if all are."""
        steps = self._steps
        if not (0 <= start <= stop <= len(steps.theta) and 0 <= num_columns <= len(self._kept[2])):
            raise ValueError(f"steps {start}..{stop} of {len(steps.theta)} or {num_columns} columns are out of range")
        bad = _C.mlp_sweep_cpu(
            self._twice,
            *self._model,
            (num_columns, len(self._kept[2]), stop - start),
            *logged(steps, start),
            self._blocks,
            self._momenta,
            self._scores,
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
        l2: float = 0.0,
    ) -> None:
        check_retrain(net, steps, models, blocks, momenta)
        _check_on_cpu(steps)
        self._steps, self._models, self._kept = steps, models, (blocks, momenta)
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


def _sizes(delta: Tensor, activations: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    """K, B, S, O, I, after checking that the three 3-dimensional operands agree on them."""
    for name, tensor, shape in (("weight", weight, "[K, O, I]"), ("delta", delta, "[B, S, O]")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}")
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    K, O, I = weight.shape
    B, S, outputs = delta.shape
    if outputs != O:
        raise ValueError(f"delta must have shape [B, S, O] with O = {O} as in weight, got {list(delta.shape)}")
    _check_shape("activations", activations, (B, S, I), "[B, S, I]")
    return K, B, S, O, I


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {letters}, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(tensor.shape)}")


def _check(name: str, tensor: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """Dtype, device and layout; `dtype` None means that of weight, which must be one the ops know."""
    wanted = dtype or weight.dtype
    if wanted not in _DTYPES:
        raise TypeError(f"weight must be float32 or float64, got {_short(wanted)}")
    if tensor.dtype != wanted:
        why = "" if dtype else " as weight is"
        raise TypeError(f"{name} must be {_short(wanted)}{why}, got {_short(tensor.dtype)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} as weight is, got {tensor.device}")
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} must be a plain dense tensor")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}")


def _check_written(name: str, tensor: Tensor) -> None:
    """No element may be reached by two indices: sorted by stride, each dimension must step over the ones before."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise ValueError(f"{name} is written to and must not overlap itself, got strides {list(tensor.stride())}")
            reach += stride * (size - 1)


def _operand(tensor: Tensor | None) -> Operand:
    """Address and the strides of all dimensions but the last."""
    if tensor is None:
        return _NO_OPERAND
    stride = tensor.stride()
    return tensor.data_ptr(), (stride[0], stride[1] if len(stride) == 3 else 0)


def _launch(op: str, weight: Tensor, sizes: tuple[int, ...], operands: list[Operand]) -> None:
    twice = weight.dtype == torch.float64
    if weight.device.type == "cpu":
        getattr(_C, f"{op}_cpu")(twice, sizes, *operands, torch.get_num_threads())
    elif weight.device.type == "cuda":
        _check_cuda_compiled()
        device = weight.device.index
        getattr(_C, f"{op}_cuda")(twice, sizes, *operands, device, torch.cuda.current_stream(device).cuda_stream)
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
