"""Every optimizer and option, logged by a Recorder, against the derivative of the whole unrolled training."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import Case, make_case, relative_error, schedule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_fast
from dit_fast.optimizers import Clip

WINDOWS = [(0, 9), (0, 4), (4, 9), (2, 6), (8, 9), (0, 1)]
ENDS = sorted({t for window in WINDOWS for t in window})
STEPS = 9


@dataclass
class Setting:
    """How a run is trained: torch's optimizer with its options, what is told to the Recorder, and what happens per step."""

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    recorder: dict[str, Any] = field(default_factory=dict)
    second_group: dict[str, Any] | None = None
    scheduler: Any = None
    absent_at: tuple[int, ...] = ()
    accumulate: bool = False
    l2: float = 0.0


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)


SETTINGS = {
    "momentum": Setting(SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening and decay": Setting(SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": Setting(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}, l2=0.03),
    "maximize": Setting(SGD, {"lr": 0.05, "momentum": 0.5, "maximize": True, "weight_decay": 0.02}),
    "momentum in one group": Setting(SGD, {"lr": 0.1}, second_group={"momentum": 0.9, "lr": 0.05, "weight_decay": 0.1}),
    "one cycle of momentum": Setting(SGD, {"lr": 0.1, "momentum": 0.9}, scheduler=one_cycle),
    "adam": Setting(Adam, {"lr": 0.02}),
    "adam with decay and eps": Setting(Adam, {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3, "betas": (0.7, 0.9)}),
    "adam maximize": Setting(Adam, {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "adamw": Setting(AdamW, {"lr": 0.02, "weight_decay": 0.1}, l2=0.02),
    "adamw maximize": Setting(AdamW, {"lr": 0.01, "maximize": True}),
    "adam with decoupled decay": Setting(Adam, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "one cycle of betas": Setting(AdamW, {"lr": 0.02}, scheduler=one_cycle, second_group={"weight_decay": 0.0, "lr": 0.01}),
    "clip by norm": Setting(SGD, {"lr": 0.2}, {"clip_norm": 0.3}),
    "clip by norm and momentum": Setting(SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}, {"clip_norm": 0.3}),
    "clip by norm and adam": Setting(AdamW, {"lr": 0.02}, {"clip_norm": 0.3}),
    "clip by value": Setting(SGD, {"lr": 0.2, "momentum": 0.5}, {"clip_value": 0.02}),
    "clip by value and adam": Setting(Adam, {"lr": 0.02, "maximize": True}, {"clip_value": 0.02}),
    "clip far away": Setting(SGD, {"lr": 0.2}, {"clip_norm": 1e6}),
    "skipped parameter": Setting(SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, absent_at=(0, 3, 4)),
    "skipped parameter and adam": Setting(AdamW, {"lr": 0.02, "weight_decay": 0.1}, absent_at=(0, 3, 4)),
    "skipped parameter and clipping": Setting(SGD, {"lr": 0.1, "momentum": 0.9}, {"clip_norm": 0.3}, absent_at=(0, 3, 4)),
    "accumulation": Setting(AdamW, {"lr": 0.02}, accumulate=True),
    "accumulation and clipping": Setting(SGD, {"lr": 0.1, "momentum": 0.9}, {"clip_norm": 0.3}, accumulate=True),
    "every third step": Setting(SGD, {"lr": 0.1, "momentum": 0.9}, {"every": 3}),
    "every fourth step and adam": Setting(AdamW, {"lr": 0.02, "weight_decay": 0.1}, {"every": 4}, absent_at=(3, 5)),
    "every fourth step, plain": Setting(SGD, {"lr": 0.2}, {"every": 4}, accumulate=True),
    "small chunks and adam": Setting(Adam, {"lr": 0.02}, {"chunk_bytes": 1}),
}


@dataclass
class LoggedRun:
    case: Case
    setting: Setting
    batches: list[Tensor]
    coefficients: list[Tensor]
    history: list[dict[str, Tensor]]
    trajectory: dit_fast.Trajectory

    def problem(self):
        return dit_fast.Problem(self.case.model(), self.case.loss, (self.case.x, self.case.y), l2=self.setting.l2)

    def query(self):
        return dit_fast.queries.loss(self.case.x_val, self.case.y_val)


def log_run(net, setting, path, left_out=None):
    """An ordinary training loop of torch with a Recorder; `left_out`: a sample whose loss is left out, without a Recorder."""
    case = make_case(net)
    batches, coefficients, _ = schedule(len(case.x), STEPS)
    model = case.model()
    named = dict(model.named_parameters())
    groups = [{"params": list(model.parameters())}]
    if setting.second_group is not None:
        first, *rest = model.parameters()
        groups = [{"params": [first]}, {"params": rest} | setting.second_group]
    optimizer = setting.optimizer(groups, **setting.options)
    scheduler = setting.scheduler(optimizer) if setting.scheduler else None
    recorder = None if left_out is not None else dit_fast.Recorder(path, model, optimizer, num_samples=12, **setting.recorder)
    history = [{name: p.detach().clone() for name, p in named.items()}]
    for t, (ids, a) in enumerate(zip(batches, coefficients, strict=True)):
        optimizer.zero_grad()
        parts = [slice(0, 1), slice(1, None)] if setting.accumulate and len(ids) > 1 else [slice(None)]
        for part in parts:
            losses = case.loss(model(case.x[ids[part]]), case.y[ids[part]])
            losses = losses + 0.5 * setting.l2 * sum(p.square().sum() for p in named.values())
            kept = a[part] * (ids[part] != left_out) if left_out is not None else a[part]
            (kept * losses).sum().backward()
            if recorder:
                recorder.batch(ids[part], coefficients=a[part])
        if t in setting.absent_at:
            next(model.parameters()).grad = None
        if "clip_norm" in setting.recorder:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.recorder["clip_norm"])
        if "clip_value" in setting.recorder:
            torch.nn.utils.clip_grad_value_(model.parameters(), setting.recorder["clip_value"])
        optimizer.step()
        if scheduler:
            scheduler.step()
        history.append({name: p.detach().clone() for name, p in named.items()})
    if recorder:
        recorder.close()
    trajectory = dit_fast.Trajectory.open(path) if recorder else None
    return LoggedRun(case, setting, batches, coefficients, history, trajectory)


@sdpa_kernel(SDPBackend.MATH)
def unrolled_scores(run):
    """−∂query(θ[t])/∂w at w = 1 for every t in ENDS, by autograd through all steps written out."""
    setting, case = run.setting, run.case
    theta = {name: value.clone().requires_grad_() for name, value in run.history[0].items()}
    moments = {name: [torch.zeros_like(v), torch.zeros_like(v), 0] for name, v in theta.items()}
    w = torch.ones(len(case.x), dtype=torch.float64, requires_grad=True)
    first = next(iter(theta))
    scores = {0: torch.zeros(len(w), dtype=torch.float64)}
    for t, (ids, a) in enumerate(zip(run.batches, run.coefficients, strict=True)):
        theta = {name: value.view_as(value) for name, value in theta.items()}  # one step's gradient, not that of all before
        outputs = torch.func.functional_call(case.model(), theta, (case.x[ids],))
        losses = case.loss(outputs, case.y[ids]) + 0.5 * setting.l2 * sum(p.square().sum() for p in theta.values())
        gradient = torch.autograd.grad((w[ids] * a * losses).sum(), list(theta.values()), create_graph=True)
        g = dict(zip(theta, gradient, strict=True))
        if limit := setting.recorder.get("clip_norm"):
            norm = torch.cat([x.flatten() for name, x in g.items() if not (t in setting.absent_at and name == first)]).norm()
            g = {name: x * limit / (norm + 1e-6) if limit < norm + 1e-6 else x for name, x in g.items()}
        if limit := setting.recorder.get("clip_value"):
            g = {name: x.clamp(-limit, limit) for name, x in g.items()}
        settings, groups = run.trajectory.settings(t), run.trajectory.groups
        for name in theta:
            if not (t in setting.absent_at and name == first):
                theta[name] = step(setting, theta[name], g[name], moments[name], settings[groups[name]])
        torch.testing.assert_close(theta[first], run.history[t + 1][first], rtol=1e-11, atol=1e-13)
        if t + 1 in ENDS:
            output = torch.func.functional_call(case.model().eval(), theta, (case.x_val,))
            scores[t + 1] = -torch.autograd.grad(case.loss(output, case.y_val).mean(), w, retain_graph=True)[0]
    return scores


def step(setting, theta, g, moments, s):
    """One parameter's step, from torch's documentation; moments = [buffer or m, v, number of updates] change in place."""
    sign = -1 if s["maximize"] else 1
    decoupled = setting.optimizer is AdamW or setting.options.get("decoupled_weight_decay")
    g = sign * g + (0 if decoupled else s["weight_decay"] * theta)
    if setting.optimizer is SGD:
        if s["momentum"] == 0:
            return theta - s["lr"] * g
        moments[0] = g if moments[2] == 0 else s["momentum"] * moments[0] + (1 - s["dampening"]) * g
        moments[2] += 1
        return theta - s["lr"] * (g + s["momentum"] * moments[0] if s["nesterov"] else moments[0])
    if decoupled:
        theta = theta - s["lr"] * s["weight_decay"] * theta
    moments[2] += 1
    moments[0] = s["beta1"] * moments[0] + (1 - s["beta1"]) * g
    moments[1] = s["beta2"] * moments[1] + (1 - s["beta2"]) * g**2
    m, v = moments[0] / (1 - s["beta1"] ** moments[2]), moments[1] / (1 - s["beta2"] ** moments[2])
    # a sample's weight moves v = 0 to no first order, but the root's derivative there is infinite
    root = torch.where(v == 0, 0.0, torch.where(v == 0, 1.0, v).sqrt())
    return theta - s["lr"] * m / (root + s["eps"])


def assert_scores(result, truth, tolerance=1e-10):
    for row, (start, stop) in zip(result.scores[:, 0], WINDOWS, strict=True):
        scale = truth[start].abs().max() + truth[stop].abs().max()
        assert relative_error(row, truth[stop] - truth[start], scale) < tolerance, (start, stop)


CASES = [("mlp", name) for name in SETTINGS] + [
    (net, name) for net in ("cnn", "transformer") for name in ("nesterov", "adam with decay and eps", "clip by norm and adam")
]


@pytest.mark.parametrize(("net", "name"), CASES)
def test_scores_are_the_derivative_of_the_unrolled_training(tmp_path, net, name):
    run = log_run(net, SETTINGS[name], tmp_path / "log")
    truth = unrolled_scores(run)
    assert_scores(dit_fast.score(run.trajectory, run.problem(), run.query(), WINDOWS, backend="generic"), truth)
    assert_scores(dit_fast.score(run.trajectory, run.problem(), run.query(), WINDOWS), truth)


@pytest.mark.parametrize(("net", "name"), CASES)
def test_the_reference_follows(tmp_path, net, name):
    run = log_run(net, SETTINGS[name], tmp_path / "log")
    result = dit_fast.reference.score(run.trajectory, run.problem(), run.query(), WINDOWS)
    assert_scores(result, unrolled_scores(run))


@pytest.mark.parametrize("hessian", ["ggn", "fisher", "none"])
@pytest.mark.parametrize("name", ["nesterov", "adamw", "clip by norm and adam"])
def test_other_curvatures_match_the_reference(tmp_path, name, hessian):
    run = log_run("mlp", SETTINGS[name], tmp_path / "log")
    fast = dit_fast.score(run.trajectory, run.problem(), run.query(), WINDOWS, hessian=hessian)
    slow = dit_fast.reference.score(run.trajectory, run.problem(), run.query(), WINDOWS, hessian=hessian)
    assert relative_error(fast.scores, slow.scores, slow.scores.abs().amax()) < 1e-10


@pytest.mark.parametrize("name", SETTINGS)
def test_leave_one_out_is_the_ordinary_loop_without_the_sample(tmp_path, name):
    run = log_run("mlp", SETTINGS[name], tmp_path / "log")
    late = next(int(j) for j in run.batches[4] if not any(j in ids for ids in run.batches[:2]))
    kept = [3, late, int(run.batches[0][0])]
    result = dit_fast.leave_one_out(run.trajectory, run.problem(), run.query(), WINDOWS, sample_ids=kept)
    slow = dit_fast.reference.leave_one_out(run.trajectory, run.problem(), run.query(), WINDOWS, sample_ids=kept)

    def value(params):
        output = torch.func.functional_call(run.case.model().eval(), params, (run.case.x_val,))
        return run.case.loss(output, run.case.y_val).mean()

    for i, j in enumerate(kept):
        without = log_run("mlp", SETTINGS[name], None, left_out=j)
        change = [float(value(a) - value(b)) for a, b in zip(without.history, run.history, strict=True)]
        for w, (start, stop) in enumerate(WINDOWS):
            truth = change[stop] - change[start]
            assert abs(float(result.scores[w, 0, i]) - truth) < 1e-10 * max(map(abs, change)), (j, start, stop)
            assert abs(float(slow.scores[w, 0, i]) - truth) < 1e-10 * max(map(abs, change)), (j, start, stop)


def test_scores_of_another_optimizer_are_far_off(tmp_path):
    """The negative control: an AdamW run taken for SGD, momentum forgotten, clipping forgotten, a skipped step not told."""
    for name, changes in {
        "adamw": {"optimizer": dit_fast.SGD()},
        "momentum": {"optimizer": dit_fast.SGD()},
        "clip by norm": {"clip_norm": None},
        "skipped parameter": {"absent": None},
    }.items():
        run = log_run("mlp", SETTINGS[name], tmp_path / name)
        truth = unrolled_scores(run)
        arguments = {
            "params": {n: torch.stack([point[n] for point in run.history]) for n in run.history[0]},
            "batch_ids": run.batches,
            "coefficients": run.coefficients,
            "lr": [run.trajectory.settings(t)[0]["lr"] for t in range(STEPS)],
            "optimizer": run.trajectory.optimizer,
            "clip_norm": run.trajectory.clip.norm,
            "absent": [list(run.trajectory.absent(t)) for t in range(STEPS)],
        }
        right = dit_fast.Trajectory.from_arrays(**arguments)
        assert_scores(dit_fast.score(right, run.problem(), run.query(), WINDOWS), truth)
        wrong = dit_fast.Trajectory.from_arrays(**(arguments | changes))
        with pytest.raises(ValueError, match="does not reproduce step"):
            dit_fast.score(wrong, run.problem(), run.query(), WINDOWS)
        with pytest.raises(AssertionError):
            unchecked = dit_fast.score(wrong, run.problem(), run.query(), WINDOWS, check=False)
            assert_scores(unchecked, truth, tolerance=1e-3)


def test_dead_units_and_unseen_rows_give_no_nan(tmp_path):
    """Adam where v = 0: a ReLU unit that never fires."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias[1] = -100.0
    case = make_case("mlp")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with dit_fast.Recorder(tmp_path / "log", model, optimizer) as recorder:
        for ids in schedule(12, STEPS)[0]:
            optimizer.zero_grad()
            case.loss(model(case.x[ids]), case.y[ids]).mean().backward()
            with recorder.step(ids):
                optimizer.step()
    problem = dit_fast.Problem(model, case.loss, (case.x, case.y))
    query = dit_fast.queries.loss(case.x_val, case.y_val)
    trajectory = dit_fast.Trajectory.open(tmp_path / "log")
    fast = dit_fast.score(trajectory, problem, query, WINDOWS)
    slow = dit_fast.reference.score(trajectory, problem, query, WINDOWS)
    assert relative_error(fast.scores, slow.scores, slow.scores.abs().amax()) < 1e-10


def test_a_tiny_budget_replays_with_checkpoints_and_changes_nothing(tmp_path):
    run = log_run("mlp", SETTINGS["every fourth step and adam"], tmp_path / "log")
    whole = dit_fast.score(run.trajectory, run.problem(), run.query(), WINDOWS)
    ids, a = run.batches, run.coefficients
    params = {name: torch.stack([point[name] for point in run.history]) for name in run.history[0]}
    one_segment = dit_fast.Trajectory.from_arrays(
        params=params, batch_ids=ids, coefficients=a, lr=0.02, optimizer=run.trajectory.optimizer,
        absent=[list(run.trajectory.absent(t)) for t in range(STEPS)],
    )  # fmt: skip
    column = 5 * 79 * 8 + 8 * 12
    for trajectory in (run.trajectory, one_segment):
        cut = dit_fast.score(trajectory, run.problem(), run.query(), WINDOWS, memory_budget=3 * column)
        assert relative_error(cut.scores, whole.scores, whole.scores.abs().amax()) < 1e-10


def test_a_replay_that_misses_is_refused(tmp_path):
    setting = SETTINGS["every third step"]
    run = log_run("mlp", setting, tmp_path / "log")
    wrong = dit_fast.Problem(run.case.model(), run.case.loss, (run.case.x.flip(0), run.case.y))
    with pytest.raises(dit_fast.LogError, match=r"the replay misses the parameters stored before step 3 by"):
        dit_fast.score(run.trajectory, wrong, run.query(), WINDOWS)
    with pytest.raises(dit_fast.LogError, match="before step 4 are not stored: this log holds every 3th step"):
        run.trajectory.params(4)
    with pytest.raises(dit_fast.LogError, match="this log holds every 3th step"):
        run.trajectory.rows(0, 4)
    assert dit_fast.score(run.trajectory, run.problem(), run.query(), WINDOWS).meta["replay_drift"] < 1e-9


def test_default_dtype_is_float64_for_adam_only(tmp_path):
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    for kind, expected in ((torch.optim.SGD, "float32"), (torch.optim.AdamW, "float64")):
        optimizer = kind(model.parameters(), lr=0.01)
        with dit_fast.Recorder(tmp_path / kind.__name__, model, optimizer) as recorder:
            for ids in torch.arange(8).split(2):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                with recorder.step(ids):
                    optimizer.step()
        problem = dit_fast.Problem(model, torch.nn.CrossEntropyLoss(reduction="none"), (x, y))
        result = dit_fast.score(dit_fast.Trajectory.open(tmp_path / kind.__name__), problem, dit_fast.queries.loss(x, y))
        assert result.meta["dtype"] == expected


def test_clip_by_hand():
    g = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    clipped = Clip(norm=1.0).forward(g)
    assert clipped["a"].tolist() == pytest.approx([0.6, 0.0]) and clipped["b"].tolist() == pytest.approx([0.8])
    assert Clip(value=3.5).forward(g)["b"].tolist() == [3.5]
    assert Clip(norm=5.1).forward(g)["b"].tolist() == [4.0]
    # along g the clipped gradient does not move, across it by C/‖g‖
    c = Clip(norm=1.0).adjoint({"a": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[4.0], [0.0]])}, g)
    assert torch.cat([c["a"], c["b"]], 1)[0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert c["a"][1].tolist() == pytest.approx([0.0, 0.2])


def test_a_pencil_checks_the_rules():
    """One number each: momentum 0.5 and rate 0.1 from buffer 2 and gradient 1; Adam's first step is the rate times the sign."""
    s = {"lr": 0.1, "momentum": 0.5, "dampening": 0.0, "nesterov": 0.0, "weight_decay": 0.0, "maximize": 0.0}
    theta, g, buffer = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 1.0, 2.0))
    after, (new,) = dit_fast.SGD.forward(theta, g, (buffer,), 1, s)
    assert (float(new), float(after)) == (2.0, 0.8)
    s = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.5, "maximize": 0.0}
    zero = torch.zeros(1, dtype=torch.float64)
    after, (m, v) = dit_fast.AdamW.forward(theta, g, (zero, zero), 0, s)
    assert float(after) == pytest.approx(1 - 0.05 - 0.1) and (float(m), float(v)) == pytest.approx((0.1, 0.01))


