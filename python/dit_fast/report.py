"""One HTML page that shows an Influence: self-contained, for any browser, without a network."""

import html
import json
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_fast import queries, report_data
from dit_fast.problem import Evaluator, Problem
from dit_fast.queries import Query
from dit_fast.result import Influence
from dit_fast.sample_views import views_of
from dit_fast.trajectory import Trajectory

# points of a loss curve
LOSS_POINTS, QUERY_POINTS = 200, 40


def write(
    result: Influence,
    path: str | os.PathLike[str],
    *,
    query: int | str = 0,
    trajectory: Trajectory | None = None,
    problem: Problem | None = None,
    asked: Query | Sequence[Query] | None = None,
    corrupted: Any = None,
    retrained: Influence | None = None,
    samples: Any = None,
    labels: Any = None,
    image_shape: tuple[int, ...] | None = None,
    title: str | None = None,
) -> Path:
    """Write one HTML file that shows `result`, and return its path. Above 2,000 samples the heat map shows means over bins.

    query: which of the result's query values, by number or label.
    trajectory, problem: the run, for the training loss along it; the problem alone gives samples and labels where its inputs
        are images and its targets whole numbers. asked: what was scored, whose value is then drawn too.
    corrupted: the ids of samples known to be corrupted, or bool [N] in the order of `result.sample_ids`: detection curves.
    retrained: what `leave_one_out` returned, for a table of agreement.
    samples: images [n, H, W] or [n, C, H, W] (C = 1 or 3) or n texts, row j for sample j, in place of the problem's inputs.
    labels: n of anything, row j for sample j. image_shape: (H, W) or (C, H, W) of inputs that are flat.

    Raises ValueError where these do not fit the result, LogError for the log, OSError where the file cannot be written.
    """
    place = result.query_index(query)
    if trajectory is not None and result.meta.get("log") not in (None, trajectory.digest):
        raise ValueError("the scores are of another log than the trajectory")
    data = _data(result, place, trajectory, problem, asked, corrupted, retrained)
    shown = [] if result.groups is not None else sorted(_shown(data["table"]))
    pictures, texts, named = views_of(shown, problem, samples, labels, image_shape)
    data |= {"pictures": pictures, "texts": texts, "labels": named}
    target = Path(path)
    target.write_text(_page(title or f"Influence on {result.queries[place]}", data), "utf-8")
    return target


def _data(
    result: Influence,
    query: int,
    trajectory: Trajectory | None,
    problem: Problem | None,
    asked: Query | Sequence[Query] | None,
    corrupted: Any,
    retrained: Influence | None,
) -> dict[str, Any]:
    is_loss = result.queries[query].startswith("loss")
    return {
        "query": result.queries[query],
        "numQueries": len(result.queries),
        "isLoss": is_loss,
        "numSamples": len(result.sample_ids),
        "groups": result.groups,
        "windows": [{"name": w.name, "start": w.start, "stop": w.stop} for w in result.windows],
        "table": report_data.score_table(result, query),
        "patterns": report_data.pattern_facts(result, query),
        "stages": report_data.stage_facts(result, query),
        "detection": None if corrupted is None else report_data.detection_facts(result, query, corrupted),
        "agreement": None if retrained is None else report_data.agreement_facts(result, retrained, query),
        "costs": report_data.cost_facts(result.meta),
        "losses": None if trajectory is None or problem is None else _losses(trajectory, problem, asked, query, result),
    }


def _shown(table: dict[str, Any]) -> set[int]:
    """Ids in the list of some window."""
    return {table["ids"][place] for sides in table["listed"] for side in sides for place in side}


def _losses(
    trajectory: Trajectory, problem: Problem, asked: Query | Sequence[Query] | None, query: int, result: Influence
) -> dict[str, Any]:
    """[step, value] of the training loss in some steps' own batches, and of the query where it is known."""
    ev = Evaluator.create(problem, trajectory, None, None)
    training: list[list[float]] = []
    values: list[list[float]] = []
    asking = [] if asked is None else queries.as_list(asked)
    ends = {t for w in result.windows for t in (w.start, w.stop)}
    with ev.session(), torch.no_grad():
        for t in _spread(trajectory.num_steps - 1, LOSS_POINTS):
            if trajectory.has_params(t):
                parts = [ev.losses(ev.params(t), batch) for batch in ev.batches(t)]
                _append(training, t, torch.cat(parts).mean())
        for t in sorted({*_spread(trajectory.num_steps, QUERY_POINTS), *ends} if asking else ()):
            if trajectory.has_params(t):
                found = queries.values_at(ev, ev.params(t), asking)
                if query >= len(found):
                    raise ValueError(f"asked has {len(found)} values, the scores {len(result.queries)}: ask the same query")
                _append(values, t, found[query])
    return {"training": training, "query": values}


def _append(points: list[list[float]], t: int, value: torch.Tensor) -> None:
    number = float(value)
    if math.isfinite(number):
        points.append([t, float(f"{number:.5g}")])


def _spread(last: int, count: int) -> list[int]:
    """At most `count` whole numbers from 0 to `last`, both among them."""
    return np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int)).tolist()


def _page(title: str, data: dict[str, Any]) -> str:
    parts = resources.files("dit_fast").joinpath("report_page")
    page, style, script = (parts.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", "page.js"))
    # "<" of the data must not end the element it stands in
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    filled = {"title": html.escape(title), "style": style, "script": script, "data": embedded}
    # in one pass, so that nothing in the data is taken for a place to fill
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], page)
