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
# query values that can be picked on one page, and scores on it for all of them; with more, it shows one value
MAX_VALUES, MAX_NUMBERS = 8, 1_000_000


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

    query: which of the result's query values is shown first, by number or label. Up to 8 can be picked on the page; of more,
        or where they would make a large file, it shows this one alone.
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
    if retrained is not None and result.queries[place] not in retrained.queries:
        raise ValueError(f"retrained has the values {retrained.queries}, not {result.queries[place]!r}: ask the same query")
    values = _Values(result, trajectory, problem, asked, corrupted, retrained)
    data = _shared(result, place, title is None) | values.facts(place)
    data["values"] = [None if i == place else values.facts(i) for i in _chosen(result, place)]
    shown = [] if result.groups is not None else sorted(_shown(data))
    pictures, texts, named = views_of(shown, problem, samples, labels, image_shape)
    data |= {"pictures": pictures, "texts": texts, "labels": named}
    target = Path(path)
    target.write_text(_page(title or f"Influence on {result.queries[place]}", data), "utf-8")
    return target


def _shared(result: Influence, query: int, untitled: bool) -> dict[str, Any]:
    """What is the same for every query value."""
    return {
        "numQueries": len(result.queries),
        "place": query if len(_chosen(result, query)) > 1 else 0,
        "untitled": untitled,
        "numSamples": len(result.sample_ids),
        "groups": result.groups,
        "windows": [{"name": w.name, "start": w.start, "stop": w.stop} for w in result.windows],
        "costs": report_data.cost_facts(result.meta),
    }


def _chosen(result: Influence, query: int) -> list[int]:
    """The query values that the page holds: all where they are few, so that one can be picked there, else the one alone."""
    count = len(result.queries)
    numbers = count * len(result.windows) * min(len(result.sample_ids), report_data.MAX_COLUMNS)
    return list(range(count)) if count <= MAX_VALUES and numbers <= MAX_NUMBERS else [query]


class _Values:
    """What a page shows of each query value, with the losses along the run computed once."""

    def __init__(
        self,
        result: Influence,
        trajectory: Trajectory | None,
        problem: Problem | None,
        asked: Query | Sequence[Query] | None,
        corrupted: Any,
        retrained: Influence | None,
    ) -> None:
        self._result, self._corrupted, self._retrained = result, corrupted, retrained
        self._training: list[list[float]] | None = None
        self._along: list[list[list[float]]] = []
        if trajectory is not None and problem is not None:
            self._training, self._along = _losses(trajectory, problem, asked, result)

    def facts(self, query: int) -> dict[str, Any]:
        """The part of the page's data that belongs to one query value."""
        result, corrupted = self._result, self._corrupted
        along = self._along[query] if self._along else []
        return {
            "query": result.queries[query],
            "isLoss": result.queries[query].startswith("loss"),
            "table": report_data.score_table(result, query),
            "patterns": report_data.pattern_facts(result, query),
            "stages": report_data.stage_facts(result, query),
            "detection": None if corrupted is None else report_data.detection_facts(result, query, corrupted),
            "agreement": self._agreement(query),
            "losses": None if self._training is None else {"training": self._training, "query": along},
        }

    def _agreement(self, query: int) -> list[dict[str, Any]] | None:
        """None for a value that was not retrained for."""
        result, retrained = self._result, self._retrained
        if retrained is None or result.queries[query] not in retrained.queries:
            return None
        same = result.queries == retrained.queries  # then by number, for labels may be equal
        return report_data.agreement_facts(result, retrained, query if same else result.queries[query])


def _shown(data: dict[str, Any]) -> set[int]:
    """Ids in the list of some window, for some query value."""
    tables = [value["table"] for value in (data, *filter(None, data["values"]))]
    return {table["ids"][place] for table in tables for sides in table["listed"] for side in sides for place in side}


def _losses(
    trajectory: Trajectory, problem: Problem, asked: Query | Sequence[Query] | None, result: Influence
) -> tuple[list[list[float]], list[list[list[float]]]]:
    """[step, value] of the training loss in some steps' own batches, and of each query value where they are known."""
    ev = Evaluator.create(problem, trajectory, None, None)
    training: list[list[float]] = []
    asking = [] if asked is None else queries.as_list(asked)
    values: list[list[list[float]]] = [[] for _ in result.queries] if asking else []
    ends = {t for w in result.windows for t in (w.start, w.stop)}
    with ev.session(), torch.no_grad():
        for t in _spread(trajectory.num_steps - 1, LOSS_POINTS):
            if trajectory.has_params(t):
                parts = [ev.losses(ev.params(t), batch) for batch in ev.batches(t)]
                _append(training, t, torch.cat(parts).mean())
        for t in sorted({*_spread(trajectory.num_steps, QUERY_POINTS), *ends} if asking else ()):
            if trajectory.has_params(t):
                found = queries.values_at(ev, ev.params(t), asking)
                if len(found) != len(values):
                    raise ValueError(f"asked has {len(found)} values, the scores {len(values)}: ask the same query")
                for points, value in zip(values, found, strict=True):
                    _append(points, t, value)
    return training, values


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
