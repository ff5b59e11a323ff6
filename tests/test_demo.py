"""The demo: what it prints is what it found, and the files it leaves can be read."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import data_file

from dit_fast import Influence, Trajectory, analysis, cli, demo

ROOT = Path(__file__).parents[1]
FILES = {"log", "scores.safetensors", "detection.png", "agreement.png", "heatmap.png", "report.html"}


@dataclass
class Finished:
    """A demo run through the command line: its report, what was printed, and its folder."""

    report: demo.DemoReport
    printed: str
    folder: Path
    threads_after: int


def run_demo(folder: Path, *arguments: str) -> Finished:
    reports = []
    original = demo.run

    def spy(*args, **kwargs):
        reports.append(original(*args, **kwargs))
        return reports[0]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(demo, "run", spy)
        patch.setattr(sys, "argv", ["dit-fast", "demo", "--out", str(folder), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return Finished(reports[0], printed.getvalue(), folder, torch.get_num_threads())


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Finished:
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


def table_rows(printed: str) -> list[list[str]]:
    """The cells of every row between table borders."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")]


def test_tables_say_what_the_report_holds(digits):
    report = digits.report
    expected = [[name, *(f"{value:.0%}" for value in values)] for name, values in report.detection]
    expected += [[name, f"{pearson:.3f}", f"{spearman:.3f}"] for name, pearson, spearman in report.agreement]
    expected += [[what, f"{seconds:.2f}", relative] for what, seconds, relative in report.costs]
    assert table_rows(digits.printed) == expected


def test_lines_fit_in_80_columns_and_paths_are_not_broken(digits):
    paths = {str(path) for path, _ in digits.report.files}
    for line in digits.printed.splitlines():
        assert len(line) <= 80 or line.split("  (")[0] in paths
    for name, value in digits.report.settings.items():
        assert f"{name}: {value}" in digits.printed
    for path in paths:
        assert path in digits.printed


def test_numbers_are_what_they_should_be(digits):
    report = digits.report
    detection = dict(report.detection)
    assert detection["random (expected)"] == [0.10, 0.20]
    assert detection["DIT, whole run"][0] > 0.4
    assert all(0 <= a <= b <= 1 for a, b in detection.values())
    assert [name for name, *_ in report.agreement] == ["first epoch", "last epoch", "whole run"]
    assert all(pearson > 0.95 and spearman > 0.95 for _, pearson, spearman in report.agreement)
    assert "1000 training, 797 validation, 100 labels flipped" in report.settings["data"]


def test_detection_is_that_of_the_saved_scores(digits):
    data = demo.load("digits")
    flipped = demo._flip(data.y, data.num_classes, 0)[1].numpy()
    result = Influence.load(digits.folder / "scores.safetensors")
    for name, window in (("first epoch", "epoch 1"), ("last epoch", "epoch 10"), ("whole run", "whole run")):
        ranking = analysis.suspicion(result.scores[result.window_index(window), 0])
        found = [analysis.found_fraction(ranking, flipped, share) for share in digits.report.inspected]
        assert found == dict(digits.report.detection)[f"DIT, {name}"]


def test_costs_are_relative_to_training(digits):
    seconds = {what: value for what, value, _ in digits.report.costs}
    for what, value, relative in digits.report.costs:
        assert value > 0, what
        assert relative == f"{value / seconds['training']:.1f}× training"


def test_log_and_scores_can_be_read(digits):
    assert {path.name for path, _ in digits.report.files} == FILES == {path.name for path in digits.folder.iterdir()}
    trajectory = Trajectory.open(digits.folder / "log")
    trajectory.verify()
    assert (trajectory.num_steps, trajectory.num_samples, len(trajectory.marks)) == (200, 1000, 10)
    result = Influence.load(digits.folder / "scores.safetensors")
    assert result.scores.shape == (11, 1, 1000)
    assert result.meta["log"] == trajectory.digest
    epochs, whole = result.scores[:10, 0].sum(0), result.scores[10, 0]
    torch.testing.assert_close(epochs, whole, rtol=0, atol=1e-5 * float(result.scores.abs().max()))


def test_the_report_comes_last_and_knows_the_flipped_labels(digits):
    assert digits.report.files[-1][0] == digits.folder / "report.html"
    assert digits.printed.rstrip().splitlines()[-1].startswith(str(digits.folder / "report.html"))
    page = (digits.folder / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    whole = data["detection"]["rows"][-1]
    assert whole["found"] == pytest.approx(dict(digits.report.detection)["DIT, whole run"], abs=1e-3)
    assert data["pictures"] and data["losses"]["query"] and len(data["agreement"]) == 11


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith(".png")))
def test_plots_are_pictures_with_something_on_them(digits, name):
    image = matplotlib.image.imread(digits.folder / name)
    assert image.shape[0] > 300
    assert image.shape[1] > 500
    assert len({tuple(pixel) for pixel in image[::5, ::5, :3].reshape(-1, 3).tolist()}) > 10


def test_the_number_of_threads_is_put_back(digits):
    assert digits.threads_after == torch.get_num_threads()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with demo._one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """The demo on a run so small that it can be repeated."""
    data = demo.load("digits")
    small = demo.DemoData(
        data.x[:60], data.y[:60], data.x_val[:40], data.y_val[:40], data.num_classes, hidden=4, epochs=3, lr=0.2, batch_size=20
    )  # fmt: skip
    monkeypatch.setattr(demo, "load", lambda name: small)
    monkeypatch.setattr(demo, "COMPARED", 5)


def test_the_same_seed_gives_the_same_scores_and_another_seed_others(tiny, tmp_path):
    runs = [demo.run("tiny", tmp_path / str(i), seed, say=lambda text: None) for i, seed in enumerate((3, 3, 4))]
    scores = [Influence.load(tmp_path / str(i) / "scores.safetensors").scores for i in range(3)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert runs[0].detection == runs[1].detection
    assert runs[0].agreement == runs[1].agreement
    assert runs[0].compared == 5


@pytest.mark.data
@pytest.mark.parametrize(("name", "file", "samples"), [("adult", "adult-training.csv.gz", 3000), ("mnist", "mnist.npz", 4000)])
def test_larger_data(name, file, samples, monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_FAST_DATA", str(data_file(file).parent))
    monkeypatch.setattr(demo, "COMPARED", 8)
    finished = run_demo(tmp_path / "out", "--data", name)
    assert f"{samples} training" in finished.report.settings["data"]
    assert dict(finished.report.detection)["DIT, whole run"][0] > 0.3
    assert all(pearson > 0.9 for _, pearson, _ in finished.report.agreement)
    assert {path.name for path in finished.folder.iterdir()} == FILES
