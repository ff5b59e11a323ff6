"""Runs that chance took part in: dropout whose masks are replayed, batches stored as the model saw them."""

import pytest
import torch
from cases import cross_entropy, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_fast

N, STEPS, WINDOWS = 12, 6, [(0, 6), (2, 5)]


class Attention(nn.Module):
    """Dropout inside attention and behind it, and between the layers of a recurrent net."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, num_layers=2, dropout=0.4, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.rnn(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(nn.functional.dropout(x, 0.2, self.training).mean(1))


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(0.4), nn.Linear(8, 3)), (3,)),
    "attention": (Attention, (4, 3)),
}


def build(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().double()
    x = torch.randn(N + 5, *shape, dtype=torch.float64)
    return model, x, torch.randint(3, (N + 5,))


def train(model, x, y, path, options=None, weights=None, noise=0.0, parts=1):
    """An ordinary loop; dropout (and `noise` on the inputs) are its only use of chance, so that the seed fixes them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    generator = torch.Generator().manual_seed(1)
    recorder = dit_fast.Recorder(path, model, optimizer, num_samples=N, **(options or {})) if path else None
    weights = torch.ones(N) if weights is None else weights
    torch.manual_seed(5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ids in torch.randint(N, (4,), generator=generator).chunk(parts):
            batch = x[ids] + noise * torch.randn(x[ids].shape, generator=generator, dtype=x.dtype), y[ids]
            (weights[ids] * cross_entropy(model(batch[0]), batch[1])).sum().div(4).backward()
            with torch.no_grad():
                model(batch[0])  # an evaluation in between, whose masks are its own
            if recorder:
                recorder.batch(ids, scale=1 / parts, batch=batch if noise else None)
        optimizer.step()
    if recorder:
        recorder.close()
    return model.eval()


def central_differences(name, **options):
    """d value / d weight of every sample by the same loop again, with the same masks and noise."""
    scores = torch.zeros(N, dtype=torch.float64)
    for j in range(N):
        values = []
        for sign in (1, -1):
            model, x, y = build(name)
            weights = torch.ones(N, dtype=torch.float64)
            weights[j] += sign * 1e-5
            train(model, x, y, None, weights=weights, **options)
            with torch.no_grad():
                values.append(float(cross_entropy(model(x[N:]), y[N:]).mean()))
        scores[j] = -(values[0] - values[1]) / 2e-5
    return scores


@sdpa_kernel(SDPBackend.MATH)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(("name", "parts"), [("mlp", 1), ("mlp", 2), ("attention", 1)])
def test_masks_are_replayed(tmp_path, name, parts, every):
    model, x, y = build(name)
    before = torch.get_rng_state()
    train(model, x, y, tmp_path / "log", {"every": every}, parts=parts)
    model.train()
    problem, query = dit_fast.Problem(model, cross_entropy, (x[:N], y[:N])), dit_fast.queries.loss(x[N:], y[N:])
    trajectory = dit_fast.Trajectory.open(tmp_path / "log")
    torch.set_rng_state(before)
    result = dit_fast.score(trajectory, problem, query, WINDOWS)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative_error(result.scores[0, 0], central_differences(name, parts=parts)) < 1e-8
    slow = dit_fast.reference.score(trajectory, problem, query, WINDOWS)
    assert relative_error(result.scores, slow.scores, slow.scores.abs().amax()) < 1e-10
    true = dit_fast.leave_one_out(trajectory, problem, query, WINDOWS, sample_ids=[1, 4])
    slow = dit_fast.reference.leave_one_out(trajectory, problem, query, WINDOWS, sample_ids=[1, 4])
    assert (true.scores - slow.scores).abs().max() < 1e-12


@pytest.mark.parametrize("hessian", ["ggn", "fisher", "none"])
def test_other_curvatures_keep_the_masks(tmp_path, hessian):
    model, x, y = build("mlp")
    train(model, x, y, tmp_path / "log")
    model.train()
    arguments = (
        dit_fast.Trajectory.open(tmp_path / "log"),
        dit_fast.Problem(model, cross_entropy, (x[:N], y[:N])),
        dit_fast.queries.loss(x[N:], y[N:]),
        WINDOWS,
    )
    fast, slow = dit_fast.score(*arguments, hessian=hessian), dit_fast.reference.score(*arguments, hessian=hessian)
    assert relative_error(fast.scores, slow.scores, slow.scores.abs().amax()) < 1e-10


def test_forward_passes_that_are_no_batch_are_refused(tmp_path):
    model, x, y = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dit_fast.UnsupportedError, match="step 0: 2 forward passes of the model for 1 named batches"),
        dit_fast.Recorder(tmp_path / "log", model, optimizer) as recorder,
    ):
        (cross_entropy(model(x[:4]), y[:4]).mean() + model(x[4:6]).square().mean()).backward()
        with recorder.step([0, 1, 2, 3]):
            optimizer.step()


