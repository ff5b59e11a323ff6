"""The sweep in sample space: inner products between per-sample gradients in the place of blocks of parameters.

Every column is u = Σ_e φ_e q(e) + Σ_s φ_s Σ_r w_s[r] J_s[r]: the query's gradients and the rows of the later steps, with
numbers φ that all parameters share, since the optimizer's rule is the same for all of them. The dots of step t are then

    ⟨c_k, J_t⟩ = φ_k ⟨q_k, J_t⟩ + Σ_{s>t} φ_s K_ts w_s[k],      K_ts = ⟨J_t, J_s⟩ from factors

so that a column takes one product with its query's gradient per step, and the K_ts serve all columns. The φ follow the
rule's own adjoint (momentum, decay), applied to numbers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_fast import factor_products, fused, plan
from dit_fast.byte_sizes import format_bytes
from dit_fast.errors import LogError
from dit_fast.factor_run import FactorRun
from dit_fast.factored import Factors, Lookup, Outer, Part, Plain
from dit_fast.plan import Column
from dit_fast.sweep import QueryGradients, join_and_leave
from dit_fast.trajectory import Window

# numbers of a piece of K_ts before it is summed over positions
PIECE_NUMBERS = 1 << 24


QueryRows = Callable[[int], Factors]


class NotGram(ValueError):
    """Why a run cannot be scored in sample space."""


def refusal(run: FactorRun) -> str | None:
    """Why the rule of this run is not the same number for all parameters; None where it is."""
    trajectory = run.trajectory
    if not all(rule.is_linear for rule in trajectory.optimizer):
        return f"{trajectory.optimizer[0].kind} works element by element"
    if trajectory.clip:
        return "clipped gradients depend on the whole step"
    if run.l2:
        return "l2 in the losses needs the parameters"
    groups = {trajectory.groups[name] for name in run.shapes}
    counts = trajectory.counts(0)
    if len({counts[name] for name in run.shapes}) > 1 or any(trajectory.absent(t) for t in range(trajectory.num_steps)):
        return "a parameter was without a gradient in some step"
    if len(groups) > 1:
        for t in range(trajectory.num_steps):
            settings = trajectory.settings(t)
            if any(settings[group] != settings[min(groups)] for group in groups):
                return "parameter groups have different settings"
    return None


def choose(
    run: FactorRun,
    windows: Sequence[Window],
    num_queries: int,
    budget: int,
    form: str,
    by_rows: bool = False,
) -> tuple[str, str]:
    """The form of the sweep, "sweep", "fused" or "gram", and why; ValueError where the one asked for does not fit.

    by_rows: whether the queries' gradients are at hand in factors.
    """
    if form == "fused" and not fused.fits(run):
        raise ValueError("form='fused' is for plain SGD without clipping and l2")
    refused = refusal(run)
    if form == "gram" and refused:
        raise ValueError(f"form='gram' cannot be used: {refused}")
    gram, swept, size = costs(run, windows, num_queries, by_rows)
    if form == "gram" and size > budget:
        raise ValueError(f"form='gram' needs {format_bytes(size)}, more than memory_budget = {format_bytes(budget)}")
    if form != "auto":
        return form, f"form={form!r} was asked for"
    other = "fused" if fused.fits(run) else "sweep"
    if refused:
        return other, f"not in sample space: {refused}"
    if not run.has_curvature:
        return other, "no curvature"
    counted = f"{gram / 1e9:.3g} GFLOP in sample space, {swept / 1e9:.3g} in that of the parameters"
    if gram >= swept:
        return other, counted
    if size > plan.BLOCK_SHARE * budget:
        return other, f"sample space would take {format_bytes(size)}, too much of memory_budget = {format_bytes(budget)}"
    return "gram", counted


def costs(run: FactorRun, windows: Sequence[Window], num_queries: int, by_rows: bool) -> tuple[float, float, int]:
    """FLOPs in sample space and in parameter space, and bytes in sample space, every step taken to be as the first."""
    ends = sorted({t for window in windows for t in (window.start, window.stop)} - {0})
    batches = run.batches(0)
    samples, rows = factor_products.sizes(batches)
    parts = batches[0].parts
    per_row = rows // max(samples, 1)
    dot = sum(_dot_flops(part) for part in parts)
    pair = sum(min(_pair_flops(part)) for part in parts)
    last, steps = ends[-1], float(sum(ends)) * num_queries
    stops = float(sum(column.stop for column in plan.columns(windows, num_queries)[0]))
    history = samples * last
    products = pair * history**2 / 2 + sum((rows * t) ** 2 for t in ends) * float(num_queries)
    gram = steps * samples * (pair if by_rows else dot) + (products if run.has_curvature else 0)
    swept = stops * samples * dot * (2 if run.has_curvature else 1)
    numbers = sum(_row_numbers(part) for part in parts) * (history + (num_queries * len(ends) if by_rows else 0))
    columns = len(ends) * num_queries
    numbers += columns * ((0 if by_rows else run.num_parameters) + per_row * history) + rows * per_row * history
    return gram, swept, run.dtype.itemsize * numbers + 8 * columns * run.num_samples


def gradient_flops(run: FactorRun) -> float:
    """Of one step's batch gradient from factors, the step taken to be as the first."""
    batches = run.batches(0)
    return factor_products.sizes(batches)[0] * sum(_dot_flops(part) for part in batches[0].parts)


