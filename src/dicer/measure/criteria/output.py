"""How much a unit adds to the residual stream: its activation times the norm of its output weights."""

from torch import Tensor

from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


@criterion("output-l2", needs=("square_sum",), source="our reconstruction of Yang et al. 2025 (docs/what-to-prune.md)")
def output_l2(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """sqrt(sum_t a_i(t)^2) * ||D_:,i||, [U]; for heads over all their channels."""
    norms: Tensor = weights.down.float().square().sum(0).sqrt()  # [U]
    return statistics.square_sum.sqrt() * norms
