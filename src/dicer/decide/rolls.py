"""Several random partitions, and the one that loses the least: a search that costs no forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dicer.decide.merging import Survivors
from dicer.measure.gram import inverse
from dicer.measure.statistics import exact_products
from dicer.measure.walk import Visit

RIDGE = 1e-2  # relative to the mean diagonal, where none was asked for


def best_roll(draw: Callable[[], Survivors], rolls: int, visit: Visit, ridge: float | None) -> Survivors:
    """Of so many draws the one whose output is nearest to the whole one; of equals the first.

    With R what goes, the error is ``tr(W_R^T H_RR W_R)``, or where the rest is solved anew ``tr(W_R^T ([H^-1]_RR)^-1
    W_R)`` with a ridge on H: neither needs a forward pass.

    Args:
        draw: gives what stays, another each time.
        rolls: how many to try.
        visit: the sub-layer, with the Gram matrix H of the output projection's inputs.
        ridge: relative to the mean diagonal, where the rest will be solved anew; None where it stays as it is.
    """
    drawn = [draw() for _ in range(rolls)]
    gone = torch.ones(rolls, visit.weights.units, dtype=torch.bool)
    for row, survivors in zip(gone, drawn, strict=True):
        row[survivors.keep] = False
    inputs = gone.repeat_interleave(visit.sums.channels, 1).to(visit.rows.device)  # [S, N*C]
    errors = _as_they_are(visit.joint, inputs) if ridge is None else _solved(visit, inputs, ridge)
    return drawn[int(errors.argmin())]


def _as_they_are(joint: Tensor, inputs: Tensor) -> Tensor:
    """What the output loses with each set of inputs, [S]: one matrix product for all."""
    factors = inputs.to(joint.dtype)
    with exact_products():
        return (factors @ joint * factors).sum(1)


def _solved(visit: Visit, inputs: Tensor, ridge: float) -> Tensor:
    """The same where the other inputs make up for it, [S]."""
    metric = inverse(visit.sums.get("channel_gram", "mod"), ridge, str(visit.place))
    weight, errors = visit.rows.to(metric.dtype), []
    for own in inputs:
        gone = own.nonzero()[:, 0]
        with exact_products():
            lower = torch.linalg.cholesky(metric.index_select(0, gone).index_select(1, gone))
            errors.append(torch.linalg.solve_triangular(lower, weight[gone], upper=False).square().sum())
    return torch.stack(errors)