def columns_per_sweep(run: FactorRun, made: Sequence[Column], budget: int, by_rows: bool = False) -> int:
    """How many columns travel together: each takes its query's gradient and a number for every row of the log."""
    rows = factor_products.sizes(run.batches(0))[1]
    one = run.dtype.itemsize * ((0 if by_rows else 2 * run.num_parameters) + rows * made[0].stop) + 8 * run.num_samples
    return max(1, int(plan.BLOCK_SHARE * budget) // one)


def sweep(
    run: FactorRun,
    columns: Sequence[Column],
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[[], object],
    query_rows: QueryRows | None = None,
) -> Tensor:
    """Scores [K, N] float64, as `sweep.sweep` gives them, of columns without a start; NotGram where steps differ in kind.

    query_rows(t): where every query value is one sample's, its gradient in factors in the place of `query_gradients`.
    """
    scores = torch.zeros(len(columns), num_samples, dtype=torch.float64, device=run.device)
    ends = sorted({column.stop for column in columns}, reverse=True)
    source_of = torch.tensor([ends.index(column.stop) for column in columns], device=run.device)
    sources = _Sources(run, len(ends))
    history = _History(run, len(columns), sum(len(run.trajectory.batch_ids(t)) for t in range(1, columns[0].stop)))
    asked = _DenseQueries(run, columns, query_gradients) if query_rows is None else _RowQueries(run, columns, query_rows)
    for t in reversed(range(columns[0].stop)):
        if t + 1 in ends:
            asked.begin(t + 1)
            sources.begin(ends.index(t + 1))
        phi = sources.step(t)
        found = []
        for factors in run.batches(t):
            along = asked.dots(factors)
            along = along * phi[source_of[: len(along)]][:, None, None]
            if run.has_curvature:
                history.add_to(along, factors, phi[len(ends) :])
            found.append((factors, along))
        for factors, along in found:
            dots = factor_products.sample_dots(factors, along)
            scores[: len(along)].index_add_(1, factors.ids, dots * factors.coefficients, alpha=-1)
            if run.has_curvature and t:
                history.append(factors, factor_products.curvature_weights(factors, along))
                sources.begin(sources.add())
        progress()
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64)")
    return scores


def inner_products(run: FactorRun, factors: Factors) -> Tensor:
    """⟨∇ℓ_b, ∇ℓ_b'⟩ [B, B] of the samples of a micro-batch of one row each."""
    held = _History(run, 0, len(factors.ids))
    held.append(factors, factors.slopes.new_zeros(0, *factors.slopes.shape))
    return held.products(factors)


class _DenseQueries:
    """⟨q_k, J_br⟩ of the columns that travel, from their gradients as blocks."""

    def __init__(self, run: FactorRun, columns: Sequence[Column], query_gradients: QueryGradients) -> None:
        self._columns, self._gradients = columns, query_gradients
        sizes = run.shapes.items()
        self._u = {n: torch.zeros(len(columns), *shape, dtype=run.dtype, device=run.device) for n, shape in sizes}
        self._active = 0

    def begin(self, t: int) -> None:
        """The columns that stop at t travel from now on."""
        self._active = join_and_leave(t, self._columns, self._u, self._gradients(t))

    def dots(self, factors: Factors) -> Tensor:
        """[K, B, R] float64."""
        return factor_products.row_dots(factors, {name: block[: self._active] for name, block in self._u.items()})


