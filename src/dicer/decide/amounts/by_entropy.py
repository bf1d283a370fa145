"""What fraction of each sub-layer goes: water-filling by transfer entropy, and sub-layers that go whole.

:func:`dicer.decide.amounts.rounding.whole_units` makes whole units of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicer.decide.amounts.prunable import TOLERANCE, Bounds, Prunable, allowed_widths, most, too_much, total
from dicer.errors import RecipeError, unknown
from dicer.model.units import SubLayer

Floats = NDArray[np.float64]
Spread = Callable[[Floats, Floats], Floats]  # (lowest, highest ratio of each sub-layer [M]) -> ratios [M]


def _sizes(parameters: Sequence[float]) -> Floats:
    return np.asarray(parameters, dtype=np.float64)


def water_fill(weights: Floats, sizes: Floats, target: float, low: Floats, high: Floats) -> Floats:
    """Ratios in proportion to weights, clipped, that take exactly the target: p_m = clip(s * weight_m, low_m, high_m).

    What clipped sub-layers cannot give is spread over the others; those of weight 0 give, equally, only what is left
    when all others are at their highest.

    Args:
        weights: [M], from 0.
        sizes: [M], P_m in parameters.
        target: sum of p_m P_m, in parameters.
        low: [M], the least that goes of each, fractions.
        high: [M], the most.

    Returns:
        p [M].

    Raises:
        RecipeError: when not even the highest ratios together reach the target.
    """
    if target > high @ sizes * (1 + TOLERANCE):
        raise too_much(target, float(high @ sizes), float(sizes.sum()))
    first = weights > 1e-200 * weights.max(initial=0)  # below, s would overflow
    if target < high[first] @ sizes[first] + low[~first] @ sizes[~first]:
        level, ratios = first, low.copy()
    else:
        level, ratios, weights = ~first, high.copy(), np.ones_like(weights)
    rest = target - ratios[~level] @ sizes[~level]
    ratios[level] = _level(weights[level] / weights.max(), sizes[level], rest, low[level], high[level])
    return ratios


def _level(weights: Floats, sizes: Floats, target: float, low: Floats, high: Floats) -> Floats:
    """Ratios at the s that takes the target: what goes is linear in s between the places where one is clipped."""
    if not len(weights):
        return low
    bends = np.unique(np.concatenate([low / weights, high / weights]))  # [B]
    gone = np.maximum.accumulate(np.clip(bends[:, None] * weights, low, high) @ sizes)  # [B]
    ratios: Floats = np.clip(np.interp(target, gone, bends) * weights, low, high)
    return ratios


def _linear(importances: Floats) -> Floats:
    spread = np.ptp(importances)
    return 1 - (importances - importances.min()) / spread if spread > 0 else np.ones_like(importances)


def _softmax(importances: Floats) -> Floats:
    return np.exp(-standard(importances))


def _rank(importances: Floats) -> Floats:
    from scipy.stats import rankdata  # which takes long to import

    ranks: Floats = rankdata(importances) - 1  # [M], ties averaged
    return 1 - ranks / max(len(importances) - 1, 1)


def standard(values: Floats) -> Floats:
    """z-scores; zeros where all values are equal, whatever the rounding of their mean."""
    from scipy.stats import zscore  # which takes long to import

    scores: Floats = zscore(values) if np.ptp(values) > 0 else np.zeros_like(values)
    return scores if np.isfinite(scores).all() else np.zeros_like(values)


SCHEDULES: Mapping[str, tuple[str, Callable[[Floats], Floats]]] = MappingProxyType(
    {
        "linear": ("falls linearly with importance, the highest gives nothing (docs/what-to-prune.md)", _linear),
        "softmax": ("exp(-z), z the standardised importance: all give something (our own)", _softmax),
        "rank": ("falls linearly with the rank, so one outlier does not flatten the rest (our own)", _rank),
    }
)

SPLITS: Mapping[str, str] = MappingProxyType(
    {
        "share": "weights 1 - TE / sum of TE in the block",
        "model": "weights 1 - TE normalised to 0..1 over all sub-layers of the model",
        "equal": "attention and MLP of a block give the same fraction",
        "module": "no blocks: every sub-layer by its own TE (our own)",
    }
)


def weights_of(importances: Sequence[float], schedule: str) -> list[float]:
    """How readily each gives: higher importance, lower weight.

    Args:
        importances: [M], finite; e.g. transfer entropy in nats.
        schedule: a name in ``SCHEDULES``.

    Raises:
        RecipeError: for an unknown schedule or an importance that is not finite.
    """
    if schedule not in SCHEDULES:
        raise RecipeError(unknown("schedule", schedule, SCHEDULES))
    if not np.isfinite(importances).all():
        raise RecipeError("an importance is not finite, so it gives no ratio: try --dtype float32 or another text.")
    return [float(weight) for weight in SCHEDULES[schedule][1](np.asarray(importances, dtype=np.float64))]


def entropy_ratios(
    sub_layers: Sequence[Prunable],
    te: Mapping[SubLayer, float],
    block_te: Mapping[int, float] | None,
    target: float,
    bounds: Bounds,
    schedule: str = "linear",
    split: str = "share",
) -> list[float]:
    """Ratios from transfer entropy: over blocks first, then inside each block (docs/what-to-prune.md).

    One level, each sub-layer by its own transfer entropy, where there is only one axis or no ``block_te``.

    Args:
        sub_layers: [M].
        te: sub-layer -> transfer entropy, from 0.
        block_te: layer -> transfer entropy of the whole block.
        target: parameters that go.
        bounds: what to keep to.
        schedule: a name in ``SCHEDULES``; for blocks, or for sub-layers where there is one level.
        split: a name in ``SPLITS``; how a block's ratio is shared out inside.

    Raises:
        RecipeError: for unknown names, a missing or bad transfer entropy, a target out of reach.
    """
    if split not in SPLITS:
        raise RecipeError(unknown("split", split, SPLITS))
    own = [_checked(te, sub_layer.place) for sub_layer in sub_layers]
    sizes = _sizes([sub_layer.parameters for sub_layer in sub_layers])
    if block_te is None or split == "module" or len({sub_layer.axis for sub_layer in sub_layers}) == 1:
        weights = np.array(weights_of(own, schedule))
        return drop(sub_layers, lambda low, high: water_fill(weights, sizes, target, low, high), target, bounds)
    layers = np.array([sub_layer.layer for sub_layer in sub_layers])
    blocks = [(layers == layer).nonzero()[0] for layer in np.unique(layers)]
    block_weights = np.array(weights_of([_checked(block_te, int(layers[block[0]])) for block in blocks], schedule))
    inside = _inside(np.array(own), blocks, split)

    def spread(low: Floats, high: Floats) -> Floats:
        gone = [np.array([values[b] @ sizes[b] for b in blocks]) for values in (low, high, np.ones_like(low))]
        whole = water_fill(block_weights, gone[2], target, gone[0] / gone[2], gone[1] / gone[2]) * gone[2]
        ratios = np.empty_like(low)
        for block, part in zip(blocks, whole, strict=True):
            ratios[block] = water_fill(inside[block], sizes[block], part, low[block], high[block])
        return ratios

    return drop(sub_layers, spread, target, bounds)


def _checked(te: Mapping[Any, float], key: SubLayer | int) -> float:
    found = te.get(key)
    if found is None or not 0 <= found < float("inf"):
        where = f"block {key}" if isinstance(key, int) else f"{key.axis} in layer {key.layer}"
        raise RecipeError(f"the transfer entropy of {where} is {found}, not a number from 0: measure it again.")
    return float(found)


def _inside(own: Floats, blocks: Sequence[NDArray[np.int64]], split: str) -> Floats:
    """Weights that share out a block's ratio inside, [M]; two sub-layers by min-max would be all or nothing."""
    if split == "model":
        return _linear(own)
    weights = np.ones_like(own)
    if split == "share":
        for block in blocks:
            whole = own[block].sum()
            weights[block] = 1 - own[block] / whole if whole > 0 else 1.0
    return weights


