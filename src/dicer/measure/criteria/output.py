"""How much a unit adds to the residual stream: its activation times the norm of its output weights."""

import torch
from torch import Tensor

from dicer.measure.criteria.registry import criterion
from dicer.measure.criteria.weight import square_sums
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


def channel_norms(weights: UnitWeights, channels: int) -> Tensor:
    """||w_c||^2 of each input of the output projection, float32 [U, C]."""
    by_unit = weights.down.float().T.reshape(weights.units, channels, -1)  # [U, C, d]
    return by_unit.square().sum(2)


@criterion("output-l2", needs=("square_sum",), source="our reconstruction of Yang et al. 2025 (docs/what-to-prune.md)")
def output_l2(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """sqrt(sum_t a_i(t)^2) * ||D_:,i||, [U]; for heads over all their channels."""
    norms = square_sums(weights.down, 0).sqrt()  # [U]
    return statistics.square_sum.sqrt() * norms


@criterion(
    "act-weight",
    needs=("channel_square_sum",),
    source="Wanda (Sun et al. 2024, eq. 1) lifted to units",
    link="https://arxiv.org/abs/2306.11695",
)
def act_weight(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """sqrt(sum_c sum_t a_c(t)^2 ||w_c||^2), [U]: of neurons, which have one channel, the same as output-l2."""
    squares = statistics.channel_square_sum.reshape(weights.units, -1)  # [U, C]
    return (squares * channel_norms(weights, squares.shape[1])).sum(1).sqrt()


@criterion(
    "fluctuation",
    needs=("channel_square_sum", "channel_sum"),
    source="FLAP's WIFV (An et al. 2024, eq. 5)",
    link="https://arxiv.org/abs/2312.11983",
)
def fluctuation(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """sum_c var_t(a_c) ||w_c||^2, [U]: what no bias can make up for."""
    count = statistics.count
    spread = statistics.channel_square_sum - statistics.channel_sum.square() / count  # [U*C]
    variance = (spread / max(count - 1, 1)).clamp(min=0).reshape(weights.units, -1)
    return (variance * channel_norms(weights, variance.shape[1])).sum(1)


@criterion(
    "cfsp",
    needs=("square_sum",),
    source="Martra 2025 (optipfair's data-driven mode), with the activation norm of CFSP (Wang et al. 2025, eq. 8)",
    link="https://arxiv.org/abs/2409.13199",
)
def cfsp(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """(range(G_i) + range(U_i) + range(D_:,i), each over its largest) * sqrt(sum_t a_i(t)^2), [U]."""
    parts = [weights.up, weights.down.T, *([] if weights.gate is None else [weights.gate])]
    ranges = [part.float().amax(1) + part.float().amin(1).abs() for part in parts]  # [U] each
    weight = torch.stack([spread / (spread.max() + 1e-8) for spread in ranges]).sum(0)
    return weight * statistics.square_sum.sqrt()
