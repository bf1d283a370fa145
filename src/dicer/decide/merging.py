"""What a group leaves: the strongest neuron, the mean, or the dominant with all outputs (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.decide.plan import Merge
from dicer.measure.parts import SUMS, Part, registered, registry
from dicer.measure.statistics import LayerStatistics


@dataclass(frozen=True)
class Survivors:
    """What stays of a layer.

    Attributes:
        keep: int64 [K], sorted; with a merge, the neuron that stands for each group.
        merge: the maps, or None where the kept neurons are unchanged.
    """

    keep: Tensor
    merge: Merge | None = None


@dataclass(frozen=True)
class Merging(Part):
    """What a group leaves: (scores [N], labels [N], keep K, statistics of the modulated activation) -> Survivors."""

    what: ClassVar[str] = "merge"

    def __call__(self, scores: Tensor, labels: Tensor, keep: int, statistics: LayerStatistics) -> Survivors:
        """Survivors, checked.

        Raises:
            RecipeError: the function returned something else, or another number of units than may stay.
        """
        survivors = self.run(scores, labels, keep, statistics)
        if not isinstance(survivors, Survivors):
            raise self.refuse(f"returned {type(survivors).__name__}, expected dicer.Survivors.")
        kept, units = survivors.keep, len(scores)
        sorted_units = kept.dtype == torch.int64 and kept.shape == (keep,) and bool((kept.diff() > 0).all())
        if not sorted_units or int(kept[0]) < 0 or int(kept[-1]) >= units:
            raise self.refuse(f"must keep {keep} of the {units} units, sorted, as int64.")
        if survivors.merge is not None and not survivors.merge.fits(units, keep):
            raise self.refuse(
                f"gives maps that do not fit its {units} units: int64 and twice float32, ({units},) each."
            )
        return survivors


def merge(
    name: str, *, needs: tuple[str, ...] = (), source: str, link: str = ""
) -> Callable[[Callable[..., Any]], Merging]:
    """Decorator that makes a function a merge; its keyword-only arguments are its parameters.

    Args:
        name: what users type.
        needs: ``square_sum``, ``sum``, ``gram`` of the modulated activation.
        source: paper and equation.
        link: where to read it.
    """
    return registered(Merging, name, needs, source, link, SUMS)


@merge("prune", source="Xu et al. 2025, B.5, B.6.1", link=XU_2025)
def prune(scores: Tensor, labels: Tensor, keep: int, statistics: LayerStatistics) -> Survivors:
    """The unit with the highest score, unchanged; of C < K groups the first K mod C keep one more."""
    return keep_strongest(scores, labels, keep)


@merge("mean", source="Xu et al. 2025, B.6.2", link=XU_2025)
def mean(scores: Tensor, labels: Tensor, keep: int, statistics: LayerStatistics) -> Survivors:
    """The mean of the group's weights."""
    return mean_of_groups(scores, labels)


@merge("dominant", needs=("square_sum",), source="Xu et al. 2025, B.6.3 eq. 3", link=XU_2025)
def dominant(scores: Tensor, labels: Tensor, keep: int, statistics: LayerStatistics) -> Survivors:
    """Gate and up of the neuron with the highest norm, scaled sum of down."""
    return dominant_of_groups(statistics.square_sum.sqrt().float().cpu(), labels)


MERGES: Mapping[str, Merging] = MappingProxyType(registry((prune, mean, dominant)))


def keep_strongest(scores: Tensor, labels: Tensor, keep: int) -> Survivors:
    """Every group keeps its strongest: K/C each, one each where C = K (Xu et al. 2025, B.5, B.6.1).

    Args:
        scores: [N], higher = keep; equal scores keep the lower index.
        labels: int64 [N], groups 0..C-1.
        keep: K >= C; the first K mod C groups keep one more.
    """
    own = labels.numpy()  # of so few numbers faster than torch, and rolls ask often
    order = np.lexsort((-scores.numpy(), own))  # by group, strongest first
    sizes = np.bincount(own)  # [C]
    rank = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)  # [N], place in the group
    quota = keep // len(sizes) + (np.arange(len(sizes)) < keep % len(sizes))  # [C]
    return Survivors(torch.from_numpy(np.sort(order[rank < quota[own[order]]])))


def mean_of_groups(scores: Tensor, labels: Tensor) -> Survivors:
    """Every group becomes the mean of its rows of G and U and its columns of D (Xu et al. 2025, B.6.2).

    Args:
        scores: [N]; the highest of a group names it in ``keep``.
        labels: int64 [N], groups 0..K-1.
    """
    groups = int(labels.max()) + 1
    survivors = keep_strongest(scores, labels, groups)
    share = 1.0 / torch.bincount(labels, minlength=groups)[labels].float()  # [N]
    return Survivors(
        survivors.keep, Merge(_rows(survivors.keep, labels), share, share.clone())
    )  # safetensors: no sharing


def dominant_of_groups(norms: Tensor, labels: Tensor) -> Survivors:
    """G and U of the dominant neuron, D = sum_i (s_i / s_dominant) D_:,i (Xu et al. 2025, B.6.3 eq. 3).

    Args:
        norms: s [N], L2 norm of the modulated activation; a group of zeros keeps its first neuron unchanged.
        labels: int64 [N], groups 0..K-1.
    """
    groups = int(labels.max()) + 1
    keep = keep_strongest(norms, labels, groups).keep
    row = _rows(keep, labels)
    dominant = torch.zeros(len(norms))
    dominant[keep] = 1.0
    strongest = norms[keep][row]  # [N], the norm of each neuron's own dominant
    weight_out = torch.where(strongest > 0, norms / strongest, dominant)
    return Survivors(keep, Merge(row, dominant, weight_out.float()))


def _rows(keep: Tensor, labels: Tensor) -> Tensor:
    """Place in ``keep`` of each neuron's group, int64 [N]."""
    place = torch.empty(len(keep), dtype=torch.int64)
    place[labels[keep]] = torch.arange(len(keep))
    return place[labels]
