"""The sweep by torch's GEMMs around compiled pieces against the CPU op and the plain-torch twin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mlp_cases import ACTIVATIONS, SETTINGS, copies, op_case
from test_mlp_team import assert_same, moved
from test_ops_mlp_sweep import visits_of

from dit_fast import mlp, mlp_gemm, ops, ops_torch


def assert_sweep(case, device="cpu", tolerance=1e-12, truth=ops.MlpSweep, visits=None, **options):
    net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
    n = len(steps.theta)
    assert truth(net, steps, blocks, momenta, scores, visits, **options).run(0, n) is None
    own = moved((case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()), device)
    own_visits = None if visits is None else replace(visits, gradients=visits.gradients.to(device))
    engine = mlp_gemm.GemmSweep(*own, own_visits, **options)
    engine.run(1, n)
    engine.run(0, 1)
    assert engine.bad_step() is None
    assert_same(([*own[2], *own[3], own[4]], [*blocks, *momenta, scores]), tolerance)


@pytest.mark.parametrize("hessian", mlp.CURVATURES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_matches_the_cpu_op_and_the_twin(device, settings, hessian):
    for l2 in (0.0, 0.1):
        options = {"hessian": hessian, "l2": l2}
        assert_sweep(op_case((4, 5, 3), "gelu", "cross_entropy", settings), device, **options)
        assert_sweep(op_case((4, 2), "gelu", "bce_logits", settings, K=5, bias=False), device, **options)
        case = op_case((3, 4, 6, 4, 1), "leaky_relu", "squared_error", settings, K=2, seed=2)
        assert_sweep(case, device, 1e-10, truth=ops_torch.MlpSweep, **options)


@pytest.mark.parametrize("settings", ["plain", "decay", "dampened"])
def test_columns_join_and_leave(device, settings):
    for widths in ((4, 5, 3), (3, 4, 6, 2)):
        case = op_case(widths, "gelu", "cross_entropy", SETTINGS[settings], K=6, n=7)
        assert_sweep(case, device, 1e-10, visits=visits_of(case, [7, 7, 5, 4, 1], [0, 6, 2, 0, 0]), l2=0.1)


def test_random_shapes(device):
    rng = np.random.default_rng(1)
    for seed in range(40):
        widths = tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(2, 7)))
        loss = str(rng.choice([name for name in mlp.LOSSES if widths[-1] > 1 or name != "cross_entropy"]))
        dtype = torch.float32 if seed % 4 == 3 else torch.float64
        case = op_case(
            widths, str(rng.choice(list(ACTIVATIONS))), loss, list(SETTINGS.values())[seed % 5], K=int(rng.integers(1, 8)),
            n=5, seed=seed, dtype=dtype, bias=bool(rng.integers(2)), sizes=[*rng.integers(0, 7, size=4).tolist(), 1],
        )  # fmt: skip
        hessian, l2 = str(rng.choice(mlp.CURVATURES)), float(rng.choice([0, 0.05]))
        assert_sweep(case, device, 1e-12 if dtype == torch.float64 else 2e-5, l2=l2, hessian=hessian)


def test_steps_alike_are_replayed(device):
    """The same batch size and settings in many steps, columns that join in between: on a GPU graphs stand for them."""
    same = lambda n, p: SETTINGS["dampened"](1, 1).expand(n, p, 6).contiguous()  # noqa: E731
    case = op_case((4, 5, 3), "tanh", "cross_entropy", same, n=12, sizes=[5] * 12)
    net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
    own = moved((case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()), device)
    visits = visits_of(case, [12, 8, 8], [0, 0, 0])
    own_visits = replace(visits, gradients=visits.gradients.to(device))
    engine, expected = mlp_gemm.GemmSweep(*own, own_visits), ops.MlpSweep(net, steps, blocks, momenta, scores, visits)
    engine.run(0, 12)
    expected.run(0, 12)
    assert_same(([*own[2], *own[3], own[4]], [*blocks, *momenta, scores]), 1e-12)
    assert device == "cpu" or len([g for g in engine.replayed.graphs.values() if g is not None]) == 2


def test_names_the_last_step_that_is_not_finite(device):
    case = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["plain"])
    case[1].theta[2, 5] = float("nan")
    engine = mlp_gemm.GemmSweep(*moved(case, device))
    engine.run(0, 4)
    assert engine.bad_step() == 2
