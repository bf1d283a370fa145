"""One key of a config changed: which tensors follow it, along which dimension, and by how many rows."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from dicer.model.structure.layers import Layers
from dicer.model.structure.skeleton import Shape, Skeleton, build, changed

STEP = 8  # divides what grouped kernels and packed layouts ask of a width


class Change(NamedTuple):
    """How a tensor follows a key.

    Attributes:
        dim: the dimension that changes.
        rate: rows for each one of the key.
    """

    dim: int
    rate: Fraction


def stepped(value: Any, by: int) -> Any:
    """A key's value with something added to it, or to each of a list."""
    return [item + by for item in value] if isinstance(value, list) else value + by


def followers(sample: Skeleton, kind: Any, values: Mapping[str, Any], by: int) -> dict[str, Change] | None:
    """The tensors that follow when keys take other values; None where they come, go, or change in two dimensions.

    Args:
        sample: the model as it is.
        kind: its class.
        values: path -> new value.
        by: what the new values are more by.
    """
    try:
        other = build(changed(sample.config, values), kind).shapes
    except Exception:  # whatever a class raises of a config that it does not take
        return None
    if other.keys() != sample.shapes.keys():
        return None
    found = {}
    for name, before in sample.shapes.items():
        after = other[name]
        if after == before:
            continue
        dims = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(before) != len(after) or len(dims) != 1:
            return None
        found[name] = Change(dims[0], Fraction(after[dims[0]] - before[dims[0]], by))
    return found


def by_layer(layers: Layers, found: Mapping[str, Change]) -> dict[int, dict[str, Change]] | None:
    """The same by layer and name inside it; None where a tensor outside the layers follows, too."""
    placed: dict[int, dict[str, Change]] = {}
    for name, change in found.items():
        place = layers.locate(name)
        if place is None:
            return None
        placed.setdefault(place[0], {})[place[1]] = change
    return placed


def holds(shape: Shape, change: Change, units: Fraction) -> bool:
    """Whether a tensor has exactly the rows that its key calls for."""
    return shape[change.dim] == change.rate * units