def test_autocast_is_refused(tmp_path):
    model, x, _ = build("mlp")
    model, x = model.float(), x.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dit_fast.UnsupportedError, match="step 0: the model runs under autocast"),
        dit_fast.Recorder(tmp_path / "log", model, optimizer),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(x[:4])


@pytest.mark.parametrize("every", [1, 4])
def test_stored_batches_need_no_data(tmp_path, every):
    model, x, y = build("mlp")
    model[2].p = 0.0
    options = {"store_batches": True, "every": every}
    train(model, x, y, tmp_path / "log", options, noise=0.3, parts=2)
    trajectory, query = dit_fast.Trajectory.open(tmp_path / "log"), dit_fast.queries.loss(x[N:], y[N:])
    problem = dit_fast.Problem(model, cross_entropy)
    assert repr(problem) == "Problem(Sequential, 59 parameters, batches of the log, l2=0)"
    result = dit_fast.score(trajectory, problem, query, WINDOWS)
    slow = dit_fast.reference.score(trajectory, problem, query, WINDOWS)
    assert relative_error(result.scores, slow.scores, slow.scores.abs().amax()) < 1e-10
    without_noise = dit_fast.Problem(model, cross_entropy, (x[:N], y[:N]))
    assert torch.equal(dit_fast.score(trajectory, without_noise, query, WINDOWS).scores, result.scores)

    def again(name):
        model, x, y = build("mlp")
        model[2].p = 0.0
        return model, x, y

    scores = torch.zeros(N, dtype=torch.float64)
    for j in range(N):
        values = []
        for sign in (1, -1):
            other, x, y = again("mlp")
            weights = torch.ones(N, dtype=torch.float64)
            weights[j] += sign * 1e-5
            train(other, x, y, None, weights=weights, noise=0.3, parts=2)
            with torch.no_grad():
                values.append(float(cross_entropy(other(x[N:]), y[N:]).mean()))
        scores[j] = -(values[0] - values[1]) / 2e-5
    assert relative_error(result.scores[0, 0], scores) < 1e-8


def test_batches_come_back_as_they_were_given(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = []
    with dit_fast.Recorder(tmp_path / "log", model, optimizer, store_batches=True, chunk_bytes=1) as recorder:
        for t in range(9):
            x = torch.randn(2 + t % 2, 2)
            batch = {"x": [x, x > 0], "labels": torch.randint(3, (len(x),)), "note": ("a", None, 3)}
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), batch["labels"]).backward()
            with recorder.step(list(range(len(x))), batch=batch):
                optimizer.step()
            given.append(batch)
    trajectory = dit_fast.Trajectory.open(tmp_path / "log")
    for t, batch in enumerate(given):
        (back,) = trajectory.stored_batches(t)
        assert torch.equal(back["x"][0], batch["x"][0]) and torch.equal(back["x"][1], batch["x"][1])
        assert torch.equal(back["labels"], batch["labels"]) and back["note"] == batch["note"]


def test_bad_batches_and_missing_data_are_named(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dit_fast.Recorder(tmp_path / "a", model, optimizer, store_batches=True)
    with pytest.raises(ValueError, match="step 0: store_batches=True needs the batch"):
        recorder.batch([0])
    with pytest.raises(TypeError, match=r"step 0: a stored batch holds tensors, .* not set"):
        recorder.batch([0], batch={1, 2})
    recorder.batch([0], batch=(torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="step 0: the batch is laid out as"):
        recorder.batch([0], batch=[torch.ones(1)])
    with pytest.warns(RuntimeWarning, match="1 batches were named"):
        recorder.close()
    recorder = dit_fast.Recorder(tmp_path / "b", model, optimizer)
    with pytest.raises(ValueError, match="step 0: store_batches=True is needed"):
        recorder.batch([0], batch=(torch.ones(1),))
    recorder.close()
    trajectory = dit_fast.Trajectory.from_arrays({"weight": torch.ones(2, 3, 2), "bias": torch.ones(2, 3)}, [[0]], 0.1)
    with pytest.raises(ValueError, match="the problem has no data and the log holds no batches"):
        dit_fast.score(trajectory, dit_fast.Problem(model, cross_entropy), dit_fast.queries.parameter("bias"))


def test_a_closure_may_run_the_model_with_dropout(tmp_path):
    model, x, y = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with dit_fast.Recorder(tmp_path / "log", model, optimizer, num_samples=N) as recorder:
        for ids in torch.arange(N).chunk(3):

            def closure(ids=ids):
                optimizer.zero_grad()
                loss = cross_entropy(model(x[ids]), y[ids]).mean()
                loss.backward()
                return loss

            with recorder.step(ids):
                optimizer.step(closure)
    problem = dit_fast.Problem(model, cross_entropy, (x[:N], y[:N]))
    # the guard replays steps, and would refuse other masks
    scores = dit_fast.score(dit_fast.Trajectory.open(tmp_path / "log"), problem, dit_fast.queries.loss(x[N:], y[N:])).scores
    assert (scores != 0).all()