def drop(sub_layers: Sequence[Prunable], spread: Spread, target: float, bounds: Bounds) -> list[float]:
    """Ratios within the bounds, with sub-layers removed whole where their ratio reaches the drop threshold.

    One at a time, the highest ratio first, the rest spread again after each: what a dropped sub-layer gives beyond its
    ratio, the others need not give. One too large for the target stays, clipped as any other.

    Args:
        sub_layers: [M].
        spread: gives ratios between two bounds, parameter-weighted mean the target's.
        target: parameters that go.
        bounds: what to keep to; without ``drop_threshold`` nothing is removed whole.

    Returns:
        [M]; 1 for a sub-layer that goes whole.

    Raises:
        RecipeError: for a target out of reach, or where no sub-layer would stay.
    """
    limit = np.array([1 - allowed_widths(sub_layer, bounds)[0] / sub_layer.units for sub_layer in sub_layers])
    if bounds.drop_threshold is None:
        return [float(ratio) for ratio in spread(np.zeros_like(limit), limit)]
    if target > most(sub_layers, bounds) * (1 + TOLERANCE):
        raise too_much(target, most(sub_layers, bounds), total(sub_layers))
    sizes, gone = _sizes([sub_layer.parameters for sub_layer in sub_layers]), np.zeros(len(sub_layers), dtype=np.bool_)
    while True:
        fits = ~gone & (sizes[gone].sum() + sizes <= target * (1 + TOLERANCE))
        # A sub-layer that may still go whole has no other bound yet: else three heads, of which one must stay while the
        # layer does, would never reach a threshold of 0.8.
        wanted = spread(gone.astype(np.float64), np.where(gone | fits, 1.0, limit))
        reaches = fits & (wanted >= bounds.drop_threshold)
        if not reaches.any():
            return [float(ratio) for ratio in spread(gone.astype(np.float64), np.where(gone, 1.0, limit))]
        gone[np.argmax(np.where(reaches, wanted, -1))] = True
