"""Weight magnitude."""

from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


@criterion("weight-l2", source="Xu et al. 2025, B.3 eq. 2", link=XU_2025)
def weight_l2(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """Norm of (G_i, U_i, D_:,i) concatenated, [U]; an MLP without gate has no G."""
    square = weights.up.float().square().sum(1) + weights.down.float().square().sum(0)  # [U]
    if weights.gate is not None:
        square = square + weights.gate.float().square().sum(1)
    return square.sqrt()
