"""What a group leaves: the strongest neuron, the mean, or the dominant with all outputs (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

MERGES: Mapping[str, str] = MappingProxyType(
    {
        "prune": "the neuron with the highest score, unchanged (Xu et al. 2025, B.5, B.6.1)",
        "mean": "the mean of the group's weights (Xu et al. 2025, B.6.2)",
        "dominant": "gate and up of the neuron with the highest norm, scaled sum of down (Xu et al. 2025, B.6.3 eq. 3)",
    }
)


@dataclass(frozen=True)
class Merge:
    """The sparse maps M_in and M_out [K, N] of one layer; every neuron belongs to at most one survivor.

    Attributes:
        row: int64 [N], the survivor (its place in ``keep``) that a neuron goes into, -1 for none.
        weight_in: float32 [N], its entry of M_in (gate and up rows).
        weight_out: float32 [N], its entry of M_out (down columns).
    """

    row: Tensor
    weight_in: Tensor
    weight_out: Tensor


@dataclass(frozen=True)
class Survivors:
    """What stays of a layer.

    Attributes:
        keep: int64 [K], sorted; with a merge, the neuron that stands for each group.
        merge: the maps, or None where the kept neurons are unchanged.
    """

    keep: Tensor
    merge: Merge | None = None


def keep_top(scores: Tensor, keep: int) -> Survivors:
    """No groups: the K highest scores (Xu et al. 2025, 3.2); equal scores keep the lower index.

    Args:
        scores: [N], higher = keep.
        keep: K.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return Survivors(order[:keep].sort().values)


def keep_strongest(scores: Tensor, labels: Tensor, keep: int) -> Survivors:
    """Every group keeps its strongest: K/C each, one each where C = K (Xu et al. 2025, B.5, B.6.1).

    Args:
        scores: [N], higher = keep; equal scores keep the lower index.
        labels: int64 [N], groups 0..C-1.
        keep: K >= C; the first K mod C groups keep one more.
    """
    groups = int(labels.max()) + 1
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(labels[order], stable=True).indices]  # by group, strongest first
    sizes = torch.bincount(labels, minlength=groups)  # [C]
    rank = torch.arange(len(order)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # [N], place in the group
    quota = keep // groups + (torch.arange(groups) < keep % groups).long()  # [C]
    return Survivors(order[rank < quota[labels[order]]].sort().values)


def merge_mean(scores: Tensor, labels: Tensor) -> Survivors:
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


def merge_dominant(norms: Tensor, labels: Tensor) -> Survivors:
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
