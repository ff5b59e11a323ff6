"""The one-launch kernels: their very code run by threads of the CPU against the CPU op, and on a GPU where there is one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from mlp_cases import ACTIVATIONS, SETTINGS, copies, op_case, setting
from test_ops_mlp_retrain import models_of

from dit_fast import mlp, mlp_team, ops


def team_of(case, group=1, size=1, memory=mlp_team.H100_MEMORY):
    return mlp_team.Team(group, int(case[1].offsets.diff().max()), memory, size)


def moved(case, device):
    net, steps, *blocks, scores = case
    # .to() keeps the strides of the first weight's block
    blocks = [[None if x is None else x.to(device) for x in b] for b in blocks]
    return net, mlp.on_device(steps, torch.device(device)), *blocks, scores.to(device)


def assert_same(results, tolerance):
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            error = (ours.cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
            assert error <= tolerance, float(error)


def assert_sweep(case, team=None, tolerance=1e-12, device="cpu", **options):
    net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
    n, K = len(steps.theta), len(scores)
    assert ops.MlpSweep(net, steps, blocks, momenta, scores, **options).run(0, n) is None
    own = moved((case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()), device)
    joins, leaves = torch.full((K,), n, device=device), torch.zeros(K, dtype=torch.int64, device=device)
    engine = mlp_team.TeamSweep(*own, joins, leaves, None, team or team_of(case), **options)
    engine.run()
    assert engine.bad_step() is None
    assert_same(([*own[2], *own[3], own[4]], [*blocks, *momenta, scores]), tolerance)
    return own


def assert_retrained(case, team=None, tolerance=1e-12, device="cpu", l2=0.0):
    # smaller numbers, as the models of random nets run away within a few steps
    net, steps, blocks, momenta, scores = case
    steps = replace(steps, theta=0.3 * steps.theta, coefficients=0.1 * steps.coefficients)
    blocks, momenta = ([None if x is None else x * 0.1 for x in b] for b in (blocks, momenta))
    n, models = len(steps.theta), models_of(len(case[4]))
    expected, expected_momenta = copies(blocks), copies(momenta)
    ops.MlpRetrain(net, steps, models, expected, expected_momenta, l2=l2).run(0, n)
    _, own_steps, own, own_momenta, _ = moved((net, steps, copies(blocks), copies(momenta), scores), device)
    own_models = mlp.on_device(models, torch.device(device))
    engine = mlp_team.TeamRetrain(net, own_steps, own_models, own, own_momenta, team or team_of(case), l2=l2)
    engine.run(0, 1)
    engine.run(1, n)
    assert_same(([*own, *own_momenta], [*expected, *expected_momenta]), tolerance)
    return own


@pytest.mark.parametrize("hessian", mlp.CURVATURES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_sweep_matches_the_cpu_op(device, settings, hessian):
    for l2 in (0.0, 0.1):
        options = {"hessian": hessian, "l2": l2, "device": device}
        assert_sweep(op_case((4, 5, 3), "gelu", "cross_entropy", settings), **options)
        assert_sweep(op_case((4, 2), "gelu", "bce_logits", settings, K=5, bias=False), **options)
        assert_sweep(op_case((3, 4, 6, 4, 1), "leaky_relu", "squared_error", settings, K=1, seed=2), **options)


@pytest.mark.parametrize("l2", [0, 0.2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_retrain_matches_the_cpu_op(device, settings, l2):
    assert_retrained(op_case((4, 5, 3), "gelu", "cross_entropy", settings), l2=l2, device=device)
    assert_retrained(op_case((4, 2), "gelu", "bce_logits", settings, K=5, bias=False), l2=l2, device=device)
    assert_retrained(op_case((3, 4, 6, 4, 1), "leaky_relu", "squared_error", settings, K=1, seed=2), l2=l2, device=device)


def test_random_shapes(device):
    """Batches of 0 and 1, widths of 1, ids that occur twice, groups that the columns do not fill, both dtypes."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        widths = tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(2, 7)))
        loss = str(rng.choice([name for name in mlp.LOSSES if widths[-1] > 1 or name != "cross_entropy"]))
        dtype = torch.float32 if seed % 4 == 3 else torch.float64
        case = op_case(
            widths, str(rng.choice(list(ACTIVATIONS))), loss, list(SETTINGS.values())[seed % 5], K=int(rng.integers(1, 8)),
            n=5, seed=seed, dtype=dtype, bias=bool(rng.integers(2)), sizes=[*rng.integers(0, 7, size=4).tolist(), 1],
        )  # fmt: skip
        team = team_of(case, int(rng.integers(1, 5)))
        tolerance, l2 = 1e-12 if dtype == torch.float64 else 2e-5, float(rng.choice([0, 0.05]))
        hessian = str(rng.choice(mlp.CURVATURES))
        assert_sweep(case, team, tolerance, device, l2=l2, hessian=hessian)
        assert_retrained(case, team, tolerance, device, l2=l2)


