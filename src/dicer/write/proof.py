"""What came of proving a structure: of each axis the numbers, or the reason, and what a plan may hold by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicer.decide.plan import PrunePlan
from dicer.errors import UnknownFamily
from dicer.model.source import ModelSource


@dataclass(frozen=True)
class Proof:
    """What came of one axis.

    Attributes:
        axis: ``mlp``, ``attention`` ..., or ``block``.
        error: largest difference of the logits of the cut and of the masked model, of their standard deviation.
        moved: largest difference of the logits of the cut and of the dense model, likewise.
        why_not: the reason where it is not proven; empty where it is.
        differing: why layers cannot differ in width; empty where they can.
        but_first: why the first layer has to stay, where whole layers can go; empty where it can go, too.
    """

    axis: str
    error: float = 0.0
    moved: float = 0.0
    why_not: str = ""
    differing: str = ""
    but_first: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is proven."""
        return not self.why_not

    def __str__(self) -> str:
        if not self.holds:
            return f"{self.axis}: not proven, {self.why_not}"
        apart = "" if not self.differing else f"; the same width in every layer only: {self.differing}"
        apart += "" if not self.but_first else f"; all but the first layer: {self.but_first}"
        return (
            f"{self.axis}: proven (cut and masked differ by {self.error:.1e}, the cut moves by {self.moved:.1e}){apart}"
        )

    def record(self) -> dict[str, Any]:
        """As it stands in a plan."""
        found = {"axis": self.axis, "error": self.error, "moved": self.moved, "differing": not self.differing}
        return found | ({"first_layer_stays": True} if self.but_first else {})

    def check_plan(self, plan: PrunePlan) -> None:
        """Refuse what of a plan is not proven though the axis is.

        Raises:
            UnknownFamily: the first layer would go, or layers would differ, and neither is proven.
        """
        if self.axis == "block" and self.but_first and 0 in plan.blocks:
            raise UnknownFamily(
                f"the first layer cannot go whole: {self.but_first}. Leave it out with --layers 1-, or prune "
                "another --axis."
            )
        kept = {len(layer.keep) / layer.units for layer in plan.axes.get(self.axis, {}).values()}
        if self.differing and len(kept) > 1:
            raise UnknownFamily(
                f"layers of this model cannot differ in width along {self.axis}: {self.differing}. Use "
                "--allocate uniform on all layers, or another --axis."
            )


def check_proofs(source: ModelSource, proofs: Sequence[Proof]) -> None:
    """Refuse what is not proven.

    Raises:
        UnknownFamily: with the axis, and the number.
    """
    for proof in proofs:
        if not proof.holds:
            raise UnknownFamily(
                f"{source.name}: the structure that was found for {proof.axis} of a '{source.family.model_type}' "
                f"does not hold: {proof.why_not}. Choose another --axis, or say the structure with --family FILE.toml."
            )
