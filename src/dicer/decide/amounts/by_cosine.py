"""Ratios from how much a layer turns the hidden state: less from those that turn it more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dicer.decide.amounts.by_entropy import water_fill
from dicer.decide.amounts.prunable import Bounds, Prunable, allowed_widths, total

LOW, HIGH = 0.5, 1.5  # of the mean ratio


def cosine_ratios(
    sub_layers: Sequence[Prunable], turning: Mapping[int, float], target: float, bounds: Bounds
) -> list[float]:
    """Ratios in proportion to ``1 / (1 - cos)``, each from 0.5 to 1.5 of the mean (as in FANG, Ren et al. 2026).

    Args:
        sub_layers: [M].
        turning: layer -> mean of 1 - cos of its input and output, from 0.
        target: parameters that go.
        bounds: what to keep to.

    Returns:
        [M], fractions that go.

    Raises:
        RecipeError: a target out of reach.
    """
    mean = target / total(sub_layers)
    limit = np.array([1 - allowed_widths(sub_layer, bounds)[0] / sub_layer.units for sub_layer in sub_layers])
    weights = 1 / np.array([max(turning[sub_layer.layer], 1e-12) for sub_layer in sub_layers])
    sizes = np.array([sub_layer.parameters for sub_layer in sub_layers], dtype=np.float64)
    low, high = np.minimum(LOW * mean, limit), np.minimum(max(HIGH * mean, LOW * mean), limit)
    if target > high @ sizes:  # the bounds of single layers leave the others more than 1.5 of the mean
        high = limit
    return [float(ratio) for ratio in water_fill(weights, sizes, target, low, high)]
