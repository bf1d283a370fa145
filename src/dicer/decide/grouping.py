"""Which neurons belong together: none, random, similarity (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dicer.errors import RecipeError

GROUPINGS: Mapping[str, str] = MappingProxyType(
    {
        "none": "no groups: the K neurons with the highest scores stay (Xu et al. 2025, 3.2)",
        "random": "a random permutation dealt round-robin into groups (Xu et al. 2025, 4.1, B.5)",
        "similarity": "complete-linkage clusters on the cosine distance of activation vectors (Xu et al. 2025, B.6)",
    }
)


def random_groups(units: int, groups: int, rng: np.random.Generator) -> Tensor:
    """Deal a random permutation round-robin into groups (Xu et al. 2025, 4.1 and B.5).

    Args:
        units: N.
        groups: how many, 1..N; no group is empty and sizes differ by at most one.
        rng: where the permutation comes from.

    Returns:
        int64 [N], the group of each unit.
    """
    labels = torch.empty(units, dtype=torch.int64)
    labels[torch.from_numpy(rng.permutation(units))] = torch.arange(units) % groups
    return labels


def similarity_groups(gram: Tensor, groups: int) -> Tensor:
    """Agglomerative clustering with complete linkage on cosine distance (Xu et al. 2025, B.6).

    Args:
        gram: [N, N], A A^T of the activation vectors; a zero vector is at distance 1 from every other.
        groups: K, 1..N.

    Returns:
        int64 [N], the group of each unit, in 0..K-1.
    """
    units = gram.shape[0]
    if groups == units:
        return torch.arange(units)
    tree = linkage(_condensed_cosine(gram), method="complete")
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
