"""How many units of each module stay: the same ratio everywhere, or the ratios of transfer entropy or of a file.

A *ratio* is the fraction of a module that goes; :mod:`dicer.decide.amounts.by_entropy` has those of transfer entropy,
and :mod:`dicer.decide.amounts.by_rank` the allocations that rank units or blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dicer.errors import RecipeError, unknown
from dicer.model.units import AXES, legal

HAIR = 1e-9  # relative; what rounding may add to a sum of parameters


@dataclass(frozen=True)
class Module:
    """One sub-layer that units can be taken out of.

    Attributes:
        axis: ``attention`` or ``mlp``.
        layer: its number in the model.
        units: N, more than 0.
        unit_parameters: parameters that go with one unit.
    """

    axis: str
    layer: int
    units: int
    unit_parameters: int

    @property
    def parameters(self) -> int:
        """All that can go with the units."""
        return self.units * self.unit_parameters


@dataclass(frozen=True)
class Bounds:
    """What no allocation may break.

    Attributes:
        max_ratio: no module loses more than this fraction, unless it is removed whole.
        min_width: neurons that an MLP keeps if it stays; all of them if it has fewer. Heads have no such bound.
        drop_threshold: a module whose ratio reaches it is removed whole; None: no module ever is.
        multiple: kept widths of ``mlp`` are multiples of it, also where N is none (as :func:`.legal` does).
    """

    max_ratio: float = 1.0
    min_width: int = 1
    drop_threshold: float | None = None
    multiple: int = 1


def allowed_widths(module: Module, bounds: Bounds) -> range:
    """Widths that a module may have if it stays, ascending; only N where no multiple lies within the bounds."""
    step, floor = (bounds.multiple, bounds.min_width) if module.axis == "mlp" else (1, 1)
    least = max(1, min(floor, module.units), math.ceil(module.units * (1 - bounds.max_ratio) - HAIR))
    low, top = -(-least // step) * step, module.units // step * step
    return range(low, top + 1, step) if low <= top else range(module.units, module.units + 1, step)


def most(modules: Sequence[Module], bounds: Bounds) -> int:
    """The most parameters that can go; where modules may go whole, one still stays at its smallest width."""
    stays = [allowed_widths(module, bounds)[0] * module.unit_parameters for module in modules]
    return total(modules) - (sum(stays) if bounds.drop_threshold is None else min(stays))


def total(modules: Sequence[Module]) -> int:
    """Parameters of all modules together."""
    return sum(module.parameters for module in modules)


def too_much(
    target: float, possible: float, whole: float, what: str = "parameters", why: str = "within the bounds"
) -> RecipeError:
    """The error for a target out of reach; all three in parameters, of ``what``; ``why`` no more can go."""
    return RecipeError(
        f"{target:,.0f} of {whole:,.0f} {what} ({target / whole:.1%}) are to go, but at most {possible:,.0f} "
        f"({possible / whole:.1%}) can {why}: ask for less, or for wider bounds."
    )


def uniform_units(modules: Sequence[Module], ratio: float, bounds: Bounds) -> list[int]:
    """The same ratio everywhere: one width for all MLP modules, and attention on the average over the layers.

    A layer has so few heads that rounding each by itself would miss the ratio by far (20% of three would be 33% in
    every layer), so the rounding error is carried from layer to layer, as a line is drawn on a grid (Bresenham 1965).

    Args:
        modules: [M], in any order.
        ratio: fraction that goes.
        bounds: what to keep to; the drop threshold is for allocations that differ between modules.

    Returns:
        K [M].

    Raises:
        RecipeError: for a ratio that the bounds do not allow, or that leaves no neuron.
    """
    if ratio > bounds.max_ratio + HAIR:
        raise RecipeError(f"ratio {ratio} is more than the {bounds.max_ratio} that any module may lose: ask for less.")
    for axis in AXES:
        _check_reach([module for module in modules if module.axis == axis], ratio, bounds)
    keep, line, gone = [0] * len(modules), 0.0, 0
    widest = max((module.units for module in modules if module.axis == "mlp"), default=0)
    heads = []
    for place in sorted(range(len(modules)), key=lambda place: modules[place].layer):
        module, widths = modules[place], allowed_widths(modules[place], bounds)
        if module.axis == "mlp":
            narrow = module.units < bounds.multiple <= widest  # has no multiple, but others do
            wanted = module.units if narrow else legal(module.units, ratio, bounds.multiple)
            keep[place] = min(max(wanted, widths[0]), widths[-1])
            continue
        heads.append(place)
        line += module.units * ratio
        keep[place] = max(module.units - math.floor(line - gone + 0.5 + HAIR), widths[0])
        gone += module.units - keep[place]
    while line - gone + HAIR >= 0.5:  # the last layers could not give their part, so those that have most give it
        able = [place for place in heads if keep[place] > allowed_widths(modules[place], bounds)[0]]
        if not able:
            break
        keep[max(able, key=lambda place: keep[place] / modules[place].units)] -= 1
        gone += 1
    return keep


def _check_reach(modules: Sequence[Module], ratio: float, bounds: Bounds) -> None:
    """That modules of one axis can lose the ratio: each within a step of rounding, or attention in half a unit."""
    stays, steps = replace(bounds, drop_threshold=None), [_step_cost(module, bounds) for module in modules]
    rounding = sum(steps) if modules and modules[0].axis == "mlp" else max(steps, default=0) / 2
    if ratio * total(modules) > most(modules, stays) + rounding:
        heads = ("parameters of heads", "within the bounds, every layer keeping a key-value head")
        said = heads if modules[0].axis == "attention" else ("parameters of neurons",)
        raise too_much(ratio * total(modules), most(modules, stays), total(modules), *said)


def _step_cost(module: Module, bounds: Bounds) -> int:
    """Parameters between two neighbouring widths."""
    return allowed_widths(module, bounds).step * module.unit_parameters


def whole_units(modules: Sequence[Module], ratios: Sequence[float], bounds: Bounds, target: float) -> list[int]:
    """Kept units from ratios by largest remainders: all rounded to keep more, then those nearest to losing one more.

    Where parameters per unit differ, the larger units are rounded first and the smaller take up what they miss. No
    module moves by more than one unit (one multiple) from its ratio, also where the bounds clip another.

    Args:
        modules: [M].
        ratios: [M], fractions that go; 1 is removed whole if ``drop_threshold`` is set.
        bounds: what to keep to.
        target: parameters that go; met within half of the largest step where ratios within the bounds add up to it.

    Returns:
        K [M]. Of modules with the same remainder, evenly spread ones lose one more.

    Raises:
        RecipeError: for a target more than one step out of reach, or where no module would stay.
    """
    whole = [bounds.drop_threshold is not None and ratio >= 1 for ratio in ratios]
    if all(whole):
        raise RecipeError("a ratio of 1 everywhere removes every module whole: ask for less.")
    costs = [_step_cost(module, bounds) for module in modules]
    if target > most(modules, bounds) + max(costs):
        raise too_much(target, most(modules, bounds), total(modules))
    widths = [range(0, 1) if gone else allowed_widths(m, bounds) for m, gone in zip(modules, whole, strict=True)]
    exact = [
        min(max((w[-1] - m.units * (1 - ratio)) / w.step, 0), len(w) - 1)
        for m, w, ratio in zip(modules, widths, ratios, strict=True)
    ]  # [M], steps below the largest width
    steps = [math.floor(x + HAIR) for x in exact]
    rest = [x - step for x, step in zip(exact, steps, strict=True)]
    missing = target - sum((m.units - w[-1]) * m.unit_parameters for m, w in zip(modules, widths, strict=True))
    missing -= sum(x * cost for x, cost in zip(exact, costs, strict=True))
    for cost in sorted(set(costs), reverse=True):
        alike = [place for place, x in enumerate(rest) if costs[place] == cost and x > HAIR]
        missing += cost * sum(rest[place] for place in alike)
        order = sorted(range(len(alike)), key=lambda i: (-round(rest[alike[i]], 9), _scattered(i)))
        more = min(max(math.ceil(missing / cost - 0.5 - HAIR), 0), len(alike))
        for i in order[:more]:
            steps[alike[i]] += 1
        missing -= cost * more
    return [w[-1] - step * w.step for w, step in zip(widths, steps, strict=True)]


def _scattered(place: int) -> float:
    """Places in an order of which every beginning is evenly spread: the bits mirrored at the point (van der Corput)."""
    return math.ldexp(int(f"{place:b}"[::-1], 2), -place.bit_length())


def read_ratios(path: Path | str, modules: Sequence[Module], layers: int) -> list[float]:
    """Ratios from a JSON file: axis -> a list with one ratio a layer, or a table layer -> ratio (the others 0).

    Args:
        path: of the file.
        modules: [M], what is being pruned.
        layers: L of the whole model.

    Returns:
        [M], fractions that go; 1 = removed whole.

    Raises:
        RecipeError: one line that names the file, for whatever is wrong with it.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give --allocate a JSON file.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON ({error}): write an object like {_EXAMPLE}.") from error
    if not isinstance(record, dict):
        raise RecipeError(f"{path} holds no object: write one like {_EXAMPLE}.")
    chosen = {axis: {m.layer for m in modules if m.axis == axis} for axis in AXES}
    found: dict[tuple[str, int], float] = {}
    for axis, entries in record.items():
        if axis not in AXES:
            raise RecipeError(f"{path}: {unknown('axis', axis, AXES)}")
        if not chosen[axis]:
            raise RecipeError(f"{path} has ratios for {axis}, which is not being pruned: take them out, or prune it.")
        for layer, ratio in _by_layer(f"{path}: {axis}", entries, layers).items():
            if layer not in chosen[axis] and ratio:
                raise RecipeError(
                    f"{path}: {axis} of layer {layer} is not being pruned: give it 0 where it is gone already, "
                    "else choose it."
                )
            found[axis, layer] = ratio
    return [found.get((module.axis, module.layer), 0.0) for module in modules]


_EXAMPLE = '{"mlp": [0.1, 0.2, ...], "attention": {"3": 0.5}}'


def _by_layer(where: str, entries: Any, layers: int) -> dict[int, float]:
    """Layer -> ratio from either form; ``where`` says file and axis."""
    if isinstance(entries, list):
        if len(entries) != layers:
            raise RecipeError(f"{where} has {len(entries)} ratios for {layers} layers: give one for each.")
        entries = {str(layer): ratio for layer, ratio in enumerate(entries)}
    if not isinstance(entries, dict):
        raise RecipeError(f"{where} is neither a list nor a table of ratios: write an object like {_EXAMPLE}.")
    names = {str(layer) for layer in range(layers)}
    for layer, ratio in entries.items():
        if layer not in names:
            raise RecipeError(f"{where} names layer '{layer}', but the model has layers 0 to {layers - 1}.")
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not 0 <= ratio <= 1:
            raise RecipeError(f"{where} of layer {layer} is {json.dumps(ratio)}, not a number from 0 to 1.")
    return {int(layer): float(ratio) for layer, ratio in entries.items()}