class _RowQueries:
    """The same from the gradients of single samples in factors: no block of parameters is made."""

    def __init__(self, run: FactorRun, columns: Sequence[Column], query_rows: QueryRows) -> None:
        self._run, self._columns, self._rows = run, columns, query_rows
        self._begun: list[tuple[Tensor, _History]] = []

    def begin(self, t: int) -> None:
        """As in `_DenseQueries`."""
        rows = self._rows(t)
        held = _History(self._run, 0, len(rows.ids))
        held.append(rows, torch.zeros(0, len(rows.ids), 1, dtype=torch.float64))
        self._begun.append((torch.tensor([c.query for c in self._columns if c.stop == t], device=self._run.device), held))

    def dots(self, factors: Factors) -> Tensor:
        """[K, B, R] float64; columns come latest stop first."""
        found = [held.products(factors).T[queries].double() for queries, held in self._begun]
        return torch.cat(found).view(-1, *factors.slopes.shape)


class _Sources:
    """The numbers φ of every query's gradient and every micro-batch, and of their optimizer state, from step to step."""

    def __init__(self, run: FactorRun, num_ends: int) -> None:
        self._run, self._size = run, num_ends
        self._name = next(iter(run.shapes))
        self._group = run.trajectory.groups[self._name]
        self._blocks = [torch.zeros(num_ends, dtype=torch.float64) for _ in range(1 + len(run.trajectory.slots))]

    def add(self) -> int:
        """Room for one more; its number."""
        if self._size == len(self._blocks[0]):
            self._blocks = [torch.cat([block, torch.zeros_like(block)]) for block in self._blocks]
        self._size += 1
        return self._size - 1

    def begin(self, source: int) -> None:
        """It is now part of u_θ."""
        self._blocks[0][source] = 1

    def step(self, t: int) -> Tensor:
        """The φ [sources] of c in step t, by the adjoint of the optimizer's rule; those of u move to before the step."""
        trajectory, nothing = self._run.trajectory, torch.zeros(())
        rule, settings = trajectory.optimizer[self._group], trajectory.settings(t)[self._group]
        blocks = [block[: self._size] for block in self._blocks]
        phi = rule.adjoint(blocks, nothing, nothing, (), trajectory.counts(t)[self._name], settings)
        return phi.to(self._run.device)


