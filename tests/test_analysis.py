"""Numbers a pencil can check."""

import math

import numpy as np
import pytest
import torch

from dit_fast import analysis

RANKING = [0.1, 0.9, 0.5, 0.7, 0.3]  # order of inspection: 1, 3, 2, 4, 0
CORRUPTED = [False, True, False, False, True]


def test_suspicion_puts_the_most_harmful_first():
    assert analysis.suspicion([2.0, -3.0, 0.0]).tolist() == [-2.0, 3.0, 0.0]
    assert analysis.suspicion(torch.tensor([1.0, -1.0])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("inspected", "found"), [(0.0, 0.0), (0.2, 0.5), (0.6, 0.5), (0.8, 1.0), (1.0, 1.0)])
def test_found_fraction(inspected, found):
    assert analysis.found_fraction(RANKING, CORRUPTED, inspected) == found


def test_equal_rankings_find_what_random_order_finds_on_average():
    assert analysis.found_fraction([1, 1, 1, 1], [True, False, False, True], 0.25) == 0.25
    assert analysis.found_fraction([1, 1, 1, 1], [False, False, False, True], 0.75) == 0.75


@pytest.mark.parametrize(
    ("ranking", "corrupted", "match"),
    [
        ([1, 2], [True], r"\[N\]"),
        ([[1, 2]], [[True, False]], r"\[N\]"),
        ([1, 2], [False, False], "nothing to find"),
    ],
)
def test_found_fraction_refuses(ranking, corrupted, match):
    with pytest.raises(ValueError, match=match):
        analysis.found_fraction(ranking, corrupted, 0.5)


def test_detection_curve():
    inspected, found = analysis.detection_curve(RANKING, CORRUPTED)
    np.testing.assert_allclose(inspected, [0, 0.2, 0.4, 0.6, 0.8, 1])
    assert found.tolist() == [0, 0.5, 0.5, 0.5, 1, 1]
    for share, value in zip(inspected, found, strict=True):
        assert analysis.found_fraction(RANKING, CORRUPTED, share) == value


def test_detection_curve_without_corrupted_samples_stays_at_zero():
    assert analysis.detection_curve([1, 2], [False, False])[1].tolist() == [0, 0, 0]


def test_agreement():
    # means 2 and 2; Σ(a−2)(b−2) = −1·−2 + 0·−1 + 1·3 = 5; √(2·14) → 5/√28. The order is the same: Spearman 1.
    result = analysis.agreement([1, 2, 3], [0, 1, 5])
    assert result["pearson"] == pytest.approx(5 / math.sqrt(28), abs=1e-15)
    assert result["spearman"] == pytest.approx(1.0, abs=1e-15)
    # ranks 1 2 3 and 2 1 3: 1 − 6·2/(3·8) = 1/2
    assert analysis.agreement([1, 2, 3], [1, 0, 9])["spearman"] == pytest.approx(0.5, abs=1e-15)
    expected = {"pearson": -1.0, "spearman": -1.0, "kendall": -1.0, "top": 0.0}
    assert analysis.agreement([1, 2], [2, 1]) == pytest.approx(expected)


def test_agreement_of_a_constant_is_not_a_number():
    for pair in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])):
        assert all(math.isnan(value) for value in analysis.agreement(*pair).values())


@pytest.mark.parametrize("pair", [([1, 2], [1, 2, 3]), ([1], [1]), ([[1, 2]], [[1, 2]])])
def test_agreement_refuses(pair):
    with pytest.raises(ValueError, match=r"\[N\]"):
        analysis.agreement(*pair)
