"""Influence: what it shows, what it refuses, and that it comes back from the disk as it went."""

import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from dit_fast import Influence
from dit_fast.trajectory import Window

# one window and query of five samples with two ties
ROW = [0.5, -2.0, 0.5, 2.0, 0.0]


def make(num_windows=2, **changes):
    scores = torch.arange(num_windows * 2 * 5, dtype=torch.float64).reshape(num_windows, 2, 5) / 8
    scores[-1, 0] = torch.tensor(ROW, dtype=torch.float64)
    arguments = {
        "scores": scores,
        "windows": [Window(f"epoch {i}", 10 * i, 10 * i + 10) for i in range(num_windows)],
        "queries": ["loss", "logit 0"],
        "sample_ids": torch.tensor([40, 10, 20, 30, 7]),
        "meta": {"method": "adjoint", "hessian": "exact", "log": "abc", "seconds": 0.25, "versions": {"torch": "2"}},
    }
    return Influence(**(arguments | changes))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("magnitude", [(10, -2.0), (30, 2.0), (40, 0.5), (20, 0.5), (7, 0.0)]),
        ("helpful", [(30, 2.0), (40, 0.5), (20, 0.5), (7, 0.0), (10, -2.0)]),
        ("harmful", [(10, -2.0), (7, 0.0), (40, 0.5), (20, 0.5), (30, 2.0)]),
    ],
)
def test_top_orders_and_keeps_ties_in_the_order_of_the_samples(order, expected):
    assert make().top(order=order) == expected
    assert make().top(3, order=order) == expected[:3]


def test_top_takes_windows_by_name_and_number_and_queries_by_number():
    result = make()
    assert result.top(1, window="epoch 0") == result.top(1, window=0) == result.top(1, window=-2) == [(7, 0.5)]
    assert result.top(1, window="epoch 0", query=1) == result.top(1, window=0, query=-1) == [(7, 1.125)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": "epoch 9"}, "no window 'epoch 9'; there are epoch 0, epoch 1"),
        ({"window": 2}, "window 2 does not exist: there are 2"),
        ({"window": -3}, "window -3 does not exist: there are 2"),
        ({"query": 2}, "query 2 does not exist: there are 2"),
        ({"query": -3}, "query -3 does not exist: there are 2"),
        ({"order": "best"}, "order='best' is not one of 'magnitude', 'helpful', 'harmful'"),
    ],
)
def test_top_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().top(**arguments)


def test_largest_marks_k_in_every_window_and_query():
    chosen = make().largest(2)
    assert chosen[-1, 0].tolist() == [False, True, False, True, False]
    assert chosen[0, 1].tolist() == [False, False, False, True, True]
    assert make().largest(9).all()


def test_to_pandas_has_a_row_per_window_query_and_sample():
    result = make(retrained=torch.arange(20).reshape(2, 2, 5) % 3 == 0)
    frame = result.to_pandas()
    assert list(frame.columns) == ["window", "start", "stop", "query", "sample", "score", "retrained"]
    assert frame.shape == (20, 7)
    kinds = {name: frame[name].dtype.kind for name in ("start", "stop", "sample", "score", "retrained")}
    assert kinds == {"start": "i", "stop": "i", "sample": "i", "score": "f", "retrained": "b"}
    assert frame["score"].dtype == "float64" and frame["sample"].dtype == "int64"
    for row, (w, q, n) in zip(frame.itertuples(index=False), [(w, q, n) for w in (0, 1) for q in (0, 1) for n in range(5)]):  # noqa: B905
        assert (row.window, row.start, row.stop) == (f"epoch {w}", 10 * w, 10 * w + 10)
        assert (row.query, row.sample) == (result.queries[q], int(result.sample_ids[n]))
        assert (row.score, row.retrained) == (float(result.scores[w, q, n]), bool(result.retrained[w, q, n]))


def same(a, b):
    assert torch.equal(a.scores, b.scores) and a.scores.dtype == b.scores.dtype
    assert torch.equal(a.retrained, b.retrained) and torch.equal(a.sample_ids, b.sample_ids)
    assert (a.windows, a.queries, a.groups, a.meta) == (b.windows, b.queries, b.groups, b.meta)


@pytest.mark.parametrize("as_text", [True, False])
def test_save_and_load(tmp_path, as_text):
    path = tmp_path / "scores.safetensors"
    result = make(retrained=torch.rand(2, 2, 5) > 0.5, groups=[[40, 1], [10], [20], [], [7]])
    for written in (make(), result):  # the second over the first
        written.save(str(path) if as_text else path)
        same(Influence.load(str(path) if as_text else path), written)
    assert os.listdir(tmp_path) == ["scores.safetensors"]


