"""What was trained on what: per-sample losses as functions of parameters and a batch of the log."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import modules, numerics
from dit_fast.data import Samples, Unpacked, as_ids, default_unpack, map_tensors, place
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.log import own_version
from dit_fast.trajectory import Trajectory

Params = dict[str, Tensor]


class Problem:
    """The model, the loss of each single sample, and the data the ids of a log point into.

    model: any torch.nn.Module. The values of its trained parameters do not matter, nor do those of its buffers where the log
        holds them: the log's are used. Frozen parameters must be those of the run. It is left as it was.
    per_sample_loss(output, target) -> [B], one unreduced loss per sample and in its unit, such as
        torch.nn.CrossEntropyLoss(reduction="none"). How they were summed in training (mean, sum, weights) is in the log.
    data: tensors with one row per sample, such as (x, y) (tuples and dicts of tensors count), or a map-style Dataset.
        Row j is the sample with id j. None where the log holds the batches (`Recorder(store_batches=True)`), which are used
        in any case.
    unpack(batch) -> (args, kwargs, target): how a batch calls the model. Default: (x, y) calls model(x); a dict with
        "labels" calls model(**the rest).
    collate_fn: as in DataLoader, for a Dataset.
    l2: λ of a penalty ½·λ·‖θ‖² over all logged parameters inside every per-sample loss, which therefore leaves with its
        sample. The `weight_decay` of an optimizer stays; it is in the log already.

    Raises TypeError or ValueError for data without positions or tensors of different lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: Callable[[Any, Any], Tensor],
        data: Any = None,
        *,
        unpack: Callable[[Any], Unpacked] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        l2: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(per_sample_loss):
            raise TypeError("per_sample_loss must be callable: per_sample_loss(output, target) -> [B]")
        if not l2 >= 0:
            raise ValueError(f"l2 must be 0 or positive, got {l2}")
        self.model = modules.inner_module(model)
        self.per_sample_loss = per_sample_loss
        self.samples = None if data is None else Samples(data, collate_fn)
        self.unpack = unpack or default_unpack
        self.l2 = float(l2)

    @property
    def num_samples(self) -> int | None:
        """N, the number of samples in `data`; None where there are none."""
        return None if self.samples is None else self.samples.num_samples

    def __repr__(self) -> str:
        size = sum(p.numel() for p in modules.trainable_parameters(self.model).values())
        samples = "batches of the log" if self.num_samples is None else f"{self.num_samples:,} samples"
        return f"Problem({type(self.model).__name__}, {size:,} parameters, {samples}, l2={self.l2:g})"


@dataclass(frozen=True)
class Batch:
    """One batch as the model takes it; `ids` [B] and `coefficients` a [B] as logged, `step` for messages, `rng` the random
    generator's state before its forward pass where dropout was active."""

    step: int
    ids: Tensor
    coefficients: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rng: Tensor | None = None


