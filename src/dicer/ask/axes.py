"""The kinds of unit that can be chosen: what users call them, and what can be done with them in any family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class AxisKind:
    """One kind of unit.

    Attributes:
        units: what users know them as.
        rounds_each_layer: ``--min-width`` and ``--width-multiple`` speak of it, and each layer is rounded by itself.
            Else a layer has so few units that rounding goes over all layers, and one is the least that a layer keeps.
        can_merge: several units can become one.
        activations: which activations can be read; the first is read where the one that was asked for is none of them.
        stream: what the names of its random streams end with.
    """

    units: str
    rounds_each_layer: bool
    can_merge: bool
    activations: tuple[str, ...]
    stream: str

    def activation(self, asked: str) -> str:
        """The activation by its name on this axis: heads have but one, what goes into the output projection."""
        return asked if asked in self.activations else self.activations[0]

    def stream_name(self, what: str) -> str:
        """What a random stream is for, on this axis."""
        return f"{what}{self.stream}"


# In the order of a layer's sub-layers. Neurons have the random streams of versions that knew nothing else.
AXES: Mapping[str, AxisKind] = MappingProxyType(
    {
        "attention": AxisKind("key-value heads", False, False, ("mod",), " attention"),
        "mlp": AxisKind("neurons", True, True, ("pre", "post", "mod"), ""),
    }
)
# --axis -> the axes whose units are scored; where whole layers go, none.
CHOSEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**{name: (name,) for name in AXES}, "all": ("attention", "mlp"), "block": ()}
)
