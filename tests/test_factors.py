"""The low-rank path of linear nets against the generic one and the literal estimator, and why it is refused elsewhere."""

import pytest
import torch
from cases import make_case, relative_error, schedule, train
from factor_cases import factor_run
from torch import nn

import dit_fast
from dit_fast import queries, reference

WINDOWS = [(0, 7), (2, 5), (5, 6)]


class Sequence(nn.Module):
    """Linear layers on [B, S, I] and [B, S, S', I], one of them without bias."""

    def __init__(self):
        super().__init__()
        self.lift, self.mix, self.head = nn.Linear(1, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x):
        z = self.lift(x[..., None]).tanh()  # [B, 5, 4]
        z = self.mix(torch.stack([z, z.square()], 1))  # [B, 2, 5, 3]
        return self.head(z.tanh().mean((1, 2)))


class FrozenBias(nn.Module):
    """A logged weight whose bias is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class FrozenWeight(FrozenBias):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(True).weight.requires_grad_(False)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(input=x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).tanh()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.again, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.head(self.again(self.inner(x).tanh()))


class Transposed(nn.Module):
    """Sees the batch in the second dimension."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(1, 3), nn.Linear(5, 1)

    def forward(self, x):
        z = self.lift(x.T[..., None]).tanh()  # [5, B, 3]
        return self.head(z.permute(1, 2, 0)).squeeze(2)


class Permuted(nn.Module):
    """One layer sees the batch backwards."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x.flip(0)).flip(0).tanh())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x)


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "one layer": lambda: nn.Linear(5, 3),
    "sequence": Sequence,
    "frozen bias": FrozenBias,
}


def run_of(build, **options):
    case = make_case("mlp")

    def model():
        torch.manual_seed(3)
        return build().double()

    case.model = model
    run = train(case, *schedule(len(case.x)), **options)
    trained = {name for name, p in model().named_parameters() if p.requires_grad}
    run.params = {name: rows for name, rows in run.params.items() if name in trained}
    return run


def loss(run):
    return queries.loss(run.case.x_val, run.case.y_val)


# the training loop of the tests would put l2 on a frozen bias too
@pytest.mark.parametrize(("net", "l2"), [(net, l2) for net in NETS for l2 in (0.0, 0.03) if not (net == "frozen bias" and l2)])
@pytest.mark.parametrize("hessian", ["fisher", "none"])
def test_factors_match_the_generic_path_and_the_reference(net, hessian, l2):
    run = run_of(NETS[net], l2=l2, weight_decay=0.02, micro_batches=[[2, 2], [3], [5], [1], [3, 1], [2], [6]])
    trajectory, problem = run.trajectory(), run.problem()
    query = [loss(run), queries.logit(run.case.x_val[:2], 1)]
    fast, generic, slow = (
        dit_fast.score(trajectory, problem, query, WINDOWS, hessian=hessian, backend="factors"),
        dit_fast.score(trajectory, problem, query, WINDOWS, hessian=hessian, backend="generic"),
        reference.score(trajectory, problem, query, WINDOWS, hessian=hessian),
    )
    assert (fast.meta["backend"], generic.meta["backend"]) == ("factors", "generic")
    scale = slow.scores[0].abs().amax(-1)
    assert relative_error(fast.scores, generic.scores, scale) < 1e-12
    assert relative_error(fast.scores, slow.scores, scale) < 1e-12
    assert not fast.scores[..., 11].any()  # never visited


@pytest.mark.parametrize("hessian", ["fisher", "none"])
@pytest.mark.parametrize("net", ["mlp", "sequence"])
def test_float32(net, hessian):
    run = run_of(NETS[net], l2=0.03)
    trajectory = run.trajectory(params={name: value.float() for name, value in run.params.items()})
    single, generic, double = (
        dit_fast.score(trajectory, run.problem(), loss(run), WINDOWS, hessian=hessian, backend=backend, dtype=dtype)
        for backend, dtype in (("factors", None), ("generic", None), ("factors", torch.float64))
    )
    assert (single.meta["dtype"], double.meta["dtype"]) == ("float32", "float64")
    scale = double.scores[0].abs().amax(-1)
    assert 0 < relative_error(single.scores, double.scores, scale) < 1e-5
    assert relative_error(single.scores, generic.scores, scale) < 1e-5


@pytest.mark.parametrize("hessian", ["fisher", "none", "exact", "ggn"])
def test_auto_takes_factors_where_they_hold(hessian):
    """Where the net is not compiled: a linear layer's output is used twice."""
    run = run_of(Branches)
    result = dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian=hessian)
    assert result.meta["backend"] == ("factors" if hessian in ("fisher", "none") else "generic")
    assert "not native" in result.meta["why"]
    run = run_of(NETS["mlp"])
    result = dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian=hessian)
    assert result.meta["backend"] == ("factors" if hessian == "fisher" else "native")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.second(torch.tanh(h) * torch.sigmoid(h))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3))


