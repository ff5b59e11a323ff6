"""mlp_retrain and mlp_loss_changes against their plain-torch twins; shapes, threads, both products, what is refused."""

import pytest
import torch
from mlp_cases import SETTINGS, copies, op_case, setting

from dit_fast import mlp, ops, ops_torch

REMOVED = [torch.tensor([0]), torch.tensor([5, 1, 5]), torch.tensor([2]), torch.tensor([], dtype=torch.int64)]


def models_of(K, N=6):
    removed = [REMOVED[j % 4] for j in range(K)]
    return mlp.mlp_models([max(0, j - 2) // 2 for j in range(K)], removed, N)


def assert_retrained(case, tolerance=1e-11, l2=0.0):
    results = []
    net, steps, blocks, momenta, scores = case
    for op in (ops.MlpRetrain, ops_torch.MlpRetrain):
        own, own_momenta = copies(blocks), copies(momenta)
        engine = op(net, steps, models_of(len(scores)), own, own_momenta, l2=l2)
        engine.run(0, 1)
        engine.run(1, len(steps.theta))
        results.append([*own, *own_momenta])
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
            assert error < tolerance, float(error)


@pytest.mark.parametrize("l2", [0, 0.2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_matches_its_twin(settings, l2):
    assert_retrained(op_case((4, 5, 3), "gelu", "cross_entropy", settings), l2=l2)
    assert_retrained(op_case((4, 2), "gelu", "bce_logits", settings, K=5, bias=False), l2=l2)
    assert_retrained(op_case((3, 4, 4, 1), "leaky_relu", "squared_error", settings, K=1, seed=2), l2=l2)
    assert_retrained(op_case((3, 8, 1), "tanh", "bce_logits", settings, K=11, seed=3), l2=l2)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_by_inner_products_of_samples(settings):
    """With gram the first block holds A, d = A x."""
    for widths, K, dtype in (((4, 5, 3), 4, torch.float64), ((30, 1), 5, torch.float64), ((21, 8, 1), 11, torch.float32)):
        loss = "cross_entropy" if widths[-1] > 1 else "bce_logits"
        net, steps, blocks, momenta, _ = op_case(widths, "gelu", loss, settings, K=K, n=6, dtype=dtype)
        results = []
        for gram in (None, steps.x @ steps.x.T):
            own, own_momenta = copies(blocks), copies(momenta)
            for k, held in enumerate((own, own_momenta)):
                g = torch.Generator().manual_seed(k)
                held[0] = mlp.mlp_block(K, (widths[1], len(steps.x)), dtype, True)
                held[0].copy_(0.1 * torch.randn(held[0].shape, generator=g, dtype=torch.float64))
                if gram is None:
                    held[0] = mlp.mlp_block(K, blocks[0].shape[1:], dtype, True).copy_(held[0] @ steps.x)
            engine = ops.MlpRetrain(net, steps, models_of(K), own, own_momenta, gram=gram)
            engine.run(0, 2)
            engine.run(2, 6)
            if gram is not None:
                own[0], own_momenta[0] = own[0] @ steps.x, own_momenta[0] @ steps.x
            results.append([*own, *own_momenta])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).abs().max() <= (1e-11 if dtype == torch.float64 else 1e-4) * theirs.abs().max()


def test_a_decay_that_leaves_nothing_of_the_difference():
    assert_retrained(op_case((4, 5, 3), "silu", "cross_entropy", setting(weight_decay=10.0)), l2=0.1)


def test_in_float32():
    assert_retrained(op_case((4, 5, 3), "silu", "cross_entropy", SETTINGS["nesterov"], dtype=torch.float32), 1e-5, l2=0.1)


def test_steps_without_samples():
    assert_retrained(op_case((4, 5, 3), "silu", "cross_entropy", SETTINGS["dampened"], sizes=[2, 0, 3, 0]), l2=0.1)


@pytest.mark.parametrize("blas", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_groups_and_both_products(threads, blas):
    """Layers that a GEMM per model takes, models that travel in several groups, work enough for a parallel region."""
    case = op_case((64, 64, 17, 10), "tanh", "cross_entropy", SETTINGS["momentum"], K=23, n=3, sizes=[200, 150, 250])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ops.use_blas(blas)
    try:
        assert_retrained(case, l2=0.1)
    finally:
        torch.set_num_threads(before)
        ops.use_blas(True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", mlp.LOSSES)
def test_loss_changes_match_their_twin(loss, dtype):
    net, steps, blocks, _, _ = op_case((4, 5, 3), "gelu", loss, SETTINGS["plain"], K=5, dtype=dtype)
    weights = torch.rand(len(steps.x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, targets, weights = steps.x.repeat(20, 1), torch.cat([steps.targets] * 20), weights.repeat(20)
    ours, theirs = (torch.ones(5, dtype=torch.float64) for _ in range(2))
    ops.mlp_loss_changes(net, steps.theta[0], x, targets, weights, blocks, ours)
    ops_torch.mlp_loss_changes(net, steps.theta[0], x, targets, weights, blocks, theirs)
    assert (theirs - 1).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-12 if dtype == torch.float64 else 1e-4, atol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_loss_changes_of_a_sample_that_is_no_number_are_none(activation):
    net, steps, blocks, _, _ = op_case((4, 5, 3), activation, "cross_entropy", SETTINGS["plain"])
    steps.x[2, 1] = float("nan")
    changes = torch.zeros(3, dtype=torch.float64)
    ops.mlp_loss_changes(net, steps.theta[0], steps.x, steps.targets, torch.ones(9, dtype=torch.float64), blocks, changes)
    assert changes.isnan().all()


def test_loss_changes_far_out_are_finite():
    net = mlp.Mlp((mlp.MlpLayer(1, 1, 0, None),), "bce_logits")
    one = torch.ones(1, 1, dtype=torch.float64)
    changes = torch.zeros(2, dtype=torch.float64)
    blocks = [mlp.mlp_block(2, (1, 1), one.dtype, True).copy_(torch.tensor([999.0, -1001.0]).view(2, 1, 1)), None]
    ops.mlp_loss_changes(net, one[0], one, one, one[0], blocks, changes)
    base = float(torch.nn.functional.softplus(-one))
    torch.testing.assert_close(changes, torch.tensor([0.0, 1000.0], dtype=torch.float64) - base)


def broken(change):
    net, steps, blocks, momenta, _ = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["momentum"])
    models = models_of(3)
    arguments = {"blocks": blocks, "momenta": momenta, **steps.__dict__, **models.__dict__, "offsets": steps.offsets}
    arguments["of_samples"] = models.offsets
    arguments |= change(arguments)
    models = mlp.MlpModels(arguments["joins"], arguments["of_samples"], arguments["removed"])
    steps = mlp.MlpSteps(**{name: arguments[name] for name in steps.__dict__})
    return ops.MlpRetrain(net, steps, models, arguments["blocks"], arguments["momenta"], gram=arguments.get("gram"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"gram": a["x"]}, r"blocks\[0\] must have shape"),
        (lambda a: {"x": a["x"].float()}, "x must be float64"),
        (lambda a: {"ids": a["ids"] + 3}, "ids must lie in 0..5"),
        (lambda a: {"joins": torch.tensor([2, 1, 0])}, "joins must rise"),
        (lambda a: {"joins": a["joins"].int()}, "joins must be int64"),
        (lambda a: {"removed": a["removed"] + 1}, "removed must lie in 0..2"),
        (lambda a: {"of_samples": a["of_samples"].flip(0)}, "models.offsets must rise"),
        (lambda a: {"momenta": None}, "momenta must be given"),
        (lambda a: {"blocks": [a["blocks"][0].contiguous(), *a["blocks"][1:]]}, "as mlp_block makes it"),
        (lambda a: {"blocks": [a["blocks"][0][:2], *a["blocks"][1:]]}, "must have shape"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        broken(change)


def test_refuses_steps_out_of_range():
    with pytest.raises(ValueError, match="out of range"):
        broken(lambda a: {}).run(0, 5)
