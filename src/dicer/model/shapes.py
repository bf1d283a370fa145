"""What each decoder layer of a model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicer.model.families import Family
from dicer.model.structure.skeleton import changed, flat_values, stock_config
from dicer.model.units import Axis


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
    units = {axis: family.units(axis) for axis in family.axes}
    return [
        LayerShape({axis: units[axis][i] for axis in units}, biased)
        for i, biased in enumerate(family.output_biases(config))
    ]


def fits_stock(family: Family, config: Any, shapes: Sequence[LayerShape]) -> bool:
    """Whether the family's own class can be all these layers.

    Args:
        family: of the model.
        config: its transformers config, which says the size of a head.
        shapes: of every layer; one is enough where all are alike.
    """
    axes, first = family.axes, shapes[0].units
    if any(shape.units != first for shape in shapes) or not all(first.values()):
        return False
    if any(axes[axis].bias_option is None for shape in shapes for axis in shape.output_bias):
        return False
    return all(_is_legal(axis, config, first[name]) for name, axis in axes.items())


def _is_legal(axis: Axis, config: Any, units: int) -> bool:
    """Whether the stock class takes another number of these units."""
    values = flat_values(config)
    if axis.size_key is None or units == axis.width(values.get):
        return True
    if axis.fixed:
        return False
    size = {axis.size_key: axis.head_size(values)}
    try:
        changed(stock_config(config), {**axis.keys(values, units), **size})
    except Exception:  # whatever a class raises of what it does not like: Llama's, of heads that do not divide its size
        return False
    return True