class _History:
    """The rows of all micro-batches gone through, and the weights w [K, rows] that columns have in them."""

    def __init__(self, run: FactorRun, num_columns: int, capacity: int) -> None:
        self._run, self._capacity, self._num_columns = run, capacity, num_columns
        self._size = 0
        self._stores: list[tuple[Part, list[Tensor]]] = []
        self._source_of: list[Tensor] = []
        self._weights = torch.zeros(0)
        self._num_rows = 0

    def add_to(self, along: Tensor, factors: Factors, phi: Tensor) -> None:
        """along [K, B, R] += Σ_s φ_s K_ts w_s, for the φ [micro-batches] of the step."""
        if not self._size:
            return
        products = self.products(factors)
        scaled = self._weights[: len(along), : self._size * self._num_rows] * phi[torch.cat(self._source_of)].to(products)
        along += (scaled @ products.T).view(along.shape)

    def products(self, factors: Factors) -> Tensor:
        """⟨J_br, J_s⟩ [B·R, rows so far]; both may have other numbers of rows per sample and of positions."""
        rows = self._num_rows
        total = torch.zeros(
            factors.slopes.numel(), self._size * rows, dtype=self._run.dtype, device=self._run.device
        )  # [B·R, H·R]
        for part, (like, stores) in zip(factors.parts, self._stores, strict=True):
            _check_same(factors.step, part, like)
            if len(stores) == 1:
                total.addmm_(_dense(part).flatten(0, 1), stores[0][: self._size].flatten(0, 1).T)
            else:
                self._add_positions(total, part, stores[0][: self._size], stores[1][: self._size])
        return total

    def _add_positions(self, total: Tensor, part: Part, places: Tensor, deltas: Tensor) -> None:
        assert not isinstance(part, Plain)
        B, R, S, _ = part.deltas.shape
        _, R2, S2, _ = deltas.shape
        own = part.deltas.flatten(0, 2)
        step = max(1, PIECE_NUMBERS // (B * R * R2 * S * S2))
        for start in range(0, len(deltas), step):
            rows = slice(start, min(start + step, len(deltas)))
            found, where = deltas[rows], places[rows]
            n = len(found)
            dd = (own @ found.flatten(0, 2).T).view(B, R, S, n, R2, S2)
            if isinstance(part, Lookup):
                aa = (part.indices.flatten()[:, None] == where.flatten()).to(dd)
            else:
                aa = part.inputs.flatten(0, 1) @ where.flatten(0, 1).T
                if part.bias is not None:
                    aa += 1
            both = dd.mul_(aa.view(B, 1, S, n, 1, S2))
            both = both.view(B * R, n * R2) if S * S2 == 1 else both.sum((2, 5)).view(B * R, n * R2)
            total[:, start * R2 : (start + n) * R2] += both

    def append(self, factors: Factors, weights: Tensor) -> None:
        """Keeps a micro-batch's rows, and w [K, B, R]."""
        B, R = factors.slopes.shape
        device, dtype = self._run.device, self._run.dtype
        if not self._stores:
            self._num_rows = R
            self._weights = torch.zeros(self._num_columns, self._capacity * R, dtype=dtype, device=device)
            for part in factors.parts:
                kept = [t.new_empty(self._capacity, *t.shape[1:]) for t in _kept(part)]
                self._stores.append((part, kept))
        span = slice(self._size, self._size + B)
        for part, (like, stores) in zip(factors.parts, self._stores, strict=True):
            _check_same(factors.step, part, like)
            if factor_products.rows_of(part).shape[1:] != factor_products.rows_of(like).shape[1:]:
                raise NotGram(f"step {factors.step}: sequences of another length than in later steps")
            kept = [_dense(part)] if len(stores) == 1 else _places(part)
            for store, value in zip(stores, kept, strict=True):
                store[span] = value
        self._weights[: len(weights), self._size * R : (self._size + B) * R] = weights.flatten(1).to(dtype)
        self._source_of.append(torch.full((B * R,), len(self._source_of), device=device))
        self._size += B


def _kept(part: Part) -> list[Tensor]:
    """What of a part is kept for products: one dense tensor or two of positions, whichever product is cheaper."""
    positions, dense = _pair_flops(part)
    return [_dense(part)] if dense <= positions else _places(part)


def _places(part: Part) -> list[Tensor]:
    assert not isinstance(part, Plain)
    return [part.indices if isinstance(part, Lookup) else part.inputs, part.deltas]


def _dense(part: Part) -> Tensor:
    """Rows [B, R, numbers] written out."""
    if isinstance(part, Plain):
        return part.rows.flatten(2)
    if isinstance(part, Lookup):
        raise NotGram("an embedding's rows are not written out")
    rows = torch.einsum("brso,bsi->broi", part.deltas, part.inputs).flatten(2)
    return rows if part.bias is None else torch.cat([rows, part.deltas.sum(2)], 2)


def _check_same(step: int, part: Part, like: Part) -> None:
    """NotGram where a part is not of the same kind and parameters as in the other steps."""
    if type(part) is not type(like) or factor_products.names(part) != factor_products.names(like):
        raise NotGram(f"step {step}: the factors are in another order than in later steps")


def _dot_flops(part: Part) -> float:
    """Of one sample's inner products with one block."""
    if isinstance(part, Outer):
        return 2.0 * part.deltas.shape[2] * part.inputs.shape[2] * part.deltas.shape[3]
    rows = factor_products.rows_of(part)
    return 2.0 * math.prod(rows.shape[1:])


def _pair_flops(part: Part) -> tuple[float, float]:
    """Of the inner products of two samples' rows: by positions, and written out."""
    if isinstance(part, Plain):
        return math.inf, 2.0 * part.rows.shape[1] * math.prod(part.rows.shape[1:])
    _, R, S, O = part.deltas.shape
    if isinstance(part, Lookup):
        return S * S * (2.0 * R * R * O + 1), math.inf
    inputs = part.inputs.shape[2]
    return S * S * (2.0 * inputs + 2.0 * R * R * O + 2 * R * R), 2.0 * R * R * O * (inputs + 1)


def _row_numbers(part: Part) -> int:
    """Numbers kept of one sample."""
    return sum(tensor[0].numel() for tensor in _kept(_first_sample(part)))


def _first_sample(part: Part) -> Part:
    if isinstance(part, Outer):
        return Outer(part.weight, part.bias, part.inputs[:1], part.deltas[:1])
    if isinstance(part, Lookup):
        return Lookup(part.weight, part.indices[:1], part.deltas[:1])
    return Plain(part.name, part.rows[:1])
