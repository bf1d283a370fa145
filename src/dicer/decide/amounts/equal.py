"""The same number of units in every layer, one that the stock class can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dicer.decide.amounts.prunable import Bounds, Prunable, allowed_widths
from dicer.decide.amounts.uniform import uniform_units
from dicer.errors import RecipeError
from dicer.model.shapes import LayerShape, fits_stock, layer_shapes
from dicer.model.source import ModelSource

PAD = "leave --stock out, and pad the result with 'dicer export OUT --to stock'"


def equal_units(
    sub_layers: Sequence[Prunable], ratio: float, bounds: Bounds, legal: Mapping[str, Sequence[int]]
) -> list[int]:
    """The same ratio everywhere, and on each axis the legal number that is nearest to it; of two, the larger.

    Args:
        sub_layers: [M], those of one axis alike.
        ratio: fraction that goes.
        bounds: what to keep to.
        legal: axis -> numbers that the stock class can have, where it cannot have all.

    Returns:
        K [M], the same for all sub-layers of an axis.

    Raises:
        RecipeError: the bounds do not allow the ratio, or the nearest number is all that there are.
    """
    found = uniform_units(sub_layers, ratio, bounds)
    first = {sub_layer.axis: sub_layer for sub_layer in reversed(sub_layers)}
    kept = {axis: _nearest(first[axis], ratio, bounds, numbers) for axis, numbers in legal.items()}
    return [kept.get(sub_layer.axis, keep) for sub_layer, keep in zip(sub_layers, found, strict=True)]


def _nearest(sub_layer: Prunable, ratio: float, bounds: Bounds, legal: Sequence[int]) -> int:
    units, words = sub_layer.units, sub_layer.kind.units
    able = sorted({*legal} & {*allowed_widths(sub_layer, bounds)} - {units}, reverse=True)
    keep = min([units, *able], key=lambda number: abs(number - units * (1 - ratio)))
    if keep < units:
        return keep
    if not able:
        raise RecipeError(f"the stock class can have no number of {words} but {units} here: use --axis mlp, or {PAD}.")
    raise RecipeError(
        f"ratio {ratio} of {units} {words} is nearest to none: with --stock every layer can keep "
        f"{', '.join(map(str, able))}. Ask for --ratio {1 - able[0] / units:.2g}, use --axis mlp, or {PAD}."
    )


def stock_numbers(source: ModelSource, axes: Sequence[str], *, biased: bool) -> dict[str, list[int]]:
    """Axis -> numbers of units that the stock class can have, for the axes of which it cannot have all.

    Args:
        source: the model.
        axes: that units are taken out of.
        biased: their output projections get a bias.

    Raises:
        RecipeError: the model's layers are not what a stock class can be, or it has no place for the biases.
    """
    family, shapes = source.family, layer_shapes(source.family, source.config)
    if not fits_stock(family, source.config, shapes):
        raise RecipeError(
            f"{source.name} is no stock {family.causal_lm} now (layers that differ, or biases that it has not), so "
            f"--stock cannot keep it one: {PAD}."
        )
    there = {family.locate(name) for name in source.tensors.infos()}
    new = frozenset(axis for axis in axes if biased and (0, f"{family.axes[axis].output}.bias") not in there)
    first = replace(shapes[0], output_bias=new)
    if not fits_stock(family, source.config, [first]):
        raise RecipeError(
            f"{family.causal_lm} has no place for the bias of --compensate bias: leave it or --stock out."
        )

    def has(axis: str, number: int) -> bool:
        return fits_stock(family, source.config, [LayerShape({**first.units, axis: number})])

    few = [axis for axis in axes if not family.axes[axis].kind.rounds_each_layer]
    return {axis: [number for number in range(1, first.units[axis] + 1) if has(axis, number)] for axis in few}
