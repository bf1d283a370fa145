"""Every figure of a setting: quality against ratio, cost, and what each layer keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from dicer.study.record import Done, Pruned
from dicer.study.report.figure_style import COLOURS, Picture, figure, ordered, png
from dicer.study.report.figures_layers import allocation, norms, overlap, overlap_by_layer
from dicer.study.report.figures_quality import quality, tasks
from dicer.study.report.settings import pruned


def pictures(records: Sequence[Done], name: str) -> list[Picture]:
    """Every figure of one setting that its records have the numbers for.

    Args:
        records: of one setting, the original model among them.
        name: what file names begin with.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    runs = pruned(records)
    if not runs:
        return []
    removed = removed_part(runs)
    made = [quality(records, f"{name}-quality", removed), tasks(records, f"{name}-tasks", removed)]
    for ratio in sorted({record.recipe.ratio for record in runs}):
        chosen = one_each(runs, ratio)
        percent = f"{ratio * 100:g}"
        made.append(overlap(chosen, f"{name}-overlap-{percent}"))
        made.append(overlap_by_layer(chosen, f"{name}-overlap-by-layer-{percent}"))
        made.append(norms(chosen, f"{name}-norms-{percent}"))
        made.append(allocation(chosen, f"{name}-allocation-{percent}"))
    made.append(cost(runs, f"{name}-cost"))
    return [picture for picture in made if picture is not None]


def removed_part(records: Iterable[Pruned]) -> str:
    """What the ratios of all records are fractions of."""
    asked = {(record.recipe.ratio_of, record.recipe.axis or "mlp") for record in records if record.recipe.ratio}
    wholes = {whole for whole, _ in asked}
    if asked <= {("chosen", "mlp")}:
        return "neurons"
    return f"{wholes.pop()} parameters" if len(wholes) == 1 and wholes != {"chosen"} else "what was asked for"


def one_each(records: Iterable[Pruned], ratio: float) -> dict[str, Pruned]:
    """Method -> its run with the lowest seed that most methods have, so that like is held against like."""
    members = [record for record in records if record.recipe.ratio == ratio]
    seeds = [record.recipe.seed for record in members]
    common = sorted(set(seeds), key=lambda seed: (-seeds.count(seed), seed))
    found: dict[str, Pruned] = {}
    for record in sorted(members, key=lambda record: common.index(record.recipe.seed)):
        found.setdefault(record.method, record)
    return {method: found[method] for method in ordered(found)}


def cost(records: Sequence[Pruned], name: str) -> Picture:
    """Time and memory of each method, mean over its runs."""
    methods = ordered(record.method for record in records)
    costs = {method: _cost([r for r in records if r.method == method]) for method in methods}
    rows = [(method, *costs[method]) for method in methods]
    drawn = figure(11.5, 0.36 * len(rows) + 1.3)
    panels = (("scoring pass", "s"), ("scoring, peak memory", "GB"), ("evaluation", "s"))
    for place, (axis, (title, unit)) in enumerate(zip(drawn.subplots(1, 3, sharey=True), panels, strict=True)):
        values = [0.0 if math.isnan(costs[m][place]) else costs[m][place] for m in methods]
        bars = axis.barh(methods, values, color=COLOURS[0], alpha=0.85)
        axis.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3)
        axis.set(title=f"{title} ({unit})", xlim=(0, max(values) * 1.22 or 1))
        axis.grid(axis="x", alpha=0.25)
    drawn.axes[0].invert_yaxis()
    drawn.axes[0].margins(y=0.02)
    caption = (
        "Time and memory, mean over runs. Methods that read the same statistics of the same tokens share one scoring "
        "pass, whose whole time each of them shows; weights-only methods need none over the text."
    )
    return Picture(name, caption, png(drawn), ("method", "score_s", "score_peak_gb", "evaluate_s"), rows)


def _cost(records: Sequence[Pruned]) -> tuple[float, float, float]:
    peaks = [max(record.memory.score.values(), default=math.nan) / 1e9 for record in records]
    score, evaluate = ([r.seconds.get(stage, math.nan) for r in records] for stage in ("score", "evaluate"))
    return statistics.fmean(score), statistics.fmean(peaks), statistics.fmean(evaluate)
