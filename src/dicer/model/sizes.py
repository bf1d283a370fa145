"""What a model's tensors add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dicer.model.families import Family
from dicer.model.tensors import TensorInfo
from dicer.model.units import SubLayer


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes, counted from the tensors that are really there.

    Attributes:
        parameters: all of them.
        decoder: those inside the decoder layers.
        axes: axis -> those that its units own (with their biases).
        nbytes: of all tensors.
    """

    parameters: int
    decoder: int
    axes: dict[str, int]
    nbytes: int

    @property
    def attention(self) -> int:
        """Parameters that heads own."""
        return self._of("attention")

    @property
    def mlp(self) -> int:
        """Parameters that neurons own."""
        return self._of("mlp")

    def _of(self, kind: str) -> int:
        return sum(count for axis, count in self.axes.items() if axis.partition(".")[0] == kind)


def count_sizes(family: Family, infos: Mapping[str, TensorInfo]) -> Sizes:
    """What tensors add up to."""
    owned = sub_layer_parameters(family, infos)
    return Sizes(
        parameters=sum(info.numel for info in infos.values()),
        decoder=sum(layer_parameters(family, infos).values()),
        axes={axis: sum(n for place, n in owned.items() if place.axis == axis) for axis in family.axes},
        nbytes=sum(info.nbytes for info in infos.values()),
    )


def layer_parameters(family: Family, infos: Mapping[str, TensorInfo]) -> dict[int, int]:
    """Layer -> all parameters inside it."""
    found: dict[int, int] = {}
    for name, info in infos.items():
        if place := family.locate(name):
            found[place[0]] = found.get(place[0], 0) + info.numel
    return found


def sub_layer_parameters(family: Family, infos: Mapping[str, TensorInfo]) -> dict[SubLayer, int]:
    """Sub-layer -> parameters that its units own, biases included."""
    axis_of = {piece.name: axis for axis, found in family.axes.items() for piece in found.slices}
    owned: dict[SubLayer, int] = {}
    for name, info in infos.items():
        if (place := family.locate(name)) and place[1] in axis_of:
            sub_layer = SubLayer(place[0], axis_of[place[1]])
            owned[sub_layer] = owned.get(sub_layer, 0) + info.numel
    return owned
