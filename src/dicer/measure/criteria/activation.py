"""Activation magnitude: L2 norm and signed mean over the calibration tokens."""

from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


@criterion("act-l2", needs=("square_sum",), source="Xu et al. 2025, B.2", link=XU_2025)
def act_l2(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """sqrt(sum_t a_i(t)^2), [U]."""
    return statistics.square_sum.sqrt()


@criterion("act-mean", needs=("sum",), source="Xu et al. 2025, B.2", link=XU_2025)
def act_mean(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """(1/T) sum_t a_i(t), signed, [U]."""
    return statistics.sum / max(statistics.count, 1)
