"""What units can be taken out of, and the bounds that every allocation keeps to.

A *ratio* is the fraction of a sub-layer that goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from dicer.ask.axes import AxisKind, kind_of
from dicer.errors import RecipeError
from dicer.model.units import SubLayer

TOLERANCE = 1e-9  # relative; what rounding may add to a sum of parameters


@dataclass(frozen=True)
class Prunable:
    """A sub-layer that units can be taken out of.

    Attributes:
        place: which one.
        units: N, more than 0.
        unit_parameters: parameters that go with one unit.
        least: units that stay at least.
        multiple: kept units are a multiple of it.
        tie: sub-layers with the same keep the same number, as one tensor or one key of the config holds them all; empty
            for one that stands alone.
        share: units for each one of that number.
    """

    place: SubLayer
    units: int
    unit_parameters: int
    least: int = 1
    multiple: int = 1
    tie: str = ""
    share: Fraction = Fraction(1)

    @property
    def axis(self) -> str:
        """``attention`` or ``mlp``."""
        return self.place.axis

    @property
    def layer(self) -> int:
        """Its number in the model."""
        return self.place.layer

    @property
    def kind(self) -> AxisKind:
        """What can be done with its units."""
        return kind_of(self.axis)

    @property
    def parameters(self) -> int:
        """All that can go with the units."""
        return self.units * self.unit_parameters


@dataclass(frozen=True)
class Bounds:
    """What no allocation may break.

    Attributes:
        max_ratio: no sub-layer loses more than this fraction, unless it is removed whole.
        min_width: neurons that an MLP keeps if it stays; all of them if it has fewer. Heads have no such bound.
        drop_threshold: a sub-layer whose ratio reaches it is removed whole; None: no sub-layer ever is.
        multiple: kept widths of neurons are multiples of it, also where N is none (as :func:`.uniform.legal` does).
    """

    max_ratio: float = 1.0
    min_width: int = 1
    drop_threshold: float | None = None
    multiple: int = 1


def allowed_widths(sub_layer: Prunable, bounds: Bounds) -> range:
    """Widths that a sub-layer may have if it stays, ascending; only N where no multiple lies within the bounds."""
    step, floor = (bounds.multiple, bounds.min_width) if sub_layer.kind.rounds_each_layer else (1, 1)
    step = math.lcm(step, sub_layer.multiple)
    least = max(
        sub_layer.least, min(floor, sub_layer.units), math.ceil(sub_layer.units * (1 - bounds.max_ratio) - TOLERANCE)
    )
    low, top = -(-least // step) * step, sub_layer.units // step * step
    return range(low, top + 1, step) if low <= top else range(sub_layer.units, sub_layer.units + 1, step)


def most(sub_layers: Sequence[Prunable], bounds: Bounds) -> int:
    """The most parameters that can go; where sub-layers may go whole, one still stays at its smallest width."""
    stays = [allowed_widths(sub_layer, bounds)[0] * sub_layer.unit_parameters for sub_layer in sub_layers]
    return total(sub_layers) - (sum(stays) if bounds.drop_threshold is None else min(stays))


def total(sub_layers: Sequence[Prunable]) -> int:
    """Parameters of all sub-layers together."""
    return sum(sub_layer.parameters for sub_layer in sub_layers)


def too_much(
    target: float, possible: float, whole: float, what: str = "parameters", why: str = "within the bounds"
) -> RecipeError:
    """The error for a target out of reach; all three in parameters, of ``what``; ``why`` no more can go."""
    return RecipeError(
        f"{target:,.0f} of {whole:,.0f} {what} ({target / whole:.1%}) are to go, but at most {possible:,.0f} "
        f"({possible / whole:.1%}) can {why}: ask for less, or for wider bounds."
    )


def step_cost(sub_layer: Prunable, bounds: Bounds) -> int:
    """Parameters between two neighbouring widths."""
    return allowed_widths(sub_layer, bounds).step * sub_layer.unit_parameters
