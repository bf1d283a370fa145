"""Figures of what methods keep in each layer: how far they agree, and how active it is."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dicer.study.record import Mask, Pruned
from dicer.study.report.figure_style import COLOURS, Picture, figure, log_axis, png

_PAIRS = 55  # of eleven methods; nobody can read more lines


def _kept(record: Pruned) -> dict[int, Mask]:
    return {int(i): layer.mask for i, layer in record.layers.items()}


def _jaccard(a: Any, b: Any) -> float:
    """Of two masks; NaN where a method lacks the layer, 1 where both keep nothing of it."""
    if a is None or b is None or len(a) != len(b):
        return math.nan
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def overlap(chosen: dict[str, Pruned], name: str) -> Picture | None:
    """How far two methods keep the same neurons, mean over layers."""
    methods = [method for method in chosen if chosen[method].layers]
    if len(methods) < 2:
        return None
    kept = {method: _kept(chosen[method]) for method in methods}
    matrix = np.array([[_mean_jaccard(kept[a], kept[b]) for b in methods] for a in methods])
    many = len(methods) > 12
    drawn = figure((0.55 if many else 0.9) * len(methods) + 3.2, (0.36 if many else 0.6) * len(methods) + 1.9)
    axis = drawn.subplots()
    _heat(drawn, axis, matrix, methods, methods)
    middle = (_lowest(matrix) + 1.0) / 2
    for i, j in itertools.product(range(len(methods)), repeat=2):
        colour = "white" if matrix[i, j] < middle + 0.05 else "black"  # on the dark and on the bright half of the map
        axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8 if many else 10)
    rows = [(a, b, float(matrix[i, j])) for i, a in enumerate(methods) for j, b in enumerate(methods)]
    caption = f"Overlap of the kept neurons (Jaccard index, mean over layers; {_chance(kept[methods[0]])})."
    return Picture(name, caption, png(drawn), ("method", "other", "jaccard"), rows)


def _mean_jaccard(a: dict[int, Any], b: dict[int, Any]) -> float:
    both = [value for i in a if not math.isnan(value := _jaccard(a[i], b.get(i)))]
    return statistics.fmean(both) if both else math.nan


def _chance(kept: dict[int, Any]) -> str:
    """Two independent draws of K of N share about K^2/N."""
    fraction = float(np.mean([mask.mean() for mask in kept.values()]))
    return f"two independent random choices have about {fraction / (2 - fraction):.2f}"


def overlap_by_layer(chosen: dict[str, Pruned], name: str) -> Picture | None:
    """The same for every pair of methods and every layer."""
    kept = {method: _kept(record) for method, record in chosen.items() if record.layers}
    pairs = list(itertools.combinations(kept, 2))
    if not 0 < len(pairs) <= _PAIRS:
        return None
    layers = sorted(set.union(*(set(masks) for masks in kept.values())))
    matrix = np.array([[_jaccard(kept[a].get(i), kept[b].get(i)) for i in layers] for a, b in pairs])
    drawn = figure(0.28 * len(layers) + 4.6, 0.24 * len(pairs) + 1.6)
    axis = drawn.subplots()
    _heat(drawn, axis, matrix, [f"{a} / {b}" for a, b in pairs], [str(i) for i in layers], turn=len(layers) > 40)
    axis.set_xlabel("layer")
    rows = [(a, b, i, float(matrix[p, q])) for p, (a, b) in enumerate(pairs) for q, i in enumerate(layers)]
    caption = f"Overlap of the kept neurons in each layer (Jaccard index; {_chance(next(iter(kept.values())))})."
    return Picture(name, caption, png(drawn), ("method", "other", "layer", "jaccard"), rows)


def _lowest(matrix: Any) -> float:
    return min([0.9, *(math.floor(float(value) * 10) / 10 for value in matrix.flat if not math.isnan(value))])


def _heat(drawn: Any, axis: Any, matrix: Any, down: Sequence[str], across: Sequence[str], turn: bool = True) -> None:
    image = axis.imshow(matrix, cmap="cividis", vmin=_lowest(matrix), vmax=1.0, aspect="auto")
    axis.set_yticks(range(len(down)), down)
    axis.set_xticks(range(len(across)), across, rotation=40 if turn else 0, ha="right" if turn else "center")
    drawn.colorbar(image, ax=axis, label="Jaccard index", fraction=0.05)


def _title_size(method: str) -> float:
    """Long names would run into the next panel's."""
    return 11 if len(method) < 28 else 8


