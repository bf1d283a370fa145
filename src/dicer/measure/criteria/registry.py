"""What a criterion is: one score for each unit of a layer, from its weights and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dicer.measure.parts import Part, find_part, registered
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


@dataclass(frozen=True)
class Criterion(Part):
    """A scoring function: (weights, statistics) -> [U], higher = keep.

    The statistics are of the activation that the recipe names.
    """

    what: ClassVar[str] = "criterion"

    def __call__(self, weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
        """Scores, float32 [U] on the CPU, checked.

        Raises:
            RecipeError: the function returned another shape, or a value that is not finite.
        """
        scores = self.run(weights, statistics)
        if not isinstance(scores, Tensor):
            raise self.refuse(f"returned {type(scores).__name__}, expected a tensor of scores.")
        scores = scores.detach().to("cpu", torch.float32)
        if scores.shape != (weights.units,):
            raise self.refuse(
                f"returned shape {tuple(scores.shape)}, expected one score for each of the {weights.units} units: "
                f"({weights.units},)."
            )
        if not torch.isfinite(scores).all():
            raise self.refuse(
                f"returned {int((~torch.isfinite(scores)).sum())} scores that are not finite; if it is a built-in one, "
                "the model overflows on this text: try --dtype float32."
            )
        return scores


def criterion(
    name: str, *, needs: tuple[str, ...] = (), source: str, link: str = ""
) -> Callable[[Callable[..., Any]], Criterion]:
    """Decorator that makes a scoring function a criterion; its keyword-only arguments are its parameters.

    Args:
        name: what users type.
        needs: names of :data:`dicer.measure.parts.NEEDS`, properties of the statistics; empty for weights alone.
        source: paper and equation.
        link: where to read it.
    """
    return registered(Criterion, name, needs, source, link)


def find_criterion(name: str, known: Mapping[str, Criterion]) -> Criterion:
    """A criterion by registry name, or ``FILE.py:NAME`` (see :func:`dicer.measure.parts.find_part`)."""
    return find_part(Criterion, name, known)
