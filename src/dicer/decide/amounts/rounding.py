"""From ratios to whole units that add up to the target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dicer.decide.amounts.prunable import TOLERANCE, Bounds, Prunable, allowed_widths, most, step_cost, too_much, total
from dicer.errors import RecipeError


def whole_units(sub_layers: Sequence[Prunable], ratios: Sequence[float], bounds: Bounds, target: float) -> list[int]:
    """Kept units from ratios by largest remainders: all rounded to keep more, then those nearest to losing one more.

    Where parameters per unit differ, the larger units are rounded first and the smaller take up what they miss. No
    sub-layer moves by more than one unit (one multiple) from its ratio, also where the bounds clip another.

    Args:
        sub_layers: [M].
        ratios: [M], fractions that go; 1 is removed whole if ``drop_threshold`` is set.
        bounds: what to keep to.
        target: parameters that go; met within half of the largest step where ratios within the bounds add up to it.

    Returns:
        K [M]. Of sub-layers with the same remainder, evenly spread ones lose one more.

    Raises:
        RecipeError: for a target more than one step out of reach, or where no sub-layer would stay.
    """
    whole = [bounds.drop_threshold is not None and ratio >= 1 for ratio in ratios]
    if all(whole):
        raise RecipeError("a ratio of 1 everywhere removes every sub-layer whole: ask for less.")
    costs = [step_cost(sub_layer, bounds) for sub_layer in sub_layers]
    if target > most(sub_layers, bounds) + max(costs):
        raise too_much(target, most(sub_layers, bounds), total(sub_layers))
    widths = [range(0, 1) if gone else allowed_widths(m, bounds) for m, gone in zip(sub_layers, whole, strict=True)]
    exact = [
        min(max((w[-1] - m.units * (1 - ratio)) / w.step, 0), len(w) - 1)
        for m, w, ratio in zip(sub_layers, widths, ratios, strict=True)
    ]  # [M], steps below the largest width
    steps = [math.floor(x + TOLERANCE) for x in exact]
    rest = [x - step for x, step in zip(exact, steps, strict=True)]
    missing = target - sum((m.units - w[-1]) * m.unit_parameters for m, w in zip(sub_layers, widths, strict=True))
    missing -= sum(x * cost for x, cost in zip(exact, costs, strict=True))
    for cost in sorted(set(costs), reverse=True):
        alike = [place for place, x in enumerate(rest) if costs[place] == cost and x > TOLERANCE]
        missing += cost * sum(rest[place] for place in alike)
        order = sorted(range(len(alike)), key=lambda i: (-round(rest[alike[i]], 9), _scattered(i)))
        more = min(max(math.ceil(missing / cost - 0.5 - TOLERANCE), 0), len(alike))
        for i in order[:more]:
            steps[alike[i]] += 1
        missing -= cost * more
    return [w[-1] - step * w.step for w, step in zip(widths, steps, strict=True)]


def _scattered(place: int) -> float:
    """Places in an order of which every beginning is evenly spread: the bits mirrored at the point (van der Corput)."""
    return math.ldexp(int(f"{place:b}"[::-1], 2), -place.bit_length())