def in_place():
    """The output the hook sees is no longer the layer's own."""
    return nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.Linear(6, 3))


REFUSED = {
    "tied": (Tied, "parameter 'inner.weight' is tied"),
    "transposed": (Transposed, "Linear 'lift' does not see the batch in its first dimension"),
    "permuted": (Permuted, "does not agree with the generic path on the first batch"),
    "in place": (in_place, "does not agree with the generic path on the first batch"),
}


@pytest.mark.parametrize("net", REFUSED)
def test_other_nets_are_refused_by_name_and_auto_goes_round(net):
    build, message = REFUSED[net]
    run = run_of(build)
    with pytest.raises(ValueError, match="backend='factors' cannot be used: .*" + message) as caught:
        dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian="fisher", backend="factors")
    assert "\n" not in str(caught.value)
    auto = dit_fast.score(run.trajectory(), run.problem(), loss(run), WINDOWS, hessian="fisher")
    slow = reference.score(run.trajectory(), run.problem(), loss(run), WINDOWS, hessian="fisher")
    assert auto.meta["backend"] == "generic"
    assert relative_error(auto.scores, slow.scores, slow.scores[0].abs().amax()) < 1e-11


def test_curvature_that_is_not_made_of_gradients_is_refused():
    run = run_of(NETS["mlp"])
    with pytest.raises(ValueError, match="hessian='exact' is not made of per-sample gradients"):
        dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian="exact", backend="factors")


def norm():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


# layers of every kind, a layer that is called twice or never, and one whose bias alone is trained
ASKED = {"convolution": convolution, "norm": norm, "frozen weight": FrozenWeight, "twice": Twice, "unused": Unused}


@pytest.mark.parametrize("hessian", ["fisher", "ggn", "none"])
@pytest.mark.parametrize("net", [*ASKED, "cnn", "tokens", "mlp"])
def test_rows_of_any_layer_where_they_are_asked_for(net, hessian):
    run = (
        run_of(ASKED[net])
        if net in ASKED
        else factor_run(net, l2=0.03, micro_batches=[[2, 2], *[[n] for n in (3, 5, 1, 4, 2, 6)]])
    )
    query = [loss(run), queries.logit(run.case.x_val[:2], 1)]
    fast = dit_fast.score(run.trajectory(), run.problem(), query, WINDOWS, hessian=hessian, backend="factors")
    slow = reference.score(run.trajectory(), run.problem(), query, WINDOWS, hessian=hessian)
    assert (fast.meta["backend"], fast.meta["factors"]) == ("factors", "recomputed")
    assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-12


def test_recomputed_rows_follow_adam():
    run = factor_run("tokens")
    trajectory = run.trajectory(optimizer=dit_fast.AdamW())
    options = {"hessian": "ggn", "check": False}
    fast, slow = (
        f(trajectory, run.problem(), loss(run), WINDOWS, backend=b, **options)
        for f, b in ((dit_fast.score, "factors"), (reference.score, "auto"))
    )
    assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-10


def test_a_layer_called_by_keyword():
    run = run_of(ByKeyword)
    result = dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian="fisher")
    slow = reference.score(run.trajectory(), run.problem(), loss(run), hessian="fisher")
    assert relative_error(result.scores, slow.scores) < 1e-12


def test_a_layer_whose_output_no_loss_uses():

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x) + 0 * self.spare(x).detach()

    run = run_of(Detached)
    fast = dit_fast.score(run.trajectory(), run.problem(), loss(run), hessian="fisher", backend="factors")
    slow = reference.score(run.trajectory(), run.problem(), loss(run), hessian="fisher")
    assert relative_error(fast.scores, slow.scores) < 1e-12
