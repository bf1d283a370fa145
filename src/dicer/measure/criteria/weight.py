"""Weight magnitude."""

import torch
from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights

_PIECE = 256  # rows or columns: as float32 they stay in a core's cache, where a whole matrix takes ten times as long


@criterion("weight-l2", source="Xu et al. 2025, B.3 eq. 2", link=XU_2025)
def weight_l2(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """Norm of (G_i, U_i, D_:,i) concatenated, [U]; an MLP without gate has no G."""
    square = square_sums(weights.up, 1) + square_sums(weights.down, 0)  # [U]
    if weights.gate is not None:
        square = square + square_sums(weights.gate, 1)
    return square.sqrt()


def square_sums(weight: Tensor, over: int) -> Tensor:
    """Sums of squares of a matrix, float32 [rows] over columns (1) or [columns] over rows (0)."""
    if weight.device.type != "cpu":
        return weight.float().square().sum(over)
    step = _PIECE if over == 0 else _PIECE // 4
    sums = torch.empty(weight.shape[1 - over])
    for number, piece in enumerate(weight.split(step, 1 - over)):  # each keeps its strides, and so the bits of its sums
        # No small tensor outlives a large one, which would scatter the heap.
        sums[number * step : (number + 1) * step] = piece.float().square().sum(over)
    return sums
