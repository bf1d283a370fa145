"""First-order Taylor expansion of the loss."""

from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics, widest
from dicer.model.units import UnitWeights


@criterion("taylor", needs=("gradient",), source="Xu et al. 2025, B.1 eq. 1 (after Ma et al. 2023)", link=XU_2025)
def taylor(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """Sum |w * dL/dw| over G_i, U_i and D_:,i, [U]; the gradient is of the whole calibration set."""
    gradient = statistics.gradient
    wide = widest(weights.up.device)
    score = (weights.up.float() * gradient.up).abs().sum(1, dtype=wide)  # [U]
    score += (weights.down.float() * gradient.down).abs().sum(0, dtype=wide)
    if weights.gate is not None and gradient.gate is not None:
        score += (weights.gate.float() * gradient.gate).abs().sum(1, dtype=wide)
    return score
