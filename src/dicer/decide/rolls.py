"""Several random partitions, and the one that loses the least: a search that costs no forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dicer.decide.merging import Survivors
from dicer.measure.gram import inverse
from dicer.measure.statistics import exact_products

RIDGE = 1e-2  # relative to the mean diagonal, where none was asked for


def best_roll(
    draw: Callable[[], Survivors], rolls: int, gram: Tensor, rows: Tensor, units: int, ridge: float | None, what: str
) -> Survivors:
    """Of so many draws the one whose output is nearest to the whole one; of equals the first.

    With R what goes, the error is ``tr(W_R^T H_RR W_R)``, or where the rest is solved anew ``tr(W_R^T ([H^-1]_RR)^-1
    W_R)`` with a ridge on H: neither needs a forward pass.

    Args:
        draw: gives what stays, another each time.
        rolls: how many to try.
        gram: H [N * C, N * C] of the output projection's inputs.
        rows: W [N * C, d].
        units: N.
        ridge: relative to the mean diagonal, where the rest will be solved anew; None where it stays as it is.
        what: the search is in, for messages.
    """
    metric, weight = gram if ridge is None else inverse(gram, ridge, what), rows.to(gram.dtype)
    best: tuple[float, Survivors] | None = None
    for _ in range(rolls):
        survivors = draw()
        gone = torch.ones(units, dtype=torch.bool)
        gone[survivors.keep] = False
        inputs = gone.repeat_interleave(len(gram) // units).nonzero()[:, 0].to(gram.device)
        error = _error(metric[inputs[:, None], inputs], weight[inputs], solved=ridge is not None)
        if best is None or error < best[0]:
            best = (error, survivors)
    assert best is not None  # at least one roll
    return best[1]


def _error(metric: Tensor, weight: Tensor, *, solved: bool) -> float:
    with exact_products():
        if not solved:
            return float((weight * (metric @ weight)).sum())
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(metric), weight, upper=False)
        return float(half.square().sum())
