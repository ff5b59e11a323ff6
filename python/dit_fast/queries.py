"""What influence is asked on: scalar functions of the model, and their gradients at a window's ends.

A query has Q values; each is a column of the result. It runs in eval mode. Every constructor takes inputs as the model
does, with the batch in front, on any device and in any floating dtype; they are moved as needed.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.data import leaves, map_tensors
from dit_fast.errors import explained
from dit_fast.problem import Evaluator, Params

# rows of a query with many inputs that go through the model at once
CHUNK = 1024

PartFunction = Callable[[nn.Module, Evaluator], Tensor]


@dataclass(frozen=True)
class Part:
    """A piece of a query small enough for one pass: fn(model, evaluator) [n] is added to the values at `rows`."""

    rows: slice
    fn: PartFunction


@dataclass(frozen=True, repr=False)
class Query:
    """`size` scalars of a model called `label`; made by the functions of this module.

    size is None where only the model tells (`custom`, `parameter`). `by_step` holds ready gradients (`gradients`) in
    place of parts. `batch`: what `unpack` takes, where the query is the mean per-sample loss over it (`loss`); `each`: where
    it is the per-sample loss of each of its samples (`losses`).
    """

    label: str
    size: int | None
    parts: tuple[Part, ...] = ()
    by_step: Mapping[int, Tensor | Mapping[str, Tensor]] | None = None
    batch: Any = None
    each: Any = None

    def __repr__(self) -> str:
        values = "as many values as it gives" if self.size is None else f"{self.size} value{'s' * (self.size != 1)}"
        return f"Query({self.label!r}, {values})"

    def names(self, size: int) -> list[str]:
        """A label for each of the `size` values."""
        return [self.label] if size == 1 else [f"{self.label}[{i}]" for i in range(size)]


def loss(x: Any, y: Any = None) -> Query:
    """Mean of the problem's per-sample loss over a set, without the l2 part: (1/n) Σ ℓ(x_i, y_i). Q = 1.

    x, y: what the problem's `unpack` takes as (x, y), n rows; or x alone where it takes one object (a dict with "labels").
    """
    size, pieces = _chunks(x, y)

    def part(piece: Any) -> Part:
        return Part(slice(0, 1), lambda model, ev: _losses(model, ev, piece).sum().reshape(1) / size)

    return Query("loss", 1, tuple(part(piece) for _, piece in pieces), batch=x if y is None else (x, y))


def losses(x: Any, y: Any = None) -> Query:
    """The problem's per-sample loss of each row, without the l2 part: ℓ(x_i, y_i). Q = n."""
    size, pieces = _chunks(x, y)
    query = _of_rows("loss", size, pieces, lambda model, ev, piece, rows: _losses(model, ev, piece))
    return replace(query, each=x if y is None else (x, y))


def logit(x: Any, index: int | tuple[int, ...] = 0) -> Query:
    """The output z_index of the model for each row of x [n, ...]. Q = n.

    index: position behind the batch dimension: a class, or a tuple such as (position, class). A model with one output per
    sample ([n] or [n, 1]) has index 0. The output is a tensor, or a dict or object with `logits`, or a tuple with it first.
    """
    return _of_outputs(x, f"logit {_label(index)}", lambda z: _pick(z, index))


def probability(x: Any, index: int | tuple[int, ...]) -> Query:
    """softmax(z)_index over the last dimension of the output for each row of x; Q = n.

    A model with one output per sample is binary: index 1 is sigmoid(z), index 0 is 1 − sigmoid(z).
    """

    def value(z: Tensor) -> Tensor:
        if z.ndim == 1:
            if index not in (0, 1):
                raise ValueError(f"a model with one output per sample has the classes 0 and 1, not {index}")
            return torch.sigmoid(z if index == 1 else -z)
        return _pick(torch.softmax(z, -1), index)

    if isinstance(index, int) and index < 0:
        raise ValueError(f"index must be 0 or positive, got {index}")
    return _of_outputs(x, f"probability {_label(index)}", value)


def margin(x: Any, y: Any) -> Query:
    """z_y − log Σ_{c≠y} exp z_c = log(p_y / (1 − p_y)) for each row; Q = n. Positive: the class y is more likely than not.

    y: class numbers [n]. With one output per sample it is binary: (2y − 1)·z, y in {0, 1}.
    """
    labels = torch.as_tensor(y)

    def value(z: Tensor, rows: slice) -> Tensor:
        target = labels[rows].to(z.device)
        if z.ndim > 2:
            raise ValueError(f"margin needs an output [n, classes], the model's is {tuple(z.shape)}")
        last = z.shape[1] - 1 if z.ndim == 2 else 1
        if labels.min() < 0 or labels.max() > last:
            raise ValueError(f"y must lie in 0..{last}, the model's classes; got {labels.min():g}..{labels.max():g}")
        if z.ndim == 1:
            return (2 * target.to(z.dtype) - 1) * z
        own = torch.nn.functional.one_hot(target.long(), z.shape[1]).bool()
        return z.masked_select(own) - torch.logsumexp(z.masked_fill(own, -torch.inf), 1)

    size, pieces = _chunks(x, None)
    if labels.shape != (size,):
        raise ValueError(f"y must be class numbers [{size}], got shape {tuple(labels.shape)}")
    return _of_rows("margin", size, pieces, lambda model, ev, piece, rows: value(_outputs(model, ev, piece), rows))