@pytest.mark.parametrize("settings", ["plain", "nesterov"])
@pytest.mark.parametrize("size", [2, 7])
def test_any_number_of_threads_gives_the_same_bits(size, settings):
    """A missing sync shows as a wrong number; elements are summed in a fixed order."""
    case = op_case((5, 6, 4, 3), "tanh", "cross_entropy", SETTINGS[settings], K=5, n=3)
    for hessian in mlp.CURVATURES:
        own, alone = (assert_sweep(case, team_of(case, 2, s), l2=0.1, hessian=hessian) for s in (size, 1))
        for ours, theirs in zip([*own[2], *own[3]], [*alone[2], *alone[3]], strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(*(assert_retrained(case, team_of(case, 2, s), l2=0.1) for s in (size, 1)), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_read_where_it_lies(device):
    """Without room for theta and the batch; one byte less and the net does not fit."""
    case = op_case((9, 5, 3), "tanh", "cross_entropy", SETTINGS["momentum"])
    net, steps = case[:2]
    sizes = [1, int(steps.offsets.diff().max())]
    for retrain in (False, True):
        needs = lambda limit, retrain=retrain: ops.team_bytes(  # noqa: E731
            True, retrain, *ops.mlp_specs(net, "exact"), 0.1, True, (*sizes, limit)
        )
        least = needs(0)
        assert least < needs(1 << 20)
        team = mlp_team.Team(*sizes, least)
        if retrain:
            assert_retrained(case, team, device=device, l2=0.1)
        else:
            assert_sweep(case, team, device=device, l2=0.1)
        fits = {"retrain": retrain, "momentum": True, "l2": 0.1}
        assert mlp_team.plan(net, torch.float64, sizes[1], 1, memory=least, **fits) == team
        assert mlp_team.plan(net, torch.float64, sizes[1], 1, memory=least - 1, **fits) is None


def net_of(*widths):
    layers, at = [], 0
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(mlp.MlpLayer(outputs, inputs, at, at + inputs * outputs, "relu"))
        at += (inputs + 1) * outputs
    return mlp.Mlp(tuple(layers), "bce_logits")


def test_which_nets_fit_an_h100():
    fits = lambda net, K=1, B=64, **options: mlp_team.plan(net, torch.float32, B, K, **options)  # noqa: E731
    assert fits(net_of(62, 8, 1)).group == 1
    assert fits(net_of(784, 8, 1)) and fits(net_of(784, 1))
    assert fits(net_of(62, 8, 1), 10_000, retrain=True).group == mlp_team.LARGEST_GROUP
    assert fits(net_of(784, 8, 1), 10_000, retrain=True).group < mlp_team.LARGEST_GROUP
    for net in (net_of(62, 8, 1), net_of(784, 8, 1)):
        # a processor has 228 KiB, of which each block takes one more than it asks for
        assert 2 * (fits(net, 10_000, retrain=True).memory + 1024) <= 228 * 1024
    assert fits(net_of(784, 128, 10)) is None
    assert fits(net_of(784, 8, 1), B=10**7) is None
    assert fits(net_of(2**20, 2**20)) is None
    assert fits(net_of(*[2] * 9)) and fits(net_of(*[2] * 10)) is None


@pytest.mark.parametrize("settings", ["plain", "dampened"])
def test_columns_join_and_leave_on_the_way(device, settings):
    """Against the CPU op, whose columns join with what the blocks hold here from the start."""
    case = op_case((4, 5, 3), "gelu", "cross_entropy", SETTINGS[settings], K=5, n=6)
    net, steps, blocks, momenta, scores = case
    momenta = [torch.zeros_like(x) for x in momenta]
    joins, leaves = torch.tensor([6, 5, 5, 2, 0]), torch.tensor([0, 3, 5, 1, 0])
    left = [x.clone().copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(i))) for i, x in enumerate(blocks)]
    rows = torch.arange(5)
    gradients = steps.theta.new_zeros(10, steps.theta.shape[1])
    for first, values in ((0, blocks), (5, left)):
        for layer, weight, bias in zip(net.layers, values[::2], values[1::2], strict=True):
            gradients[first : first + 5, layer.weight : layer.weight + weight[0].numel()] = weight.flatten(1)
            gradients[first : first + 5, layer.bias : layer.bias + layer.outputs] = bias
    expected, expected_momenta, expected_scores = [torch.zeros_like(x) for x in blocks], copies(momenta), scores.clone()
    visits = mlp.MlpVisits(joins, leaves, rows, rows + 5, gradients)
    assert ops.MlpSweep(net, steps, expected, expected_momenta, expected_scores, visits, l2=0.1).run(0, 6) is None
    for block, own in zip(expected, blocks, strict=True):
        block[4] = own[4]  # never joined
    for group in (1, 3):
        own = moved((net, steps, copies(blocks), copies(momenta), scores.clone()), device)
        own_left = moved((net, steps, left, left, scores), device)[2]
        visits = [x.to(device) for x in (joins, leaves)]
        mlp_team.TeamSweep(*own, *visits, own_left, team_of(case, group), l2=0.1).run()
        assert_same(([*own[2], *own[3], own[4]], [*expected, *expected_momenta, expected_scores]), 1e-12)


