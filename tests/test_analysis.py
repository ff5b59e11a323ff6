"""Numbers a pencil can check."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from dit_fast import Influence, analysis, correlation, datamodeling
from dit_fast.trajectory import Window

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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_agreement_refuses_what_is_no_number_by_name(bad):
    with pytest.raises(ValueError, match="truth: NaN or infinity for 1 sample, sample 1 first"):
        analysis.agreement([1, 2, 3], [1, bad, 3])


def test_agreement_of_ties_by_hand():
    # ranks 1½ 1½ 3 4 against 1 2 3½ 3½: centred −1 −1 ½ 3⁄2 and −3⁄2 −½ 1 1: (3⁄2 + ½ + ½ + 3⁄2)/√(4½ · 4½)
    a, b = [5.0, 5.0, 7.0, 9.0], [0.0, 1.0, 4.0, 4.0]
    result = analysis.agreement(a, b)
    assert result["spearman"] == pytest.approx(4 / 4.5)
    # 4 of 6 pairs concordant, one tied in a, one in b: 4/√(5·5)
    assert result["kendall"] == pytest.approx(4 / 5)
    # a tenth of 4 rounded up is one sample: 3 of a; of b the first of the equal, 2
    assert result["top"] == 0.0
    assert analysis.agreement(a, [0.0, 1.0, 4.0, -5.0])["top"] == 1.0


def test_correlations_of_tiny_scores_are_those_of_large_ones():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 5.0])
    assert analysis.agreement(a * 1e-200, b * 1e-180) == pytest.approx(analysis.agreement(a, b))


LABELS = ["early", "early", "early", "late", "late", "stable", "fluctuating"]


def test_agreement_by_pattern():
    found = analysis.agreement_by_pattern([1, 2, 3, 1, 2, 4, 6], [1, 2, 3, 2, 1, 4, 4], np.array(LABELS))
    assert list(found) == ["all", *analysis.PATTERNS]
    assert [found[name]["samples"] for name in found] == [7, 3, 2, 1, 1, 0]
    assert found["early"]["pearson"] == pytest.approx(1) and found["late"]["kendall"] == pytest.approx(-1)
    assert math.isnan(found["stable"]["spearman"]) and math.isnan(found["negligible"]["top"])
    assert found["all"]["pearson"] == analysis.agreement([1, 2, 3, 1, 2, 4, 6], [1, 2, 3, 2, 1, 4, 4])["pearson"]
    with pytest.raises(ValueError, match=r"patterns of \(7,\) samples"):
        analysis.agreement_by_pattern([1, 2], [1, 2], np.array(LABELS))


def influence(scores, windows=None, ids=None, groups=None, queries=("loss",)):
    scores = torch.from_numpy(np.array(scores, dtype=float))
    scores = scores if scores.ndim == 3 else scores[:, None]
    spans = windows or [(10 * i, 10 * i + 10) for i in range(len(scores))]
    ids = torch.arange(scores.shape[2]) if ids is None else torch.tensor(ids)
    return Influence(scores, [Window(f"{a}-{b}", a, b) for a, b in spans], list(queries), ids, groups=groups)


def test_compare_pairs_windows_by_steps_and_samples_by_id():
    ours = influence([[1, 2, 3, 4], [4, 3, 2, 1], [0, 1, 0, 1]], ids=[7, 3, 5, 9])
    truth = influence([[3, 1, 2], [2, 4, 3]], windows=[(10, 20), (0, 10)], ids=[9, 7, 3])  # 7, 3, 9 are shared
    rows = analysis.compare(ours, truth)
    assert [(row["window"], row["pattern"], row["samples"]) for row in rows] == [("0-10", "all", 3), ("10-20", "all", 3)]
    expected = [analysis.agreement([4, 1, 2], [2, 4, 3]), analysis.agreement([1, 4, 3], [3, 1, 2])]
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    by_pattern = analysis.compare(ours, truth, patterns=analysis.patterns(ours))
    assert [row["pattern"] for row in by_pattern[:2]] == ["all", "early"] and len(by_pattern) == 2 * 6
    assert sum(row["samples"] for row in by_pattern if row["window"] == "0-10") == 2 * 3


def test_compare_refuses():
    ours = influence([[1, 2, 3]])
    with pytest.raises(ValueError, match="0 windows and 3 samples in common"):
        analysis.compare(ours, influence([[1, 2, 3]], windows=[(0, 9)]))
    with pytest.raises(ValueError, match="groups are for"):
        analysis.compare(ours, influence([[1, 2, 3]], groups=[[0], [1], [2]]))


CURVES = [[1.0, 0.0, -1.0], [2.0, 0.0, 3.0]]


def test_curves_and_their_sum():
    result = analysis.curves(influence(CURVES, windows=[(0, 10), (10, 40)], ids=[4, 2, 9]))
    assert result.values.tolist() == CURVES and result.of(9).tolist() == [-1, 3]
    assert result.midpoints.tolist() == result.positions.tolist() == [5, 25] and result.lengths.tolist() == [10, 30]
    assert "3 curves of loss over 2 windows of steps [0, 40)" in repr(result)
    total = analysis.curves(influence(CURVES, windows=[(0, 10), (10, 40)]), cumulative=True)
    assert total.values.tolist() == [[1, 0, -1], [3, 0, 2]] and total.positions.tolist() == [10, 40]
    assert analysis.curves(np.array(CURVES)).midpoints.tolist() == [0.5, 1.5]
    assert analysis.curves(CURVES, windows=[(3, 5), (5, 9)]).midpoints.tolist() == [4, 7]
    with pytest.raises(ValueError, match="sample 5 has no curve"):
        result.of(5)


def test_curves_take_the_query_asked_for():
    both = influence([[[1, 2], [3, 4]]], queries=("loss", "logit"))
    assert analysis.curves(both, "logit").values.tolist() == [[3, 4]]
    assert analysis.curves(both, 0).values.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([(0, 10), (0, 20)], r"'0-20' \[0, 20\) overlaps after '0-10'.*analysis.stages"),
        ([(0, 10), (11, 20)], r"'11-20' \[11, 20\) leaves a gap after '0-10'"),
        ([(10, 20), (0, 10)], "'0-10' .* overlaps after"),
    ],
)
def test_curves_refuse_windows_that_do_not_follow_one_another(windows, message):
    with pytest.raises(ValueError, match=message):
        analysis.curves(influence(CURVES, windows=windows))
    with pytest.raises(ValueError, match="windows"):
        analysis.patterns(CURVES, windows=windows)


@pytest.mark.parametrize(
    ("scores", "windows", "message"),
    [
        (CURVES, [(0, 1)], "1 windows for scores of 2"),
        (CURVES, [(0, 1), (1, 1)], "empty or reversed"),
        ([[CURVES]], None, r"array \[W, N\]"),
        (influence(CURVES), [(0, 1)], "has its own windows"),
    ],
)
def test_curves_refuse(scores, windows, message):
    with pytest.raises(ValueError, match=message):
        analysis.curves(scores, windows=windows)


def test_stages_are_the_longest_chain():
    spans = [(0, 30), (20, 30), (0, 10), (5, 15), (10, 20), (0, 20)]
    result = analysis.stages(influence(np.arange(6.0)[:, None], windows=spans))
    assert [window.name for window in result.windows] == ["0-10", "10-20", "20-30"]
    assert result.scores.flatten().tolist() == [2, 4, 1]
    plain = influence(CURVES)
    assert analysis.stages(plain) is plain
    longer = analysis.stages(influence(np.zeros((2, 1)), windows=[(0, 4), (2, 9)]))
    assert [window.name for window in longer.windows] == ["2-9"]
    first = analysis.stages(influence(np.zeros((2, 1)), windows=[(6, 10), (0, 4)]))
    assert [window.name for window in first.windows] == ["0-4"]


# six windows: thirds are two each
EARLY, LATE = [4, 3, 1, 1, 1, 0], [0, -1, 1, -1, 3, -4]
STABLE, FLIPPING, SPIKY = [1, 2, 1, 1, 2, 1], [1, -1, 1, -1, 1, -1], [0.5, 0, 5, 0.1, 0, 0.5]
NEVER, TINY = [0] * 6, [0, 0.01, 0, 0, 0.01, 0]
SIX = np.array([EARLY, LATE, STABLE, FLIPPING, SPIKY, NEVER, TINY], dtype=float).T
EXPECTED = ["early", "late", "stable", "fluctuating", "fluctuating", "negligible", "negligible"]


def test_patterns():
    found = analysis.patterns(SIX)
    assert found.labels.tolist() == EXPECTED
    assert found.magnitude.tolist() == pytest.approx([10, 10, 8, 6, 6.1, 0, 0.02])
    assert found.first_third[:3].tolist() == pytest.approx([0.7, 0.1, 3 / 8])
    assert found.last_third[:3].tolist() == pytest.approx([0.1, 0.7, 3 / 8])
    assert found.sign_changes.tolist() == [0, 0.8, 0, 1, 0, 0, 0]
    # STABLE: mean 8/6, mean square 12/6
    assert found.variation[2] == pytest.approx(math.sqrt(2 - (8 / 6) ** 2) / (8 / 6)) and found.variation[3] == 0
    assert found.counts == {"early": 1, "late": 1, "stable": 1, "fluctuating": 2, "negligible": 2}
    assert found.shares["fluctuating"] == 2 / 7 and sum(found.shares.values()) == pytest.approx(1)
    assert found.of("fluctuating").tolist() == [4, 3] and found.examples(1)["negligible"] == [6]
    assert found.mean_curves()["early"].tolist() == [0.4, 0.3, 0.1, 0.1, 0.1, 0]
    lines = repr(found).splitlines()
    assert lines[0] == "Patterns of 7 samples over 6 windows of query" and len(lines) == 6
    assert lines[4].split() == ["fluctuating", "28.6%", "2", "such", "as", "4,", "3"]
    with pytest.raises(ValueError, match="'steady' is not one of early, late"):
        found.of("steady")


@pytest.mark.parametrize("scale", [-1.0, 1e-160, 1e150])
def test_patterns_do_not_depend_on_the_unit(scale):
    assert analysis.patterns(scale * SIX).labels.tolist() == EXPECTED


def test_patterns_do_not_depend_on_the_order_of_samples():
    order = np.random.default_rng(0).permutation(7)
    assert analysis.patterns(SIX[:, order]).labels.tolist() == np.array(EXPECTED)[order].tolist()


def test_patterns_count_steps_and_not_windows():
    values = np.array([[3.0], [3.0], [3.0]])
    assert analysis.patterns(values, windows=[(0, 10), (10, 20), (20, 30)]).labels.tolist() == ["stable"]
    # two of three windows lie in the first third: 6/9
    assert analysis.patterns(values, windows=[(0, 10), (10, 20), (20, 90)]).labels.tolist() == ["early"]
    # a window across the border counts by its steps: the first third is [0, 20), half of the second window
    found = analysis.patterns(values, windows=[(0, 10), (10, 30), (30, 60)])
    assert found.first_third.tolist() == pytest.approx([(3 + 1.5) / 9])
    assert found.last_third.tolist() == pytest.approx([3 * (20 / 30) / 9])


def test_variation_is_of_influence_per_step():
    found = analysis.patterns(np.array([[1.0], [2.0], [0.5]]), windows=[(0, 10), (10, 30), (30, 35)])
    assert found.variation.tolist() == pytest.approx([0], abs=1e-7)


def test_patterns_of_few_windows():
    assert analysis.patterns([[5.0, -2.0, 0.0]]).labels.tolist() == ["stable", "stable", "negligible"]
    assert analysis.patterns(np.zeros((3, 2))).shares["negligible"] == 1.0
    assert analysis.patterns(np.array([[1.0, 1, 1], [-1, 0, 1]])).labels.tolist() == ["fluctuating", "early", "stable"]
    assert math.isnan(analysis.patterns(np.zeros((3, 0))).shares["early"])


@pytest.mark.parametrize(
    ("rule", "sample", "label"),
    [
        ({"early": 0.71}, 0, "stable"),
        ({"late": 0.71}, 1, "fluctuating"),
        ({"late": 0.71, "sign_changes": 0.81}, 1, "stable"),
        ({"variation": 0.2}, 2, "fluctuating"),
        ({"sign_changes": 1.0}, 3, "fluctuating"),
        ({"variation": 3.0}, 4, "stable"),
        ({"negligible": 0.0}, 5, "negligible"),
        ({"negligible": 0.0}, 6, "fluctuating"),
        ({"negligible": 1.0}, 0, "early"),
        ({"negligible": 2.0}, 0, "negligible"),
    ],
)
def test_pattern_thresholds(rule, sample, label):
    assert analysis.patterns(SIX, rule=analysis.PatternRule(**rule)).labels[sample] == label


def test_patterns_refuse():
    with pytest.raises(ValueError, match=r"early=1\.5\) must lie between 0 and 1"):
        analysis.PatternRule(early=1.5)
    with pytest.raises(ValueError, match="between 0 and inf"):
        analysis.PatternRule(variation=-1)
    with pytest.raises(ValueError, match="patterns: NaN or infinity for 1 sample, sample 9 first"):
        analysis.patterns(influence([[1, 2, float("nan")]], ids=[4, 2, 9]))


STAGES = [[1.0, 2, 3, 4, 0], [4, 3, 2, 1, 0], [1, 3, 2, 4, 0], [5, 5, 5, 5, 0]]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    # against the first: all pairs turned round; one pair of six turned: 1 − 2/6, and 1 − 6·(1 + 1)/(4·15)
    [("kendall", -1, 2 / 3), ("spearman", -1, 0.8), ("pearson", -1, 0.8)],
)
def test_stage_correlation(kind, first, second):
    found = analysis.stage_correlation(STAGES, kind)
    assert found.matrix[0, 1] == pytest.approx(first) and found.matrix[0, 2] == pytest.approx(second)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)
    assert np.diag(found.matrix)[:3].tolist() == [1, 1, 1]
    # the sample that is 0 everywhere would make the constant window one that is not
    assert np.isnan(found.matrix[3]).all() and found.constant == ["window 3"]
    assert (found.num_samples, found.num_left_out) == (4, 1)
    assert found.mean == pytest.approx((first + second - second) / 3)
    assert "1 left out that are 0 everywhere" in repr(found) and "constant, so NaN: window 3" in repr(found)


def test_stage_correlation_of_the_largest():
    rows = [[5, -6, 1, 0, 0], [5, 0, 0, 0, -1], [0, 0, 0, 0, 0], [7, 7, 7, 7, 0]]
    found = analysis.stage_correlation(rows, "jaccard", k=2)
    # {0, 1} with {0, 4}: one of three; with {0, 1}, the first of the equal: all
    assert found.matrix[0].tolist() == pytest.approx([1, 1 / 3, math.nan, 1], nan_ok=True)
    assert found.constant == ["window 2"] and found.k == 2 and "top-2 jaccard" in repr(found)
    # samples at 0 are in no top: {0, 3} with {1, 3}
    few = analysis.stage_correlation([[5, 0, 0, 1], [0, 3, 0, 1], [0, 0, 1, 0]], "jaccard", k=3)
    assert few.matrix[0, 1] == pytest.approx(1 / 3)
    assert analysis.stage_correlation(rows, "jaccard").k == 1
    assert analysis.stage_correlation(np.ones((2, 11)), "jaccard").k == 2
    with pytest.raises(ValueError, match="k must be between 1 and the number of samples, 5, got 6"):
        analysis.stage_correlation(rows, "jaccard", k=6)


def test_stage_correlation_refuses_and_takes_overlapping_windows():
    with pytest.raises(ValueError, match="kind='tau' is not one of 'kendall'"):
        analysis.stage_correlation(STAGES, "tau")
    with pytest.raises(ValueError, match="NaN or infinity for 1 sample, sample 1 first"):
        analysis.stage_correlation([[1, math.nan]])
    overlapping = influence(STAGES[:2], windows=[(0, 10), (0, 20)])
    assert analysis.stage_correlation(overlapping).names == ["0-10", "0-20"]
    assert math.isnan(analysis.stage_correlation(np.zeros((2, 3))).mean)


def orders_of_ties(ranking, corrupted):
    """`corrupted` in every order in which equal values may stand, largest first, by literal permutation."""
    for order in itertools.permutations(range(len(ranking))):
        if all(ranking[a] >= ranking[b] for a, b in itertools.pairwise(order)):
            yield [corrupted[j] for j in order]


@pytest.mark.parametrize(
    ("ranking", "corrupted"),
    [
        (RANKING, CORRUPTED),
        ([1, 1, 1, 1], [1, 0, 0, 1]),
        ([2, 0, 0, 0, 0, 5], [0, 1, 0, 1, 1, 1]),
        ([3, 3, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]),
        ([math.inf, 0, -math.inf, -math.inf], [0, 1, 1, 0]),
    ],
)
def test_detection_is_the_average_over_orders_of_equal_values(ranking, corrupted):
    size, total = len(ranking), sum(corrupted)
    found, precision, area = [], [], []
    for row in orders_of_ties(ranking, corrupted):
        found.append([sum(row[:k]) / total for k in range(size + 1)])
        precision.append(sum(sum(row[: k + 1]) / (k + 1) for k in range(size) if row[k]) / total)
        pairs = [(i < j) for i in range(size) for j in range(size) if row[i] and not row[j]]
        area.append(sum(pairs) / len(pairs))
    np.testing.assert_allclose(analysis.detection_curve(ranking, np.array(corrupted, bool))[1], np.mean(found, 0))
    assert analysis.average_precision(ranking, corrupted) == pytest.approx(np.mean(precision))
    assert analysis.detection_auc(ranking, corrupted) == pytest.approx(np.mean(area))


def test_detection_agrees_with_scikit_learn():
    from sklearn import metrics

    generator = np.random.default_rng(0)
    ranking, corrupted = generator.normal(size=200), generator.random(200) < 0.2
    assert analysis.detection_auc(ranking, corrupted) == pytest.approx(metrics.roc_auc_score(corrupted, ranking))
    expected = metrics.average_precision_score(corrupted, ranking)
    assert analysis.average_precision(ranking, corrupted) == pytest.approx(expected)


def test_detection_table():
    rows = analysis.detection_table({"mine": RANKING}, CORRUPTED, inspected=(0.2, 0.6))
    assert rows[0]["ranking"] == "mine" and rows[0]["found"] == {0.2: 0.5, 0.6: 0.5}
    # the corrupted stand at places 1 and 4: (1 + 2/4)/2; above clean ones in 3 + 1 of 6 pairs
    assert rows[0]["average_precision"] == 0.75 and rows[0]["auc"] == pytest.approx(4 / 6)
    assert rows[1]["ranking"] == "random (expected)" and rows[1]["auc"] == pytest.approx(0.5)
    assert rows[1]["found"] == pytest.approx({0.2: 0.2, 0.6: 0.6})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: analysis.detection_curve([1, math.nan], [True, False]),
            "NaN for 1 sample, the one at place 1 first; give −inf",
        ),
        (lambda: analysis.detection_auc([1, 2], [True, True]), "every sample is marked"),
        (lambda: analysis.average_precision([1, 2], [False, False]), "nothing to find"),
        (lambda: analysis.detection_curve([1, 2, 3], [0, 1, 7]), "ids of samples are not taken"),
        (lambda: analysis.found_fraction([1, 2], [True, False], 1.5), "between 0 and 1, got 1.5"),
    ],
)
def test_detection_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_suspicion_of_a_result():
    result = influence([[[1, 2], [3, -4]], [[5, 6], [7, 8]]], queries=("loss", "logit"))
    assert analysis.suspicion(result, window="0-10", query="logit").tolist() == [-3, 4]
    assert analysis.suspicion(result).tolist() == [-5, -6]


GROUPS = [[0, 1], [1, 2], [0, 3], [2, 3]]


def test_lds():
    # sums 3, 5, 5, 7 with ranks 1, 2½, 2½, 4; against 1 2 3 4: 4½/√(4½·5)
    result = analysis.lds(influence([[1, 2, 3, 4]]), influence([[1, 2, 3, 4]], groups=GROUPS))
    assert result.values.tolist() == pytest.approx([4.5 / math.sqrt(4.5 * 5)])
    low, high = result.interval[0]
    assert -1 <= low < result.values[0] <= high <= 1 and result.num_groups == 4


def test_lds_is_the_mean_over_queries_that_change_at_all():
    scores = influence([[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]], queries=("a", "b", "c"))
    truth = influence([[[3, 5, 5, 7], [-3, -5, -5, -7], [1, 1, 1, 1]]], groups=GROUPS, queries=("a", "b", "c"))
    result = analysis.lds(scores, truth)
    assert result.per_query[0].tolist() == pytest.approx([1, -1, math.nan], nan_ok=True)
    assert result.values.tolist() == pytest.approx([0]) and "1 of 3 correlations are left out" in repr(result)


def test_lds_bootstrap_is_that_of_literal_resampling():
    from scipy import stats

    generator = np.random.default_rng(1)
    truth = generator.normal(size=12)
    sums = np.round(truth + generator.normal(size=12), 1)
    found = analysis.lds(influence([sums]), influence([truth], groups=[[j] for j in range(12)]), bootstrap=1000)
    draws = [generator.integers(12, size=12) for _ in range(1000)]
    literal = np.quantile([stats.spearmanr(sums[d], truth[d])[0] for d in draws], [0.025, 0.975])
    np.testing.assert_allclose(found.interval[0], literal, atol=0.1)
    assert math.isnan(analysis.lds(influence([sums]), influence([truth], groups=GROUPS * 3), bootstrap=0).interval[0, 0])


def test_groups_drawn_several_times_are_ranked_as_copies():
    a, b = np.array([1.0, 1, 2, 5]), np.array([0.0, 3, 3, 1])
    counts = np.array([[1, 1, 1, 1], [0, 3, 1, 2], [2, 0, 2, 0], [4, 0, 0, 0]])
    copies = [correlation.spearman(np.repeat(a, row), np.repeat(b, row)) for row in counts]
    np.testing.assert_allclose(datamodeling._weighted_spearman(a, b, counts.astype(float)), copies)


@pytest.mark.parametrize(
    ("scores", "truth", "match"),
    [
        ([[1, 2, 3, 4]], influence([[1, 2, 3, 4]]), "a truth of groups"),
        ([[1, 2, 3, 4]], influence([[1, 2]], groups=GROUPS[:2]), "at least three groups, got 2"),
        ([[1, 2, 3]], influence([[1, 2, 3, 4]], groups=GROUPS), "sample 3 of group 2 has no score"),
        ([[1, 2, 3, 4]], influence([[1, 2, 3, 4]], groups=GROUPS, windows=[(0, 9)]), "no window in common"),
        ([[1, 2, 3, 4]], influence([[1, 2, 3, 4]], groups=GROUPS, queries=["x"]), "of the same queries"),
    ],
)
def test_lds_refuses(scores, truth, match):
    with pytest.raises(ValueError, match=match):
        analysis.lds(influence(scores), truth)


def test_groups_are_drawn_without_repetition():
    groups = analysis.draw_groups(20, 5, 0.25, seed=3)
    assert [len(set(group)) for group in groups] == [5] * 5 and groups == analysis.draw_groups(20, 5, 0.25, seed=3)
    assert groups != analysis.draw_groups(20, 5, 0.25, seed=4) and {j for g in groups for j in g} <= set(range(20))
    with pytest.raises(ValueError, match="it must leave some in and take some out"):
        analysis.draw_groups(4, 5, 0.1)


def test_kendall_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'dit_fast\[demo\]'"):
        analysis.stage_correlation(STAGES, "kendall")
    assert math.isnan(analysis.agreement([1, 2], [1, 2])["kendall"])
    assert analysis.stage_correlation(STAGES, "spearman").matrix[0, 1] == pytest.approx(-1)
