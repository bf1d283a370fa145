"""Figures of what was measured: lines where few methods stand at several ratios, else a row of dots for each method.

Every number has its error where one is known; what cannot be told from anything beside it is grey.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dicer.study.columns import Measure, clear, lower_is_better, measures, perplexity_kind
from dicer.study.record import Done, Original, Pruned
from dicer.study.report.figure_style import COLOURS, GREY, MARKERS, Picture, figure, log_axis, ordered, png
from dicer.study.report.paper import heading
from dicer.study.report.settings import of_its_model
from dicer.study.report.tables import cell, measured_columns

_LINES = 8  # colours that people tell apart
_NOISE = (
    "Bars are standard errors over a task's documents, or standard deviations over seeds where those are larger; none "
    "where no error is known. Grey: within two standard errors of every other method at that ratio, so that noise may "
    "be all of the difference."
)


class Point(NamedTuple):
    """A method at a ratio: its mean over seeds, and whether it can be told from any other there."""

    method: str
    ratio: float
    measure: Measure
    is_told: bool


def points(records: Iterable[Pruned], column: str) -> list[Point]:
    """What there is of a column to draw, the paper's methods first, by ratio."""
    runs: dict[tuple[float, str], list[Pruned]] = {}
    for record in records:
        runs.setdefault((record.recipe.ratio, record.method), []).append(record)
    found = {key: measure for key, members in runs.items() if (measure := cell(members, column).measure)}
    return [
        Point(
            method, ratio, measure, _is_told(measure, [m for k, m in found.items() if k[0] == ratio and k[1] != method])
        )
        for (ratio, method), measure in sorted(found.items(), key=lambda item: item[0])
    ]


def _is_told(measure: Measure, others: Sequence[Measure]) -> bool:
    return not others or any(clear(measure, other) is not False for other in others)


def quality(records: Sequence[Done], name: str, removed: str) -> Picture | None:
    """Perplexities and average accuracy against ratio."""
    columns = [c for c in measured_columns(records) if lower_is_better(c) or c == "average"]
    caption = (
        f"Quality against the fraction of {removed} removed. Perplexity is {perplexity_kind(records[0])}. {_NOISE}"
    )
    return _draw(records, columns, name, caption, removed)


def tasks(records: Sequence[Done], name: str, removed: str) -> Picture | None:
    """Each task's score against ratio."""
    columns = [c for c in measured_columns(records) if not lower_is_better(c) and c != "average"]
    caption = f"Score of each task against the fraction of {removed} removed. {_NOISE}"
    return _draw(records, columns, name, caption, removed)


def _draw(records: Sequence[Done], columns: Sequence[str], name: str, caption: str, removed: str) -> Picture | None:
    records = of_its_model(records)
    rows = _rows(records, columns)
    if not rows:
        return None
    runs = [record for record in records if isinstance(record, Pruned)]
    originals = [record for record in records if isinstance(record, Original)]
    panels = {column: (points(runs, column), cell(originals, column).measure) for column in columns}
    ratios = {record.recipe.ratio for record in runs}
    few = len({record.method for record in runs}) <= _LINES and len(ratios) > 1 and len(columns) <= 3
    drawn = _lines(panels, removed) if few else _dots(panels, _from_best(runs))
    how = "0% is the model as it is." if few else "Dashed: the model as it is."
    return Picture(name, f"{caption} {how}", png(drawn), ("column", "method", "ratio", "seed", "value", "error"), rows)


def _rows(records: Sequence[Done], columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Every run by itself: (column, method, ratio, seed, value, error)."""
    rows = []
    for record in sorted(records, key=lambda record: record.id):
        of = (record.recipe.ratio, record.recipe.seed) if isinstance(record, Pruned) else (0.0, "")
        found = measures(record)
        rows += [(column, record.method, *of, *found[column]) for column in columns if column in found]
    return [(*row[:5], "" if row[5] is None else row[5]) for row in rows]


Panels = dict[str, tuple[list[Point], Measure | None]]


def _lines(panels: Panels, removed: str) -> Any:
    """A panel for each column, a line for each method, its name at the line's end."""
    methods = ordered(point.method for found, _ in panels.values() for point in found)
    drawn = figure((3.6 + 0.075 * max(map(len, methods))) * len(panels), 3.9)
    axes = drawn.subplots(1, len(panels), squeeze=False).flat
    for axis, (column, (found, original)) in zip(axes, panels.items(), strict=True):
        # Bars of one ratio would hide one another; dots alone stand where they belong.
        step = 0.006 if any(point.measure.error for point in found) else 0.0
        ends = []
        for place, method in enumerate(methods):
            aside = step * (place - (len(methods) - 1) / 2)
            ends.append(_line(axis, [p for p in found if p.method == method], original, place, aside))
        ratios = sorted({point.ratio for point in found} | ({0.0} if original else set()))
        axis.set(title=heading(column), xlabel=f"{removed} removed", xticks=ratios)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axis.grid(alpha=0.25)
        if lower_is_better(column):
            log_axis(axis)
        _label_ends(axis, methods, ends)
    return drawn


End = tuple[tuple[float, float] | None, str]  # where a line ends, if there is one, and its colour


def _line(axis: Any, found: Sequence[Point], original: Measure | None, place: int, aside: float) -> End:
    """One method, so much to the side of where its ratios are."""
    colour = COLOURS[place] if any(point.is_told for point in found) else GREY
    shown = [point for point in found if math.isfinite(point.measure.value)]
    start = [(0.0, original.value)] if original and math.isfinite(original.value) else []
    line = start + [(point.ratio + aside, point.measure.value) for point in shown]
    axis.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=1.4, alpha=0.85)
    for point in shown:
        look = {"color": colour if point.is_told else GREY, "marker": MARKERS[place], "markersize": 5, "linewidth": 1}
        axis.errorbar(point.ratio + aside, point.measure.value, yerr=point.measure.error or 0, capsize=2, **look)
    return line[-1] if shown else None, colour


