"""Trajectory.from_arrays, its refusals, and windows."""

import numpy as np
import pytest
import torch

import dit_fast as dit
from dit_fast.trajectory import Window

STEPS = 6


def arrays(**changes):
    """A run of six steps of two samples each; `changes` replaces arguments."""
    given = {
        "params": {
            "w": np.arange((STEPS + 1) * 4, dtype=np.float64).reshape(STEPS + 1, 2, 2),
            "b": np.ones((STEPS + 1, 3), np.float32),
        },
        "batch_ids": np.arange(STEPS * 2).reshape(STEPS, 2),
        "lr": 0.1,
    }
    return given | changes


def make(**changes):
    return dit.Trajectory.from_arrays(**arrays(**changes))


PLAIN = {"momentum": 0.0, "dampening": 0.0, "nesterov": 0.0, "weight_decay": 0.0, "maximize": 0.0}


def test_from_arrays_gives_back_what_it_was_given():
    params = arrays()["params"]
    batches = [torch.tensor([3, 3, 1]), np.array([0], np.int32), [5, 4], (2, 0), torch.tensor([1, 2, 3, 4]), [0]]
    weights = [[0.5, 0.25, 0.1], [1.0], [0.1, 0.2], np.array([1.0, 2.0]), torch.full((4,), 0.5), [3]]
    rates = np.arange(12.0).reshape(6, 2) / 7
    run = make(
        batch_ids=batches,
        coefficients=weights,
        lr=rates,
        optimizer=[dit.SGD(), dit.SGD(weight_decay=0.3)],
        groups={"w": 1, "b": 0},
        micro_batches=[[2, 1], [1], [1, 1], [2], [4], [1]],
        marks={"one": 2, "two": 6},
        num_samples=9,
    )
    assert (run.num_steps, run.num_samples, run.path, run.marks) == (6, 9, None, {"one": 2, "two": 6})
    assert run.parameters == {"w": ((2, 2), torch.float64), "b": ((3,), torch.float32)}
    assert (run.training_flags, run.constants, run.frozen_digests) == (None, None, None)
    for t in range(STEPS):
        assert run.batch_ids(t).dtype == torch.int64 and run.batch_ids(t).tolist() == [int(i) for i in batches[t]]
        assert run.coefficients(t).dtype == torch.float64 and run.coefficients(t).tolist() == [float(a) for a in weights[t]]
        assert run.settings(t) == (
            PLAIN | {"lr": rates[t, 0]},
            PLAIN | {"lr": rates[t, 1], "weight_decay": 0.3},
        )
    assert run.micro_batches(0) == [slice(0, 2), slice(2, 3)] and run.micro_batches(3) == [slice(0, 2)]
    for t in range(STEPS + 1):
        for name, value in run.params(t).items():
            assert torch.equal(value, torch.from_numpy(params[name][t]))
    run.verify()
    assert "6 steps" in repr(run) and "7 parameters" in repr(run) and "9 samples" in repr(run)


def test_defaults_are_the_mean_and_the_largest_id():
    run = make(lr=[0.1] * STEPS)
    assert run.coefficients(0).tolist() == [0.5, 0.5]
    assert run.num_samples == 12
    assert run.settings(5)[0]["lr"] == 0.1  # not the float32 nearest to 0.1
    assert run.groups == {"w": 0, "b": 0}


def test_arrays_are_copied():
    given = arrays()
    run = dit.Trajectory.from_arrays(**given)
    given["params"]["w"][:] = -1
    given["batch_ids"][:] = 0
    assert run.params(6)["w"].tolist() == [[24, 25], [26, 27]]
    assert run.batch_ids(5).tolist() == [10, 11]


