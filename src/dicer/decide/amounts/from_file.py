"""Ratios that the user wrote down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dicer.ask.axes import AXES, kind_name
from dicer.decide.amounts.prunable import Prunable
from dicer.errors import RecipeError, unknown
from dicer.model.units import SubLayer
from dicer.reading import read_json, reason


def read_ratios(path: Path | str, sub_layers: Sequence[Prunable], layers: int) -> list[float]:
    """Ratios from a JSON file: axis -> a list with one ratio a layer, or a table layer -> ratio (the others 0).

    Args:
        path: of the file.
        sub_layers: [M], what is being pruned.
        layers: L of the whole model.

    Returns:
        [M], fractions that go; 1 = removed whole.

    Raises:
        RecipeError: one line that names the file, for whatever is wrong with it.
    """
    try:
        record = read_json(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({reason(error)}): give --allocate a JSON file.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON ({error}): write an object like {_EXAMPLE}.") from error
    if not isinstance(record, dict):
        raise RecipeError(f"{path} holds no object: write one like {_EXAMPLE}.")
    chosen = {axis: {m.layer for m in sub_layers if kind_name(m.axis) == axis} for axis in AXES}
    found: dict[SubLayer, float] = {}
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
            found[SubLayer(layer, axis)] = ratio
    return [found.get(SubLayer(m.layer, kind_name(m.axis)), 0.0) for m in sub_layers]


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
