"""The same ratio everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dicer.ask.axes import AXES, kind_name
from dicer.decide.amounts.prunable import TOLERANCE, Bounds, Prunable, allowed_widths, most, step_cost, too_much, total
from dicer.errors import RecipeError


def legal(width: int, ratio: float, multiple: int) -> int:
    """How many units stay of ``width`` when the fraction ``ratio`` goes.

    K = round(width * (1 - ratio)), then the nearest multiple of ``multiple`` that is not more than ``width``
    (docs/methods.md).

    Raises:
        RecipeError: when no unit would stay.
    """
    keep = round(width * (1 - ratio))
    if multiple > 1:
        keep = min(round(keep / multiple), width // multiple) * multiple
    if keep < 1:
        of = f" in multiples of {multiple}" if multiple > 1 else ""
        raise RecipeError(
            f"ratio {ratio} leaves no neuron of {width}{of}: ask for a smaller --ratio or a smaller --width-multiple."
        )
    return keep


def uniform_units(sub_layers: Sequence[Prunable], ratio: float, bounds: Bounds) -> list[int]:
    """The same ratio everywhere: one width for all MLP sub-layers, and attention on the average over the layers.

    A layer has so few heads that rounding each by itself would miss the ratio by far (20% of three would be 33% in
    every layer), so the rounding error is carried from layer to layer, as a line is drawn on a grid (Bresenham 1965).

    Args:
        sub_layers: [M], in any order.
        ratio: fraction that goes.
        bounds: what to keep to; the drop threshold is for allocations that differ between sub_layers.

    Returns:
        K [M].

    Raises:
        RecipeError: for a ratio that the bounds do not allow, or that leaves no neuron.
    """
    if ratio > bounds.max_ratio + TOLERANCE:
        raise RecipeError(f"ratio {ratio} is more than the {bounds.max_ratio} that any may lose (--max-ratio).")
    for axis in AXES:
        _check_reach([sub_layer for sub_layer in sub_layers if kind_name(sub_layer.axis) == axis], ratio, bounds)
    keep, line, gone = [0] * len(sub_layers), 0.0, 0
    widest = max((sub_layer.units for sub_layer in sub_layers if sub_layer.kind.rounds_each_layer), default=0)
    few = []
    for place in sorted(range(len(sub_layers)), key=lambda place: sub_layers[place].layer):
        sub_layer, widths = sub_layers[place], allowed_widths(sub_layers[place], bounds)
        if sub_layer.kind.rounds_each_layer:
            narrow = sub_layer.units < widths.step <= widest  # has no multiple, but others do
            wanted = sub_layer.units if narrow else legal(sub_layer.units, ratio, widths.step)
            keep[place] = min(max(wanted, widths[0]), widths[-1])
            continue
        few.append(place)
        line += sub_layer.units * ratio
        keep[place] = max(sub_layer.units - math.floor(line - gone + 0.5 + TOLERANCE), widths[0])
        gone += sub_layer.units - keep[place]
    while line - gone + TOLERANCE >= 0.5:  # the last layers could not give their part, so those that have most give it
        able = [place for place in few if keep[place] > allowed_widths(sub_layers[place], bounds)[0]]
        if not able:
            break
        keep[max(able, key=lambda place: keep[place] / sub_layers[place].units)] -= 1
        gone += 1
    return keep


def _check_reach(sub_layers: Sequence[Prunable], ratio: float, bounds: Bounds) -> None:
    """That sub-layers of one axis can lose the ratio: each within a step of rounding, or attention in half a unit."""
    stays, steps = replace(bounds, drop_threshold=None), [step_cost(sub_layer, bounds) for sub_layer in sub_layers]
    alone = bool(sub_layers) and sub_layers[0].kind.rounds_each_layer
    rounding = sum(steps) if alone else max(steps, default=0) / 2
    if ratio * total(sub_layers) > most(sub_layers, stays) + rounding:
        what = f"parameters of {sub_layers[0].kind.units}"
        why = "within the bounds" + ("" if alone else ", every layer keeping one")
        raise too_much(ratio * total(sub_layers), most(sub_layers, stays), total(sub_layers), what, why)
