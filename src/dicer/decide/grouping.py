"""Which units belong together: none, random, similarity (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.errors import RecipeError
from dicer.measure.parts import SUMS, Part, registered, registry
from dicer.measure.statistics import LayerStatistics

Linkage = Literal["complete", "average", "single", "weighted"]


@dataclass(frozen=True)
class Grouping(Part):
    """A grouping function: (scores [N], keep K, statistics) -> groups int64 [N], numbered from 0, at most K of them."""

    what: ClassVar[str] = "grouping"

    def __call__(self, scores: Tensor, keep: int, statistics: LayerStatistics) -> Tensor:
        """Labels, int64 [N], checked.

        Raises:
            RecipeError: the function returned something else, or an empty group, or more groups than units may stay.
        """
        labels = self.run(scores, keep, statistics)
        if not isinstance(labels, Tensor) or labels.shape != scores.shape or labels.dtype != torch.int64:
            raise self.refuse(f"must return one group for each of the {len(scores)} units, int64 ({len(scores)},).")
        groups = int(labels.max()) + 1
        if groups > keep or int(labels.min()) < 0 or not bool(torch.bincount(labels).all()):
            raise self.refuse(f"must number its groups from 0 without a gap, and make at most {keep} of them.")
        return labels


def grouping(
    name: str, *, needs: tuple[str, ...] = (), source: str, link: str = ""
) -> Callable[[Callable[..., Any]], Grouping]:
    """Decorator that makes a function a grouping; its keyword-only arguments are its parameters.

    Args:
        name: what users type.
        needs: ``square_sum``, ``sum``, ``gram`` of the activation that is grouped by.
        source: paper and equation.
        link: where to read it.
    """
    return registered(Grouping, name, needs, source, link, SUMS)


@grouping("none", source="Xu et al. 2025, 3.2", link=XU_2025)
def no_groups(scores: Tensor, keep: int, statistics: LayerStatistics) -> Tensor:
    """No groups: the K units with the highest scores stay."""
    return torch.zeros(len(scores), dtype=torch.int64)


@grouping("random", source="Xu et al. 2025, 4.1, B.5", link=XU_2025)
def random_groups(scores: Tensor, keep: int, statistics: LayerStatistics, *, groups: int | None = None) -> Tensor:
    """A random permutation dealt round-robin into C groups of sizes that differ by at most one (default: C = K)."""
    units, labels = len(scores), torch.empty(len(scores), dtype=torch.int64)
    labels[torch.from_numpy(statistics.rng.permutation(units))] = torch.arange(units) % min(groups or keep, keep)
    return labels


@grouping("similarity", needs=("gram",), source="Xu et al. 2025, B.6", link=XU_2025)
def similarity_groups(
    scores: Tensor, keep: int, statistics: LayerStatistics, *, linkage: Linkage = "complete"
) -> Tensor:
    """K clusters on the cosine distance of activation vectors; a zero vector is at distance 1 from every other."""
    return clusters(statistics.gram, keep, linkage)


GROUPINGS: Mapping[str, Grouping] = MappingProxyType(registry((no_groups, random_groups, similarity_groups)))


def clusters(gram: Tensor, groups: int, linkage: Linkage = "complete") -> Tensor:
    """Agglomerative clustering on cosine distance.

    Args:
        gram: [N, N], A A^T of the activation vectors.
        groups: K, 1..N.
        linkage: what the distance of two clusters is (scipy's name for it).

    Returns:
        int64 [N], the group of each unit, in 0..K-1.
    """
    from scipy.cluster.hierarchy import linkage as cluster  # which takes long to import

    units = gram.shape[0]
    if groups == units:
        return torch.arange(units)
    tree = cluster(_condensed_cosine(gram), method=linkage)
    # The first N - K merges leave exactly K clusters, also where merge heights tie (a cut by height would not).
    merges = tree[: units - groups, :2].astype(np.int64)  # [N-K, 2]
    made = units + np.arange(len(merges))
    nodes = units + len(merges)
    edges = coo_array(
        (np.ones(2 * len(merges), dtype=np.int8), (np.repeat(made, 2), merges.reshape(-1))), shape=(nodes, nodes)
    )
    _, labels = connected_components(edges, directed=False)
    _, labels = np.unique(labels[:units], return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64))


def _condensed_cosine(gram: Tensor) -> NDArray[np.float64]:
    """Upper triangle of 1 - cosine, row by row, float64 [N(N-1)/2]; no second [N, N] is made."""
    products = gram.detach().cpu().numpy()
    if not np.isfinite(products.diagonal()).all():
        raise RecipeError("activations overflow on this text, so neurons have no similarity: try --dtype float32.")
    norms = np.sqrt(products.diagonal().astype(np.float64))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    units = len(norms)
    distances = np.empty(units * (units - 1) // 2)
    end = 0
    for i in range(units - 1):
        start, end = end, end + units - 1 - i
        cosine = products[i, i + 1 :] * (scale[i] * scale[i + 1 :])
        # Rounding may give a hair below 0, which the clustering would take for a real order.
        np.clip(1.0 - cosine, 0.0, 2.0, out=distances[start:end])
    return distances