def norms(chosen: dict[str, Pruned], name: str) -> Picture | None:
    """Mean activation norm of kept and of dropped neurons in each layer."""
    rows = [
        (method, int(i), layer.norm.kept, layer.norm.dropped)
        for method, record in chosen.items()
        for i, layer in sorted(record.layers.items(), key=lambda item: int(item[0]))
        if layer.norm
    ]
    methods = list(dict.fromkeys(row[0] for row in rows))
    if not rows:
        return None
    across = min(4, len(methods))
    down = math.ceil(len(methods) / across)
    drawn = figure(3.0 * across + 0.4, 2.4 * down + 0.4)
    axes = drawn.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axis, method in itertools.zip_longest(axes.flat, methods):
        if method is None:
            axis.set_axis_off()
            continue
        own = [row for row in rows if row[0] == method]
        for place, label, colour, marker in ((2, "kept", COLOURS[0], "o"), (3, "dropped", COLOURS[1], "s")):
            points = [row[place] for row in own]
            axis.plot([row[1] for row in own], points, label=label, color=colour, marker=marker, markersize=3)
        axis.set_xlabel("layer")
        axis.set_title(method, fontsize=_title_size(method))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.25)
    log_axis(drawn.axes[0])  # all share it, and only now are its limits known
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    caption = "Mean L2 norm of the post activations over the calibration tokens, of kept and of dropped neurons."
    return Picture(name, caption, png(drawn), ("method", "layer", "kept", "dropped"), rows)


def allocation(chosen: dict[str, Pruned], name: str) -> Picture | None:
    """Where ratios differ between layers: how much of each module goes, and the transfer entropy that led to it."""
    rows = [row for method, record in chosen.items() for row in _allocated(method, record)]
    methods = [m for m in chosen if len({row[3] for row in rows if row[0] == m}) > 1]
    if not methods:
        return None
    across = min(3, len(methods))
    down = math.ceil(len(methods) / across)
    drawn = figure(4.4 * across, 2.5 * down + 0.4)
    for axis, method in itertools.zip_longest(drawn.subplots(down, across, squeeze=False).flat, methods):
        if method is None:
            axis.set_axis_off()
            continue
        beside = axis.twinx() if any(row[0] == method and row[4] is not None for row in rows) else None
        for place, part in enumerate(("attention", "mlp", "blocks")):
            own = [row for row in rows if row[:2] == (method, part)]
            if not own:  # no bars have no colour, and the legend would show another part's
                continue
            layers, look = [row[2] for row in own], {"color": COLOURS[place], "label": part}
            axis.bar([i + 0.28 * (place - 1) for i in layers], [row[3] for row in own], width=0.28, alpha=0.75, **look)
            told = [(row[2], row[4]) for row in own if row[4] is not None]
            if beside and told:
                beside.plot(*zip(*told, strict=True), ".-", color=COLOURS[place], markersize=4, linewidth=0.8)
        axis.set(xlabel="layer", ylabel="removed", ylim=(0, 1.05))
        axis.set_title(method, fontsize=_title_size(method))
        if beside:
            beside.set_ylabel("transfer entropy (line)")
        axis.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    named = {label: bars for axis in drawn.axes for bars, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawn.legend(named.values(), named.keys(), loc="outside upper right", ncols=len(named), frameon=False)
    caption = "Fraction of each layer's heads, neurons and of the layer itself that goes (bars), and transfer entropy."
    return Picture(name, caption, png(drawn), ("method", "part", "layer", "removed", "transfer_entropy"), rows)


def _allocated(method: str, record: Pruned) -> list[tuple[str, str, int, float, float | None]]:
    """(method, part, layer, fraction removed, transfer entropy) of every module that could go."""
    kept, told = record.kept, record.allocation.transfer_entropy
    entropy = {part: dict(enumerate(values)) for part, values in told.items()}
    axes = (("attention", kept.attention), ("mlp", kept.mlp))
    removed = {(axis, int(i)): 1 - k / n for axis, layers in axes for i, (n, k) in layers.items()}
    removed |= {("blocks", i): 0.0 for i in range(len(entropy.get("blocks", ())))}
    removed |= {("blocks", i): 1.0 for i in kept.blocks}
    return [(method, part, i, share, entropy.get(part, {}).get(i)) for (part, i), share in sorted(removed.items())]