def parameter(name: str, index: int | tuple[int, ...] | None = None) -> Query:
    """One element of a parameter, θ_name[index], or every element where index is None. Q = 1, or the parameter's size."""
    read = attrgetter(name)

    def value(model: nn.Module, ev: Evaluator) -> Tensor:
        if name not in ev.shapes:
            raise ValueError(f"query parameter '{name}' is not in the log, which has {', '.join(ev.shapes)}")
        try:
            return read(model).reshape(-1) if index is None else read(model)[index].reshape(-1)
        except IndexError as error:
            raise ValueError(f"index {index} is not in parameter '{name}' of shape {tuple(ev.shapes[name])}") from error

    label = name if index is None else f"{name}[{_label(index)}]"
    return Query(label, None, (Part(slice(None), value),))


def feature(x: Tensor, index: int | tuple[int, ...], feature: int | tuple[int, ...]) -> Query:
    """∂z_index/∂x_feature, the sensitivity of an output to an input feature, for each row of x [n, ...]. Q = n.

    index: as in `logit`; feature: position behind the batch dimension of x, which must be a floating tensor.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        raise TypeError("feature needs a floating tensor x")

    def value(model: nn.Module, ev: Evaluator, piece: Tensor, rows: slice) -> Tensor:
        def total(inputs: Tensor) -> Tensor:
            return _pick(logits_of(model(inputs)), index).sum()

        return _pick(torch.func.grad(total)(ev.place(piece)), feature)

    size, pieces = _chunks(x, None)
    return _of_rows(f"d logit {_label(index)} / d x[{_label(feature)}]", size, pieces, value)


def custom(fn: Callable[[nn.Module], Tensor], name: str = "custom") -> Query:
    """fn(model) → a scalar or [Q]: any differentiable function of the model.

    fn may call the model and read its parameters (`model.layer.weight`), through the `model` it is given.
    """
    if not callable(fn):
        raise TypeError("custom needs a function fn(model) -> scalar or [Q]")

    def value(model: nn.Module, ev: Evaluator) -> Tensor:
        result = fn(model)
        if not isinstance(result, Tensor) or result.ndim > 1 or not result.is_floating_point() or not result.numel():
            raise ValueError("a custom query must return a floating scalar tensor or a vector [Q]")
        return result.reshape(-1)

    return Query(name, None, (Part(slice(None), value),))


def gradients(by_step: Mapping[int, Tensor | Mapping[str, Tensor]], name: str = "gradients") -> Query:
    """Ready gradients ∇query(θ[t]) [Q, P] (or [P]) at every window end t asked for, parameters flat in the log's order.

    Or {step: {parameter: [Q, *shape]}}; the gradient of a parameter that is left out is taken to be 0. For projected factors
    (`Trajectory.factor_layout`) they may also be given as projected: [Q, R] flat in the order of the layout's shapes, or by
    parameter. Good for scoring only: `leave_one_out` needs the query's value.
    """
    if not by_step:
        raise ValueError("gradients needs {step: [Q, P]} for at least one step")
    blocks: dict[int, Tensor | Mapping[str, Tensor]] = {}
    for t, block in by_step.items():
        if isinstance(block, Mapping):
            blocks[int(t)] = {str(n): torch.as_tensor(g).detach() for n, g in block.items()}
        else:
            blocks[int(t)] = torch.atleast_2d(torch.as_tensor(block).detach())
    counts = {_num_values(block) for block in blocks.values()}
    flat = {block.shape[1] for block in blocks.values() if isinstance(block, Tensor)}
    if len(counts) != 1 or len(flat) > 1 or None in counts:
        raise ValueError("gradients needs {step: [Q, P]} with the same Q and P at every step")
    return Query(name, counts.pop(), by_step=blocks)


def _num_values(block: Tensor | Mapping[str, Tensor]) -> int | None:
    """Q of a ready gradient; None where its parts do not agree."""
    if isinstance(block, Tensor):
        return len(block) if block.ndim == 2 else None
    found = {len(value) if value.ndim else None for value in block.values()}
    return found.pop() if len(found) == 1 else None


def values(ev: Evaluator, params: Params, query: Query) -> Tensor:
    """The query's values [Q] at `params`, differentiable in them. The caller has the model in eval mode."""
    if query.by_step is not None:
        raise ValueError("queries.gradients has no value, only gradients: it cannot be retrained or refined")
    results = [(part.rows, part_values(ev, params, part)) for part in query.parts]
    if query.size is None:
        return results[0][1]
    total = results[0][1].new_zeros(query.size)
    for rows, result in results:
        total = total.index_add(0, torch.arange(query.size, device=total.device)[rows], result)
    return total