def test_digest_tells_runs_apart():
    other_params = arrays()["params"]
    other_params["w"][3, 0, 0] += 1e-12
    different = [
        make(),
        make(lr=0.2),
        make(params=other_params),
        make(batch_ids=np.arange(12).reshape(6, 2)[::-1].copy()),
        make(coefficients=np.ones((6, 2))),
        make(marks=[3]),
        make(micro_batches=[[1, 1]] * 6),
        make(num_samples=13),
        make(optimizer=dit.SGD(weight_decay=0.1)),
    ]
    assert len({run.digest for run in different}) == len(different)
    assert make().digest == make().digest


def bad_params(step, value):
    params = arrays()["params"]
    params["w"][step, 1, 1] = value
    return params


REFUSED = {
    "no params": ({"params": {}}, TypeError, "non-empty dict"),
    "wrong T": ({"batch_ids": np.zeros((5, 2), int)}, ValueError, r"batch_ids must hold one array per step: 6 .*got 5"),
    "ragged rows": (
        {"params": {"w": np.zeros((7, 2)), "b": np.zeros((6, 2))}},
        ValueError,
        r"same T\+1 rows, got \{'w': 7, 'b': 6\}",
    ),
    "integer params": ({"params": {"w": np.zeros((7, 2), int)}}, TypeError, r"params\['w'\] must be float32 or float64"),
    "half params": ({"params": {"w": torch.zeros(7, 2, dtype=torch.bfloat16)}}, TypeError, "bfloat16"),
    "no rows": ({"params": {"w": np.float64(1)}}, ValueError, r"must be \[T\+1"),
    "NaN": ({"params": bad_params(4, np.nan)}, ValueError, r"params\['w'\] holds NaN or infinity before step 4"),
    "infinity": ({"params": bad_params(6, -np.inf)}, ValueError, r"params\['w'\] holds NaN or infinity before step 6"),
    "float ids": ({"batch_ids": np.zeros((6, 2))}, TypeError, r"batch_ids\[0\] must be integers"),
    "bool ids": ({"batch_ids": np.zeros((6, 2), bool)}, TypeError, r"batch_ids\[0\] must be integers"),
    "negative ids": ({"batch_ids": np.array([[0, 1]] * 5 + [[2, -3]])}, ValueError, r"batch_ids\[5\].*-3"),
    "matrix of ids": ({"batch_ids": np.zeros((6, 2, 2), int)}, ValueError, r"batch_ids\[0\] must be one-dimensional"),
    "empty batch": ({"batch_ids": [[0]] * 5 + [[]]}, ValueError, r"batch_ids\[5\] is empty"),
    "id outside": ({"num_samples": 11}, ValueError, r"batch_ids\[5\] holds id 11, outside num_samples=11"),
    "short coefficients": ({"coefficients": np.ones((6, 3))}, ValueError, r"coefficients\[0\] has shape \[3\] for 2 ids"),
    "few coefficients": ({"coefficients": np.ones((5, 2))}, ValueError, "coefficients must hold one array per step"),
    "NaN coefficients": ({"coefficients": np.full((6, 2), np.nan)}, ValueError, r"coefficients\[0\] holds NaN"),
    "short lr": ({"lr": [0.1] * 5}, ValueError, r"lr must be a number, \[T\] or \[T, groups\] with T=6, groups=1"),
    "groups of lr": ({"lr": np.ones((6, 3))}, ValueError, r"lr must be .*\[6, 3\]"),
    "NaN lr": ({"lr": float("nan")}, ValueError, "lr holds NaN"),
    "unknown optimizer": ({"optimizer": "sgd"}, TypeError, r"one of dit_fast.SGD.*'sgd'"),
    "torch optimizer": ({"optimizer": torch.optim.SGD}, TypeError, "one of dit_fast.SGD"),
    "rules and groups": ({"optimizer": [dit.SGD()] * 2}, ValueError, "2 rules for 1 parameter groups"),
    "names of groups": ({"groups": {"w": 0}}, ValueError, r"groups and params.*\['b'\]"),
    "negative group": ({"groups": {"w": -1, "b": 0}}, ValueError, "count from 0"),
    "mark outside": ({"marks": {"end": 7}}, ValueError, "mark 'end' at step 7 is outside the run, which has 6 steps"),
    "mark no integer": ({"marks": [1.5]}, TypeError, "must be integers, got 1.5"),
    "micro sizes": ({"micro_batches": [[1, 1]] * 5 + [[3]]}, ValueError, r"micro_batches\[5\].*sum to 2, got \[3\]"),
    "empty micro": ({"micro_batches": [[2, 0]] * 6}, ValueError, r"micro_batches\[0\] must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_from_arrays_refuses(case):
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_steps_outside_the_run_are_refused():
    run = make()
    for call in (run.batch_ids, run.coefficients, run.settings, run.micro_batches):
        for step in (-1, 6):
            with pytest.raises(ValueError, match=f"step {step} is outside the run, which has 6 steps"):
                call(step)
    with pytest.raises(ValueError, match="step 7 is outside"):
        run.params(7)
    with pytest.raises(TypeError, match="must be integers"):
        run.params(1.0)


WINDOWS = {
    "whole": (None, [Window("whole run", 0, 6)]),
    "pair": ((1, 4), [Window("1-4", 1, 4)]),
    "list as pair": ([0, 6], [Window("0-6", 0, 6)]),
    "array": (np.array([[0, 2], [2, 6]]), [Window("0-2", 0, 2), Window("2-6", 2, 6)]),
    "tensor": (torch.tensor([2, 3]), [Window("2-3", 2, 3)]),
    "pairs": ([(0, 2), (1, 6)], [Window("0-2", 0, 2), Window("1-6", 1, 6)]),
    "named": ({"early": (0, 1), "late": (5, 6)}, [Window("early", 0, 1), Window("late", 5, 6)]),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case):
    spec, expected = WINDOWS[case]
    assert make().windows(spec) == expected


def test_epochs_are_what_lies_between_marks():
    both = [Window("first", 0, 2), Window("second", 2, 5)]
    assert make(marks={"second": 5, "start": 0, "first": 2, "again": 2}).windows("epochs") == [
        *both,
        Window("after second", 5, 6),
    ]
    assert make(marks={"first": 2, "second": 5, "end": 6}).windows("epochs") == [*both, Window("end", 5, 6)]
    assert make(marks=[3]).windows("epochs") == [Window("step 3", 0, 3), Window("after step 3", 3, 6)]


BAD_WINDOWS = {
    "reversed": ((4, 2), ValueError, r"window \(4, 2\) is empty or reversed.*6"),
    "empty": ({"a": (2, 2)}, ValueError, r"window 'a' \(2, 2\) is empty or reversed.*6"),
    "negative": ((-2, 3), ValueError, r"window \(-2, 3\) is outside the run, which has 6 steps"),
    "outside": ([(0, 1), (0, 7)], ValueError, r"window \(0, 7\) is outside the run, which has 6 steps"),
    "float": ((0, 2.0), TypeError, "must be integers, got 2.0"),
    "bool": ((False, True), TypeError, "must be integers, got False"),
    "triple": ([(0, 1, 2)], TypeError, "must be a pair"),
    "number": (3, TypeError, "windows must be None"),
    "nothing": ([], ValueError, "windows is empty"),
    "word": ("epoch", ValueError, 'the only word is "epochs"'),
    "no marks": ("epochs", ValueError, r"call recorder.mark"),
}


@pytest.mark.parametrize("case", BAD_WINDOWS)
def test_windows_refuses(case):
    spec, error, message = BAD_WINDOWS[case]
    with pytest.raises(error, match=message):
        make().windows(spec)


def test_a_run_without_steps_has_no_windows():
    run = dit.Trajectory.from_arrays({"w": np.ones((1, 2))}, [], 0.1)
    assert run.num_steps == 0 and run.params(0)["w"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no steps"):
        run.windows()


def test_the_name_of_a_mark_is_answered_with_its_window():
    with pytest.raises(ValueError, match=r"'first' is windows=\(0, 2\)"):
        make(marks={"first": 2, "second": 5}).windows("first")
