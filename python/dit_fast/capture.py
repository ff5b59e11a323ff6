"""Per-sample gradients in factors, taken from the user's own forward and backward passes by hooks.

A forward pass of the model with gradients is a `_Pass`; it lives as long as its graph. Gradients that arrive at the outputs of
layers are a_b δ_b, so they are divided by a_b when the samples are named. Named batches are those of the backward passes in
their order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import numerics
from dit_fast.data import default_unpack, leaves, place
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.factor_check import GradientCheck
from dit_fast.factor_log import FactorSpec, PartSpec, layout_of, projections_of
from dit_fast.factor_options import FactorOptions
from dit_fast.factor_store import pack, plan, spec_of, with_digests
from dit_fast.layer_factors import Call, Layer, Raw, find_layers, parts_of
from dit_fast.named_batches import Named, to_host
from dit_fast.optimizers import Clip
from dit_fast.output_slopes import check_is_likelihood, sampled_slopes, slopes_and_curvature


@dataclass
class _LayerCall:
    """One call of a layer. output: until the model's forward pass ends. arrived: the gradient of the user's backward pass.
    rows: gradients of our own."""

    layer: int
    inputs: tuple[Tensor, ...]
    versions: list[int]
    output: Tensor | None
    shape: torch.Size
    output_version: int
    arrived: Tensor | None = None
    rows: list[Tensor | None] = field(default_factory=list)


@dataclass(eq=False)
class _Pass:
    """One forward pass of the model. output: its z, where slopes are wanted; output_gradient: what arrived there; backward:
    the number of the backward() that reached it first."""

    number: int
    calls: list[_LayerCall] = field(default_factory=list)
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    is_taken: bool = False
    backward: int = -1


class Capture:
    """The factors of the steps of a run; `hooks` sets it going. spec: what the log says of them, whole after the first step.

    Raises ValueError or UnsupportedError for parameters that cannot be had.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], options: FactorOptions, clip: Clip) -> None:
        self.options = options
        self._model, self._clip = model, clip
        self._layers = find_layers(model, params, options.patterns)
        self._params = {name: params[name] for layer in self._layers for name in layer.names.values()}
        self._shapes = {name: p.shape for name, p in self._params.items()}
        wide = torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32
        spec = spec_of(options, self._layers, self._shapes, wide)
        projections = projections_of(spec, self._shapes)
        self.spec = with_digests(spec, projections)
        device = next(iter(self._params.values())).device
        self._projections = {
            name: replace(p, **{k: None if (m := getattr(p, k)) is None else m.to(device, wide) for k in ("outputs", "inputs")})
            for name, p in projections.items()
        }
        self._forms: list[list[list[PartSpec]]] | None = None
        self._generator = torch.Generator().manual_seed(options.seed)
        self._unpack: Callable[[Any], Any] = options.unpack or default_unpack
        self._open: _Pass | None = None
        self._number, self._last = 0, -1
        self._done: list[_Pass] = []
        self._collected: list[tuple[Tensor, ...]] = []
        self._check: GradientCheck | None = None
        self._is_paused = self._is_probed = self._came_late = self._uses_tf32 = False

    @property
    def may_take_batch(self) -> bool:
        """Whether the batch itself is of use."""
        return self.options.per_sample_loss is not None

    @property
    def needs_batch(self) -> bool:
        """Whether nothing goes without it."""
        return self.options.curvature != "fisher"

    def hooks(self) -> list[Any]:
        """Register everything; the handles."""
        handles: list[Any] = [
            self._model.register_forward_pre_hook(self._begin, prepend=True),
            self._model.register_forward_hook(self._end),
        ]
        # in front: what the layer itself gives, and, where the model is a layer, before its end
        for number, layer in enumerate(self._layers):
            handles.append(layer.module.register_forward_hook(self._watch(number), with_kwargs=True, prepend=True))
        return handles

    @contextmanager
    def paused(self) -> Any:
        """Forward passes that are not the training's."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def project(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients [Q, *shape] of the covered parameters as the log has them."""
        found = {name: block[name] for name in self._params}
        return {name: self._projections[name](q) if name in self._projections else q for name, q in found.items()}

    def adopt(self, spec: FactorSpec) -> None:
        """Go on in the forms of a log; its options are the same."""
        self.spec = spec

    def collect(self, where: str, pending: Sequence[Named], starts_chunk: bool, is_last: bool = False) -> None:
        """Take the factors of the backward passes so far that have their samples named. is_last: in front of the step, with
        everything checked. LogError, ValueError and UnsupportedError begin with `where`."""
        backends: Any = torch.backends
        self._uses_tf32 = "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
        try:
            with torch.no_grad(), numerics.full_precision(), self.paused():
                self._collect(pending, starts_chunk, is_last)
        except (LogError, ValueError, UnsupportedError) as error:
            if str(error).startswith(where):
                raise
            raise type(error)(f"{where}: {error}") from error

    def take(self) -> tuple[tuple[Tensor, ...], ...]:
        """The factors of the step, one tuple per micro-batch, and none from now on."""
        found = tuple(self._collected)
        self.drop()
        return found

    def drop(self) -> None:
        """Forget what was seen since the last step."""
        self._collected, self._done, self._check, self._last = [], [], None, -1

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._open = None
        if self._is_paused or not torch.is_grad_enabled():
            return
        layer = self._layers[0]
        role, name = next(iter(layer.names.items()))
        if layer.module._parameters.get(role) is self._params[name]:  # else another's values in the model's place
            self._open = _Pass(self._number)
            self._number += 1

    def _watch(self, number: int) -> Callable[..., None]:
        layer = self._layers[number]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            run = self._open
            if run is None or self._is_paused:
                return
            inputs = [*args, *kwargs.values()]
            if not isinstance(output, Tensor) or not inputs or not all(isinstance(value, Tensor) for value in inputs):
                raise UnsupportedError(f"factors: {layer} takes or gives something else than tensors; {layer.advice}")
            held = tuple(value.detach() for value in inputs)
            call = _LayerCall(number, held, [_version(value) for value in inputs], output, output.shape, _version(output))
            run.calls.append(call)
            if self.options.curvature != "ggn" and output.requires_grad:

                def arrive(gradient: Tensor) -> None:
                    if not self._is_paused:
                        call.arrived = gradient if call.arrived is None else call.arrived + gradient
                        self._arrived(run)

                output.register_hook(arrive)

        return hook

    def _arrived(self, run: _Pass) -> None:
        """A gradient of the user's backward pass reached this forward pass."""
        if run.is_taken:
            self._came_late = True
        elif run not in self._done:
            run.backward = torch._C._current_graph_task_id()
            is_another = all(other.backward != run.backward for other in self._done)
            if is_another and all(p.grad is None for p in self._params.values()):  # those before were thrown away
                self._done = []
            self._done.append(run)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The model's forward pass ends: gradients of our own, which need its graph."""
        run, self._open = self._open, None
        if run is None or self._is_paused:
            return
        with self.paused():
            if not self._is_probed:
                self._probe(run, output)
            for value in leaves(output):
                if value.requires_grad:
                    value.register_hook(lambda gradient: None if self._is_paused else self._arrived(run))
            if self.options.per_sample_loss is not None:
                self._watch_output(run, output)
        for call in run.calls:
            call.output = None

    def _watch_output(self, run: _Pass, output: Any) -> None:
        options = self.options
        if not isinstance(output, Tensor) or not output.requires_grad or output.ndim == 0:
            if options.curvature == "fisher":
                return
            kind = f"of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise UnsupportedError(f"factors: curvature={options.curvature!r} needs an output [B] or [B, C], this is {kind}")
        run.output = output.detach()

        def arrive(gradient: Tensor) -> None:
            if not self._is_paused:
                run.output_gradient = gradient if run.output_gradient is None else run.output_gradient + gradient

        output.register_hook(arrive)
        if options.curvature == "fisher":
            return
        for call in run.calls:
            if call.output is not None and _version(call.output) != call.output_version:
                raise UnsupportedError(
                    f"factors: the output of {self._layers[call.layer]} is changed in place (an activation with inplace=True); "
                    f"curvature={options.curvature!r} needs inplace=False"
                )
        if options.curvature == "ggn":
            flat = output.reshape(len(output), -1)
            for c in range(flat.shape[1]):
                self._pull(run, flat[:, c].sum(), None)
        else:
            self._pull(run, output, sampled_slopes(output, self._generator))

    def _pull(self, run: _Pass, output: Tensor, cotangent: Tensor | None) -> None:
        """One more row: the gradients at the outputs of all layers."""
        calls = [call for call in run.calls if call.output is not None and call.output.requires_grad]
        outputs = [call.output for call in calls]
        if outputs:
            found = torch.autograd.grad(output, outputs, cotangent, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
            for call, gradient in zip(calls, found, strict=True):
                call.rows.append(gradient)

    def _probe(self, run: _Pass, output: Any) -> None:
        """Whether the output of the first sample depends on the first row of every layer's output alone."""
        self._is_probed = True
        found = [v for v in leaves(output) if v.requires_grad and v.ndim and (v.is_floating_point())]
        calls = [call for call in run.calls if call.output is not None and call.output.requires_grad]
        if not found or not calls or len({len(v) for v in found}) > 1 or len(found[0]) < 2:
            return
        size, generator = len(found[0]), torch.Generator().manual_seed(0)
        total = sum((v[0] * torch.randn(v[0].shape, generator=generator).to(v)).sum() for v in found)
        gradients = torch.autograd.grad(total, [c.output for c in calls], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        for call, gradient in zip(calls, gradients, strict=True):
            if gradient is not None and gradient.ndim and len(gradient) == size and gradient[1:].any():
                raise UnsupportedError(
                    f"factors: the model's output for the first sample depends on more than the first row of "
                    f"{self._layers[call.layer]}: {self._layers[call.layer].batch_advice}"
                )

    def _collect(self, pending: Sequence[Named], starts_chunk: bool, is_last: bool) -> None:
        if self._came_late:
            raise UnsupportedError("factors: a second backward() through a forward pass whose samples were named before it")
        if starts_chunk and self._check is None:
            self._check = GradientCheck(self._params, self.options.l2, self._clip, self._uses_tf32)
        while self._done and len(self._collected) < len(pending):
            run = self._done.pop(0)
            if run.number < self._last:
                raise UnsupportedError(
                    "factors: the model's forward passes and their backward() came in different orders, so it is not known "
                    "which samples are whose; call backward() after each forward pass"
                )
            run.is_taken, self._last = True, run.number
            self._collected.append(self._factors(run, pending[len(self._collected)]))
        if not is_last:
            return
        if self._done or len(self._collected) != len(pending):
            raise LogError(
                f"factors: {len(self._collected) + len(self._done)} backward() through forward passes of the model for "
                f"{len(pending)} named batches; name one batch for each, and call the model itself, as model(x)"
            )
        if self._check is not None and starts_chunk:
            self._check.compare({name: p.grad for name, p in self._params.items()})

    def _factors(self, run: _Pass, named: Named) -> tuple[Tensor, ...]:
        """The tensors to be logged of one pass, on their way to the host."""
        size = len(named.ids)
        if (named.coefficients == 0).any():
            raise ValueError(
                "factors: a sample with coefficient 0 leaves no trace in the backward pass; leave it out of the batch"
            )
        leading = self._slopes(run, named)
        slopes = leading[0] if leading else None
        num_rows = {"fisher": 1, "sampled ggn": 2}.get(self.options.curvature) or (slopes.shape[1] if slopes is not None else 1)
        calls: list[list[Call]] = [[] for _ in self._layers]
        for call in run.calls:
            calls[call.layer].append(Call(call.inputs, self._deltas(call, named, num_rows)))
        parts = [parts_of(layer, own, size, num_rows) for layer, own in zip(self._layers, calls, strict=True)]
        for layer, own in zip(self._layers, calls, strict=True):
            self._refuse_unseen(layer, own)
        if self._forms is None:
            self._forms = self._choose_forms(parts)
        if self._check is not None:
            self._check.add(parts, named.coefficients, slopes)
        flat = zip((p for own in parts for p in own), (f for own in self._forms for f in own), strict=True)
        try:
            stored = [tensor for part, forms in flat for tensor in pack(part, forms, self._projections, self._shapes)]
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(f"factors: their shapes are not those of the first step ({error})") from error
        dtype, wide = self.spec.torch_dtype, next(iter(self._params.values())).dtype
        kept = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in stored]
        lead = [tensor.to(torch.float64 if wide == torch.float64 else torch.float32) for tensor in leading]
        borrowed = {value.untyped_storage().data_ptr() for call in run.calls for value in (*call.inputs, *_given(call))}
        return tuple(_kept(tensor, borrowed) for tensor in (*lead, *kept))

    def _deltas(self, call: _LayerCall, named: Named, num_rows: int) -> Tensor:
        """[B, R, …]: the gradients of rows at a layer's output."""
        layer = self._layers[call.layer]
        if call.versions != [_version(value) for value in call.inputs]:
            raise UnsupportedError(f"factors: the input of {layer} was changed in place before its samples were named")
        rows: list[Tensor | None] = list(call.rows)
        if self.options.curvature != "ggn":
            own = call.arrived
            if own is not None:
                size = len(named.ids)
                if own.ndim and len(own) == size:
                    weights = named.coefficients.to(own)
                    own = own.detach() / weights.reshape(-1, *[1] * (own.ndim - 1))
            rows.insert(0, own)
        example = next((row for row in rows if row is not None), None)
        if example is None:
            return call.inputs[0].new_zeros(
                len(named.ids), num_rows, *call.shape[1:], dtype=next(iter(self._params.values())).dtype
            )
        rows += [None] * (num_rows - len(rows))
        if num_rows == 1:
            return example.detach()[:, None]
        return torch.stack([torch.zeros_like(example) if row is None else row.detach() for row in rows], 1)

    def _refuse_unseen(self, layer: Layer, calls: Sequence[Call]) -> None:
        for name in layer.names.values() if not calls else ():
            if self._params[name].grad is not None:
                raise UnsupportedError(
                    f"factors: parameter '{name}' has a gradient, but {layer} was not called in the forward pass: it is used "
                    f"otherwise; {layer.advice}"
                )

    def _choose_forms(self, parts: list[list[Raw]]) -> list[list[list[PartSpec]]]:
        """By the first batch, or as the log that is gone on with has it."""
        made = [[plan(layer, p, self.spec, self._shapes) for p in own] for layer, own in zip(self._layers, parts, strict=True)]
        if not self.spec.parts:
            self.spec = replace(self.spec, parts=tuple(spec for own in made for forms in own for spec in forms))
            layout_of(self.spec, {name: self._shapes[name] for name in self._shapes})
            return made
        known: dict[str, PartSpec] = {spec.weight: spec for spec in self.spec.parts}
        forms: list[list[list[PartSpec]]] = []
        for own in made:
            forms.append([])
            for specs in own:
                first = known.get(specs[0].weight)
                names = [specs[0].weight, *(s.weight for s in specs[1:]), *([specs[0].bias] if specs[0].bias else [])]
                if first is None:
                    raise LogError(f"factors: the log has none of '{specs[0].weight}'")
                forms[-1].append([first] if first.kind != "rows" else [known[name] for name in names if name in known])
        return forms

    def _slopes(self, run: _Pass, named: Named) -> tuple[Tensor, ...]:
        """(slopes, curvature) where they are logged; checks of what arrived at the model's output."""
        loss, output = self.options.per_sample_loss, run.output
        if loss is None or output is None or named.batch is None:
            return ()
        is_checked = self._check is not None
        if self.options.curvature != "ggn" and not is_checked:
            return ()
        target = place(self._unpack(named.batch)[2], output.device, output.dtype)
        slopes, curvature = slopes_and_curvature(loss, output, target, self.options.curvature != "fisher")
        if len(slopes) != len(named.ids):
            raise ValueError(f"factors: the model's output has {len(slopes)} rows for {len(named.ids)} samples")
        if is_checked and run.output_gradient is not None:
            weights = named.coefficients.to(slopes)[:, None]
            arrived = run.output_gradient.detach().reshape(slopes.shape)
            difference = (weights * slopes - arrived).abs().max()
            if difference > 1e-3 * arrived.abs().max() + 1e-30:
                raise LogError(
                    "factors: what arrives at the model's output is not per_sample_loss times the coefficients: is the batch "
                    "that of these samples, and are reduction, scale and coefficients those of the loss given to backward()?"
                )
        if self.options.curvature == "sampled ggn":
            check_is_likelihood(output, curvature)
        return (slopes, curvature) if self.options.curvature == "ggn" else ()


def _given(call: _LayerCall) -> list[Tensor]:
    """Gradients that autograd may still own."""
    return [value for value in (call.arrived, *call.rows) if value is not None]


def _kept(tensor: Tensor, borrowed: set[int]) -> Tensor:
    """On the host in memory of its own, which it may have already."""
    storage = tensor.untyped_storage()
    is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    is_own = tensor.device.type == "cpu" and is_whole and storage.data_ptr() not in borrowed
    return tensor if is_own else to_host(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