def test_names_the_last_step_that_is_not_finite(device):
    case = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["plain"])
    case[1].theta[2, 5] = float("nan")
    own = moved(case, device)
    none = torch.zeros(3, dtype=torch.int64, device=device)
    engine = mlp_team.TeamSweep(*own, none + 4, none, None, team_of(case, 2))
    engine.run()
    assert engine.bad_step() == 2


def test_refuses_what_does_not_fit():
    case = op_case((4, 5, 3), "tanh", "cross_entropy", setting())
    net, steps, blocks, momenta, scores = case
    four, none = torch.full((3,), 4), torch.zeros(3, dtype=torch.int64)
    for joins, leaves, left, team, message in (
        (four.flip(0) + torch.arange(3), none, None, team_of(case), "joins must fall"),
        (four.int(), none, None, team_of(case), "joins must be"),
        (four, none + 1, None, team_of(case), "left must be given"),
        (four, none, blocks[:1], team_of(case), "blocks must hold"),
        (four, none, None, mlp_team.Team(1, 1, 1 << 20), "larger than the team's 1"),
    ):
        with pytest.raises(ValueError, match=message):
            mlp_team.TeamSweep(net, steps, blocks, momenta, scores, joins, leaves, left, team)
    models = mlp.mlp_models([0, 0, 0], [torch.tensor([0])] * 3, 6)
    with pytest.raises(ValueError, match="rise within each sample"):
        models = replace(models, removed=models.removed.flip(0))
        mlp_team.TeamRetrain(net, steps, models, blocks, momenta, team_of(case))
