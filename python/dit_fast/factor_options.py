"""What of a run's per-sample gradients is to be logged: `Recorder(..., factors=FactorOptions(...))`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CURVATURES = ("fisher", "ggn", "sampled ggn")


@dataclass(frozen=True)
class FactorOptions:
    """How `Recorder(..., factors=...)` logs per-sample gradients, so that scores need no model, data or parameters.

    dtype: "bfloat16" to store them in half the bytes of float32; None = as the parameters.
    layers: which parameters, by patterns (fnmatch, in which * takes dots too) of their names or of modules they lie in, such
        as "head" or ["encoder.*", "head"]; a pattern with "!" in front leaves out. None = all that the optimizer trains.
        What is left out is as if it had not been trained: scores from this log ignore it.
    curvature: what the log says of the Hessian. "fisher": the per-sample gradients themselves, for the empirical Fisher.
        "ggn": the Jacobian of the model's outputs in factors, with the loss's slopes and second derivatives by them, which is
        Gauss–Newton exactly; one more backward pass and one more set of output gradients for each of C outputs. "sampled
        ggn": beside the gradients those for one label drawn from the model, whose outer products are Gauss–Newton in the
        mean; for cross entropy, or binary cross entropy with logits, on outputs [B, C], [B, 1] or [B].
    per_sample_loss(output, target) -> [B]: as in `Problem`. Needed for both kinds of ggn and for marks with
        `queries.loss` or `losses`; the batches must then be named with `step(ids, batch=(x, y))`. With "fisher" the batch
        may be left out; where it is given, the coefficients are checked by it.
    unpack: as in `Problem`.
    l2: λ of the penalty ½·λ·‖θ‖² inside every per-sample loss, as in `Problem`; it is in no factor.
    project: how gradients are made smaller by seeded Gaussian matrices, whose inner products are right in the mean. A number
        r: a matrix [O, I] becomes at most [r, r], a vector at most [r]. Or {pattern of parameter names: r or (outputs,
        inputs)}, None where a side stays; the first pattern that fits counts, a bias goes with its weight. None = nothing.
    seed: of these matrices.

    Raises ValueError or TypeError for options that make no sense.
    """

    dtype: str | None = None
    layers: str | tuple[str, ...] | list[str] | None = None
    curvature: str = "fisher"
    per_sample_loss: Callable[[Any, Any], Tensor] | None = None
    unpack: Callable[[Any], Any] | None = None
    l2: float = 0.0
    project: int | Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (None, "bfloat16"):
            raise ValueError(f'factors: dtype must be "bfloat16" or None, got {self.dtype!r}')
        if self.curvature not in CURVATURES:
            raise ValueError(f"factors: curvature must be one of {', '.join(CURVATURES)}, got {self.curvature!r}")
        if self.per_sample_loss is not None and not callable(self.per_sample_loss):
            raise TypeError("factors: per_sample_loss must be callable: per_sample_loss(output, target) -> [B]")
        if self.curvature != "fisher" and self.per_sample_loss is None:
            raise ValueError(f"factors: curvature={self.curvature!r} needs per_sample_loss(output, target) -> [B]")
        if not isinstance(self.l2, int | float) or not self.l2 >= 0:
            raise ValueError(f"factors: l2 must be 0 or positive, got {self.l2!r}")
        if type(self.seed) is not int:
            raise TypeError(f"factors: seed must be an integer, got {self.seed!r}")
        if not all(isinstance(pattern, str) and pattern.removeprefix("!") for pattern in self.patterns):
            raise TypeError(f"factors: layers must be names or patterns of them, got {self.layers!r}")
        for pattern, sizes in self.project_items:
            sides = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
            is_size = [side is None or (type(side) is int and side > 0) for side in sides]
            if not isinstance(pattern, str) or len(sides) != 2 or not all(is_size):
                raise ValueError(
                    "factors: project must be a positive integer r or {pattern: r or (outputs, inputs)}, "
                    f"got {self.project!r}"
                )

    @property
    def patterns(self) -> tuple[str, ...]:
        """`layers` as a tuple; empty = all."""
        if self.layers is None:
            return ()
        return (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)

    @property
    def project_items(self) -> list[tuple[str, Any]]:
        """`project` as (pattern, sizes) in order."""
        if self.project is None:
            return []
        return list(self.project.items()) if isinstance(self.project, Mapping) else [("*", self.project)]


def read_factor_options(factors: Any) -> FactorOptions | None:
    """What the Recorder's argument means; TypeError for anything else."""
    if factors is None or factors is False:
        return None
    if factors is True:
        return FactorOptions()
    if not isinstance(factors, FactorOptions):
        raise TypeError(f"factors must be True, False or dit_fast.FactorOptions(...), got {factors!r}")
    return factors
