"""What is recognised as a feed-forward net with a known loss, and what is refused with which reason."""

import pytest
import torch
from cases import Case, schedule, train
from torch import fx, nn
from torch.nn import functional as F

import dit_fast
from dit_fast import queries, recognize


class Functional(nn.Module):
    """A forward of its own: view with a size, functional activations, an F.linear on a bare parameter, squeeze."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(6, 4), nn.Parameter(0.5 * torch.randn(1, 4))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        h = F.gelu(self.first(x.view(x.size(0), -1)), approximate="tanh")
        return F.linear(self.dropout(h), self.weight).squeeze(1)


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.b(x + self.a(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x.flatten(1)).tanh()))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x.flatten(1) if x.sum() > 0 else -x.flatten(1))


class Scaled(nn.Module):
    """An operation between the layers that is not one of ours."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(2 * self.a(x.flatten(1)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1)).tanh()))


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


def binary(output, target):
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")


def one_against_the_rest(output, target):
    return F.binary_cross_entropy_with_logits(output, (target == 1).to(output.dtype), reduction="none")


def stack(*modules):
    return lambda: nn.Sequential(nn.Flatten(), *(make() for make in modules))


def linear(i, o):
    return lambda: nn.Linear(i, o)


NET = stack(linear(6, 4), nn.Tanh, linear(4, 3))


def chosen(build, loss, prepare=None, **options):
    """result.meta of an ordinary score on a short run of this model, equal to the generic path's scores."""
    torch.manual_seed(0)
    y = torch.randint(3, (14,))

    def model():
        torch.manual_seed(1)
        return build().double()

    case = Case(model, loss, torch.randn(14, 2, 3).double(), y, torch.randn(4, 2, 3).double(), y[:4])
    run = train(case, *schedule(14, 4))
    problem = run.problem()
    if prepare is not None:
        prepare(problem.model)
    query = queries.loss(case.x_val, case.y_val)
    result = dit_fast.score(run.trajectory(), problem, query, **options)
    truth = dit_fast.score(run.trajectory(), run.problem(), query, backend="generic", **options)
    torch.testing.assert_close(result.scores, truth.scores, rtol=1e-9, atol=1e-14)
    return result.meta


@pytest.mark.parametrize(
    ("build", "loss", "description"),
    [
        (NET, cross_entropy, "6-4-3 tanh, cross_entropy"),
        (stack(linear(6, 3)), nn.CrossEntropyLoss(reduction="none"), "6-3, cross_entropy"),
        (lambda: nn.Sequential(stack(linear(6, 4), nn.SiLU)(), nn.Sequential(nn.Identity(), nn.Linear(4, 3))), cross_entropy,
         "6-4-3 silu, cross_entropy"),
        (Functional, binary, "6-4-1 gelu_tanh, bce_logits"),
        (Functional, lambda z, t: (z - t).square(), "6-4-1 gelu_tanh, squared_error"),
        (stack(linear(6, 3)), lambda z, t: 0.3 * F.cross_entropy(z, t, reduction="none"), "6-3, cross_entropy"),
    ],
)  # fmt: skip
def test_recognised(build, loss, description):
    meta = chosen(build, loss)
    assert meta["backend"] == "native" and description in meta["why"], meta["why"]


def hook(model):
    model[1].register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    ("build", "loss", "prepare", "reason"),
    [
        (Branched, cross_entropy, None, "add is not part of one chain"),
        (Twice, cross_entropy, None, "module 'a' shares its parameters"),
        (Tied, cross_entropy, None, "module 'b' shares its parameters"),
        (Conditional, cross_entropy, None, "torch.fx cannot trace"),
        (Scaled, cross_entropy, None, "mul is none of the operations"),
        (NET, cross_entropy, hook, "module '1' has hooks"),
        (stack(linear(6, 4), nn.ELU, linear(4, 3)), cross_entropy, None, "module '2' is none of the operations"),
        (stack(linear(6, 4), nn.ReLU, nn.Tanh, linear(4, 3)), cross_entropy, None, "module '3' does not follow a linear layer"),
        (stack(linear(6, 4), lambda: nn.LayerNorm(4), linear(4, 3)), cross_entropy, None, "module '2' is none of"),
        (stack(linear(6, 8), lambda: nn.Unflatten(1, (2, 4)), linear(4, 4), nn.Flatten, linear(8, 3)), cross_entropy, None,
         "module '3' takes 4 of the 8 numbers before it at a time"),
        (Functional, lambda z, t: F.huber_loss(z, t.to(z.dtype), reduction="none", delta=50.0), None,
         "per_sample_loss is none of"),
        (NET, lambda z, t: F.cross_entropy(z, t, reduction="none", label_smoothing=0.1), None, "per_sample_loss is none of"),
        (NET, lambda z, t: F.cross_entropy(z, t, reduction="none").square(), None, "per_sample_loss is none of"),
        (NET, lambda z, t: F.cross_entropy(z, t, torch.tensor([1.0, 2.0, 1.0]).double(), reduction="none"), None,
         "per_sample_loss is none of"),
        (Functional, one_against_the_rest, None, "per_sample_loss is not bce_logits for every target"),
    ],
)  # fmt: skip
def test_refused_with_its_reason(build, loss, prepare, reason):
    meta = chosen(build, loss, prepare)
    assert meta["backend"] == "generic"
    assert reason in meta["why"] and "\n" not in meta["why"], meta["why"]


