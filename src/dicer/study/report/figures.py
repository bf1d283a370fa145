"""Records to figures: quality against ratio, cost, and what each layer keeps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dicer.study.columns import measures, perplexity_kind
from dicer.study.report.figure_style import Picture, figure, log_axis, ordered, png, style
from dicer.study.report.figures_layers import allocation, norms, overlap, overlap_by_layer
from dicer.study.report.paper import PERPLEXITY, TITLES
from dicer.study.report.tables import ORIGINAL, measured_columns

Record = dict[str, Any]


def pictures(records: Sequence[Record], name: str) -> list[Picture]:
    """Every figure of one setting that its records have the numbers for.

    Args:
        records: of one setting, the original model among them.
        name: what file names begin with.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    ratios = sorted({record["recipe"]["ratio"] for record in records if record["method"] != ORIGINAL})
    if not ratios:
        return []
    made = [quality(records, f"{name}-quality"), tasks(records, f"{name}-tasks")]
    for ratio in ratios:
        chosen = one_each(records, ratio)
        percent = f"{ratio * 100:g}"
        made.append(overlap(chosen, f"{name}-overlap-{percent}"))
        made.append(overlap_by_layer(chosen, f"{name}-overlap-by-layer-{percent}"))
        made.append(norms(chosen, f"{name}-norms-{percent}"))
        made.append(allocation(chosen, f"{name}-allocation-{percent}"))
    made.append(cost(records, f"{name}-cost"))
    return [picture for picture in made if picture is not None]


def removed_part(records: Iterable[Record]) -> str:
    """What the ratios of all records are fractions of."""
    recipes = [r["recipe"] for r in records if r["recipe"].get("ratio")]
    asked = {(recipe.get("ratio_of", "chosen"), recipe.get("axis") or "mlp") for recipe in recipes}
    wholes = {whole for whole, _ in asked}
    if asked <= {("chosen", "mlp")}:
        return "neurons"
    return f"{wholes.pop()} parameters" if len(wholes) == 1 and wholes != {"chosen"} else "what was asked for"


def one_each(records: Iterable[Record], ratio: float) -> dict[str, Record]:
    """Method -> its run with the lowest seed that most methods have, so that like is held against like."""
    members = [r for r in records if r["method"] != ORIGINAL and r["recipe"]["ratio"] == ratio]
    seeds = [record["recipe"]["seed"] for record in members]
    common = sorted(set(seeds), key=lambda seed: (-seeds.count(seed), seed))
    found: dict[str, Record] = {}
    for record in sorted(members, key=lambda record: common.index(record["recipe"]["seed"])):
        found.setdefault(record["method"], record)
    return {method: found[method] for method in ordered(found)}


def quality(records: Sequence[Record], name: str) -> Picture | None:
    """Perplexity and average accuracy against ratio."""
    columns = [column for column in (PERPLEXITY, "average") if column in measured_columns(records)]
    caption = (
        f"Quality against the fraction of {removed_part(records)} removed: lines are means, points are seeds, bands "
        "go from the lowest to the highest seed, 0% is the model as it is. "
        f"Perplexity is {perplexity_kind(records[0])}."
    )
    return _against_ratio(records, name, columns, caption)


def tasks(records: Sequence[Record], name: str) -> Picture | None:
    """Each task's score against ratio."""
    columns = [column for column in measured_columns(records) if column not in (PERPLEXITY, "average")]
    return _against_ratio(
        records, name, columns, f"Score of each task against the fraction of {removed_part(records)} removed."
    )


def _against_ratio(records: Sequence[Record], name: str, columns: Sequence[str], caption: str) -> Picture | None:
    methods = ordered(record["method"] for record in records)
    rows = [
        (column, record["method"], record["recipe"].get("ratio", 0.0), record["recipe"].get("seed", ""), value)
        for record in sorted(records, key=lambda record: record["id"])
        for column in columns
        if (value := measures(record).get(column)) is not None
    ]
    if not rows:
        return None
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    drawn = figure(4.4 * across + 1.9, 3.6 * down)
    axes = drawn.subplots(down, across, squeeze=False).flat
    for axis, column in itertools.zip_longest(axes, columns):
        if column is None:
            axis.set_axis_off()
            continue
        for method in methods:
            _curve(axis, [row for row in rows if row[0] == column and row[1] in (method, ORIGINAL)], method, methods)
        if column == PERPLEXITY:
            log_axis(axis)
        axis.set(title=TITLES.get(column, column), xlabel=f"{removed_part(records)} removed")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axis.set_xticks(sorted({row[2] for row in rows}))
        axis.grid(alpha=0.25)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", frameon=False)
    header = ("column", "method", "ratio", "seed", "value")
    return Picture(name, caption, png(drawn), header, rows)


def _curve(axis: Any, rows: list[tuple[Any, ...]], method: str, methods: Sequence[str]) -> None:
    """One method: seeds as points, a band from the lowest to the highest, a line through the means."""
    values: dict[float, list[float]] = {}
    for _, _, ratio, _, value in rows:
        if math.isfinite(value):
            values.setdefault(ratio, []).append(value)
    look = style(method, methods)
    ratios = sorted(values)
    axis.plot(ratios, [statistics.fmean(values[r]) for r in ratios], label=method, markersize=5, linewidth=1.5, **look)
    axis.fill_between(
        ratios, [min(values[r]) for r in ratios], [max(values[r]) for r in ratios], color=look["color"], alpha=0.15
    )
    for ratio, found in values.items():
        if len(found) > 1:
            axis.plot([ratio] * len(found), found, ".", color=look["color"], markersize=4, alpha=0.7)


def cost(records: Sequence[Record], name: str) -> Picture | None:
    """Time and memory of each method, mean over its runs."""
    methods = ordered(record["method"] for record in records)
    costs = {method: _cost([r for r in records if r["method"] == method]) for method in methods}
    rows = [(method, *costs[method]) for method in methods]
    if not rows:
        return None
    drawn = figure(11.5, 0.42 * len(rows) + 1.5)
    panels = (("scoring pass", "s"), ("scoring, peak memory", "GB"), ("evaluation", "s"))
    for place, (axis, (title, unit)) in enumerate(zip(drawn.subplots(1, 3, sharey=True), panels, strict=True)):
        values = [0.0 if math.isnan(costs[m][place]) else costs[m][place] for m in methods]
        bars = axis.barh(methods, values, color=[style(m, methods)["color"] for m in methods], alpha=0.85)
        axis.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3)
        axis.set(title=f"{title} ({unit})", xlim=(0, max(values) * 1.22 or 1))
        axis.grid(axis="x", alpha=0.25)
    drawn.axes[0].invert_yaxis()
    caption = (
        "Time and memory, mean over runs. Methods that read the same statistics of the same tokens share one scoring "
        "pass, whose whole time each of them shows; weights-only methods need none over the text."
    )
    return Picture(name, caption, png(drawn), ("method", "score_s", "score_peak_gb", "evaluate_s"), rows)


def _cost(records: Sequence[Record]) -> tuple[float, float, float]:
    def mean(value: Callable[[Record], float]) -> float:
        return statistics.fmean(value(record) for record in records)

    return (
        mean(lambda r: r["seconds"].get("score", math.nan)),
        mean(lambda r: max(r["memory"].get("score", {}).values(), default=math.nan) / 1e9),
        mean(lambda r: r["seconds"].get("evaluate", math.nan)),
    )
