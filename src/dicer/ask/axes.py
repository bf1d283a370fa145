"""The kinds of unit that can be chosen: what users call them, and what can be done with them in any family."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
        routed: tokens are sent to some of the units, so it is known how many each of them saw.
    """

    units: str
    rounds_each_layer: bool
    can_merge: bool
    activations: tuple[str, ...]
    stream: str
    routed: bool = False

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
        "experts": AxisKind("experts", True, False, ("pre", "post", "mod"), " experts", routed=True),
    }
)
# --axis -> the kinds of axes whose units are scored; where whole layers go, none.
CHOSEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**{name: (name,) for name in AXES}, "all": ("attention", "mlp"), "block": ()}
)


def kind_name(axis: str) -> str:
    """The kind of an axis by its name: ``mlp`` of ``mlp.shared``, as a layer may have several axes of one kind."""
    return axis.partition(".")[0]


def kind_of(axis: str) -> AxisKind:
    """What can be done with the units of an axis, by its name."""
    return AXES[kind_name(axis)]


def axes_of(kinds: Collection[str], known: Iterable[str]) -> tuple[str, ...]:
    """Those of a family's axes that are of the chosen kinds."""
    return tuple(name for name in known if kind_name(name) in kinds)
