"""The report: what its page holds, what it refuses, and how it behaves in a real browser."""

import base64
import html.parser
import json
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
import torch

import dit_fast as dit
from dit_fast import analysis, report, report_data
from dit_fast.sample_views import as_images, png_uri

CORRUPTED = [1, 5, 9]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trajectory, scores) of the tiny run."""
    log = tmp_path_factory.mktemp("report") / "log"
    tiny_run.record(log)
    return dit.Trajectory.open(log), tiny_run.scored(log)


@pytest.fixture(scope="module")
def full(run, tmp_path_factory):
    """(path, result) of a page with everything on it."""
    trajectory, result = run
    problem = tiny_run.make_problem()
    truth = dit.leave_one_out(trajectory, problem, tiny_run.make_query(), "epochs", sample_ids=range(8))
    path = report.write(
        result,
        tmp_path_factory.mktemp("page") / "report.html",
        trajectory=trajectory,
        problem=problem,
        asked=tiny_run.make_query(),
        corrupted=CORRUPTED,
        retrained=truth,
        title="Tiny <run> & {{data}}",
    )
    return path, result


def data_of(path) -> dict:
    """What the page holds, as its script reads it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def decoded(uri: str) -> np.ndarray:
    """The pixels of a PNG as png_uri writes it: [H, W, C], every row unfiltered."""
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at : at + 8])
        chunks[kind] = raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])