# what is left of the miss is told, as nobody can know what it came from
@pytest.mark.filterwarnings("default:the replay misses the parameters:RuntimeWarning")
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_that_are_all_rounding_pass_the_guard(tmp_path, every):
    """An attention's key bias has gradient 0 but for float32's rounding, of which Adam makes steps of the rate's size."""
    case = make_case("transformer")
    model = case.model().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = model.attention.in_proj_bias[4:8].detach().clone()
    with dit_fast.Recorder(tmp_path / "log", model, optimizer, every=every) as recorder:
        for ids in schedule(12, 7)[0]:
            optimizer.zero_grad()
            case.loss(model(case.x[ids]), case.y[ids]).mean().backward()
            with recorder.step(ids):
                optimizer.step()
    assert (model.attention.in_proj_bias[4:8].detach() - start).abs().max() > 1e-4
    trajectory, query = dit_fast.Trajectory.open(tmp_path / "log"), dit_fast.queries.loss(case.x_val, case.y_val)
    problem = dit_fast.Problem(model, case.loss, (case.x, case.y))
    fast = dit_fast.score(trajectory, problem, query)
    slow = dit_fast.reference.score(trajectory, problem, query)
    assert relative_error(fast.scores, slow.scores, slow.scores.abs().amax()) < (1e-10 if every == 1 else 1e-6)
    wrong = dit_fast.Problem(model, case.loss, (case.x, case.y), l2=0.01)
    with pytest.raises((ValueError, dit_fast.LogError), match=r"does not reproduce|the replay misses"):
        dit_fast.score(trajectory, wrong, query)