def test_a_loss_that_looks_like_ours_only_where_it_is_probed_is_caught_on_the_first_batch():
    """It differs for batches of 4 alone, and the probes are of other sizes: the comparison with the generic path finds it."""

    def loss(output, target):
        value = F.cross_entropy(output, target, reduction="none")
        return 1.5 * value if len(output) == 4 else value

    meta = chosen(NET, loss, check=False)
    assert meta["backend"] == "generic" and "does not agree with the generic path" in meta["why"]


def half_is_a_quarter(z, t):
    return F.binary_cross_entropy_with_logits(z[:, 0], torch.where(t == 0.5, 0.25, t), reduction="none")


def ignores_class_7(z, t):
    return F.cross_entropy(z, t, reduction="none", ignore_index=7)


@pytest.mark.parametrize("at_once", [2, 1 << 16])
@pytest.mark.parametrize(
    ("outputs", "loss", "targets", "reason"),
    [
        (1, half_is_a_quarter, [0.0, 0.3, 1.0, 0.5, 0.2], "per_sample_loss is not bce_logits for every target of the data"),
        (1, half_is_a_quarter, [0.0, 0.3, 1.0, 0.4, 0.2], None),
        (3, ignores_class_7, [0, 1, 2, 7, 0], "a class of cross entropy lies outside the model's outputs"),
        (3, ignores_class_7, [0, 1, 2, 2, 0], None),
    ],
)
def test_the_loss_is_tried_on_every_target_of_the_data(outputs, loss, targets, reason, at_once, monkeypatch):
    """The one that is another's, sample 3, is in no batch."""
    monkeypatch.setattr("dit_fast.recognize.TARGETS_AT_ONCE", at_once)
    torch.manual_seed(0)
    model, x = nn.Linear(4, outputs), torch.randn(5, 4)
    params = {n: torch.stack([p.detach()] * 2) for n, p in model.named_parameters()}
    trajectory = dit_fast.Trajectory.from_arrays(params=params, batch_ids=[[0, 1]], lr=0.1)
    problem = dit_fast.Problem(model, loss, (x, torch.tensor(targets)))
    meta = dit_fast.score(trajectory, problem, queries.parameter("bias", 0), check=False).meta
    assert meta["backend"] == ("native" if reason is None else "generic")
    assert reason is None or reason in meta["why"]


def test_a_frozen_layer_is_refused_and_a_refused_backend_is_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    params = {n: torch.stack([p.detach()] * 2) for n, p in model.named_parameters() if p.requires_grad}
    trajectory = dit_fast.Trajectory.from_arrays(params=params, batch_ids=[[0, 1]], lr=0.1)
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    problem = dit_fast.Problem(model, cross_entropy, (x, y))
    with pytest.raises(ValueError, match="backend='native' cannot be used: a parameter of module '0' was not trained"):
        dit_fast.score(trajectory, problem, queries.loss(x, y), check=False, backend="native")


def test_fisher_is_not_compiled_and_says_so():
    torch.manual_seed(0)
    x, y = torch.randn(8, 2, 3).double(), torch.randint(3, (8,))
    case = Case(lambda: NET().double(), cross_entropy, x, y, x, y)
    run = train(case, *schedule(8, 3))
    meta = dit_fast.score(run.trajectory(), run.problem(), queries.loss(x, y), hessian="fisher").meta
    assert meta["backend"] == "factors" and "hessian='fisher' is not compiled" in meta["why"]


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


def own_forward():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    model.forward = lambda x: model[0](model[1](x))
    return model


@pytest.mark.parametrize(
    "build",
    [
        NET,
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Sequential()), nn.Tanh(), nn.Sequential(nn.Linear(4, 2))),
        lambda: Backwards(nn.Tanh(), nn.Linear(3, 4)),
        lambda: nn.Sequential(Backwards(nn.Tanh(), nn.Linear(3, 4)), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(3, 6), Scaled()),
        own_forward,
        lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2),
    ],
)
def test_the_graph_is_the_one_that_torch_fx_makes(build):
    model = build()
    ours, theirs = (
        [
            model.get_submodule(node.target) if node.op == "call_module" else node.target
            for node in graph.nodes
            if node.op not in ("placeholder", "output")
        ]
        for graph in (recognize.trace(model), fx.Tracer().trace(model))
    )
    assert ours == theirs and len(ours) > 1  # modules are equal where they are the same
