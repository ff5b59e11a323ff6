"""The warning where steps are too large for the empirical Fisher: its eigenvalues against dense matrices."""

import math

import pytest
import torch
from factor_cases import factor_run, ready_gradients, with_factors

import dit_fast
from dit_fast import fisher

ENDS = (7,)


def eigenvalue(run, t, rate, l2=0.0):
    """Of D^½ F D^½ from one backward pass per sample; rate: name → η."""
    model = run.case.model()
    model.load_state_dict({name: value[t] for name, value in run.params.items()}, strict=False)
    named = dict(model.named_parameters())
    total = 0
    for j, a in zip(run.batches[t].tolist(), run.coefficients[t].tolist(), strict=True):
        loss = run.case.loss(model(run.case.x[[j]]), run.case.y[[j]])[0]
        g = torch.cat([value.flatten() for value in torch.autograd.grad(loss, [named[name] for name in run.params])])
        total = total + a * (torch.outer(g, g) + l2 * torch.eye(len(g), dtype=g.dtype))
    roots = [torch.full((value[0].numel(),), math.sqrt(rate(name)), dtype=torch.float64) for name, value in run.params.items()]
    root = torch.cat(roots)
    return float(torch.linalg.eigvalsh(root[:, None] * total * root)[-1])


@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
def test_the_number_is_the_dense_eigenvalue(net, monkeypatch):
    monkeypatch.setattr(fisher, "SPACING", 2)
    l2 = 0.03 if net == "tokens" else 0.0
    run = factor_run(net, l2=l2)
    lr = [rate / 4 for rate in run.lr]
    # of four steps a quarter is one
    expected = max(eigenvalue(run, t, lambda name, t=t: lr[t], l2) for t in (0, 2, 4, 6))
    query, options = ready_gradients(run, ENDS), {"hessian": "fisher", "check": False}
    found = dit_fast.score(with_factors(run, lr=lr), query=query, **options)
    assert found.meta["fisher_step"] == pytest.approx(expected, rel=1e-10)
    made = dit_fast.score(run.trajectory(lr=lr), run.problem(), query, **options)
    assert 0.95 * expected < made.meta["fisher_step"] <= expected * (1 + 1e-12)
    assert "fisher_step" not in dit_fast.score(with_factors(run), query=query, hessian="none").meta


def test_a_quarter_of_the_steps_must_reach_it(monkeypatch):
    run = factor_run("mlp")
    monkeypatch.setattr(fisher, "SPACING", 1)
    asked = []

    def largest(t):
        asked.append(t)
        return {3: 100.0, 7: 5.0, 9: 7.0}.get(t, 0.0)

    trajectory = with_factors(run)
    held = type("Held", (), {"trajectory": trajectory})
    assert fisher.fisher_step(held, largest, 16) == 7.0
    assert asked == [15, 13, 11, 9, 7, 5, 3, 1]


@pytest.mark.parametrize("micro", [False, True])
def test_groups_micro_batches_and_parameters_without_a_step(micro):
    batches = [[2, 2], *[[n] for n in (3, 5, 1, 4, 2)], [3, 3]]
    run = factor_run("mlp", **({"micro_batches": batches} if micro else {}))
    changes = {
        "optimizer": [dit_fast.SGD(), dit_fast.SGD()],
        "lr": torch.tensor([[rate, rate / 3] for rate in run.lr], dtype=torch.float64),
        "groups": {name: int(name.endswith("bias")) for name in run.params},
        "absent": [["2.weight"]] * 7,
    }
    rate = lambda name: 0.0 if name == "2.weight" else run.lr[6] / (3 if name.endswith("bias") else 1)  # noqa: E731
    found = dit_fast.score(with_factors(run, **changes), query=ready_gradients(run, ENDS), hessian="fisher", check=False)
    expected = eigenvalue(run, 6, rate)
    assert 0.95 * expected < found.meta["fisher_step"] <= expected * (1 + 1e-12)


@pytest.mark.parametrize(
    ("rule", "grows_from"),
    [
        (dit_fast.SGD(), 2.0),
        (dit_fast.SGD(momentum=0.9), 3.8),
        (dit_fast.SGD(momentum=0.9, dampening=0.5), 7.6),
        (dit_fast.SGD(momentum=0.9, nesterov=True), 3.8 / 2.8),
    ],
)
def test_two_is_where_the_rule_itself_begins_to_grow(rule, grows_from):
    """A quadratic ½ λ θ² followed for long, just below and just above."""
    settings = {name: float(getattr(rule, name, 0.1)) for name in rule.setting_names}
    held = type("Held", (), {})()
    held.shapes = {"w": torch.Size([])}
    held.trajectory = type("T", (), {"groups": {"w": 0}})()
    held.trajectory.settings, held.trajectory.absent = (lambda t: [settings]), (lambda t: ())
    assert fisher.rates(held, 0)["w"] * grows_from / 0.1 == pytest.approx(2.0)
    for factor, grows in ((0.99, False), (1.01, True)):
        theta, state = torch.ones((), dtype=torch.float64), (torch.zeros((), dtype=torch.float64),)
        for count in range(3000):
            theta, state = rule.forward(theta, factor * grows_from / 0.1 * theta, state, count, settings)
        assert (abs(float(theta)) > 1) == grows


def test_the_warning_names_what_to_take_instead():
    run = factor_run("mlp")
    query = ready_gradients(run, ENDS)
    rate = 1.5 / eigenvalue(run, 6, lambda name: 1.0)
    for steps, warns in ((rate, True), (rate / 1.6, False)):
        changes = {"lr": [steps] * 7}
        calls = [
            lambda changes=changes: dit_fast.score(with_factors(run, **changes), query=query, hessian="fisher", check=False),
            lambda changes=changes: dit_fast.score(
                run.trajectory(**changes), run.problem(), query, hessian="fisher", check=False
            ),
            lambda changes=changes: with_factors(run, **changes).index(check=False),
        ]
        for call in calls:
            if warns:
                with pytest.warns(RuntimeWarning, match=r"eigenvalue is 1\.\d+, above 1 .*hessian='ggn' or 'exact'") as caught:
                    found = call()
                assert [warning.filename for warning in caught] == [__file__]
            else:
                found = call()
                assert found.meta["fisher_step"] == pytest.approx(1.5 / 1.6, rel=0.05)


def test_clipped_gradients_have_no_such_number():
    run = factor_run("mlp")
    held = with_factors(run, clip_norm=1.0)
    assert dit_fast.score(held, query=ready_gradients(run, ENDS), hessian="fisher", check=False).meta["fisher_step"] is None
