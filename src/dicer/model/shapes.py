"""What each decoder layer of a model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dicer.model.families import Family


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer is made of.

    Attributes:
        units: axis -> how many, 0 where the sub-layer is gone.
        output_bias: axes whose output projection (or what is left of a sub-layer that is gone) has a bias that the
            stock class would not give it.
    """

    units: dict[str, int]
    output_bias: frozenset[str] = frozenset()


def layer_shapes(family: Family, config: Any) -> list[LayerShape]:
    """Every layer of a model, from its transformers config (stock or pruned)."""
    units = {axis: family.units(config, axis) for axis in family.axes}
    return [
        LayerShape({axis: units[axis][i] for axis in units}, frozenset(getattr(layer, "output_bias", ())))
        for i, layer in enumerate(config.per_layer_config)
    ]