def _label_ends(axis: Any, names: Sequence[str], ends: Sequence[End]) -> None:
    """Each name to the right of its line's end, moved apart where two would overlap."""
    low, high = axis.get_ylim()
    scale = math.log if axis.get_yscale() == "log" else float
    known = [(name, end, colour) for name, (end, colour) in zip(names, ends, strict=True) if end is not None]
    heights = [(scale(end[1]) - scale(low)) / (scale(high) - scale(low)) for _, end, _ in known]
    gap = 0.055  # of the axis: a line of text
    places: dict[int, float] = {}
    below = -math.inf
    for i in sorted(range(len(known)), key=heights.__getitem__):
        below = places[i] = max(heights[i], below + gap)
    too_high = max(0.0, below - 1.0)
    for i, (name, end, colour) in enumerate(known):
        axis.annotate(
            name,
            xy=end,
            xytext=(1.03, places[i] - too_high),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )


def _dots(panels: Panels, methods: Sequence[str]) -> Any:
    """A panel for each column, a row for each method, a colour for each ratio."""
    ratios = sorted({point.ratio for found, _ in panels.values() for point in found})
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    drawn = figure(3.1 * across + 2.6, down * ((0.14 + 0.08 * len(ratios)) * len(methods) + 1.0) + 0.4)
    axes = drawn.subplots(down, across, squeeze=False, sharey=True).flat
    for axis, column in itertools.zip_longest(axes, panels):
        if column is None:
            axis.set_axis_off()
            continue
        found, original = panels[column]
        for point in found:
            _dot(axis, point, methods.index(point.method), ratios)
        _original(axis, original)
        axis.set(title=heading(column), yticks=range(len(methods)), yticklabels=methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.25)
        for line in range(len(methods) - 1):
            axis.axhline(line + 0.5, color="#E6E9EC", linewidth=0.6, zorder=0)
        if lower_is_better(column):
            log_axis(axis, "x")
    _legend(drawn, ratios, panels)
    return drawn


def _from_best(records: Sequence[Pruned]) -> list[str]:
    """Methods by how they compare in the first column, at the ratios that they have, with what is usual there."""
    methods = ordered(record.method for record in records)
    if not (columns := measured_columns(records)):
        return methods
    column = columns[0]
    found = points(records, column)
    at = {point.ratio: [p.measure.value for p in found if p.ratio == point.ratio] for point in found}

    def rank(method: str) -> float:
        own = [(point.measure.value, statistics.median(at[point.ratio])) for point in found if point.method == method]
        parts = [value / usual if usual and math.isfinite(value) else math.inf for value, usual in own]
        return statistics.fmean(parts) * (1 if lower_is_better(column) else -1) if parts else math.inf

    return sorted(methods, key=rank)


def _dot(axis: Any, point: Point, row: int, ratios: Sequence[float]) -> None:
    place = ratios.index(point.ratio)
    colour = COLOURS[place % len(COLOURS)] if point.is_told else GREY
    height = row + 0.7 * ((place + 0.5) / len(ratios) - 0.5)
    value, error = point.measure
    if math.isfinite(value):
        axis.errorbar(value, height, xerr=error or 0, fmt=MARKERS[place % len(MARKERS)], color=colour, markersize=4)
    else:
        axis.text(1.0, height, "inf ", transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=7)


def _original(axis: Any, original: Measure | None) -> None:
    """The model as it is, and its error."""
    if original is None or not math.isfinite(original.value):
        return
    axis.axvline(original.value, color="black", linestyle="--", linewidth=0.9, zorder=1)
    if original.error:
        low, high = original.value - original.error, original.value + original.error
        axis.axvspan(low, high, color="black", alpha=0.06, linewidth=0)


def _legend(drawn: Any, ratios: Sequence[float], panels: Panels) -> None:
    """What the colours mean, as far as there are several."""
    from matplotlib.lines import Line2D

    looks = [(f"{r * 100:g}%", COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, r in enumerate(ratios)]
    hidden = any(not point.is_told for found, _ in panels.values() for point in found)
    looks += [("within noise", GREY, "o")] if hidden else []
    if len(looks) > 1:
        handles = [Line2D([], [], color=colour, marker=marker, linestyle="") for _, colour, marker in looks]
        names = [label for label, _, _ in looks]
        drawn.legend(handles, names, loc="outside upper right", ncols=len(looks), frameon=False)