def query_gradient(ev: Evaluator, t: int, params: Params, query: Query, first: Tensor | None = None) -> Params:
    """∇query(θ[t]) as one block [Q, *shape] per parameter, part by part. The caller has the model in eval mode.

    first: the values of the first part, where they were asked already; `params` are then the leaves they were made of.
    """
    if query.by_step is not None:
        return _ready_gradient(ev, t, query.by_step)
    inputs = _leaves(params) if first is None else params
    block: Params | None = None
    for part in query.parts:
        result = part_values(ev, inputs, part) if first is None else first
        first = None
        block = block or {n: v.new_zeros((query.size or len(result), *v.shape)) for n, v in params.items()}
        rows = torch.arange(query.size or len(result))[part.rows].tolist()
        for i, row in enumerate(rows if result.requires_grad else []):
            row_gradient = torch.autograd.grad(
                result[i], list(inputs.values()), retain_graph=i + 1 < len(rows), allow_unused=True
            )
            for name, piece in zip(inputs, row_gradient, strict=True):
                if piece is not None:
                    block[name][row].add_(piece.detach())
    assert block is not None
    return block


def as_list(query: Query | Sequence[Query]) -> list[Query]:
    """One query or several as a list; TypeError for anything else."""
    asked = [query] if isinstance(query, Query) else list(query) if isinstance(query, Sequence) else [query]
    if not asked or not all(isinstance(item, Query) for item in asked):
        raise TypeError("query must be one of dit_fast.queries, such as queries.loss(x, y), or a list of them")
    return asked


def sizes(ev: Evaluator, asked: Sequence[Query]) -> list[int]:
    """The number of values of each query, those unknown until now found at the end of the run.

    Warns of a query that does not depend on the parameters: its scores are all 0.
    """
    params = _leaves(ev.params(ev.trajectory.num_steps))
    with ev.eval_mode():
        return [_look(ev, params, query)[0] for query in asked]


def sizes_and_gradients(ev: Evaluator, asked: Sequence[Query]) -> tuple[list[int], Params]:
    """`sizes`, and `gradients_at` the end of the run, for little more than either."""
    params = _leaves(ev.params(ev.trajectory.num_steps))
    found, blocks = [], []
    with ev.eval_mode():
        for query in asked:
            size, first = _look(ev, params, query)
            found.append(size)
            blocks.append(query_gradient(ev, ev.trajectory.num_steps, params, query, first))
    return found, _joined(blocks)


def _look(ev: Evaluator, params: Params, query: Query) -> tuple[int, Tensor | None]:
    """The number of values of a query, with those of its first part; warns of one that does not depend on the parameters.

    ValueError naming the query where the model cannot be asked it. The caller has the model in eval mode.
    """
    if query.by_step is not None:
        assert query.size is not None
        return query.size, None
    where = f"{str(ev.dtype).removeprefix('torch.')} on {ev.device}"
    with explained(f"query {query.label!r} fails on the model, which is asked in {where}"):
        first = part_values(ev, params, query.parts[0])
    if not _depends_on(first, params, by_derivative=query.size is None):
        warnings.warn(f"query {query.label!r} does not depend on the parameters: its scores are 0", stacklevel=4)
    return len(first) if query.size is None else query.size, first


