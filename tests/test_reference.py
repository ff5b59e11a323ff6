"""The fast paths against the slow literal estimator, for every kind of curvature, query and module."""

import pytest
import torch
from cases import cross_entropy, relative_error, standard_run, token_cross_entropy, train
from torch import nn

import dit_fast
from dit_fast import queries

WINDOWS = [(0, 7), (2, 5), (5, 6)]


def assert_equal_scores(run, query, tolerance=1e-11, **options):
    fast = dit_fast.score(run.trajectory(), run.problem(), query, WINDOWS, **options)
    slow = dit_fast.reference.score(run.trajectory(), run.problem(), query, WINDOWS, **options)
    assert fast.queries == slow.queries
    ends = dit_fast.reference.score(run.trajectory(), run.problem(), query, [(0, t) for t in (2, 5, 6, 7)], **options)
    size = dict(zip((0, 2, 5, 6, 7), [torch.zeros(len(fast.queries)), *ends.scores.abs().amax(-1)], strict=True))
    scale = torch.stack([size[a] + size[b] for a, b in WINDOWS])
    assert relative_error(fast.scores, slow.scores, scale) < tolerance
    return fast


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "none"])
@pytest.mark.parametrize("net", ["mlp", "cnn", "transformer"])
def test_every_curvature_matches_the_reference(net, hessian):
    run = standard_run(net, weight_decay=0.02, l2=0.03, micro_batches=[[2, 2], [3], [5], [1], [3, 1], [2], [6]])
    assert_equal_scores(run, queries.loss(run.case.x_val, run.case.y_val), hessian=hessian)


def test_query_at_final_matches_the_reference():
    run = standard_run("mlp")
    assert_equal_scores(run, queries.loss(run.case.x_val, run.case.y_val), query_at="final")


QUERIES = {
    "losses": lambda run: queries.losses(run.case.x_val, run.case.y_val),
    "logit": lambda run: queries.logit(run.case.x_val, 2),
    "probability": lambda run: queries.probability(run.case.x_val, 1),
    "margin": lambda run: queries.margin(run.case.x_val, run.case.y_val),
    "parameter": lambda run: queries.parameter("0.weight", (1, 2)),
    "whole parameter": lambda run: queries.parameter("4.bias"),
    "feature": lambda run: queries.feature(run.case.x_val, 0, 3),
    "custom": lambda run: queries.custom(lambda model: model(run.case.x_val).square().mean() + model[0].weight.norm()),
    "custom vector": lambda run: queries.custom(lambda model: model(run.case.x_val).mean(1), name="means"),
    "list": lambda run: [queries.loss(run.case.x_val, run.case.y_val), queries.logit(run.case.x_val[:2], 0)],
}


@pytest.mark.parametrize("make", QUERIES.values(), ids=QUERIES)
def test_every_query_matches_the_reference_and_can_be_retrained(make):
    run = standard_run("mlp")
    fast = assert_equal_scores(run, make(run))
    true = dit_fast.leave_one_out(run.trajectory(), run.problem(), make(run), WINDOWS)
    slow = dit_fast.reference.leave_one_out(run.trajectory(), run.problem(), make(run), WINDOWS)
    assert true.queries == fast.queries
    assert (true.scores - slow.scores).abs().max() < 1e-12


