"""Allocations that rank: all units of all sub-layers together, or whole blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dicer.decide.amounts.by_entropy import standard
from dicer.decide.amounts.prunable import TOLERANCE, Bounds, Prunable, allowed_widths, most, too_much, total
from dicer.errors import RecipeError


def global_units(sub_layers: Sequence[Prunable], scores: Sequence[Tensor], target: float, bounds: Bounds) -> list[int]:
    """One ranking of all units by their z-score in the sub-layer; the lowest go (AL-AM of FLAP, An et al., AAAI 2024).

    With a multiple, neurons go in such packs, ranked by their mean. Where a sub-layer has lost the drop threshold's
    fraction, the rest goes at that place of the ranking, unless that is more than the target; then it stays, clipped.

    Args:
        sub_layers: [M].
        scores: [M] of float [N_m], higher = keep, any scale.
        target: parameters that go; met within half of a unit (of a pack).
        bounds: what to keep to.

    Returns:
        K [M]. Equal z-scores go from lower layers, attention before MLP.

    Raises:
        RecipeError: for a target out of reach, or scores that are not finite.
    """
    order = sorted(range(len(sub_layers)), key=lambda m: sub_layers[m].place)
    ranked = [_ascending(sub_layer, values) for sub_layer, values in zip(sub_layers, scores, strict=True)]
    cost = np.array([sub_layer.unit_parameters for sub_layer in sub_layers])
    forced = np.array([sub_layer.units - allowed_widths(sub_layer, bounds)[-1] for sub_layer in sub_layers])
    if target > most(sub_layers, bounds) * (1 + TOLERANCE):
        raise too_much(target, most(sub_layers, bounds), total(sub_layers))
    may_drop = np.full(len(sub_layers), bounds.drop_threshold is not None)
    while True:
        pieces = [_pieces(sub_layers[m], ranked[m], bounds, bool(may_drop[m])) for m in order]
        owner = np.repeat(order, [len(keys) for keys, _ in pieces])
        units = np.concatenate([sizes for _, sizes in pieces])
        lowest = np.argsort(np.concatenate([keys for keys, _ in pieces]), kind="stable")
        owner, units = owner[lowest], units[lowest]
        gone = forced @ cost + np.concatenate([[0], np.cumsum(units * cost[owner])])  # after so many pieces
        if target > gone[-1] * (1 + TOLERANCE):
            raise too_much(target, float(gone[-1]), total(sub_layers))
        last = min(int(np.searchsorted(gone, target)), len(lowest))  # so many reach the target
        too_large = _drops(owner, may_drop) & (units * cost[owner] > target * (1 + TOLERANCE) - gone[max(last - 1, 0)])
        too_large[: max(last - 1, 0)] = False
        if last and too_large[last - 1]:
            may_drop[owner[too_large]] = False
            continue
        taken = last - 1 if last and target - gone[last - 1] <= gone[last] - target else last
        lost = np.bincount(owner[:taken], weights=units[:taken], minlength=len(sub_layers))
        return [m.units - int(f) - int(n) for m, f, n in zip(sub_layers, forced, lost, strict=True)]


def _ascending(sub_layer: Prunable, scores: Tensor) -> NDArray[np.float64]:
    """z-scores, ascending [N]; zeros where all are equal, whatever the rounding of their mean."""
    values = np.sort(scores.detach().double().cpu().numpy())
    if not np.isfinite(values).all():
        raise RecipeError(f"scores of {sub_layer.place} are not finite, so have no rank: try --dtype float32.")
    return standard(values)


def _pieces(
    sub_layer: Prunable, ranked: NDArray[np.float64], bounds: Bounds, may_drop: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What goes at once, in this order: (place in the ranking, units), the last piece the rest if it may go whole."""
    widths = allowed_widths(sub_layer, bounds)
    start, steps, keys = sub_layer.units - widths[-1], len(widths) - 1, ranked[:0]
    if may_drop and bounds.drop_threshold is not None:
        edge = max(math.ceil(sub_layer.units * bounds.drop_threshold - TOLERANCE), 1)  # so many units gone reach it
        steps = min(steps, max(edge - 1 - start, 0) // widths.step)
        keys = ranked[edge - 1 : edge]
    end = start + steps * widths.step
    keys = np.concatenate([ranked[start:end].reshape(-1, widths.step).mean(1), keys])
    sizes = np.full(len(keys), widths.step)
    sizes[steps:] = sub_layer.units - end
    return np.maximum.accumulate(keys), sizes  # a mean may round to more than its largest


def _drops(owner: NDArray[np.int64], may_drop: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pieces of the ranking are the rest of a sub-layer that goes whole: its last one."""
    last = np.full(len(may_drop), -1)
    last[owner] = np.arange(len(owner))  # the last of equal places is what remains
    found = np.zeros(len(owner), dtype=np.bool_)
    found[last[may_drop & (last >= 0)]] = True
    return found


def block_removal(
    te_blocks: Sequence[float], parameters: Sequence[int], target: float, *, all_may_go: bool = False
) -> list[int]:
    """Blocks to remove whole, lowest transfer entropy first, until what goes is nearest to the target.

    Args:
        te_blocks: [L], transfer entropy of each block; equal ones go from the lowest number up.
        parameters: [L].
        target: parameters that go.
        all_may_go: there are others than these, so that none of them has to stay.

    Returns:
        Sorted block numbers.

    Raises:
        RecipeError: where the nearest is more than half a block away, or an entropy is not a number.
    """
    if np.isnan(te_blocks).any():
        raise RecipeError("the transfer entropy of a block is not a number: measure it again.")
    order = np.argsort(te_blocks, kind="stable")[: None if all_may_go else -1]
    gone = np.cumsum([0, *np.asarray(parameters)[order]])  # [L]
    nearest = int(np.argmin(np.abs(gone - target)))
    if abs(int(gone[nearest]) - target) > max(parameters) / 2:
        raise too_much(target, int(gone[-1]), sum(parameters))
    return sorted(order[:nearest].tolist())