def test_save_writes_views_in_their_own_order(tmp_path):
    result = make(scores=torch.rand(5, 2, 2, dtype=torch.float64).permute(2, 1, 0))
    result.save(tmp_path / "x")
    same(Influence.load(tmp_path / "x"), result)


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "scores.safetensors"
    make().save(path)

    def full(self, *args):
        if call == "write_bytes":
            with open(self, "wb") as file:
                file.write(args[0][:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, full)
        with pytest.raises(OSError, match="No space left"):
            make(queries=["a", "b"]).save(path)
    assert os.listdir(tmp_path) == ["scores.safetensors"]
    same(Influence.load(path), make())


def truncated(data, path):
    path.write_bytes(data[:-9])


def cut_in_header(data, path):
    path.write_bytes(data[:50])


def other_format(data, path):
    path.write_bytes(data.replace(b"dit_fast influence 1", b"dit_fast influence 9"))


def missing_window(data, path):
    changed = data.replace(rb"[\"epoch 1\", 10, 20]", rb"[\"epoch 1\", 10]    ")
    assert changed != data
    path.write_bytes(changed)


def other_header(path, header):
    save_file({name: torch.zeros(2) for name in ("scores", "retrained", "sample_ids")}, path, {"dit_fast": header})


DAMAGE = {
    "empty": lambda data, path: path.write_bytes(b""),
    "text": lambda data, path: path.write_text("window,query,score\n" * 9),
    "truncated": truncated,
    "cut in the header": cut_in_header,
    "another version": other_format,
    "a window without an end": missing_window,
    "foreign tensors": lambda data, path: save_file({"scores": torch.zeros(2)}, path),
    "a header that is a list": lambda data, path: other_header(path, "[1, 2]"),
    "a header that is no json": lambda data, path: other_header(path, "{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_load_refuses_other_files_by_name(tmp_path, damage):
    path = tmp_path / "scores.safetensors"
    make().save(path)
    damage(path.read_bytes(), path)
    with pytest.raises(ValueError, match=r"scores\.safetensors is not a file of dit_fast scores, or is damaged"):
        Influence.load(path)


def test_load_says_when_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Influence.load(tmp_path / "nowhere")


def test_repr_shows_every_window_of_a_few():
    lines = repr(make()).splitlines()
    assert lines == [
        "Influence of 5 samples on 2 query values in 2 windows (adjoint, hessian=exact)",
        "  epoch 0 [0, 10) loss (the first of 2): largest 7: +0.5, 30: +0.375, 20: +0.25",
        "  epoch 1 [10, 20) loss (the first of 2): largest 10: -2, 30: +2, 40: +0.5",
    ]


def test_repr_shows_the_ends_of_many_windows():
    lines = repr(make(num_windows=40)).splitlines()
    assert "in 40 windows" in lines[0]
    assert [line.split(" [")[0].strip() for line in lines[1:]] == ["epoch 0", "epoch 1", "epoch 2", "…", "epoch 38", "epoch 39"]


def test_repr_of_groups_one_query_and_no_samples():
    one = make(1, groups=[[1], [2], [3], [4], [5]], meta={})
    assert repr(one).startswith("Influence of 5 groups on 2 query values in 1 window (?)\n")
    assert "largest group 10: -2, group 30: +2" in repr(one)
    assert "(?, 3 scores true by retraining)" in repr(make(meta={"refined": 3}))
    none = make(1, scores=torch.zeros(1, 1, 0), queries=["loss"], sample_ids=torch.arange(0))
    assert repr(none) == "Influence of 0 samples on 1 query value in 1 window (adjoint, hessian=exact)"


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": [Window("a", 0, 1)]},
        {"queries": ["loss"]},
        {"sample_ids": torch.arange(4)},
        {"scores": torch.zeros(2, 10)},
        {"retrained": torch.zeros(2, 2, 1, dtype=torch.bool)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="do not fit"):
        make(**changes)


@pytest.mark.parametrize("num_windows", [1, 30])
def test_plot_is_a_figure_with_a_row_per_window(tmp_path, num_windows):
    figure = make(num_windows).plot(query=1)
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"epoch {i}" for i in range(num_windows)]
    assert "logit 0" in axes.get_title()
    figure.savefig(tmp_path / "plot.png", dpi=30)


def test_plot_of_scores_that_are_all_zero(tmp_path):
    make(scores=torch.zeros(2, 2, 5, dtype=torch.float64)).plot().savefig(tmp_path / "plot.png", dpi=30)


def test_queries_are_known_by_name_too():
    result = make()
    name = result.queries[1]
    assert result.top(3, query=name) == result.top(3, query=1) == result.top(3, query=-1)
    for call in (lambda query: result.top(3, query=query), result.plot):
        with pytest.raises(ValueError, match=r"no query 'lost'; there are loss, "):
            call("lost")
        with pytest.raises(ValueError, match="query 9 does not exist: there are 2"):
            call(9)


def test_save_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot save scores at .*x.safetensors: there is no folder .*none"):
        make().save(tmp_path / "none" / "x.safetensors")