def test_ready_gradients_give_the_scores_of_their_query():
    run = standard_run("mlp")
    query = queries.losses(run.case.x_val[:2], run.case.y_val[:2])
    by_step = {}
    for t in (2, 5, 6, 7):
        params = {name: rows[t].clone().requires_grad_() for name, rows in run.params.items()}
        output = torch.func.functional_call(run.case.model(), params, (run.case.x_val[:2],))
        values = run.case.loss(output, run.case.y_val[:2])
        rows = [torch.autograd.grad(v, list(params.values()), retain_graph=True) for v in values]
        by_step[t] = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = dit_fast.score(run.trajectory(), run.problem(), query, WINDOWS)
    result = assert_equal_scores(run, queries.gradients(by_step))
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-10, atol=1e-14)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class DictModel(nn.Module):
    """Takes keyword inputs, returns a dict, as language models do; frozen embedding, a buffer, a parameter never used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.embedding.weight.requires_grad_(False)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 7)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, input_ids, mask):
        x = self.embedding(input_ids) * self.scale * mask[..., None]
        return {"logits": self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))}


def run_of(build, loss, data, unpack, steps=5, dtype=torch.float64):
    """A run of any module by torch.optim.SGD on batches of 4 out of 8 samples: (trajectory, problem)."""
    torch.manual_seed(0)
    model = build().to(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    history = {n: [p.detach().clone()] for n, p in model.named_parameters() if p.requires_grad}
    batches = [torch.randint(8, (4,)) for _ in range(steps)]
    problem = dit_fast.Problem(model, loss, data, unpack=unpack)
    for ids in batches:
        optimizer.zero_grad()
        args, kwargs, target = problem.unpack(problem.samples.batch(ids))
        loss(model(*args, **kwargs), target).mean().backward()
        optimizer.step()
        for name, rows in history.items():
            rows.append(dict(model.named_parameters())[name].detach().clone())
    params = {name: torch.stack(rows) for name, rows in history.items()}
    return dit_fast.Trajectory.from_arrays(params=params, batch_ids=batches, lr=[0.2] * steps, num_samples=8), problem


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_nets(kind, dtype):
    x, y = torch.randn(8, 5, 3, dtype=dtype), torch.randint(2, (8,))
    trajectory, problem = run_of(lambda: Recurrent(kind), cross_entropy, (x, y), None, dtype=dtype)
    query = queries.loss(x, y)
    fast = dit_fast.score(trajectory, problem, query, [(0, 5), (1, 3)])
    slow = dit_fast.reference.score(trajectory, problem, query, [(0, 5), (1, 3)])
    assert relative_error(fast.scores, slow.scores) < (1e-11 if dtype == torch.float64 else 1e-4)
    true = dit_fast.leave_one_out(trajectory, problem, query, [(0, 5)], dtype=torch.float64)
    expected = dit_fast.reference.leave_one_out(trajectory, problem, query, [(0, 5)], dtype=torch.float64)
    # a float32 log is not the float64 run that starts from it
    assert (true.scores - expected.scores).abs().max() < (1e-12 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("hessian", ["exact", "fisher", "none"])
def test_dict_batches_dict_outputs_frozen_parameters_and_buffers(hessian):
    tokens, labels = torch.randint(7, (8, 5)), torch.randint(7, (8, 5))
    data = {"input_ids": tokens, "mask": (torch.rand(8, 5) > 0.3).double(), "labels": labels}
    loss = lambda output, target: token_cross_entropy(output["logits"], target)  # noqa: E731
    trajectory, problem = run_of(DictModel, loss, data, None)
    query = [queries.loss(data), queries.logit({k: v for k, v in data.items() if k != "labels"}, (0, 3))]
    fast = dit_fast.score(trajectory, problem, query, hessian=hessian)
    slow = dit_fast.reference.score(trajectory, problem, query, hessian=hessian)
    assert relative_error(fast.scores, slow.scores) < 1e-11


def test_a_dataset_with_tuple_inputs_and_unpack():
    class Pairs(torch.utils.data.Dataset):
        def __init__(self):
            generator = torch.Generator().manual_seed(0)
            self.a = torch.randn(8, 3, generator=generator).double()
            self.b = torch.randn(8, 2, generator=generator).double()

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return (self.a[i], self.b[i]), i % 2

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, a, b):
            return self.one(a) * self.two(b).tanh(), a.mean()

    unpack = lambda batch: (tuple(batch[0]), {}, batch[1])  # noqa: E731
    loss = lambda output, target: cross_entropy(output[0], target)  # noqa: E731
    trajectory, problem = run_of(TwoInputs, loss, dit_fast.with_ids(Pairs()), unpack)
    pairs = Pairs()
    query = queries.loss((pairs.a, pairs.b), torch.arange(8) % 2)
    for hessian in ("exact", "ggn", "fisher", "none"):
        fast = dit_fast.score(trajectory, problem, query, [(0, 5), (1, 4)], hessian=hessian)
        slow = dit_fast.reference.score(trajectory, problem, query, [(0, 5), (1, 4)], hessian=hessian)
        assert relative_error(fast.scores, slow.scores) < 1e-11


def test_reference_retraining_removes_groups_together():
    run = standard_run("mlp", weight_decay=0.02, l2=0.03)
    query, groups = queries.loss(run.case.x_val, run.case.y_val), [[0, 3, 4], [2], [1, 5]]
    fast = dit_fast.leave_one_out(run.trajectory(), run.problem(), query, WINDOWS, groups=groups)
    slow = dit_fast.reference.leave_one_out(run.trajectory(), run.problem(), query, WINDOWS, groups=groups)
    assert fast.groups == groups
    assert (fast.scores - slow.scores).abs().max() < 1e-12


def test_two_parameter_groups_with_rates_of_their_own():
    run = standard_run("mlp")
    groups = {name: int(name.startswith("4")) for name in run.params}
    case, steps = run.case, len(run.batches)
    lr = torch.tensor([[0.3, 0.05]] * steps)
    model = case.model()
    named = dict(model.named_parameters())
    history = {name: [p.detach().clone()] for name, p in named.items()}
    for ids, a in zip(run.batches, run.coefficients, strict=True):
        gradient = torch.autograd.grad((a * case.loss(model(case.x[ids]), case.y[ids])).sum(), list(named.values()))
        for (name, p), g in zip(named.items(), gradient, strict=True):
            p.data -= lr[0, groups[name]] * g
            history[name].append(p.detach().clone())
    trajectory = run.trajectory(params={n: torch.stack(r) for n, r in history.items()}, lr=lr, groups=groups)
    query = queries.loss(case.x_val, case.y_val)
    fast = dit_fast.score(trajectory, run.problem(), query, WINDOWS)
    slow = dit_fast.reference.score(trajectory, run.problem(), query, WINDOWS)
    assert relative_error(fast.scores, slow.scores) < 1e-11
    true = dit_fast.leave_one_out(trajectory, run.problem(), query, WINDOWS)
    expected = dit_fast.reference.leave_one_out(trajectory, run.problem(), query, WINDOWS)
    assert (true.scores - expected.scores).abs().max() < 1e-12


def test_the_reference_refuses_what_it_does_not_do():
    run = standard_run("mlp")
    with pytest.raises(ValueError, match="does not refine"):
        dit_fast.reference.score(run.trajectory(), run.problem(), queries.loss(run.case.x_val, run.case.y_val), refine=2)
    with pytest.raises(ValueError, match="does not reproduce step"):
        wrong = run.problem(l2=0.5)
        dit_fast.reference.score(run.trajectory(), wrong, queries.loss(run.case.x_val, run.case.y_val))


def test_batches_of_one_step_and_train_helper_agree():
    """The shared training helper itself against two lines of arithmetic: one sample, one linear layer, squared error."""
    run = standard_run("mlp")
    again = train(run.case, run.batches, run.coefficients, run.lr)
    assert all(torch.equal(run.params[name], again.params[name]) for name in run.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hessian": "gnn"}, "hessian='gnn'"), ({"query_at": "start"}, "query_at"), ({"method": "loo"}, "method")],
)
def test_the_reference_names_options_it_does_not_know(options, message):
    run = standard_run("mlp")
    with pytest.raises(ValueError, match=message):
        dit_fast.reference.score(run.trajectory(), run.problem(), queries.loss(run.case.x_val, run.case.y_val), **options)


def test_the_reference_retrains_no_wrong_problem():
    run = standard_run("mlp")
    query = queries.loss(run.case.x_val, run.case.y_val)
    for call in (dit_fast.reference.leave_one_out, dit_fast.leave_one_out):
        with pytest.raises(ValueError, match="does not reproduce step 0"):
            call(run.trajectory(), run.problem(l2=0.5), query, sample_ids=[0])
