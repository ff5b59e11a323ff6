"""The guard: a problem that is not the logged run's is refused with the likely cause, a right one is let through."""

import pytest
import torch
from cases import Run, cross_entropy, make_case
from torch import nn

import dit_fast as dit
from dit_fast import queries

STEPS, SIZE = 5, 4


def trained(dtype=torch.float64, *, l2=0.0, reduction="mean", clip=None, loss=cross_entropy, build=None, batches=None, lr=0.1):
    """Five steps of torch.optim.SGD on batches of four out of twelve, recorded as a mean without clipping."""
    case = make_case("mlp")
    make = build or case.model
    case.model, case.loss = lambda: make().to(dtype), loss
    case.x, case.x_val = case.x.to(dtype), case.x_val.to(dtype)
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    named = dict(model.named_parameters())
    history = {name: [p.detach().clone()] for name, p in named.items()}
    batches = batches or torch.randperm(12, generator=torch.Generator().manual_seed(0)).repeat(2)[: STEPS * SIZE].split(SIZE)
    for ids in batches:
        optimizer.zero_grad()
        losses = loss(model(case.x[ids]), case.y[ids]) + 0.5 * l2 * sum(p.square().sum() for p in named.values())
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for name, p in named.items():
            history[name].append(p.detach().clone())
    params = {name: torch.stack(rows) for name, rows in history.items()}
    means = [torch.full((len(ids),), 1 / len(ids), dtype=torch.float64) for ids in batches]
    return Run(case, list(batches), means, [lr] * len(batches), params, l2=l2)