def _depends_on(values: Tensor, params: Params, by_derivative: bool) -> bool:
    """Whether values depend on the parameters; by_derivative: they may be another model's."""
    if not values.requires_grad:
        return False
    if not by_derivative:
        return True
    found = torch.autograd.grad(values.sum(), list(params.values()), retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


def names(asked: Sequence[Query], found: Sequence[int]) -> list[str]:
    """A label for each of the Q values of all queries."""
    return [name for query, size in zip(asked, found, strict=True) for name in query.names(size)]


def values_at(ev: Evaluator, params: Params, asked: Sequence[Query]) -> Tensor:
    """The values [Q] of all queries at `params`, in eval mode."""
    with ev.eval_mode():
        return torch.cat([values(ev, params, query) for query in asked])


def gradients_at(ev: Evaluator, t: int, params: Params, asked: Sequence[Query]) -> Params:
    """q(t) of all queries at θ[t] = `params`, in eval mode: one block [Q, *shape] per parameter."""
    with ev.eval_mode():
        blocks = [query_gradient(ev, t, params, query) for query in asked]
    return _joined(blocks)


def _joined(blocks: Sequence[Params]) -> Params:
    return blocks[0] if len(blocks) == 1 else {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def ready_at(by_step: Mapping[int, Tensor | Mapping[str, Tensor]], t: int) -> Tensor | Mapping[str, Tensor]:
    """The ready gradients of step t; ValueError where there are none."""
    if t not in by_step:
        raise ValueError(f"queries.gradients has no gradient for step {t}, an end of a window; it has {sorted(by_step)}")
    return by_step[t]


def _ready_gradient(ev: Evaluator, t: int, by_step: Mapping[int, Tensor | Mapping[str, Tensor]]) -> Params:
    ready = ready_at(by_step, t)
    if isinstance(ready, Mapping):
        for name, value in ready.items():
            if name not in ev.shapes or value.shape[1:] != ev.shapes[name]:
                own = f"{tuple(ev.shapes[name])} in the log" if name in ev.shapes else "not in the log"
                raise ValueError(f"queries.gradients has {tuple(value.shape[1:])} for parameter '{name}', which is {own}")
        size = len(next(iter(ready.values())))
        zeros = {name: torch.zeros(size, *shape, device=ev.device, dtype=ev.dtype) for name, shape in ev.shapes.items()}
        return zeros | {name: value.to(ev.device, ev.dtype, copy=True) for name, value in ready.items()}
    flat = ready.to(ev.device, ev.dtype)
    if flat.shape[1] != ev.num_parameters:
        raise ValueError(f"queries.gradients has {flat.shape[1]} parameters at step {t}, the log {ev.num_parameters}")
    pieces = flat.split([shape.numel() for shape in ev.shapes.values()], dim=1)
    return {name: piece.reshape(-1, *ev.shapes[name]).clone() for name, piece in zip(ev.shapes, pieces, strict=True)}


def part_values(ev: Evaluator, params: Params, part: Part) -> Tensor:
    """The values of one part of a query at `params`. The caller has the model in eval mode."""
    return ev.call(params, lambda model: part.fn(model, ev))


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _chunks(x: Any, y: Any) -> tuple[int, list[tuple[slice, Any]]]:
    batch = x if y is None else (x, y)
    tensors = leaves(batch)
    if not tensors or tensors[0].ndim == 0:
        raise TypeError("a query's inputs must be tensors with the batch dimension in front")
    size = tensors[0].shape[0]
    if size == 0 or any(leaf.ndim == 0 or leaf.shape[0] != size for leaf in tensors):
        shapes = [tuple(leaf.shape) for leaf in tensors]
        raise ValueError(f"a query's inputs must have the same number of rows, at least one; got shapes {shapes}")
    spans = [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    return size, [(rows, map_tensors(batch, itemgetter(rows))) for rows in spans]


def _of_rows(
    label: str,
    size: int,
    pieces: Sequence[tuple[slice, Any]],
    value: Callable[[nn.Module, Evaluator, Any, slice], Tensor],
) -> Query:
    def part(rows: slice, piece: Any) -> Part:
        return Part(rows, lambda model, ev: value(model, ev, piece, rows))

    return Query(label, size, tuple(part(rows, piece) for rows, piece in pieces))


def _of_outputs(x: Any, label: str, value: Callable[[Tensor], Tensor]) -> Query:
    size, pieces = _chunks(x, None)
    return _of_rows(label, size, pieces, lambda model, ev, piece, rows: value(_outputs(model, ev, piece)))


def _losses(model: nn.Module, ev: Evaluator, piece: Any) -> Tensor:
    args, kwargs, target = ev.unpack(piece)
    return ev.losses_of(model(*args, **kwargs), target, len(leaves(piece)[0]))


def _outputs(model: nn.Module, ev: Evaluator, piece: Any) -> Tensor:
    inputs = ev.place(piece)
    return logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, its `logits`, or the first of a tuple; TypeError for anything else."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model's output ({type(output).__name__}) is no tensor and has no logits; use queries.custom")
    return output.squeeze(1) if output.ndim == 2 and output.shape[1] == 1 else output


def _pick(z: Tensor, index: int | tuple[int, ...]) -> Tensor:
    if z.ndim == 1 and index in (0, (), (0,)):
        return z
    position: tuple[int, ...] = index if isinstance(index, tuple) else (index,)
    if len(position) != z.ndim - 1 or any(not -n <= i < n for i, n in zip(position, z.shape[1:], strict=True)):
        raise ValueError(f"index {index} does not name one element of an output of shape {tuple(z.shape)} behind its batch")
    return z.movedim(0, -1)[position]


def _label(index: int | tuple[int, ...]) -> str:
    return ",".join(map(str, index)) if isinstance(index, tuple) else str(index)