def test_the_page_is_whole_and_asks_for_nothing_from_outside(full):
    text = full[0].read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\(|@import|fetch\(|XMLHttpRequest|import\(', text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)

    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert reader.open == []


def test_the_title_is_escaped_and_not_filled_again(full):
    text = full[0].read_text("utf-8")
    assert text.count("Tiny &lt;run&gt; &amp; {{data}}") == 2
    assert "<run>" not in text


def test_scores_lists_and_pictures_are_those_of_the_result(full):
    path, result = full
    data = data_of(path)
    table = data["table"]
    scores = result.scores[:, 0].numpy()
    assert table["ids"] == list(range(24))
    np.testing.assert_allclose(np.array(table["scores"]), scores, rtol=1e-3)
    for w, (helps, harms) in enumerate(table["listed"]):
        assert [table["ids"][p] for p in helps] == [j for j, value in result.top(20, window=w, order="helpful") if value > 0]
        assert [table["ids"][p] for p in harms] == [j for j, value in result.top(20, window=w, order="harmful") if value < 0]
    assert set(data["pictures"]) == set(data["labels"]) == {str(j) for w in table["listed"] for side in w for j in side}
    lowest, highest = (float(tiny_run.x.min()), float(tiny_run.x.max()))
    expected = ((tiny_run.x[3] - lowest) / (highest - lowest) * 255).round().numpy()
    assert (np.abs(decoded(data["pictures"]["3"])[:, :, 0] - expected) <= 1).all()
    assert data["labels"]["3"] == str(int(tiny_run.y[3]))


def test_samples_are_sorted_by_pattern_and_then_by_their_sum(full):
    path, result = full
    table = data_of(path)["table"]
    found = analysis.patterns(analysis.stages(result))
    assert table["patterns"] == found.labels.tolist()
    assert [(g["name"], g["count"]) for g in table["heat"]["groups"]] == [(n, c) for n, c in found.counts.items() if c]
    order, sums = table["heat"]["order"], result.scores[:, 0].sum(0)
    assert sorted(order) == list(range(24))
    keys = [(analysis.PATTERNS.index(found.labels[j]), float(sums[j])) for j in order]
    assert keys == sorted(keys)


def test_the_other_sections_hold_what_analysis_gives(full, run):
    path, result = full
    data = data_of(path)
    shares = analysis.patterns(analysis.stages(result)).shares
    assert {row["name"]: row["share"] for row in data["patterns"]["rows"]} == pytest.approx(shares, abs=1e-3)
    matrix = analysis.stage_correlation(result, "spearman").matrix
    np.testing.assert_allclose(np.array(data["stages"]["kinds"]["spearman"]["matrix"], dtype=float), matrix, atol=1e-3)
    marked = np.isin(np.arange(24), CORRUPTED)
    row = data["detection"]["rows"][-1]
    assert row["name"] == "whole run"
    assert row["auc"] == pytest.approx(analysis.detection_auc(analysis.suspicion(result), marked), abs=1e-3)
    assert [r["window"] for r in data["agreement"]] == [f"epoch {e}" for e in range(1, 5)]
    assert data["agreement"][0]["samples"] == 8 and data["agreement"][0]["pearson"] > 0.9
    assert ["backend", "native"] in data["costs"]


def test_losses_are_those_of_the_run(full, run):
    losses, trajectory = data_of(full[0])["losses"], run[0]
    with torch.no_grad():
        for kind, t in (("training", 5), ("query", 9)):
            params = trajectory.params(t)
            x, y = (tiny_run.x, tiny_run.y) if kind == "training" else (tiny_run.x_val, tiny_run.y_val)
            rows = trajectory.batch_ids(t) if kind == "training" else slice(None)
            output = torch.func.functional_call(tiny_run.model, params, (x[rows],))
            expected = float(torch.nn.functional.cross_entropy(output, y[rows]))
            assert dict(losses[kind])[t] == pytest.approx(expected, rel=1e-4)
    assert [t for t, _ in losses["training"]] == list(range(12))
    assert {0, 3, 6, 9, 12} <= {t for t, _ in losses["query"]}


def made(num_samples: int, num_windows: int = 4, query: str = "loss") -> dit.Influence:
    scores = torch.randn(num_windows, 1, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    windows = [dit.trajectory.Window(f"part {i}", 10 * i, 10 * i + 10) for i in range(num_windows)]
    return dit.Influence(scores, windows, [query], torch.arange(num_samples) + 100)


def test_many_samples_are_shown_in_bins_and_none_is_lost(tmp_path):
    result = made(5003)
    path = report.write(result, tmp_path / "r.html")
    table = data_of(path)["table"]
    heat, scores = table["heat"], result.scores[:, 0].numpy()
    sizes = np.diff(heat["edges"])
    assert len(sizes) == report_data.BINS and sizes.sum() == 5003 and set(sizes) == {5, 6}
    np.testing.assert_allclose((np.array(heat["means"]) * sizes).sum(1), scores.sum(1), rtol=1e-2, atol=0.5)
    for w, row in enumerate(heat["standouts"]):
        place = int(np.abs(scores[w]).argmax())
        assert [place + 100, float(f"{scores[w, place]:.4g}")] in row
    assert len(table["ids"]) <= 4 * 2 * report_data.LISTED
    assert path.stat().st_size < 1_000_000


def test_scores_that_are_no_numbers_and_samples_never_seen_are_said(tmp_path):
    result = made(30)
    result.scores[1, 0, 4] = float("nan")
    result.scores[:, 0, 7] = 0
    table = data_of(report.write(result, tmp_path / "r.html", corrupted=[100, 104]))["table"]
    assert (table["noNumber"], table["unvisited"]) == (1, 1)
    assert table["scores"][1][4] is None and table["patterns"][4] == "no number" and table["patterns"][7] == "negligible"
    assert all(4 not in side for side in table["listed"][1])


def test_one_window_and_other_queries_and_groups(tmp_path):
    data = data_of(report.write(made(6, 1, "logit 0"), tmp_path / "one.html"))
    assert (data["patterns"], data["stages"], data["detection"], data["losses"], data["isLoss"]) == (None,) * 4 + (False,)
    grouped = replace(made(2), groups=[[1, 2], [3]], sample_ids=torch.arange(2))
    assert data_of(report.write(grouped, tmp_path / "groups.html", problem=tiny_run.make_problem()))["pictures"] == {}


def test_few_query_values_are_all_on_the_page_and_many_are_not(run, tmp_path):
    trajectory, _ = run
    problem, asked = tiny_run.make_problem(), tiny_run.make_two_queries()
    result = dit.score(trajectory, problem, asked, "epochs")
    truth = result.select(queries=1)
    more = {"trajectory": trajectory, "problem": problem, "asked": asked, "retrained": truth}
    data = data_of(report.write(result, tmp_path / "r.html", query=1, **more))
    assert (data["query"], data["place"], data["values"][1]) == (result.queries[1], 1, None)
    other = data["values"][0]
    assert other["query"] == "loss" and other["isLoss"] and other["agreement"] is None and data["agreement"]
    np.testing.assert_allclose(other["table"]["scores"], result.scores[:, 0].numpy(), rtol=1e-3)
    assert other["losses"]["query"] != data["losses"]["query"] and len(other["losses"]["query"]) == 13
    ids = {j for table in (data["table"], other["table"]) for s in table["listed"] for part in s for j in part}
    assert set(map(int, data["pictures"])) == ids
    with pytest.raises(ValueError, match="retrained has the values"):
        report.write(result, tmp_path / "r.html", retrained=truth)
    many = replace(made(5), scores=torch.randn(4, 9, 5).double(), queries=[f"logit {i}" for i in range(9)], retrained=None)
    alone = data_of(report.write(many, tmp_path / "r.html", query=4))
    assert (alone["query"], alone["place"], alone["values"], alone["numQueries"]) == ("logit 4", 0, [None], 9)


def test_texts_are_data_and_never_markup(tmp_path):
    nasty = "</script><script>alert(1)</script><!-- <b>"
    path = report.write(
        replace(made(3), sample_ids=torch.arange(3)), tmp_path / "t.html", samples=[nasty, "b", "c"], labels="xyz"
    )
    assert path.read_text("utf-8").count("</script>") == 2
    assert data_of(path)["texts"]["0"] == nasty and data_of(path)["labels"] == {"0": "x", "1": "y", "2": "z"}


def test_pictures_in_colour_and_large_ones():
    pixels = torch.arange(2 * 3 * 3, dtype=torch.uint8).reshape(3, 2, 3)
    assert (decoded(png_uri(pixels)) == pixels.permute(1, 2, 0).numpy()).all()
    assert as_images(torch.rand(2, 3, 200, 100)).shape == (2, 3, 64, 32)
    assert as_images(torch.rand(2, 12), (3, 2, 2)).shape == (2, 3, 2, 2)
    for nothing in (
        torch.rand(4, 7),
        torch.rand(2, 5, 8, 8),
        torch.randint(9, (2, 8, 8)),
        "text",
        torch.full((1, 4, 4), torch.nan),
    ):
        assert as_images(nothing) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"query": "accuracy"}, "no query 'accuracy'"),
        ({"corrupted": [999]}, "names sample 999, which was not scored"),
        ({"corrupted": np.ones(24, bool)}, "none or all"),
        ({"corrupted": np.ones(3, bool)}, r"bool \[24\]"),
        ({"samples": torch.rand(24, 9)}, "no images"),
        ({"samples": ["one"]}, "samples has 1 rows: there is none for sample 23"),
        ({"problem": "make_problem", "image_shape": (5, 5)}, "no image shape 5x5"),
    ],
)
def test_what_does_not_fit_is_refused(run, tmp_path, options, reason):
    if "problem" in options:
        options = options | {"problem": tiny_run.make_problem()}
    with pytest.raises(ValueError, match=reason):
        report.write(run[1], tmp_path / "r.html", **options)
    assert not list(tmp_path.iterdir())


def test_another_log_is_refused(run, tmp_path):
    other = replace(run[1], meta=run[1].meta | {"log": "other"})
    with pytest.raises(ValueError, match="another log"):
        report.write(other, tmp_path / "r.html", trajectory=run[0], problem=tiny_run.make_problem())
