"""What a model's tensors add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dicer.ask.axes import axes_of
from dicer.model.families import Family
from dicer.model.tensors import TensorInfo
from dicer.model.units import Slice, SubLayer, templates


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
        return sum(self.axes[axis] for axis in axes_of((kind,), self.axes))


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
    owners: dict[str, list[tuple[str, Slice]]] = {}
    for axis, found in family.axes.items():
        for piece in found.slices:
            owners.setdefault(piece.name, []).append((axis, piece))
    owned: dict[SubLayer, int] = {}
    for name, info in infos.items():
        layer, inner = family.locate(name) or (0, "")
        for axis, piece in (pair for _, template in templates(inner) for pair in owners.get(template, ())):
            own = info.numel if piece.expert is None else info.numel // info.shape[0]
            owned[SubLayer(layer, axis)] = owned.get(SubLayer(layer, axis), 0) + own
    return owned