class Evaluator:
    """A problem on one trajectory, device and dtype: its losses and outputs as pure functions of the parameters.

    Raises LogError where the model's parameters are not those of the log.
    """

    def __init__(self, problem: Problem, trajectory: Trajectory, device: torch.device, dtype: torch.dtype) -> None:
        self.problem, self.trajectory, self.device, self.dtype = problem, trajectory, device, dtype
        self.shapes: dict[str, torch.Size] = {n: torch.Size(s) for n, (s, _) in trajectory.parameters.items()}
        _match_parameters(problem.model, trajectory)
        self.l2 = problem.l2
        self._places = modules.tensor_places(problem.model)
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be part of a graph later
            self._constants = {name: place(value, device, dtype) for name, value in self._fixed_tensors().items()}

    @classmethod
    def create(
        cls, problem: Problem, trajectory: Trajectory, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> "Evaluator":
        """With the model's device and `default_dtype` where they are None; checks the arguments' types."""
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory must be a dit_fast.Trajectory, got {type(trajectory).__name__}")
        if not isinstance(problem, Problem):
            raise TypeError(f"problem must be a dit_fast.Problem, got {type(problem).__name__}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if problem.samples is None and not trajectory.stores_batches:
            raise ValueError("the problem has no data and the log holds no batches: give Problem(model, loss, data)")
        if device is None:
            device = next((p.device for p in problem.model.parameters()), torch.device("cpu"))
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: torch finds no CUDA device")
        return cls(problem, trajectory, torch.device(device), dtype or default_dtype(trajectory))

    def describe(self) -> dict[str, Any]:
        """For result.meta, when the work is done: the log's hash, the numbers' origin, the versions, and the most memory that
        this process ever had (bytes; on a GPU, that torch ever held there)."""
        return description(self.trajectory, self.l2, self.device, self.dtype)

    @property
    def num_samples(self) -> int:
        """N, the number of samples in the problem's data, or in the log where there are none."""
        return self.problem.num_samples or self.trajectory.num_samples

    def select(self, sample_ids: Any) -> Tensor:
        """The ids asked for [n] int64, all where None; TypeError or ValueError for ids that are not in the data."""
        return selected(sample_ids, self.num_samples)

    @property
    def num_parameters(self) -> int:
        """P, tied parameters counted once."""
        return sum(shape.numel() for shape in self.shapes.values())

    @contextmanager
    def session(self) -> Iterator[None]:
        """The log's train/eval flags, full precision and twice differentiable kernels; everything put back afterwards."""
        flags = modules.training_flags(self.problem.model)
        logged = self.trajectory.training_flags
        with ExitStack() as stack:
            stack.callback(modules.set_training_flags, self.problem.model, flags)
            stack.enter_context(numerics.preserved_state(self.dtype))
            stack.enter_context(numerics.full_precision())
            stack.enter_context(numerics.differentiable_kernels(self.problem.model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if logged is not None:
                modules.set_training_flags(self.problem.model, logged)
            rng = self.trajectory.rng
            if rng is not None and rng != self.device.type:
                raise UnsupportedError(
                    f"the log holds dropout's random states of {rng}, which give other masks on {self.device.type}: "
                    f"score with device='{rng}'"
                )
            modules.refuse_unsupported(self.problem.model, masks_are_logged=rng is not None)
            yield

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """The model in eval mode, as every query is asked."""
        flags = modules.training_flags(self.problem.model)
        self.problem.model.eval()
        try:
            yield
        finally:
            modules.set_training_flags(self.problem.model, flags)

    def params(self, t: int) -> Params:
        """θ[t], checked to be finite (LogError names the step and the parameter)."""
        params = {name: value.to(self.device, self.dtype) for name, value in self.trajectory.params(t).items()}
        # a comparison there would make every step wait for the GPU; the scores themselves are checked
        if self.device.type == "cpu" and not math.isfinite(sum(float(value.sum()) for value in params.values())):
            for name, value in params.items():  # a sum may overflow itself
                if not torch.isfinite(value).all():
                    raise LogError(f"step {t}: parameter '{name}' holds NaN or infinity; score a window that ends before it")
        return params

    def batches(self, t: int) -> list[Batch]:
        """The micro-batches of step t, one for an ordinary step."""
        ids, coefficients = self.trajectory.batch_ids(t), self.trajectory.coefficients(t)
        parts = self.trajectory.micro_batches(t)
        stored = self.trajectory.stored_batches(t) or [None] * len(parts)
        states = self.trajectory.rng_states(t) or [None] * len(parts)
        return [
            # the state in memory of its own: torch reads it as larger numbers, which a file does not align
            self.batch(t, ids[part], coefficients[part], batch, None if rng is None else rng.clone())
            for part, batch, rng in zip(parts, stored, states, strict=True)
        ]

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some rows of a batch of the log as a batch of its own."""
        if self.trajectory.stores_batches:
            size = len(batch.ids)

            def cut(leaf: Tensor) -> Tensor:
                return leaf[rows] if leaf.ndim and len(leaf) == size else leaf

            args, kwargs, target = map_tensors((batch.args, batch.kwargs, batch.target), cut)
            return Batch(batch.step, batch.ids[rows], batch.coefficients[rows], args, kwargs, target, batch.rng)
        return self.batch(batch.step, batch.ids[rows], batch.coefficients[rows])

    def batch(self, t: int, ids: Tensor, coefficients: Tensor, stored: Any = None, rng: Tensor | None = None) -> Batch:
        """These samples as the model takes them, from the data or as `stored`; LogError for ids outside the data."""
        size = self.num_samples
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise LogError(
                f"step {t}: sample id {int(ids.max())} is outside the data ({size} samples): is it another data set?"
            )
        if stored is None:
            assert self.problem.samples is not None
            stored = self.problem.samples.batch(ids)
        args, kwargs, target = self.unpack(stored)
        return Batch(t, ids, coefficients.to(self.device, self.dtype), args, kwargs, target, rng)

    def unpack(self, batch: Any) -> Unpacked:
        """(args, kwargs, target) on this device and in this dtype."""
        args, kwargs, target = self.problem.unpack(batch)
        return (
            place(tuple(args), self.device, self.dtype),
            place(dict(kwargs), self.device, self.dtype),
            self.place(target),
        )

    def place(self, tree: Any) -> Any:
        """Tensors on this device, floating ones in this dtype."""
        return place(tree, self.device, self.dtype)

    def call(self, params: Params, fn: Callable[[nn.Module], Any]) -> Any:
        """fn(model) with `params` in the model's place of its own; differentiable in them, model untouched."""
        kept = []
        try:
            for name, value in {**self._constants, **params}.items():
                for tensors, key in self._places[name]:
                    kept.append((tensors, key, tensors[key]))
                    tensors[key] = value
            return fn(self.problem.model)
        finally:
            for tensors, key, own in kept:
                tensors[key] = own

    def output(self, params: Params, batch: Batch) -> Any:
        """The model's output for a batch."""
        self.seed(batch)
        return self.call(params, lambda model: model(*batch.args, **batch.kwargs))

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """ℓ_b(θ) [B] without the l2 part."""
        self.seed(batch)
        return self.call(params, lambda model: self.losses_of(model(*batch.args, **batch.kwargs), batch.target, len(batch.ids)))

    def batch_gradient(self, t: int, params: Params) -> Params:
        """g_t = Σ_b a_b ∇ℓ_b(θ), the l2 part included, over the micro-batches of step t."""
        inputs = {name: value.detach().requires_grad_() for name, value in params.items()}
        gradient = {name: torch.zeros_like(value) for name, value in params.items()}
        for batch in self.batches(t):
            total = (batch.coefficients * self.losses(inputs, batch)).sum()
            if total.requires_grad:
                flat = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
                for name, piece in zip(inputs, flat, strict=True):
                    gradient[name] += 0 if piece is None else piece
            if self.l2:
                for name, value in params.items():
                    gradient[name] += self.l2 * batch.coefficients.sum() * value
        return gradient

    def seed(self, batch: Batch) -> None:
        """Puts the random generator where it was before the batch's forward pass, so that dropout's masks come again."""
        if batch.rng is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(batch.rng, self.device)
        else:
            torch.set_rng_state(batch.rng)

    def losses_of(self, output: Any, target: Any, size: int) -> Tensor:
        """per_sample_loss(output, target) checked to be one floating number for each of `size` samples."""
        losses = self.problem.per_sample_loss(output, target)
        if not isinstance(losses, Tensor):
            raise TypeError(f"per_sample_loss must return a tensor [B], got {type(losses).__name__}")
        if losses.ndim == 0:
            raise ValueError(
                "per_sample_loss returned a scalar; it must return one loss per sample, [B] "
                '(reduction="none" in torch\'s losses)'
            )
        if tuple(losses.shape) != (size,):
            raise ValueError(
                f"per_sample_loss returned shape {tuple(losses.shape)} for a batch of {size}; it must be [{size}]: "
                "sum or average whatever lies behind the first dimension"
            )
        return losses

    def _fixed_tensors(self) -> dict[str, Tensor]:
        """Buffers (the log's where it has them) and parameters that were not trained; none that is tied to a parameter."""
        model, logged = self.problem.model, self.trajectory.constants
        fixed = {n: p.detach() for n, p in model.named_parameters() if n not in self.shapes}
        fixed |= {n: b.detach() for n, b in model.named_buffers()}
        for name, value in (logged or {}).items():
            if name not in fixed or fixed[name].shape != value.shape:
                raise LogError(f"the log's buffer '{name}' {tuple(value.shape)} is not in the model: is it another model?")
            fixed[name] = value
        return {name: value for name, value in fixed.items() if name in self._places}


def _match_parameters(model: nn.Module, trajectory: Trajectory) -> None:
    own, logged = dict(model.named_parameters()), trajectory.parameters
    for name, (shape, _) in logged.items():
        if name not in own:
            raise LogError(f"the log's parameter '{name}' {tuple(shape)} is not in the model: is it another model?")
        if tuple(own[name].shape) != tuple(shape):
            raise LogError(f"parameter '{name}' is {tuple(own[name].shape)} in the model, {tuple(shape)} in the log")
    digests: Mapping[str, str] | None = trajectory.frozen_digests
    for name in digests or {}:
        if name not in own:
            raise LogError(f"the log's frozen parameter '{name}' is not in the model: is it another model?")
    for name, value in own.items():
        if name in logged:
            continue
        if digests is None:
            if value.requires_grad:
                raise LogError(
                    f"the model's parameter '{name}' is not in the log; if it was not trained, set requires_grad_(False) on it"
                )
        elif digests.get(name) != modules.tensor_digest(value):
            raise LogError(f"the model's frozen parameter '{name}' is not the one the run was logged with")


def description(trajectory: Trajectory, l2: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """`Evaluator.describe`."""
    return {
        "log": trajectory.digest,
        "steps": trajectory.num_steps,
        "l2": l2,
        "device": str(device),
        "peak_memory": numerics.peak_memory(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"dit_fast": own_version(), "torch": torch.__version__},
    }


def selected(sample_ids: Any, num_samples: int) -> Tensor:
    """`Evaluator.select`."""
    if sample_ids is None:
        return torch.arange(num_samples)
    ids = as_ids(sample_ids, "sample_ids")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_samples):
        raise ValueError(f"sample_ids must lie in 0..{num_samples - 1}, got {int(ids.min())}..{int(ids.max())}")
    return ids


def default_dtype(trajectory: Trajectory) -> torch.dtype:
    """The widest of the parameters' dtypes; UnsupportedError for anything below float32.

    float64 for optimizers whose step is not linear in the gradient: Adam's g/√v loses float32's digits where |g| ≈ eps.
    """
    dtypes = {dtype for _, dtype in trajectory.parameters.values()}
    if not dtypes <= {torch.float32, torch.float64}:
        raise UnsupportedError(f"parameters of dtype {sorted(map(str, dtypes))}: float32 and float64 are supported")
    is_linear = all(rule.is_linear for rule in trajectory.optimizer)
    return torch.float64 if torch.float64 in dtypes or not is_linear else torch.float32