def score(run, problem=None, trajectory=None, function=dit.score, windows=None, **options):
    query = queries.loss(run.case.x_val, run.case.y_val)
    return function(trajectory or run.trajectory(), problem or run.problem(), query, windows, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_the_right_problem_is_let_through(dtype, l2, reduction):
    run = trained(dtype, l2=l2, reduction=reduction)
    if reduction == "sum":
        run.coefficients = [torch.ones(SIZE)] * STEPS
    checked, unchecked = (score(run, check=check).scores for check in (True, False))
    assert torch.equal(checked, unchecked) and checked.abs().min() > 0


@pytest.mark.parametrize("function", [dit.score, dit.leave_one_out])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_l2_is_refused_and_the_right_one_named(dtype, function):
    run = trained(dtype, l2=0.03)
    for wrong in (0.0, 0.01, 0.5):
        with pytest.raises(ValueError, match=rf"proportional to the parameters: likely l2=0\.03 where it is {wrong:g}\."):
            score(run, run.problem(l2=wrong), function=function)
    run = trained(dtype)
    with pytest.raises(ValueError, match=r"likely l2=-?[0-9.e-]+ where it is 0\.02\."):
        score(run, run.problem(l2=0.02), function=function)


def test_sum_for_mean_is_refused_in_both_directions():
    run = trained(reduction="sum")
    with pytest.raises(ValueError, match=r"is 4 times as long: likely sum or mean \(4 samples in the batch\).*reduction"):
        score(run)
    run = trained()
    with pytest.raises(ValueError, match=r"is 0\.25 times as long: likely sum or mean \(4 samples in the batch\).*reduction"):
        score(run, trajectory=run.trajectory(coefficients=[torch.ones(SIZE)] * STEPS))


def test_a_wrong_rate_is_refused():
    run = trained()
    with pytest.raises(ValueError, match="same direction and is 2 times as long: likely the learning rate, the loss's scale"):
        score(run, trajectory=run.trajectory(lr=0.05))


def test_ids_in_another_order_are_refused():
    run = trained()
    with pytest.raises(ValueError, match=r"does not reproduce step 0 of the log: .*ids in another order"):
        score(run, trajectory=run.trajectory(batch_ids=run.batches[::-1]))


@pytest.mark.parametrize(("wrong", "named"), [(0, 0), (1, None), (2, 2), (3, None), (4, 4)])
def test_the_first_the_middle_and_the_last_step_are_replayed(wrong, named):
    """A step whose ids are wrong is met where the guard looks, and the message names it."""
    run = trained()
    batches = list(run.batches)
    batches[wrong] = (batches[wrong] + 1) % 12
    trajectory = run.trajectory(batch_ids=batches)
    if named is None:
        score(run, trajectory=trajectory)
    else:
        with pytest.raises(ValueError, match=f"does not reproduce step {named} of the log: its step is off by"):
            score(run, trajectory=trajectory)


def test_steps_behind_the_last_window_are_not_replayed():
    run = trained()
    batches = [*run.batches[:-1], (run.batches[-1] + 1) % 12]
    score(run, trajectory=run.trajectory(batch_ids=batches), windows=[(0, 2), (1, 4)])
    with pytest.raises(ValueError, match="does not reproduce step 4"):
        score(run, trajectory=run.trajectory(batch_ids=batches), windows=[(0, 2), (1, 5)])


def test_foreign_data_is_refused():
    run = trained()
    problem = dit.Problem(run.case.model(), cross_entropy, (run.case.x.flip(0), run.case.y.flip(0)))
    with pytest.raises(ValueError, match="another order or of another data set"):
        score(run, problem)
    problem = dit.Problem(run.case.model(), cross_entropy, (run.case.x[:11], run.case.y[:11]))
    with pytest.raises(dit.LogError, match=r"sample id 11 is outside the data \(11 samples\): is it another data set\?"):
        score(run, problem)


def test_gradients_clipped_behind_the_recorders_back_are_refused():
    run = trained(clip=0.05)
    with pytest.raises(ValueError, match=r"same direction and is 0\.[0-9]+ times as long: likely gradients clipped before"):
        score(run)


def test_another_loss_is_refused():
    run = trained()

    def smoothed(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none", label_smoothing=0.1)

    with pytest.raises(ValueError, match="another model, loss or l2"):
        score(run, dit.Problem(run.case.model(), smoothed, (run.case.x, run.case.y)))


def centered(output, target):
    losses = cross_entropy(output, target)
    return losses * losses / losses.mean()


class BatchCentered(nn.Module):
    """What batch normalization does, in a module no list of names can know."""

    def forward(self, x):
        return x - x.mean(0)


class OwnDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("function", [dit.score, dit.leave_one_out])
def test_a_loss_that_couples_the_samples_is_refused(function):
    run = trained(loss=centered)
    with pytest.raises(dit.UnsupportedError, match="losses depend on the other samples of the batch"):
        score(run, function=function)


@pytest.mark.parametrize("module", [BatchCentered, OwnDropout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_couples_the_samples_or_draws_at_random_is_refused(dtype, module):
    run = trained(dtype, build=lambda: nn.Sequential(nn.Linear(5, 4), module(), nn.Linear(4, 3)))
    with pytest.raises(dit.UnsupportedError, match=r"depend on the other samples of the batch, or on chance"):
        score(run)


def test_a_gradient_that_is_not_finite_is_named():
    run = trained()

    def root(output, target):
        return cross_entropy(output, target) + (output.sum(1) * 0).sqrt()  # 0, with an infinite slope

    with pytest.raises(ValueError, match="The problem's gradient holds NaN or infinity"):
        score(run, dit.Problem(run.case.model(), root, (run.case.x, run.case.y)))


@pytest.mark.parametrize("function", [dit.score, dit.leave_one_out])
def test_without_the_check_a_wrong_problem_passes_and_the_scores_are_of_another_run(function):
    run = trained(l2=0.5)
    right = score(run, function=function)
    wrong = score(run, run.problem(l2=0.0), function=function, check=False)
    assert (wrong.scores - right.scores).abs().max() > 1e-3 * right.scores.abs().max()
    with pytest.raises(ValueError, match=r"\(check=False skips this test, at the price of scores of another run\)"):
        score(run, run.problem(l2=0.0), function=function)


def test_a_batch_of_one_and_a_rate_of_zero_are_let_through():
    score(trained(batches=[torch.tensor([i]) for i in (3, 1, 3)]))
    score(trained(lr=0.0))


def test_clipping_of_a_few_steps_in_the_middle_is_found():
    """The largest step is the first that clipping shortens."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    x[4:] *= 20
    y[4:] = 1 - model(x[4:]).argmax(1)  # so large a loss that its gradient is clipped
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = {name: [p.detach().clone()] for name, p in model.named_parameters()}
    batches = [torch.arange(4)] * 3 + [torch.arange(4, 8)] * 2 + [torch.arange(4)] * 4
    for ids in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, p in model.named_parameters():
            history[name].append(p.detach().clone())
    params = {name: torch.stack(rows) for name, rows in history.items()}
    problem = dit.Problem(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    query = dit.queries.loss(x, y)
    told = dit.Trajectory.from_arrays(params, batches, 0.1, clip_norm=1.0)
    assert torch.isfinite(dit.score(told, problem, query).scores).all()
    with pytest.raises(
        ValueError, match=r"does not reproduce step [34] .* gradients clipped .* Recorder not told \(clip_norm=,"
    ):
        dit.score(dit.Trajectory.from_arrays(params, batches, 0.1), problem, query)


@pytest.mark.parametrize("size", [1, SIZE])
def test_a_loss_that_fails_is_named(size):
    run = trained(batches=torch.arange(2 * size).split(size))
    problem = dit.Problem(run.case.model(), lambda z, y: z @ y, (run.case.x, run.case.y))
    with pytest.raises(ValueError, match="the problem's model or per_sample_loss fails on the first batch of the log: "):
        score(run, problem)


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device='cuda': torch finds no CUDA device"):
        score(trained(), device="cuda")


def loop(path, momentum=0.0, adam=False, told=None, clip=None, every=50):
    """Fifty steps with a rate that ends near 0, logged at the ends alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    kind = torch.optim.AdamW(model.parameters(), lr=0.01) if adam else torch.optim.SGD(model.parameters(), 0.1, momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(kind, 50)
    with dit.Recorder(path, model, kind, every=every, clip_norm=told) as recorder:
        for _ in range(50):
            ids = torch.randint(40, (8,))
            kind.zero_grad()
            cross_entropy(model(x[ids]), y[ids]).mean().backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            with recorder.step(ids):
                kind.step()
            schedule.step()
    return dit.Trajectory.open(path), dit.Problem(model, cross_entropy, (x, y)), queries.loss(x[:9], y[:9])


@pytest.mark.parametrize("adam", [False, True])
def test_a_tiny_last_step_behind_many_replayed_ones_is_let_through(tmp_path, adam):
    result = dit.score(*loop(tmp_path / "log", momentum=0.9, adam=adam))
    assert result.meta["replay_drift"] < 1e-4


def test_steps_that_only_rounding_could_explain_are_told(tmp_path, monkeypatch):
    """As where much of a net's gradient is rounding: Adam makes full steps of it, and hides what was not told."""
    from dit_fast import replay

    trajectory, problem, query = loop(tmp_path / "log", adam=True, clip=0.1, every=10)
    with pytest.raises((ValueError, dit.LogError)):
        dit.score(trajectory, problem, query)
    monkeypatch.setattr(replay, "gradient_noise", lambda *arguments: 1.0)
    monkeypatch.setattr("dit_fast.guard.gradient_noise", lambda *arguments: 1.0)
    with pytest.warns(RuntimeWarning, match="of the distance travelled. The optimizer may have made this"):
        dit.score(trajectory, problem, query)
