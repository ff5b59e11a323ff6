"""What DIT is compared with: the classical influence function, and TracIn at checkpoints; and how all are written.

Sign and unit are those of dit_fast: above 0, removing the sample raises the query.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import dit_fast as dit

from . import nets
from .runs import Run

Params = dict[str, Tensor]
Windows = dict[str, tuple[int, int]]
DAMPING = (1e-3, 1e-2, 1e-1, 1.0)


def exact(run: Run, windows: Windows) -> Tensor:
    """DIT with the query asked at the ends of each window, scores [W, N]."""
    return dit.score(run.trajectory, run.problem, run.query, windows, show_progress=False).scores[:, 0]


def official(run: Run, windows: Windows) -> Tensor:
    """DIT with the query asked at the end of the run, as the paper's code does, [W, N]."""
    found = dit.score(run.trajectory, run.problem, run.query, windows, query_at="final", show_progress=False)
    return found.scores[:, 0]


def tracin(run: Run, windows: Windows) -> Tensor:
    """TracInCP [W, N]: Σ over the epochs' ends in a window of η ⟨∇query, ∇ℓ_j⟩ / B at the parameters there.

    A sample is seen once an epoch, with weight 1/B in its batch's mean.
    """
    ends, size = run.epochs[1:], len(run.trajectory.batch_ids(0))
    products = {}
    for end in ends:
        params = run.trajectory.params(end)
        rate = run.trajectory.settings(end - 1)[0]["lr"]
        products[end] = (rate / size * dots(run, params, query_gradient(run, params))).double()
    zero = torch.zeros(len(run.split.y), dtype=torch.float64)
    return torch.stack(
        [sum((products[end] for end in ends if start < end <= stop), start=zero) for start, stop in windows.values()]
    )


def influence_function(run: Run, damping: float, params: Params | None = None) -> Tensor:
    """Koh & Liang's 1/N · ∇queryᵀ (G + damping·I)⁻¹ ∇ℓ_j at the end of the run, [N]; it knows no windows.

    G is the Gauss–Newton matrix of the mean training loss: for logistic regression the Hessian itself, for the other nets
    what is used in its place, since their Hessian is not positive definite. With G = AᵀA of rank at most N, the
    inverse is exact by the push-through identity: (AᵀA + λI)⁻¹ q = (q − Aᵀ(AAᵀ + λI)⁻¹ A q) / λ. So there is no
    conjugate gradient or LiSSA that might not have converged.
    """
    params = params or {name: value.double() for name, value in run.trajectory.params(run.trajectory.num_steps).items()}
    x = run.split.x.to(next(iter(params.values())).dtype)

    def output(values: Params, sample: Tensor) -> Tensor:
        return functional_call(run.model, values, (sample[None],)).squeeze()

    jacobian = flat(vmap(grad(output), (None, 0))(params, x), len(x))
    p = torch.sigmoid(vmap(output, (None, 0))(params, x))
    a = (p * (1 - p) / len(x)).sqrt()[:, None] * jacobian
    q = flat(query_gradient(run, params), 1)[0]
    inner = a @ a.T + damping * torch.eye(len(x), dtype=a.dtype)
    solved = (q - a.T @ torch.linalg.solve(inner, a @ q)) / damping
    return ((p - run.split.y) * (jacobian @ solved) / len(x)).double()


def query_gradient(run: Run, params: Params) -> Params:
    """The gradient of the mean validation loss."""
    return grad(lambda values: losses(run, values, run.split.x_val, run.split.y_val).mean())(params)


def dots(run: Run, params: Params, direction: Params) -> Tensor:
    """⟨direction, ∇ℓ_j⟩ of all training samples [N]: the tangents of their losses."""
    return jvp(lambda values: losses(run, values, run.split.x, run.split.y), (params,), (direction,))[1]


def losses(run: Run, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each row [n], in the parameters' precision."""
    dtype = next(iter(params.values())).dtype
    return nets.bce(functional_call(run.model, params, (x.to(dtype),)), y.to(dtype))


def flat(values: Params, rows: int) -> Tensor:
    """Parameters with `rows` in front, or none, as one matrix [rows, P]."""
    return torch.cat([value.reshape(rows, -1) for value in values.values()], dim=1)


WINDOWED: dict[str, Callable[[Run, Windows], Tensor]] = {
    "DIT, exact": exact,
    "DIT, official": official,
    "TracIn": tracin,
}
