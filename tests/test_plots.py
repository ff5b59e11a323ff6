"""Figures of a result: what they show is what the analysis says, for one window and for many, and nothing is clipped."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dit_fast import Influence, analysis
from dit_fast.trajectory import Window


def make(num_windows=6, num_samples=40, name="epoch {}", groups=None, scale=1 / 8):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_windows, 2, num_samples, generator=generator, dtype=torch.float64) * scale
    windows = [Window(name.format(i), 10 * i, 10 * i + 10) for i in range(num_windows)]
    return Influence(scores, windows, ["loss", "logit 0"], torch.arange(num_samples) + 100, groups=groups)


def everything_inside(figure):
    """Whether all that a drawn figure shows, legends and labels too, lies within it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    return box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01


def test_a_clipped_figure_is_seen():
    figure = make().plot.curves()
    assert everything_inside(figure)
    figure.axes[0].text(1.2, 0.5, "far out on the right", transform=figure.axes[0].transAxes).set_in_layout(True)
    figure.set_layout_engine("none")
    assert not everything_inside(figure)


CALLS = {
    "heatmap": lambda plot: plot.heatmap(),
    "curves": lambda plot: plot.curves(),
    "patterns": lambda plot: plot.patterns(),
    "stages": lambda plot: plot.stages("spearman"),
}
SIZES = {
    "many windows": make(90, 60),
    "one window": make(1),
    "one sample": make(6, 1),
    "long names": make(9, name="after the long warm-up phase {}"),
    "all zero": make(3, scale=0.0),
    "groups": make(groups=[[j] for j in range(40)]),
}


@pytest.mark.parametrize(("call", "size"), list(itertools.product(CALLS, SIZES)))
def test_figures_of_any_size_can_be_drawn_and_nothing_is_clipped(call, size):
    figure = CALLS[call](SIZES[size].plot)
    assert isinstance(figure, Figure) and everything_inside(figure)
    assert max(figure.get_size_inches()) <= 12.5


def test_many_curves_and_the_other_kinds_of_matrix():
    assert everything_inside(make().plot.curves(cumulative=True, k=15))
    assert everything_inside(make(4).plot.stages()) and everything_inside(make(4).plot.stages("jaccard"))


def test_ten_thousand_samples(tmp_path):
    big = make(3, 10_000)
    for call in CALLS.values():
        call(big.plot).savefig(tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").stat().st_size < 2_000_000


def test_plot_itself_is_the_heat_map_of_the_query():
    result = make()
    assert "logit 0" in result.plot(1).axes[0].get_title() and "logit 0" in result.plot("logit 0").axes[0].get_title()
    first, second = (figure.axes[0].collections[0].get_array() for figure in (result.plot(), result.plot.heatmap("loss")))
    np.testing.assert_array_equal(first, second)


def test_heat_map_shows_every_score_sorted_by_the_sum():
    result = make()
    shown = np.asarray(result.plot.heatmap().axes[0].collections[0].get_array())
    scores = result.scores[:, 0].numpy()
    np.testing.assert_allclose(shown, scores[:, np.argsort(scores.sum(0))])


def lines(axes):
    return {line.get_label(): line.get_ydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}


def test_curves_are_those_of_the_most_helpful_and_most_harmful():
    result = make()
    axes = result.plot.curves(k=2).axes[0]
    scores = result.scores[:, 0]
    order = scores.sum(0).argsort()
    shown = lines(axes)
    assert list(shown) == [str(100 + int(j)) for j in (order[-1], order[-2], order[0], order[1])]
    for name, values in shown.items():
        assert values == scores[:, int(name) - 100].tolist()
    assert axes.lines[0].get_xdata().tolist() == [5, 15, 25, 35, 45, 55]
    total = result.plot.curves(k=2, cumulative=True).axes[0]
    assert list(lines(total)) == list(shown) and total.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(lines(total)[str(100 + int(order[0]))], scores[:, order[0]].cumsum(0))
    assert set(lines(result.plot.curves(sample_ids=[103, 120]).axes[0])) == {"103", "120"}


def test_curves_refuse():
    result = make()
    with pytest.raises(ValueError, match="sample 7 has no curve"):
        result.plot.curves(sample_ids=[7])
    with pytest.raises(ValueError, match="no query 'lost'"):
        result.plot.curves("lost")
    overlapping = Influence(result.scores[:2], [Window("a", 0, 9), Window("b", 5, 19)], result.queries, result.sample_ids)
    with pytest.raises(ValueError, match="windows that follow one another"):
        overlapping.plot.curves()
    assert len(analysis.stages(overlapping).plot.curves().axes[0].lines) == 11


def test_patterns_are_those_of_the_analysis():
    result, rule = make(), analysis.PatternRule(early=0.4, late=0.4)
    found = analysis.patterns(result, rule=rule)
    left, right = result.plot.patterns(rule=rule).axes
    assert [bar.get_width() for bar in left.patches] == [100 * share for share in found.shares.values()]
    assert [text.get_text() for text in left.texts] == [f"{v:.1%} ({found.counts[n]})" for n, v in found.shares.items()]
    shown = lines(right)
    assert set(shown) == {name for name, count in found.counts.items() if count and name != "negligible"}
    np.testing.assert_allclose(shown["early"], 100 * found.mean_curves()["early"])


def test_stages_are_those_of_the_analysis():
    result = make()
    result.scores[2] = 1.0
    matrix = analysis.stage_correlation(result, "spearman", "logit 0").matrix
    axes = result.plot.stages("spearman", "logit 0").axes[0]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), math.nan), matrix)
    written = [text.get_text() for text in axes.texts]
    assert written == ["–" if math.isnan(value) else f"{value:.2f}" for value in matrix.flatten()]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"epoch {i}" for i in range(6)]
    assert not make(40).plot.stages("pearson").axes[0].texts


def test_select():
    result = make()
    some = result.select(windows=["epoch 3", -1, 0], queries="logit 0")
    assert [window.name for window in some.windows] == ["epoch 3", "epoch 5", "epoch 0"] and some.queries == ["logit 0"]
    assert torch.equal(some.scores, result.scores[[3, 5, 0]][:, [1]]) and some.retrained.shape == some.scores.shape
    assert torch.equal(result.select(windows=slice(1, 3)).scores, result.scores[1:3])
    assert torch.equal(result.select().scores, result.scores) and result.select(windows=2).scores.shape == (1, 2, 40)
    for windows, message in (([], "leaves nothing: there are 6"), ([7], "window 7 does not exist"), ("x", "no window 'x'")):
        with pytest.raises(ValueError, match=message):
            result.select(windows=windows)


def test_matplotlib_is_loaded_by_figures_alone_and_its_absence_is_said():
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch; from dit_fast import Influence, analysis; from dit_fast.trajectory import Window\n"
        "result = Influence(torch.ones(1, 1, 2).double(), [Window('w', 0, 1)], ['loss'], torch.arange(2))\n"
        "assert not {'scipy', 'sklearn'} & set(sys.modules)\n"
        "analysis.patterns(result), analysis.stage_correlation(result)\n"
        "try: result.plot()\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("figures need matplotlib: pip install 'dit_fast[demo]'")
